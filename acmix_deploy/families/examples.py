"""What tests run every family on: ``EXAMPLES`` in each family's ``examples.py``, one for each variant of its block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class NearMiss:
    """A module that differs from a block in one respect."""

    module: Callable[[int], nn.Module]
    """Takes and gives what the block of so many channels does."""
    in_modules: str | None
    """Words of the reason why it is left alone; None where it is not mentioned."""
    in_graphs: str | None
    """The same of its graph."""


@dataclass(frozen=True)
class Examples:
    """Blocks of one family and the maps that they take."""

    block: Callable[[int], nn.Module]
    """A block from so many channels, a multiple of 4, to as many."""
    as_others_have_it: Callable[[int], nn.Module] | None = None
    """One that the code of others may hold, where ``block`` does more than that."""
    near_misses: Sequence[NearMiss] = ()
    channels_last: bool = False
    """Whether it takes [B, H, W, C]."""
    divisor: int = 1
    """Of the heights and widths that it takes, all from 8."""
    resizes: bool = False
    """Whether its result has another height and width."""
    without_gradient: Mapping[str, slice] = field(default_factory=dict)
    """Of 8 channels, what no result depends on, by the name of the parameter: it adds the same to all logits."""
    variant: str = ""
    """Which of the family's blocks, where there are several."""


def with_part(block: nn.Module, path: str, part: nn.Module | Tensor) -> nn.Module:
    """The block, of another class of the same name, with another submodule or buffer at this path."""
    parent, _, own = path.rpartition(".")
    setattr(block.get_submodule(parent), own, part)
    block.__class__ = type(type(block).__name__, (type(block),), {})
    return block


def softmax_over(block: nn.Module, axis: int) -> nn.Module:
    """The block, of another class of the same name, with its softmax over this axis."""
    kind = type(block)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any) -> Any:
        with _SoftmaxOver(axis):
            return kind.forward(self, *args)

    block.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return block


class _SoftmaxOver(TorchFunctionMode):
    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(args[0], self.axis) if func is torch.Tensor.softmax else func(*args, **(kwargs or {}))
