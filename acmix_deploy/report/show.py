"""The report of an export, for a person."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from acmix_deploy.report.model import ExportReport
from acmix_deploy.report.tables import errors, graph_blocks, module_blocks, table


def show_export(report: ExportReport, console: Console) -> None:
    """Print everything of an export that a person wants to see."""
    console.print(
        Group(
            *_titled("Blocks in the model", module_blocks(report.blocks)),
            *_titled("Blocks in the graph", graph_blocks(report.fusion)),
            *_titled("Files", _files(report)),
            *_titled("Error against the PyTorch model, worst over all inputs", errors(report.verification)),
        )
    )
    made_for = report.target.notes if report.target else []
    for note in (*report.notes, *report.export.notes, *report.verification.notes, *made_for, *_latency_notes(report)):
        console.print(f"Note: {note}", style="yellow")
    console.print(f"\nFiles and report.json are in {_folder(report)}")
    console.print("Next, on the target:")
    for step in report.next_steps:
        console.print(f"  {step}", soft_wrap=True)


def _files(report: ExportReport) -> Table:
    rows = table("file", "nodes", "MB", "median ms", "p99 ms", "times faster", numeric=(1, 2, 3, 4, 5))
    plain = report.files["plain"].profile
    for file in report.files.values():
        row = [file.artifact.path.name, str(file.nodes), f"{file.size_bytes / 1e6:.2f}"]
        if file.profile and plain:
            ratio = "" if file.profile is plain else f"{plain.median_ms / file.profile.median_ms:.2f}"
            row += [f"{file.profile.median_ms:.1f}", f"{file.profile.p99_ms:.1f}", ratio]
        rows.add_row(*row)
    return rows


def _latency_notes(report: ExportReport) -> list[str]:
    profiles = [file.profile for file in report.files.values() if file.profile]
    where = {f"latency on ONNX Runtime, {profile.threads} threads of {profile.machine.cpu}" for profile in profiles}
    return [*where, *dict.fromkeys(profile.note for profile in profiles if profile.note)]


def _folder(report: ExportReport) -> str:
    return str(next(iter(report.files.values())).artifact.path.parent)


def _titled(title: str, table: Table) -> list[RenderableType]:
    return [Text(f"\n{title}", style="bold"), table if table.row_count else Text("  none")]
