"""Draw docs/terminal.svg and docs/terminal-dark.svg: the README's first command, as a terminal showed it.

With ``--record`` the command runs in a terminal of its own first, and what that showed goes to
docs/measured/terminal.json. The pictures are drawn from this file alone: the command is typed, steps take a fraction of
their time, the output is scrolled through, and the tables from :data:`LAST` on stay. Where no motion is wanted these
are all there is.
"""

from __future__ import annotations

import argparse
import codecs
import datetime
import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

from pydantic import BaseModel, ConfigDict
from rich.style import Style
from rich.text import Text

from acmix_deploy.artifacts import versions
from scripts import measured
from scripts.train_shapes import CHECKPOINT

ROOT = Path(__file__).resolve().parents[1]
RECORDING = measured.FOLDER / "terminal.json"
COMMAND = "acmix-deploy export tests/data/shapes.pt --fp16"

COLUMNS, ROWS = 100, 27
"""Of the terminal, and of what is drawn: a table that is wider is printed row by row."""
LAST = "Files"
"""The title that is at the top when all is over, above the times and, some tables below, the verdict."""
_CELL, _LINE, _MARGIN, _BAR = 8, 18, 16, 34  # pixels; the last is the height of the title

THEMES = {
    "terminal.svg": {
        "back": "#ffffff", "bar": "#f6f8fa", "edge": "#d0d7de", "text": "#1f2328", "dim": "#57606a",
        "red": "#b4232b", "green": "#116329", "yellow": "#7d4e00",
    },
    "terminal-dark.svg": {
        "back": "#0d1117", "bar": "#161b22", "edge": "#30363d", "text": "#e6edf3", "dim": "#9aa4af",
        "red": "#ff7b72", "green": "#7ee787", "yellow": "#e3b341",
    },
}  # fmt: skip
_ANSI = {1: "red", 2: "green", 3: "yellow"}

_TYPED, _STEPS, _PAGE, _SCROLL = 2.0, 5.0, 2.6, 0.5  # seconds: typing, all steps, a page of output, to the next page
_ESCAPE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")
_SPINNER = re.compile(r"[\u2800-\u28ff] (.*)")


class Recording(BaseModel):
    """A command, and what a terminal showed of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    date: datetime.date
    machine: str
    versions: dict[str, str]
    command: str
    seconds: float
    steps: list[tuple[float, str]]
    """From when on, in seconds, the line of progress said what."""
    output: list[str]
    """Lines that stayed, with escapes for colours."""


class Screen:
    """The lines of a terminal, for the escapes of Rich's line of progress."""

    def __init__(self) -> None:
        self.lines = [""]
        self._row = 0

    def feed(self, said: str) -> None:
        """Raises ValueError for an escape of another kind."""
        for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", said):
            found = _ESCAPE.fullmatch(part)
            if part == "\n":
                self._row += 1
                self.lines += [""] * (self._row + 1 - len(self.lines))
            elif part == "\r" or (found and found[1] == "?25"):
                continue  # a line is erased before it is written again
            elif part == "\x1b[2K":
                self.lines[self._row] = ""
            elif found and found[2] == "A":
                self._row -= int(found[1] or 1)
            elif found and found[2] != "m" and found[1] != "?25":
                raise ValueError(f"what {part!r} does is not known")
            else:
                self.lines[self._row] += part


def record(command: str, folder: Path) -> Recording:
    """Run a command of this package in a terminal. Raises SystemExit where it fails."""
    start = time.monotonic()
    child, terminal = pty.fork()
    if not child:
        os.chdir(folder)
        os.environ |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS)}
        os.execv(sys.executable, [sys.executable, "-m", "acmix_deploy.cli", *shlex.split(command)[1:]])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    screen, steps = Screen(), list[tuple[float, str]]()
    decode, rest = codecs.getincrementaldecoder("utf-8")().decode, ""
    try:
        while block := os.read(terminal, 65536):
            said, begun, more = (rest + decode(block)).rpartition("\x1b")
            ends = not begun or re.match(r"\[[0-9;?]*[A-Za-z]", more)
            screen.feed(said + begun + more if ends else said)
            rest = "" if ends else begun + more
            shown = _SPINNER.match(Text.from_ansi(screen.lines[-1]).plain.rstrip())
            if shown and (not steps or steps[-1][1] != shown[1]):
                steps.append((round(time.monotonic() - start, 1), shown[1]))
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    lines = "\n".join(line.rstrip() for line in screen.lines).rstrip().splitlines()
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit("\n".join([*lines, f"{command} ended with {code}"]))
    return Recording(
        date=datetime.date.today(),
        machine=measured.machine(),
        versions=versions(),
        command=command,
        seconds=round(time.monotonic() - start, 1),
        steps=steps,
        output=lines,
    )


def draw(recording: Recording, theme: dict[str, str]) -> str:
    """The picture, as SVG."""
    lines = [Text.from_ansi(line) for line in recording.output]
    for line in lines:
        line.rstrip()
    pages = [0, *_pages(lines)]
    width, height = COLUMNS * _CELL + 2 * _MARGIN, _BAR + ROWS * _LINE + 2 * _MARGIN
    styles = [
        f"text {{ font: {_CELL / 0.6:.2f}px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', "
        f"monospace; fill: {theme['text']} }}",
        ".bold { font-weight: bold }",
        *(f".{name} {{ fill: {theme[name]} }}" for name in ("dim", "red", "green", "yellow")),
        f"#page {{ transform: translateY({-_LINE * pages[-1]}px) }}",
        ".step, #cover { opacity: 0 }",
        "@media (prefers-reduced-motion: no-preference) {",
        *_motion(recording, pages),
        "}",
    ]
    title = f"{recording.seconds:.0f} seconds on {recording.machine.partition(', Linux')[0]}; the waiting is shortened"
    top = _BAR + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(recording.command)}</title>",
        f"<desc>{escape(title)}</desc>",
        f"<style>\n{chr(10).join(styles)}\n</style>",
        f'<clipPath id="window"><rect x="1" y="{top}" width="{width - 2}" height="{ROWS * _LINE}"/></clipPath>',
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" fill="{theme["back"]}" '
        f'stroke="{theme["edge"]}"/>',
        f'<path d="M1 {_BAR}V9a8 8 0 0 1 8-8H{width - 9}a8 8 0 0 1 8 8V{_BAR}z" fill="{theme["bar"]}"/>',
        *(f'<circle cx="{20 + 18 * index}" cy="{_BAR / 2:g}" r="5" fill="{theme["edge"]}"/>' for index in range(3)),
        f'<text class="dim" x="{width - _MARGIN}" y="{_BAR / 2 + 5:g}" text-anchor="end">{escape(title)}</text>',
        '<g clip-path="url(#window)"><g id="page">',
        *_line(Text(f"$ {recording.command}"), top),
        f'<rect id="cover" x="{_MARGIN + 2 * _CELL}" y="{top}" width="{width}" height="{_LINE}" '
        f'fill="{theme["back"]}"/>',
    ]
    for index, (_, said) in enumerate(recording.steps):
        mark = Text.assemble(("⠹", "green"), f" {said}")
        parts += [f'<g id="s{index}" class="step">', *_line(mark, top + _LINE), "</g>"]
    parts.append('<g id="output">')
    for row, line in enumerate(lines[: pages[-1] + ROWS - 1], start=1):
        parts += _line(line, top + row * _LINE)
    return "\n".join([*parts, "</g></g></g>", "</svg>"]) + "\n"


def _motion(recording: Recording, pages: list[int]) -> Iterator[str]:
    """Keyframes: a cover slides off the command, steps take turns in one line, the output comes and moves up."""
    typed, printed = 1 + _TYPED, 1 + _TYPED + _STEPS
    whole = printed + (_PAGE + _SCROLL) * len(pages)

    def percent(seconds: float) -> str:
        return f"{100 * seconds / whole:.2f}%"

    def keys(name: str, *frames: str) -> str:
        return f"#{name} {{ animation-name: {name} }} @keyframes {name} {{ {' '.join(frames)} }}"

    yield f"#page, #output, #cover, .step {{ animation: {whole:.2f}s step-end both }}"
    letters = len(recording.command)
    still, moved = (f"{{ opacity: 1; transform: translateX({cells * _CELL}px) }}" for cells in (0, letters))
    yield keys("cover", f"0%, {percent(1)} {still}", f"{percent(typed)}, 100% {moved}")
    yield f"#cover {{ animation-timing-function: steps({letters}) }}"
    begins = [typed + _STEPS * at / recording.seconds for at, _ in recording.steps]
    gone, there = "{ opacity: 0 }", "{ opacity: 1 }"
    for index, (begin, end) in enumerate(pairwise([*begins, printed])):
        yield keys(f"s{index}", f"0% {gone}", f"{percent(begin)} {there}", f"{percent(end)}, 100% {gone}")
    yield keys("output", f"0% {gone}", f"{percent(printed)}, 100% {there}")
    moves = []
    for index, (before, after) in enumerate(pairwise(pages), start=1):
        at = printed + index * (_PAGE + _SCROLL)
        moves += [f"{percent(at - _SCROLL)} {{ transform: translateY({-_LINE * before}px) }}"]
        moves += [f"{percent(at)} {{ transform: translateY({-_LINE * after}px) }}"]
    yield keys("page", "0% { transform: none }", *moves, f"100% {{ transform: translateY({-_LINE * pages[-1]}px) }}")
    yield "#page { animation-timing-function: ease }"


def _pages(lines: list[Text]) -> Iterator[int]:
    """Where to scroll to: tables whose title is at the top, the last one of them :data:`LAST`."""
    titles = [row for row, (before, line) in enumerate(pairwise([Text(), *lines]), start=1) if line and not before]
    top, last = 0, next(row for row in titles if lines[row - 1].plain == LAST)
    while top < last:
        ahead = [row for row in titles if top < row <= top + ROWS - 3]
        top = min(max(ahead, default=top + ROWS - 3), last)
        yield top


def _line(line: Text, y: int) -> Iterator[str]:
    """A line in runs of one style without wide gaps, each as wide as its cells whatever the font."""
    borders = sorted({0, len(line), *(edge for span in line.spans for edge in (span.start, span.end))})
    for begin, end in pairwise(borders):
        styles = (span.style for span in line.spans if span.start <= begin < span.end)
        style = Style.combine([Style(), *(each if isinstance(each, Style) else Style.parse(each) for each in styles)])
        names = [name for name, on in (("bold", style.bold), ("dim", style.dim)) if on]
        if style.color and style.color.number in _ANSI:
            names.append(_ANSI[style.color.number])
        kind = f' class="{" ".join(names)}"' if names else ""
        for run in re.finditer(r"\S+(?: \S+)*", line.plain[begin:end]):
            x, length = _MARGIN + (begin + run.start()) * _CELL, len(run[0]) * _CELL
            baseline = y + round(_LINE * 0.75)
            yield (
                f'<text{kind} x="{x}" y="{baseline}" textLength="{length}" lengthAdjust="spacingAndGlyphs">'
                f"{escape(run[0])}</text>"
            )


def read() -> Recording:
    """What was recorded last."""
    return Recording.model_validate_json(RECORDING.read_bytes())


def pictures() -> dict[str, str]:
    """The pictures by their names."""
    return {name: draw(read(), theme) for name, theme in THEMES.items()}


def block() -> str:
    """The command and its output, in Markdown, and where that ran."""
    found = read()
    lines = "\n".join(Text.from_ansi(line).plain.rstrip() for line in found.output)
    where = f"{found.machine}, {found.date}: {found.seconds:.0f} seconds"
    return f"```text\n$ {found.command}\n{lines}\n```\n\n{where}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="run the command first")
    if parser.parse_args().record:
        with tempfile.TemporaryDirectory() as name:
            Path(name, "tests/data").mkdir(parents=True)
            shutil.copy(CHECKPOINT, Path(name, "tests/data"))
            RECORDING.write_text(record(COMMAND, Path(name)).model_dump_json(indent=1) + "\n", encoding="utf-8")
    for name, picture in pictures().items():
        (ROOT / "docs" / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
