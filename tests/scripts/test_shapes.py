"""Drawn shapes: the same for a seed, and labelled as they are drawn."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from scripts import shapes

AREAS = {  # of the shape in a circle of radius 1
    "circle": math.pi,
    "ring": math.pi * (1 - 0.55**2),
    "square": 2.0,
    "triangle": 3 * math.sqrt(3) / 4,
    "star": 10 * 0.4 * math.sin(math.pi / 5) / 2,
    "cross": 2 * 1.9 * 0.6 - 0.6**2,
}


def test_a_seed_draws_the_same_on_every_machine():
    digest = hashlib.sha256()
    for scene in shapes.images(7, 10):
        digest.update(scene.image.tobytes() + shapes.labels(scene).encode())
    assert digest.hexdigest() == "49e33c33365c3a56c6824fcc926afe7284816d1edfc874231d57652c63ec66aa"


@pytest.mark.parametrize("name", shapes.NAMES)
@pytest.mark.parametrize("turn", [0.0, 0.37])
def test_area_and_box_of_a_shape(name, turn):
    coverage, box = shapes._rasterise(name, x=300, y=250, radius=100, turn=turn)
    assert coverage.sum() / 100**2 == pytest.approx(AREAS[name], rel=0.02)
    rows, columns = np.nonzero(coverage)
    extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    inwards = (box - extent) * [1, 1, -1, -1]
    assert ((inwards >= 0) & (inwards < 1)).all(), "less than the pixel that the shape covers in part"
    centre = (columns + 0.5) @ coverage[rows, columns] / coverage.sum()
    assert centre == pytest.approx(300 / 4, abs=0.25), "a position is a quarter of a pixel"


def test_scenes_hold_small_and_overlapping_shapes_of_all_classes():
    scenes = list(shapes.images(7, 60))
    assert {int(kind) for scene in scenes for kind in scene.classes} == set(range(len(shapes.NAMES)))
    boxes = np.concatenate([scene.boxes for scene in scenes])
    assert boxes.min() >= 0
    assert boxes.max() <= shapes.SIZE
    widths = boxes[:, 2] - boxes[:, 0]
    assert (widths > 6).all()
    assert (widths < 16).mean() > 0.2
    assert (widths > 40).any()
    assert sum(overlaps(scene.boxes) for scene in scenes) > 20


def overlaps(boxes):
    low, high = np.maximum(boxes[:, None, :2], boxes[:, :2]), np.minimum(boxes[:, None, 2:], boxes[:, 2:])
    return (high > low).all(-1).sum() > len(boxes)


def test_enough_of_every_shape_is_seen(monkeypatch):
    drawn = []
    rasterise = shapes._rasterise
    monkeypatch.setattr(shapes, "_rasterise", lambda *shape: drawn.append(rasterise(*shape)) or drawn[-1])
    hidden = 0
    for scene in shapes.images(7, 40):
        kept = {tuple(box) for box in scene.boxes.tolist()}
        covered = [coverage >= 8 for coverage, box in drawn if tuple(box) in kept]
        assert len(covered) == len(scene.boxes)
        for index, mask in enumerate(covered):
            seen = mask & ~np.any(covered[index + 1 :], axis=0)
            assert seen.sum() >= 0.6 * mask.sum()
            hidden += seen.sum() < mask.sum()
        drawn.clear()
    assert hidden > 10


def test_written_labels_are_the_boxes(tmp_path):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    folder = shapes.write(tmp_path, 7, 2)
    for index, scene in enumerate(shapes.images(7, 2)):
        np.testing.assert_array_equal(cv2.imread(str(folder / f"000{index}.png")), scene.image)
        kinds, x, y, width, height = np.loadtxt(tmp_path / f"labels/000{index}.txt", ndmin=2).T
        corners = np.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], 1) * shapes.SIZE
        np.testing.assert_array_equal(kinds, scene.classes)
        np.testing.assert_allclose(corners, scene.boxes, atol=1e-3)


def test_a_data_set_is_described_to_ultralytics(tmp_path, monkeypatch, capsys):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    pytest.importorskip("cv2", reason="OpenCV is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["shapes.py", "drawn", "--train", "3", "--val", "2"])
    shapes.main()
    assert capsys.readouterr().out == "drawn: drawn/data.yaml\n"
    told = yaml.safe_load((tmp_path / "drawn/data.yaml").read_text())
    assert told["names"] == dict(enumerate(shapes.NAMES))
    for split, count in (("train", 3), ("val", 2)):
        images = Path(told["path"]) / told[split]
        assert len(list(images.glob("*.png"))) == count
        assert len(list((images.parent / "labels").glob("*.txt"))) == count
    first, other = (tmp_path / f"drawn/{split}/images/0000.png" for split in ("train", "val"))
    assert first.read_bytes() != other.read_bytes()
