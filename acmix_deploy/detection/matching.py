"""Which detections of one model are those of another."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from acmix_deploy.detection import rotated
from acmix_deploy.detection.boxes import Detections
from acmix_deploy.detection.images import Boxes

NEAR: Mapping[str, float] = MappingProxyType({"float32": 0.002, "float16": 0.02, "int8": 0.15})
"""Difference of scores that rounding makes, by the type that a model computes in."""

SAME = 0.5
"""Intersection over union from which on two boxes show the same object."""


class Match(NamedTuple):
    """A detection of the reference and what the candidate has in its place; None where one of them has nothing."""

    reference: int | None
    candidate: int | None
    iou: float = 0.0
    tie: bool = False
    """The candidate's box has another class, and as good a score for the reference's."""


def overlaps(first: Boxes, second: Boxes) -> NDArray[np.float64]:
    """Intersection over union of boxes [N, 4] and [M, 4], corners (x1, y1, x2, y2), as [N, M]; 0 for empty boxes."""
    a, b = first[:, None].astype(np.float64), second[None].astype(np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = sides.clip(0).prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(shared), where=union > 0))


def match(reference: Detections, candidate: Detections, confidence: float, near: float) -> list[Match]:
    """Match detections one to one: first those of one class, then what is left by its place.

    Two of one class match where their boxes overlap by :data:`SAME` or more and both scores are above ``confidence``;
    or one is, and the scores differ by at most ``near``, so that a score that crosses the threshold by a little is no
    loss. Of several possible pairs those whose scores are both above come first, then those that overlap more. Boxes of
    no area, which lie beyond the image's edge, are left out.

    A box counts for its best class, and rounding decides between two that are equally good. What is left of the
    reference therefore matches any box at its place that has its class with a score that differs by at most ``near``,
    and is paired otherwise with what is left of the candidate there: the class has changed. What is left of the
    candidate is left out by the same rule the other way round.

    Args:
        reference, candidate: detections in one image, down to ``confidence - near``, so that no match is missed, with
            the scores of every class; without these there are no ties.
        confidence: score above which there is a detection.
        near: difference of scores.

    Returns:
        a match for every detection above ``confidence``, except for those of the candidate alone that are ties; a pair
        of different classes that is no tie is a changed class.
    """
    if reference.corners is None or candidate.corners is None:
        iou = overlaps(reference.boxes, candidate.boxes)
    else:
        iou = rotated.overlaps(reference.corners, candidate.corners, SAME)
    right, found = reference.scores[:, None], candidate.scores[None]
    both, either = np.minimum(right, found) > confidence, np.maximum(right, found) > confidence
    close = either & (np.abs(right - found) <= near)
    same = reference.classes[:, None] == candidate.classes[None]
    place = iou >= SAME
    rank = np.where(both, 2, 1) + iou
    pairs = _pair(np.where(place & same & (both | close), rank, 0), iou)
    matched = {pair.reference for pair in pairs}
    ties = np.where(place & ~same & _as_good(reference, candidate, near), iou, 0)
    for i in _detected(reference, confidence):
        if i not in matched and ties[i].any():
            pairs.append(Match(i, int(ties[i].argmax()), float(ties[i].max()), tie=True))
    pairs += _pair(np.where(place & ~same & both, iou, 0), iou, pairs)
    taken_right, taken_found = {pair.reference for pair in pairs}, {pair.candidate for pair in pairs if not pair.tie}
    excused = (place & ~same & _as_good(candidate, reference, near).T).any(axis=0)
    lost = [Match(i, None) for i in _detected(reference, confidence) if i not in taken_right]
    added = [Match(None, j) for j in _detected(candidate, confidence) if j not in taken_found and not excused[j]]
    return pairs + lost + added


def _as_good(one: Detections, other: Detections, near: float) -> NDArray[np.bool_]:
    """Whether the class of each of N has at each of M a score that differs by at most ``near``, [N, M]."""
    if other.by_class is None:
        return np.zeros((len(one.scores), len(other.scores)), bool)
    return np.asarray(np.abs(other.by_class[:, one.classes].T - one.scores[:, None]) <= near)


def _detected(found: Detections, confidence: float) -> list[int]:
    area = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(axis=1)
    indices: list[int] = np.flatnonzero((found.scores > confidence) & (area > 0)).tolist()
    return indices


def _pair(worth: NDArray[np.float64], iou: NDArray[np.float64], taken: list[Match] | None = None) -> list[Match]:
    """One to one, the pairs worth most first; none that is worth nothing or has a part that is taken."""
    rows = {match.reference for match in taken or ()}
    columns = {match.candidate for match in taken or () if not match.tie}
    pairs = []
    possible = np.argwhere(worth > 0)
    for i, j in possible[np.argsort(-worth[tuple(possible.T)], kind="stable")].tolist():
        if i not in rows and j not in columns:
            rows.add(i)
            columns.add(j)
            pairs.append(Match(i, j, float(iou[i, j])))
    return pairs
