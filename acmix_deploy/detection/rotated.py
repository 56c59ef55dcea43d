"""Rotated boxes of the task "obb": (x, y, width, height, angle), the angle in radians."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_LEAST = 1e-7
_AT_ONCE = 256  # boxes that are compared with all better ones
_FAR = 100.0  # a distance from which on boxes share nothing


def corners(boxes: Array) -> Array:
    """Boxes [N, 5] as their corners [N, 4, 2], in order around the box."""
    middle, sides, angle = boxes[:, None, :2], boxes[:, 2:4, None] / 2, boxes[:, 4]
    cos, sin = np.cos(angle), np.sin(angle)
    along = sides[:, 0] * np.stack((cos, sin), axis=1)
    across = sides[:, 1] * np.stack((-sin, cos), axis=1)
    return np.asarray(middle + np.stack((along + across, along - across, -along - across, across - along), axis=1))


def similarities(first: Array, second: Array) -> Array:
    """How much each of N boxes is like each of M others, [N, M], 1 for equal ones.

    1 minus the Hellinger distance of normal distributions of the boxes' places and extents.
    Source: Llerena et al., "Gaussian Bounding Boxes and Probabilistic Intersection-over-Union", arXiv:2106.06072,
    equations 6 to 9 and 12.
    """
    one, other = (_distribution(boxes) for boxes in (first, second))
    sum_a, sum_b, sum_c = (u[:, None] + v for u, v in zip(one[:3], other[:3], strict=True))
    dx, dy = (u[:, None] - v for u, v in zip(one[3:], other[3:], strict=True))
    both = sum_a * sum_b - sum_c**2
    own = [(a * b - c**2).clip(0) for a, b, c, *_ in (one, other)]
    near = (sum_a * dy**2 + sum_b * dx**2) / 4 / (both + _LEAST) - sum_c * dx * dy / 2 / (both + _LEAST)
    alike = np.log(both / (4 * np.sqrt(own[0][:, None] * own[1]) + _LEAST) + _LEAST) / 2
    distance = (near + alike).clip(_LEAST, _FAR)
    return np.asarray(1 - np.sqrt(1 - np.exp(-distance) + _LEAST))


def _distribution(boxes: Array) -> tuple[Array, Array, Array, Array, Array]:
    """The covariances (a, b, c) of x and x, y and y, x and y, and the means x and y."""
    wide, high = boxes[:, 2] ** 2 / 12, boxes[:, 3] ** 2 / 12
    cos, sin = np.cos(boxes[:, 4]), np.sin(boxes[:, 4])
    a, b, c = wide * cos**2 + high * sin**2, wide * sin**2 + high * cos**2, (wide - high) * cos * sin
    return a, b, c, boxes[:, 0], boxes[:, 1]


def kept(boxes: Array, scores: Array, classes: Array, iou: float) -> NDArray[np.int64]:
    """Indices of the boxes [N, 5] that no better one of their class is like by more than ``iou``, the best first.

    Also one that is left out leaves others out, as in Ultralytics ("fast NMS", Bolya et al., "YOLACT", 2019).
    """
    order = np.argsort(-scores, kind="stable")
    boxes, classes = boxes[order].astype(np.float64), classes[order]
    best = np.ones(len(order), bool)
    for kind in np.unique(classes):
        (places,) = np.nonzero(classes == kind)
        for start in range(0, len(places), _AT_ONCE):
            these = places[start : start + _AT_ONCE]
            better = places[: start + len(these)]
            like = (similarities(boxes[better], boxes[these]) > iou) & (better[:, None] < these)
            best[these] = ~like.any(axis=0)
    return np.asarray(order[best])


def overlaps(first: Array, second: Array, least: float = 0.0) -> NDArray[np.float64]:
    """Intersection over union of boxes by their corners in order, [N, 4, 2] and [M, 4, 2], as [N, M].

    OpenCV's ``intersectConvexConvex`` is off by some percent for boxes that are all but equal.

    Args:
        least: pairs that surely overlap by less are 0, which saves most of the time.
    """
    first, second = first.astype(np.float64), second.astype(np.float64)
    found = np.zeros((len(first), len(second)))
    if not found.size:
        return found
    sides = np.minimum(first.max(axis=1)[:, None], second.max(axis=1))
    sides = sides - np.maximum(first.min(axis=1)[:, None], second.min(axis=1))
    areas = [np.array([_area(box) for box in boxes]) for boxes in (first, second)]
    most = np.minimum(sides.clip(0).prod(axis=2), np.minimum(areas[0][:, None], areas[1]))
    both = areas[0][:, None] + areas[1]
    for i, j in np.argwhere((most > 0) & (most >= least * (both - most))).tolist():
        shared = _area(_within(first[i], second[j]))
        found[i, j] = shared / (both[i, j] - shared)
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
