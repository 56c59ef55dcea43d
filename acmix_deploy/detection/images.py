"""From image files to what a detector takes: found, read, letterboxed, RGB in [0, 1], NCHW float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.detection import pictures
from acmix_deploy.detection.listing import IMAGE_SUFFIXES, listed
from acmix_deploy.detection.pictures import Broken, TooLarge, Unreadable
from acmix_deploy.errors import MissingComponent, UserError

Image = NDArray[np.uint8]
Images = NDArray[np.float32]
Boxes = NDArray[np.float32]
Shape = Sequence[int]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""What files hold, whatever their suffix."""

_MAX_BYTES = 8  # of a pixel in a file: four channels of 16 bits


class Placement(NamedTuple):
    """Where a letterboxed image lies in what the model sees; sizes in pixels, (height, width)."""

    original: tuple[int, int]
    fitted: tuple[int, int]
    top: int
    left: int

    def undo(self, boxes: Boxes) -> Boxes:
        """Boxes [N, 4], corners (x1, y1, x2, y2), from there to the original image, cut off at its edges."""
        (height, width), (fitted_height, fitted_width) = self.original, self.fitted
        corners = (boxes.reshape(-1, 2, 2) - (self.left, self.top)) * (width / fitted_width, height / fitted_height)
        return corners.clip(0, (width, height)).astype(np.float32).reshape(-1, 4)


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
        _, fitted, top, left = self.place(image.shape, height, width)
        canvas = np.full((height, width, 3), self.padding_value, np.uint8)
        canvas[top : top + fitted[0], left : left + fitted[1]] = opencv().resize(image, fitted[::-1])
        return canvas

    def place(self, shape: Shape, height: int, width: int) -> Placement:
        """Where an image [h, w, ...] comes to lie in [height, width]."""
        scale = min(height / shape[0], width / shape[1])
        if not self.scaleup:
            scale = min(scale, 1.0)
        fitted = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
        top, left = ((height - fitted[0]) // 2, (width - fitted[1]) // 2) if self.center else (0, 0)
        return Placement((shape[0], shape[1]), fitted, top, left)


class Photos(NamedTuple):
    """The images of a folder or of a data set."""

    paths: list[Path]
    skipped: dict[str, str]
    """Names of files that look like images by their suffix and cannot be read, and why."""


def find(source: Path, limit: int | None = None) -> Photos:
    """The readable images of a folder or of a data set, in the order of their names.

    Args:
        source: see :func:`acmix_deploy.detection.listing.listed`.
        limit: how many images to find at most.

    Raises:
        UserError: there is no such thing, or no readable image in it.
        MissingComponent: OpenCV is not installed, or what reads YAML.
    """
    photos = Photos([], {})
    for path in listed(source):
        if limit is not None and len(photos.paths) == limit:
            break
        try:
            read(path)
        except Unreadable as error:
            photos.skipped[path.name] = str(error)
        else:
            photos.paths.append(path)
    if not photos.paths:
        tried = "; ".join(f"{name}: {why}" for name, why in islice(photos.skipped.items(), 3))
        raise UserError(
            f"{source} holds no readable image" + (f" (tried {tried})" if tried else ""),
            f"Images end in one of {', '.join(sorted(IMAGE_SUFFIXES))}.",
        )
    return photos


def read(path: Path) -> Image:
    """An image [h, w, 3] in BGR, as OpenCV has it. One of more pixels than are taken is not decoded.

    Raises:
        Unreadable: the file holds none of :data:`FORMATS` that can be decoded, or a larger one than is taken.
        MissingComponent: OpenCV is not installed.
    """
    opencv()
    try:
        if (size := path.stat().st_size) > _MAX_BYTES * max(pictures.max_pixels(), pictures.MAX_PIXELS):
            raise TooLarge(f"the file has {size} bytes, more than any picture that is taken")
        data = path.read_bytes()
        pictures.pixels(data, FORMATS)
    except TooLarge as error:
        raise TooLarge(f"{error}; see --max-pixels or OPENCV_IO_MAX_IMAGE_PIXELS") from error
    except OSError as error:
        raise Broken(f"the file cannot be read: {error.strerror}") from error
    return decode(data)


def decode(data: bytes) -> Image:
    """A picture as OpenCV reads it: [h, w, 3] in BGR, turned as its EXIF data say.

    Raises:
        Broken: it cannot be decoded.
        MissingComponent: OpenCV is not installed.
    """
    cv2 = opencv()
    try:
        image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        raise Broken("the picture cannot be decoded")
    return np.asarray(image)


def tensor(image: Image) -> Images:
    """An image [H, W, 3] in BGR as [3, H, W] in RGB, float32 in [0, 1]."""
    planes: Images = image[:, :, ::-1].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    return planes


class Batch(NamedTuple):
    """Letterboxed images, and where they came from."""

    images: Images
    paths: list[Path]
    placements: list[Placement]


def batches(paths: Sequence[Path], shapes: Sequence[Shape], letterbox: Letterbox | None = None) -> Iterator[Images]:
    """The images of :func:`placed_batches` alone."""
    return (batch.images for batch in placed_batches(paths, shapes, letterbox))


def placed_batches(
    paths: Sequence[Path], shapes: Sequence[Shape], letterbox: Letterbox | None = None
) -> Iterator[Batch]:
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
    taken = made = 0
    while taken < len(paths) or made < len(shapes):
        count, _, height, width = shapes[made % len(shapes)]
        chosen = [paths[(taken + index) % len(paths)] for index in range(count)]
        images = [_read_again(path) for path in chosen]
        yield Batch(
            np.stack([tensor(fit(image, height, width)) for image in images]),
            chosen,
            [fit.place(image.shape, height, width) for image in images],
        )
        taken += count
        made += 1


def _read_again(path: Path) -> Image:
    try:
        return read(path)
    except Unreadable as error:
        raise UserError(f"{path} could be read before and cannot be read now: {error}") from error


def opencv() -> ModuleType:
    """The module cv2. Raises MissingComponent where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise MissingComponent(
            "reading images needs OpenCV, which is not installed", "Run: pip install 'acmix-deploy[images]'"
        ) from error
    module: ModuleType = cv2
    return module
