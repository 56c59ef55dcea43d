"""Neighborhood attention: the oracle against loops over pixels, and what neither it nor the body computes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acmix_deploy.errors import UserError
from acmix_deploy.operators.neighborhood_attention import NEIGHBORHOOD_ATTENTION, Border, check_geometry
from acmix_deploy.operators.neighborhood_attention.oracle import neighborhood_attention
from acmix_deploy.runtime.onnxruntime import open_session
from tests.operators.parts import TYPES, one_node_model, oracle

every_border = pytest.mark.parametrize("border", Border, ids=lambda border: border.name.lower())


def seen_from(pixel: int, size: int, kernel: int, dilation: int, border: int) -> list[int]:
    """The K neighbours of a pixel along an axis, those beyond it too."""
    if border != Border.SHIFTED:
        return [pixel + dilation * step for step in range(-(kernel // 2), kernel // 2 + 1)]
    alike = [*range(pixel % dilation, size, dilation)]
    windows = [alike[first : first + kernel] for first in range(len(alike) - kernel + 1)]
    return min((window for window in windows if pixel in window), key=lambda w: abs(w[kernel // 2] - pixel))


def one_pixel_at_a_time(qkv, position_weight, bias, heads, kernel, dilation, border, scale):
    """The definition as loops over queries and neighbours; float64 arrays."""
    batch, channels, height, width = qkv.shape
    head_dim = channels // 3 // heads
    q, k, v = qkv.reshape(batch, 3, heads, head_dim, height, width).swapaxes(0, 1)
    y = np.zeros((batch, heads, head_dim, height, width))

    def coordinate(pixel: int, size: int) -> float:
        return 2 * pixel / (size - 1) - 1 if size > 1 else -1.0

    for b, n, row, column in itertools.product(*map(range, (batch, heads, height, width))):
        logits, values = [], []
        rows = seen_from(row, height, kernel, dilation, border)
        columns = seen_from(column, width, kernel, dilation, border)
        for key_row, key_column in itertools.product(rows, columns):
            offset = [(key_row - row) // dilation + kernel - 1, (key_column - column) // dilation + kernel - 1]
            if 0 <= key_row < height and 0 <= key_column < width:
                place = np.array([coordinate(key_column, width), coordinate(key_row, height)])
                key = k[b, n, :, key_row, key_column] - position_weight @ place
                logits.append(scale * q[b, n, :, row, column] @ key + bias[(n, *offset)])
                values.append(v[b, n, :, key_row, key_column])
            elif border == Border.ZEROS:
                logits.append(bias[(n, *offset)])
                values.append(np.zeros(head_dim))
        weights = np.exp(np.array(logits) - max(logits))
        y[b, n, :, row, column] = weights @ np.array(values) / weights.sum()
    return y.reshape(batch, -1, height, width)


def drawn(random: np.random.Generator, heads: int, head_dim: int, kernel: int, *size: int) -> list[np.ndarray]:
    """qkv of ``size``, [B, H, W], position_weight and bias, float64."""
    batch, height, width = size
    shapes = [(batch, 3 * heads * head_dim, height, width), (head_dim, 2), (heads, 2 * kernel - 1, 2 * kernel - 1)]
    return [random.standard_normal(shape) for shape in shapes]


@every_border
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_oracle_equals_loops(border, data):
    kernel, dilation = data.draw(st.sampled_from([3, 3, 5])), data.draw(st.sampled_from([1, 1, 2, 3]))
    least = kernel * dilation if border == Border.SHIFTED else 1
    height, width = (data.draw(st.integers(least, max(least + 2, 7))) for _ in range(2))
    heads, head_dim, batch = (data.draw(st.sampled_from(values)) for values in ([1, 2], [1, 3], [1, 2]))
    inputs = drawn(np.random.default_rng(data.draw(st.integers(0, 99))), heads, head_dim, kernel, batch, height, width)
    attributes = {"num_heads": heads, "kernel_size": kernel, "dilation": dilation, "border": border, "scale": 0.7}
    y = neighborhood_attention(*map(torch.from_numpy, inputs), **attributes)
    assert y.dtype is torch.float64
    expected = one_pixel_at_a_time(*inputs, heads, kernel, dilation, border, 0.7)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-11, atol=1e-12)


@every_border
@pytest.mark.parametrize("dilation", [1, 2])
def test_what_no_window_holds_is_never_read(border, dilation):
    """Not the pixels outside a query's window, nor the biases that a border does not reach."""
    kernel, height, width = 3, 8, 7
    attributes = {"num_heads": 1, "kernel_size": kernel, "dilation": dilation, "border": border, "scale": 0.7}
    qkv, position_weight, bias = drawn(np.random.default_rng(0), 1, 2, kernel, 1, height, width)
    before = oracle(NEIGHBORHOOD_ATTENTION, [qkv, position_weight, bias], attributes)
    if border != Border.SHIFTED:
        bias[:, [0, -1]] = bias[:, :, [0, -1]] = np.nan
    for row, column in itertools.product((0, 1, 4, height - 1), (0, 3, width - 1)):
        rows = seen_from(row, height, kernel, dilation, border)
        columns = seen_from(column, width, kernel, dilation, border)
        poisoned = np.full_like(qkv, np.nan)
        for pixel in itertools.product(set(rows) & {*range(height)}, set(columns) & {*range(width)}):
            poisoned[(0, slice(None), *pixel)] = qkv[(0, slice(None), *pixel)]
        y = oracle(NEIGHBORHOOD_ATTENTION, [poisoned, position_weight, bias], attributes)
        np.testing.assert_array_equal(y[0, :, row, column], before[0, :, row, column])


@pytest.mark.parametrize(
    ("border", "pixel", "entry", "seen"),
    [
        # With K = 3 on a 6x7 map: the offset by which a pixel sees another is its entry minus 2.
        *((Border.SHIFTED, (0, 0), (y + 2, x + 2), (y, x)) for y, x in ((0, 0), (1, 2), (2, 2))),
        (Border.SHIFTED, (5, 6), (0, 0), (3, 4)),
        (Border.SHIFTED, (5, 0), (0, 4), (3, 2)),
        (Border.SHIFTED, (2, 3), (1, 3), (1, 4)),
        (Border.MASKED, (0, 0), (3, 3), (1, 1)),
        (Border.MASKED, (5, 6), (1, 2), (4, 6)),
        (Border.ZEROS, (0, 6), (3, 1), (1, 5)),
        (Border.ZEROS, (0, 6), (1, 2), None),
    ],
)
def test_bias_belongs_to_an_offset(border, pixel, entry, seen):
    """One bias above all others shows alone the neighbour at its offset, or nothing beyond the map."""
    qkv, bias = torch.zeros(1, 3, 6, 7), torch.zeros(1, 5, 5)
    qkv[0, 2] = torch.arange(1.0, 43).reshape(6, 7)
    bias[(0, *entry)] = 1e3
    attributes = {"num_heads": 1, "kernel_size": 3, "dilation": 1, "border": border, "scale": 1.0}
    y = neighborhood_attention(qkv, torch.zeros(1, 2), bias, **attributes)
    assert y[(0, 0, *pixel)].item() == (0 if seen is None else qkv[(0, 2, *seen)].item())


@every_border
@pytest.mark.parametrize("dilation", [2, 3])
def test_residue_classes_are_maps_of_their_own(border, dilation):
    qkv, _, bias = map(torch.from_numpy, drawn(np.random.default_rng(0), 2, 3, 3, 1, 10, 11))
    attributes = {"num_heads": 2, "kernel_size": 3, "border": border, "scale": 0.7}
    y = neighborhood_attention(qkv, torch.zeros(3, 2), bias, dilation=dilation, **attributes)
    for row, column in itertools.product(range(dilation), range(dilation)):
        of_class = qkv[:, :, row::dilation, column::dilation]
        alone = neighborhood_attention(of_class, torch.zeros(3, 2), bias, dilation=1, **attributes)
        torch.testing.assert_close(y[:, :, row::dilation, column::dilation], alone)


def test_shifted_is_what_natten_computes():
    """Of the release 0.17, which runs on a CPU and has biases."""
    functional = pytest.importorskip("natten.functional", reason="natten is not installed")
    qkv, _, bias = map(torch.from_numpy, drawn(np.random.default_rng(0), 2, 8, 5, 2, 11, 14))
    attributes = {"num_heads": 2, "kernel_size": 5, "dilation": 2, "border": Border.SHIFTED, "scale": 0.7}
    query, key, value = (part.permute(0, 1, 3, 4, 2) for part in qkv.reshape(2, 3, 2, 8, 11, 14).unbind(1))
    window = {"kernel_size": 5, "dilation": 2}
    logits = functional.na2d_qk(0.7 * query.contiguous(), key.contiguous(), rpb=bias, **window)
    expected = functional.na2d_av(logits.softmax(-1), value.contiguous(), **window)
    y = neighborhood_attention(qkv, torch.zeros(8, 2), bias, **attributes)
    torch.testing.assert_close(y.reshape(2, 2, 8, 11, 14), expected.permute(0, 1, 4, 2, 3))


@every_border
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (5, 1)])
def test_body_fails_where_the_operator_is_not_defined(border, dtype, kernel, dilation):
    attributes = {"num_heads": 2, "kernel_size": kernel, "dilation": dilation, "border": border, "scale": 0.5}
    shapes = [("B", 24, "H", "W"), (4, 2), (2, 2 * kernel - 1, 2 * kernel - 1)]
    session = open_session(one_node_model(NEIGHBORHOOD_ATTENTION, dtype, shapes, attributes))
    others = {"position_weight": np.ones(shapes[1], dtype), "bias": np.ones(shapes[2], dtype)}
    for height, width in itertools.product(range(1, 8), (1, 2, 5, 6)):
        qkv = np.ones((1, 24, height, width), dtype)
        try:
            check_geometry(kernel, dilation, border, height, width)
            defined = True
        except UserError:
            defined = False
        if defined:
            assert session.run(None, {"qkv": qkv, **others})[0].shape == (1, 8, height, width)
        else:
            with pytest.raises(Exception, match="Reshape"):  # ONNX Runtime's error types share no base
                session.run(None, {"qkv": qkv, **others})


@pytest.mark.parametrize("border", [-1, 0, 4])
def test_body_fails_for_no_border(border):
    attributes = {"num_heads": 1, "kernel_size": 3, "dilation": 1, "border": border, "scale": 0.5}
    model = one_node_model(NEIGHBORHOOD_ATTENTION, "float32", [("B", 3, "H", "W"), (1, 2), (1, 5, 5)], attributes)
    feeds = {"qkv": np.ones((1, 3, 4, 4)), "position_weight": np.ones((1, 2)), "bias": np.ones((1, 5, 5))}
    with pytest.raises(Exception, match="Reshape"):
        open_session(model).run(None, {name: array.astype(np.float32) for name, array in feeds.items()})


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        ((4, 1, Border.ZEROS, 8, 8), "kernel_size is 4"),
        ((1, 1, Border.ZEROS, 8, 8), "kernel_size is 1"),
        ((3, 0, Border.MASKED, 8, 8), "dilation is 0"),
        ((3, 1, 0, 8, 8), "border is 0; it must be 1 for zeros, 2 for masked, 3 for shifted"),
        ((3, 1, 4, 8, 8), "border is 4"),
        ((7, 1, Border.SHIFTED, 6, 8), "a 6x8 map is too small: a 7x7 window of pixels 1 apart"),
        ((3, 3, Border.SHIFTED, 9, 8), "needs 9 pixels each way"),
    ],
)
def test_geometry_refused(geometry, words):
    with pytest.raises(UserError, match=words):
        check_geometry(*geometry)


@pytest.mark.parametrize("border", [Border.ZEROS, Border.MASKED])
def test_any_map_is_large_enough(border):
    check_geometry(9, 5, border, 1, 1)
