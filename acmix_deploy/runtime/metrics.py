"""How far one array is from another."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Array = NDArray[Any]


class Deviation(BaseModel):
    """Distance of an array from the one expected, computed in float64. Numbers are None where ``problem`` is set."""

    model_config = ConfigDict(frozen=True)

    max_abs: float | None = Field(default=None, description="largest absolute difference")
    relative_l2: float | None = Field(default=None, description="L2 norm of the difference over that of the reference")
    cosine: float | None = Field(default=None, description="cosine of the angle between the two, 1 is equal")
    rms: float | None = Field(default=None, description="root mean square of what was expected")
    problem: str = Field(default="", description="why the two cannot be compared, empty where they can")


def deviation(expected: Array, actual: Array) -> Deviation:
    """Distance of ``actual`` from ``expected``, arrays of any numeric type.

    Infinities and NaNs count as equal where both arrays have the same one in the same place.
    """
    if expected.shape != actual.shape:
        return Deviation(problem=f"shape {list(actual.shape)} instead of {list(expected.shape)}")
    expected, actual = expected.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(actual)):
        wrong = int((finite != np.isfinite(actual)).sum())
        return Deviation(
            problem=f"{wrong} of {expected.size} values are finite in one and NaN or infinite in the other"
        )
    if not np.array_equal(expected[~finite], actual[~finite], equal_nan=True):
        return Deviation(problem="NaNs and infinities differ")
    if expected.size and not finite.any():
        return Deviation(problem="nothing in either is finite")
    if not finite.all():
        expected, actual = expected[finite], actual[finite]
    difference = actual - expected
    error, norm, other = (float(np.linalg.norm(values)) for values in (difference, expected, actual))
    if norm == 0 or other == 0:
        if error:
            return Deviation(problem=f"all zeros in the {'reference' if norm == 0 else 'candidate'} alone")
        return Deviation(max_abs=0, relative_l2=0, cosine=1, rms=0)
    return Deviation(
        max_abs=float(np.abs(difference).max()),
        relative_l2=error / norm,
        cosine=float(np.clip(expected @ actual / (norm * other), -1, 1)),
        rms=norm / expected.size**0.5,
    )
