"""The command line as a user meets it: files, tables, JSON, exit codes, and one clear sentence for what is wrong."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from acmix_deploy import __version__
from acmix_deploy.artifacts import read_artifact
from acmix_deploy.cli import commands, inspect, main
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.report.model import ExportReport
from acmix_deploy.runtime.inputs import AXES
from tests.families.parts import export
from tests.fusion.test_fuse import randomised

QUICK = ["--seconds", "0.1"]
FAST = [*QUICK, "--opset", "17"]  # by the faster exporter


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def checkpoint(folder):
    """A model of one block with stride 2 behind a convolution, saved whole."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), randomised(ACmix(8, 8, head=2, stride=2)))
    torch.save(model.eval(), folder / "model.pt")
    return folder / "model.pt"


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "plain.onnx"
    return export(randomised(ACmix(3, 8, head=2)), torch.randn(1, 3, 10, 12), path, dynamic=AXES)


@pytest.fixture
def plain(block, folder):
    """A copy of a file with one block."""
    return Path(shutil.copy(block, folder))


def fails(capsys, code, *command):
    """Run a command that must fail with ``code`` and return the one error it prints."""
    assert main([str(part) for part in command]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert captured.err.count("error: ") == 1
    return captured.err[captured.err.index("error: ") :]


def test_export(checkpoint, folder, capsys):
    command = ["export", "model.pt", "--fp16", "--input-shape", "1,3,20,24", "--expect", "1", "--out", "deploy", *QUICK]
    assert main(command) == 0
    captured = capsys.readouterr()
    for words in ("AcmixLocalAttention", "model.fused.onnx", "relative L2", "p99 ms", "Next:"):
        assert words in captured.out
    assert "fusing" in captured.err, "progress goes to stderr"

    files = {path.name for path in (folder / "deploy").iterdir()}
    written = {"model.onnx", "model.fused.onnx", "model.fp16.onnx"}
    assert files == written | {f"{name}.json" for name in written} | {"report.json"}
    origin = read_artifact(folder / "deploy" / "model.fp16.onnx")
    assert [parent.name for parent in origin.parents] == ["model.fused.onnx"]

    report = ExportReport.model_validate_json((folder / "deploy" / "report.json").read_text())
    assert report.passed
    assert {comparison.candidate for comparison in report.verification.comparisons} == written
    assert all(file.profile.samples_ms for file in report.files.values())
    with pytest.raises(ValueError, match="schema"):
        ExportReport.model_validate({**json.loads(report.model_dump_json(by_alias=True)), "schema": 2})


def test_model_that_cannot_run_in_half_precision(folder, capsys):
    """A captured program keeps its types; its file in float16 passes without PyTorch's own error."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), randomised(ACmix(8, 8, head=2))).eval()
    torch.export.save(torch.export.export(model, (torch.randn(1, 3, 10, 12),)), folder / "model.pt2")
    assert main(["export", "model.pt2", "--fp16", "--input-shape", "1,3,10,12", "--expect", "1", *FAST]) == 0
    printed = capsys.readouterr().out
    assert "Passed: every file computes what the model as it was loaded does" in printed
    assert "model.fp16.onnx" in printed
    assert "fails on the inputs" not in printed


def test_stale_results_are_removed(checkpoint, folder, capsys):
    command = ["export", "model.pt", "--image-size", "16", "--out", "deploy", *FAST]
    assert main([*command, "--fp16"]) == 0
    fails(capsys, 1, *command, "--expect", "2")
    assert {path.name for path in (folder / "deploy").iterdir()} == {"model.onnx", "model.onnx.json"}


def test_json_is_one_document(checkpoint, capsys):
    axes = ["--dynamic", "batch,height,width", "--image-size", "16"]
    assert main(["export", "model.pt", "--json", *FAST, *axes]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema"] == 1
    assert report["passed"] is True
    assert report["blocks"][0]["status"] == "canonical"
    assert len(report["export"]["checked_shapes"]) == 3
    assert report["files"].keys() == {"plain", "fused"}


def test_fuse_verify_profile(plain, folder, capsys):
    assert main(["fuse", "plain.onnx", "-o", "fused.onnx", "--expect", "1"]) == 0
    assert "nodes became" in capsys.readouterr().out
    assert main(["fuse", "plain.onnx", "-o", "again.onnx", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["blocks"][0]["fused"]) == (1, True)
    assert main(["verify", "plain.onnx", "fused.onnx", "--random", "2", "--input-shape", "1,3,12,16"]) == 0
    assert "ok" in capsys.readouterr().out
    assert main(["verify", "plain.onnx", "fused.onnx", "--input-shape", "1,3,12,16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["passed"]) == (1, True)
    files = ["plain.onnx", "fused.onnx"]
    assert main(["profile", *files, "--samples", "5", "--input-shape", "1,3,12,16", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    profiles = document["profiles"]
    assert document["schema"] == 1
    assert [found["file"] for found in profiles] == files
    assert all(found["median_ms"] <= found["p90_ms"] <= found["p99_ms"] for found in profiles)


def test_verify_from_images(plain, folder, capsys):
    cv2 = pytest.importorskip("cv2", reason="opencv is not installed")
    main(["fuse", "plain.onnx", "-o", "fused.onnx"])
    (folder / "photos").mkdir()
    cv2.imwrite(str(folder / "photos" / "a.png"), np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8))
    (folder / "photos" / "b.jpg").write_bytes(b"no picture")
    capsys.readouterr()
    assert main(["verify", "plain.onnx", "fused.onnx", "--images", "photos", "--input-shape", "1,3,12,16"]) == 0
    assert "b.jpg could not be read" in capsys.readouterr().out


def test_wrong_file_fails_verification(plain, folder, capsys):
    main(["fuse", "plain.onnx", "-o", "fused.onnx"])
    model = onnx.load("fused.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("position_weight"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(0.01), weight.name))
    onnx.save(model, "fused.onnx")
    capsys.readouterr()
    error = fails(capsys, 1, "verify", "plain.onnx", "fused.onnx", "--input-shape", "1,3,12,16")
    assert "relative L2" in error
    assert "is accepted" in error


def test_expectation_not_met(checkpoint, plain, folder, capsys):
    assert "1 blocks fused" in fails(capsys, 1, "fuse", plain, "-o", "never.onnx", "--expect", "3")
    assert not (folder / "never.onnx").exists()
    error = fails(capsys, 1, "export", "model.pt", "--image-size", "16", "--expect", "2", "--out", "deploy", *FAST)
    assert "expected 2" in error
    assert not (folder / "deploy" / "model.fused.onnx").exists()


BAD_INPUT = {
    "missing checkpoint": (["export", "nowhere.pt"], "nowhere.pt"),
    "no checkpoint at all": (["export", "text.pt"], "text.pt"),
    "truncated checkpoint": (["export", "half.pt"], "half.pt"),
    "a tensor": (["export", "tensor.pt"], "tensor.pt"),
    "odd map under stride 2": (["export", "model.pt", "--image-size", "17"], "17x17 map is not divisible by stride 2"),
    "map smaller than the window": (["export", "model.pt", "--image-size", "2"], "too small"),
    "unknown axis": (["export", "model.pt", "--dynamic", "depth"], "depth"),
    "opset out of range": (["export", "model.pt", "--opset", "12"], "17 to 21"),
    "output is a file": (["export", "model.pt", "--image-size", "16", "--out", "text.pt"], "text.pt"),
    "missing ONNX file": (["fuse", "nowhere.onnx", "-o", "x.onnx"], "does not exist"),
    "no ONNX file at all": (["fuse", "text.pt", "-o", "x.onnx"], "is a text file"),
    "output is a folder": (["fuse", "plain.onnx", "-o", "folder"], "folder"),
    "a folder for a checkpoint": (["export", "."], ". is a folder"),
    "a folder for an ONNX file": (["fuse", "..", "-o", "x.onnx"], ".. is a folder"),
    "an address": (["export", "https://example.org/a.pt"], "nothing is downloaded here"),
    "nearly the name": (["fuse", "plane.onnx", "-o", "x.onnx"], "Did you mean plain.onnx?"),
    "a message for a file": (["doctor", "Error Code 9: no"], "acmix-deploy doctor --error TEXT"),
    "profile of nothing": (["profile", "nowhere.onnx"], "does not exist"),
    "verify against text": (["verify", "plain.onnx", "text.pt"], "text.pt"),
    "verify against itself": (["verify", "plain.onnx", "plain.onnx"], "compared with itself"),
    "fuse in place": (["fuse", "plain.onnx", "-o", "plain.onnx"], "would be overwritten"),
    "truncated ONNX file": (["fuse", "half.onnx", "-o", "x.onnx"], "ends too early"),
    "weights of another model": (["export", "state.pt", "--arch", "other:make"], "state.pt"),
    "weights without --arch": (["export", "state.pt"], "--arch"),
    "no image in the folder": (["verify", "plain.onnx", "copy.onnx", "--images", "folder"], "folder"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(name, checkpoint, plain, folder, capsys):
    (folder / "text.pt").write_text("no checkpoint")
    (folder / "half.pt").write_bytes(checkpoint.read_bytes()[:3000])
    torch.save(torch.zeros(3), folder / "tensor.pt")
    torch.save(ACmix(4, 8, head=2).state_dict(), folder / "state.pt")
    (folder / "other.py").write_text("from torch import nn\n\ndef make():\n    return nn.Conv2d(3, 4, 1)\n")
    (folder / "half.onnx").write_bytes(plain.read_bytes()[:3000])
    (folder / "copy.onnx").write_bytes(plain.read_bytes())
    (folder / "folder").mkdir()
    before = sorted(path for path in folder.rglob("*.*") if path.is_file() and path.suffix != ".pyc")
    command, words = BAD_INPUT[name]
    assert words in fails(capsys, 2, *command)
    after = sorted(path for path in folder.rglob("*.*") if path.is_file() and path.suffix != ".pyc")
    assert after == before, "nothing may be left behind"


OUTSIDE = {
    "denied": (PermissionError(errno.EACCES, "Permission denied", "/secret/x"), 2, "/secret/x: Permission denied"),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "out"), 2, "out: Read-only file system"),
    "half a base install": (ModuleNotFoundError(name="onnx_ir.passes"), 3, "pip install --force-reinstall onnx-ir"),
    "no extra": (ModuleNotFoundError(name="torch.nn"), 3, "pip install 'acmix-deploy[export]'"),
    "tools of tests": (ModuleNotFoundError("no", name="scipy.signal"), 1, "a fault of acmix-deploy"),
    "no file": (PermissionError(errno.EPERM, "Operation not permitted"), 1, "a fault of acmix-deploy"),
    "a name in Latin-1": (UnicodeEncodeError("utf-8", "\udcfc", 0, 1, "surrogates not allowed"), 2, "is not in UTF-8"),
    "a module of ours": (ModuleNotFoundError("no", name="acmix_deploy.gone"), 1, "a fault of acmix-deploy"),
    "part of a name": (ModuleNotFoundError("no", name="on"), 1, "a fault of acmix-deploy"),
    "another fault": (OSError(errno.EBADF, "Bad file descriptor"), 1, "a fault of acmix-deploy"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_faults_of_the_program_are_told_from_those_of_its_surroundings(name, monkeypatch, capsys):
    error, code, said = OUTSIDE[name]

    def run(_):
        raise error

    monkeypatch.setattr(inspect, "run", run)
    assert said in fails(capsys, code, "inspect", "x")


def test_nothing_to_fuse_is_told(folder, capsys):
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "model.pt")
    assert main(["export", "model.pt", "--image-size", "16", "--no-profile", "--opset", "17"]) == 0
    assert "Note: nothing was fused, so model.fused.onnx gains nothing" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["tables", "JSON"])
def test_a_full_disk_behind_the_output(options, plain, folder):
    """Also where all of it fits into the buffer, which Python writes at the end, and tells of that in its own words."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "acmix_deploy", "inspect", "plain.onnx", *options]
        done = subprocess.run(command, check=False, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: cannot write the output: No space left on device\nFree some space or choose another disk.\n"
    )


def test_as_a_module():
    """``python -m``, where the script is not on the PATH."""
    for name in ("acmix_deploy", "acmix_deploy.cli"):
        done = subprocess.run([sys.executable, "-m", name, "--version"], check=True, capture_output=True, text=True)
        assert done.stdout == f"acmix-deploy {__version__}\n"


def test_debug_shows_the_traceback(folder, capsys):
    assert main(["fuse", "nowhere.onnx", "-o", "x.onnx", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["export"], ["export", "m.pt", "--image-size", "0"], ["unknown"]])
def test_usage_errors(arguments):
    with pytest.raises(SystemExit) as refusal:
        main(arguments)
    assert refusal.value.code == 2


def test_every_verb_has_an_example():
    for name, command in commands().items():
        assert re.search(rf"acmix-deploy {name}\s", command.epilog)
        assert all(action.help for action in command._actions)


def test_what_an_option_refuses_is_told_in_words(capsys):
    """argparse names the function where one raises ValueError."""
    for command in commands().values():
        for action in command._actions:
            if callable(action.type) and not isinstance(action.type, type):
                with suppress(argparse.ArgumentTypeError):
                    action.type("?")
    with pytest.raises(SystemExit):
        main(["serve", "model.onnx", "--port", "99999"])
    assert "argument --port: '99999' is not a port, 0 to 65535" in capsys.readouterr().err


WITHOUT_TORCH = """
import json, sys
from contextlib import redirect_stdout, redirect_stderr
from io import StringIO

sys.modules["torch"] = None
from acmix_deploy.cli import main

found = []
for command in json.loads(sys.argv[1]):
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as errors:
        try:
            code = main(command)
        except SystemExit as end:
            code = end.code
    found.append((code or 0, errors.getvalue()))
print(json.dumps(found))
"""


def test_without_torch(checkpoint, plain, folder):
    """Everything but export works without PyTorch, also of what an export wrote; export says what to install."""
    for name in ("jinja2", "matplotlib"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    assert main(["export", "model.pt", "--image-size", "16", "--out", "deploy", *FAST]) == 0
    (folder / "exported.json").write_text('{"document": "export", "files": {}}')
    shape = ["--input-shape", "1,3,12,16"]
    commands = [
        ["export", "model.pt"],
        ["export", "--help"],
        ["fuse", "plain.onnx", "-o", "fused.onnx", "--expect", "1"],
        ["verify", "plain.onnx", "fused.onnx", *shape],
        ["profile", "fused.onnx", "--samples", "3", *shape],
        ["inspect", "exported.json"],
        ["report", "deploy"],
    ]
    program = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)]
    done = subprocess.run(program, check=True, cwd=folder, capture_output=True, text=True, timeout=120)
    (code, missing), *others = json.loads(done.stdout)
    assert code == 3
    assert "torch is needed" in missing
    assert "pip install" in missing
    assert [code for code, _ in others] == [0] * len(others), others
    assert "model.fused.onnx" in (folder / "deploy/report.html").read_text()


def test_reports_are_read_in_python_without_torch(folder):
    names = "ExportReport, ExportResult, write_report"
    program = f"import sys\nsys.modules['torch'] = None\nfrom acmix_deploy import {names}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=folder, timeout=120)
