"""Verbs on a device that has the package: what they answer is what they answer here, and files are called as here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from acmix_deploy import __version__
from acmix_deploy.cli import main
from acmix_deploy.cli.on import _beside
from acmix_deploy.gate.samples import GateSamples
from tests.device.conftest import use
from tests.device.loopback import Device
from tests.gate.test_run import chain

cv2 = pytest.importorskip("cv2", reason="no OpenCV: pip install opencv-python-headless")

FAST = ["--samples", "3", "--seconds", "0.1"]


@pytest.fixture
def bench(installed, tmp_path, monkeypatch) -> Iterator[Device]:
    """The same, and a folder here for commands. Each leaves nothing but a store."""
    use(installed, monkeypatch)
    monkeypatch.chdir(tmp_path)
    chain(tmp_path / "model.onnx")
    kept = [*installed.home.glob("*/jobs/*")]  # of exports
    yield installed
    assert [left for left in installed.left() if left not in kept] == []


def answer(capsys, *arguments):
    """The exit code, the document on stdout, and what is said on stderr."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_what_is_installed(bench, capsys):
    folder = bench.home / "a folder"
    code, found, _ = answer(capsys, "device", "check", "bench")
    assert (code, found["ready"], found["folder"]) == (0, True, str(folder))
    states = {part["name"]: part["state"] for part in found["components"]}
    assert states["acmix-deploy there"] == "ok"
    # Every module but what exports imports what is there.
    code = (
        "import importlib, pkgutil, acmix_deploy\n"
        "for found in pkgutil.walk_packages(acmix_deploy.__path__, 'acmix_deploy.'):\n"
        "    if found.name.endswith(('.__main__', '.ultralytics')): continue\n"
        "    try: importlib.import_module(found.name)\n"
        "    except ModuleNotFoundError as error: print(error.name)\n"
        "print(acmix_deploy.__file__)\n"
    )
    (bench.home / "every.py").write_text(code)
    *absent, place = bench.ssh("'a folder/venv/bin/python' every.py").stdout.split("\n")[:-1]
    assert place.startswith(f"{folder}/venv/lib/")
    assert {name.partition(".")[0] for name in absent} <= {
        "torch",
        "onnxscript",
        "ultralytics",
        "triton_python_backend_utils",
    }


def test_renewal(bench, capsys):
    """Of the same version, with other files."""
    (package,) = (bench.home / "a folder/venv/lib").glob("python*/site-packages/acmix_deploy")
    (package / "document.py").write_text("raise SystemExit(9)\n")
    installed = bench.home / "a folder/installed.json"
    installed.write_text(json.dumps({"version": __version__, "wheel": "of another"}))
    try:
        _, found, _ = answer(capsys, "doctor", "model.onnx", "--on", "bench")
        (there,) = (part for part in found["environment"] if part["name"] == "acmix-deploy there")
        assert (there["state"], found["file"]) == ("missing", None)
        assert there["found"].startswith(f"bench has acmix-deploy {__version__} of another build than is here; Python ")
        assert answer(capsys, "profile", "model.onnx", "--on", "bench")[0] == 3
    finally:
        assert answer(capsys, "device", "add", "bench", "--install")[0] == 0
    assert answer(capsys, "profile", "model.onnx", *FAST, "--on", "bench")[0] == 0


def keys(found):
    """Where a document has something, without what it is."""
    if isinstance(found, dict):
        return {key: keys(one) for key, one in found.items()}
    return [keys(found[0])] if isinstance(found, list) and found else type(found).__name__


def test_profile_as_here(bench, tmp_path, capsys):
    """Files are called as they are given, wherever they lie."""
    given = ["model.onnx", "sub/model.onnx", str(tmp_path / "sub/other.onnx"), "sub/../beside/model.onnx"]
    given += ["a b'\"$(touch x)`;.onnx", "[1].onnx", "-dash.onnx"]
    for index, path in enumerate(given):
        Path(path).parent.mkdir(exist_ok=True)
        chain(Path(path), 1 + index % 3)
    answers = []
    for on in ([], ["--on", "bench"]):
        capsys.readouterr()
        assert main(["profile", *on, *FAST, "--json", "--", *given]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    here, there = answers
    assert [part.keys() for part in there["profiles"]] == [part.keys() for part in here["profiles"]]
    assert [part["file"] for part in there["profiles"]] == [part["file"] for part in here["profiles"]]
    assert not [*bench.home.glob("**/x")]


def test_exit_codes_as_here(bench, tmp_path, capsys):
    (tmp_path / "broken.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:-40])
    for arguments in (
        ["profile", tmp_path / "broken.onnx"],
        ["profile", "model.onnx", "--provider", "cuda"],
        ["gate", "run", "--candidate", "broken.onnx", "-o", "gate.json"],
    ):
        code, _, told = answer(capsys, *arguments)
        code_there, _, told_there = answer(capsys, *arguments, "--on", "bench")
        assert code in (2, 3)
        assert code_there == code, (arguments, told, told_there)
        error, error_there = (text[text.index("error: ") :].splitlines()[0] for text in (told, told_there))
        assert error_there.replace("on bench: ", "") == error
        assert not (tmp_path / "gate.json").exists()
    before = (tmp_path / "model.onnx").read_bytes()
    assert answer(capsys, "gate", "run", "--candidate", "model.onnx", "-o", "model.onnx", "--on", "bench")[0] == 2
    assert (tmp_path / "model.onnx").read_bytes() == before


def test_weights_in_files_of_their_own(bench, tmp_path, capsys):
    weights = onnx.numpy_helper.from_array(np.ones((3, 16, 16), np.float32), "weights")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 16, 16]) for name in ("images", "output0")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["images", "weights"], ["output0"])], "graph", values[:1], values[1:]
    )
    graph.initializer.append(weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "sub").mkdir()
    onnx.save(model, tmp_path / "sub/large.onnx", save_as_external_data=True, location="large.data", size_threshold=0)
    assert answer(capsys, "profile", "sub/large.onnx", *FAST, "--on", "bench")[0] == 0
    (tmp_path / "sub/large.data").unlink()
    assert answer(capsys, "profile", "sub/large.onnx", *FAST, "--on", "bench")[0] == 2


def test_gate(bench, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    cv2.imwrite("photos/a b.png", np.zeros((16, 16, 3), np.uint8))
    shutil.copy("model.onnx", "new.onnx")
    out = tmp_path / "out/gate.json"
    arguments = ["gate", "run", "--baseline", tmp_path / "model.onnx", "--candidate", "new.onnx", "--images", "photos"]
    code, found, told = answer(
        capsys, *arguments, "-o", out, "--rounds", 2, "--samples", 5, "--seconds", 0.1, "--on", "bench"
    )
    assert code == 0, told
    samples = GateSamples.model_validate_json(out.read_bytes())
    assert json.loads(samples.model_dump_json(by_alias=True)) == found
    assert [part.model for part in (samples.baseline, samples.candidate)] == ["model.onnx", "new.onnx"]
    assert len(samples.candidate.rounds) == 2
    assert "images" in samples.candidate.fed_with
    assert [path.name for path in out.parent.iterdir()] == ["gate.json"]


def test_what_belongs_to_a_file_goes_with_it(bench, tmp_path):
    for name in ("report.json", "model.onnx.json", "other.json"):
        (tmp_path / name).write_text("{}")
    beside = _beside(tmp_path / "model.onnx", Path("there/model.onnx"))
    assert beside == {f"there/{name}": tmp_path / name for name in ("report.json", "model.onnx.json")}


def test_doctor(bench, tmp_path, capsys):
    code, found, _ = answer(capsys, "doctor", tmp_path / "model.onnx", "--on", "bench")
    here = answer(capsys, "doctor", tmp_path / "model.onnx")[1]
    assert (code, found["machine"]) == (0, "bench")
    assert found["file"] == here["file"]
    names = [part["name"] for part in found["environment"]]
    assert names[0] == "device"
    assert {part["name"] for part in here["environment"]} - {*names} == set()
    torch = next(part for part in found["environment"] if part["name"] == "PyTorch")
    assert torch["state"] == "missing"


def test_verify(bench, tmp_path, capsys):
    shutil.copy("model.onnx", "new.onnx")
    arguments = ["verify", tmp_path / "model.onnx", "new.onnx", "--random", "1", "-o", "verify.json"]
    code, there, told = answer(capsys, *arguments, "--on", "bench")
    assert code == 0, told
    assert json.loads((tmp_path / "verify.json").read_text()) == there
    code, here, _ = answer(capsys, *arguments)
    assert (code, keys(here)) == (0, keys(there))
    chain(tmp_path / "new.onnx", elements=TensorProto.FLOAT)
    wrong = onnx.load("new.onnx")
    wrong.graph.node[0].op_type = "Neg"
    onnx.save(wrong, "new.onnx")
    codes = [answer(capsys, *arguments, *on)[0] for on in ([], ["--on", "bench"])]
    assert codes == [1, 1]


def test_tables_as_here(bench, capsys):
    assert main(["profile", "model.onnx", *FAST, "--on", "bench"]) == 0
    out = capsys.readouterr().out
    assert "model.onnx" in out
    assert "{" not in out
