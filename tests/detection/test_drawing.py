"""Where the texts of boxes stand."""

from __future__ import annotations

import numpy as np
import pytest

from acmix_deploy.detection.drawing import draw_box, label

pytest.importorskip("cv2", reason="needs opencv")


@pytest.mark.parametrize("place", [(40, 60), (150, 60), (40, 2), (-30, 60), (155, -5)])
def test_a_label_stands_in_the_image(place: tuple[int, int]) -> None:
    """Above its place where there is room, else as near to it as the image lets it."""
    image = np.zeros((160, 160, 3), np.uint8)
    left, top, right, bottom, below = label(image, place, "ring 0.50")
    assert 0 <= left < right <= 160
    assert 0 <= top < bottom <= 160
    assert 0 < below < bottom - top
    wide, high = right - left, bottom - top
    assert left == min(max(place[0], 0), 160 - wide)
    assert bottom == max(place[1], high)


def test_a_label_wider_than_the_image_begins_at_its_left_edge() -> None:
    assert label(np.zeros((40, 40, 3), np.uint8), (30, 30), "a name as long as this one 0.50")[0] == 0


def test_what_is_drawn_is_where_the_label_says() -> None:
    image = np.zeros((160, 160, 3), np.uint8)
    left, top, right, bottom, _ = label(image, (140, 80), "ring 0.50")
    draw_box(image, (140, 80, 158, 100), "ring 0.50", "#0072b2")
    filled = (image[top : bottom + 1, left : min(right + 1, 160)] != 0).any(axis=2)
    assert filled.all(), "the letters stand on their ground"
    outside = image.copy()
    outside[top : bottom + 1, left : right + 1] = 0
    outside[78:103] = 0  # the box
    assert not outside.any()
