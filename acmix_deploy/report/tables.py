"""Results as tables for a terminal. Needs neither PyTorch nor anything else beyond the rewriting stages."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from acmix_deploy.families import BlockReport
from acmix_deploy.fusion import FusionReport
from acmix_deploy.plugin.library import Library
from acmix_deploy.profile import Profile
from acmix_deploy.verify import Verification


def module_blocks(blocks: Iterable[BlockReport]) -> Table:
    """What was recognised in the module."""
    rows = table("name", "class", "status", "geometry", "repaired, or why not")
    for block in blocks:
        geometry = ", ".join(f"{key}={value}" for key, value in (block.geometry or {}).items())
        rows.add_row(block.name, block.class_name, block.status, geometry, "; ".join(block.repaired) or block.reason)
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


def errors(verification: Verification) -> Table:
    """The worst comparison of each output of each candidate."""
    rows = table("candidate", "output", "max abs", "relative L2", "limit", "cosine", "", numeric=(2, 3, 4, 5))
    for candidate in dict.fromkeys(comparison.candidate for comparison in verification.comparisons):
        for found in verification.worst(candidate):
            row = [candidate, found.output]
            if found.problem:
                row += [found.problem, "", "", ""]
            else:
                row += [f"{found.max_abs:.1e}", f"{found.relative_l2:.1e}", f"{found.limit:.1e}", f"{found.cosine:.7f}"]
            rows.add_row(*row, "ok" if found.passed else Text("FAILED", style="bold red"))
    return rows


def latencies(profiles: Iterable[Profile]) -> Table:
    """Latency of each file, and its ratio to the first."""
    found = list(profiles)
    rows = table("file", "median ms", "p90 ms", "p99 ms", "samples", "times faster", numeric=(1, 2, 3, 4, 5))
    for profile in found:
        ratio = f"{found[0].median_ms / profile.median_ms:.1f}" if profile is not found[0] else ""
        figures = [f"{value:.2f}" for value in (profile.median_ms, profile.p90_ms, profile.p99_ms)]
        rows.add_row(profile.file, *figures, str(len(profile.samples_ms)), ratio)
    return rows


def creators(library: Library) -> Table:
    """What a plugin brings to TensorRT."""
    rows = table("operator", "version", "namespace", "interface")
    for creator in library.creators:
        rows.add_row(creator.name, creator.version, creator.namespace or "(empty)", creator.interface)
    return rows


def kernels(library: Library) -> Table:
    """The kernels of a plugin, those that differ in head_dim alone in one row."""
    rows = table("operator", "kernel", "type", "layout", "head_dim up to", "runs from")
    sizes: dict[tuple[str, ...], list[int]] = {}
    for entry in library.entries:
        key = (entry.operator, entry.kernel, entry.dtype, entry.layout, f"sm_{entry.min_sm}" if entry.min_sm else "any")
        sizes.setdefault(key, []).append(entry.head_dim)
    for (operator, kernel, dtype, layout, oldest), found in sizes.items():
        rows.add_row(operator, kernel, dtype, layout, ", ".join(map(str, sorted(found))), oldest)
    return rows


def table(*columns: str, numeric: tuple[int, ...] = ()) -> Table:
    """An empty table; columns listed in ``numeric`` are aligned to the right."""
    empty = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, column in enumerate(columns):
        empty.add_column(column, justify="right" if index in numeric else "left", overflow="fold")
    return empty


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
