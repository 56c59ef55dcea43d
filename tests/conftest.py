"""What all tests share: Ultralytics stays off the network and out of the home directory, random numbers repeat."""

from __future__ import annotations

import fcntl
import functools
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.plugin.parts import cuda, libraries, rtx  # noqa: F401  fixtures

os.environ["YOLO_OFFLINE"] = "true"
os.environ["YOLO_AUTOINSTALL"] = "false"
os.environ["YOLO_CONFIG_DIR"] = tempfile.gettempdir()
# Ultralytics has PyTorch use all cores but one; where those are busy, threads that spin at barriers hold up their own.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# With free axes PyTorch's newer exporter spends more on its cache of shapes than that saves; SymPy's is too small.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")
os.environ.setdefault("SYMPY_CACHE_SIZE", "50000")
with suppress(ModuleNotFoundError):  # not on a machine for GPU tests
    import onnxruntime

    class _PassiveOptions(onnxruntime.SessionOptions):
        """The same for the threads of ONNX Runtime, in whatever library opens a session."""

        def __init__(self) -> None:
            super().__init__()
            super().add_session_config_entry("session.intra_op.allow_spinning", "0")

        def add_session_config_entry(self, key: str, value: str) -> None:
            if (key, value) != ("session.intra_op.allow_spinning", "0"):  # it warns of what is set twice
                super().add_session_config_entry(key, value)

    onnxruntime.SessionOptions = _PassiveOptions


def pytest_configure(config: pytest.Config) -> None:
    # In pyproject.toml it would import PyTorch before the environment above is set, which then has no effect.
    config.addinivalue_line("filterwarnings", "ignore::torch.jit.TracerWarning")


def pytest_collection_finish() -> None:
    """Spare the collector what the tests import, which it would look through again and again: a tenth of all time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 10)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("soak") and not os.environ.get("ACMIX_SOAK"):
        pytest.skip("takes many minutes: make soak")


@pytest.fixture(autouse=True)
def _seed() -> None:
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _one_registry() -> None:
    """PyTorch's newer exporter reads its operators anew at each export, for 0.8 s; here once in a process."""
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    if registration and not hasattr(registration.ONNXRegistry.from_torchlib, "cache_info"):
        with suppress(ImportError):
            import torchvision  # noqa: F401 - its operators are known once it is imported
        registration.ONNXRegistry.from_torchlib = staticmethod(functools.cache(registration.ONNXRegistry.from_torchlib))


@pytest.fixture
def fake(monkeypatch):
    """TensorRT 8.6 on an Orin, which does as it is told."""
    from acmix_deploy import manifest

    monkeypatch.syspath_prepend(str(Path(__file__).parent / "engine/fake_tensorrt"))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(manifest, "gpu_here", lambda: {"gpu": "Orin", "sm": 87})
    yield lambda mode: monkeypatch.setenv("FAKE_TENSORRT", mode)
    sys.modules.pop("tensorrt", None)


@pytest.fixture
def gpu(fake, monkeypatch):
    """The same with a CUDA on which engines run. At the end all that was made is given back."""
    from acmix_deploy import driver
    from acmix_deploy.runtime import cuda as runtime_cuda
    from tests.engine.fake_cuda import Cuda

    device = Cuda()
    monkeypatch.setattr(driver, "library", lambda: device)
    monkeypatch.setattr(runtime_cuda, "_thread", threading.local())
    yield device
    assert (device.live, device.error) == ({}, 0)
    if "tensorrt" in sys.modules:
        wrong = [event for event in sys.modules["tensorrt"]._events if "before" in event or "without" in event]
        assert wrong == []


@pytest.fixture
def faster_exporter(monkeypatch):
    """The one that traces, whatever the opset; with soak the one that a user gets."""
    if not os.environ.get("ACMIX_SOAK"):
        monkeypatch.setattr(import_module("acmix_deploy.export"), "_dynamo", Mock(side_effect=NotImplementedError))


@pytest.fixture
def empty_library(tmp_path):
    """A library that loads and registers no plugin."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-shared", "-o", tmp_path / "empty.so", "-x", "c", os.devnull], check=True)
    return tmp_path / "empty.so"


@pytest.fixture(scope="session")
def shapes_files(request, tmp_path_factory):
    """A folder of the trained detector (docs/detector.md) as plain.onnx and shapes.fused.onnx, for any number of images
    of 160x160 pixels: a copy, since the processes of a run export it once for all.
    """
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    from acmix_deploy import families, yolo
    from acmix_deploy.checkpoint import load
    from acmix_deploy.export import export
    from acmix_deploy.fusion import fuse
    from scripts.train_shapes import CHECKPOINT

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if hasattr(request.config, "workerinput") else base) / "trained"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "shapes.fused.onnx").exists():
            model = load(CHECKPOINT)
            module = yolo.prepare_for_export(families.canonicalise(model.module)[0])
            options = {"input_shape": (1, 3, 160, 160), "opset": 17, "divisor": 32, "dynamic": ("batch",)}
            export(module, shared / "plain.onnx", metadata=model.metadata, **options)
            fuse(shared / "plain.onnx", shared / "shapes.fused.onnx", expect=3)
    return Path(shutil.copytree(shared, tmp_path_factory.mktemp("shapes"), dirs_exist_ok=True))


@pytest.fixture(scope="session")
def shapes_model(shapes_files):
    """The fused one."""
    return shapes_files / "shapes.fused.onnx"
