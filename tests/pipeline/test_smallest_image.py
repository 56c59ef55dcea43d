"""The smallest image that a fused file with free sizes is defined for: found, kept, and asked for by every verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from acmix_deploy import cli
from acmix_deploy.errors import UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.outlook.graph import OUTLOOK
from acmix_deploy.families.swin_acmix.module import SwinACmix
from acmix_deploy.families.windowed_acmix.graph import WINDOWED_ACMIX
from acmix_deploy.families.windowed_acmix.module import WindowedACmix
from acmix_deploy.forms import to_form
from acmix_deploy.fusion import fuse
from acmix_deploy.precision import to_fp16
from acmix_deploy.runtime.models import open_model
from acmix_deploy.runtime.onnxruntime import open_session
from tests.engine.parts import make_engine
from tests.families.parts import assert_fused, export, outputs, randomised
from tests.families.test_outlook import Published
from tests.families.test_windowed_acmix import Port

SIZES = ("height", "width")


class Halving(nn.Module):
    """Blocks of [B, C, H, W], or of [B, H, W, C], behind convolutions that halve the map, rounded up."""

    def __init__(self, *blocks: nn.Module, halvings: int = 2, channels_last: bool = False) -> None:
        super().__init__()
        steps = [nn.Conv2d(3 if index == 0 else 8, 8, 3, 2, 1) for index in range(halvings)]
        self.stem = nn.Sequential(*(steps or [nn.Conv2d(3, 8, 1)]))
        self.blocks, self.head, self.channels_last = nn.ModuleList(blocks), nn.Conv2d(8, 4, 1), channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.channels_last else block(x)
        return self.head(x)


def runs(model: nn.Module, height: int, width: int) -> bool:
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, height, width))
    except (UserError, RuntimeError):
        return False
    return True


def fused(model: nn.Module, folder: Path, *, dynamic: tuple[str, ...] = SIZES, metadata: Any = None) -> Path:
    source = export(model, torch.randn(1, 3, 64, 96), folder / "plain.onnx", dynamic=dynamic)
    plain = onnx.load(source)
    helper.set_model_props(plain, metadata or {})
    onnx.save(plain, source)
    fuse(source, folder / "fused.onnx", expect=len(model.blocks))
    return folder / "fused.onnx"


def metadata_of(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


MODELS = {
    "window 3": lambda: Halving(ACmix(8, 8, 3, head=2)),
    "window 7": lambda: Halving(ACmix(8, 8, 7, head=2)),
    "stride 2": lambda: Halving(ACmix(8, 8, 5, head=2, stride=2)),
    "two, the second one smaller": lambda: Halving(ACmix(8, 8, 5, head=2, stride=2), ACmix(8, 8, 7, head=2)),
    "windows": lambda: Halving(SwinACmix(8, 4, 2), halvings=1, channels_last=True),
    "windows of others": lambda: Halving(Port(8, 4, pad="none"), halvings=1, channels_last=True),
}


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        *((name, None) for name in MODELS),
        *(pytest.param(name, 8, marks=() if name in ("window 7", "windows") else pytest.mark.soak) for name in MODELS),
    ],
)
def test_it_is_the_smallest_that_the_model_takes(tmp_path: Path, name: str, stride: int | None) -> None:
    model = randomised(MODELS[name]())
    path = fused(model, tmp_path, metadata={"stride": str(stride)} if stride else None)
    step = stride or 1
    height = next(size for size in range(step, 96, step) if runs(model, size, 96))
    width = next(size for size in range(step, 97, step) if runs(model, 64, size))
    assert metadata_of(path)["min_size"] == str([height, width])
    x = torch.randn(1, 3, height, width)
    with torch.no_grad():
        np.testing.assert_allclose(outputs(path, x), model(x).numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_runs_where_the_model_does(tmp_path: Path, name: str) -> None:
    """On ONNX Runtime the definition refuses what the model refuses, without anybody who reads metadata."""
    model = randomised(MODELS[name]())
    fused_file = fused(model, tmp_path)
    to_fp16(fused_file, tmp_path / "fp16.onnx")
    onnx.save(to_form(onnx.load(fused_file), "plain"), tmp_path / "without_operator.onnx")
    sizes = [*((n, n) for n in range(1, 40)), (64, 3), (3, 64), (64, 13), (13, 64)]
    taken = {size: runs(model, *size) for size in sizes}
    for path in (fused_file, tmp_path / "without_operator.onnx", tmp_path / "fp16.onnx"):
        session = open_session(path)
        (images,) = (node.name for node in session.get_inputs())
        for height, width in sizes:
            try:
                session.run(None, {images: np.zeros((1, 3, height, width), np.float32)})
                found = True
            except Exception:  # ONNX Runtime's error types share no base of their own
                found = False
            assert found == taken[height, width], (path.name, height, width)


def test_files_that_need_none_have_none(tmp_path: Path) -> None:
    for dynamic in ((), ("batch",)):
        assert "min_size" not in metadata_of(fused(randomised(MODELS["window 7"]()), tmp_path, dynamic=dynamic))
    padding = Halving(WindowedACmix(8, 4, 2), channels_last=True)
    assert "min_size" not in metadata_of(fused(randomised(padding), tmp_path))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_size_that_is_fixed_stays(tmp_path: Path, exporter: str) -> None:
    model = randomised(MODELS["window 7"]())
    export(model, torch.randn(1, 3, 64, 96), tmp_path / "plain.onnx", dynamic=("width",), exporter=exporter)
    fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=1)
    assert metadata_of(tmp_path / "fused.onnx")["min_size"] == "[64, 13]"


def test_it_is_kept_and_grows(tmp_path: Path) -> None:
    model = randomised(MODELS["window 3"]())
    path = fused(model, tmp_path, metadata={"min_size": "[40, 1]", "task": "other"})
    assert metadata_of(path) == {"min_size": "[40, 5]", "task": "other"}
    fuse(path, tmp_path / "again.onnx", expect=0)
    to_fp16(path, tmp_path / "fp16.onnx")
    for other in (tmp_path / "again.onnx", tmp_path / "fp16.onnx"):
        assert metadata_of(other) == metadata_of(path)
    for form in ("plugin", "plain", "any"):
        assert {p.key: p.value for p in to_form(onnx.load(path), form).metadata_props} == metadata_of(path)


@pytest.mark.parametrize("window", [4, 8])
def test_padding_that_is_attended_to_is_not_masked(tmp_path: Path, window: int) -> None:
    """At the sizes that are tried first the windows divide the map, and nothing is padded."""
    model = randomised(Halving(Port(8, window, pad="zeros"), halvings=0, channels_last=True))
    source = export(model, torch.randn(1, 3, 24, 32), tmp_path / "plain.onnx", dynamic=SIZES)
    report = fuse(source, tmp_path / "fused.onnx").found
    assert [(block.fused, "computes something else" in block.reason) for block in report.blocks] == [(False, True)]


def test_padding_that_is_masked_is_masked_at_any_size(tmp_path: Path) -> None:
    model = randomised(Halving(WindowedACmix(8, 4, 2), halvings=0, channels_last=True))
    source = export(model, torch.randn(1, 3, 24, 32), tmp_path / "plain.onnx", dynamic=SIZES)
    assert_fused(WINDOWED_ACMIX, model, source, torch.randn(1, 3, 7, 9), torch.randn(1, 3, 1, 3))


@pytest.mark.parametrize("ceil_mode", [True, False])
def test_squares_that_do_not_divide_the_map(tmp_path: Path, ceil_mode: bool) -> None:
    """Without ceil_mode there are fewer matrices than windows then, and the block fails."""
    block = Published(8, 2, stride=2)
    block.reduce = nn.AvgPool2d(2, 2, ceil_mode=ceil_mode)
    model = randomised(Halving(block, halvings=0, channels_last=True))
    source = export(model, torch.randn(1, 3, 24, 32), tmp_path / "plain.onnx", dynamic=SIZES, exporter="dynamo")
    assert_fused(OUTLOOK, model, source, torch.randn(1, 3, 8, 6))
    odd = torch.randn(1, 3, 7, 9)
    assert runs(model, 7, 9) == ceil_mode
    if ceil_mode:
        assert_fused(OUTLOOK, model, source, odd)
    else:
        with pytest.raises(Exception, match="Reshape"):
            outputs(tmp_path / "fused.onnx", odd)


def detector(path: Path, imgsz: int = 64, least: str = "[64, 64]") -> Path:
    """A detector by its looks, which runs at any size: only its metadata know better."""
    nodes = [
        helper.make_node("Conv", ["images", "first"], ["maps"]),
        helper.make_node("GlobalAveragePool", ["maps"], ["mean"]),
        helper.make_node("Reshape", ["mean", "shape"], ["row"]),
        helper.make_node("Conv", ["row", "weight"], ["output0"]),
    ]
    weights = {"first": np.full((3, 3, 4, 4), 0.1), "weight": np.full((5, 3, 1), 0.1)}
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["batch", 5, 1])],
        [
            onnx.numpy_helper.from_array(np.array([0, 3, 1]), "shape"),
            *(onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    told = {"task": "detect", "names": "{0: 'thing'}", "stride": "32", "imgsz": str([imgsz] * 2), "min_size": least}
    helper.set_model_props(model, told)
    onnx.save(model, path)
    return path


REFUSAL = "images of 32x32 pixels are smaller than 64x64"


def refused(capsys: pytest.CaptureFixture[str], *command: object) -> None:
    capsys.readouterr()
    assert cli.main([str(part) for part in command]) == 2
    error = capsys.readouterr().err
    assert REFUSAL in error
    assert "at least 64x64" in error


def test_verbs_refuse_smaller_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], fake: Any) -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos" / "a.png"), np.zeros((20, 30, 3), np.uint8))
    model, small = detector(tmp_path / "model.onnx"), detector(tmp_path / "small.onnx", imgsz=32)
    shape = ("--input-shape", "1,3,32,32")
    sizes = ("--min", "1,3,32,32", "--opt", "1,3,64,64", "--max", "1,3,64,64")
    refused(capsys, "build", model, *sizes, "-o", tmp_path / "model.engine")
    assert not (tmp_path / "model.engine").exists()
    refused(capsys, "verify", model, small, *shape)
    refused(capsys, "profile", model, *shape, "--seconds", "0.1")
    refused(capsys, "detect", small, tmp_path / "photos")
    refused(capsys, "package", "triton", small, "--out", tmp_path / "models")
    refused(
        capsys, "quantize", small, "--calibration", tmp_path / "photos", "-o", tmp_path / "int8.onnx", "--quantize-head"
    )
    assert cli.main(["detect", str(model), str(tmp_path / "photos")]) == 0
    assert cli.main(["build", str(model), *sizes[2:], "--min", "1,3,64,64", "-o", str(tmp_path / "model.engine")]) == 0
    assert json.loads((tmp_path / "model.engine.json").read_text())["settings"]["metadata"]["min_size"] == "[64, 64]"


def test_shapes_that_verify_tries_are_not_smaller(tmp_path: Path) -> None:
    from acmix_deploy.verify import compare_files

    one, other = detector(tmp_path / "one.onnx"), detector(tmp_path / "other.onnx", least="[320, 512]")
    found = compare_files(one, other, input_shape=(1, 3, 640, 640))
    shapes = {comparison.input_shapes["images"][2:] for comparison in found.comparisons}
    assert shapes == {(640, 640)}, "the others that would be tried are 352x384 and 384x352"


def test_detectors_refuse_smaller_arrays(tmp_path: Path) -> None:
    from acmix_deploy.serving.detector import Detector

    with Detector.load(detector(tmp_path / "model.onnx")) as loaded:
        assert loaded.infer({"images": np.zeros((2, 3, 64, 96), np.float32)})["output0"].shape == (2, 5, 1)
        with pytest.raises(UserError, match=REFUSAL):
            loaded.infer({"images": np.zeros((1, 3, 32, 32), np.float32)})


def test_engines_refuse_smaller_arrays(tmp_path: Path, gpu: Any) -> None:
    """Also those that were built for them."""
    model = onnx.load(detector(tmp_path / "model.onnx"))
    shapes = ((1, 3, 32, 32), (1, 3, 64, 64), (1, 3, 64, 64))
    told = {entry.key: entry.value for entry in model.metadata_props}
    path = make_engine(tmp_path / "model.engine", model, {"images": shapes}, metadata=told)
    with open_model(path).runner as runner:
        runner.infer({"images": np.zeros((1, 3, 64, 64), np.float32)})
        with pytest.raises(UserError, match=REFUSAL):
            runner.infer({"images": np.zeros((1, 3, 32, 32), np.float32)})


def test_a_server_answers_400(tmp_path: Path) -> None:
    pytest.importorskip("starlette", reason="the packages for serving are not installed")
    from tests.serving.parts import serving

    zeros = np.zeros((1, 3, 32, 32), np.float32)
    tensor = {"name": "images", "shape": zeros.shape, "datatype": "FP32", "data": zeros.ravel().tolist()}
    with serving(detector(tmp_path / "model.onnx"), tmp_path) as server:
        answer = server.client.post("/v2/models/model/infer", json={"inputs": [tensor]})
        assert answer.status_code == 400
        assert REFUSAL in answer.json()["error"]
