"""The picture of the README: drawn from what two files find."""

from __future__ import annotations

import numpy as np
import pytest

from acmix_deploy.detection.boxes import Detection
from acmix_deploy.verify.detections import DetectionComparison, DetectionPair, ImageComparison
from acmix_deploy.verify.limits import DETECTION_LIMITS
from scripts import bench_detector, shapes

SIDE, GAP, TITLE = 520, 20, 56


def test_what_is_found_is_drawn_where_it_is(tmp_path):
    """Above what the first file finds, below what the last one does; the images with the most classes come first."""
    cv2 = pytest.importorskip("cv2", reason="needs opencv")
    images = sorted(shapes.write(tmp_path, seed=4, count=4).iterdir())
    boxes = [(20.0, 40.0, 60.0, 80.0), (90.0, 90.0, 130.0, 140.0)]
    ring, star = (Detection(name=name, score=0.5, box=box) for name, box in zip(("ring", "star"), boxes, strict=True))
    both = DetectionPair(reference=ring, candidate=ring, iou=1)
    lost, added = (
        DetectionPair(reference=star, candidate=None, iou=0),
        DetectionPair(reference=None, candidate=star, iou=0),
    )
    pairs = [(both,), (both, added), (both,), (both, lost)]
    found = DetectionComparison(
        candidate="int8",
        precision="int8",
        confidence=0.25,
        images=[
            ImageComparison(image=image, size=(160, 160), pairs=each) for image, each in zip(images, pairs, strict=True)
        ],
        limits=DETECTION_LIMITS["int8"],
    )
    bench_detector.draw(found, tmp_path / "found.webp")
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
