"""Each known fault is made as upstream makes it, shows as users know it, and is named with what mends it."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn

import tests.families.test_outlook as outlook
import tests.families.test_swin_acmix as swin
from acmix_deploy import __version__, cli
from acmix_deploy.artifacts import write_artifact
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.doctor import machine
from acmix_deploy.doctor.diagnosis import Examination
from acmix_deploy.doctor.faults import FAULTS
from acmix_deploy.doctor.files import examine
from acmix_deploy.doctor.machine import environment
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.manifest import Machine, Manifest
from acmix_deploy.profile import monitor
from acmix_deploy.report.documents import DoctorDocument
from acmix_deploy.runtime.inputs import AXES
from acmix_deploy.runtime.onnxruntime import open_session
from tests.engine.parts import make_engine
from tests.families.parts import export as traced
from tests.families.test_recognise_module import Port, port
from tests.fusion.test_fuse import Frozen, Published, position_map, randomised
from tests.precision.test_quantised_before import plain, quantised
from tests.serving.parts import selected, tiny


def look(path: Path, **options: Any) -> Examination:
    return examine(path, progress=lambda step: None, **options)


def faults(found: Examination) -> set[str]:
    for finding in found.findings:
        assert finding.found
        assert finding.remedy
    return {finding.fault for finding in found.findings}


def saved(path: Path, value: object) -> Path:
    torch.save(value, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_healthy_checkpoint(tmp_path: Path) -> None:
    found = look(saved(tmp_path / "a.pt", {"model": nn.Sequential(ACmix(8, 8, 3, 2)), "epoch": 3}))
    assert (found.kind, faults(found)) == ("checkpoint", set())
    assert found.contents["holds"] == "torch.nn.modules.container.Sequential"
    assert found.module_blocks[0].status == "canonical"


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test modules may be loaded with --trust."""
    monkeypatch.setitem(sys.modules, "test_recognise_module", sys.modules[Port.__module__])


@pytest.mark.parametrize(
    ("options", "half", "expected"),
    [
        ({"position": "ours", "dep_bias": True}, False, []),
        ({"dep_bias": True}, False, ["linspace-position"]),
        ({"dep_bias": True, "position": "cuda"}, False, ["linspace-position", "cuda-position"]),
        ({"position": "ours"}, False, ["no-bias"]),
        ({"position": "ours", "dep_bias": True, "rate_shape": ()}, False, ["scalar-rates"]),
        ({"dep_bias": True}, True, ["linspace-position", "float32-position"]),
        ({"dep_bias": True, "window": 512, "declare": "512"}, False, ["misplaced-argument"]),
        ({"dep_bias": True, "window": 1, "declare": "1"}, False, ["misplaced-argument"]),
        ({"dep_bias": True, "border": "zero"}, False, ["no-block"]),
    ],
    ids=str,
)
def test_faults_of_blocks_in_a_checkpoint(
    tmp_path: Path, options: dict[str, Any], half: bool, expected: list[str], mapped: None
) -> None:
    block = port(**options)
    path = saved(tmp_path / "a.pt", nn.Sequential(nn.Conv2d(3, 4, 1), block.half() if half else block))
    found = look(path, trust=True)
    assert faults(found) == set(expected)
    assert {finding.where for finding in found.findings} <= {"1"}
    with pytest.raises(UserError, match="restricted load"):
        look(path)


def test_the_message_of_half_precision(mapped: None) -> None:
    """The quoted symptom is what this fault gives."""
    with pytest.raises(RuntimeError, match=r"Input type \(float\) and bias type \(c10::Half\) should be the same"):
        port(dep_bias=True).half()(torch.rand(1, 4, 8, 8).half())
    assert "Input type (float) and bias type (c10::Half) should be the same" in FAULTS["float32-position"].symptom


def test_the_message_of_missing_biases_and_scalars() -> None:
    block, scalars = ACmix(8, 8, 3, 2), port(planes=8, in_planes=8, rate_shape=())
    plain = nn.Module()
    plain.rate1 = nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match="size mismatch for rate1"):
        plain.load_state_dict({"rate1": scalars.state_dict()["rate1"]})
    assert "dep_conv.bias" not in block.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict"):
        nn.Conv2d(1, 1, 1).load_state_dict({"weight": torch.ones(1, 1, 1, 1)})


class ACmixLike(nn.Module):
    """Called like the block, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_an_impostor(tmp_path: Path) -> None:
    found = look(saved(tmp_path / "a.pt", nn.Sequential(ACmixLike())), trust=True)
    assert faults(found) == {"no-block"}
    assert "ACmixLike is left alone" in found.findings[0].found


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_alone(tmp_path: Path, prefix: str) -> None:
    block = port(rate_shape=())
    state = {f"{prefix}neck.{name}": tensor.half() for name, tensor in block.state_dict().items()}
    found = look(saved(tmp_path / "a.pth", {"state_dict": state}))
    assert faults(found) == {"no-bias", "scalar-rates"}
    assert {finding.where for finding in found.findings} == {f"{prefix}neck"}
    assert found.contents["holds"] == "weights alone"
    assert found.contents["types"] == "float16"
    assert "--arch" in found.contents["to export it"]
    assert ("names" in found.contents) is bool(prefix)


class CfgNode(dict):  # type: ignore[type-arg]
    """As yacs has it."""


CfgNode.__module__ = "yacs.config"


@pytest.mark.parametrize("config", ["yacs", "argparse"])
def test_a_configuration_beside_weights(tmp_path: Path, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    yacs: Any = ModuleType("yacs.config")
    yacs.CfgNode = CfgNode
    beside = CfgNode(a=1) if config == "yacs" else argparse.Namespace(a=1)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", yacs)
        path = saved(tmp_path / "a.pt", {"model": {"w": torch.ones(1)}, "config": beside})
    with pytest.raises(Exception, match=r"Unsupported global: GLOBAL \S+ was not an allowed global by default"):
        torch.load(path)
    found = look(path)
    assert faults(found) == {"blocked-load"}
    assert {"yacs": "yacs.config.CfgNode", "argparse": "argparse.Namespace"}[config] in found.findings[0].found
    assert faults(look(saved(path, {"model": {"w": torch.ones(1)}}))) == set()


def test_a_class_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        common: Any = ModuleType("models.common")
        patch.setitem(sys.modules, "models", ModuleType("models"))
        patch.setitem(sys.modules, "models.common", common)
        patch.setattr(ACmixLike, "__module__", "models.common")
        common.ACmixLike = ACmixLike
        path = saved(tmp_path / "a.pt", {"model": ACmixLike()})
    with pytest.raises(ModuleNotFoundError, match="No module named 'models"):
        torch.load(path, weights_only=False)
    assert "No module named 'models'" in FAULTS["missing-class"].symptom
    found = look(path)
    assert faults(found) == {"missing-class"}
    assert "models.common.ACmixLike" in found.findings[0].found
    assert "--arch" in found.findings[0].remedy


# ---------------------------------------------------------------------------------------------------------------------
# ONNX files


def test_a_healthy_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), ACmix(8, 8, 3, 2)).eval()
    traced(model, torch.rand(1, 3, 64, 64), tmp_path / "a.onnx", dynamic=AXES)
    found = look(tmp_path / "a.onnx")
    assert (found.kind, faults(found), found.graph_blocks[0].fused) == ("onnx", set(), True)
    fuse(tmp_path / "a.onnx", tmp_path / "b.onnx")
    found = look(tmp_path / "b.onnx")
    assert faults(found) == set()
    assert found.contents["fused blocks"] == "acmix_0.attention"


def test_a_position_in_float64(tmp_path: Path) -> None:
    """The quoted message, and the remedy works."""
    path, x = tmp_path / "a.onnx", torch.rand(1, 4, 8, 8)
    traced(randomised(Published(4, 8, 3, 2)), x, path, fold=False)
    with pytest.raises(UserError, match=r"Could not find an implementation for Conv\(11\) node with name '\S*conv_p"):
        open_session(path)
    found = look(path)
    assert faults(found) == {"float64-position"}
    assert "conv_p" in found.findings[0].where
    assert "Could not find an implementation for Conv" in FAULTS["float64-position"].symptom
    fuse(path, tmp_path / "b.onnx", expect=1)
    assert faults(look(tmp_path / "b.onnx")) == set()


def test_a_size_that_froze(tmp_path: Path) -> None:
    """As linspace does in the dynamo exporter: the signature stays dynamic, other sizes fail."""
    block = randomised(ACmix(2, 2, 3, 1))
    block.conv_p = Frozen(position_map(block, 320, 320))
    path = traced(block, torch.rand(1, 2, 320, 320), tmp_path / "a.onnx", dynamic=AXES)
    found = look(path)
    assert faults(found) == {"frozen-size"}
    assert {finding.where for finding in found.findings} == {"height", "width"}
    assert "runs at 320x320 and not with another height" in found.findings[0].found


def graph(
    path: Path, nodes: list[onnx.NodeProto], shape: list[int | str], constants: dict[str, Any], rank: int = 4
) -> Path:
    """A small file: x to y, both float32."""
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(64, 64, {"height", "width"}), (1, 64, {"width"}), (320, 1, {"height"}), (1, 1, set())],
)
def test_which_axis_froze(tmp_path: Path, height: int, width: int, expected: set[str]) -> None:
    position = np.zeros((1, 1, height, width), np.float32)
    nodes = [helper.make_node("Add", ["x", "position"], ["y"])]
    found = look(graph(tmp_path / "a.onnx", nodes, ["b", 3, "h", "w"], {"position": position}))
    assert {finding.where for finding in found.findings} == expected


@pytest.mark.parametrize("how", ["fails", "another shape", "mixed", "free"])
def test_a_batch_that_froze(tmp_path: Path, how: str) -> None:
    """As int(...) does in Swin's window_reverse."""
    shapes = {"fails": [1, 3, 256], "another shape": [1, -1, 256], "mixed": [0, 3, 256], "free": [0, 3, 256]}
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["z" if how == "mixed" else "y"])]
    if how == "mixed":
        nodes += [helper.make_node("ReduceMean", ["z"], ["m"], axes=[0]), helper.make_node("Add", ["z", "m"], ["y"])]
    path = graph(tmp_path / "a.onnx", nodes, ["b", 3, 16, 16], {"shape": np.array(shapes[how])}, rank=3)
    found = look(path)
    assert faults(found) == (set() if how == "free" else {"frozen-batch"})
    assert {finding.where for finding in found.findings} <= {"batch"}


class Turned(nn.Module):
    """A head that selects six boxes, and gives those of a batch of two in another order, with other ``scores``."""

    def __init__(self, change: float) -> None:
        super().__init__()
        self.change = change
        corners = torch.rand(1, 6, 2) * 32
        self.rows = nn.Parameter(torch.cat([corners, corners + 8, torch.rand(1, 6, 1), torch.zeros(1, 6, 1)], 2))

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        order = torch.arange(6) * (3 - 2 * batch)
        return self.rows[:, order] * (1 + self.change * (batch - 1)) + 0 * x.mean((1, 2, 3)).reshape(-1, 1, 1)


@pytest.mark.parametrize(("change", "expected"), [(0.0, set()), (0.1, {"frozen-batch"})])
def test_rows_that_a_head_selects_have_no_order(tmp_path: Path, change: float, expected: set[str]) -> None:
    torch.manual_seed(0)
    path = traced(Turned(change), torch.rand(2, 3, 32, 32), tmp_path / "a.onnx", dynamic=AXES)
    model = onnx.load(path)
    told = ModelMetadata({"task": "detect", "names": "{0: 'cat'}", "end2end": "True"})
    onnx.helper.set_model_props(model, told.entries)
    onnx.save(model, path)
    assert faults(look(path)) == expected


class WindowReverse(nn.Module):
    """Windows of 4x4 and back, with the batch as upstream computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        height, width = 16, 16
        windows = x.permute(0, 2, 3, 1).reshape(-1, 4, 4, 4, 4, 4).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 4, 4)
        windows = self.layer(windows)
        batch = int(windows.shape[0] / (height * width / 4 / 4))
        y = windows.view(batch, 4, 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)
        return F.layer_norm(y, (4,))


def test_windows_that_are_put_back_into_one_image(tmp_path: Path) -> None:
    path = traced(WindowReverse(), torch.rand(1, 4, 16, 16), tmp_path / "a.onnx", dynamic=AXES)
    model = onnx.load(path)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 16
    onnx.save(model, path)
    found = look(path)
    assert faults(found) == {"frozen-batch"}
    assert "batch" in found.findings[0].found


@pytest.mark.parametrize("folded", [False, True])
def test_a_position_that_was_folded(tmp_path: Path, folded: bool) -> None:
    """The quoted growth of the file, and the remedy works."""
    path = traced(randomised(ACmix(4, 16, 5, 4)), torch.rand(1, 4, 16, 16), tmp_path / "a.onnx", fold=folded)
    if folded:
        onnx.save(gs.export_onnx(gs.import_onnx(onnx.load(path)).fold_constants().cleanup()), path)
    found = look(path)
    assert faults(found) == ({"folded-position"} if folded else set())
    if folded:
        assert path.stat().st_size > 4 * 4 * 25 * 16 * 16, "d * K * K * H * W numbers"
        fuse(path, tmp_path / "b.onnx", expect=1)
        assert (tmp_path / "b.onnx").stat().st_size < path.stat().st_size / 2
        assert faults(look(tmp_path / "b.onnx")) == set()


def test_a_relative_position_bias_is_no_folded_position(tmp_path: Path) -> None:
    """A learnt table, as large as the logits themselves."""
    nodes = [helper.make_node("Add", ["x", "bias"], ["l"]), helper.make_node("Softmax", ["l"], ["y"], axis=-1)]
    bias = np.zeros((1, 4, 49, 49), np.float32)
    assert faults(look(graph(tmp_path / "a.onnx", nodes, [2, 4, 49, 49], {"bias": bias}))) == set()


class ZeroPadded(ACmix):
    def _neighbours(self, x: Tensor) -> Tensor:
        return F.unfold(x, self.kernel_att, padding=self.kernel_att // 2)


def test_an_operator_that_tensorrt_does_not_read(tmp_path: Path) -> None:
    """No fault: the file may be for another runtime. What the newest release reads is not told."""
    nodes = [
        helper.make_node("Col2Im", ["x", "size", "block"], ["z"], "the_fold"),
        helper.make_node("LayerNormalization", ["z", "scale"], ["y"]),
    ]
    constants = {"size": [4, 4], "block": [2, 2], "scale": np.ones(4, np.float32)}
    graph(tmp_path / "a.onnx", nodes, [1, 12, 9], constants)
    model = onnx.load(tmp_path / "a.onnx")
    model.opset_import[0].version = 18
    onnx.save(model, tmp_path / "a.onnx")
    found = look(tmp_path / "a.onnx")
    assert faults(found) == set()
    assert [note for note in found.notes if "does not read" in note] == [
        "it has Col2Im (the_fold), which TensorRT does not read: a plugin called Col2Im is needed there, "
        "or a model without it; a transposed convolution with one-hot kernels in place of fold"
    ]


def test_a_block_that_does_not_fuse(tmp_path: Path) -> None:
    path = traced(ZeroPadded(4, 8, 3, 2).eval(), torch.rand(1, 4, 8, 8), tmp_path / "a.onnx")
    found = look(path)
    assert faults(found) == {"no-block"}
    assert "linear in the coordinates" in found.findings[0].found


def test_a_file_that_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("NoSuchOperator", ["x"], ["y"])]
    assert "refused-file" in faults(look(graph(tmp_path / "a.onnx", nodes, [1, 3, 8, 8], {})))


def test_a_swin_block_that_would_freeze(tmp_path: Path) -> None:
    """Known before the export, from the module."""
    block = swin.randomised(swin.WindowMix())
    block.window_size = block.side
    found = look(saved(tmp_path / "a.pt", nn.Sequential(block)), trust=True)
    assert faults(found) == {"traced-batch", "no-bias"}


def test_a_fold_that_tensorrt_does_not_read(tmp_path: Path) -> None:
    found = look(saved(tmp_path / "a.pt", nn.Sequential(outlook.randomised(outlook.Published()))), trust=True)
    assert faults(found) == {"col2im"}


# ---------------------------------------------------------------------------------------------------------------------
# Engines and plugins


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine of TensorRT 8.6 for an Orin; what is in it plays no part."""
    path = tmp_path / "a.engine"
    path.write_bytes(b"ptrt and so on")
    manifest = Manifest(
        machine=Machine(backend="tensorrt", version="8.6.0", gpu="Orin", sm=87), compute_capabilities=(), plugin=None,
        form="plain", precision="float16", strongly_typed=False, flags=("FP16",), level=3, profiles={}, inputs=(),
        outputs=(), metadata={},
    )  # fmt: skip
    write_artifact(path, "engine", parents=[], settings=manifest.model_dump(mode="json"))
    return path


@pytest.mark.parametrize(("sm", "expected"), [(87, set()), (90, {"other-machine"})])
def test_an_engine(engine: Path, sm: int, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    here = Machine(backend="tensorrt", version="8.6.0", gpu="Orin", sm=sm)
    monkeypatch.setattr("acmix_deploy.doctor.files.this_machine", lambda backend: here)
    found = look(engine)
    assert (found.kind, faults(found)) == ("engine", expected)
    assert found.contents["for"] == "Orin (sm_87)"
    if expected:
        assert "built for Orin (sm_87), here is Orin (sm_90)" in found.findings[0].found


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"task": "pose"}, "and its metadata tell no kpt_shape"),
        ({"names": "{0: 'a', 1: 'b'}"}, "for 2 classes"),
        ({"names": "['a']"}, "cannot be decoded: the metadata tell the names"),
        ({}, "whose rows are a box, a score and a class"),
    ],
)
def test_outputs_that_are_something_else(
    tmp_path: Path, metadata: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = selected(tmp_path / "a.onnx", **metadata)
    found = look(file)
    assert faults(found) == {"other-outputs"}
    assert said in found.findings[0].found
    here = Machine(backend="tensorrt", version="8.6.0", gpu="Orin", sm=87)
    monkeypatch.setattr("acmix_deploy.doctor.files.this_machine", lambda backend: here)
    told = {"task": "detect", **metadata}
    assert faults(look(make_engine(tmp_path / "a.engine", onnx.load(file), metadata=told))) == (
        {"other-outputs"} if metadata else set()  # an engine is not run
    )


def test_a_detector_is_one(tmp_path: Path) -> None:
    assert faults(look(tiny(tmp_path / "a.onnx"))) == set()


def test_an_engine_where_there_is_no_tensorrt(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = look(engine)
    assert faults(found) == set()
    assert "cannot be told" in found.notes[0]


def test_an_engine_without_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.engine").write_bytes(b"ftrt")
    found = look(tmp_path / "a.engine")
    assert (found.kind, faults(found)) == ("engine", set())
    assert "no manifest" in found.notes[0]


# ---------------------------------------------------------------------------------------------------------------------
# The machine


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with nothing but this Python: no GPU, no compiler, no Jetson."""

    def missing(*_: object) -> Any:
        raise MissingComponent("it was looked for and not found", "Install it.")

    for name in ("find_cuda", "find_cmake", "find_tensorrt"):
        monkeypatch.setattr(machine, name, missing)
    monkeypatch.setattr(machine, "gpu_here", dict)
    monkeypatch.setattr(machine, "installed_tensorrt", dict)
    monkeypatch.setattr(monitor, "_nvml", lambda: (None, ""))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def by_name(**options: Any) -> dict[str, Any]:
    found = environment(**options)
    assert len({component.name for component in found}) == len(found)
    for component in found:
        assert component.state == "ok" or component.advice or component.name == "GPU", component
    return {component.name: component for component in found}


def test_a_bare_machine(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    found = by_name(root=bare)
    missing = ["PyTorch", "Ultralytics", "TensorRT", "TensorRT headers", "CUDA compiler", "CMake", "GPU", "plugin"]
    assert [name for name in missing if found[name].state != "missing"] == []
    assert found["acmix-deploy"].found == __version__
    assert "Jetson" not in found
    assert DoctorDocument(environment=tuple(found.values())).healthy


def test_this_machine(bare: Path) -> None:
    found = by_name(root=bare)
    assert found["PyTorch"].found.startswith(torch.__version__)
    assert "CPU" in found["ONNX Runtime"].found
    assert "x86_64" in found["Python"].found or "aarch64" in found["Python"].found


def test_a_jetson(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic, EABI: aarch64\n",
        "sys/class/devfreq/17000000.gpu/cur_freq": "1300500000",
        "sys/class/thermal/thermal_zone1/type": "gpu-thermal",
        "sys/class/thermal/thermal_zone1/temp": "48500",
        "sys/class/thermal/cooling_device2/type": "gpu-throttle-alert",
        "sys/class/thermal/cooling_device2/cur_state": "0",
    }
    for name, content in files.items():
        (bare / name).parent.mkdir(parents=True, exist_ok=True)
        (bare / name).write_text(content)
    monkeypatch.setattr(machine, "gpu_here", lambda: {"gpu": "Orin", "sm": 87, "cuda": "12.6", "driver": None})
    monkeypatch.setattr(monitor, "_power_mode", lambda: "MAXN")
    found = by_name(root=bare)
    assert found["Jetson"].found == "NVIDIA Jetson AGX Orin Developer Kit, Jetson Linux 36.4.3"
    assert found["nvpmodel"].found == "MAXN"
    assert found["clocks"].found == "GPU 1300 MHz, 48 degrees Celsius"
    assert found["GPU"].found == "Orin (sm_87), CUDA 12.6 at most"

    (bare / "sys/class/thermal/cooling_device2/cur_state").write_text("1")
    hot = by_name(root=bare)["clocks"]
    assert (hot.state, "temperature of gpu" in hot.found) == ("fault", True)


@pytest.mark.parametrize(
    ("version", "state"), [("10.3.0", "ok"), ("8.6.0", "ok"), ("8.4.1", "fault"), ("9.0", "fault")]
)
def test_versions_of_tensorrt(bare: Path, version: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt = ModuleType("tensorrt")
    tensorrt.__version__ = version  # type: ignore[attr-defined]
    tensorrt.__spec__ = ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    assert by_name(root=bare)["TensorRT"].state == state


def test_a_broken_package(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "tensorrt").mkdir()
    (bare / "tensorrt" / "__init__.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(bare))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    importlib.invalidate_caches()
    broken = by_name(root=bare)["TensorRT"]
    assert broken.state == "fault"
    assert "libnvinfer.so.10" in broken.found


def test_a_plugin_that_is_none(empty_library: Path, bare: Path) -> None:
    found = by_name(root=bare, plugin=empty_library)["plugin"]
    assert (found.state, "acmix_describe" in found.found) == ("fault", True)


@pytest.mark.parametrize(("built", "state"), [(__version__, "ok"), ("0.0.1", "fault")])
def test_a_plugin(bare: Path, built: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "libacmix_plugin.so").write_bytes(b"")
    monkeypatch.setattr(
        machine,
        "check",
        lambda path: SimpleNamespace(version=built, tensorrt="10.3.0", cuda="12.6", architectures="sm_87"),
    )
    found = by_name(root=bare)["plugin"]
    assert (found.state, "TensorRT 10.3.0" in found.found) == (state, True)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(bare / "good.pt", nn.Sequential(ACmix(8, 8, 3, 2)))
    saved(bare / "bad.pth", {"state_dict": port(rate_shape=()).state_dict()})
    assert cli.main(["doctor"]) == 0
    assert "Nothing is wrong." in capsys.readouterr().out
    assert cli.main(["doctor", "good.pt"]) == 0
    assert "0: acmix, canonical" in capsys.readouterr().out
    assert cli.main(["doctor", "bad.pth"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "scalar-rates" in printed
    assert FAULTS["scalar-rates"].remedy in printed
    assert cli.main(["doctor", "bad.pth", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["healthy"]) == (1, False)
    assert {finding["fault"] for finding in document["file"]["findings"]} == {"no-bias", "scalar-rates"}
    assert DoctorDocument.model_validate(document) == DoctorDocument.model_validate_json(json.dumps(document))


def test_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("text.txt", "empty.pt", "missing"):
        assert cli.main(["doctor", str(tmp_path / name)]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_a_file_that_was_quantised_before_it_was_fused(tmp_path: Path) -> None:
    examined = examine(quantised(plain(tmp_path / "plain.onnx", randomised(ACmix(8, 8, head=2)))), progress=str)
    (finding,) = examined.findings
    assert finding.fault == "hidden-block"
    assert "hide 1 block: fuse the float file" in finding.found
    assert "acmix-deploy fuse on the float file first" in finding.remedy


def test_every_fault_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert not {fault for fault in FAULTS if f'"{fault}"' not in text}
