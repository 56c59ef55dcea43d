"""What an ACmix block adds to its attention, measured: a 3x3 convolution with zero padding, of q, k and v or of x.

The projections, the weights of the taps and x are set to random numbers; the result without the attention is then
linear in what lies around each pixel, and least squares give kernels and biases. What computes anything else leaves a
residual. All arithmetic but the graph's own is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from acmix_deploy.families.conv_branch import Convolution, over_x
from acmix_deploy.families.local_window import Index, Window, sampled
from acmix_deploy.graph import NoMatch

Array = npt.NDArray[np.floating[Any]]

_EXACT = 1e-5  # of the result, relative: what least squares may leave; a real block leaves about 1e-7
_LOST = 1e-6  # of the result: what is smaller is rounding
_MOST_ROUNDS = 64  # of random numbers, for maps of few pixels
_CENTRE = 4  # of the nine taps


class Branch(NamedTuple):
    """What is added to the attention."""

    grouped: Convolution | None
    """Over q, k and v, where there is nothing else but x itself."""
    kept: Array
    """[C]: the factor of x beside ``grouped``."""
    dense: Convolution
    """Over x, all of it."""


def measure(window: Window, y: gs.Variable) -> Branch:
    """The rest of a block that gives ``y`` [B, C, H / s, W / s]. Raises NoMatch where it is no 3x3 convolution."""
    _, heads, d = window.channels.shape
    probe, planes = window.rows.probe, heads * d

    def of_qkv(content: Array, x: Array, pixels: Index) -> Array:
        """[d, n, 27 * heads + heads]: what a group reads, and x itself in its channels."""
        maps = content[:, window.channels].reshape(len(content), -1, d)
        around = _around(window, maps.reshape(len(content), -1), pixels).reshape(len(pixels), 3 * heads, d, 9)
        itself = x[pixels] if probe.cin == planes else np.zeros((len(pixels), planes))
        groups = [around.transpose(2, 0, 1, 3).reshape(d, len(pixels), -1), itself.reshape(-1, d, heads).swapaxes(0, 1)]
        return np.concatenate(groups, 2)

    fit, left = _fitted(window, y, of_qkv, (d, 28 * heads), from_x=False)
    if left < _EXACT:
        kernel = fit.weight[:, :-heads].swapaxes(1, 2).reshape(planes, 3 * heads, 3, 3)
        kept = np.diagonal(fit.weight[:, -heads:], axis1=1, axis2=2).reshape(-1)
        kept = np.where(np.abs(kept) < _LOST * fit.size, 0.0, np.where(np.abs(kept - 1) < _LOST, 1.0, kept))
        grouped = Convolution(kernel, fit.bias, fit.border)
        qkv = (probe.weight[window.channels], probe.bias[window.channels])
        weight, border = over_x(kernel, qkv[0].reshape(3 * planes, -1), qkv[1].reshape(-1))
        if kept.any():
            weight[np.arange(planes), np.arange(planes), 1, 1] += kept
        return Branch(grouped, kept, Convolution(weight, fit.bias, border + fit.border))

    def of_x(content: Array, x: Array, pixels: Index) -> Array:
        return _around(window, x, pixels).reshape(1, len(pixels), -1)

    fit, left = _fitted(window, y, of_x, (1, 9 * probe.cin), from_x=True)
    if not left < _EXACT:
        raise NoMatch(
            f"what is added to its attention is no 3x3 convolution of {probe.found.x.name} with zero padding: "
            f"relative residual {left:.1e}, limit {_EXACT:.0e}"
        )
    weight = fit.weight[0].T.reshape(planes, probe.cin, 3, 3)
    return Branch(None, np.zeros(planes), Convolution(weight, fit.bias, fit.border))


class _Fit(NamedTuple):
    weight: Array
    """[groups, features, channels of a group]."""
    bias: Array
    border: Array
    size: float
    """Root mean square of the result."""


Features = Callable[[Array, Array, Index], Array]


def _fitted(
    window: Window, y: gs.Variable, features: Features, shape: tuple[int, int], *, from_x: bool
) -> tuple[_Fit, float]:
    """The result without the attention, linear in ``features`` [groups, n, features] of ``shape`` and in what a map of
    ones gives; and what is left, relative."""
    groups, count = shape
    planes = window.gain.size
    queries = sampled(window.rows)
    pixels = window.rows.queries[queries]
    ones = _around(window, np.ones((window.rows.probe.pixels, 1)), pixels)[:, 0]
    taps = [_CENTRE]  # those of the map of ones that differ
    for tap in range(9):
        if not any(np.array_equal(ones[:, tap], ones[:, other]) for other in taps):
            taps.append(tap)
    total = count + len(taps)
    rounds = math.ceil(1.5 * total / len(queries))
    if rounds > _MOST_ROUNDS:
        raise NoMatch(f"{len(queries)} pixels are too few to measure what is added to its attention")
    gram, sums = np.zeros((groups, total, total)), np.zeros((groups, total, planes // groups))
    size = rest = 0.0
    for content, x, result, attended in _runs(window, y, queries, rounds, from_x):
        known = np.broadcast_to(ones[:, taps], (groups, len(queries), len(taps)))
        rows = np.concatenate([features(content, x, pixels), known], 2)
        target = (result - attended).reshape(len(queries), groups, -1).swapaxes(0, 1)
        gram += rows.swapaxes(1, 2) @ rows
        sums += rows.swapaxes(1, 2) @ target
        size, rest = size + np.square(result).sum(), rest + np.square(target).sum()
    # What nothing tells apart, as the borders of a map of two rows, is shared out evenly.
    ridge = 1e-13 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(total)
    solution = np.linalg.solve(gram + ridge, sums)
    explained = (solution * (2 * sums - gram @ solution)).sum()
    left = math.sqrt(max(rest - explained, 0.0) / size)
    size = math.sqrt(size / (rounds * len(queries) * planes))
    of_ones = np.zeros((9, planes))
    of_ones[taps] = solution[:, count:].swapaxes(0, 1).reshape(len(taps), planes)
    of_ones[np.abs(of_ones) < _LOST * size] = 0
    bias = of_ones[_CENTRE].copy()
    of_ones[_CENTRE] = 0
    return _Fit(solution[:, :count], bias, of_ones.T.reshape(planes, 1, 3, 3), size), left


def _runs(
    window: Window, y: gs.Variable, queries: Index, rounds: int, from_x: bool
) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Random contents, x [B * H * W, Cin], and for each query the result and the attention's part in it."""
    rows, random = window.rows, np.random.default_rng(0)
    probe = rows.probe
    for _ in range(rounds):
        x = random.standard_normal((probe.pixels, probe.cin), np.float32)
        content = (x @ probe.weight.T + probe.bias).astype(np.float32) if from_x else probe.random(random)
        weights = random.standard_normal((*rows.order.shape, window.kernel_size**2)) / window.kernel_size
        weights = weights.astype(np.float32)
        (result,) = probe.run([y], content, {**rows.weights(weights), probe.found.x.name: probe.x(x)})
        by_query = result.transpose(0, 2, 3, 1).reshape(len(rows.queries), -1)[queries].astype(np.float64)
        attended = window.gain * window.attend(content, weights, queries).reshape(len(queries), -1)
        yield content, x, by_query, attended


def _around(window: Window, content: Array, pixels: Index) -> Array:
    """[pixels, C, 9]: the 3x3 neighbours in ``content`` [B * H * W, C], zeros outside."""
    probe = window.rows.probe
    maps = content.reshape(probe.batch, probe.height, probe.width, -1).astype(np.float64)
    padded = np.pad(maps, [(0, 0), (1, 1), (1, 1), (0, 0)])
    image, row, column = np.unravel_index(pixels, maps.shape[:3])
    return np.stack([padded[image, row + y, column + x] for y in range(3) for x in range(3)], -1)
