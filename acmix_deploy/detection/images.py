"""From image files to what a detector takes: found, read, letterboxed, RGB in [0, 1], NCHW float32."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.detection import pictures
from acmix_deploy.detection.listing import IMAGE_SUFFIXES, listed
from acmix_deploy.detection.pictures import Broken, TooLarge, Unreadable
from acmix_deploy.errors import MissingComponent, UserError

if TYPE_CHECKING:
    from acmix_deploy.detection.metadata import Pixels

Image = NDArray[np.uint8]
Images = NDArray[np.float32]
Boxes = NDArray[np.float32]
Shape = Sequence[int]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""What files hold, whatever their suffix."""

_MAX_BYTES = 8  # of a pixel in a file: four channels of 16 bits


class Placement(NamedTuple):
    """Where a fitted image lies in what the model sees; sizes in pixels, (height, width)."""

    original: tuple[int, int]
    fitted: tuple[int, int]
    top: int
    left: int
    canvas: tuple[int, int]
    """What the model sees."""

    def points(self, points: NDArray[np.float32]) -> NDArray[np.float32]:
        """Points [..., 2], (x, y), from there to the original image."""
        (height, width), (fitted_height, fitted_width) = self.original, self.fitted
        moved = (points - (self.left, self.top)) * (width / fitted_width, height / fitted_height)
        return np.asarray(moved, np.float32)

    def undo(self, boxes: Boxes) -> Boxes:
        """Boxes [N, 4], corners (x1, y1, x2, y2), from there to the original image, cut off at its edges."""
        height, width = self.original
        return self.points(boxes.reshape(-1, 2, 2)).clip(0, (width, height)).astype(np.float32).reshape(-1, 4)


class Letterbox(BaseModel):
    """The rule by which an image is fitted into a size.

    The fields are those of the ``letterbox`` entry in an exported file's metadata, the defaults those of Ultralytics
    for detectors.
    """

    model_config = ConfigDict(frozen=True)

    fit: Literal["pad", "stretch", "crop"] = Field(
        default="pad",
        description="pad: the aspect ratio is kept, and a border goes around; stretch: it is not kept (RT-DETR); crop: "
        "the shorter side fits a square, and the middle is taken (classification)",
    )
    center: bool = Field(default=True, description="the border goes around the image, else to its right and bottom")
    scaleup: bool = Field(default=True, description="a small image is enlarged")
    padding_value: int = Field(default=114, description="grey of the border, 0 to 255")

    def __call__(self, image: Image, height: int, width: int) -> Image:
        """Fit an image [h, w, 3] into [height, width, 3].

        Bilinear, equal to Ultralytics' ``LetterBox`` with ``auto=False``; a crop with the antialiasing of Pillow and
        within two levels of Ultralytics' ``classify_transforms``.
        """
        canvas = np.empty((height, width, 3), np.uint8)
        self.into(canvas, image)
        return canvas

    def into(self, canvas: Image, image: Image, before: Placement | None = None) -> Placement:
        """Fit an image [h, w, 3] into an array [height, width, 3] whose rows may lie apart, equal to a call.

        Args:
            canvas: is written over.
            image: what is fitted.
            before: of the image that the array holds; its border is kept where it is the same. None: it holds none.
        """
        placed = self.place(image.shape, *canvas.shape[:2])
        _, (height, width), top, left, _ = placed
        if self.fit == "crop":
            bottom, right = canvas.shape[0] - top, canvas.shape[1] - left
            canvas[:] = _antialiased(image, height, width)[-top:bottom, -left:right]
            return placed
        if not before or (height, width, top, left) != (*before.fitted, before.top, before.left):
            for border in (canvas[:top], canvas[top + height :], canvas[:, :left], canvas[:, left + width :]):
                border[:] = self.padding_value
        inside = canvas[top : top + height, left : left + width]
        opencv().resize(image, (width, height), dst=inside)
        return placed

    def place(self, shape: Shape, height: int, width: int) -> Placement:
        """Where an image [h, w, ...] comes to lie in [height, width]; a crop reaches beyond it."""
        original, canvas = (shape[0], shape[1]), (height, width)
        if self.fit == "stretch":
            return Placement(original, canvas, 0, 0, canvas)
        if self.fit == "crop":
            fitted = canvas  # images that are not square are stretched, as in Ultralytics
            if height == width:
                shorter = min(original)
                fitted = shape[0] * height // shorter, shape[1] * width // shorter
            top, left = (-round((size - part) / 2) for size, part in zip(fitted, canvas, strict=True))
            return Placement(original, fitted, top, left, canvas)
        scale = min(height / shape[0], width / shape[1])
        if not self.scaleup:
            scale = min(scale, 1.0)
        fitted = max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
        top, left = ((height - fitted[0]) // 2, (width - fitted[1]) // 2) if self.center else (0, 0)
        return Placement(original, fitted, top, left, canvas)


def _antialiased(image: Image, height: int, width: int) -> Image:
    """Bilinear, with a triangle as wide as a pixel of the result: what Pillow does, columns first, rounded between."""

    def weights(size: int, wanted: int) -> NDArray[np.float32]:
        scale = max(size / wanted, 1.0)
        middle = (np.arange(wanted)[:, None] + 0.5) * (size / wanted)
        triangle = np.clip(1 - np.abs(np.arange(size) + 0.5 - middle) / scale, 0, None)
        return np.asarray(triangle / triangle.sum(axis=1, keepdims=True), np.float32)

    across = np.tensordot(image.astype(np.float32), weights(image.shape[1], width), (1, 1)).round()  # [h, 3, width]
    both = np.tensordot(weights(image.shape[0], height), across, (1, 0)).round()
    return np.ascontiguousarray(both.transpose(0, 2, 1).astype(np.uint8))


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
    return decode(_contents(path)[0])


def read_reduced(path: Path, fitted: Callable[[int, int], tuple[int, int]]) -> tuple[Image, tuple[int, int]]:
    """A picture as :func:`read` gives it, a JPEG at a half, a quarter or an eighth of its scale where that is enough.

    libjpeg leaves out frequencies then, so that less is decoded. A side is rounded up: where it is no multiple of the
    scale the last row or column, before the picture is turned, stands for fewer pixels than the others.

    Args:
        path: of the picture.
        fitted: the size that a picture is going to be resized to, (height, width), both ways.

    Returns:
        The image, and the picture's own height and width.

    Raises:
        Unreadable, MissingComponent: see :func:`read`.
    """
    data, (width, height) = _contents(path)
    if data[:2] == b"\xff\xd8":
        turned = (height, width), (width, height)  # EXIF data may say either
        enough = min(side / least for sides in turned for side, least in zip(sides, fitted(*sides), strict=True))
        for scale in (8, 4, 2):
            small = -(-height // scale), -(-width // scale)
            if scale > enough or (
                small[0] == small[1] and height != width
            ):  # of a square nobody sees that it is turned
                continue
            image = decode(data, scale)
            return image, (height, width) if image.shape[:2] == small else (width, height)
    image = decode(data)
    return image, (image.shape[0], image.shape[1])


def _contents(path: Path) -> tuple[bytes, tuple[int, int]]:
    """The bytes of a picture's file, and its width and height before it is turned."""
    opencv()
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):  # a pipe may keep a reader for ever
            raise Broken("it is no regular file")
        if (size := about.st_size) > _MAX_BYTES * max(pictures.max_pixels(), pictures.MAX_PIXELS):
            raise TooLarge(f"the file has {size} bytes, more than any picture that is taken")
        data = path.read_bytes()
        return data, pictures.size(data, FORMATS)
    except TooLarge as error:
        raise TooLarge(f"{error}; see --max-pixels or OPENCV_IO_MAX_IMAGE_PIXELS") from error
    except OSError as error:
        raise Broken(f"the file cannot be read: {error.strerror}") from error


def decode(data: bytes, scale: Literal[1, 2, 4, 8] = 1) -> Image:
    """A picture as OpenCV reads it: [h, w, 3] in BGR, turned as its EXIF data say, its sides divided by a scale.

    Raises:
        Broken: it cannot be decoded.
        MissingComponent: OpenCV is not installed.
    """
    cv2 = opencv()
    flags = cv2.IMREAD_COLOR if scale == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{scale}")
    try:
        image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        image = None
    if image is None:
        raise Broken("the picture cannot be decoded")
    return np.asarray(image)


def tensor(image: Image) -> Images:
    """An image [H, W, 3] in BGR as [3, H, W] in RGB, float32 in [0, 1]."""
    planes = np.empty((3, *image.shape[:2]), np.float32)
    _divided(planes, image, _levels(image.shape))
    return planes


def _levels(shape: Shape) -> list[Image]:
    return [np.empty((shape[0], shape[1]), np.uint8) for _ in range(3)]


def _divided(planes: NDArray[Any], image: Image, levels: list[Image]) -> None:
    opencv().split(image, levels)
    for plane, level in zip(planes, reversed(levels), strict=True):
        np.copyto(plane, level)
    np.divide(planes, np.float32(255), out=planes)


class Fitter:
    """Fits one image after another into what a model takes, in memory that is used again. For one caller at a time.

    Args:
        letterbox: the rule.
        height, width: of what the model sees, in pixels.
        pixels: order of the channels where it takes uint8; None where it takes floats from 0 to 1, in RGB.
    """

    def __init__(self, letterbox: Letterbox, height: int, width: int, pixels: Pixels | None = None) -> None:
        self._letterbox, self._pixels = letterbox, pixels
        self._canvas = np.empty((height, width, 3), np.uint8)
        self._levels = _levels(self._canvas.shape)
        self._before: Placement | None = None

    def __call__(self, image: Image, place: NDArray[Any]) -> Placement:
        """Fit an image [h, w, 3], uint8 in BGR, into a place in a batch; floats are those of :func:`tensor`.

        Args:
            image: of any size.
            place: [height, width, 3] uint8 where pixels are taken, else [3, height, width] of floats.
        """
        if self._pixels == "bgr":
            return self._letterbox.into(place, image)
        self._before = placed = self._letterbox.into(self._canvas, image, self._before)
        if self._pixels == "rgb":
            opencv().cvtColor(self._canvas, opencv().COLOR_BGR2RGB, dst=place)
        else:
            _divided(place, self._canvas, self._levels)
        return placed


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
