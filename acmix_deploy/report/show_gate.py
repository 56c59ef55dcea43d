"""The verdict of the latency gate: for a person, as JUnit XML, and as Markdown for the summary of a job."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from acmix_deploy.artifacts import replacing
from acmix_deploy.errors import UserError
from acmix_deploy.gate.samples import Parity
from acmix_deploy.gate.verdict import Comparison, Judged, Outcome, Verdict
from acmix_deploy.report.tables import Cell, State, milliseconds, table

STATES: dict[Outcome, State] = {"pass": "good", "inconclusive": "unsure", "not comparable": "unsure", "fail": "bad"}
"""How what the gate finds is shown."""

Cells = tuple[str, ...]

_LATENCY = ("candidate", "latency", "baseline ms", "candidate ms", "change", "95% interval", "spread", "rounds", "")
_PARITY = ("candidate", "exactness", "found", "limit", "")


def show_verdict(verdict: Verdict, console: Console) -> None:
    """Print the verdict with everything that it rests on."""
    for rows in findings(verdict):
        console.print(rows)
        console.print()
    for line in reasons(verdict):
        console.print(line, soft_wrap=True)
    for note in _notes(verdict):
        console.print(f"Note: {note}", style="yellow", soft_wrap=True)
    console.print(Cell(title(verdict), STATES[verdict.outcome]))


def findings(verdict: Verdict) -> Iterator[Table]:
    """The latencies and the exactness that were judged, as far as there are any."""
    for columns, found in ((_LATENCY, _latencies(verdict)), (_PARITY, _parities(verdict))):
        rows = table(*columns, numeric=tuple(range(2, len(columns) - 1)))
        for cells, outcome in found:
            rows.add_row(*cells, Cell(outcome, STATES[outcome]))
        if rows.row_count:
            yield rows


def write_junit(verdict: Verdict, path: Path, *, strict: bool = False) -> None:
    """Write a test suite with a case for each candidate's percentiles and its exactness.

    What is inconclusive or not comparable is skipped, where ``strict`` it fails.

    Raises:
        UserError: the file cannot be written.
    """
    suite = ElementTree.Element("testsuite", name="acmix-deploy gate")
    for comparison in verdict.comparisons:
        for name, outcome, reason in _cases(comparison):
            case = ElementTree.SubElement(suite, "testcase", classname=comparison.candidate, name=name)
            if outcome != "pass":
                kind = "failure" if strict or outcome == "fail" else "skipped"
                ElementTree.SubElement(case, kind, message=f"{outcome}: {reason}")
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    suite.set("errors", "0")
    ElementTree.indent(suite)
    with replacing(path) as temporary:
        ElementTree.ElementTree(suite).write(temporary, encoding="utf-8", xml_declaration=True)


def write_summary(verdict: Verdict, path: Path) -> None:
    """Append the verdict as Markdown. Raises UserError where the file cannot be written."""
    parts = [f"### {title(verdict)}"]
    for columns, found in ((_LATENCY, _latencies(verdict)), (_PARITY, _parities(verdict))):
        if rows := [(*cells, outcome) for cells, outcome in found]:
            aligned = ["---", "---", *["---:"] * (len(columns) - 3), "---"]
            parts.append("\n".join(map(_row, (columns, aligned, *rows))))
    lines = [*reasons(verdict), *(f"Note: {note}" for note in _notes(verdict))]
    parts.append("\n".join(f"- {_escaped(line)}" for line in lines))
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("\n\n".join(filter(None, parts)) + "\n\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "Choose a file that you may write to.") from error


def title(verdict: Verdict) -> str:
    """The outcome in words."""
    return f"Latency gate: {verdict.outcome} ({100 * verdict.tolerance:+.3g}% is tolerated)"


def _latencies(verdict: Verdict) -> Iterator[tuple[Cells, Outcome]]:
    for comparison in verdict.comparisons:
        for judged in comparison.judged:
            yield (comparison.candidate, judged.metric, *_figures(judged)), judged.outcome


def _figures(judged: Judged) -> tuple[str, ...]:
    if judged.ratio is None or judged.low is None or judged.high is None or judged.rounds is None:
        return ("",) * 6
    return (
        milliseconds(judged.baseline_ms),
        milliseconds(judged.candidate_ms),
        _change(judged.ratio),
        f"{_change(judged.low)} to {_change(judged.high)}",
        f"{judged.spread:.1%}",
        ", ".join(dict.fromkeys(map(str, judged.rounds))),
    )


def _change(ratio: float) -> str:
    return f"{ratio - 1:+.1%}"


def _parities(verdict: Verdict) -> Iterator[tuple[Cells, Outcome]]:
    for comparison in verdict.comparisons:
        for found in comparison.parity:
            yield (comparison.candidate, found.metric, _value(found), f"{found.limit:.1e}"), _outcome(found)


def _value(parity: Parity) -> str:
    return "nothing" if parity.value is None else f"{parity.value:.1e}"


def _outcome(parity: Parity) -> Outcome:
    return "pass" if parity.passed else "fail"


def _cases(comparison: Comparison) -> Iterator[tuple[str, Outcome, str]]:
    """Name, outcome and reason of everything that was judged, and of what forbade to."""
    if comparison.differences:
        yield "comparable", "not comparable", "; ".join(comparison.differences)
    for judged in comparison.judged:
        yield judged.metric, judged.outcome, judged.reason
    for found in comparison.parity:
        yield found.metric, _outcome(found), f"{_value(found)} found, at most {found.limit:.1e} is accepted"


def reasons(verdict: Verdict) -> Iterator[str]:
    """Why, for everything that did not pass, and for every latency."""
    for comparison in verdict.comparisons:
        for name, outcome, reason in _cases(comparison):
            if outcome == "not comparable":
                yield f"{comparison.candidate} cannot be compared with {comparison.baseline}: {reason}"
            elif outcome != "pass" or name in {judged.metric for judged in comparison.judged}:
                yield f"{comparison.candidate}, {name}: {reason}"


def _notes(verdict: Verdict) -> Iterator[str]:
    return iter(dict.fromkeys(note for comparison in verdict.comparisons for note in comparison.notes))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Text in which nothing is taken for Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|&])", r"\\\1", text)
