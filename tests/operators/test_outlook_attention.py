"""Outlook attention: the oracle against loops and a module like VOLO's, and what its body refuses to compute."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from acmix_deploy.errors import UserError
from acmix_deploy.operators.outlook_attention import OUTLOOK_ATTENTION, check_geometry
from acmix_deploy.operators.outlook_attention.oracle import outlook_attention
from acmix_deploy.runtime.onnxruntime import open_session
from tests.operators.parts import one_node_model

NATIVE = OUTLOOK_ATTENTION.kernel_limits


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 3)])
def test_body_fails_for_another_number_of_windows(kernel, stride):
    attributes = {"num_heads": 1, "kernel_size": kernel, "stride": stride, "scale": 0.7}
    shapes = [("B", kernel**4, "h", "w"), ("B", 2, "H", "W")]
    session = open_session(one_node_model(OUTLOOK_ATTENTION, "float32", shapes, attributes))
    values = np.ones((1, 2, 7, 6), np.float32)
    right = (-(-7 // stride), -(-6 // stride))
    for windows in itertools.product(range(1, 9), range(1, 9)):
        feeds = {"logits": np.ones((1, kernel**4, *windows), np.float32), "values": values}
        if windows == right:
            assert session.run(None, feeds)[0].shape == values.shape
        else:
            with pytest.raises(Exception, match="Reshape"):  # ONNX Runtime's error types share no base
                session.run(None, feeds)


def one_place_at_a_time(logits, values, heads, kernel, stride, scale):
    """The definition as loops over windows and places; float64 arrays."""
    (batch, channels, height, width), (*_, rows, columns) = values.shape, logits.shape
    head_dim, margin = channels // heads, kernel // 2
    y = np.zeros_like(values)
    places = list(itertools.product(range(kernel), repeat=2))
    for b, n, r, c in itertools.product(range(batch), range(heads), range(rows), range(columns)):
        own = slice(n * head_dim, (n + 1) * head_dim)
        pixels = [(r * stride + dy - margin, c * stride + dx - margin) for dy, dx in places]
        inside = [0 <= row < height and 0 <= column < width for row, column in pixels]
        for to, target in enumerate(pixels):
            if not inside[to]:
                continue
            first = (n * kernel**2 + to) * kernel**2
            weights = np.exp(scale * logits[b, first : first + kernel**2, r, c])
            weights /= weights.sum()  # places outside the map take their share of the weights and add nothing
            for weight, source, visible in zip(weights, pixels, inside, strict=True):
                if visible:
                    y[(b, own, *target)] += weight * values[(b, own, *source)]
    return y


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 8]),
    kernel=st.sampled_from([3, 3, 5]),
    stride=st.sampled_from([1, 2, 3]),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_oracle_equals_loops(batch, heads, head_dim, kernel, stride, height, width, seed):
    random = np.random.default_rng(seed)
    windows = -(-height // stride), -(-width // stride)
    logits = random.standard_normal((batch, heads * kernel**4, *windows))
    values = random.standard_normal((batch, heads * head_dim, height, width))
    attributes = {"num_heads": heads, "kernel_size": kernel, "stride": stride, "scale": 0.7}
    y = outlook_attention(torch.from_numpy(logits), torch.from_numpy(values), **attributes)
    assert y.dtype is torch.float64
    expected = one_place_at_a_time(logits, values, heads, kernel, stride, 0.7)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-11, atol=1e-12)


class Outlooker(nn.Module):
    """Outlook attention on [B, H, W, C] maps with linear projections, in the arrangement of VOLO's models/volo.py."""

    def __init__(self, dim: int, heads: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.heads, self.kernel, self.stride = heads, kernel, stride
        self.v = nn.Linear(dim, dim, bias=False)
        self.attn = nn.Linear(dim, heads * kernel**4)
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True)
        self.scale = (dim // heads) ** -0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, height, width, dim = x.shape
        k, s, n, margin = self.kernel, self.stride, self.heads, self.kernel // 2
        pooled = self.pool(x.movedim(3, 1)).movedim(1, 3)
        h, w = pooled.shape[1:3]
        weights = self.attn(pooled).unflatten(3, (n, k * k, k * k)).mul(self.scale).softmax(-1)
        padded = nn.functional.pad(self.v(x), (0, 0, margin, margin + s, margin, margin + s))
        y = torch.zeros_like(padded)

        def at(maps: torch.Tensor, place: int) -> torch.Tensor:
            dy, dx = divmod(place, k)
            return maps[:, dy : dy + s * h : s, dx : dx + s * w : s]

        for to, origin in itertools.product(range(k * k), repeat=2):
            seen = at(padded, origin).unflatten(3, (n, dim // n))
            at(y, to).add_((weights[..., to, origin, None] * seen).flatten(3))
        return y[:, margin : margin + height, margin : margin + width]


@pytest.mark.parametrize(
    ("heads", "kernel", "stride", "size"), [(2, 3, 2, (7, 8)), (4, 3, 1, (5, 6)), (1, 5, 2, (6, 4))]
)
def test_oracle_is_what_volo_computes(heads, kernel, stride, size):
    module = Outlooker(16, heads, kernel, stride).double()
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    logits = module.attn(module.pool(x.movedim(3, 1)).movedim(1, 3)).movedim(3, 1)
    values = module.v(x).movedim(3, 1)
    settings = {"num_heads": heads, "kernel_size": kernel, "stride": stride, "scale": module.scale}
    with torch.no_grad():
        torch.testing.assert_close(outlook_attention(logits, values, **settings).movedim(1, 3), module(x))


@pytest.mark.parametrize("kernel", NATIVE["kernel_size"])
@pytest.mark.parametrize("stride", NATIVE["stride"])
def test_equal_weights_average_a_constant(kernel, stride):
    """Where every window is inside, a constant map keeps its value once for each window that covers the pixel."""
    size = 4 * kernel
    windows = -(-size // stride)
    y = outlook_attention(
        torch.zeros(1, kernel**4, windows, windows),
        torch.ones(1, 8, size, size),
        num_heads=1,
        kernel_size=kernel,
        stride=stride,
        scale=1.0,
    )
    middle = y[0, 0, kernel:-kernel, kernel:-kernel]
    covers = torch.tensor(
        [sum(abs(pixel - at) <= kernel // 2 for at in range(0, size, stride)) for pixel in range(size)]
    )
    expected = torch.outer(covers, covers)[kernel:-kernel, kernel:-kernel].double()
    torch.testing.assert_close(middle, expected)


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        ((4, 1, (8, 8), (8, 8)), "kernel_size is 4"),
        ((1, 1, (8, 8), (8, 8)), "kernel_size is 1"),
        ((3, 0, (8, 8), (8, 8)), "stride is 0"),
        ((3, 2, (7, 8), (3, 4)), "7x8 pixels under stride 2 have 4x4 windows; the logits have 3x4"),
    ],
)
def test_geometry_refused(geometry, words):
    with pytest.raises(UserError, match=words):
        check_geometry(*geometry)
