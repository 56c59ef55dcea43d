"""The picture of the README: drawn from what two files find."""

from __future__ import annotations

import numpy as np
import pytest

from acmix_deploy.detection.boxes import Detection
from acmix_deploy.verify.detections import DetectionComparison, DetectionPair, ImageComparison
from acmix_deploy.verify.limits import DETECTION_LIMITS
from scripts import bench_detector, shapes

SIDE, GAP, TITLE = 380, 16, 40


def test_what_is_found_is_drawn_where_it_is(tmp_path):
    """Above what the first file finds, below what the other one does, in images in which the first one is right; those
    with the most classes come first."""
    cv2 = pytest.importorskip("cv2", reason="needs opencv")
    images = sorted(shapes.write(tmp_path, seed=4, count=5).iterdir())
    boxes = [(20.0, 40.0, 60.0, 80.0), (90.0, 90.0, 130.0, 140.0)]
    ring, star = (Detection(name=name, score=0.5, box=box) for name, box in zip(("ring", "star"), boxes, strict=True))
    both = DetectionPair(reference=ring, candidate=ring, iou=1)
    lost, added = (
        DetectionPair(reference=star, candidate=None, iou=0),
        DetectionPair(reference=None, candidate=star, iou=0),
    )
    pairs = [(both,), (both, added), (both,), (both, lost), (both, lost)]
    right = [["ring"], ["ring"], ["ring"], ["ring", "star"], ["ring"]]
    image = np.zeros((160, 160, 3), np.uint8)
    scenes = [
        shapes.Scene(image, np.array(boxes[: len(names)], np.float32), np.array([shapes.NAMES.index(n) for n in names]))
        for names in right
    ]
    found = DetectionComparison(
        candidate="int8",
        precision="int8",
        confidence=0.25,
        images=[
            ImageComparison(image=image, size=(160, 160), pairs=each) for image, each in zip(images, pairs, strict=True)
        ],
        limits=DETECTION_LIMITS["int8"],
    )
    bench_detector.draw(found, scenes, tmp_path / "found.webp")
    drawn = cv2.imread(str(tmp_path / "found.webp"), cv2.IMREAD_UNCHANGED)
    assert drawn.shape == (2 * (SIDE + TITLE), 3 * SIDE + 2 * GAP, 4)
    assert not drawn[TITLE : TITLE + SIDE, SIDE + 4 : SIDE + GAP - 4, 3].any(), "nothing is between the images"

    def has(row, column, box, name):
        """Whether the lower edge of a box is drawn in the colour of its class."""
        left, bottom, right = (round(box[edge] * SIDE / shapes.SIZE) for edge in (0, 3, 2))
        y, x = row * (SIDE + TITLE) + TITLE + bottom, column * (SIDE + GAP)
        colour = bytes.fromhex(bench_detector.PALETTE[shapes.NAMES.index(name)][1:])[::-1]
        edge = drawn[y - 1 : y + 2, x + left + 10 : x + right - 10, :3].astype(int)
        return np.abs(edge - list(colour)).sum(-1).min(0).mean() < 60

    shown = [images[3], images[0], images[1]]
    for column, image in enumerate(shown):
        for row, side in enumerate(("reference", "candidate")):
            expected = [getattr(pair, side) for pair in pairs[images.index(image)] if getattr(pair, side)]
            for detection in (ring, star):
                assert has(row, column, detection.box, detection.name) == (detection in expected), (row, column)


def test_right_is_every_shape_once_with_its_class_and_nothing_else():
    boxes = np.array([[20, 40, 60, 80], [90, 90, 130, 140]], np.float32)
    scene = shapes.Scene(np.zeros((160, 160, 3), np.uint8), boxes, np.array([1, 4]))
    ring, star = (
        Detection(name=name, score=0.5, box=tuple(map(float, box)))
        for name, box in zip(("ring", "star"), boxes, strict=True)
    )
    assert bench_detector.is_right([star, ring], scene)
    assert not bench_detector.is_right([ring], scene), "one is missing"
    assert not bench_detector.is_right([], scene)
    assert not bench_detector.is_right([ring, star, star], scene), "one is found twice"
    assert not bench_detector.is_right([ring, ring], scene)
    assert not bench_detector.is_right([ring, star.model_copy(update={"name": "cross"})], scene)
    assert not bench_detector.is_right([ring, star.model_copy(update={"box": (50.0, 90.0, 90.0, 140.0)})], scene)


@pytest.mark.parametrize(
    ("second", "clear"),
    [((90, 90, 130, 140), True), ((30, 38, 70, 78), False), ((5, 10, 155, 150), False), ((15, 30, 40, 80), False)],
)
def test_names_have_to_be_readable(tmp_path, second, clear):
    """Neither on another one nor in another box."""
    pytest.importorskip("cv2", reason="needs opencv")
    pairs = [
        DetectionPair(reference=found, candidate=found, iou=1)
        for box in ((20, 40, 60, 80), second)
        for found in [Detection(name="ring", score=0.5, box=box)]
    ]
    image = ImageComparison(image=tmp_path / "0000.png", size=(160, 160), pairs=pairs)
    assert bench_detector._clear(image) == clear
