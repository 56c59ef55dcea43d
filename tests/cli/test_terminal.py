"""What stands around the verbs: silence, colours, narrow terminals, completion by a shell."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from importlib import metadata

import onnx.parser
import pytest
from rich.console import Console

from acmix_deploy.cli import commands, main, parser
from acmix_deploy.cli.common import FILES
from acmix_deploy.report.tables import Cell, table

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOURS = re.compile(r"\x1b\[[0-9;]*3[0-7]m")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A file without blocks, and a detector."""
    monkeypatch.chdir(tmp_path)
    text = """<ir_version: 8, opset_import: ["" : 17], metadata_props: [
        "task": "detect", "names": "{0: 'cross', 1: 'ring'}", "stride": "32", "imgsz": "[32, 32]", "batch": "1"]>
        main (float[1, 3, 32, 32] images) => (float[1, 6, 1] output0)
        <int64[4] kernel = {6, 3, 32, 32}, int64[3] shape = {1, 6, 1}>
        { w = ConstantOfShape(kernel) y = Conv(images, w) output0 = Reshape(y, shape) }"""
    for name in ("model.onnx", "same.onnx"):
        onnx.save(onnx.parser.parse_model(text), name)
    return "model.onnx"


def in_terminal(*command, columns=80, **environment):
    """What a verb prints in a terminal of so many columns."""
    environment = {"TERM": "xterm-256color"} | environment
    child, terminal = pty.fork()
    if not child:
        os.environ.update(environment)
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            if name not in environment:
                os.environ.pop(name, None)
        os.execv(sys.executable, [sys.executable, "-m", "acmix_deploy.cli", *command])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    said = b""
    try:
        while block := os.read(terminal, 65536):
            said += block
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, said.decode()
    return said.decode()


@pytest.mark.parametrize("name", commands())
def test_help_in_a_narrow_terminal(name, monkeypatch):
    """Texts are broken between words; lines are longer where one word is, such as choices, and in examples."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    shown, _, _ = commands()[name].format_help().partition("\nexample:")
    assert "options:" in shown
    for line in shown.splitlines():
        assert len(line) <= 40 or len(line.strip().split()) == 1 or line.lstrip().startswith(("-", "[-")), line


def test_a_table_in_a_narrow_terminal():
    """Where words or numbers would be cut it is shown row by row; numbers stay whole."""
    rows = table("candidate", "output", "max abs", "relative L2", "limit", "", numeric=(2, 3, 4))
    rows.add_row("model.fused.onnx", "scores", "9.5e-07", "4.7e-07", "1.0e-05", Cell("ok", "good"))
    rows.add_row("model.fused.onnx", "boxes", "1.3e-06", "2.8e-07", "1.0e-05", Cell("FAILED", "bad"))

    def shown(width):
        console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
        console.print(rows)
        return console.export_text().splitlines()

    assert len(shown(80)) == 3, "a line of heads and one a row"
    narrow = shown(30)
    assert max(map(len, narrow)) <= 30
    assert [line.split() for line in narrow[:3]] == [
        ["candidate", "model.fused.onnx"],
        ["output", "scores"],
        ["max", "abs", "9.5e-07"],
    ]
    assert ["FAILED"] in [line.split() for line in narrow]
    assert shown(30).count("") + sum(not line.strip() for line in narrow if line) == 1, "rows are told apart"


def test_in_a_terminal(model):
    """Progress and colours, and neither where --quiet is given and NO_COLOR set, as https://no-color.org has it."""
    command = ["verify", model, "same.onnx", "--random", "1"]
    said = in_terminal(*command, columns=30)
    assert "comparing" in said
    assert COLOURS.search(said)
    said = in_terminal(*command, "--quiet", columns=30, NO_COLOR="1")
    assert "comparing" not in said
    assert not COLOURS.search(said)
    shown = [line.split() for line in ESCAPES.sub("", said).splitlines()]
    assert ["candidate", "same.onnx"] in shown
    assert ["cosine", "1.0000000"] in shown


@pytest.mark.parametrize("name", commands())
def test_every_verb_can_be_quiet(name):
    assert "--quiet" in commands()[name]._option_string_actions


def test_quiet(model, capsys):
    """Progress and notes are left out; results and errors stay, and the next command tells again."""
    command = ["verify", model, "same.onnx", "--random", "1"]
    assert main(command) == 0
    loud = capsys.readouterr()
    assert loud.err
    assert main([*command, "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert (quiet.out, quiet.err) == (loud.out, "")
    assert main(["verify", model, "none.onnx", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert main(command) == 0
    assert capsys.readouterr().err == loud.err


def test_quiet_detect(model, tmp_path, capsys):
    """A picture that cannot be read is an error, and told."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    import numpy as np

    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos/1.png"), np.zeros((32, 32, 3), np.uint8))
    (tmp_path / "photos/2.png").write_bytes(b"\x89PNG\r\n")
    assert main(["detect", model, "photos"]) == 0
    loud = capsys.readouterr()
    assert main(["detect", model, "photos", "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.out == loud.out
    (line,) = quiet.err.splitlines()
    assert "2.png" in line
    assert len(loud.err.splitlines()) > 1


def test_completion(tmp_path):
    """What shtab writes of the command line completes verbs, options, choices and files in bash."""
    shtab = pytest.importorskip("shtab", reason="shtab is not installed: pip install -e '.[dev]'")
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    assert shtab.FILE == FILES
    (tmp_path / "acmix-deploy").write_text(shtab.complete(parser(), "bash"))
    (tmp_path / "model.onnx").touch()
    tried = {
        "qua": {"quantize"},
        "plugin b": {"build"},
        "fuse --conv": {"--conv-branch"},
        "fuse --conv-branch gr": {"grouped"},
        "fuse mod": {"model.onnx"},
        "detect model.onnx mod": {"model.onnx"},
    }
    for line, expected in tried.items():
        words = " ".join(["acmix-deploy", *line.split()])
        script = f"source acmix-deploy; COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; "
        script += '_shtab_acmix_deploy; printf "%s\\n" "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", script], check=False, cwd=tmp_path, capture_output=True, text=True)
        assert set(done.stdout.split()) == expected, line


def test_completion_costs_nothing():
    """The command line does not need what writes its completion."""
    required = metadata.requires("acmix-deploy") or []
    assert not [each for each in required if each.startswith(("shtab", "argcomplete")) and "extra" not in each]
    code = "import sys; from acmix_deploy.cli import parser; parser(); sys.exit('shtab' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
