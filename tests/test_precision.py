"""Half precision: what the file's types are, what stays in float32, and how exact it is."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_fusion import Detector, export, outputs, randomised

from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.precision import to_fp16
from acmix_deploy.precision.fp16 import tail
from acmix_deploy.runtime.metrics import deviation


@pytest.fixture
def fused(tmp_path):
    model = Detector().eval()
    x = torch.randn(1, 3, 16, 12)
    fuse(export(model, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx", expect=2)
    return model, x, tmp_path / "fused.onnx"


@pytest.mark.parametrize("fp16_io", [False, True])
def test_types_and_error(fused, fp16_io):
    model, x, source = fused
    target = source.with_name("fp16.onnx")
    report = to_fp16(source, target, fp16_io=fp16_io)
    typed = onnx.load(target)
    element = TensorProto.FLOAT16 if fp16_io else TensorProto.FLOAT
    assert {value.type.tensor_type.elem_type for value in (*typed.graph.input, *typed.graph.output)} == {element}
    learnt = {tensor.data_type for tensor in typed.graph.initializer if len(tensor.dims) > 1}
    assert learnt == {TensorProto.FLOAT16}
    assert [function.name for function in typed.functions] == [LOCAL_ATTENTION.op_type]
    assert typed.ir_version == onnx.load(source).ir_version
    assert report.float32_nodes == ["/Softmax"]
    assert report.float32_io is not fp16_io
    casts = sum(node.op_type == "Cast" for node in typed.graph.node)
    assert casts == 2, "around the Softmax if inputs and outputs are float16, else at the input and before it"

    with torch.no_grad():
        exact = model(x).numpy()
        eager = model.half()(x.half()).float().numpy()
    found = deviation(exact, outputs(target, x.half() if fp16_io else x).astype(np.float32))
    assert 1e-6 < found.relative_l2 < LOCAL_ATTENTION.tolerances["float16"].limit(deviation(exact, eager).relative_l2)


def test_decode_behind_the_last_layer_stays_in_float32(tmp_path):
    """Coordinates up to 640 pixels: float16 would round them to half a pixel."""
    anchors = np.arange(640, dtype=np.float32) + 0.25
    conv = numpy_helper.from_array(np.random.default_rng(0).standard_normal((640, 3, 1, 1)).astype(np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], name="pool"),
        helper.make_node("Reshape", ["p", "shape"], ["r"], name="reshape"),
        helper.make_node("Sigmoid", ["r"], ["s"], name="sigmoid"),
        helper.make_node("Add", ["s", "anchors"], ["y"], name="decode"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", 1, [1, 640])],
        [conv, numpy_helper.from_array(anchors, "anchors"), numpy_helper.from_array(np.array([1, 640]), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert tail(model) == ["pool", "reshape", "sigmoid", "decode"]
    onnx.save(model, tmp_path / "float32.onnx")
    to_fp16(tmp_path / "float32.onnx", tmp_path / "fp16.onnx")
    x = torch.rand(1, 3, 4, 4)
    error = np.abs(outputs(tmp_path / "float32.onnx", x) - outputs(tmp_path / "fp16.onnx", x)).max()
    assert 0 < error < 2e-3


def test_tensor_read_by_several_float32_nodes(tmp_path):
    """Each would get a cast of the same name."""
    block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, 9, 8)
    source = export(block, x, tmp_path / "plain.onnx")
    fuse(source, tmp_path / "fused.onnx")
    model = onnx.load(tmp_path / "fused.onnx")
    y = model.graph.output[0].name
    model.graph.node.append(helper.make_node("Sigmoid", [y], ["gate"], name="gate"))
    model.graph.node.append(helper.make_node("Tanh", [y], ["signal"], name="signal"))
    model.graph.node.append(helper.make_node("Mul", ["gate", "signal"], ["out"], name="product"))
    model.graph.output[0].name = "out"
    onnx.save(model, tmp_path / "fused.onnx")
    assert to_fp16(tmp_path / "fused.onnx", tmp_path / "fp16.onnx").float32_nodes == ["gate", "signal", "product"]
    assert outputs(tmp_path / "fp16.onnx", x).dtype == np.float32
