"""Results as tables for a terminal. Needs neither PyTorch nor anything else beyond the rewriting stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.device.stages import DeviceReport
from acmix_deploy.doctor.faults import FAULTS
from acmix_deploy.families import BlockReport
from acmix_deploy.fusion import FusionReport
from acmix_deploy.manifest import AnyManifest, HeaderManifest
from acmix_deploy.onnx_file import counted
from acmix_deploy.plugin.library import PluginLibrary
from acmix_deploy.precision import Fp16Report, Int8Report, SearchReport
from acmix_deploy.profile import Profile
from acmix_deploy.verify import LayerErrors, Verification

_OVERFLOWS = 8  # nodes of a file
_WIDEST = 10_000  # columns of a terminal

State = Literal["", "good", "unsure", "bad"]
_STYLES: dict[State, str] = {"": "", "good": "green", "unsure": "yellow", "bad": "bold red"}


class Cell(Text):
    """Text with a state, which a terminal and a page show in their colours."""

    def __init__(self, text: str, state: State = "") -> None:
        super().__init__(text, style=_STYLES[state])
        self.state = state


class _Rows(Table):
    """A table that a narrow terminal shows row by row, a line a cell, where words or numbers would be cut."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = self.__rich_measure__(console, options.update(max_width=_WIDEST)).minimum
        if needed <= options.max_width or not self.show_header:
            yield from super().__rich_console__(console, options)
            return
        for row, cells in enumerate(zip(*(column.cells for column in self.columns), strict=True)):
            if row:
                yield ""
            lines = Table.grid(padding=(0, 2, 0, 0))
            lines.add_column(style="dim")
            lines.add_column(overflow="fold")
            for column, cell in zip(self.columns, cells, strict=True):
                if str(cell):
                    lines.add_row(column.header, cell)
            yield lines


def module_blocks(blocks: Iterable[BlockReport]) -> Table:
    """What was recognised in the module."""
    rows = table("name", "class", "status", "geometry", "repaired, or why not")
    for block in blocks:
        geometry = ", ".join(f"{key}={value}" for key, value in (block.geometry or {}).items())
        repaired = "; ".join(FAULTS[fault].of_block for fault in block.repaired)
        rows.add_row(block.name, block.class_name, block.status, geometry, repaired or block.reason)
    return rows


def graph_blocks(fusion: FusionReport) -> Table:
    """What was fused in the graph."""
    rows = table("name", "fused", "operator", "settings", "relative L2, or why not")
    for block in fusion.blocks:
        shown = {key: value for key, value in block.settings.items() if not key.startswith("plugin")}
        settings = ", ".join(f"{key}={_short(value)}" for key, value in shown.items())
        outcome = block.reason if block.relative_l2 is None else f"{block.relative_l2:.1e}"
        rows.add_row(block.name, "yes" if block.fused else "no", block.operator, settings, outcome)
    return rows


def fusion_notes(fusion: FusionReport) -> list[str]:
    """What the table of the blocks in a graph does not say."""
    found = []
    if fusion.already:
        found.append(f"the file was fused before: it has {counted(fusion.already)} already")
    if fusion.why_hidden:
        found.append(fusion.why_hidden)
    if fusion.inlined:
        found.append(f"local functions are put in place of their calls: {', '.join(fusion.inlined)}")
    found += [
        f"ONNX Runtime does not know {operator} ({', '.join(nodes)}): blocks behind it were proven on random "
        "numbers for its results"
        for operator, nodes in fusion.unknown.items()
    ]
    if fusion.unproven:
        found.append(
            "that the fused file runs is not proven, each fused block is: as before fusion, " + fusion.unproven
        )
    return found


def errors(verification: Verification) -> Table:
    """The worst comparison of each output of each candidate."""
    rows = table("candidate", "output", "max abs", "relative L2", "limit", "cosine", "", numeric=(2, 3, 4, 5))
    for candidate in dict.fromkeys(comparison.candidate for comparison in verification.comparisons):
        for found in verification.worst(candidate):
            row = [candidate, found.part]
            if found.problem:
                row += [found.problem, "", "", ""]
            else:
                limit = "" if found.limit is None else f"{found.limit:.1e}"
                row += [f"{found.max_abs:.1e}", f"{found.relative_l2:.1e}", limit, f"{found.cosine:.7f}"]
            rows.add_row(*row, verdict(found.passed))
    return rows


def half(verification: Verification) -> Table:
    """What candidates hold in float16, each with its largest magnitude, and the nodes that are beyond float16."""
    rows = table("candidate", "tensors in float16", "largest magnitude", "node", "", numeric=(1, 2))
    for found in verification.half:
        if found.passed:
            rows.add_row(found.candidate, str(found.tensors), f"{found.largest:.4g}", "", verdict(True))
        for overflow in found.overflows[:_OVERFLOWS]:
            size = "infinite" if overflow.magnitude is None else f"{overflow.magnitude:.4g}"
            rows.add_row(found.candidate, str(found.tensors), size, overflow.node, verdict(False))
        if rest := len(found.overflows[_OVERFLOWS:]):
            rows.add_row(found.candidate, "", "", f"and {rest} more", verdict(False))
        for zero in found.vanished[:_OVERFLOWS]:
            rows.add_row(found.candidate, str(found.tensors), f"{zero.magnitude:.4g}", zero.node, Cell("becomes zero"))
        if rest := len(found.vanished[_OVERFLOWS:]):
            rows.add_row(found.candidate, "", "", f"and {rest} more", Cell("becomes zero"))
    return rows


def worst_layers(found: LayerErrors) -> Table:
    """The tensors of a candidate with the largest errors, and the node that each begins at."""
    rows = table("node", "operator", "tensor", "block", "relative L2", "limit", "", numeric=(4, 5))
    for layer in found.worst():
        row = (layer.node, layer.operator, layer.tensor, layer.block)
        error = layer.problem or f"{layer.relative_l2:.1e}"
        rows.add_row(*row, error, f"{layer.limit:.1e}", Cell("ok", "good") if layer.passed else Cell("beyond", "bad"))
    return rows


def layer_notes(found: LayerErrors) -> list[str]:
    """Where the error begins, and what was not looked at."""
    counts = (
        (found.unshared, "are not in the reference, or in another shape"),
        (found.chosen, "are behind a choice, such as of the best boxes"),
    )
    left = " and ".join(f"{count} {why}" for count, why in counts if count)
    return [
        f"{found}",
        *([f"of the floating-point tensors of {found.candidate} {left}, and were not compared"] * bool(left)),
    ]


def verdict(passed: bool | None, unjudged: str = "not judged") -> Cell:
    """A word for the last column."""
    if passed is None:
        return Cell(unjudged)
    return Cell("ok", "good") if passed else Cell("FAILED", "bad")


def kept_in_float32(report: Fp16Report) -> Table:
    """How many nodes are not in float16, by the group or the pattern that they fit."""
    rows = table("nodes in float32", "for", numeric=(0,))
    for choice, count in Counter(report.float32_nodes.values()).items():
        rows.add_row(str(count), choice)
    return rows


def fp16_notes(report: Fp16Report) -> list[str]:
    """What became something else in float16."""
    return [
        f"{name} holds up to {size:.4g} and is clipped to float16's 65504: keep range in float32"
        for name, size in report.clipped.items()
    ]


def int8_notes(report: Int8Report) -> list[str]:
    """Why the calibration may be wrong, and what the choice of types costs or excludes."""
    if report.scheme == "uint8":
        return [
            *report.notes,
            "it is for ONNX Runtime on a CPU alone: activations have zero points, which TensorRT does not read",
        ]
    if report.rest == "float16" or not report.attention:
        return report.notes
    return [
        *report.notes,
        f"the attention ({', '.join(report.attention)}) computes in float32, as all between the layers. From TensorRT "
        "10 on types come from the file, and in float32 the plugin has scalar kernels alone, none for tensor cores: "
        "use --fp16 there, which needs a file of opset 19",
    ]


def quantized_layers(report: Int8Report, most: int = 12) -> Table:
    """The layers in INT8 with the largest errors, and how many more there are."""
    rows = table("layer in INT8", "weight", "relative L2, alone", numeric=(2,))
    for layer in report.layers[:most]:
        rows.add_row(layer.name, layer.weight, f"{layer.relative_l2:.1e}")
    if rest := report.layers[most:]:
        rows.add_row(f"and {len(rest)} more", "", f"at most {rest[0].relative_l2:.1e}")
    return rows


def search_steps(search: SearchReport) -> Table:
    """The sets of layers that were tried for a target, and what each has."""
    names = list(search.steps[0].figures)
    heads = "step", "tried", "layers in INT8", "of multiply-adds"
    rows = table(*heads, *map(figure_name, names), "s", "", numeric=(0, 2, 3, *range(4, 5 + len(names))))
    for index, step in enumerate(search.steps):
        figures = [f"{step.figures[name]:.4g}" for name in names]
        counts = str(step.layers), f"{step.multiply_adds:.1%}"
        kept = " (kept)" if index == search.chosen else ""
        outcome = Cell(f"ok{kept}", "good") if step.met else Cell(f"beyond{kept}", "bad")
        rows.add_row(str(index + 1), step.trial, *counts, *figures, f"{step.seconds:.1f}", outcome)
    return rows


def searched(search: SearchReport) -> str:
    """What a search found, in a sentence."""
    told = ", ".join(
        f"{figure_name(name)} {search.best.figures[name]:.3g} ({limit:g} is accepted)"
        for name, limit in search.limits.items()
    )
    reference = ", ".join(f"{figure_name(name)} {value:.4g}" for name, value in search.reference.items())
    left = ", ".join(search.excluded) or "none"
    return f"On {search.images} images, where the float file has {reference}: {told}; left in floating point: {left}"


def figure_name(name: str) -> str:
    """What a judge measures, in words."""
    known = {
        "map50": "mAP50",
        "map50_95": "mAP50-95",
        "map_drop": "drop, points",
        "map_drop_error": "+-",
        "lost": "lost or added",
        "score_change": "score change",
    }
    return known.get(name, name)


def float_layers(report: Int8Report) -> Table:
    """How many layers are not in INT8, by reason."""
    rows = table("layers", "why", numeric=(0,))
    for reason, count in Counter(layer.reason for layer in report.float_layers).items():
        rows.add_row(str(count), reason)
    return rows


def output_errors(report: Int8Report) -> Table:
    """The distance of each output from the float file's."""
    rows = table("output", "max abs", "relative L2", "cosine", "", numeric=(1, 2, 3))
    for name, found in report.outputs.items():
        if found.problem:
            rows.add_row(name, "", "", "", found.problem)
        else:
            rows.add_row(name, f"{found.max_abs:.1e}", f"{found.relative_l2:.1e}", f"{found.cosine:.7f}", "")
    return rows


def latencies(profiles: Iterable[Profile]) -> Table:
    """Latency of each file, and its ratio to the first; where any has transfers, its median with them too."""
    found = list(profiles)
    transfers = any(profile.with_transfers_ms for profile in found)
    columns = ["file", "median ms", "p90", "p95", "p99", "samples", "times faster"]
    if transfers:
        columns.insert(5, "with transfers")
    rows = table(*columns, numeric=tuple(range(1, len(columns))))
    for profile in found:
        figures = [profile.median_ms, profile.p90_ms, profile.p95_ms, profile.p99_ms]
        row = [milliseconds(figure) for figure in figures]
        if transfers:
            row.append(milliseconds(profile.median_with_transfers_ms))
        ratio = f"{found[0].median_ms / profile.median_ms:.2f}" if profile is not found[0] else ""
        rows.add_row(profile.file, *row, str(len(profile.samples_ms)), ratio)
    return rows


def milliseconds(value: float | None) -> str:
    """Four digits or so; nothing for None."""
    return "" if value is None else f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def engine(manifest: AnyManifest) -> Table:
    """What an engine was built with and for, as far as that is known."""
    rows = table("", "")
    rows.show_header = False
    if isinstance(manifest, HeaderManifest):
        rows.add_row("origin", manifest.how)
        rows.add_row("built with", manifest.tensorrt)
        rows.add_row("runs on", _UNKNOWN)
        _metadata(rows, manifest.metadata)
        return rows
    machine = manifest.machine
    runs_on = ", ".join(f"sm_{sm}" for sm in manifest.compute_capabilities)
    rows.add_row(
        "origin", "built by acmix-deploy" if manifest.origin == "built" else "built by something else, adopted"
    )
    rows.add_row(
        f"{manifest.origin} with",
        f"{machine.tensorrt}, CUDA {machine.cuda or 'none'}, driver {machine.driver or 'none'}",
    )
    rows.add_row("runs on", f"{runs_on} and later" if runs_on else machine.device)
    rows.add_row("plugin", f"{manifest.plugin.path}, SHA-256 {manifest.plugin.sha256}" if manifest.plugin else "none")
    rows.add_row("form", manifest.form or _UNKNOWN)
    if manifest.strongly_typed:
        types = "from the file"
    elif manifest.flags is not None:
        types = ", ".join(("float32", *manifest.flags))
    else:
        types = manifest.precision or _UNKNOWN
    rows.add_row("types", types)
    rows.add_row("level", _UNKNOWN if manifest.level is None else str(manifest.level))
    for name, shapes in manifest.profiles.items():
        rows.add_row(f"sizes of {name}", " to ".join("x".join(map(str, shape)) for shape in shapes[::2]))
    for kind, tensors in (("input", manifest.inputs), ("output", manifest.outputs)):
        for tensor in tensors:
            rows.add_row(f"{kind} {tensor.name}", f"{tensor.dtype} {list(tensor.shape)}")
    if manifest.origin == "adopted":
        _metadata(rows, manifest.metadata)
    return rows


def device(found: DeviceReport) -> Table:
    """What of an export ran on another machine, and what stays there."""
    rows = table("", "")
    rows.show_header = False
    rows.add_row("device", f"{found.host}, {found.board}")
    if found.machine:
        rows.add_row("TensorRT", f"{found.machine.tensorrt}, {found.machine.device}")
    rows.add_row("ran there", ", ".join(found.ran) or "nothing")
    if found.found:
        rows.add_row("of that before", ", ".join(found.found))
    for path in found.files.values():
        rows.add_row("stays there", path)
    return rows


_UNKNOWN = "unknown"


def _metadata(rows: Table, metadata: ModelMetadata) -> None:
    rows.add_row("metadata", ", ".join(metadata.entries) or _UNKNOWN)


def inlined(reasons: Mapping[str, str]) -> Table:
    """The nodes that the plugin does not compute."""
    rows = table("not by the plugin", "why")
    for name, reason in reasons.items():
        rows.add_row(name, reason)
    return rows


def creators(library: PluginLibrary) -> Table:
    """What a plugin brings to TensorRT."""
    rows = table("operator", "version", "namespace", "interface")
    for creator in library.creators:
        rows.add_row(creator.name, creator.version, creator.namespace or "(empty)", creator.interface)
    return rows


def kernels(library: PluginLibrary) -> Table:
    """The kernels of a plugin, those that differ in head_dim alone in one row."""
    rows = table("operator", "kernel", "type", "layout", "head_dim up to", "runs from")
    sizes: dict[tuple[str, ...], list[int]] = {}
    for entry in library.entries:
        key = (entry.operator, entry.kernel, entry.dtype, entry.layout, f"sm_{entry.min_sm}" if entry.min_sm else "any")
        sizes.setdefault(key, []).append(entry.head_dim)
    for (operator, kernel, dtype, layout, oldest), found in sizes.items():
        rows.add_row(operator, kernel, dtype, layout, ", ".join(str(size or "any") for size in sorted(found)), oldest)
    return rows


def table(*columns: str, numeric: tuple[int, ...] = ()) -> Table:
    """An empty table; columns listed in ``numeric`` are aligned to the right."""
    empty = _Rows(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        empty.add_column(column, justify="right" if index in numeric else "left", overflow="fold")
    return empty


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
