"""What the gate measured, and how it went over time, for a person."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from acmix_deploy.gate.history import Drift, GateHistory
from acmix_deploy.gate.samples import GateSamples
from acmix_deploy.report.documents import HistoryDocument
from acmix_deploy.report.tables import milliseconds, table


def show_samples(samples: GateSamples, file: Path, console: Console) -> None:
    """Print medians and spread of what was measured, and what to do next."""
    rows = table(
        "model", "rounds", "samples", "median ms", "p99 ms", "rounds from", "to", "dropped", numeric=tuple(range(1, 8))
    )
    models = [measured for measured in (samples.baseline, samples.candidate) if measured]
    for measured in models:
        medians = [median(one.samples_ms) for one in measured.rounds]
        latencies = [sample for one in measured.rounds for sample in one.samples_ms]
        times = (median(latencies), float(np.percentile(latencies, 99)), min(medians), max(medians))
        counts = (str(len(measured.rounds)), str(len(latencies)))
        rows.add_row(measured.model, *counts, *map(milliseconds, times), str(measured.dropped or ""))
    console.print(rows)
    for note in dict.fromkeys(note for measured in models for note in measured.remarks):
        console.print(f"Note: {note}", style="yellow")
    console.print(f"\nEvery sample is in {file}")
    others = "" if samples.baseline else " CANDIDATE.json"
    console.print(f"Next: acmix-deploy gate check {file}{others}")


def show_histories(found: HistoryDocument, console: Console) -> None:
    """Print the runs of each model in the order of time, and what was left out."""
    for history in found.histories:
        console.print(history.model)
        console.print(runs(history))
        console.print(drift(history.drift), style="yellow" if history.drift else "dim")
    for note in found.notes:
        console.print(f"Left out: {note}", style="yellow", soft_wrap=True)


def runs(history: GateHistory) -> Table:
    """The runs of one model."""
    rows = table("started", "file", "median ms", "to the first", "changed since the run before", numeric=(2, 3))
    for run in history.runs:
        when = run.started.strftime("%Y-%m-%d %H:%M") if run.started else ""
        rows.add_row(when, run.file, milliseconds(run.median_ms), f"{run.ratio:.3f}", "; ".join(run.changed))
    return rows


def drift(found: Drift | None) -> str:
    """A step or a trend in words."""
    if found is None:
        return "No step and no trend beyond the noise between runs"
    times = f"{found.ratio:.3f} times the time (p = {found.p:.2g})"
    return f"A step: from {found.since} on {times}" if found.kind == "step" else f"A trend: from first to last {times}"
