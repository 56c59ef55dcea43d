"""What ``Family.reduce`` gets and gives. No PyTorch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from acmix_deploy.graph import Array, Feeds
from acmix_deploy.operators.spec import TENSORRT_ATTRIBUTES, Operator


class Request(NamedTuple):
    """How a matched block is to be written."""

    name: str
    """Prefix of new nodes and tensors."""
    opset: int
    static: bool
    """Whether every axis of the graph's inputs is fixed."""
    fixed_size: bool
    """Whether every axis but the first, the batch, is."""
    values: Feeds
    """Of x and of the tensors outside the block's region, by name, at one image size."""
    compute: Callable[[list[gs.Variable], Feeds], list[Array]]
    """Tensors of the graph from the values of others, in float32."""


class Reduced(NamedTuple):
    """A block in its reduced form."""

    graph: gs.Graph
    """From x, and what lies outside the region, to one output."""
    operator: str
    """What computes its attention: the type of a custom operator, or the standard ones."""
    settings: Mapping[str, Any]
    """What the report says of it."""
    smallest: int = 1
    """Fewest rows and columns of x that it is defined for."""
    height_axis: int = 2
    """Of x; the width's is the next."""


class Writer:
    """Writes a reduced form as a graph of its own.

    Args:
        x: input of the block.
        name: prefix of new nodes and tensors.
        opset: of the graph.
        dtype: element type of results and constants that are no integers.
    """

    def __init__(self, x: gs.Variable, name: str, opset: int, dtype: npt.DTypeLike) -> None:
        self.graph = gs.Graph(inputs=[x], opset=opset)
        self.x = x
        self.name = name
        self.dtype: np.dtype[Any] = np.dtype(dtype)

    def constant(self, label: str, array: Array) -> gs.Constant:
        """A stored tensor; integers stay int64."""
        dtype = np.int64 if np.issubdtype(array.dtype, np.integer) else self.dtype
        return gs.Constant(f"{self.name}.{label}", np.array(array, dtype, order="C"))

    def add(
        self, op: str, label: str, *inputs: gs.Tensor, dtype: npt.DTypeLike | None = None, **attrs: Any
    ) -> gs.Variable:
        """A node of one output; ``domain`` among ``attrs`` is that of the operator."""
        output = gs.Variable(f"{self.name}.{label}", dtype=np.dtype(dtype or self.dtype))
        domain = attrs.pop("domain", None)
        self.graph.nodes.append(gs.Node(op, f"{self.name}.{label}", attrs, list(inputs), [output], domain=domain))
        return output

    def operator(self, operator: Operator, label: str, *inputs: gs.Tensor, **attrs: Any) -> gs.Variable:
        """A node of a custom operator, with what TensorRT's parser reads of it."""
        of_parser: dict[str, Any] = {attribute.name: attribute.default for attribute in TENSORRT_ATTRIBUTES}
        return self.add(operator.op_type, label, *inputs, domain=operator.domain, **attrs, **of_parser)

    def conv(
        self, label: str, source: gs.Tensor, weight: Array, bias: Array | None = None, **attrs: Any
    ) -> gs.Variable:
        """A convolution, without a bias where that is all zeros."""
        operands = [source, self.constant(f"{label}.weight", weight)]
        if bias is not None and bias.any():
            operands.append(self.constant(f"{label}.bias", bias))
        return self.add("Conv", label, *operands, kernel_shape=list(weight.shape[2:]), **attrs)

    def size(self, label: str, first: int, last: int, of: gs.Variable | None = None) -> gs.Variable:
        """Sizes of the axes of x, or of another tensor, from ``first`` to before ``last``."""
        return self.add("Shape", label, self.x if of is None else of, dtype=np.int64, start=first, end=last)

    def ones(self, map_size: tuple[int, int] | None, height_axis: int = 2) -> gs.Variable:
        """Ones [1, 1, H, W]; made in the graph, so that the file does not grow with the image.

        Args:
            map_size: H and W of x where they are fixed.
            height_axis: of x; the width's is the next.
        """
        if map_size is None:
            lead, size = (
                self.constant("ones_shape.lead", np.array([1, 1])),
                self.size("map_size", height_axis, height_axis + 2),
            )
            shape: gs.Tensor = self.add("Concat", "ones_shape", lead, size, dtype=np.int64, axis=0)
        else:
            shape = self.constant("ones.shape", np.array([1, 1, *map_size]))
        return self.add("ConstantOfShape", "ones", shape, value=gs.Constant("one", np.ones(1, self.dtype)))
