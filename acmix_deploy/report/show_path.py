"""The time of each step from a source to the boxes, for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from rich.console import Console

from acmix_deploy.report.tables import milliseconds, table
from acmix_deploy.serving.end_to_end import EndToEndDocument
from acmix_deploy.serving.path import PathTimes, Step


def show_times(found: Sequence[tuple[str, PathTimes]], console: Console) -> None:
    """Print the steps of files beside each other, by the names of the files, and what they came to."""
    heads = [
        head for name, _ in found for head in (f"{name} median ms" if len(found) > 1 else "median ms", "p99", "busy")
    ]
    rows = table("step", *heads, numeric=tuple(range(1, 1 + len(heads))))
    taken = [{step.step: step for step in times.steps} for _, times in found]
    for step in get_args(Step):
        if any(step in steps for steps in taken):
            cells = []
            for steps in taken:
                one = steps.get(step)
                cells += [milliseconds(one.median_ms), milliseconds(one.p99_ms), f"{one.busy:.0%}"] if one else [""] * 3
            rows.add_row(step, *cells)
    console.print(rows)
    for name, times in found:
        console.print(f"{name}: {in_words(times)}")


def show_end_to_end(found: EndToEndDocument, console: Console) -> None:
    """Print what files took from a source to the boxes, beside each other."""
    show_times([(model.file, model.times) for model in found.models], console)
    first = found.models[0]
    for model in found.models:
        ratio = model.times.images_per_second / first.times.images_per_second
        faster = f", {ratio:.2f} times the first" if model is not first else ""
        rates = f"{min(model.rates):.1f} to {max(model.rates):.1f}"
        console.print(f"{model.file}: {rates} images a second in {len(model.rates)} rounds{faster}")
    device = found.machine.gpu or f"{found.threads} threads of {found.machine.cpu}"
    console.print(f"{found.source}, {device}", style="dim")


def in_words(times: PathTimes) -> str:
    """What the steps came to, in a sentence."""
    said = [f"{times.images_per_second:.1f} images a second"]
    if times.batch > 1:
        said.append(f"batches of {times.batch}")
    if times.bottleneck == "source":
        said.append("which waited for the source")
    elif times.bottleneck:
        said.append(f"the others waited for {times.bottleneck}")
    if times.fps:
        kept = "kept up with" if times.kept_up else "did not keep up with"
        said.append(f"{kept} the {times.fps:g} frames a second of the source")
    if times.dropped:
        said.append(f"{times.dropped} frames dropped")
    return ", ".join(said)
