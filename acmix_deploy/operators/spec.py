"""The vocabulary in which an operator is defined: tensors with named axes, attributes, tolerances, native kernels.

Pure data. Whatever else needs these facts (the ONNX body, the tests, the docs table, native code) reads
them from an :class:`Operator` and does not repeat them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal


@dataclass(frozen=True)
class Tensor:
    """One input or output. ``axes`` are lengths in the letters of ``Operator.axes``, as :class:`Axis` reads them."""

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
    names: type[IntEnum] | None = None
    """What its values are called, where they are kinds and no amounts."""


@dataclass(frozen=True)
class Tolerance:
    """How far an implementation may be from the float32 reference, as relative L2 per output.

    The rule is the one of flash-attention's tests: at most ``factor`` times the error that the eager PyTorch model has
    in that type, plus ``floor``. For float32 that is its distance from itself in float64, which few models have to be
    asked for.
    """

    floor: float
    """Accepted however exact the eager model is."""
    factor: float = 2.0
    """What the error of the eager model is multiplied by."""
    most: float = 0.25
    """What nothing widens a limit beyond; at 0.25 the cosine may be down to 0.97."""
    absolute: float = 0.0
    """Root mean square of an error that is accepted however small the values are."""

    def limit(self, eager_error: float = 0.0, rms: float | None = None) -> float:
        """Largest relative L2 error accepted.

        Args:
            eager_error: the eager model's own error in the same type.
            rms: root mean square of the values; None where it is not known, and 0 of an error that is 0.
        """
        wide = max(self.factor * eager_error + self.floor, self.absolute / rms if rms else 0.0)
        return min(wide, max(self.floor, self.most))


TOLERANCES = {"float32": Tolerance(floor=1e-5, most=1e-4), "float16": Tolerance(floor=1e-3)}
"""What attention is computed to, by the type of its output; blocks in standard operators, and files, are measured by
the same."""

ATTENTION_AXES = {
    "B": "batch",
    "N": "num_heads",
    "d": "head_dim",
    "H": "height",
    "W": "width",
    "K": "kernel_size",
    "s": "stride",
}
"""The letters of attention in windows of K x K pixels, at every s-th pixel of a map."""

TENSORRT_ATTRIBUTES = (
    Attribute("plugin_version", "string", "1", "read by TensorRT's parser"),
    Attribute("plugin_namespace", "string", "", "read by TensorRT's parser"),
)
"""By which TensorRT's parser finds the plugin: ``Operator.version``, and the namespace of its creator."""

HEAD_DIMS = (16, 32, 64, 128)
"""What kernels of operators with heads are compiled for; another ``head_dim`` is padded to the next."""

_MOST = 2**31 - 1 - 1024  # a block's threads count past it
KERNEL_MAXIMA = {"B": 65535, "H": 65535, "N": 65535, "H*W": _MOST, "3*N*d*W": _MOST}
"""Kernels run images, rows and heads along axes of the launch grid, and count pixels and an NHWC row in int32."""


@dataclass(frozen=True)
class Kernel:
    """The native kernels ``<operator>_<name>``, in ``plugins/include/acmix/<operator>_<name>.cuh``."""

    name: Literal["simt", "mma"]
    formats: tuple[tuple[str, str], ...]
    """Element types and layouts, as in ``("float16", "NHWC")``; for each there is one kernel a size in
    ``Operator.head_dims``."""
    min_sm: int = 0
    """Oldest compute capability that runs them, 75 for sm_75."""


@dataclass(frozen=True)
class Operator:
    """A custom ONNX operator: what a node looks like and how exact an implementation has to be."""

    domain: str
    op_type: str
    version: int
    formula: str
    axes: dict[str, str]
    """What the letters in shapes and limits stand for; a name that is an attribute's stands for its value. B is the
    batch."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: tuple[Attribute, ...]
    tolerances: dict[str, Tolerance]
    kernels: tuple[Kernel, ...]
    """In the order of preference. float32 NCHW is among their formats."""
    kernel_limits: dict[str, tuple[int, ...]]
    """What the native kernels take: values by name of the quantity. The definition itself is wider."""
    kernel_maxima: dict[str, int] = field(default_factory=lambda: KERNEL_MAXIMA)
    """The largest values that the native kernels can count."""
    minima: dict[str, str] = field(default_factory=dict)
    """The smallest sizes for which the operator is defined, where that is not 1."""
    minima_where: tuple[str, int] | None = None
    """The letter and its value for which alone the minima hold; None where they always do."""

    @property
    def name(self) -> str:
        """What its folder, its kernels and its function in C are called: the type in lower case, without Acmix."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.op_type.removeprefix("Acmix")).lower()

    @property
    def head_dims(self) -> tuple[int, ...]:
        """What each kernel is compiled for: HEAD_DIMS, or 0 alone where the operator has no ``head_dim``."""
        return HEAD_DIMS if "head_dim" in self.axes.values() else (0,)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Element types that inputs and outputs may have; all of a node's tensors share one."""
        return tuple(self.tolerances)

    def least(self, letter: str, sizes: Mapping[str, int]) -> str:
        """The smallest size of a letter, as :class:`Axis` reads it, where other letters have these sizes."""
        where = self.minima_where
        return self.minima.get(letter, "1") if where is None or sizes[where[0]] == where[1] else "1"

    def attribute(self, name: str) -> Attribute:
        """The attribute called ``name``. Raises KeyError for an unknown name."""
        return {attribute.name: attribute for attribute in self.attributes}[name]
