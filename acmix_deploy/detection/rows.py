"""Detections that a model selects itself, compared as sets: rounding decides in which order equal ones come."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from acmix_deploy.detection.heads import Array, Head

_SAME = 1e-2  # of the largest coordinate, or of a score, up to which two rows are the same at first sight


def paired(
    head: Head | None, expected: Mapping[str, Array], actual: Mapping[str, Array], near: float
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The outputs of two runs with each row beside the one that it is, as [1, rows, C]; others stay as they are.

    Of rows that tie at the end of a ranking others may be in it: those without a counterpart whose scores are within
    ``near`` of the lowest are left out, as long as half of the rows stay.

    Args:
        head: what the outputs are; where it does not select, nothing is done.
        expected, actual: by name.
        near: difference of scores.
    """
    right, other = dict(expected), dict(actual)
    if not head or not head.selects or head.output not in other:
        return right, other
    first, second = (outputs[head.output] for outputs in (right, other))
    if first.shape != second.shape or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return right, other
    pairs = [_of_image(head, *images, near) for images in zip(first, second, strict=True)]
    rows = [np.concatenate(side)[None] for side in zip(*pairs, strict=True)]
    if 2 * rows[0].shape[1] < first.shape[0] * first.shape[1]:
        return right, other
    right[head.output], other[head.output] = rows
    return right, other


def _of_image(head: Head, expected: Array, actual: Array, near: float) -> tuple[Array, Array]:
    """The rows [N, C] of one image."""
    first, second = (rows.astype(np.float64) for rows in (expected, actual))
    pixels = max(float(np.abs(first[:, :4]).max(initial=0)), 1e-9)
    scale = np.ones(first.shape[1])
    scale[:4] = pixels
    if head.ranks:
        scale[5] = _SAME  # a class is the same or it is not
    scale[head.width :] = np.maximum(np.abs(first[:, head.width :]).max(axis=0, initial=0), 1e-9)
    distances = np.abs(first[:, None] - second) / scale
    worst = distances.max(axis=2)
    order = np.argsort(worst, axis=None, kind="stable")
    partner = np.full(len(first), -1)
    taken = np.zeros(len(second), bool)
    for place in order.tolist():
        i, j = divmod(place, len(second))
        if partner[i] < 0 and not taken[j]:
            partner[i], taken[j] = j, True
    best = [rows[:, 4] if head.ranks else rows[:, 4 : head.width].max(axis=1) for rows in (first, second)]
    at_end = [scores <= scores.min() + near for scores in best]
    strangers = worst[np.arange(len(first)), partner] > _SAME
    excused = strangers & at_end[0] & at_end[1][partner]
    return expected[~excused], actual[partner[~excused]]
