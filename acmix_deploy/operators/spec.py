"""The vocabulary in which an operator is defined: tensors with named axes, attributes, tolerances, native limits.

Pure data. Whatever else needs these facts (the ONNX body, the tests, the docs table, native code) reads
them from an :class:`Operator` and does not repeat them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Tensor:
    """One input or output. ``axes`` are expressions in the operator's axis names, e.g. ``("B", "3*C", "H", "W")``."""

    name: str
    axes: tuple[str, ...]
    meaning: str


@dataclass(frozen=True)
class Attribute:
    """One attribute. ``default`` is what native code assumes when a graph leaves it out."""

    name: str
    kind: Literal["int", "float", "string"]
    default: int | float | str
    meaning: str
    minimum: int | None = None
    maximum: int | None = None


LARGEST_LIMIT = 0.25
"""Relative L2 beyond which an error of the eager model widens no limit: there the cosine may be down to 0.97."""


@dataclass(frozen=True)
class Tolerance:
    """How far an implementation may be from the float32 reference, as relative L2 per output.

    The rule for a reduced type is the one of flash-attention's tests: at most ``factor`` times the error that the
    eager PyTorch model has in that type, plus ``floor``; but not beyond :data:`LARGEST_LIMIT`, unless the floor is. For
    float32 the eager error is 0 and the floor is the limit.
    """

    floor: float
    factor: float = 2.0

    def limit(self, eager_error: float = 0.0) -> float:
        """Largest relative L2 error accepted, given the eager model's own error in the same type."""
        return min(self.factor * eager_error + self.floor, max(self.floor, LARGEST_LIMIT))


@dataclass(frozen=True)
class Operator:
    """A custom ONNX operator: what a node looks like and how exact an implementation has to be."""

    domain: str
    op_type: str
    version: int
    formula: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    tolerances: dict[str, Tolerance]
    kernel_limits: dict[str, tuple[int, ...]]
    """What the native kernels take: values by name of the quantity. The definition itself is wider."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Element types that inputs and outputs may have; all of a node's tensors share one."""
        return tuple(self.tolerances)

    def attribute(self, name: str) -> Attribute:
        """The attribute called ``name``. Raises KeyError for an unknown name."""
        return {attribute.name: attribute for attribute in self.attributes}[name]
