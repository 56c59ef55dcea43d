"""Sizes by name: an operator's axes read from the tensors of a node, and worked out for those that it has."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from acmix_deploy.operators.spec import Operator


@dataclass(frozen=True)
class Axis:
    """A length: ``3*N*d``, ``N*K^4``, ``2*K-1``, ``H/s``, which must leave no rest, or ``ceil(H/s)``."""

    coefficient: int
    powers: dict[str, int]
    """By letter; a negative one divides."""
    divisor: int
    rounds_up: bool
    less: int = 0
    """What is subtracted in the end."""

    @staticmethod
    @functools.cache
    def parse(text: str) -> Axis:
        """Read an expression. Raises ValueError for what is none."""
        whole, minus, less = text.partition("-")
        if minus and not less.isdigit():
            raise ValueError(f"{text!r} is no length")
        rounds_up = whole.startswith("ceil(") and whole.endswith(")")
        product, _, quotient = (whole[5:-1] if rounds_up else whole).partition("/")
        numbers, powers = {1: 1, -1: 1}, {}
        for sign, factors in ((1, product.split("*")), (-1, quotient.split("*") if quotient else [])):
            for factor in factors:
                base, _, power = factor.partition("^")
                if base.isdigit():
                    numbers[sign] *= int(base)
                elif base.isalpha() and base not in powers:
                    powers[base] = sign * int(power or 1)
                else:
                    raise ValueError(f"{text!r} is no length")
        return Axis(numbers[1], powers, numbers[-1], rounds_up, int(less or 0))

    @property
    def divides(self) -> bool:
        """Whether the length is a quotient."""
        return self.divisor > 1 or min(self.powers.values(), default=0) < 0

    def length(self, sizes: Mapping[str, int]) -> int:
        """The length where the letters have these sizes. Raises KeyError for a letter without one."""
        over, under = self.coefficient, self.divisor
        for letter, power in self.powers.items():
            if power > 0:
                over *= sizes[letter] ** power
            else:
                under *= sizes[letter] ** -power
        return (-(-over // under) if self.rounds_up else over // under) - self.less

    def solve(self, length: int, sizes: Mapping[str, int]) -> dict[str, int]:
        """The one letter that has no size yet, as it follows from the length; empty where none does."""
        unknown = [letter for letter in self.powers if letter not in sizes]
        if self.divides or self.less or len(unknown) != 1 or self.powers[unknown[0]] != 1:
            return {}
        size, rest = divmod(length, self.length({**sizes, unknown[0]: 1}))
        return {} if rest else {unknown[0]: size}


def quantities(operator: Operator, attributes: Mapping[str, Any], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """What the operator's letters stand for in a node, by the names of ``Operator.axes``, as far as it follows.

    Args:
        operator: the definition.
        attributes: of the node; none may miss.
        shapes: of its inputs, with 0 for a size that is not known and ``()`` for a tensor of which nothing is.
    """
    sizes = {letter: int(attributes[name]) for letter, name in operator.axes.items() if name in attributes}
    for tensor, shape in zip(operator.inputs, shapes, strict=True):
        for axis, length in zip(tensor.axes, shape, strict=False):
            if length:
                sizes |= Axis.parse(axis).solve(length, sizes)
    return {operator.axes[letter]: size for letter, size in sizes.items()}


def shapes(operator: Operator, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
    """The shapes of all inputs and then of all outputs, for sizes by the names of ``Operator.axes``."""
    by_letter = {letter: sizes[name] for letter, name in operator.axes.items()}
    tensors = (*operator.inputs, *operator.outputs)
    return tuple(tuple(Axis.parse(axis).length(by_letter) for axis in tensor.axes) for tensor in tensors)
