"""Reassembly: the oracle against loops, and what its body refuses to compute."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acmix_deploy.errors import UserError
from acmix_deploy.operators.reassembly import REASSEMBLY, check_geometry
from acmix_deploy.operators.reassembly.oracle import reassembly
from acmix_deploy.runtime.onnxruntime import open_session
from tests.operators.parts import one_node_model


def one_pixel_at_a_time(x, w, groups, kernel, stride, upsampling, dilation):
    """The definition as loops over pixels and neighbours; float64 arrays."""
    (batch, channels, height, width), (*_, rows, columns) = x.shape, w.shape
    y = np.zeros((batch, channels, rows, columns))
    reach = range(-(kernel // 2), kernel // 2 + 1)
    for b, channel, row, column in itertools.product(range(batch), range(channels), range(rows), range(columns)):
        group = channel // (channels // groups)
        for place, (down, right) in enumerate(itertools.product(reach, repeat=2)):
            from_row = stride * row // upsampling + dilation * down
            from_column = stride * column // upsampling + dilation * right
            if 0 <= from_row < height and 0 <= from_column < width:
                weight = w[b, group * kernel**2 + place, row, column]
                y[b, channel, row, column] += weight * x[b, channel, from_row, from_column]
    return y


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 3),
    group_channels=st.integers(1, 3),
    kernel=st.sampled_from([3, 3, 5]),
    resampling=st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)]),
    dilation=st.integers(1, 3),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=st.integers(0, 99),
)
def test_oracle_equals_loops(batch, groups, group_channels, kernel, resampling, dilation, size, seed):
    stride, upsampling = resampling
    random = np.random.default_rng(seed)
    x = random.standard_normal((batch, groups * group_channels, *(stride * pixels for pixels in size)))
    w = random.standard_normal((batch, groups * kernel**2, *(upsampling * pixels for pixels in size)))
    y = reassembly(
        torch.from_numpy(x),
        torch.from_numpy(w),
        groups=groups,
        kernel_size=kernel,
        stride=stride,
        upsampling=upsampling,
        dilation=dilation,
    )
    assert y.dtype is torch.float64
    expected = one_pixel_at_a_time(x, w, groups, kernel, stride, upsampling, dilation)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("stride", "upsampling"), [(1, 1), (2, 1), (1, 2), (2, 2), (2, 4)])
def test_body_fails_for_weights_of_another_size(stride, upsampling):
    """And wherever neither of stride and upsampling is 1."""
    attributes = {"groups": 1, "kernel_size": 3, "stride": stride, "upsampling": upsampling, "dilation": 1}
    shapes = [("B", 2, "H", "W"), ("B", 9, "h", "w")]
    session = open_session(one_node_model(REASSEMBLY, "float32", shapes, attributes))
    for size, out in itertools.product([(4, 6), (5, 6)], itertools.product(range(1, 13), repeat=2)):
        feeds = {"x": np.ones((1, 2, *size), np.float32), "w": np.ones((1, 9, *out), np.float32)}
        right = all(pixels * upsampling == others * stride for pixels, others in zip(size, out, strict=True))
        if right and 1 in (stride, upsampling):
            assert session.run(None, feeds)[0].shape == (1, 2, *out)
        else:
            with pytest.raises(Exception, match=r"Reshape|Gather"):  # ONNX Runtime's error types share no base
                session.run(None, feeds)


def test_body_does_not_unfold():
    """A pixel of x is copied as often as tiles see it, not as often as pixels do."""
    attributes = {"groups": 4, "kernel_size": 7, "stride": 1, "upsampling": 1, "dilation": 1}
    model = one_node_model(REASSEMBLY, "float32", [(1, 64, 36, 36), (1, 196, 36, 36)], attributes)
    (function,) = model.functions
    (product,) = (node for node in function.node if node.op_type == "MatMul")
    function.node[-1].input[0] = product.input[1]
    (seen,) = open_session(model).run(
        None, {"x": np.ones((1, 64, 36, 36), np.float32), "w": np.ones((1, 196, 36, 36), np.float32)}
    )
    assert seen.size == 64 * 36 * 36 * 9


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        ((4, 1, 1, (8, 8), (8, 8)), "kernel_size is 4"),
        ((1, 1, 1, (8, 8), (8, 8)), "kernel_size is 1"),
        ((3, 0, 1, (8, 8), (8, 8)), "stride is 0 and upsampling 1"),
        ((3, 2, 2, (8, 8), (8, 8)), "stride is 2 and upsampling 2; one of them must be 1"),
        ((3, 2, 1, (7, 8), (3, 4)), "7x8 map is not divisible by stride 2"),
        ((3, 1, 2, (7, 8), (14, 15)), "upsampling 2 becomes 14x16; the weights are for 14x15"),
    ],
)
def test_geometry_refused(geometry, words):
    with pytest.raises(UserError, match=words):
        check_geometry(*geometry)
