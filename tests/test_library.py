"""Calls leave the process as they found it: they print nothing, change no state, and work twice and in threads."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon
import pytest
import rich.style  # noqa: F401  draws a random number
import sympy  # noqa: F401  adds a filter for warnings of its own, and PyTorch imports it when it exports
import torch
from polygraphy.logger import G_LOGGER
from torch import nn

import acmix_deploy as acmix
from acmix_deploy import AcmixDeployError, Plan
from acmix_deploy.process import unprinted
from tests import ROOT
from tests.gate import parts as gate_parts
from tests.precision import blobs

cv2 = pytest.importorskip("cv2", reason="needs opencv")


def state() -> dict[str, Any]:
    """What a whole process has one of."""
    loggers = {name: logging.getLogger(name) for name in ("torch", "torch.onnx", "onnx", "onnxscript", "matplotlib")}
    return {
        "levels": {name: (one.level, one.disabled, one.handlers[:]) for name, one in loggers.items()},
        "root": (logging.root.level, logging.root.manager.disable, logging.root.handlers[:]),
        "polygraphy": (str(vars(G_LOGGER.module_severity)), str(onnx_graphsurgeon.logger.G_LOGGER.severity)),
        "warnings": (warnings.filters[:], warnings.showwarning),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        # ONNX Runtime appends a folder of its own when its tools are imported, and finds others of them there.
        "path": [path for path in sys.path if not path.endswith("onnxruntime/transformers")],
        "streams": (sys.stdin, sys.stdout, sys.stderr, sys.excepthook),
        "signals": {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)},
        "random": (random.getstate(), str(np.random.get_state()), bytes(torch.get_rng_state().tolist())),
        "numpy": (np.geterr(), str(np.get_printoptions())),
        "torch": (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            repr(torch._tensor_str.PRINT_OPTS),
        ),
        "opencv": cv2.getNumThreads(),
        "threads": threading.active_count(),
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a block, ONNX files of it, a detector of bright squares, and pictures for that."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4, padding=1), acmix.ACmix(16, 16)).eval()
    torch.save(model, folder / "model.pt")
    acmix.export(model, folder / "plain.onnx", input_shape=(1, 3, 32, 32), opset=17)
    acmix.fuse(folder / "plain.onnx", folder / "fused.onnx", expect=1)
    blobs.detector(folder / "blobs.onnx")
    blobs.images(folder / "photos", 2)
    return folder


def written(folder: Path) -> dict[str, bytes]:
    """What is in the files of a folder, but for the sidecars, which tell the time."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.suffix == ".onnx"
    }


def fuse(files: Path, out: Path) -> object:
    return acmix.fuse(files / "plain.onnx", out / "fused.onnx").found


def to_fp16(files: Path, out: Path) -> object:
    return acmix.to_fp16(files / "fused.onnx", out / "half.onnx").found


def quantize(files: Path, out: Path) -> object:
    return acmix.quantize(files / "blobs.onnx", out / "int8.onnx", files / "photos", method="entropy").found


def load_source(files: Path, out: Path) -> object:
    return acmix.load_source(files / "model.pt", image_size=32).blocks


def export(files: Path, out: Path) -> object:
    source = acmix.load_source(files / "model.pt", image_size=32)
    return acmix.export(source.module, out / "plain.onnx", input_shape=source.shape, reference=source.reference).found


def compare_files(files: Path, out: Path) -> object:
    return acmix.compare_files(files / "plain.onnx", files / "fused.onnx", random=1, layers=True)


def compare_images(files: Path, out: Path) -> object:
    half = out / "half.onnx"
    acmix.to_fp16(files / "blobs.onnx", half)
    return acmix.compare_files(files / "blobs.onnx", half, images=files / "photos").detections[0].images[0].pairs


def profile(files: Path, out: Path) -> object:
    found = acmix.profile([files / "fused.onnx", files / "model.pt"], input_shape=(1, 3, 32, 32), seconds=0.1, rounds=1)
    return [one.file for one in found]


def inspect(files: Path, out: Path) -> object:
    return acmix.inspect(files / "fused.onnx")


def examine(files: Path, out: Path) -> object:
    return [acmix.examine(files / name, progress=lambda step: None) for name in ("plain.onnx", "model.pt")]


def explain(files: Path, out: Path) -> object:
    return acmix.explain("No importer registered for op: AcmixLocalAttention")


def detect(files: Path, out: Path) -> object:
    with acmix.Detector.load(files / "blobs.onnx") as detector:
        return [found.boxes.tolist() for found in detector([cv2.imread(str(files / "photos/000.png"))])]


def package(files: Path, out: Path) -> object:
    return [
        acmix.package_triton(files / "blobs.onnx", out / "repository").files,
        acmix.package_deepstream(files / "blobs.onnx", out / "folder").files,
    ]


def gate_check(files: Path, out: Path) -> object:
    return acmix.gate_check([gate_parts.pair(0.9)])


def gate_history(files: Path, out: Path) -> object:
    (out / "run.json").write_text(gate_parts.text(gate_parts.alone(seed=1)))
    return acmix.gate_history(out)


def gate_run(files: Path, out: Path) -> object:
    return acmix.gate_run(files / "fused.onnx", out / "run.json", rounds=1, samples=1, seconds=0.1).candidate.model


def write_report(files: Path, out: Path) -> object:
    (out / "gate.json").write_text(gate_parts.text(gate_parts.pair(0.9)))
    return acmix.write_report(out, out / "report.html")


def compare_layers(files: Path, out: Path) -> object:
    plain, fused = files / "plain.onnx", files / "fused.onnx"
    return acmix.compare_layers("fused", plain, fused, acmix.inputs_for(plain))


def verify(files: Path, out: Path) -> object:
    source = acmix.load_source(files / "model.pt", image_size=32)
    candidates = [acmix.Candidate(acmix.onnx_runner(files / "fused.onnx", "fused"))]
    images = acmix.random_images((1, 3, 32, 32))
    return acmix.verify(acmix.TorchRunner(source.module), candidates, [{"images": images}])


def open_model(files: Path, out: Path) -> object:
    with acmix.open_model(files / "fused.onnx").runner as runner:
        return runner.infer({"images": acmix.random_images((1, 3, 32, 32))})


def read_artifact(files: Path, out: Path) -> object:
    return acmix.read_artifact(files / "fused.onnx")


def end_to_end(files: Path, out: Path) -> object:
    photos = str(files / "photos")
    found = acmix.profile_end_to_end([files / "blobs.onnx"], photos, seconds=0.1, rounds=1)
    return [model.file for model in found.models]


def deploy(files: Path, out: Path) -> object:
    plan = Plan(checkpoint=files / "model.pt", out=out, image_size=32, seconds=0.1, fp16=True, expect=1)
    report = acmix.deploy(plan)
    return report.passed, sorted(report.files)


TAKE_NO_FILE = explain, gate_check, gate_history, write_report

CALLS: list[Callable[[Path, Path], object]] = [
    fuse, to_fp16, quantize, load_source, export, compare_files, compare_images, profile, inspect, examine, explain,
    detect, package, gate_check, gate_history, gate_run, write_report, compare_layers, verify, open_model,
    read_artifact, end_to_end, deploy,
]  # fmt: skip


Capture = pytest.CaptureFixture[str]


@contextmanager
def unchanged(capfd: Capture) -> Iterator[None]:
    """Fails where the state of the process has changed, or anything was printed."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(12345)  # no seed that a call would set
    before = state()
    capfd.readouterr()
    yield
    printed = capfd.readouterr()
    after = state()
    assert [(name, before[name], after[name]) for name in before if after[name] != before[name]] == []
    assert (printed.out, printed.err) == ("", "")


@pytest.mark.parametrize(
    "call", [pytest.param(call, marks=pytest.mark.soak) if call is gate_run else call for call in CALLS]
)
def test_twice_and_in_a_thread(
    call: Callable[[Path, Path], object], files: Path, tmp_path: Path, faster_exporter: None, capfd: Capture
) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        out.mkdir()
    with unchanged(capfd):
        first = call(files, outs[0])
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(call, files, outs[1]).result()
    assert repr(first).replace(str(outs[0]), "") == repr(second).replace(str(outs[1]), "")
    assert written(outs[0]) == written(outs[1])


@pytest.mark.parametrize("call", [call for call in CALLS if call not in TAKE_NO_FILE])
def test_after_an_error(
    call: Callable[[Path, Path], object], tmp_path: Path, faster_exporter: None, capfd: Capture
) -> None:
    for name in ("model.pt", "plain.onnx", "fused.onnx", "blobs.onnx"):
        (tmp_path / name).write_bytes(b"\x08\x08nothing" * 20)
    (tmp_path / "out").mkdir()
    with unchanged(capfd), pytest.raises(AcmixDeployError) as raised:
        call(tmp_path, tmp_path / "out")
    assert raised.value.message
    assert left(tmp_path / "out") == []


def left(folder: Path) -> list[str]:
    """All files of a folder, hidden ones too."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("last", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["deploy", "fuse", "quantize", "examine"])
def test_interrupted_by_its_progress(
    name: str, last: int, files: Path, tmp_path: Path, faster_exporter: None, capfd: Capture
) -> None:
    """Files that are left are whole: each is what its sidecar says."""
    told: list[str] = []

    def progress(step: str) -> None:
        told.append(step)
        if len(told) == last:
            raise KeyboardInterrupt

    plan = Plan(checkpoint=files / "model.pt", out=tmp_path, image_size=32, fp16=True, no_profile=True)
    calls: dict[str, Callable[[], object]] = {
        "deploy": lambda: acmix.deploy(plan, progress),
        "fuse": lambda: acmix.fuse(files / "plain.onnx", tmp_path / "fused.onnx", progress=progress),
        "quantize": lambda: acmix.quantize(
            files / "blobs.onnx", tmp_path / "int8.onnx", files / "photos", progress=progress
        ),
        "examine": lambda: acmix.examine(files / "plain.onnx", progress=progress),
    }
    with unchanged(capfd):
        try:
            calls[name]()
        except KeyboardInterrupt:
            assert len(told) == last
        else:
            assert last > len(told) > 0, "it went on"
            return
    models = [file for file in left(tmp_path) if file.endswith(".onnx")]
    assert left(tmp_path) == sorted([*models, *(f"{file}.json" for file in models)])
    for file in models:
        assert acmix.read_artifact(tmp_path / file).path.name == file
        acmix.inspect(tmp_path / file).check()
    if name != "deploy":
        assert models == []


def test_two_threads_at_once(files: Path, tmp_path: Path, faster_exporter: None, capfd: Capture) -> None:
    """What each gives is what it gives alone, and what others print meanwhile is printed."""
    wanted = [(tmp_path / name).mkdir() or call(files, tmp_path / name) for name, call in BESIDE.items()]
    start = threading.Barrier(2 * len(BESIDE))

    def run(call: Callable[[Path, Path], object], out: Path) -> object:
        out.mkdir()
        start.wait()
        return call(files, out)

    with unchanged(capfd), ThreadPoolExecutor(2 * len(BESIDE)) as pool:
        futures = [pool.submit(run, call, tmp_path / f"{name}{n}") for n in (1, 2) for name, call in BESIDE.items()]
        found = [future.result() for future in futures]
    assert list(map(repr, found)) == [*map(repr, wanted)] * 2
    for name in BESIDE:
        assert written(tmp_path / name) == written(tmp_path / f"{name}1") == written(tmp_path / f"{name}2")


BESIDE = {call.__name__: call for call in (fuse, to_fp16, export, compare_files, quantize)}


def test_loaded_while_another_is(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one load allows PyTorch to read is not missing from what the other does."""
    original, inside, other = torch.load, threading.Event(), threading.Event()

    def load(*arguments: Any, **options: Any) -> Any:
        if not inside.is_set():
            inside.set()
            other.wait(0.3)
        return original(*arguments, **options)

    def second() -> object:
        assert inside.wait(10)
        try:
            return load_source(files, files)
        finally:
            other.set()

    monkeypatch.setattr(torch, "load", load)
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(load_source, files, files), pool.submit(second)]
    assert repr(found[0].result()) == repr(found[1].result())


def test_others_print_while_a_thread_is_silent(capfd: Capture) -> None:
    def run() -> None:
        with unprinted():
            print("dropped")
            silent.set()
            assert printed.wait(10)
            print("dropped")

    silent, printed = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        assert silent.wait(10)
        print("kept")
        printed.set()
        future.result()
    print("after")
    assert capfd.readouterr().out == "kept\nafter\n"


def test_importing_ultralytics_goes_unnoticed() -> None:
    """In a process of its own, which has not imported it before. OpenCV's threads it keeps."""
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    code = """
from tests.test_library import state
from acmix_deploy import yolo
before = state()
yolo.ultralytics("nn.tasks")
after = state()
print([name for name in before if after[name] != before[name]])
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "NUMEXPR"))}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout in ("['opencv']\n", "[]\n")
