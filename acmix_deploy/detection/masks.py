"""Masks of the task "segment": made of prototypes for each box, kept where the box is."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from acmix_deploy.detection.images import Boxes, Placement, opencv

Polygon = list[tuple[float, float]]


class Mask(NamedTuple):
    """The pixels of an object in the original image."""

    top: int
    left: int
    pixels: NDArray[np.bool_]
    """[h, w], from that row and column on; what is outside is not the object."""

    def polygons(self) -> list[Polygon]:
        """Its outlines, one for each part, as points (x, y) in pixels of the original image."""
        cv2 = opencv()
        found, _ = cv2.findContours(self.pixels.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        return [[(float(x + self.left), float(y + self.top)) for x, y in points.reshape(-1, 2)] for points in found]

    def overlap(self, other: Mask) -> float:
        """Intersection over union of two masks; 1 for two that are empty."""
        first, second = self._corners(), other._corners()
        top, left = (max(pair) for pair in zip(first[:2], second[:2], strict=True))
        bottom, right = (min(pair) for pair in zip(first[2:], second[2:], strict=True))
        parts = [
            mask.pixels[top - mask.top : max(bottom, top) - mask.top, left - mask.left : max(right, left) - mask.left]
            for mask in (self, other)
        ]
        shared = int((parts[0] & parts[1]).sum()) if bottom > top and right > left else 0
        union = int(self.pixels.sum()) + int(other.pixels.sum()) - shared
        return shared / union if union else 1.0

    def _corners(self) -> tuple[int, int, int, int]:
        height, width = self.pixels.shape
        return self.top, self.left, self.top + height, self.left + width


def masks_of(prototypes: NDArray[Any], coefficients: NDArray[Any], boxes: Boxes, placement: Placement) -> list[Mask]:
    """The mask of each box: the sum of the prototypes, enlarged to the original image, where it is positive.

    Args:
        prototypes: [E, h, w], of the whole canvas.
        coefficients: [N, E].
        boxes: [N, 4], corners in pixels of the original image; a pixel belongs to a box by its index.
        placement: of the image.

    Source: Bolya et al., "YOLACT", 2019, section 3.2; enlarged first to the canvas and then to the image, as
    Ultralytics does with ``retina_masks=True``.
    """
    (height, width), (rows, columns) = placement.original, placement.fitted
    found = []
    for values, box in zip(coefficients.astype(np.float32), boxes, strict=True):
        sums = np.tensordot(values, prototypes.astype(np.float32), 1)
        canvas = opencv().resize(sums, placement.canvas[::-1])
        part = canvas[placement.top : placement.top + rows, placement.left : placement.left + columns]
        left, top, right, bottom = np.ceil(box).astype(int).tolist()
        lines = _sampled(part, _places(top, min(bottom, height), rows / height), 0)
        found.append(Mask(top, left, _sampled(lines, _places(left, min(right, width), columns / width), 1) > 0))
    return found


def _places(start: int, end: int, scale: float) -> NDArray[np.float64]:
    return np.asarray((np.arange(start, end) + 0.5) * scale - 0.5)


def _sampled(image: NDArray[Any], places: NDArray[np.float64], axis: int) -> NDArray[Any]:
    """Linear between the two nearest rows, or columns; as at the edge beyond it."""
    last = image.shape[axis] - 1
    places = places.clip(0, last)
    low = np.floor(places).astype(int)
    share = (places - low).reshape((-1, 1) if axis == 0 else (1, -1)).astype(np.float32)
    first, second = image.take(low, axis), image.take(np.minimum(low + 1, last), axis)
    return np.asarray(first + (second - first) * share)
