"""Rotated boxes of the task "obb": (x, y, width, height, angle), the angle in radians."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LEAST = 1e-7
_FAR = 100.0  # a distance from which on boxes share nothing


def corners(boxes: Array) -> Array:
    """Boxes [N, 5] as their corners [N, 4, 2], in order around the box."""
    middle, sides, angle = boxes[:, None, :2], boxes[:, 2:4, None] / 2, boxes[:, 4]
    cos, sin = np.cos(angle), np.sin(angle)
    along = sides[:, 0] * np.stack((cos, sin), axis=1)
    across = sides[:, 1] * np.stack((-sin, cos), axis=1)
    return np.asarray(middle + np.stack((along + across, along - across, -along - across, across - along), axis=1))


def similarities(boxes: Array) -> Array:
    """How much each of N boxes is like each other one, [N, N], 1 for equal ones.

    1 minus the Hellinger distance of normal distributions of the boxes' places and extents.
    Source: Llerena et al., "Gaussian Bounding Boxes and Probabilistic Intersection-over-Union", arXiv:2106.06072,
    equations 6 to 9 and 12.
    """
    x, y = boxes[:, 0], boxes[:, 1]
    wide, high = boxes[:, 2] ** 2 / 12, boxes[:, 3] ** 2 / 12
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    a, b, c = wide * cos**2 + high * sin**2, wide * sin**2 + high * cos**2, (wide - high) * cos * sin
    (sum_a, sum_b, sum_c), (dx, dy) = (v[:, None] + v for v in (a, b, c)), (v[:, None] - v for v in (x, y))
    both = sum_a * sum_b - sum_c**2
    own = (a * b - c**2).clip(0)
    near = (sum_a * dy**2 + sum_b * dx**2) / 4 / (both + _LEAST) - sum_c * dx * dy / 2 / (both + _LEAST)
    alike = np.log(both / (4 * np.sqrt(own[:, None] * own) + _LEAST) + _LEAST) / 2
    distance = (near + alike).clip(_LEAST, _FAR)
    return np.asarray(1 - np.sqrt(1 - np.exp(-distance) + _LEAST))


def kept(boxes: Array, scores: Array, classes: Array, iou: float) -> NDArray[np.int64]:
    """Indices of the boxes [N, 5] that no better one of their class is like by more than ``iou``, the best first.

    Also one that is left out leaves others out, as in Ultralytics ("fast NMS", Bolya et al., "YOLACT", 2019).
    """
    order = np.argsort(-scores, kind="stable")
    boxes, classes = boxes[order].astype(np.float64), classes[order]
    like = np.triu((similarities(boxes) > iou) & (classes[:, None] == classes), 1)
    return np.asarray(order[~like.any(axis=0)])


def overlaps(first: Array, second: Array) -> NDArray[np.float64]:
    """Intersection over union of boxes by their corners in order, [N, 4, 2] and [M, 4, 2], as [N, M].

    OpenCV's ``intersectConvexConvex`` is off by some percent for boxes that are all but equal.
    """
    found = np.zeros((len(first), len(second)))
    ends = [(boxes.min(axis=1), boxes.max(axis=1)) for boxes in (first, second)]
    near = (ends[0][1][:, None] > ends[1][0]).all(axis=2) & (ends[1][1] > ends[0][0][:, None]).all(axis=2)
    for i, j in np.argwhere(near).tolist():
        one, other = first[i].astype(np.float64), second[j].astype(np.float64)
        shared = _area(_within(one, other))
        union = _area(one) + _area(other) - shared
        found[i, j] = shared / union if union > 0 else 0
    return found


def _area(corners: Array) -> float:
    x, y = corners.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _within(polygon: Array, box: Array) -> Array:
    """The part of a convex polygon that lies in a box: cut off along one edge after the other (Sutherland, Hodgman)."""
    for start, end in zip(box, np.roll(box, -1, axis=0), strict=True):
        inwards = np.array([start[1] - end[1], end[0] - start[0]])
        sides = (polygon - start) @ inwards * np.sign((box.mean(axis=0) - start) @ inwards)
        kept = []
        for index, (point, side) in enumerate(zip(polygon, sides, strict=True)):
            before, other = polygon[index - 1], sides[index - 1]
            if side * other < 0:
                kept.append(before + (point - before) * other / (other - side))
            if side >= 0:
                kept.append(point)
        polygon = np.array(kept).reshape(-1, 2)
        if not len(polygon):
            break
    return polygon
