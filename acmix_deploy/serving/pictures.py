"""Pictures from strangers: known by their first bytes, refused by their size before anything is decoded."""

from __future__ import annotations

import os
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import UnidentifiedImageError

from acmix_deploy.detection.images import Image, opencv

FORMATS = ("JPEG", "PNG", "WEBP")

MAX_PIXELS = 1 << 25
"""In a picture: 33.6 million, as in 8K video. Three bytes each when it is decoded."""


class NoPicture(Exception):
    """These bytes are none of :data:`FORMATS`."""


class TooLarge(Exception):
    """A picture has more than :data:`MAX_PIXELS`."""


class Broken(Exception):
    """A picture that cannot be decoded."""


def limit_opencv() -> None:
    """Have OpenCV itself refuse larger pictures, whatever a file tells Pillow. To be called before it is imported."""
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")


def pixels(data: bytes) -> int:
    """Width times height, from the header alone. Raises NoPicture, TooLarge or Broken."""
    try:
        with Pillow.open(BytesIO(data), formats=FORMATS) as picture:
            width, height = map(int, picture.size)
    except UnidentifiedImageError as error:
        raise NoPicture(f"not a picture in one of {', '.join(FORMATS)}") from error
    except Pillow.DecompressionBombError as error:
        raise TooLarge(_TOO_LARGE) from error
    except Exception as error:  # Pillow's readers raise what the bytes make them
        raise Broken("the picture's header cannot be read") from error
    if width * height > MAX_PIXELS:
        raise TooLarge(f"the picture is {width} x {height}: {_TOO_LARGE}")
    return width * height


def decode(data: bytes) -> Image:
    """The picture as OpenCV reads it: [h, w, 3] in BGR, turned as its EXIF data say. Raises Broken."""
    cv2 = opencv()
    try:
        image: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        image = None
    if image is None:
        raise Broken("the picture cannot be decoded")
    return np.asarray(image)


_TOO_LARGE = f"at most {MAX_PIXELS / 1e6:.1f} million pixels are taken"
