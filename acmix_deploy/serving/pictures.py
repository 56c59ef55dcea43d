"""Pictures from strangers: known by their first bytes, refused by their size before anything is decoded.

Headers are read here in a number of steps that is bounded: readers of libraries go through as many segments, in Python,
as a body holds.
"""

from __future__ import annotations

import os
import re
import struct
from typing import Any

import numpy as np

from acmix_deploy.detection.images import Image, opencv

FORMATS = ("JPEG", "PNG", "WEBP")

MAX_PIXELS = 1 << 25
"""In a picture: 33.6 million, as in 8K video. Three bytes each when it is decoded."""

MAX_SCANNED = 1 << 32
"""Pixels of a JPEG times its scans: 128 of the largest. A scan may be ten bytes, and takes time for all pixels."""

_MAX_SEGMENTS = 1000  # before the size of a JPEG; the largest profile has 255
_SEGMENT = re.compile(rb"\xff+([\xc0-\xcf\xda-\xfe])(..)", re.DOTALL)  # one with a length
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # segments that tell the size


class NoPicture(Exception):
    """These bytes are none of :data:`FORMATS`."""


class TooLarge(Exception):
    """A picture has more than :data:`MAX_PIXELS`, or a JPEG more than :data:`MAX_SCANNED`."""


class Broken(Exception):
    """A picture that cannot be decoded."""


def limit_opencv() -> None:
    """Have OpenCV itself refuse larger pictures, whatever a header told here. To be called before it is imported."""
    os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")


def pixels(data: bytes) -> int:
    """Width times height, from the header alone. Raises NoPicture, TooLarge or Broken."""
    size = next((size for signature, size in _SIZES.items() if re.match(signature, data, re.DOTALL)), None)
    if not size:
        raise NoPicture(f"not a picture in one of {', '.join(FORMATS)}")
    try:
        width, height = size(data)
    except struct.error as error:
        raise Broken("the picture's header cannot be read") from error
    if width * height > MAX_PIXELS:
        raise TooLarge(f"the picture is {width} x {height}: at most {MAX_PIXELS / 1e6:.1f} million pixels are taken")
    if size is _jpeg and width * height * data.count(b"\xff\xda") > MAX_SCANNED:
        raise TooLarge("the picture has too many scans for its size")
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


def _jpeg(data: bytes) -> tuple[int, int]:
    """Source: ITU T.81, annex B."""
    place = 2
    for _ in range(_MAX_SEGMENTS):
        if not (segment := _SEGMENT.match(data, place)):
            break
        if segment[1][0] in _FRAMES:
            height, width = struct.unpack_from(">HH", data, segment.end() + 1)
            return width, height
        place = segment.start(2) + int.from_bytes(segment[2], "big")
    raise Broken("the picture's header cannot be read")


def _png(data: bytes) -> tuple[int, int]:
    """Source: ISO 15948, 11.2.2."""
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _webp(data: bytes) -> tuple[int, int]:
    """Source: RFC 9649, 2.5 to 2.7, and RFC 6386, 9.1."""
    kind = data[12:16]
    if kind == b"VP8X":
        width, high_width, height, high_height = struct.unpack_from("<HBHB", data, 24)
        return (high_width << 16) + width + 1, (high_height << 16) + height + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


_SIZES = {rb"\xff\xd8\xff": _jpeg, rb"\x89PNG\r\n\x1a\n": _png, rb"RIFF....WEBP": _webp}
