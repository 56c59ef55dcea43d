"""An exported file computes what the module does, at every size it claims to take, or it is not written."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from acmix_deploy.artifacts import sidecar
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.export import export
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.onnx_file import unread
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.targets import target_of

LIMIT = LOCAL_ATTENTION.tolerances["float32"].limit()
# The package has its function under this name.
export_module = sys.modules["acmix_deploy.export"]
AXES = ("batch", "height", "width")
SHAPE = (1, 3, 64, 64)
METADATA = ModelMetadata({"names": "{0: 'cat'}"})


class Net(nn.Module):
    """Both kinds of ACmix block, and outputs in a dict of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.keep = ACmix(8, 8, head=2)
        self.halve = ACmix(8, 8, kernel_att=5, head=4, stride=2)
        self.enlarge = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> dict[str, object]:
        x = self.stem(x)
        maps = torch.cat([self.keep(x), self.enlarge(self.halve(x))], 1)
        return {"maps": maps, "more": [maps.softmax(1), maps.mean((2, 3))]}


class Scale(nn.Module):
    """The least that can be exported."""

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def assert_same(path: Path, module: nn.Module, *shapes: tuple[int, ...]) -> None:
    """File and module agree on inputs that the exporter has not seen."""
    session = onnxruntime.InferenceSession(path)
    for shape in shapes:
        image = torch.randn(shape)
        with torch.no_grad():
            outputs = module(image)
        if isinstance(outputs, dict):
            outputs = [outputs["maps"], *outputs["more"]]
        outputs = outputs if isinstance(outputs, list) else [outputs]
        actual = session.run([f"output{index}" for index in range(len(outputs))], {"images": image.numpy()})
        assert len(session.get_outputs()) == len(outputs)
        for wanted, found in zip(outputs, actual, strict=True):
            error = np.linalg.norm(wanted.numpy().astype(np.float64) - found)
            assert error <= LIMIT * np.linalg.norm(wanted.numpy())


@pytest.mark.parametrize(
    ("opset", "dynamic", "exporter", "ir_version"),
    [
        (17, (), "torchscript", 8),
        (17, AXES, "torchscript", 8),
        (18, AXES, "dynamo", 8),
        (21, (), "dynamo", 10),
    ],
)
def test_the_file_is_the_module(
    tmp_path: Path, opset: int, dynamic: tuple[str, ...], exporter: str, ir_version: int
) -> None:
    module, path = Net(), tmp_path / "new" / "model.onnx"
    result = export(module, path, input_shape=SHAPE, opset=opset, dynamic=dynamic, divisor=4, metadata=METADATA).found
    batch, height, width = (name if name in dynamic else size for name, size in zip(AXES, (1, 64, 64), strict=True))
    assert result.inputs[0].model_dump() == {
        "name": "images",
        "dtype": "float32",
        "shape": (batch, 3, height, width),
    }
    assert [output.name for output in result.outputs] == ["output0", "output1", "output2"]
    assert {output.shape[0] for output in result.outputs} == {batch}
    assert (result.exporter, result.opset, result.ir_version) == (exporter, opset, ir_version)
    assert result.notes == ()
    assert 0 <= result.relative_l2 <= LIMIT
    free = {"batch": (3, 3, 64, 64), "height": (1, 3, 48, 64), "width": (1, 3, 64, 80)}
    shapes = [SHAPE, *(free[name] for name in dynamic), *([(4, 3, 72, 40)] if set(dynamic) == set(AXES) else [])]
    assert not module.training
    assert_same(path, module, *shapes)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert [(entry.domain, entry.version) for entry in model.opset_import if entry.domain == ""] == [("", opset)]
    assert model.ir_version == ir_version
    assert {entry.key: entry.value for entry in model.metadata_props} == METADATA.for_file(SHAPE, dynamic).entries
    assert {*path.parent.iterdir()} == {path, sidecar(path)}
    content = path.read_bytes()
    assert b".py" not in content
    assert str(Path(__file__).parent).encode() not in content


class Caching(nn.Module):
    """Keeps what depends on the last image's size, as detection heads keep their anchors, and talks."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: object = None

    def forward(self, x: Tensor) -> Tensor:
        print("running")
        if self.shape != x.shape:
            self.shape, self.rows = x.shape, torch.arange(x.shape[2]).to(x.dtype)
        return x + self.rows.unsqueeze(1)


@pytest.mark.parametrize(("opset", "exporter"), [(17, "torchscript"), (18, "dynamo")])
def test_runs_and_traces_do_not_disturb_each_other(tmp_path: Path, opset: int, exporter: str) -> None:
    module, path = Caching(), tmp_path / "model.onnx"
    for dynamic in (("batch",), ()):
        result = export(module, path, input_shape=SHAPE, opset=opset, dynamic=dynamic).found
        assert (result.exporter, result.notes) == (exporter, ())
        assert_same(path, module, SHAPE, *([(3, 3, 64, 64)] if dynamic else []))


@pytest.mark.parametrize(("opset", "exporter"), [(17, "torchscript"), (18, "dynamo")])
def test_nothing_is_printed_and_progress_is_told(
    tmp_path: Path, opset: int, exporter: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    steps: list[str] = []
    export(Caching(), tmp_path / "model.onnx", input_shape=SHAPE, opset=opset, progress=steps.append)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert steps == ["running the model", f"exporting with the {exporter} exporter", "checking the file"]


def test_where_torchscript_fails_dynamo_is_converted_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> onnx.ModelProto:
        raise RuntimeError("broken")

    monkeypatch.setattr(export_module, "_torchscript", fail)
    result = export(Scale(), tmp_path / "model.onnx", input_shape=SHAPE, opset=17).found
    assert (result.exporter, result.opset, result.ir_version) == ("dynamo", 17, 8)
    assert result.notes == ("the torchscript exporter failed: broken",)
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 17
    assert_same(tmp_path / "model.onnx", Scale(), SHAPE)
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_is_not_taken_for_a_fault_of_an_exporter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx, "save_model", full)
    with pytest.raises(UserError, match=r"cannot write .*m\.onnx: No space left on device"):
        export(nn.Conv2d(3, 4, 1), tmp_path / "m.onnx", input_shape=(1, 3, 8, 8), opset=17)
    assert not [*tmp_path.iterdir()]


class Ramp(nn.Module):
    """Adds a ramp by torch.linspace, whose length the dynamo exporter freezes."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.linspace(-1, 1, x.shape[3])


def test_where_dynamo_freezes_an_axis_the_other_exporter_is_taken(tmp_path: Path) -> None:
    module = Ramp()
    result = export(module, tmp_path / "model.onnx", input_shape=SHAPE, dynamic=["width"]).found
    assert result.exporter == "torchscript"
    failed, small = result.notes
    assert failed.startswith("the dynamo exporter failed: ")
    assert small.startswith("below 64x2 the file computes something else")  # a ramp of one pixel is -1, and 0 / 0 there
    assert_same(tmp_path / "model.onnx", module, (1, 3, 64, 64), (1, 3, 64, 80))


class Windows(nn.Module):
    """Counts images as Swin's window_reverse does: both exporters take the batch for a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(int(x.shape[0] / 1.0), *x.shape[1:]) * 2


class HeightOnly(nn.Module):
    """The TorchScript exporter writes down the height that it saw."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, : x.shape[3]] * int(x.shape[2])


@pytest.mark.parametrize(("module", "axis"), [(Windows(), "batch"), (HeightOnly(), "height")])
def test_a_frozen_axis_is_named_and_nothing_is_written(tmp_path: Path, module: nn.Module, axis: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(CheckFailed, match=f"the torchscript exporter's file is wrong: the {axis} came out frozen") as e:
        export(module, path, input_shape=SHAPE, dynamic=AXES)
    assert "\n" not in e.value.message
    assert "dynamic" in e.value.hint
    assert path.read_text() == "old"
    assert {*tmp_path.iterdir()} == {path}
    if axis == "batch":
        assert export(module, path, input_shape=SHAPE).found.exporter == "dynamo"


def poison(
    monkeypatch: pytest.MonkeyPatch, exporter: str, change, files: dict[str, onnx.ModelProto] | None = None
) -> None:
    """Let an exporter's file be changed before it is checked; it is the one in ``files`` where there is one."""
    original = getattr(export_module, exporter)
    files = {} if files is None else files

    def poisoned(*arguments: object) -> onnx.ModelProto:
        if exporter not in files:
            files[exporter] = original(*arguments)
        model = onnx.ModelProto()
        model.CopyFrom(files[exporter])
        change(model)
        return model

    monkeypatch.setattr(export_module, exporter, poisoned)


def freeze_signature(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 64


def freeze_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[3].dim_value = 64


def change_weight(model: onnx.ModelProto) -> None:
    factor = next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    factor.CopyFrom(onnx.numpy_helper.from_array(np.array(2.001, np.float32), factor.name))


def not_a_number(model: onnx.ModelProto) -> None:
    factor = next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    factor.CopyFrom(onnx.numpy_helper.from_array(np.array(np.nan, np.float32), factor.name))


def reverse_rows(model: onnx.ModelProto) -> None:
    (output,) = model.graph.output
    for node in model.graph.node:
        node.output[:] = ["straight" if name == output.name else name for name in node.output]
    for name, value in (("from", -1), ("to", -1000), ("axis", 1), ("step", -1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), name))
    model.graph.node.append(onnx.helper.make_node("Slice", ["straight", "from", "to", "axis", "step"], [output.name]))


def unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].op_type = "Unheard"


@pytest.mark.parametrize(("change", "moved"), [(reverse_rows, True), (change_weight, False)])
def test_rows_in_another_order_are_no_frozen_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change, moved: bool
) -> None:
    """Nor is an axis frozen where the file is wrong at the very size that it was traced at."""

    class Rows(Scale):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 0, :50, :6]

    for exporter in ("_dynamo", "_torchscript"):
        poison(monkeypatch, exporter, change)
    with pytest.raises(CheckFailed) as caught:
        export(Rows(), tmp_path / "model.onnx", input_shape=SHAPE, dynamic=("batch",))
    assert "frozen" not in caught.value.message
    assert ("dynamic" in caught.value.hint) != moved
    assert ("output0 has 50 of 50 rows of the module's in another order on " in caught.value.message) == moved
    assert ("output0 is not the module's on " in caught.value.message) != moved


def test_which_rows_count_as_the_same() -> None:
    rows = np.random.default_rng(0).random((2, 30, 6))
    few = rows.copy()
    few[:, :2] = 0
    for other, expected in (
        (rows[:, ::-1], "60 of 60 rows"),
        (few[:, ::-1], "56 of 60 rows"),
        (few, ""),  # at their places
        (np.concatenate((rows[:, 10:0:-1], 0 * rows[:, 10:]), axis=1), ""),  # too few
        (rows * (1 + 5e-5), ""),
        (rows[::-1], ""),  # of the other image
        (rows[:, :, ::-1], ""),
        (np.full_like(rows, np.nan), ""),
        (rows[:, 1:], ""),
    ):
        assert export_module._same_rows(rows, other, 1e-4) == expected


@pytest.fixture(scope="module")
def files_of_scale() -> dict[str, onnx.ModelProto]:
    """By exporter, as they are made."""
    return {}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (freeze_signature, "the height came out frozen at 64"),
        (freeze_output, "the width came out frozen: output0 is declared as"),
        (change_weight, "output0 is not the module's on .* relative L2 5.0e-04"),
        (not_a_number, "output0 is not the module's on .* NaN"),
        (unknown_operator, "ONNX Runtime refuses .* Unheard"),
    ],
)
def test_a_wrong_file_is_found_out_by_running_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_of_scale: dict[str, onnx.ModelProto], change, why: str
) -> None:
    poison(monkeypatch, "_dynamo", change, files_of_scale)
    path = tmp_path / "model.onnx"
    result = export(Scale(), path, input_shape=SHAPE, dynamic=AXES).found
    assert result.exporter == "torchscript"
    assert any(note.startswith("the dynamo exporter's file is wrong: ") for note in result.notes)
    assert_same(path, Scale(), SHAPE)
    path.unlink()
    sidecar(path).unlink()
    poison(monkeypatch, "_torchscript", change, files_of_scale)
    with pytest.raises(
        CheckFailed, match=f"dynamo exporter's file is wrong: .*{why}.*torchscript exporter's file.*{why}"
    ):
        export(Scale(), path, input_shape=SHAPE, dynamic=AXES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        ({"opset": 16}, "opset 16 is not supported; it must be 17 to 21"),
        ({"opset": 22}, "opset 22 is not supported"),
        ({"dynamic": ["depth"]}, "unknown dynamic axis depth"),
        ({"input_shape": (1, 3, 640)}, "not four positive sizes"),
        ({"input_shape": (0, 3, 64, 64)}, "not four positive sizes"),
        ({"input_shape": (1, 3, 90, 64), "divisor": 32}, "an image of 90x64 is not divisible by the model's stride 32"),
        ({"input_shape": (1, 4, 64, 64)}, r"does not run on an input of \[1, 4, 64, 64\]: .*3 channels"),
        ({"input_shape": (1, 3, 4, 4)}, "a 2x2 map is too small for a 7x7 window"),
    ],
)
def test_a_request_that_cannot_be_met_is_a_user_error(tmp_path: Path, request_: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        export(Net(), tmp_path / "model.onnx", **{"input_shape": SHAPE, **request_})
    assert "\n" not in caught.value.message
    assert not list(tmp_path.iterdir())
    if "divisor" in request_:
        assert "96x64" in caught.value.hint


def test_an_unwritable_place_is_found_before_the_work(tmp_path: Path) -> None:
    steps: list[str] = []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        export(Scale(), tmp_path / "file" / "model.onnx", input_shape=SHAPE, progress=steps.append)
    assert steps == ["running the model"]


class Cancels(nn.Module):
    """The difference of two sums that are the same but for a share ``rest``, so that rounding is all that is left."""

    def __init__(self, rest: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (nn.Conv2d(3, 8, 3, bias=False) for _ in range(2))
        self.two.weight.data = self.one.weight.data * (1 + rest * torch.rand_like(self.one.weight.data))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.one(x) - self.two(x))


def test_a_file_may_be_as_far_as_the_module_is_from_itself_in_float64(tmp_path: Path) -> None:
    """Up to ten times what is asked of others; beyond that nothing can be said of either."""
    found = export(Cancels(1e-2), tmp_path / "a.onnx", input_shape=SHAPE, opset=17).found
    assert LIMIT < found.relative_l2 < 1e-4
    with pytest.raises(CheckFailed, match=r"output0 is not the module's on .*, at most 1\.0e-04 is accepted"):
        export(Cancels(1e-4), tmp_path / "b.onnx", input_shape=SHAPE, opset=17)


def test_a_file_larger_than_protobuf_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "_LARGEST_FILE", 100)
    with pytest.raises(CheckFailed, match="an ONNX file holds"):
        export(Scale(), tmp_path / "model.onnx", input_shape=SHAPE)


def capture(module: nn.Module, *free: int, batch: int = 2) -> torch.export.ExportedProgram:
    dims = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
    return torch.export.export(module.eval(), (torch.zeros(batch, 3, 64, 64),), dynamic_shapes=(dims,))


def test_a_captured_program_keeps_the_axes_it_was_captured_with(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    free = export(capture(Scale(), 0, 3), path, input_shape=SHAPE, divisor=4).found
    assert free.inputs[0].shape == ("batch", 3, 64, "width")
    assert_same(path, Scale(), SHAPE, (3, 3, 64, 80))
    module = nn.Sequential(nn.Conv2d(3, 4, 8, 8), ACmix(4, 4, kernel_att=3, head=2))
    fixed = capture(module, batch=1)
    for opset, exporter in ((17, "torchscript"), (18, "dynamo")):
        assert export(fixed, path, input_shape=SHAPE, opset=opset).found.exporter == exporter
        assert_same(path, module, SHAPE)
    with pytest.raises(UserError, match="captured with a fixed batch and height"):
        export(fixed, path, input_shape=SHAPE, dynamic=["height", "batch"])
    with pytest.raises(UserError, match=r"does not run on an input of \[1, 3, 32, 32\]"):
        export(fixed, path, input_shape=(1, 3, 32, 32))

    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    image = torch.zeros(1, 3, 64, 64)
    with pytest.raises(UserError, match="takes 2 inputs"):
        export(torch.export.export(Sum(), (image, image)), path, input_shape=SHAPE)


@pytest.mark.parametrize("opset", [17, 18])
def test_a_detector_takes_every_size(tmp_path: Path, opset: int) -> None:
    pytest.importorskip("ultralytics", reason="Ultralytics is not installed")
    from ultralytics.nn.tasks import DetectionModel

    from acmix_deploy.yolo import prepare_for_export, register

    register()
    backbone = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "ACmix", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]]
    layers = {"nc": 2, "backbone": backbone, "head": [[[1, 2], 1, "Detect", ["nc"]]]}
    module, path = prepare_for_export(DetectionModel(layers, verbose=False)), tmp_path / "model.onnx"
    result = export(module, path, input_shape=SHAPE, opset=opset, dynamic=AXES, divisor=4).found
    assert result.notes == ()
    assert_same(path, module, SHAPE, (3, 3, 40, 72), (2, 3, 96, 48))


class Rare(nn.Module):
    """Operators of ONNX that detectors seldom have, each as an output."""

    def __init__(self, *modes):
        super().__init__()
        self.modes = modes

    def forward(self, x):
        half = [functional.interpolate(x, scale_factor=0.5, mode=mode) for mode in self.modes]
        half.append(functional.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=True))
        half.append(functional.interpolate(x, scale_factor=1.5, mode="bicubic"))
        grid = 1.5 * torch.tanh(x[:, :2]).permute(0, 2, 3, 1)
        sampled = [
            functional.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=padding == "zeros")
            for mode in self.modes
            for padding in ("zeros", "border", "reflection")
        ]
        whole = (x * 100).long() - 50
        remainders = [torch.fmod(x, 0.3), torch.remainder(x - 0.5, 0.3), (whole % 7) / 1.0, torch.fmod(whole, 7) / 1.0]
        return torch.einsum("bchw,bcxw->bhx", x, x), *remainders, *sampled, *half


@pytest.mark.parametrize(
    ("opset", "dynamic", "modes"),
    [
        (17, AXES, ("bilinear", "nearest", "bicubic")),
        (20, (), ("bilinear",)),
        *(
            pytest.param(opset, AXES, ("bilinear", "nearest", "bicubic"), marks=pytest.mark.soak)
            for opset in (18, 19, 20, 21)
        ),
    ],
)
def test_rare_operators_are_written_as_onnx_has_them(tmp_path, opset, dynamic, modes):
    """Half scales and a part of a pixel, negative remainders, samples outside the map; at any size and opset."""
    path = tmp_path / "model.onnx"
    found = export(Rare(*modes).eval(), path, input_shape=(1, 3, 16, 24), opset=opset, dynamic=dynamic).found
    assert found.exporter == ("torchscript" if opset < 18 else "dynamo")
    assert not found.notes
    model = onnx.load(path)
    written = {node.op_type for node in model.graph.node}
    assert {"GridSample", "Einsum", "Mod", "Resize"} <= written
    assert not unread(model, target_of((8, 5)))


@pytest.mark.parametrize("opset", [19, pytest.param(21, marks=pytest.mark.soak)])
def test_an_operator_of_a_newer_opset_is_told_with_its_opset(tmp_path, opset):
    """Modulated, in two groups, with a stride: written at the opset that has it, right at any size, told by target."""
    ops = pytest.importorskip("torchvision.ops", reason="torchvision is not installed")

    class Deformed(nn.Module):
        def __init__(self):
            super().__init__()
            self.offsets, self.mask = nn.Conv2d(4, 36, 3, 2, 1), nn.Conv2d(4, 18, 3, 2, 1)
            self.widened = nn.Conv2d(3, 4, 1)
            self.convolution = ops.DeformConv2d(4, 8, 3, stride=2, padding=1, groups=2)

        def forward(self, x):
            x = self.widened(x)
            return self.convolution(x, 3 * self.offsets(x), torch.sigmoid(self.mask(x)))

    module, path = Deformed().eval(), tmp_path / "model.onnx"
    options = {"input_shape": (1, 3, 16, 24), "dynamic": AXES, "divisor": 2}
    with pytest.raises(CheckFailed, match="It may work with opset 19, which has DeformConv"):
        export(module, path, opset=18, **options)
    export(module, path, opset=opset, **options)
    assert_same(path, module, (1, 3, 16, 24), (2, 3, 32, 20))
    model = onnx.load(path)
    assert [*unread(model, target_of((10, 0)))] == ["DeformConv"]
    assert not unread(model, target_of((10, 1)))
