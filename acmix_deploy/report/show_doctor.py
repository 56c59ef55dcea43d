"""A diagnosis, for a person."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from acmix_deploy.doctor.diagnosis import Component, Diagnosis, Examination, Finding
from acmix_deploy.doctor.diagnosis import State as ComponentState
from acmix_deploy.report.tables import Cell, State, table

_STATES: dict[ComponentState, State] = {"ok": "good", "missing": "unsure", "fault": "bad"}


def show_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print what there is, what is missing, and what is wrong."""
    console.print(Text(diagnosis.machine, style="bold"), component_rows(diagnosis.environment))
    if diagnosis.file:
        _show_file(diagnosis.file, console)
    console.print("\nNothing is wrong." if diagnosis.healthy else "\nSomething is wrong, see above.")


def component_rows(components: Iterable[Component]) -> Table:
    """A row for each, and below it what to do about it."""
    rows = table("", "", "")
    rows.show_header = False
    for component in components:
        rows.add_row(component.name, Cell(component.state, _STATES[component.state]), component.found)
        if component.advice:
            rows.add_row("", "", component.advice)
    return rows


def _show_file(file: Examination, console: Console) -> None:
    facts = table("", "")
    facts.show_header = False
    for name, value in file.contents.items():
        facts.add_row(name, value)
    for block in file.module_blocks:
        geometry = ", ".join(f"{name}={value}" for name, value in (block.geometry or {}).items())
        facts.add_row("block", f"{block.name}: {block.family}, {block.status} {geometry}".rstrip())
    for fused in file.graph_blocks:
        facts.add_row("block", f"{fused.name}: {fused.family}, {'can be fused' if fused.fused else 'left alone'}")
    console.print("", Text(f"{file.path}: {file.kind}", style="bold"), facts, sep="\n")
    for note in file.notes:
        console.print(f"Note: {note}", style="yellow")
    if file.findings:
        console.print("", Text("Known faults", style="bold"), _findings(file.findings), sep="\n")


def _findings(findings: tuple[Finding, ...]) -> Table:
    """Each fault once, with the places that have it, and what mends it."""
    rows = table("fault", "where", "found, and what mends it")
    groups: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        groups.setdefault((finding.fault, finding.found, finding.remedy), []).append(finding.where)
    for (fault, found, remedy), places in groups.items():
        rows.add_row(Cell(fault, "bad"), ", ".join(filter(None, places)), found)
        rows.add_row("", "", remedy)
    return rows
