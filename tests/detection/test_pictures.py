"""What is known of a picture before it is decoded: that of another reader, in little time whatever the bytes are."""

from __future__ import annotations

import io
import time
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from acmix_deploy.detection import pictures
from acmix_deploy.detection.images import decode

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
Pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

NOISE = np.random.default_rng(0).integers(0, 255, (37, 300, 3), np.uint8)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {}),
    "progressive": ("JPEG", {"progressive": True}),
    "metadata": ("JPEG", {"icc_profile": bytes(200_000), "exif": bytes(1000), "comment": bytes(500)}),
    "several": ("MPO", {"save_all": True, "append_images": [Pillow.new("RGB", (20, 10))]}),
    "png": ("PNG", {}),
    "animated png": ("PNG", {"save_all": True, "append_images": [Pillow.new("RGB", (300, 37))]}),
    "webp": ("WEBP", {}),
    "lossless": ("WEBP", {"lossless": True}),
    "extended": ("WEBP", {"exif": bytes(1000)}),
    "animated": ("WEBP", {"save_all": True, "append_images": [Pillow.new("RGB", (300, 37))]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_size_is_that_of_the_decoded_picture(form: str) -> None:
    kind, options = FORMS[form]
    file = io.BytesIO()
    Pillow.fromarray(NOISE).save(file, kind, **options)
    data = file.getvalue()
    assert pictures.pixels(data) == 37 * 300
    assert decode(data).shape == NOISE.shape
    outcomes = set()
    for length in range(0, min(len(data), 2000), 3):
        with suppress(pictures.NoPicture, pictures.Broken):
            outcomes.add(pictures.pixels(data[:length]))
    assert outcomes <= {37 * 300}


@pytest.mark.parametrize(("width", "height"), [(1, 1), (255, 257), (3000, 2), (2, 3000), (16383, 1)])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_sizes_of_any_kind(width: int, height: int, suffix: str) -> None:
    data = bytes(cv2.imencode(suffix, np.zeros((height, width, 3), np.uint8))[1])
    assert pictures.pixels(data) == width * height


def jpeg(size: int) -> tuple[bytes, bytes]:
    """A progressive one of a colour, and its last scan."""
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]
    data = bytes(cv2.imencode(".jpg", np.zeros((size, size, 3), np.uint8), options)[1])
    return data, data[data.rindex(b"\xff\xda") : -2]


def test_scans_are_counted_in_pixels() -> None:
    """Of few bytes each, they would keep a thread busy for hours."""
    large, scan = jpeg(4096)
    assert pictures.pixels(large + scan * 200) == 4096**2
    with pytest.raises(pictures.TooLarge, match="too many scans"):
        pictures.pixels(large + scan * 300)
    small, scan = jpeg(64)
    assert pictures.pixels(small + scan * 300) == 64**2
    video = np.random.default_rng(0).bytes(1 << 23)  # a second of it stands behind the pictures of some cameras
    assert pictures.pixels(large + video) == 4096**2


def test_time_does_not_grow_with_what_stands_before_the_size() -> None:
    data, _ = jpeg(64)
    empty = zlib.crc32(b"aaAa").to_bytes(4, "big")
    png = bytes(cv2.imencode(".png", NOISE)[1])
    start = time.process_time()
    with pytest.raises(pictures.Broken):
        pictures.pixels(data[:2] + b"\xff\xe5\x00\x02" * (1 << 22) + data[2:])
    assert pictures.pixels(data[:2] + b"\xff" * (1 << 22) + data[2:]) == 64**2
    assert pictures.pixels(png[:33] + (bytes(4) + b"aaAa" + empty) * (1 << 20) + png[33:]) == 37 * 300
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("marker", [b"\xff\xd0", b"\xff\x01", b"\xff\xd8", b"\xff\xfe\x00\x04okgarbage"])
def test_a_jpeg_is_left_alone_where_readers_could_differ(marker: bytes) -> None:
    """Of what has no length one reader skips two bytes, another one as many as the next two say."""
    data, _ = jpeg(64)
    with pytest.raises(pictures.Broken, match="header cannot be read"):
        pictures.pixels(data[:2] + marker + data[2:])


@pytest.mark.parametrize(
    ("kind", "options"),
    [("BMP", {}), ("TIFF", {}), ("TIFF", {"big_tiff": True}), ("TIFF", {"compression": "tiff_lzw"})],
    ids=str,
)
@pytest.mark.parametrize(("width", "height"), [(1, 1), (255, 257), (3000, 2), (2, 3000)])
def test_sizes_of_what_only_files_hold(kind: str, options: dict[str, Any], width: int, height: int) -> None:
    file = io.BytesIO()
    Pillow.new("RGB", (width, height)).save(file, kind, **options)
    data = file.getvalue()
    assert pictures.pixels(data, [kind]) == width * height
    with pytest.raises(pictures.NoPicture):
        pictures.pixels(data)
    for length in range(0, min(len(data), 2000), 3):
        with suppress(pictures.NoPicture, pictures.Broken):
            assert pictures.pixels(data[:length], [kind]) == width * height


def test_sizes_of_rare_spellings() -> None:
    rows_from_the_top = (40).to_bytes(4, "little") + b"\x05\0\0\0" + (-7).to_bytes(4, "little", signed=True)
    assert pictures.pixels(b"BM" + bytes(12) + rows_from_the_top, ["BMP"]) == 35
    short_header = (12).to_bytes(4, "little") + b"\x05\0\x07\0"
    assert pictures.pixels(b"BM" + bytes(12) + short_header, ["BMP"]) == 35
    width, height = b"\x01\0\0\x03\0\0\0\x01\0\x05\0\0", b"\x01\x01\0\x04\0\0\0\x01\0\0\0\x07"
    other_width = width[:9] + b"\x09\0\0"
    assert pictures.pixels(b"MM\0\x2a\0\0\0\x08\0\x03" + width + height + other_width, ["TIFF"]) == 63
