"""What an ACmix block adds to its attention, measured: a 3x3 convolution with zero padding, of q, k and v or of x.

Its kernel is read off the answer to single pixels far from each other, its biases off random numbers, which also show
whether that is all there is. All arithmetic but the graph's own is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from acmix_deploy.families.conv_branch import Convolution, over_x
from acmix_deploy.families.local_window import LOUDER, Index, Window, sampled
from acmix_deploy.graph import NoMatch

Array = npt.NDArray[np.floating[Any]]

_EXACT = 1e-5  # of the result, relative: what may be left; a real block leaves about 1e-7
_LOST = 1e-6  # of the result: what is smaller is rounding
_CENTRE = 4  # of the nine taps
_SAMPLES = 32  # at least, to tell ten unknown numbers
_MOST_RUNS = 256  # of the graph, for a map that holds few pixels far from each other


class Branch(NamedTuple):
    """What is added to the attention."""

    grouped: Convolution | None
    """Over q, k and v, where there is nothing else but x itself."""
    kept: Array
    """[C]: the factor of x beside ``grouped``."""
    dense: Convolution
    """Over x, all of it."""


class _Inputs(NamedTuple):
    """What a branch may be a convolution of."""

    channels: int
    content: Callable[[Array], Array]
    """The projections' results [B * H * W, ...] where these are so [B * H * W, channels]."""
    of_x: bool


def measure(window: Window, y: gs.Variable) -> Branch:
    """The rest of a block that gives ``y`` [B, C, H / s, W / s]. Raises NoMatch where it is no 3x3 convolution."""
    _, heads, d = window.channels.shape
    probe, planes = window.rows.probe, heads * d
    parts = window.channels.reshape(3 * heads, d)

    def of_parts(maps: Array) -> Array:
        content = probe.blank()
        content[:, parts] = maps.reshape(len(maps), 3 * heads, -1)
        return content

    kernel = _kernel(window, y, _Inputs(3 * heads, of_parts, of_x=False))
    by_group = kernel.reshape(d, heads, -1).swapaxes(1, 2)  # [d, 27 * heads, heads]

    def convolve_parts(maps: Array, pixels: Index) -> Array:
        around = _around(window, maps, pixels).reshape(len(pixels), 3 * heads, d, 9)
        groups: Array = around.transpose(2, 0, 1, 3).reshape(d, len(pixels), -1) @ by_group
        by_pixel: Array = groups.swapaxes(0, 1).reshape(len(pixels), planes)
        return by_pixel

    rest = _rest(window, y, _Inputs(3 * planes, of_parts, of_x=False), convolve_parts)
    if rest.left < _EXACT:
        kernel = kernel.reshape(planes, 3 * heads, 3, 3)
        weight, border = over_x(
            kernel, probe.weight[parts].reshape(3 * planes, -1), probe.bias[parts].reshape(3 * planes)
        )
        if rest.kept.any():
            weight[np.arange(planes), np.arange(planes), 1, 1] += rest.kept
        grouped = Convolution(kernel, rest.bias, rest.border)
        return Branch(grouped, rest.kept, Convolution(weight, rest.bias, border + rest.border))

    def of_x(x: Array) -> Array:
        content: Array = (x @ probe.weight.T + probe.bias).astype(np.float32)
        return content

    inputs = _Inputs(probe.cin, of_x, of_x=True)
    kernel = _kernel(window, y, inputs)
    rest = _rest(window, y, inputs, lambda x, pixels: _around(window, x, pixels).reshape(len(pixels), -1) @ kernel.T)
    if not rest.left < _EXACT:
        raise NoMatch(
            f"what is added to its attention is no 3x3 convolution of {probe.found.x.name} with zero padding: "
            f"relative residual {rest.left:.1e}, limit {_EXACT:.0e}"
        )
    weight = kernel.reshape(planes, probe.cin, 3, 3)
    if rest.kept.any():
        weight[np.arange(planes), np.arange(planes), 1, 1] += rest.kept
    return Branch(None, np.zeros(planes), Convolution(weight, rest.bias, rest.border))


def _kernel(window: Window, y: gs.Variable, inputs: _Inputs) -> Array:
    """[C, channels * 9]: what y answers to one pixel of each channel, so loud that nothing else is heard."""
    rows, stride = window.rows, window.stride
    probe = rows.probe
    size = (probe.height // stride, probe.width // stride)
    apart = stride * -(-3 // stride)  # so that no output hears two
    kernel = np.zeros((window.gain.size, inputs.channels, 3, 3))
    missing = np.ones((inputs.channels, 3, 3), bool)
    blank = rows.weights(np.zeros((*rows.order.shape, window.kernel_size**2)))
    # For each output those taps that it sees: pixel s * i + tap - 1 of its row, and the same of its column.
    seen = [np.stack([stride * np.arange(n) + tap - 1 for tap in range(3)], 1) for n in size]
    runs = 0
    for top, left in sorted(product(range(apart), repeat=2), key=lambda offset: offset.count(0)):
        image, row, column = (
            grid.ravel()
            for grid in np.meshgrid(
                np.arange(probe.batch),
                np.arange(top, probe.height, apart),
                np.arange(left, probe.width, apart),
                indexing="ij",
            )
        )
        heard = [
            ([*np.argwhere(seen[0] == at)], [*np.argwhere(seen[1] == beside)])
            for at, beside in zip(row, column, strict=True)
        ]
        best = sorted(range(len(row)), key=lambda slot: -len(heard[slot][0]) * len(heard[slot][1]))
        pixels = np.ravel_multi_index((image, row, column), (probe.batch, probe.height, probe.width))
        while len(pixels):
            waiting, free = [], best.copy()
            for channel in np.flatnonzero(missing.any((1, 2))):
                for slot in free:
                    if any(missing[channel, a, b] for _, a in heard[slot][0] for _, b in heard[slot][1]):
                        waiting.append((channel, slot))
                        free.remove(slot)
                        break
            if not waiting:
                break
            if (runs := runs + 1) > _MOST_RUNS:
                raise NoMatch("its map is too small to measure what is added to its attention")
            maps = np.zeros((probe.pixels, inputs.channels), np.float32)
            for channel, slot in waiting:
                maps[pixels[slot], channel] = LOUDER
            x = maps if inputs.of_x else np.zeros((probe.pixels, probe.cin), np.float32)
            (result,) = probe.run([y], inputs.content(maps), {**blank, probe.found.x.name: probe.x(x)})
            for channel, slot in waiting:
                for i, a in heard[slot][0]:
                    for j, b in heard[slot][1]:
                        kernel[:, channel, a, b] = result[image[slot], :, i, j].astype(np.float64) / LOUDER
                        missing[channel, a, b] = False
        if not missing.any():
            break
    return kernel.reshape(len(kernel), -1)


class _Rest(NamedTuple):
    """What a kernel leaves of a result."""

    kept: Array
    bias: Array
    border: Array
    left: float
    """What neither explains, relative."""


def _rest(window: Window, y: gs.Variable, inputs: _Inputs, convolve: Callable[[Array, Index], Array]) -> _Rest:
    """What is in y beside the attention and ``convolve``: x itself, a bias, and a convolution of ones."""
    rows, random, queries = window.rows, np.random.default_rng(0), sampled(window.rows)
    probe, planes, pixels = rows.probe, window.gain.size, rows.queries[sampled(window.rows)]
    ones = _around(window, np.ones((probe.pixels, 1)), pixels)[:, 0]
    taps = [_CENTRE]  # those that differ
    for tap in range(9):
        if not any(np.array_equal(ones[:, tap], ones[:, other]) for other in taps):
            taps.append(tap)
    keeps = probe.cin == planes and not inputs.of_x
    known, found, size = [], [], 0.0
    for _ in range(math.ceil(_SAMPLES / len(queries))):
        maps = random.standard_normal((probe.pixels, inputs.channels), np.float32)
        x = maps if inputs.of_x else random.standard_normal((probe.pixels, probe.cin), np.float32)
        weights = random.standard_normal((*rows.order.shape, window.kernel_size**2)) / window.kernel_size
        content = inputs.content(maps)
        feeds = {**rows.weights(weights), probe.found.x.name: probe.x(x)}
        (result,) = probe.run([y], content, feeds)
        result = result.transpose(0, 2, 3, 1).reshape(len(rows.queries), -1)[queries].astype(np.float64)
        attended = window.attend(content, weights.astype(np.float32), queries).reshape(len(queries), -1)
        found.append(result - window.gain * attended - convolve(maps, pixels))
        itself = x[pixels] if keeps else np.zeros((len(pixels), planes))
        known.append(np.concatenate([np.repeat(ones[:, taps, None], planes, 2), itself[:, None]], 1))
        size += float(np.square(result).sum())
    a, b = np.concatenate(known).transpose(2, 0, 1), np.concatenate(found).T[..., None]  # by channel
    gram, scale = a.swapaxes(1, 2) @ a, math.sqrt(size / b.size)
    # What nothing tells apart, as the borders of a map of two rows, is shared out evenly.
    ridge = 1e-13 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(len(taps) + 1)
    solution = np.linalg.solve(gram + ridge, a.swapaxes(1, 2) @ b)
    left = float(np.linalg.norm(a @ solution - b) / math.sqrt(size))
    of_ones, kept = np.zeros((planes, 9)), solution[:, -1, 0]
    of_ones[:, taps] = solution[:, :-1, 0]
    of_ones[np.abs(of_ones) < _LOST * scale] = 0
    kept = np.where(np.abs(kept) < _LOST * scale, 0.0, np.where(np.abs(kept - 1) < _LOST * scale, 1.0, kept))
    bias = of_ones[:, _CENTRE].copy()
    of_ones[:, _CENTRE] = 0
    return _Rest(kept, bias, of_ones.reshape(planes, 1, 3, 3), left)


def _around(window: Window, content: Array, pixels: Index) -> Array:
    """[pixels, C, 9]: the 3x3 neighbours in ``content`` [B * H * W, C], zeros outside."""
    probe = window.rows.probe
    maps = content.reshape(probe.batch, probe.height, probe.width, -1).astype(np.float64)
    padded = np.pad(maps, [(0, 0), (1, 1), (1, 1), (0, 0)])
    image, row, column = np.unravel_index(pixels, maps.shape[:3])
    return np.stack([padded[image, row + y, column + x] for y in range(3) for x in range(3)], -1)
