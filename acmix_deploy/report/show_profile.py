"""Profiles, for a person."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from rich.console import Console
from rich.table import Table

from acmix_deploy.profile import Profile, ProfileDocument
from acmix_deploy.report.tables import latencies, milliseconds, table

_MOST = 10  # groups of layers besides the blocks


def show_profiles(found: ProfileDocument, console: Console) -> None:
    """Print everything of profiles that a person wants to see."""
    profiles = found.profiles
    console.print(latencies(profiles))
    if with_layers := [profile for profile in profiles if profile.layers]:
        console.print("\nLayers, by block")
        console.print(blocks(with_layers))
    if watched := [profile for profile in profiles if profile.conditions or profile.power]:
        console.print("\nThe machine meanwhile")
        console.print(conditions(watched))
    for where in dict.fromkeys(profile.where for profile in profiles):
        console.print(where, style="dim")
    for note in dict.fromkeys((*notes(profiles), *found.notes)):
        console.print(f"Note: {note}", style="yellow")


def blocks(profiles: Sequence[Profile]) -> Table:
    """The time of each block in each file, of all blocks of a family, and of the rest, longest first."""
    heads = [head for profile in profiles for head in (f"{profile.file} ms", "share")]
    rows = table("block", *heads, numeric=tuple(range(1, 1 + len(heads))))

    def add(title: str, names: Collection[str]) -> None:
        cells = []
        for profile in profiles:
            found = [block for block in profile.blocks if block.block in names]
            share = f"{sum(block.share for block in found):.1%}"
            cells += [milliseconds(sum(block.ms for block in found)), share] if found else ["", ""]
        rows.add_row(title, *cells)

    families: dict[str, dict[str, None]] = {}
    longest: dict[str, float] = {}
    for block in (block for profile in profiles for block in profile.blocks):
        if block.family:
            families.setdefault(block.family, {})[block.block] = None
        else:
            longest[block.block] = max(longest.get(block.block, 0.0), block.ms)
    for family, names in families.items():
        for name in names:
            add(name, [name])
        add(f"{family}, all {len(names)}", names)
    others = sorted(longest, key=lambda name: -longest[name])
    for name in others[:_MOST]:
        add(name, [name])
    if rest := others[_MOST:]:
        add(f"and {len(rest)} more", rest)
    return rows


def conditions(profiles: Sequence[Profile]) -> Table:
    """Clocks, load and temperature at any reading, and power under load; without columns of which nothing is told."""
    columns: dict[str, list[str]] = {}
    for profile in profiles:
        readings = (*profile.conditions, *(profile.power.readings if profile.power else ()))
        held, power = profile.throttling, profile.power
        cells = {
            "file": profile.file,
            "CPU MHz": _range(reading.cpu_mhz for reading in readings),
            "load": _range((reading.load for reading in readings), digits=1),
            "GPU MHz": _range(reading.gpu_mhz for reading in readings),
            "memory MHz": _range(reading.memory_mhz for reading in readings),
            "GPU C": _range(reading.temperature_c for reading in readings),
            "held down by": "" if held is None else ", ".join(held) or "nothing",
            "mode": next((reading.power_mode for reading in readings if reading.power_mode), ""),
            "W": f"{power.mean_w:.1f}" if power else "",
            "mJ per batch": f"{power.energy_mj:.1f}" if power else "",
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    told = {name: cells for name, cells in columns.items() if any(cells)}
    rows = table(*told, numeric=tuple(index for index, name in enumerate(told) if name in ("W", "mJ per batch")))
    for row in zip(*told.values(), strict=True):
        rows.add_row(*row)
    return rows


def _range(values: Iterator[float | None], digits: int = 0) -> str:
    known = [value for value in values if value is not None]
    texts = dict.fromkeys(f"{value:.{digits}f}" for value in (min(known), max(known))) if known else ()
    return " to ".join(texts)


def notes(profiles: Sequence[Profile]) -> Iterator[str]:
    """What the tables of profiles do not say."""
    for profile in profiles:
        yield from profile.notes
        if profile.stable is False:
            yield f"{profile.file}: latency had not settled when counting began, in some round"
        if profile.others:
            yield f"other processes were at work while {profile.file} was measured: {profile.others}"
        if profile.power:
            every = f"every {profile.power.interval_s * 1e3:.0f} ms"
            yield f"power is the mean of readings {every} under load, batch {profile.power.images}"
