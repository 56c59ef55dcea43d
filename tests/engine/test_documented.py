"""What the documentation shows of engines, on the stand-ins for TensorRT and CUDA and with a compiler of nothing."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import acmix_deploy as acmix
from acmix_deploy.plugin.build import NAME
from acmix_deploy.plugin.library import PluginLibrary
from tests import ROOT
from tests.engine.parts import make_plan
from tests.test_library import unchanged

torch = pytest.importorskip("torch")


def shown(page: str, *names: str) -> str:
    """The blocks of a page that use any of these names, and that `tests/scripts/test_docs.py` does not run."""
    blocks = re.findall(r"^```py\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    code = [block for block in blocks if any(re.search(rf"\b{name}\(", block) for name in names)]
    assert all(re.search(rf"\b{name}\(", "".join(code)) for name in names)
    return "from pathlib import Path\n" + "".join(code)


@pytest.fixture
def half(tmp_path: Path, faster_exporter: None) -> Path:
    """A fused file in half precision."""
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 8, 1), acmix.ACmix(16, 16, head=2)).eval()
    acmix.export(block, tmp_path / "plain.onnx", input_shape=(1, 3, 320, 320), opset=17)
    acmix.fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=1)
    acmix.to_fp16(tmp_path / "fused.onnx", tmp_path / "half.onnx")
    return tmp_path / "half.onnx"


@pytest.fixture
def compiler(empty_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of plugins: it takes no CUDA, and what it makes is an empty library."""
    module = sys.modules["acmix_deploy.plugin.build"]

    def run(command: list[str | Path], *_: object) -> None:
        if "-B" in command:
            shutil.copy(empty_library, Path(command[command.index("-B") + 1], NAME))

    def describe(path: Path) -> PluginLibrary:
        facts = {"version": acmix.__version__, "cuda": "13.0", "architectures": "sm_87", "tensorrt": "8.6.0"}
        return PluginLibrary(path=path, **facts, creators=[], entries=[])

    found = {"find_cuda": "CUDA", "find_tensorrt": "TensorRT", "find_cmake": "cmake"}
    for name, what in found.items():
        monkeypatch.setattr(module, name, lambda *_, what=what: Tool(what))
    monkeypatch.setattr(module, "check_architectures", lambda *_: None)
    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(module, "describe", describe)


class Tool(str):
    version, nvcc, include, environment = "13.0", "nvcc", "include", None


def test_engines_from_python(
    gpu: object, half: Path, compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plan(tmp_path / "trtexec.engine", onnx.load(half))
    monkeypatch.chdir(tmp_path)
    names = {"half": half}
    exec(shown("docs/python.md", "build_plugin", "build", "EngineRunner", "adopt"), names)
    built = names["engine"]
    assert isinstance(built, acmix.BuildReport)
    assert built.plugin_layers
    assert built.manifest.plugin
    assert built.manifest.plugin.path == tmp_path / "plugin" / NAME
    assert acmix.inspect(Path("trtexec.engine")).manifest

    images = acmix.random_images((1, 3, 320, 320))
    names = {"images": images}
    exec(shown("docs/engines.md", "EngineRunner"), names)
    with acmix.open_model(half).runner as runner:
        wanted = runner.infer({"images": images})["output0"]
    outputs = names["outputs"]
    assert isinstance(outputs, dict)
    np.testing.assert_allclose(outputs["output0"], wanted, atol=1e-2)


def test_engines_leave_the_process_as_it_was(
    gpu: object, half: Path, compiler: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_plan(tmp_path / "other.engine", onnx.load(half))
    images = {"images": acmix.random_images((1, 3, 320, 320))}
    for folder in (tmp_path / "a", tmp_path / "b"):
        with unchanged(capfd):
            plugin = acmix.build_plugin(folder).path
            acmix.build(half, folder / "model.engine", plugin=plugin)
            acmix.adopt(tmp_path / "other.engine", metadata=half)
            with acmix.EngineRunner(folder / "model.engine") as runner:
                runner.infer(images)
