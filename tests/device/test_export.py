"""`export` to a device: what is built there, what is said of it, and that nothing is built twice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from acmix_deploy.artifacts import sha256
from acmix_deploy.cli import main
from acmix_deploy.report.model import ExportReport
from tests import ROOT
from tests.device.conftest import use
from tests.device.loopback import Device, until

torch = pytest.importorskip("torch")

OPTIONS = ["--input-shape", "1,3,32,48", "--seconds", "0.1", "--on", "bench"]


@pytest.fixture
def bench(installed, tmp_path, monkeypatch) -> Iterator[Device]:
    """A device with the package; here model.pt in the folder for commands."""
    from acmix_deploy.families.acmix.module import ACmix

    use(installed, monkeypatch)
    torch.manual_seed(0)
    stem = torch.nn.Conv2d(3, 16, 3, stride=2, padding=1)
    model = torch.nn.Sequential(stem, torch.nn.SiLU(), ACmix(16, 16, head=2), torch.nn.Conv2d(16, 8, 1)).eval()
    torch.save(model, tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    yield installed
    for job in installed.home.glob("*/jobs/*"):
        assert "build" in json.loads((job / "started.json").read_text())["what"]  # what was kept on purpose


def report() -> ExportReport:
    return ExportReport.model_validate_json(Path("model-deploy/report.json").read_text())


def test_cut_while_it_builds(bench, capsys):
    """Detached it goes on; the same command takes what came of it, and then says all that there is to say."""
    pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX: pip install tensorrt-rtx-cu13")

    def cut() -> None:
        building = (path for path in bench.home.glob("*/jobs/*/started.json") if "engine" in path.read_text())
        assert until(lambda: any(building) or any(bench.home.glob("*/jobs/*/work/model.fused.onnx")), 120)
        bench.link.cut()

    cutting = threading.Thread(target=cut)
    cutting.start()
    assert main(["export", "model.pt", *OPTIONS, "--detach"]) == 3
    cutting.join()
    assert "the connection to bench was lost" in capsys.readouterr().err
    assert main(["export", "model.pt", *OPTIONS, "--detach", "--fetch"]) == 0
    printed = capsys.readouterr().out
    found = report()
    assert found.device
    assert "build model.fused.engine" in found.device.found
    assert found.device.name == found.device.host == "bench"
    assert found.device.folder == str(bench.home / "a folder")
    assert {"build model.fused.engine", "profile"} <= {*found.device.ran}
    # No GPU is there: the engine is not compared, nor timed, and that is said. What runs there is timed there.
    assert "model.fused.engine was not compared: bench has no GPU" in found.notes
    assert "model.fused.engine was not compared: bench has no GPU" in " ".join(printed.split())
    assert {comparison.candidate for comparison in found.verification.comparisons} == {
        "model.onnx",
        "model.fused.onnx",
    }
    assert found.files["fused"].profile
    assert not found.files["fused engine"].profile
    kept = Path(found.device.files["model.fused.engine"])
    digests = {sha256(path) for path in (kept, Path("model-deploy/model.fused.engine"))}
    assert digests == {found.files["fused engine"].artifact.sha256}
    log = Path("model-deploy/device.log").read_text()
    assert "build model.fused.engine: exit code 0" in log
    assert log.count("exit code 0") == len(found.device.ran)


def test_without_an_engine(bench, capsys):
    connections = bench.link.connections
    assert main(["export", "model.pt", *OPTIONS, "--no-engine", "--fp16", "--json"]) == 0
    found = report()
    assert json.loads(capsys.readouterr().out) == json.loads(Path("model-deploy/report.json").read_text())
    assert found.device.ran == ("profile",)
    assert found.engines == {}
    assert all(found.files[role].profile for role in ("plain", "fused", "fp16"))
    assert bench.link.connections == connections + 1


def test_for_another_target(bench, capsys):
    connections = bench.link.connections
    assert main(["export", "model.pt", *OPTIONS, "--for", "jetpack-6.2"]) == 2
    assert bench.link.connections <= connections + 1
    assert "error: " in capsys.readouterr().err
    assert not Path("model-deploy").exists()


def test_fetch_without_a_device(bench, capsys):
    assert main(["export", "model.pt", "--fetch"]) == 2
    assert "Add --on DEVICE." in capsys.readouterr().err


@pytest.fixture
def gpu(bench, tmp_path) -> Iterator[Device]:
    """The same with stand-ins for TensorRT 8.6 and CUDA, on which engines run."""
    folder = bench.root / "stand-ins"
    folder.mkdir()
    (folder / "tensorrt").symlink_to(ROOT / "tests/engine/fake_tensorrt/tensorrt")
    (folder / "fake_cuda.py").symlink_to(ROOT / "tests/engine/fake_cuda.py")
    (folder / "sitecustomize.py").write_text(
        "import os\n"
        "try:\n"
        "    from acmix_deploy import driver\n"
        "except ImportError:  # of the system's Python\n"
        "    pass\n"
        "else:\n"
        "    from fake_cuda import Cuda\n"
        "    device = Cuda()\n"
        "    driver.library = lambda: device\n"
        "    if os.environ.get('POISON') and 'acmix_deploy.runtime.outputs' in ' '.join(__import__('sys').orig_argv):\n"
        "        from acmix_deploy.runtime.tensorrt import EngineRunner\n"
        "        right = EngineRunner.outputs.fget\n"
        "        wrong = lambda runner: {name: 1.1 * out for name, out in right(runner).items()}\n"
        "        EngineRunner.outputs = property(wrong)\n"
    )
    bench.set(PYTHONPATH=folder, POISON="")
    yield bench
    bench.set(PYTHONPATH="", POISON="")


def test_engines_that_run_there_are_compared_here(gpu, capsys):
    assert main(["export", "model.pt", *OPTIONS, "--fp16"]) == 0, capsys.readouterr().err
    found = report()
    assert found.device.machine.gpu == "Orin"
    assert found.device.machine.version == "8.6.0"
    assert "run model.fp16.engine" in found.device.ran
    assert "model.fp16.engine" in {comparison.candidate for comparison in found.verification.comparisons}
    assert found.files["fp16 engine"].profile
    assert not any("not compared" in note for note in found.notes)
    gpu.set(POISON="1")
    assert main(["export", "model.pt", *OPTIONS, "--fp16"]) == 1
    assert "model.fp16.engine" in capsys.readouterr().err
    assert not report().passed


@pytest.mark.soak
def test_what_a_device_costs(installed, tmp_path, monkeypatch, capsys):
    """The demo's checkpoint, with the package installed there and no connection open: plugin and engine included."""
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    from scripts.train_shapes import CHECKPOINT

    use(installed, monkeypatch)
    seconds = {}
    for out, options in (("here", ["--no-engine"]), ("there", ["--on", "bench"])):
        start = time.monotonic()
        assert main(["export", str(CHECKPOINT), "--fp16", "--out", str(tmp_path / out), *options]) == 0
        seconds[out] = time.monotonic() - start
    with capsys.disabled():
        ratio = seconds["there"] / seconds["here"]
        print(f"\nexport {seconds['here']:.0f} s, to a device {seconds['there']:.0f} s, {ratio:.2f} times as long")
    assert seconds["there"] - seconds["here"] < 90
