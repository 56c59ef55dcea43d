"""All documents of a folder as one HTML file, which fetches nothing and runs nothing."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import rich.table
from jinja2 import Environment, PackageLoader, StrictUndefined

from acmix_deploy import __version__
from acmix_deploy.artifacts import replacing
from acmix_deploy.detection.images import Image, opencv
from acmix_deploy.errors import AcmixDeployError
from acmix_deploy.gate.history import histories
from acmix_deploy.gate.samples import GateSamples, Measured
from acmix_deploy.precision import SearchReport
from acmix_deploy.profile import Machine, Profile, ProfileDocument, compare
from acmix_deploy.report import plots, show, show_gate, show_profile, show_samples, tables
from acmix_deploy.report.documents import (
    BuildDocument,
    Fp16Document,
    FuseDocument,
    GateDocument,
    HtmlDocument,
    QuantizeDocument,
    VerifyDocument,
)
from acmix_deploy.report.folder import Folder, read_folder
from acmix_deploy.report.model import ExportReport
from acmix_deploy.report.show_verification import detections, notes
from acmix_deploy.verify import DetectionComparison, LayerErrors, Verification
from acmix_deploy.verify.detections import ImageComparison
from acmix_deploy.verify.picture import COLOURS, halves

_PICTURES = 3  # of each candidate
_ALL_PICTURES = 12
_LONGEST = 560  # px of a picture's longer side
_QUALITY = 85  # of JPEG
_MISMATCHES = 8  # told of a picture
_BLOCKS = 6  # of a model, each with a colour
_GROUPS = 3  # of the other layers, each with a grey
_LAYERS = 15  # the longest
_REST = plots.GREYS[-1]


class Grid(NamedTuple):
    """A table: cells with their state, columns with their alignment."""

    head: list[str]
    numeric: list[bool]
    rows: list[list[tuple[str, tables.State]]]


class Picture(NamedTuple):
    """An image as the reference and as the candidate see it, as data URIs."""

    title: str
    reference: str
    candidate: str
    mismatches: list[str]


class Part(NamedTuple):
    """A piece of a section, and the document that it is from; what is empty is not shown."""

    title: str
    source: str
    plot: plots.Plot | None = None
    caption: str = ""
    legend: Sequence[tuple[str, str]] = ()
    pictures: Sequence[Picture] = ()
    table: Grid | None = None
    lines: Sequence[str] = ()
    folded: bool = False


class Tile(NamedTuple):
    """A figure to begin with."""

    label: str
    value: str
    detail: str = ""
    state: tables.State = ""


def write_html(folder: Path, target: Path) -> HtmlDocument:
    """Write the report of a folder.

    Pictures are drawn where OpenCV is installed and the images are where they were.

    Args:
        folder: holds ``report.json`` of ``export``, or what ``verify``, ``profile``, ``gate run`` and others wrote.
        target: the HTML file.

    Returns:
        What the report was made of, and what was left out.

    Raises:
        UserError: the folder holds no document, or the file cannot be written.
    """
    found = read_folder(folder)
    sections = [(title, [*parts(found)]) for title, parts in _SECTIONS.items()]
    environment = Environment(
        loader=PackageLoader("acmix_deploy.report"),
        autoescape=True,
        finalize=lambda value: plots.printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("report.html").render(
        title=", ".join(dict.fromkeys(Path(export.model).name for export in found.of(ExportReport).values()))
        or folder.resolve().name,
        folder=folder.resolve().name,
        files=list(found.documents),
        skipped=found.notes,
        now=datetime.now(timezone.utc),
        version=__version__,
        palette=plots.PALETTE,
        outcomes=COLOURS,
        tiles=[*_tiles(found)],
        sections=[(title, parts) for title, parts in sections if parts],
    )
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return HtmlDocument(file=target, documents=list(found.documents), notes=list(found.notes))


def _tiles(folder: Folder) -> Iterator[Tile]:
    for export in folder.of(ExportReport).values():
        fusion, fused = export.fusion, f"{export.fusion.fused} of {len(export.fusion.blocks)}"
        nodes = f"{fusion.nodes_before} nodes became {fusion.nodes_after}"
        yield Tile("Blocks fused", fused, nodes, "good" if fusion.fused == len(fusion.blocks) else "")
        yield _accuracy(export.verification)
        plain = export.files["plain"]
        timed = {file.artifact.path.name: file.profile.median_ms for file in export.files.values() if file.profile}
        if plain.profile:
            fastest, before = min(timed, key=lambda name: timed[name]), plain.profile.median_ms
            detail = f"{fastest}, {timed[fastest]:.1f} ms instead of {before:.1f}"
            yield Tile("Fastest", f"{before / timed[fastest]:.2f} times", detail)
        small = min(export.files.values(), key=lambda file: file.size_bytes)
        detail = f"{small.artifact.path.name}, instead of {plain.size_bytes / 1e6:.2f}"
        yield Tile("Smallest", f"{small.size_bytes / 1e6:.2f} MB", detail)
    for found in folder.of(VerifyDocument).values():
        yield _accuracy(found)
    for verdict in folder.of(GateDocument).values():
        candidates = ", ".join(comparison.candidate for comparison in verdict.comparisons)
        yield Tile("Latency gate", verdict.outcome, candidates, show_gate.STATES[verdict.outcome])


def _accuracy(found: Verification) -> Tile:
    detail = ", ".join(found.beyond or found.unjudged or _candidates(found))
    return Tile(
        f"Against {found.reference}",
        {True: "within limits", False: "beyond a limit", None: "not judged"}[found.passed],
        detail,
        tables.verdict(found.passed).state,
    )


def _fused(folder: Folder) -> Iterator[Part]:
    for name, export in folder.of(ExportReport).items():
        yield Part("In the model", name, table=_grid(tables.module_blocks(export.blocks)))
        notes = tables.fusion_notes(export.fusion)
        yield Part("In the graph", name, table=_grid(tables.graph_blocks(export.fusion)), lines=notes)
        for role, built in export.engines.items():
            if built.inlined:
                yield Part(
                    f"In {export.files[role].artifact.path.name}", name, table=_grid(tables.inlined(built.inlined))
                )
    for name, fusion in folder.of(FuseDocument).items():
        yield Part("In the graph", name, table=_grid(tables.graph_blocks(fusion)), lines=tables.fusion_notes(fusion))
    for name, built in folder.of(BuildDocument).items():
        if built.inlined:
            yield Part(f"In {built.artifact.path.name}", name, table=_grid(tables.inlined(built.inlined)))


def _files(folder: Folder) -> Iterator[Part]:
    for name, export in folder.of(ExportReport).items():
        sizes = {file.artifact.path.name: [("accent", file.size_bytes / 1e6)] for file in export.files.values()}
        yield Part(
            "Size and latency", name, plots.bars(sizes, "MB"), "Size of each file.", table=_grid(show.files(export))
        )
        if export.device:
            yield Part(f"On {export.device.name}", name, table=_grid(tables.device(export.device)))


def _errors(folder: Folder) -> Iterator[Part]:
    for name, found in _verifications(folder):
        worst = [one for candidate in _candidates(found) for one in found.worst(candidate)]
        dots = [plots.Error(f"{one.candidate}, {one.part}", one.relative_l2, one.limit, one.passed) for one in worst]
        caption = "Relative L2 of each output, worst over all inputs. The bar is the limit; a cross is beyond it."
        yield Part(
            f"Against {found.reference}",
            name,
            plots.errors(dots) if dots else None,
            caption,
            table=_grid(tables.errors(found)),
        )


def _precision(folder: Folder) -> Iterator[Part]:
    """What a reduced type does inside a file, and what was left out of it."""
    for name, found in _verifications(folder):
        for along in found.layers:
            yield from _along(name, along)
        if found.half:
            yield Part("Magnitudes in float16", name, table=_grid(tables.half(found)))
    for name, half in folder.of(Fp16Document).items():
        yield Part(
            "In float32 beside float16", name, table=_grid(tables.kept_in_float32(half)), lines=tables.fp16_notes(half)
        )
    quantized = {name: report.int8 for name, report in folder.of(ExportReport).items() if report.int8}
    for name, report in (*quantized.items(), *folder.of(QuantizeDocument).items()):
        if report.search:
            yield _search(name, report.search)
        lines = tables.int8_notes(report)
        yield Part("Layers in INT8", name, table=_grid(tables.quantized_layers(report)), lines=lines, folded=True)
        yield Part("Layers not in INT8", name, table=_grid(tables.float_layers(report)), folded=True)


def _search(name: str, found: SearchReport) -> Part:
    """What every set of layers bought; drawn by the first limit, told by all."""
    key, limit = next(iter(found.limits.items()))
    trials = [
        plots.Trial(step.multiply_adds, step.figures[key], step.met, index == found.chosen)
        for index, step in enumerate(found.steps)
    ]
    caption = (
        f"Each set of layers that was tried: the share of multiply-adds in INT8, and {tables.figure_name(key)}. "
        "The line is what is accepted; a cross is beyond a limit; the ring is what was written."
    )
    return Part(
        "Search for the INT8 target",
        name,
        plots.trials(trials, limit),
        caption,
        table=_grid(tables.search_steps(found)),
        lines=[tables.searched(found)],
    )


def _along(source: str, found: LayerErrors) -> Iterator[Part]:
    steps = [plots.Step(one.relative_l2, one.limit, one.passed, one.block) for one in found.layers]
    caption = (
        f"Relative L2 of {len(steps)} tensors in the order of the graph, worst over the inputs. The line is the limit; "
        "a cross is beyond it, and stands at the top where nothing could be compared. Shades are fused blocks."
    )
    worst, said = _grid(tables.worst_layers(found)), tables.layer_notes(found)
    yield Part(f"Along {found.candidate}", source, plots.depth(steps), caption, table=worst, lines=said)
    if errors := [step.value for step in steps if step.value]:
        limit = min(step.limit for step in steps)
        caption = f"How many of these tensors have which error; {len(steps) - len(errors)} without one are left out."
        yield Part(f"Errors within {found.candidate}", source, plots.histogram(errors, limit), caption)


def _detections(folder: Folder) -> Iterator[Part]:
    left = _ALL_PICTURES
    for name, found in _verifications(folder):
        if found.detections:
            yield Part(f"Against {found.reference}", name, table=_grid(detections(found)))
        for candidate in found.detections:
            worst = [image for image in candidate.images if image.having("class changed", "lost", "added")]
            shown = worst[: min(_PICTURES, left)]
            left -= len(shown)
            if shown:
                yield _pictures(name, found.reference, candidate, shown, len(worst))


def _pictures(
    source: str, reference: str, found: DetectionComparison, shown: Sequence[ImageComparison], mismatched: int
) -> Part:
    pictures: list[Picture] = []
    problems: dict[str, None] = {}
    for image in shown:
        try:
            left, right = map(_uri, halves(image, _LONGEST))
        except (AcmixDeployError, ValueError) as error:  # a path may have a zero byte
            problems[str(error)] = None
            continue
        mismatches = [*map(str, image.having("class changed", "lost", "added"))]
        rest = [f"and {len(mismatches) - _MISMATCHES} more"] if len(mismatches) > _MISMATCHES else []
        height, width = image.size
        title = f"{image.image.name} at {height}x{width}"
        pictures.append(Picture(title, left, right, mismatches[:_MISMATCHES] + rest))
    of = f"{mismatched} of {len(found.images)} images differ"
    caption = f"{of}; the worst, {reference} on the left or above, {found.candidate} on the right or below."
    return Part(f"Worst images of {found.candidate}", source, caption=caption, pictures=pictures, lines=[*problems])


def _latency(folder: Folder) -> Iterator[Part]:
    for name, profiles in _profiles(folder).items():
        samples = {profile.file: profile.samples_ms for profile in profiles}
        caption = (
            "Hills reach from the smallest sample to the 99th percentile, thick lines from the 10th to the 90th; "
            "dots are medians. Files in one plot were measured in turn."
        )
        where = dict.fromkeys(profile.where for profile in profiles)
        noted = dict.fromkeys((*show_profile.notes(profiles), *compare(profiles)))
        yield Part(
            "Distributions",
            name,
            plots.distributions(samples),
            caption,
            table=_grid(tables.latencies(profiles)),
            lines=[*where, *noted],
        )


def _layers(folder: Folder) -> Iterator[Part]:
    for name, profiles in _profiles(folder).items():
        timed = [profile for profile in profiles if profile.layers]
        if not timed:
            continue
        colours = _colours(timed)
        bars = {profile.file: _bar(profile, colours) for profile in timed}
        shown = {colour for bar in bars.values() for colour, _ in bar}
        legend = [(colour, block) for block, colour in (*colours.items(), ("all others", _REST)) if colour in shown]
        caption = "Sum of the median times of the layers, each measured with the profiler at work."
        yield Part(
            "Time of each block", name, plots.bars(bars, "ms"), caption, legend, table=_grid(show_profile.blocks(timed))
        )
        for profile in timed:
            yield Part(f"Longest layers of {profile.file}", name, table=_grid(_longest(profile)), folded=True)


def _bar(profile: Profile, colours: Mapping[str, str]) -> plots.Bar:
    """The time of each block by its colour, in the order of the colours; what has none comes last."""
    times = dict.fromkeys((*colours.values(), _REST), 0.0)
    for block in profile.blocks:
        times[colours.get(block.block, _REST)] += block.ms
    return [(colour, ms) for colour, ms in times.items() if ms]


def _colours(profiles: Iterable[Profile]) -> dict[str, str]:
    """Colours of the blocks, and greys of the longest other groups of layers."""
    families: dict[str, str | None] = {}
    longest: dict[str, float] = {}
    for block in (block for profile in profiles for block in profile.blocks):
        families[block.block] = block.family
        longest[block.block] = max(longest.get(block.block, 0), block.ms)
    ranked = sorted(longest, key=lambda name: -longest[name])
    blocks = sorted([name for name in ranked if families[name]][:_BLOCKS])
    others = [name for name in ranked if not families[name]][:_GROUPS]
    return dict(zip([*blocks, *others], [*plots.HUES[: len(blocks)], *plots.GREYS], strict=False))


def _longest(profile: Profile) -> rich.table.Table:
    rows = tables.table("layer", "type", "block", "ms", "share", numeric=(3, 4))
    total = sum(layer.median_ms for layer in profile.layers) or 1
    ranked = sorted(profile.layers, key=lambda layer: -layer.median_ms)
    for layer in ranked[:_LAYERS]:
        share = f"{layer.median_ms / total:.1%}"
        rows.add_row(layer.name, layer.kind, layer.block, tables.milliseconds(layer.median_ms), share)
    if rest := ranked[_LAYERS:]:
        ms = sum(layer.median_ms for layer in rest)
        rows.add_row(f"and {len(rest)} more", "", "", tables.milliseconds(ms), f"{ms / total:.1%}")
    return rows


def _meanwhile(folder: Folder) -> Iterator[Part]:
    for name, profiles in _profiles(folder).items():
        watched = [profile for profile in profiles if profile.conditions or profile.power]
        if watched:
            yield Part("The machine meanwhile", name, table=_grid(show_profile.conditions(watched)))


def _gate(folder: Folder) -> Iterator[Part]:
    for name, verdict in folder.of(GateDocument).items():
        yield Part(show_gate.title(verdict), name, lines=[*show_gate.reasons(verdict)])
        for rows in show_gate.findings(verdict):
            yield Part("", "", table=_grid(rows))
    measured = folder.of(GateSamples)
    for history in histories((name, samples.candidate) for name, samples in measured.items()):
        rounds = [[median(one.samples_ms) for one in measured[run.file].candidate.rounds] for run in history.runs]
        bounds = np.array([(min(medians), max(medians)) for medians in rounds])
        names = [f"{run.started:%Y-%m-%d %H:%M}" if run.started else run.file for run in history.runs]
        plot = plots.history([run.median_ms for run in history.runs], bounds, names) if len(names) > 1 else None
        caption = (
            f"Median of each run, and the range of the medians of its rounds. {show_samples.drift(history.drift)}."
        )
        yield Part(history.model, f"{len(rounds)} runs", plot, caption, table=_grid(show_samples.runs(history)))


def _environment(folder: Folder) -> Iterator[Part]:
    found = [(profile.machine, name) for name, profiles in _profiles(folder).items() for profile in profiles]
    for machine in (
        machine for index, (machine, _) in enumerate(found) if machine not in [it for it, _ in found[:index]]
    ):
        if machine:
            names = dict.fromkeys(name for other, name in found if other == machine)
            yield Part("Machine", ", ".join(names), table=_grid(_machine(machine)))
    exports = folder.of(ExportReport)
    engines = [
        (export.files[role].artifact, built) for export in exports.values() for role, built in export.engines.items()
    ]
    engines += [(built.artifact, built) for built in folder.of(BuildDocument).values()]
    for artifact, built in engines:
        yield Part("Engine", artifact.path.name, table=_grid(tables.engine(built.manifest)))
    for name, export in exports.items():
        spent = tables.table("stage", "s", numeric=(1,))
        for stage, seconds in export.seconds.items():
            spent.add_row(stage, f"{seconds:.1f}")
        yield Part("Time spent", name, table=_grid(spent), folded=True)


def _machine(machine: Machine) -> rich.table.Table:
    rows = tables.table("", "")
    rows.show_header = False
    told = {"GPU": machine.gpu, "driver": machine.driver, "TensorRT": machine.tensorrt, "CPU": machine.cpu}
    for name, value in (*told.items(), ("cores", machine.cores), ("system", machine.system), *machine.versions.items()):
        if value is not None:
            rows.add_row(name, str(value))
    return rows


def _notes(folder: Folder) -> Iterator[Part]:
    for name, export in folder.of(ExportReport).items():
        yield Part("Export", name, lines=show.notes(export))
        yield Part("Next", name, lines=export.next_steps)
    for name, found in folder.of(VerifyDocument).items():
        yield Part("Comparison", name, lines=notes(found))


_SECTIONS: dict[str, Callable[[Folder], Iterator[Part]]] = {
    "What was fused": _fused,
    "Files": _files,
    "Error": _errors,
    "Precision": _precision,
    "Detections": _detections,
    "Latency": _latency,
    "Gate": _gate,
    "Blocks and layers": _layers,
    "Power and clocks": _meanwhile,
    "Environment": _environment,
    "Notes": _notes,
}


def _verifications(folder: Folder) -> Iterator[tuple[str, Verification]]:
    yield from ((name, export.verification) for name, export in folder.of(ExportReport).items())
    yield from folder.of(VerifyDocument).items()


def _candidates(found: Verification) -> Iterable[str]:
    return dict.fromkeys(comparison.candidate for comparison in found.comparisons)


def _profiles(folder: Folder) -> dict[str, list[Profile]]:
    """Profiles by document; of the gate's documents those of the newest."""
    found = {
        name: [file.profile for file in export.files.values() if file.profile]
        for name, export in folder.of(ExportReport).items()
    }
    found |= {name: document.profiles for name, document in folder.of(ProfileDocument).items()}
    if gate := folder.of(GateSamples):
        newest = max(gate, key=lambda name: (str(gate[name].candidate.started), name))
        sides = {"baseline": gate[newest].baseline, "candidate": gate[newest].candidate}
        found[newest] = [
            _as_profile(side, measured) for side, measured in sides.items() if measured and measured.rounds
        ]
    return {name: profiles for name, profiles in found.items() if profiles}


def _as_profile(side: str, measured: Measured) -> Profile:
    return Profile(
        file=f"{measured.model}, {side}",
        input_shapes=measured.input_shapes,
        provider=measured.provider,
        precision=measured.precision,
        threads=measured.threads,
        rounds=len(measured.rounds),
        samples_ms=tuple(sample for one in measured.rounds for sample in one.samples_ms),
        conditions=tuple(reading for turn in measured.turns for reading in (turn.before, turn.after)),
        machine=measured.machine,
        notes=measured.notes,
    )


def _grid(table: rich.table.Table) -> Grid:
    """A table for a terminal as one for a page."""
    columns = [[_cell(cell) for cell in column.cells] for column in table.columns]
    return Grid(
        head=[str(column.header) for column in table.columns] if table.show_header else [],
        numeric=[column.justify == "right" for column in table.columns],
        rows=[list(row) for row in zip(*columns, strict=True)],
    )


def _cell(cell: object) -> tuple[str, tables.State]:
    """Text and state of a cell."""
    return str(cell), cell.state if isinstance(cell, tables.Cell) else ""


def _uri(image: Image) -> str:
    cv2 = opencv()
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
    assert done
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
