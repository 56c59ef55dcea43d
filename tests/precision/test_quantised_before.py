"""A file that was quantised before it was fused: `fuse` and `doctor` say what hides its blocks, and what to do."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import nn

from acmix_deploy.cli import main
from acmix_deploy.doctor.files import examine
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion.quantized import quantization, without_pairs
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session
from tests.families.parts import export
from tests.fusion.test_fuse import randomised

SHAPE = (1, 3, 12, 12)


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.feeds = iter([{"x": random.random(SHAPE, dtype=np.float32)} for _ in range(2)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def plain(path: Path, block: nn.Module) -> Path:
    torch.manual_seed(0)
    return export(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), block, nn.Conv2d(8, 4, 1)), torch.rand(SHAPE), path)


def quantised(path: Path, **options: object) -> Path:
    """What onnxruntime's quantize_static makes of a file."""
    target = path.with_name("int8.onnx")
    types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    logging.disable(logging.WARNING)
    try:
        quantize_static(path, target, Reader(), **types, **options)
    finally:
        logging.disable(logging.NOTSET)
    return target


@pytest.fixture
def block(tmp_path: Path) -> Path:
    return plain(tmp_path / "plain.onnx", randomised(ACmix(8, 8, head=2)))


@pytest.mark.parametrize(
    "options", [{}, {"per_channel": True, "op_types_to_quantize": ["Conv"]}], ids=["everything", "convolutions"]
)
def test_pairs_hide_the_block(block: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    """Without them it is seen, and `--expect` fails for them; for `doctor` see tests/doctor."""
    file = quantised(block, **options)
    assert main(["fuse", str(file), "-o", str(block.with_name("fused.onnx")), "--expect", "1"]) == 1
    said = capsys.readouterr().err
    assert "hide 1 block: fuse the float file, then quantise the fused one (acmix-deploy quantize)" in said
    assert not block.with_name("fused.onnx").exists()


def test_integer_operators(block: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What has no pairs cannot be looked behind: a note, not a fault."""
    file = quantised(block, quant_format=QuantFormat.QOperator)
    assert main(["fuse", str(file), "-o", str(block.with_name("fused.onnx"))]) == 0
    assert "hide what blocks there may be" in " ".join(capsys.readouterr().out.split())
    examined = examine(file, progress=str)
    assert not examined.findings
    assert [note for note in examined.notes if "hide what blocks there may be" in note]


def test_a_file_without_blocks(tmp_path: Path) -> None:
    """Pairs that hide nothing are no fault."""
    examined = examine(quantised(plain(tmp_path / "plain.onnx", nn.ReLU())), progress=str)
    assert not examined.findings
    assert not [note for note in examined.notes if "hide" in note]


def test_without_pairs_it_is_the_float_file() -> None:
    """But for the rounding of weights, by tensor and by channel."""
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
    arrays = {
        "w": weight, "w_scale": random.random(4).astype(np.float32), "w_zero": np.zeros(4, np.int8),
        "scale": np.array(0.5, np.float32), "zero": np.array(3, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["f"], axis=0),
        helper.make_node("Conv", ["d", "f"], ["c"], name="conv"),
        helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "scale", "zero"], ["y"]),
    ]
    shapes = {"x": [1, 3, 8, 8], "y": [1, 4, 6, 6]}
    values = [helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert quantization(model) == {"QuantizeLinear": 2, "DequantizeLinear": 3}
    found = without_pairs(model)
    onnx.checker.check_model(found)
    assert quantization(found) == {}
    x = random.standard_normal((1, 3, 8, 8)).astype(np.float32)
    (y,) = open_session(found).run(None, {"x": x})
    scaled = torch.from_numpy(weight.astype(np.float32) * arrays["w_scale"].reshape(4, 1, 1, 1))
    assert deviation(torch.conv2d(torch.from_numpy(x), scaled).numpy(), y).relative_l2 < 1e-6
