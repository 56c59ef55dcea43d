"""From image files to what a detector takes: found, read, letterboxed, RGB in [0, 1], NCHW float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.errors import MissingComponent, UserError

Image = NDArray[np.uint8]
Images = NDArray[np.float32]
Shape = Sequence[int]

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


class Letterbox(BaseModel):
    """The rule by which an image is fitted into a size: bilinear resize that keeps the aspect ratio, then a border.

    The fields are those of the ``letterbox`` entry in an exported file's metadata, the defaults those of Ultralytics.
    """

    model_config = ConfigDict(frozen=True)

    center: bool = Field(default=True, description="the border goes around the image, else to its right and bottom")
    scaleup: bool = Field(default=True, description="a small image is enlarged")
    padding_value: int = Field(default=114, description="grey of the border, 0 to 255")

    def __call__(self, image: Image, height: int, width: int) -> Image:
        """Fit an image [h, w, 3] into [height, width, 3]; equal to Ultralytics' ``LetterBox`` with ``auto=False``."""
        scale = min(height / image.shape[0], width / image.shape[1])
        if not self.scaleup:
            scale = min(scale, 1.0)
        new_height, new_width = (max(1, round(size * scale)) for size in image.shape[:2])
        top, left = ((height - new_height) // 2, (width - new_width) // 2) if self.center else (0, 0)
        canvas = np.full((height, width, 3), self.padding_value, np.uint8)
        canvas[top : top + new_height, left : left + new_width] = _cv2().resize(image, (new_width, new_height))
        return canvas


class Photos(NamedTuple):
    """The images of a folder."""

    paths: list[Path]
    skipped: list[str]
    """Names of files that look like images by their suffix and cannot be read."""


def find(folder: Path, limit: int | None = None) -> Photos:
    """The readable images of a folder, in the order of their names.

    Args:
        folder: files in it with other suffixes than :data:`IMAGE_SUFFIXES` are left alone.
        limit: how many images to find at most.

    Raises:
        UserError: the folder does not exist or holds no readable image.
        MissingComponent: OpenCV is not installed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "Give the folder that the images lie in.")
    photos = Photos([], [])
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES):
        if limit is not None and len(photos.paths) == limit:
            break
        if read(path) is None:
            photos.skipped.append(path.name)
        else:
            photos.paths.append(path)
    if not photos.paths:
        raise UserError(
            f"{folder} holds no readable image"
            + (f" (tried {', '.join(photos.skipped[:3])})" if photos.skipped else ""),
            f"Images end in one of {', '.join(sorted(IMAGE_SUFFIXES))}.",
        )
    return photos


def read(path: Path) -> Image | None:
    """An image [h, w, 3] in BGR, as OpenCV has it; None where the file holds none that can be decoded.

    Raises:
        MissingComponent: OpenCV is not installed.
    """
    cv2 = _cv2()
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError:
        return None
    image: Any = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    return image if image is None else np.asarray(image)


def tensor(image: Image) -> Images:
    """An image [H, W, 3] in BGR as [3, H, W] in RGB, float32 in [0, 1]."""
    planes: Images = image[:, :, ::-1].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    return planes


def batches(paths: Sequence[Path], shapes: Sequence[Shape], letterbox: Letterbox | None = None) -> Iterator[Images]:
    """Every image in a batch, float32 in [0, 1]; images are read when their batch is asked for.

    Args:
        paths: readable images, as :func:`find` found them.
        shapes: [B, 3, H, W] of the batches, taken in turn; each occurs at least once, repeating images if need be.
        letterbox: how images are fitted.

    Raises:
        UserError: a shape is not that of colour images, or an image cannot be read any more.
    """
    fit = letterbox or Letterbox()
    for shape in shapes:
        if len(shape) != 4 or shape[1] != 3:
            raise UserError(f"the model's input is {list(shape)}, not colour images [B, 3, H, W]", "Use random inputs.")

    def image(index: int, height: int, width: int) -> Images:
        path = paths[index % len(paths)]
        found = read(path)
        if found is None:
            raise UserError(f"{path} could be read before and cannot be read now")
        return tensor(fit(found, height, width))

    taken = made = 0
    while taken < len(paths) or made < len(shapes):
        count, _, height, width = shapes[made % len(shapes)]
        yield np.stack([image(taken + i, height, width) for i in range(count)])
        taken += count
        made += 1


def _cv2() -> ModuleType:
    try:
        import cv2
    except ImportError as error:
        raise MissingComponent(
            "reading images needs OpenCV, which is not installed", "Run: pip install 'acmix-deploy[images]'"
        ) from error
    module: ModuleType = cv2
    return module
