"""Images as detectors take them: found, fitted as Ultralytics fits them, and what cannot be read is named."""

from __future__ import annotations

import os
import sys
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acmix_deploy.detection.images import Fitter, Letterbox, batches, find, read, tensor
from acmix_deploy.detection.listing import IMAGE_SUFFIXES
from acmix_deploy.detection.metadata import Pixels
from acmix_deploy.detection.pictures import MAX_PIXELS, NoPicture, TooLarge
from acmix_deploy.errors import MissingComponent, UserError

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


def test_fitted_padded_and_turned_to_rgb(tmp_path: Path) -> None:
    blue_wide = np.zeros((10, 40, 3), np.uint8)
    blue_wide[..., 0] = 255  # OpenCV's order is BGR
    cv2.imwrite(str(tmp_path / "a.png"), blue_wide)
    cv2.imwrite(str(tmp_path / "c.PNG"), np.full((32, 32, 3), 51, np.uint8))
    (tmp_path / "b.jpg").write_bytes(b"not an image")
    (tmp_path / "d.jpg").touch()
    (tmp_path / "e.jpg").mkdir()
    os.mkfifo(tmp_path / "f.jpg")
    (tmp_path / "readme.txt").write_text("left alone")
    photos = find(tmp_path)
    assert list(photos.skipped) == ["b.jpg", "d.jpg", "e.jpg", "f.jpg"]
    assert photos.skipped["f.jpg"] == "it is no regular file", "nobody may ever write to it"
    assert photos.skipped["b.jpg"] == "not a picture in one of JPEG, PNG, WEBP, BMP, TIFF"
    first, second = batches(photos.paths, [(1, 3, 16, 16), (2, 3, 32, 64)])
    assert (first.shape, second.shape) == ((1, 3, 16, 16), (2, 3, 32, 64))
    wide = first[0]
    assert wide.dtype == np.float32
    np.testing.assert_allclose(wide[:, 6:10], np.array([0, 0, 1]).reshape(3, 1, 1) * np.ones((3, 4, 16)))
    np.testing.assert_allclose(wide[:, [5, 10]], 114 / 255, rtol=1e-6)
    square, wide_again = second
    np.testing.assert_allclose(square[:, :, 16:48], 51 / 255, rtol=1e-6)
    np.testing.assert_allclose(square[:, :, [15, 48]], 114 / 255, rtol=1e-6)
    np.testing.assert_allclose(wide_again[2, 8:24], 1)
    assert [path.name for path in find(tmp_path, limit=1).paths] == ["a.png"]


SIZES = [(640, 640), (160, 224), (33, 97), (64, 64)]
IMAGES = [(480, 640), (1080, 810), (37, 53), (1, 900), (64, 64), (3, 2), (511, 1023)]


@pytest.mark.parametrize("rule", [{}, {"center": False}, {"scaleup": False}, {"padding_value": 0}], ids=str)
def test_the_letterbox_is_that_of_ultralytics(rule: dict[str, bool | int]) -> None:
    augment = pytest.importorskip("ultralytics.data.augment", reason="ultralytics is not installed")
    random = np.random.default_rng(0)
    for height, width in IMAGES:
        image = random.integers(0, 256, (height, width, 3), np.uint8)
        for size in SIZES:
            expected = augment.LetterBox(size, auto=False, **rule)(image=image)
            np.testing.assert_array_equal(Letterbox(**rule)(image, *size), expected, err_msg=f"{image.shape} {size}")


def test_a_photograph_is_what_ultralytics_feeds_its_models() -> None:
    ultralytics = pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    augment = pytest.importorskip("ultralytics.data.augment")
    path = Path(ultralytics.__file__).parent / "assets" / "bus.jpg"
    fitted = augment.LetterBox((320, 256), auto=False)(image=cv2.imread(str(path)))
    expected = np.ascontiguousarray(fitted[..., ::-1].transpose(2, 0, 1)).astype(np.float32) / 255
    (batch,) = batches([path], [(1, 3, 320, 256)])
    np.testing.assert_array_equal(batch[0], expected)
    assert not np.array_equal(tensor(Letterbox()(read(path), 320, 256))[::-1], expected), "red and blue differ"


def plain_floats(image: np.ndarray) -> np.ndarray:
    """[3, H, W] in RGB of an image in BGR, by its definition."""
    return np.stack([image[:, :, channel].astype(np.float32) / np.float32(255) for channel in (2, 1, 0)])


def plain_letterbox(rule: Letterbox, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image resized into an array of its own, then laid into a new canvas."""
    if rule.fit == "crop":
        return rule(image, *size)  # compared with Pillow in test_heads.py
    placed = rule.place(image.shape, *size)
    canvas = np.empty((*size, 3), np.uint8)
    canvas[...] = rule.padding_value
    small = cv2.resize(image, placed.fitted[::-1])
    canvas[placed.top :, placed.left :][: small.shape[0], : small.shape[1]] = small
    return canvas


def test_every_level_becomes_a_float_as_by_division() -> None:
    levels = np.arange(256, dtype=np.uint8)
    image = np.stack([levels, levels[::-1], np.roll(levels, 7)], axis=-1).reshape(16, 16, 3)
    np.testing.assert_array_equal(tensor(image), plain_floats(image))
    assert (tensor(image) != image[:, :, ::-1].transpose(2, 0, 1) * np.float32(1 / 255)).any(), "a product differs"
    half = np.empty((3, 16, 16), np.float16)
    Fitter(Letterbox(), 16, 16)(image, half)
    np.testing.assert_array_equal(half, plain_floats(image).astype(np.float16))
    for turned in (image[::-1], image[:, ::2], image.transpose(1, 0, 2), image[:1], image[:, :1], image[:1, :1]):
        np.testing.assert_array_equal(tensor(turned), plain_floats(turned))


@pytest.mark.parametrize("pixels", [None, "rgb", "bgr"])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"center": False},
        {"scaleup": False},
        {"padding_value": 0},
        {"fit": "stretch"},
        {"fit": "crop"},
    ],
    ids=str,
)
def test_memory_that_is_used_again_keeps_nothing_of_the_image_before(rule: dict[str, Any], pixels: Pixels) -> None:
    random, letterbox = np.random.default_rng(0), Letterbox(**rule)
    sizes = [(48, 64), (48, 64), (24, 32), (108, 81), (37, 53), (1, 90), (64, 64), (3, 2), (1, 1), (10, 1), (10, 1)]
    for size in [(64, 64), (32, 48), (33, 19)]:
        fitter = Fitter(letterbox, *size, pixels)
        batch = np.full((2, *size, 3) if pixels else (2, 3, *size), 9, np.uint8 if pixels else np.float32)
        for count, index in enumerate([*range(len(sizes)), *random.permutation(len(sizes))]):
            image = random.integers(0, 256, (*sizes[index], 3), np.uint8)
            other = batch[1 - count % 2].copy()
            placed = fitter(image, batch[count % 2])
            canvas = plain_letterbox(letterbox, image, size)
            expected = plain_floats(canvas) if pixels is None else canvas if pixels == "bgr" else canvas[..., ::-1]
            np.testing.assert_array_equal(batch[count % 2], expected, err_msg=f"{sizes[index]} in {size}")
            np.testing.assert_array_equal(batch[1 - count % 2], other)
            assert placed == letterbox.place(image.shape, *size)


def test_fitting_allots_nothing_that_grows_with_the_image() -> None:
    fitter, place = Fitter(Letterbox(), 320, 320), np.zeros((3, 320, 320), np.float32)
    image = np.zeros((480, 640, 3), np.uint8)
    fitter(image, place)
    tracemalloc.start()
    fitter(image, place)
    assert tracemalloc.get_traced_memory()[1] < 20_000, "not even the rows of one plane"
    tracemalloc.stop()


def test_images_that_cannot_be_had_are_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for folder, words in ((tmp_path / "absent", "not a folder"), (tmp_path, "no readable image .tried broken.png")):
        with pytest.raises(UserError, match=words):
            find(folder)
    for shape in ((1, 4, 8, 8), (1, 3)):
        with pytest.raises(UserError, match="not colour images"):
            next(batches([tmp_path / "broken.png"], [shape]))
    with pytest.raises(UserError, match="cannot be read now"):
        next(batches([tmp_path / "broken.png"], [(1, 3, 8, 8)]))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingComponent, match=r"OpenCV.*\n.*acmix-deploy\[images\]"):
        find(tmp_path)


def bomb(side: int) -> bytes:
    """A black PNG of ``side`` x ``side`` pixels in few bytes."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(side // 8 + 2)) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture
def no_limit(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """In the environment."""
    monkeypatch.delenv("OPENCV_IO_MAX_IMAGE_PIXELS", raising=False)
    return monkeypatch


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, no_limit: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb(30_000))
    assert path.stat().st_size < 1 << 20
    no_limit.setattr(cv2, "imdecode", lambda *arguments: pytest.fail("it was decoded"))
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(TooLarge, match=r"the picture is 30000 x 30000: at most 33\.6 million pixels .*--max-pixels"):
        read(path)
    assert time.process_time() - start < 0.5
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    with pytest.raises(UserError, match=r"no readable image \(tried bomb\.png: the picture is 30000 x 30000"):
        find(tmp_path)


def test_a_limit_can_be_raised_and_lowered(tmp_path: Path, no_limit: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(bomb(6_000))
    with pytest.raises(TooLarge):
        read(path)
    no_limit.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", str(6_000**2))
    assert read(path).shape == (6_000, 6_000, 3)
    no_limit.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", str(6_000**2 - 1))
    with pytest.raises(TooLarge, match="at most 36"):
        read(path)
    no_limit.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", "many")
    with pytest.raises(UserError, match="OPENCV_IO_MAX_IMAGE_PIXELS is 'many'"):
        read(path)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_kind_of_file_is_bounded(tmp_path: Path, suffix: str, no_limit: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a{suffix}"
    cv2.imwrite(str(path), np.zeros((30, 41, 3), np.uint8))
    assert read(path).shape == (30, 41, 3)
    no_limit.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", str(30 * 41 - 1))
    no_limit.setattr(cv2, "imdecode", lambda *arguments: pytest.fail("it was decoded"))
    with pytest.raises(TooLarge, match="41 x 30"):
        read(path)


def test_what_opencv_reads_besides_is_no_image(tmp_path: Path) -> None:
    """Its size would not be known before it is decoded."""
    assert cv2.imwrite(str(tmp_path / "a.ppm"), np.zeros((30, 41, 3), np.uint8))
    with pytest.raises(NoPicture, match="JPEG, PNG, WEBP, BMP, TIFF"):
        read((tmp_path / "a.ppm").rename(tmp_path / "a.png"))


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path, no_limit: pytest.MonkeyPatch) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(8 * MAX_PIXELS + 1)  # takes no room on a disk
    no_limit.setattr(Path, "read_bytes", lambda path: pytest.fail("it was read"))
    with pytest.raises(TooLarge, match="bytes"):
        read(tmp_path / "a.png")
