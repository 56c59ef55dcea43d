"""What models are fed with: shapes that the axes of an input allow, and arrays of them."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from acmix_deploy.errors import UserError

MIN_SIZE = "min_size"
"""Entry of a file's metadata: "[H, W]", the smallest image in pixels that all fused blocks are defined for."""

AXES = {"batch": 0, "height": 2, "width": 3}
"""The axes of an image input [B, C, H, W] that may be free, by their names."""

Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape, Shape]
"""Smallest, usual and largest shape of an input with free axes."""

Images = NDArray[np.float32]


class Input(NamedTuple):
    """One input or output of a model: its name, its axes (free ones are names or None) and its numpy type."""

    name: str
    dims: tuple[int | str | None, ...]
    dtype: np.dtype[np.generic]

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(map(str, self.dims))}] {self.dtype}"


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


def check_axes(dynamic: Collection[str]) -> None:
    """Raises UserError where one of the axes that are to be free is none of :data:`AXES`."""
    if unknown := set(dynamic) - AXES.keys():
        raise UserError(f"unknown dynamic axis {', '.join(sorted(unknown))}; it must be one of {', '.join(AXES)}")


def size_in(metadata: Mapping[str, str], entry: str, default: str) -> tuple[int, int]:
    """Height and width as an entry of a file's metadata tells them. Raises UserError where it tells something else."""
    told = metadata.get(entry, default)
    try:
        height, width = map(int, ast.literal_eval(told))
    except (ValueError, TypeError, SyntaxError) as error:
        raise UserError(
            f"the metadata tell the {entry} {told!r:.60}, and expected are a height and a width, such as {default}",
            "Export the file from its checkpoint: acmix-deploy export",
        ) from error
    return height, width


def min_size(metadata: Mapping[str, str]) -> tuple[int, int]:
    """The smallest height and width that a file is defined for; 1 each where its metadata tell none."""
    return size_in(metadata, MIN_SIZE, "[1, 1]")


def check_size(name: str, shape: Sequence[int], metadata: Mapping[str, str]) -> None:
    """Refuse images [B, C, H, W] that are smaller than those that a file is defined for: an engine takes them.

    Args:
        name: of the file, and of what gives the shape where that is not plain.
        shape: of its input.
        metadata: of the file.

    Raises:
        UserError: naming both sizes.
    """
    height, width = min_size(metadata)
    if len(shape) == 4 and (shape[2] < height or shape[3] < width):
        raise UserError(
            f"{name}: images of {shape[2]}x{shape[3]} pixels are smaller than {height}x{width}, from which on its "
            "blocks are defined",
            f"Give images of at least {height}x{width}; below, attention windows do not fit into the maps.",
        )


def noise(name: str, shapes: Sequence[Shape], seed: int = 0, count: int = 0) -> list[dict[str, Images]]:
    """Random images for the input ``name``, of all ``shapes`` in turn, at least ``count``; see :func:`random_images`."""
    seeds = range(max(count, len(shapes)))
    return [{name: random_images(shapes[index % len(shapes)], seed + index)} for index in seeds]


def random_images(shape: Shape, seed: int = 0) -> Images:
    """Uniform noise in [0, 1), float32, the same for the same seed."""
    return np.random.default_rng(seed).random(shape, dtype=np.float32)
