"""What benchmarks measured: they write docs/measured/NAME.json, and `make docs` makes tables and sentences of it."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from statistics import median

import numpy as np
from pydantic import BaseModel, ConfigDict

from acmix_deploy.artifacts import versions
from acmix_deploy.profile import Profile
from acmix_deploy.profile.timing import Machine

FOLDER = Path(__file__).resolve().parents[1] / "docs/measured"

Spread = tuple[float, float, float]
"""A median, and from where to where the values go."""

Value = Spread | int | float | str | None


class Measured(BaseModel):
    """A table of figures, and what has to be known to measure them again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: datetime.date
    command: str
    machine: str
    versions: dict[str, str]
    cells: str
    """What the figures are."""
    columns: dict[str, int | None]
    """Decimals of the numbers in each column, by its title."""
    rows: list[list[Value]]

    def table(self) -> str:
        """As Markdown."""
        digits = self.columns.values()
        return table(self.columns, *(map(_cell, row, digits) for row in self.rows))

    def about(self) -> str:
        """What the figures are, where they are from and when, in a sentence each."""
        packages = "".join(f", {name} {version}" for name, version in sorted(self.versions.items()))
        return f"{self.cells}. {self.machine}{packages}. {self.date}, `{self.command}`."

    def text(self) -> str:
        """As JSON, a row a line."""
        head = json.dumps(self.model_dump(mode="json", exclude={"rows"}), indent=2).removesuffix("\n}")
        rows = ",\n".join(f"    {json.dumps(row)}" for row in self.model_dump(mode="json")["rows"])
        return f'{head},\n  "rows": [\n{rows}\n  ]\n}}\n'


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The option of every benchmark that says where its file goes."""
    parser.add_argument(
        "--into", type=Path, default=FOLDER, metavar="DIR", help="for the JSON (default: docs/measured)"
    )


def write(
    folder: Path,
    name: str,
    cells: str,
    columns: dict[str, int | None],
    rows: Sequence[Sequence[Value]],
    *,
    packages: Sequence[str] = (),
    installed: dict[str, str] | None = None,
    threads: int | None = None,
) -> None:
    """Write what this program has measured, and print it.

    Args:
        folder, name: of the file, without its suffix.
        cells, columns, rows: see :class:`Measured`.
        packages: whose versions count beside those of :func:`acmix_deploy.artifacts.versions`.
        installed: versions that count instead of these, where something else than this environment was measured.
        threads: of what was measured.
    """
    found = Measured(
        date=datetime.date.today(),
        command=shlex.join(["python", *_without_folder(sys.orig_argv[1:])]),
        machine=machine(threads),
        versions=installed or versions() | {package: metadata.version(package) for package in packages},
        cells=cells,
        columns=columns,
        rows=[[_rounded(value, digits) for value, digits in zip(row, columns.values(), strict=True)] for row in rows],
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(found.text(), encoding="utf-8")
    print(f"{found.table()}\n{found.about()}\n", flush=True)


def machine(threads: int | None = None) -> str:
    """The kind of this machine, with the threads that were used of its cores where that is told."""
    this = Machine.this()
    used = f"{this.cores} cores" if threads is None else f"{threads} thread{'s' * (threads > 1)}"
    return f"{this.cpu}, {used}, {platform.system()} {platform.machine()}"


def read(name: str) -> Measured:
    """What a benchmark has written."""
    return Measured.model_validate_json((FOLDER / f"{name}.json").read_bytes())


def parts() -> dict[str, dict[str, str]]:
    """What pages hold of what was measured: by page and name of the part."""

    def whole(*names: str) -> dict[str, str]:
        return {name: f"{(found := read(name)).table()}\n{found.about()}" for name in names}

    detector = read("detector")
    return {
        "README.md": {"gain": _gain(detector), "detector": detector.table()},
        "docs/README.md": {"gain": _gain(detector).replace("(#", "(../README.md#")},
        "docs/comparison.md": whole("tools"),
        "docs/benchmarks.md": whole("detector", "acmix-blocks", "other-blocks", "pixels", "files-to-boxes"),
        "docs/install.md": {"install": _size(read("install"))},
        "docs/pipeline.md": whole("fusing"),
        "docs/tutorial.md": whole("tutorial"),
    }


def _gain(found: Measured) -> str:
    """What a fused detector gains on a CPU, and that it finds the same, as sentences."""
    (exported, fused, *_), titles = found.rows, list(found.columns)

    def shown(row: list[Value], title: str) -> str:
        value = row[titles.index(title)]
        return _cell(value[0] if isinstance(value, tuple) else value, found.columns[title])

    boxes, same = shown(exported, "boxes found"), shown(fused, "boxes found")
    return (
        "A YOLOv8n with three ACmix blocks, at 640x640 on two threads of a CPU, takes "
        f"{shown(exported, 'ms')} ms as PyTorch exports it and {shown(fused, 'ms')} ms fused: "
        f"**{shown(fused, 'times faster')} times faster**, and it finds {'the same ' if boxes == same else ''}{same} "
        f"of {boxes} boxes in drawn images. No GPU was at hand; [measured](#measured) has the rest."
    )


def _size(found: Measured) -> str:
    ((packages, megabytes),) = found.rows
    return (
        f"It takes {megabytes:.0f} MB, in {packages} packages with those that it needs "
        f"(Python {found.versions['python']} on Linux, {found.date})."
    )


def percentiles(found: Profile) -> Spread:
    """Median, 10th and 90th percentile of the latencies in ms."""
    return found.median_ms, found.percentile(10), found.percentile(90)


def times_faster(slow: Profile, fast: Profile) -> Spread:
    """Ratio of the medians, with the least and the largest of any turn."""
    turns = zip(*(np.array_split(np.array(each.samples_ms), each.rounds) for each in (slow, fast)), strict=True)
    ratios = [float(np.median(one) / np.median(other)) for one, other in turns]
    return slow.median_ms / fast.median_ms, min(ratios), max(ratios)


def spread(values: Sequence[float]) -> Spread:
    """Median, least and most."""
    return median(values), min(values), max(values)


def table(*rows: Iterable[object]) -> str:
    """A Markdown table; the first row is its head. Columns of numbers are aligned to the right."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    number = re.compile(r"[-+]?[\d.,]*\d(e[-+]\d+)?%?( \[.*\])?")
    columns = [[cell for cell in rest if cell] for _, *rest in zip(*cells, strict=True)]
    rules = ["---:" if column and all(map(number.fullmatch, column)) else "---" for column in columns]
    lines = [cells[0], rules, *cells[1:]]
    return re.sub(r"\|  (?=\|)", "| ", "\n".join(f"| {' | '.join(line)} |" for line in lines)) + "\n"


def _without_folder(arguments: list[str]) -> list[str]:
    """A command without ``--into``, since a figure does not depend on where it is kept."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_folder(parser)
    return parser.parse_known_args(arguments)[1]


def _rounded(value: Value, digits: int | None) -> Value:
    if isinstance(value, tuple):
        first, low, high = (round(number, digits or None) for number in value)
        return first, low, high
    return round(value, digits or None) if isinstance(value, float) else value


def _cell(value: Value, digits: int | None) -> str:
    if isinstance(value, tuple):
        first, low, high = (f"{number:.{digits}f}" for number in value)
        return f"{first} [{low} to {high}]"
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.{digits or 0}f}"
