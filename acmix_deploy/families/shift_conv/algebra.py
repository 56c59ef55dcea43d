"""What 1x1 convolutions and fixed shifts make together: one convolution.

A stage of shifts moves whole maps, scales them where a BatchNorm was folded in, and adds them. What it does is read off
its answer to one impulse in every map, each of another height, so that it does not matter how the stage is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from acmix_deploy.graph import Array, NoMatch

_MOST_MULTIPLICATIONS = 2.0
"""Of the one convolution, in those of the 1x1 convolutions: what was no slower on the CPU (docs/families.md)."""

_IMPULSE = 4096.0  # far above the constants beside it, so that float32 keeps the digits of its answer
_CODE_ERROR = 0.1  # of a whole number; beyond it several maps are added at one place

UNSHIFTED = "its maps are not shifted"

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shifts:
    """Output ``target[n]`` at pixel p adds ``factor[n]`` times map ``source[n]`` at ``stride * p + (dy[n], dx[n])``."""

    target: Indices
    source: Indices
    dy: Indices
    dx: Indices
    factor: Array
    stride: int
    sources: int
    """How many maps come in."""
    constant: Array
    """What is added to each output, [targets]."""


@dataclass(frozen=True)
class OneConvolution:
    """``conv(x, weight) + bias + conv(1, border)``, zero padding of ``pads`` in both."""

    weight: Array
    """[Cout, Cin, kH, kW]."""
    bias: Array
    """[Cout]."""
    border: Array
    """[Cout, 1, kH, kW]: biases of the 1x1 convolutions, which the shifts cut off at the border."""
    pads: tuple[int, int, int, int]
    """Top, left, bottom, right."""
    stride: int


def is_shift(weight: Array) -> bool:
    """Whether each filter of a convolution, ``weight`` [O, I, kH, kW], has one weight that is not zero."""
    if weight.ndim != 4 or weight.shape[2:] == (1, 1):
        return False
    filters = weight.reshape(-1, weight[0, 0].size)
    return bool((np.count_nonzero(filters, axis=1) == 1).all())


def read_shifts(run: Callable[[Array], Array], shape: tuple[int, ...]) -> Shifts:
    """What ``run`` does to maps of ``shape`` [B, C, H, W], if all it does is to shift and add them.

    Raises:
        NoMatch: it does something else.
    """
    channels, height, width = shape[1:]
    at_rest = run(np.zeros(shape, np.float32))
    if at_rest.ndim != 4 or not at_rest.size:
        raise NoMatch(f"its shifts give {list(at_rest.shape)}, not a map")
    stride = -(-height // at_rest.shape[2])
    constant = at_rest[0, :, :1, :1].astype(np.float64)
    if -(-width // at_rest.shape[3]) != stride or not np.allclose(at_rest, constant, rtol=1e-5, atol=1e-6):
        raise NoMatch("its shifts are not the same everywhere on the map")

    found: list[Array] = []
    middle = [length // 2 // stride * stride for length in (height, width)]
    for row in range(middle[0], min(middle[0] + stride, height)):
        for column in range(middle[1], min(middle[1] + stride, width)):

            def answer(impulses: Array, at: tuple[int, int] = (row, column)) -> Array:
                maps = np.zeros(shape, np.float32)
                maps[0, :, at[0], at[1]] = _IMPULSE * impulses
                difference: Array = run(maps)[0].astype(np.float64) - at_rest[0]
                return difference / _IMPULSE

            factors = answer(np.ones(channels))
            target, i, j = np.nonzero(factors)
            factor = factors[target, i, j]
            codes = answer(np.arange(1, channels + 1))[target, i, j] / factor
            source = np.rint(codes) - 1
            if (
                np.abs(codes - source - 1).max(initial=0) > _CODE_ERROR
                or not ((source >= 0) & (source < channels)).all()
            ):
                raise NoMatch("its shifts add several maps at one place")
            found.append(np.stack([target, source, row - stride * i, column - stride * j, factor]))
    *places, factor = np.concatenate(found, axis=1)
    target, source, dy, dx = (place.astype(np.int64) for place in places)
    return Shifts(target, source, dy, dx, factor, stride, channels, constant[:, 0, 0])


def collapse(weight: Array, bias: Array, shifts: Shifts, *, shifts_first: bool) -> OneConvolution:
    """1x1 convolutions [M, Cin], stacked, with a stage of shifts behind or before them, as one convolution.

    Raises:
        NoMatch: a map is not used once, or the one convolution would cost too much.
    """
    weight, bias = weight.astype(np.float64), bias.astype(np.float64)
    outputs, inputs = weight.shape
    maps = inputs if shifts_first else outputs
    if sorted(shifts.target if shifts_first else shifts.source) != list(range(maps)):
        raise NoMatch(f"its shifts do not move each of {maps} maps once")
    top, left = (max(0, int(-offset.min())) for offset in (shifts.dy, shifts.dx))
    bottom, right = (max(0, int(offset.max())) for offset in (shifts.dy, shifts.dx))
    sides = (top + bottom + 1, left + right + 1)
    if sides == (1, 1):
        raise NoMatch(UNSHIFTED)
    channels = (outputs, shifts.sources) if shifts_first else (len(shifts.constant), inputs)
    multiplications = weight.size if shifts_first else weight.size * shifts.stride**2
    times = np.prod([*sides, *channels]) / multiplications
    if times > _MOST_MULTIPLICATIONS:
        raise NoMatch(
            f"one {sides[0]}x{sides[1]} convolution would take {times:.1f} times the multiplications of its 1x1 "
            f"convolutions, more than {_MOST_MULTIPLICATIONS:.0f}"
        )

    tap = (shifts.dy + top, shifts.dx + left)
    border = np.zeros((channels[0], *sides))
    if shifts_first:
        kernel = np.zeros((*sides, *channels[::-1]))
        np.add.at(kernel, (*tap, shifts.source), weight.T[shifts.target] * shifts.factor[:, None])
        kernel, bias = kernel.transpose(3, 2, 0, 1), bias + weight @ shifts.constant
    else:
        kernel = np.zeros((*sides, *channels))
        np.add.at(kernel, (*tap, shifts.target), weight[shifts.source] * shifts.factor[:, None])
        np.add.at(border, (shifts.target, *tap), bias[shifts.source] * shifts.factor)
        kernel, bias = kernel.transpose(2, 3, 0, 1), shifts.constant
    pads = (top, left, bottom, right)
    return OneConvolution(kernel, bias, border[:, None], pads, shifts.stride)
