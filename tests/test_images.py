"""Images as detectors take them: found, fitted as Ultralytics fits them, and what cannot be read is named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from acmix_deploy.detection.images import Letterbox, batches, find, read, tensor
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
    (tmp_path / "readme.txt").write_text("left alone")
    photos = find(tmp_path)
    assert photos.skipped == ["b.jpg", "d.jpg", "e.jpg"]
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
    image = read(path)
    assert image is not None
    assert not np.array_equal(tensor(Letterbox()(image, 320, 256))[::-1], expected), "red and blue differ"


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
