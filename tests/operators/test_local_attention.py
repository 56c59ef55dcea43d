"""The operator: its ONNX body against the PyTorch oracle, and the oracle against single pixels worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from acmix_deploy.errors import UserError
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION, check_geometry
from acmix_deploy.operators.local_attention.body import function_body
from acmix_deploy.operators.local_attention.oracle import local_attention
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.targets import OPSETS

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}


def one_node_model(
    dtype: str, shape: list, head_dim: int, opset: int = OPSETS[0], tile: int = 4, **attributes
) -> onnx.ModelProto:
    """A file with nothing but the operator and its body."""
    attributes = {"plugin_version": "1", "plugin_namespace": "", **attributes}
    names = [tensor.name for tensor in LOCAL_ATTENTION.inputs]
    node = helper.make_node(LOCAL_ATTENTION.op_type, names, ["y"], domain=LOCAL_ATTENTION.domain, **attributes)
    kind = TYPES[dtype]
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info(names[0], kind, shape),
            helper.make_tensor_value_info(names[1], kind, [head_dim, 2]),
        ],
        [helper.make_tensor_value_info("y", kind, [None] * 4)],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(LOCAL_ATTENTION.domain, 1)]
    model = helper.make_model(
        graph, opset_imports=opsets, functions=[function_body(opset, tile)], ir_version=8 if opset <= 18 else 10
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@st.composite
def geometries(draw):
    kernel_size = draw(st.sampled_from([3, 5, 7, 9]))
    stride = draw(st.sampled_from([1, 1, 2, 3]))
    least = math.ceil((kernel_size // 2 + 1) / stride)
    height, width = (stride * draw(st.integers(least, least + 12)) for _ in range(2))
    return {
        "batch": draw(st.integers(1, 3)),
        "heads": draw(st.integers(1, 4)),
        "head_dim": draw(st.sampled_from([1, 2, 5, 8])),
        "kernel_size": kernel_size,
        "stride": stride,
        "height": height,
        "width": width,
    }


@settings(max_examples=30, deadline=None)
@given(
    g=geometries(),
    dtype=st.sampled_from(["float32", "float16"]),
    dynamic=st.booleans(),
    opset=st.sampled_from([OPSETS[0], 18, OPSETS[-1]]),
    tile=st.sampled_from([4, 4, 3, 8]),
    seed=st.integers(0, 99),
)
def test_body_equals_oracle(g, dtype, dynamic, opset, tile, seed):
    random = np.random.default_rng(seed)
    shape = [g["batch"], 3 * g["heads"] * g["head_dim"], g["height"], g["width"]]
    qkv = random.standard_normal(shape).astype(dtype)
    position_weight = random.standard_normal((g["head_dim"], 2)).astype(dtype)
    attributes = {
        "num_heads": g["heads"],
        "kernel_size": g["kernel_size"],
        "stride": g["stride"],
        "scale": float(g["head_dim"] ** -0.5),
    }
    declared = ["B", shape[1], "H", "W"] if dynamic else shape
    model = one_node_model(dtype, declared, g["head_dim"], opset, tile, **attributes)
    (y,) = open_session(model).run(None, {"qkv": qkv, "position_weight": position_weight})
    expected = local_attention(torch.from_numpy(qkv), torch.from_numpy(position_weight), **attributes).numpy()
    found = deviation(expected, y)
    # Keys minus position are rounded once more than the oracle's; in half precision that is what an eager model does.
    limit = LOCAL_ATTENTION.tolerances[dtype].limit(1e-3 if dtype == "float16" else 0)
    assert not found.problem
    assert found.relative_l2 < limit


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_body_fails_where_the_operator_is_not_defined(kernel_size, stride, dtype):
    attributes = {"num_heads": 2, "kernel_size": kernel_size, "stride": stride, "scale": 0.5}
    session = open_session(one_node_model(dtype, ["B", 24, "H", "W"], 4, **attributes))
    position_weight = np.ones((4, 2), dtype)
    margin = kernel_size // 2
    for height in range(1, 10):
        for width in {1, 2, margin, margin + 1, 6, 7, 12}:
            qkv = np.ones((1, 24, height, width), dtype)
            try:
                check_geometry(kernel_size, stride, height, width)
                defined = True
            except UserError:
                defined = False
            if defined:
                (y,) = session.run(None, {"qkv": qkv, "position_weight": position_weight})
                assert y.shape == (1, 8, height // stride, width // stride)
            else:
                with pytest.raises(Exception, match="Reshape"):  # ONNX Runtime's error types share no base
                    session.run(None, {"qkv": qkv, "position_weight": position_weight})


def test_body_fails_in_the_reference_evaluator_too():
    model = one_node_model("float32", ["B", 12, "H", "W"], 4, num_heads=1, kernel_size=7, stride=1, scale=0.5)
    evaluator = onnx.reference.ReferenceEvaluator(model)
    feeds = {"qkv": np.ones((1, 12, 4, 4), np.float32), "position_weight": np.ones((4, 2), np.float32)}
    assert evaluator.run(None, feeds)[0].shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match="reshape"):
        evaluator.run(None, {**feeds, "qkv": np.ones((1, 12, 3, 4), np.float32)})


def test_oracle_by_hand():
    """One head of one channel on a 3x4 map, pixel (0, 0): its window reflects to rows 1, 0, 1 and columns 1, 0, 1."""
    random = np.random.default_rng(0)
    q, k, v = random.standard_normal((3, 3, 4))
    p = (0.7, -0.3)
    total = weighted = 0.0
    for row in (1, 0, 1):
        for column in (1, 0, 1):
            x, y = 2 * column / 3 - 1, 2 * row / 2 - 1
            weight = math.exp(0.5 * q[0, 0] * (k[row, column] - p[0] * x - p[1] * y))
            total += weight
            weighted += weight * v[row, column]
    result = local_attention(
        torch.tensor(np.stack([q, k, v]))[None],
        torch.tensor([p], dtype=torch.float64),
        num_heads=1,
        kernel_size=3,
        stride=1,
        scale=0.5,
    )
    assert result[0, 0, 0, 0].item() == pytest.approx(weighted / total, rel=1e-12)


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        ((4, 1, 8, 8), "kernel_size is 4"),
        ((1, 1, 8, 8), "kernel_size is 1"),
        ((7, 0, 8, 8), "stride is 0"),
        ((7, 2, 8, 9), "8x9 map is not divisible by stride 2"),
        ((7, 1, 3, 8), "3x8 map is too small for a 7x7 window"),
    ],
)
def test_geometry_refused(geometry, words):
    with pytest.raises(UserError, match=words):
        check_geometry(*geometry)


def test_body_lists_every_attribute_of_the_definition():
    assert list(function_body().attribute) == [attribute.name for attribute in LOCAL_ATTENTION.attributes]
    assert list(function_body().input) == [tensor.name for tensor in LOCAL_ATTENTION.inputs]
