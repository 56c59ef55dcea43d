"""What tests run every family on: ``EXAMPLES`` in each family's ``examples.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Examples:
    """Blocks of one family and the maps that they take."""

    block: Callable[[int], nn.Module]
    """A block from so many channels, a multiple of 4, to as many."""
    as_others_have_it: Callable[[int], nn.Module] | None = None
    """One that the code of others may hold, where ``block`` does more than that."""
    channels_last: bool = False
    """Whether it takes [B, H, W, C]."""
    divisor: int = 1
    """Of the heights and widths that it takes, all from 8."""
    without_gradient: Mapping[str, slice] = field(default_factory=dict)
    """Of 8 channels, what no result depends on, by the name of the parameter: it adds the same to all logits."""
