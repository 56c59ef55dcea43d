"""Pictures from strangers: known by their first bytes, refused by their size before anything is decoded.

Headers are read here in a number of steps that is bounded: readers of libraries go through as many segments, in Python,
as a body holds.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection

from acmix_deploy.errors import UserError

MAX_PIXELS = 1 << 25
"""In a picture, where nobody asks for more: 33.6 million, as in 8K video. Three bytes each when it is decoded."""

MAX_SCANS = 128
"""Of a JPEG of the largest size, and more of a smaller one. A scan may be ten bytes, and takes time for all pixels."""

_LIMIT = "OPENCV_IO_MAX_IMAGE_PIXELS"
"""Where OpenCV has its own limit from, so that there is one for both, and for processes that are started."""

_MAX_SEGMENTS = 1000  # before the size of a JPEG; the largest profile has 255
_SEGMENT = re.compile(rb"\xff+([\xc0-\xcf\xda-\xfe])(..)", re.DOTALL)  # one with a length
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # segments that tell the size


class Unreadable(Exception):
    """Why there is no picture."""


class NoPicture(Unreadable):
    """These bytes are in none of the formats that are taken."""


class TooLarge(Unreadable):
    """A picture has more pixels than are taken, or a JPEG more than :data:`MAX_SCANS` times as many in its scans."""


class Broken(Unreadable):
    """A picture that cannot be decoded."""


def limit_opencv(most: int = MAX_PIXELS) -> None:
    """Have pictures of more than ``most`` pixels refused here, by OpenCV itself, whatever a header told, and in
    processes that are started. To be called before OpenCV is imported."""
    os.environ[_LIMIT] = str(most)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")


def max_pixels() -> int:
    """The limit of :func:`limit_opencv`, else of OPENCV_IO_MAX_IMAGE_PIXELS in the environment, else
    :data:`MAX_PIXELS`. Raises UserError where the environment has no number."""
    told = os.environ.get(_LIMIT, str(MAX_PIXELS))
    if not told.isdecimal():
        raise UserError(f"{_LIMIT} is {told!r:.40}, and a number of pixels is expected", f"Set or unset {_LIMIT}.")
    return int(told)


def check_pixels(width: int, height: int) -> None:
    """Raise TooLarge where an image of this size has more than :func:`max_pixels`."""
    most = max_pixels()
    if width * height > most:
        raise TooLarge(f"the picture is {width} x {height}: at most {most / 1e6:.3g} million pixels are taken")


def pixels(data: bytes, formats: Collection[str] = ("JPEG", "PNG", "WEBP")) -> int:
    """Width times height of a picture; see :func:`size`."""
    width, height = size(data, formats)
    return width * height


def size(data: bytes, formats: Collection[str] = ("JPEG", "PNG", "WEBP")) -> tuple[int, int]:
    """Width and height of a picture in one of the ``formats``, from the header alone, before it is turned.

    Raises:
        NoPicture, TooLarge, Broken: see there. A JPEG without an end is broken: some releases of OpenCV refuse it
            (4.14, 5.0), others fill what is missing with whatever was in memory (4.10).
    """
    readers = ((signature, reader) for name, (signature, reader) in _FORMATS.items() if name in formats)
    reader = next((reader for signature, reader in readers if re.match(signature, data, re.DOTALL)), None)
    if not reader:
        raise NoPicture(f"not a picture in one of {', '.join(formats)}")
    try:
        width, height = reader(data)
    except struct.error as error:
        raise Broken("the picture's header cannot be read") from error
    check_pixels(width, height)
    if reader is _jpeg:
        if width * height * data.count(b"\xff\xda") > MAX_SCANS * max_pixels():
            raise TooLarge("the picture has too many scans for its size")
        if data.rfind(b"\xff\xd9", _jpeg_frame(data)) < 0:
            raise Broken("the picture is cut off")
    return width, height


def _jpeg(data: bytes) -> tuple[int, int]:
    height, width = struct.unpack_from(">HH", data, _jpeg_frame(data) + 1)
    return width, height


def _jpeg_frame(data: bytes) -> int:
    """Where the contents of the segment begin that tells the size; a thumbnail lies before it. Source: ITU T.81,
    annex B."""
    place = 2
    for _ in range(_MAX_SEGMENTS):
        if not (segment := _SEGMENT.match(data, place)):
            break
        if segment[1][0] in _FRAMES:
            return segment.end()
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


def _bmp(data: bytes) -> tuple[int, int]:
    """Source: Windows' BITMAPCOREHEADER and BITMAPINFOHEADER. A negative height is that of rows from the top."""
    (header,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header == 12 else "<ii", data, 18)
    return abs(width), abs(height)


def _tiff(data: bytes) -> tuple[int, int]:
    """The largest size that the first directory tells. Source: TIFF 6.0, section 2, and BigTIFF."""
    order = "<" if data[:2] == b"II" else ">"
    if big := struct.unpack_from(order + "H", data, 2)[0] == 43:
        place, number, entry, value = struct.unpack_from(order + "Q", data, 8)[0], "Q", 20, 12
    else:
        place, number, entry, value = struct.unpack_from(order + "I", data, 4)[0], "H", 12, 8
    (count,) = struct.unpack_from(order + number, data, place)
    place += 8 if big else 2
    found = {_TIFF_WIDTH: 0, _TIFF_HEIGHT: 0}
    for at in range(place, place + entry * min(count, _MAX_ENTRIES), entry):
        tag, kind = struct.unpack_from(order + "HH", data, at)
        if tag in found:
            (size,) = struct.unpack_from(order + {_SHORT: "H", _LONG8: "Q"}.get(kind, "I"), data, at + value)
            found[tag] = max(found[tag], size)
    return found[_TIFF_WIDTH], found[_TIFF_HEIGHT]


_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257  # tags
_SHORT, _LONG8 = 3, 16  # types
_MAX_ENTRIES = 1 << 16  # of a directory; TIFF counts them in 16 bits

_FORMATS = {
    "JPEG": (rb"\xff\xd8\xff", _jpeg),
    "PNG": (rb"\x89PNG\r\n\x1a\n", _png),
    "WEBP": (rb"RIFF....WEBP", _webp),
    "BMP": (rb"BM", _bmp),
    "TIFF": (rb"II[\x2a\x2b]\x00|MM\x00[\x2a\x2b]", _tiff),
}
