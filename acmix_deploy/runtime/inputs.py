"""What models are fed with: shapes that the axes of an input allow, and arrays of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acmix_deploy.errors import MissingComponent, UserError

Shape = tuple[int, ...]
Images = NDArray[np.float32]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
PADDING = 114  # the grey that detectors of the YOLO family are trained to ignore


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


def random_images(shape: Shape, seed: int = 0) -> Images:
    """Uniform noise in [0, 1), float32, the same for the same seed."""
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def images_from(folder: Path, shapes: Sequence[Shape], limit: int = 32) -> tuple[list[Images], list[str]]:
    """Batches of a folder's images, as detectors of the YOLO family take them.

    Each image keeps its aspect ratio, is padded to the size with grey, and becomes RGB in [0, 1].

    Args:
        folder: where the images lie; files with other suffixes than :data:`IMAGE_SUFFIXES` are left alone.
        shapes: [B, 3, H, W] of the batches, taken in turn; each occurs at least once, repeating images if need be.
        limit: how many images to read, in order of their names.

    Returns:
        float32 arrays of those shapes, and the names of the images that could not be read.

    Raises:
        UserError: the folder does not exist, holds no readable image, or a shape is not that of colour images.
        MissingComponent: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise MissingComponent(
            "reading images needs OpenCV, which is not installed", "pip install opencv-python-headless"
        ) from error
    for shape in shapes:
        if len(shape) != 4 or shape[1] != 3:
            raise UserError(f"the model's input is {list(shape)}, not colour images [B, 3, H, W]", "Use random inputs.")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "Give the folder that the images lie in.")
    images: list[NDArray[np.uint8]] = []
    skipped: list[str] = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES):
        if len(images) == limit:
            break
        data = np.frombuffer(path.read_bytes(), np.uint8)
        image: Any = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
        if image is None:
            skipped.append(path.name)
        else:
            images.append(image)
    if not images:
        raise UserError(
            f"{folder} holds no readable image" + (f" (tried {', '.join(skipped[:3])})" if skipped else ""),
            f"Images end in one of {', '.join(sorted(IMAGE_SUFFIXES))}.",
        )

    def fit(image: NDArray[np.uint8], height: int, width: int) -> Images:
        scale = min(height / image.shape[0], width / image.shape[1])
        new_height, new_width = (max(1, round(size * scale)) for size in image.shape[:2])
        canvas = np.full((height, width, 3), PADDING, np.uint8)
        top, left = (height - new_height) // 2, (width - new_width) // 2
        canvas[top : top + new_height, left : left + new_width] = cv2.resize(image, (new_width, new_height))
        fitted: Images = canvas[:, :, ::-1].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        return fitted

    batches: list[Images] = []
    taken = 0
    while taken < len(images) or len(batches) < len(shapes):
        batch, _, height, width = shapes[len(batches) % len(shapes)]
        batches.append(np.stack([fit(images[(taken + i) % len(images)], height, width) for i in range(batch)]))
        taken += batch
    return batches, skipped
