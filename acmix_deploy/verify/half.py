"""What float16 tensors of an ONNX file would hold: seen in float32, where nothing overflows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper, shape_inference
from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy.forms import owner, to_form
from acmix_deploy.graph import as_float32, fed, name_nodes
from acmix_deploy.processing import network_of
from acmix_deploy.runtime.magnitudes import LARGEST_HALF, SMALLEST_HALF, magnitudes
from acmix_deploy.runtime.metrics import Array

_POLES = frozenset({"Div", "Log", "Reciprocal"})  # infinite at zero, in every type


class OutOfRange(BaseModel):
    """A node whose result float16 cannot hold."""

    model_config = ConfigDict(frozen=True)

    node: str = Field(description="name of the node; of a custom operator, where the tensor is inside its definition")
    tensor: str = Field(description="the tensor that it writes, as the file in standard operators calls it")
    magnitude: float | None = Field(description="largest finite magnitude seen; None where float32 overflows too")
    input_shapes: dict[str, tuple[int, ...]] = Field(description="shape of each input that it was seen on")

    def __str__(self) -> str:
        reached = "what float32 cannot hold" if self.magnitude is None else f"{self.magnitude:.6g}"
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.input_shapes.items())
        return f"{self.node} reaches {reached} on {shapes}"


class HalfRange(BaseModel):
    """Whether float16 holds what one candidate keeps in it."""

    model_config = ConfigDict(frozen=True)

    candidate: str = Field(description="name of what was looked into")
    tensors: int = Field(description="how many tensors the file computes in float16")
    unknown: int = Field(
        description="how many tensors were not looked at: inside a branch or loop, or of a type that nothing tells"
    )
    largest: float = Field(description="largest finite magnitude of any of them")
    overflows: tuple[OutOfRange, ...] = Field(
        description="nodes that write more than 65504, in the order of the graph; each with its largest"
    )
    vanished: tuple[OutOfRange, ...] = Field(
        default=(), description="nodes all of whose result becomes zero, as nothing in it is above 3e-8"
    )

    @computed_field(description="whether float16 holds all of them, on every input")  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        return not self.overflows

    def __str__(self) -> str:
        more = f", and so do {len(self.overflows) - 1} more nodes" if len(self.overflows) > 1 else ""
        return (
            f"{self.candidate} computes in float16 what is beyond its {LARGEST_HALF:.0f} and infinite on a GPU: "
            f"{self.overflows[0]}{more}"
        )


def half_range(name: str, file: Path | onnx.ModelProto, feeds: Sequence[Mapping[str, Array]]) -> HalfRange | None:
    """Look at what the float16 tensors of a file hold, with all of it widened to float32; None where it has none.

    Too large is a finite magnitude above 65504, and an infinity that a node makes of finite numbers. Infinities that
    are stored or depend on sizes alone, such as the mask of an attention, are in their place; so is what nodes make of
    them, and the pole of a logarithm or a quotient at zero.

    Args:
        name: of the candidate.
        file: what ONNX Runtime runs.
        feeds: float32 inputs by name.

    Raises:
        UserError: the file cannot be put into standard operators, or does not open when it is widened.
    """
    model = network_of(file)
    model = onnx.load(model) if isinstance(model, Path) else model
    if not _tensors(model, TensorProto.FLOAT16) and not any(map(_halves, model.functions)):
        return None
    plain = to_form(model, "plain")
    computed = _tensors(plain, TensorProto.FLOAT16)
    unknown = _unknown(plain)
    if not computed and not unknown:
        return None
    writers = {tensor: node for node in plain.graph.node for tensor in node.output}
    sources = {source for tensor in computed if tensor in writers for source in writers[tensor].input}
    watched = [*computed, *(tensor for tensor in _tensors(plain, TensorProto.FLOAT) if tensor in sources)]
    seen = fed(plain)
    wide = as_float32(plain)
    stored = [tensor for tensor in wide.graph.initializer if tensor.data_type == TensorProto.FLOAT]
    infinite = {tensor.name for tensor in stored if np.isinf(numpy_helper.to_array(tensor)).any()}

    named = onnx.ModelProto()
    named.CopyFrom(model)
    name_nodes(named)
    nodes = {node.name for node in named.graph.node}
    largest, worst, zero = 0.0, dict[str, OutOfRange](), dict[str, OutOfRange]()
    for feed, found in zip(feeds, magnitudes(wide, watched, feeds), strict=True):
        beyond = infinite | {tensor for tensor in watched if found[tensor].infinite}
        largest = max(largest, *(found[tensor].finite for tensor in computed), 0.0)
        for tensor in computed:
            node = writers.get(tensor)
            pole = node is not None and node.op_type in _POLES
            made = tensor in beyond & seen and not pole and not (node and beyond & {*node.input})
            vanishes = tensor not in beyond and 0 < found[tensor].finite <= SMALLEST_HALF / 2
            if not made and not vanishes and found[tensor].finite <= LARGEST_HALF:
                continue
            out = OutOfRange(
                node=owner(node.name, nodes) if node else tensor,
                tensor=tensor,
                magnitude=None if made else found[tensor].finite,
                input_shapes={key: array.shape for key, array in feed.items()},
            )
            kind = zero if vanishes else worst
            if out.node not in kind or _size(out) > _size(kind[out.node]):
                kind[out.node] = out
    return HalfRange(
        candidate=name,
        tensors=len(computed),
        unknown=unknown,
        largest=largest,
        overflows=tuple(worst.values()),
        vanished=tuple(zero.values()),
    )


def _size(found: OutOfRange) -> float:
    return np.inf if found.magnitude is None else found.magnitude


def _halves(function: onnx.FunctionProto) -> bool:
    """Whether a definition makes float16 of other types."""
    attributes = [attribute for node in function.node for attribute in node.attribute]
    made = {attribute.i for attribute in attributes if attribute.name in ("to", "dtype")}
    return TensorProto.FLOAT16 in made | {attribute.t.data_type for attribute in attributes}


def _unknown(model: onnx.ModelProto) -> int:
    """How many results of nodes have no type, or are made in graphs within nodes."""
    graph = shape_inference.infer_shapes(model).graph
    typed = {value.name for value in (*graph.value_info, *graph.output) if value.type.tensor_type.elem_type}
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.g.node]
    made = [name for node in graph.node for name in node.output if name]
    return sum(name not in typed for name in made) + sum(len(node.output) for part in inner for node in part.node)


def _tensors(model: onnx.ModelProto, element_type: int) -> list[str]:
    """The inputs of a graph and what its nodes compute, as far as it is of this type, in the graph's order."""
    graph = shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    typed = {value.name for value in values if value.type.tensor_type.elem_type == element_type}
    names = (*(value.name for value in graph.input), *(name for node in graph.node for name in node.output))
    return [name for name in dict.fromkeys(names) if name in typed]
