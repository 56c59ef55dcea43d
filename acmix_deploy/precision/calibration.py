"""Ranges of activations, from what they are on the user's images.

ONNX Runtime's own calibrators are not used: its entropy method has as many bins as levels by default, and so chooses
the full range always; with more bins it takes minutes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Method = Literal["entropy", "percentile", "minmax"]

_BINS = 2048
_LEVELS = 128  # of the magnitudes of int8
_STEP = 8  # bins between the thresholds that entropy tries
_PERCENTILE = 0.9999


class Magnitudes:
    """Histogram of the absolute values of one tensor; its bins double in width when a value is beyond the last."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(_BINS, np.int64)
        self.largest = 0.0
        self._width = 0.0

    def add(self, values: NDArray[np.float32]) -> None:
        """Count the values of one more image, of any shape; those not finite are left out."""
        magnitudes = np.abs(values[np.isfinite(values)])
        largest = float(magnitudes.max(initial=0))
        self.largest = max(self.largest, largest)
        if not self._width:
            self._width = largest / _BINS
        if not self._width:  # nothing but zeros so far
            self.counts[0] += magnitudes.size
            return
        while largest > _BINS * self._width:
            self.counts = np.concatenate((self.counts.reshape(-1, 2).sum(1), np.zeros(_BINS // 2, np.int64)))
            self._width *= 2
        self.counts += np.histogram(magnitudes, _BINS, (0, _BINS * self._width))[0]

    def threshold(self, method: Method) -> float:
        """The magnitude that becomes 127, at most the largest one seen.

        ``minmax`` takes that one; ``percentile`` leaves a ten-thousandth of the values beyond it; ``entropy`` loses
        least information, the Kullback-Leibler divergence of the quantised from the original distribution
        (S. Migacz, 8-bit inference with TensorRT, GTC 2017).
        """
        if method == "minmax":
            return self.largest
        if method == "percentile":
            bins = int(np.searchsorted(np.cumsum(self.counts), _PERCENTILE * self.counts.sum())) + 1
        else:
            bins = _least_divergence(self.counts)
        return min(bins * self._width, self.largest)


def _least_divergence(counts: NDArray[np.int64]) -> int:
    """How many of the bins to keep so that :data:`_LEVELS` levels describe the distribution best."""
    counts = counts.copy()
    counts[0] = counts[1]  # zeros are exact whatever the scale is, and many
    best, least = _BINS, np.inf
    for kept in range(_BINS, _LEVELS - 1, -_STEP):
        original = counts[:kept].astype(np.float64)
        level = np.arange(kept) * _LEVELS // kept
        filled = original > 0
        mean = np.bincount(level, original) / np.maximum(np.bincount(level, filled), 1)
        quantized = np.where(filled, mean[level], 0)
        original[-1] += counts[kept:].sum()
        seen = original > 0
        if not seen.any():
            continue
        if seen[-1]:
            quantized[-1] = max(quantized[-1], 1)  # values beyond are clipped into this bin, which may be empty
        p, q = original[seen] / original.sum(), quantized[seen] / quantized.sum()
        divergence = float(np.sum(p * np.log(p / q)))
        if divergence < least:
            best, least = kept, divergence
    return best
