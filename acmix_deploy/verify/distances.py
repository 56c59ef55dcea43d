"""How far the outputs of a candidate are from the reference's, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from acmix_deploy.detection.heads import Head
from acmix_deploy.detection.parts import parts_of
from acmix_deploy.detection.rows import paired
from acmix_deploy.runtime.metrics import Array, Deviation, deviation
from acmix_deploy.verify.limits import CHANNEL_FLOOR, PIXELS


class Part(NamedTuple):
    """What is compared as one: an output, a part of it, or its worst channel."""

    name: str
    by_channel: bool = False


class ChannelDeviation(Deviation):
    """Of the worst channel; ``relative_l2`` as :func:`worst_channel` defines it."""

    channel: int = Field(description="its index")


def distances(
    expected: Mapping[str, Array], actual: Mapping[str, Array], head: Head | None, near: float
) -> dict[Part, Deviation]:
    """The distance of each part of each output; of an output of unknown parts as a whole and by its channels.

    Args:
        expected, actual: by name; a missing output, or one of another shape, is a problem.
        head: what the outputs are; rows that a model selects are compared as sets.
        near: difference of scores of rows that tie.
    """
    found: dict[Part, Deviation] = {}
    layout = parts_of(head, expected)
    expected, actual = paired(head, expected, actual, near)
    for name, array in expected.items():
        if name not in actual:
            found[Part(name)] = Deviation(problem="the output is missing")
            continue
        other = actual[name]
        if layout[name] and other.shape == array.shape:
            found |= {Part(part): deviation(array[index], other[index]) for part, index in layout[name].items()}
            continue
        found[Part(name)] = whole = deviation(array, other)
        axis = channel_axis(array.shape)
        if axis is not None and not whole.problem:
            found[Part(name, by_channel=True)] = worst_channel(array, other, axis)
    return found


def channel_axis(shape: tuple[int, ...]) -> int | None:
    """The axis of an output's channels; None where it has but one, or each would be but one value of an image.

    1 of [B, C, H, W]; the shorter one of [B, C, N] and [B, N, C], such as [B, 84, 8400]; the last one of more axes,
    such as [B, anchors, H, W, C] of YOLOv5's raw maps.
    """
    if len(shape) < 3 or 0 in shape:
        return None
    axis = 1 if len(shape) == 4 or (len(shape) == 3 and shape[1] <= shape[2]) else len(shape) - 1
    channels = shape[axis]
    return axis if channels > 1 and np.prod(shape[1:]) > channels else None


def worst_channel(expected: Array, actual: Array, axis: int) -> ChannelDeviation:
    """The channel with the largest error, over its norm or :data:`CHANNEL_FLOOR` of that of its kind, if this is more.

    A channel that is near zero beside others is as inexact as they are, for rounding errors are as large as the terms
    that cancelled. Its kind are the channels that reach :data:`PIXELS`, or those that do not: coordinates in pixels
    are no measure of scores. That of its kind is the root mean square of their norms.

    Args:
        expected, actual: of one shape, infinities and NaNs in the same places; these are left out.
        axis: of the channels.
    """
    right, other = (_by_channel(array, axis) for array in (expected, actual))
    error, norm = (np.linalg.norm(values, axis=1) for values in (other - right, right))
    large = np.abs(right).max(axis=1) >= PIXELS
    kind = np.sqrt([np.square(norm[large == one]).mean() for one in large])
    scale = np.maximum(norm, CHANNEL_FLOOR * kind)
    relative = np.divide(error, scale, out=np.where(error > 0, 1.0, 0.0), where=scale > 0)
    worst = int(relative.argmax())
    alone = deviation(right[worst], other[worst])
    return ChannelDeviation(
        channel=worst,
        max_abs=float(np.abs(other[worst] - right[worst]).max()),
        relative_l2=float(relative[worst]),
        cosine=0.0 if alone.cosine is None else alone.cosine,
    )


def _by_channel(array: Array, axis: int) -> NDArray[np.float64]:
    values = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)
    return np.where(np.isfinite(values), values, 0)
