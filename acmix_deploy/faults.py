"""Names of the known faults of published blocks, of their copies and of files made from them."""

from __future__ import annotations

from typing import Literal

FaultId = Literal[
    "float64-position",
    "linspace-position",
    "frozen-size",
    "frozen-batch",
    "traced-batch",
    "float32-position",
    "cuda-position",
    "no-bias",
    "scalar-rates",
    "col2im",
    "folded-position",
    "misplaced-argument",
    "no-block",
    "hidden-block",
    "blocked-load",
    "missing-class",
    "refused-file",
    "other-outputs",
    "other-machine",
]
"""``acmix_deploy/doctor/faults.py`` says of each what it is, how it shows and what mends it."""
