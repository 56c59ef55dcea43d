"""Boxes with their names, outlines and points, drawn on images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from acmix_deploy.detection.images import Image, opencv

PALETTE = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#6a51a3", "#8c564b", "#4d4d4d")
"""For classes: those colours of Okabe and Ito on which white text can be read, and three darker ones."""


def draw_box(image: Image, corners: Sequence[float], text: str, colour: str) -> None:
    """Draw into an image [h, w, 3] in BGR.

    Args:
        corners: x1, y1, x2, y2 in pixels.
        text: stands in the box's colour above it, or in it where there is no room; see :func:`label`.
        colour: ``#rrggbb``.

    Raises:
        MissingComponent: OpenCV is not installed.
    """
    cv2, bgr, width = opencv(), _bgr(colour), _width(image)
    left, top, right, bottom = (round(edge) for edge in corners)
    cv2.rectangle(image, (left, top), (right, bottom), bgr, width)
    draw_text(image, (left, top), text, colour)


def draw_text(image: Image, place: tuple[int, int], text: str, colour: str) -> None:
    """The same for a text alone, above the place (x, y)."""
    cv2, bgr, scale = opencv(), _bgr(colour), _width(image) / 4
    left, top, right, base, below = label(image, place, text)
    cv2.rectangle(image, (left, top), (right, base), bgr, cv2.FILLED)
    cv2.putText(image, text, (left, base - below), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)


def label(image: Image, place: tuple[int, int], text: str) -> tuple[int, int, int, int, int]:
    """Where a text for the place (x, y) stands: left, top, right and bottom in pixels, and how far above the bottom its
    letters stand. It is moved into the image, whose left edge counts where it is wider than that."""
    (wide, high), below = opencv().getTextSize(text, opencv().FONT_HERSHEY_SIMPLEX, _width(image) / 4, 1)
    left = max(0, min(place[0], int(image.shape[1]) - wide))
    base = max(place[1], high + below)
    return left, base - high - below, left + wide, base, below


def draw_outlines(image: Image, outlines: Sequence[Sequence[Sequence[float]]], colour: str, *, filled: bool) -> None:
    """Polygons of points (x, y), as lines; or tinted, as a mask."""
    cv2, bgr, width = opencv(), _bgr(colour), _width(image)
    points = [np.array(outline, np.float64).round().astype(np.int32) for outline in outlines]
    if filled and points:
        (left, top), (right, bottom) = (edge(np.vstack(points), axis=0).clip(0) for edge in (np.min, np.max))
        part = image[top : bottom + 1, left : right + 1]
        if part.size:
            tinted = cv2.fillPoly(part.copy(), points, bgr, offset=(-int(left), -int(top)))
            part[:] = cv2.addWeighted(part, 1 - _TINT, tinted, _TINT, 0)
    elif points:
        cv2.polylines(image, points, True, bgr, width)


def draw_points(image: Image, points: Sequence[Sequence[float]], colour: str) -> None:
    """Keypoints (x, y), with how visible they are where that is told: those that are seen."""
    for x, y, *visibility in points:
        if not visibility or visibility[0] > SEEN:
            opencv().circle(image, (round(x), round(y)), 2 * _width(image), _bgr(colour), -1)


SEEN = 0.5
"""Visibility from which on a keypoint counts."""

_TINT = 0.4  # share of the colour in a mask


def _bgr(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))[::-1]


def _width(image: Image) -> int:
    """Of lines, in pixels."""
    return max(2, int(image.shape[1]) // 400)
