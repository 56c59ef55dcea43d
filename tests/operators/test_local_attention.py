"""Local attention: the oracle against single pixels worked out by hand, and what its body refuses to compute."""

from __future__ import annotations

import math

import numpy as np
import onnx.reference
import pytest
import torch

from acmix_deploy.errors import UserError
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION, check_geometry
from acmix_deploy.operators.local_attention.oracle import local_attention
from acmix_deploy.runtime.onnxruntime import open_session
from tests.operators.parts import TYPES, one_node_model


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [3, 7])
def test_body_fails_where_the_operator_is_not_defined(kernel_size, stride, dtype):
    attributes = {"num_heads": 2, "kernel_size": kernel_size, "stride": stride, "scale": 0.5}
    session = open_session(one_node_model(LOCAL_ATTENTION, dtype, [("B", 24, "H", "W"), (4, 2)], attributes))
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
    attributes = {"num_heads": 1, "kernel_size": 7, "stride": 1, "scale": 0.5}
    model = one_node_model(LOCAL_ATTENTION, "float32", [("B", 12, "H", "W"), (4, 2)], attributes)
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
