"""What models are fed with: shapes that the axes of an input allow, and arrays of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from acmix_deploy.detection.metadata import Pixels
from acmix_deploy.errors import UserError
from acmix_deploy.options import AXES as AXES
from acmix_deploy.options import check_axes
from acmix_deploy.runtime.metrics import Array

Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape, Shape]
"""Smallest, usual and largest shape of an input with free axes."""

Images = NDArray[np.float32]
T = TypeVar("T")


class Input(NamedTuple):
    """One input or output of a model: its name, its axes (free ones are names or None) and its numpy type."""

    name: str
    dims: tuple[int | str | None, ...]
    dtype: np.dtype[np.generic]

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(map(str, self.dims))}] {self.dtype}"


def image_shape(shape: Sequence[T], order: Pixels | None) -> tuple[T, ...]:
    """Axes of an image input as [B, C, H, W]; those of a file that takes pixels are [B, H, W, C]."""
    if not order or len(shape) != 4:
        return tuple(shape)
    batch, height, width, channels = shape
    return batch, channels, height, width


def file_shape(shape: Sequence[T], order: Pixels | None) -> tuple[T, ...]:
    """Axes of images [B, C, H, W] as the file has them: the other way round."""
    if not order or len(shape) != 4:
        return tuple(shape)
    batch, channels, height, width = shape
    return batch, height, width, channels


def as_images(node: Input, order: Pixels | None) -> Input:
    """An input that takes pixels as :func:`as_taken` is given it: [B, C, H, W] in float32; any other as it is."""
    return node._replace(dims=image_shape(node.dims, order), dtype=np.dtype(np.float32)) if order else node


def as_taken(feed: Mapping[str, Array], order: Pixels | None) -> dict[str, Array]:
    """Arrays as a file takes them: of one that takes pixels images in floats become these. Raises as_pixels' errors."""
    return {
        name: as_pixels(array, order) if order and array.dtype != np.uint8 else array for name, array in feed.items()
    }


def trial_shapes(dims: Sequence[int | str | None], example: Sequence[int], divisor: int = 1) -> list[Shape]:
    """Concrete shapes that show whether a model really takes every size it says.

    Args:
        dims: the input's axes; an integer is fixed, a name or None is free.
        example: the first shape, of the same rank. For an image [B, C, H, W].
        divisor: free heights and widths are multiples of it, the model's total stride.

    Returns:
        the example; one with a batch more and another, non-square image; one with the example's batch and a third,
        non-square image. Images are about half the example's size where that is at least 256, else somewhat larger.
        Fixed axes and channels stay as they are; shapes that turn out equal are listed once.
    """

    step = -(-32 // divisor) * divisor

    def trial(more_images: int, *steps: int) -> Shape:
        sizes = [size // 2 if size >= 512 else size for size in example[2:]]
        images = (size - size % step + step * n for size, n in zip(sizes, steps, strict=False))
        changed = (example[0] + more_images, *example[1:2], *images)
        return tuple(
            size if isinstance(dim, int) else new for dim, size, new in zip(dims, example, changed, strict=True)
        )

    return list(dict.fromkeys((tuple(example), trial(1, 1, 2), trial(0, 2, 1))))


def checked_shapes(input_shape: Sequence[int], dynamic: Collection[str] = (), divisor: int = 1) -> list[Shape]:
    """The shapes at which a file is run against the model, the example first.

    Args:
        input_shape: [B, C, H, W] of the example.
        dynamic: axes that are free, by their names in :data:`AXES`.
        divisor: H and W must be multiples of it, the model's total stride.

    Raises:
        UserError: the shape or an axis is none.
    """
    check_axes(dynamic)
    shape = tuple(input_shape)
    if len(shape) != 4 or min(shape) < 1:
        raise UserError(f"input shape {list(shape)} is not four positive sizes: batch, channels, height, width")
    if shape[2] % divisor or shape[3] % divisor:
        near = [max(divisor, round(size / divisor) * divisor) for size in shape[2:]]
        raise UserError(
            f"an image of {shape[2]}x{shape[3]} is not divisible by the model's stride {divisor}",
            f"The nearest size that is: {near[0]}x{near[1]}.",
        )
    free = {AXES[name] for name in dynamic}
    return trial_shapes([None if axis in free else size for axis, size in enumerate(shape)], shape, divisor)


def noise(
    name: str, shapes: Sequence[Shape], seed: int = 0, count: int = 0, *, levels: bool = False
) -> list[dict[str, Array]]:
    """Random images for the input ``name``: all ``shapes`` in turn, at least ``count``; see :func:`random_images`. With
    ``levels`` as k in uint8."""
    images = (random_images(shapes[index % len(shapes)], seed + index) for index in range(max(count, len(shapes))))
    return [{name: np.rint(image * 255).astype(np.uint8) if levels else image} for image in images]


def random_images(shape: Shape, seed: int = 0) -> Images:
    """Images of noise: levels k / 255 for k from 0 to 255, all as likely.

    Args:
        shape: [B, C, H, W].
        seed: the same for the same images.

    Returns:
        Array of that shape, float32.
    """
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return np.asarray(levels / np.float32(255), np.float32)


def as_pixels(images: Array, order: Pixels) -> NDArray[np.uint8]:
    """Images [B, 3, H, W] in RGB, levels k / 255, as [B, H, W, 3] in uint8, channels in this order.

    Raises:
        UserError: a value is no such level.
    """
    levels = np.rint(images.astype(np.float32) * np.float32(255))
    if not np.array_equal(levels / np.float32(255), images) or not ((levels >= 0) & (levels <= 255)).all():
        raise UserError(
            "the inputs are no levels of a pixel, k / 255, and the file takes uint8", "Give images or noise of pixels."
        )
    last = levels.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(last[..., ::-1] if order == "bgr" else last, np.uint8)
