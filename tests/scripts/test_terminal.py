"""The terminal of the README: drawn from a recording, which a terminal made."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.text import Text

from acmix_deploy import __version__
from scripts import terminal
from tests import ROOT

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", terminal.THEMES)
def test_pictures(name):
    """They are what is drawn from the recording, are small, and need nothing from elsewhere."""
    path = ROOT / "docs" / name
    text = path.read_text(encoding="utf-8")
    assert text == terminal.pictures()[name], "run `make docs`"
    assert path.stat().st_size < 100_000
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert {each.tag.removeprefix(SVG) for each in root.iter()} <= {
        "svg", "title", "desc", "style", "clipPath", "rect", "path", "circle", "g", "text",
    }  # fmt: skip
    assert not [key for each in root.iter() for key in each.attrib if "href" in key or key.startswith("on")]
    rest = text.replace('xmlns="http://www.w3.org/2000/svg"', "").replace("url(#window)", "")
    assert not re.search(r"https?:|url\(|@import|@font-face|javascript", rest)
    assert "prefers-reduced-motion: no-preference" in text


def test_the_command_is_that_of_the_readme():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.search(r"^\$ (.*)$", page, re.M)
    assert first
    assert first[1] == terminal.COMMAND == terminal.read().command


def test_what_was_printed_is_shown():
    """Whole lines in their order; when all is over the times are there and below them the verdict."""
    recording = terminal.read()
    root = ElementTree.fromstring(terminal.draw(recording, terminal.THEMES["terminal.svg"]))
    (output,) = (each for each in root.iter(f"{SVG}g") if each.get("id") == "output")
    rows: dict[int, str] = {}
    for text in output:
        row, begin = int(text.attrib["y"]), (int(text.attrib["x"]) - terminal._MARGIN) // terminal._CELL
        rows[row] = rows.get(row, "").ljust(begin) + str(text.text)
    lines = [shown for _, shown in sorted(rows.items())]
    printed = [line for raw in recording.output if (line := Text.from_ansi(raw).plain.rstrip())]
    assert lines == printed[: len(lines)]
    assert len(lines) > 30
    assert max(map(len, lines)) <= terminal.COLUMNS
    moved = re.search(r"^#page { transform: translateY\(-(\d+)px\) }$", root.findtext(f"{SVG}style", ""), re.M)
    assert moved
    line = terminal._LINE
    top = terminal._BAR + terminal._MARGIN + int(moved[1])
    last = [rows[row] for row in sorted(rows) if top <= row <= top + line * terminal.ROWS]
    assert last[0] == "Files"
    assert [line for line in last if line.startswith("Passed: ")]


def test_the_screen_keeps_what_a_terminal_keeps():
    """A line of progress is gone when it ends, lines above it stay."""
    said = io.StringIO()
    console = Console(file=said, force_terminal=True, width=60, legacy_windows=False)
    with console.status("loading") as status:
        console.print("a note")
        status.update("running")
        status._live.refresh()
    console.print("[green]done[/]\nall")
    screen = terminal.Screen()
    screen.feed(said.getvalue())
    lines = [Text.from_ansi(line).plain.rstrip() for line in screen.lines]
    assert [line for line in lines if line] == ["a note", "done", "all"]
    with pytest.raises(ValueError, match="not known"):
        terminal.Screen().feed("\x1b[2J")


def test_recording(tmp_path):
    assert terminal.record("acmix-deploy --version", tmp_path).output == [f"acmix-deploy {__version__}"]
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(SystemExit, match="ended with 2"):
        terminal.record("acmix-deploy doctor model.onnx", tmp_path)
