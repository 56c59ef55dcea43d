"""Read and evaluate pieces of an ONNX graph: what recognising a block in a graph is made of.

Graphs are onnx-graphsurgeon graphs. Values are found by running pieces of the graph in float32, not by pattern, so it
does not matter how an exporter spelt them or whether it folded them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import onnx_ir
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from acmix_deploy.errors import UserError
from acmix_deploy.files import LARGEST_MESSAGE, expect, too_large
from acmix_deploy.runtime.onnxruntime import ir_version, open_session
from acmix_deploy.runtime.reason import reason
from acmix_deploy.runtime.refusals import unreadable
from acmix_deploy.targets import OPSETS

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

RESHAPING = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that move values without changing them."""

SHAPE_OF = "shape of {}"
"""Name of a tensor that holds the shape of another; exporters write "x/shape" themselves."""

DOUBLE = frozenset({TensorProto.DOUBLE})
_LARGEST = LARGEST_MESSAGE - (1 << 26)
"""Bytes of a model that is changed and written again: room for what is added."""
FLOATS = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})


class Reached(IntEnum):
    """How far something came towards being a block. Of several families the one that came furthest is told of."""

    NOTHING = 0
    """Nobody would have expected a block."""
    KIND = 1
    """It is of the block's kind, or bears its name, without its parts."""
    PARTS = 2
    """Some of the block's parts are there."""
    WHOLE = 3
    """All are, and belong together; what they compute is no block's."""
    REDUCED = 4
    """It could be written in its reduced form, which computes something else."""


class NoMatch(Exception):
    """Part of a graph is not the block that was looked for.

    Args:
        reason: what was found, in words for the report.
        reached: how close it came.
    """

    def __init__(self, reason: str, reached: Reached = Reached.PARTS) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reached = reached


@dataclass(frozen=True)
class Region:
    """What lies between a tensor x and a tensor y, and what it needs besides x."""

    x: gs.Variable
    y: gs.Variable
    outside: list[gs.Variable]
    """Tensors that do not depend on x: sizes, and position terms that an exporter left to be computed."""
    nodes: list[gs.Node]
    """On the ways from x to y, in order."""


def read(path: Path, *, weights: bool = True) -> onnx.ModelProto:
    """Read an ONNX file, whose graph may still be anything: see :func:`check`.

    Args:
        path: the file.
        weights: also read those that lie in files of their own, and lower the version of the format to one that every
            ONNX Runtime reads, since what is written again uses nothing newer.

    Raises:
        UserError: it does not exist, is no ONNX file, or is too large with its weights.
    """
    expect(path, "onnx")
    try:
        model = onnx.load(path, load_external_data=False)
        if weights:
            _check_size(path, model)
            onnx.load_external_data_for_model(model, str(path.parent))
            model.ir_version = min(model.ir_version, ir_version(OPSETS[-1]))
    except UserError:
        raise
    except Exception as error:  # protobuf's DecodeError, or a missing file of weights
        raise unreadable(path, error) from error
    if not model.graph.node:
        raise UserError(f"{path} holds no ONNX graph", "Give the file that an exporter wrote.")
    return model


def with_weights(path: Path) -> list[Path]:
    """An ONNX file, and the files beside it that its weights lie in."""
    stored = onnx.load(path, load_external_data=False).graph.initializer
    outside = [ExternalDataInfo(tensor) for tensor in stored if tensor.data_location == TensorProto.EXTERNAL]
    return [path, *(path.parent / location for location in dict.fromkeys(info.location for info in outside))]


def _check_size(path: Path, model: onnx.ModelProto) -> None:
    """Raises UserError where the model with its weights in it is more than can be written or checked in one piece."""
    outside = [
        ExternalDataInfo(tensor) for tensor in model.graph.initializer if tensor.data_location == TensorProto.EXTERNAL
    ]
    size = path.stat().st_size + sum(info.length or 0 for info in outside)
    if size > _LARGEST:
        raise too_large(path, size)


def check(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a model that is not as ONNX defines models, or whose inputs and outputs are not all tensors.

    Raises:
        UserError: naming what is wrong; ``path`` is where the model was read from.
    """
    hint = "Export it again; what changed it since has to be mended."
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise UserError(f"{path} is not valid ONNX: {' '.join(str(error).split())}", hint) from error
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    if unknown := [name for name, element in types.items() if element not in helper.get_all_tensor_dtypes()]:
        raise UserError(f"{path}: {', '.join(unknown)}: not a tensor of an element type that is known here", hint)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes ``tensor``; None for constants and graph inputs."""
    return tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None


def constant_value(tensor: gs.Tensor) -> Array | None:
    """The value of a constant, through Constant, Identity, Cast and Transpose nodes; None where it is computed."""
    node = producer(tensor)
    if node is None:
        return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else None
    if node.op == "Constant":
        value = node.attrs.get("value")
        return np.asarray(value.values) if value is not None else None
    if node.op not in ("Identity", "Cast", "Transpose"):
        return None
    source = constant_value(node.inputs[0])
    return source.transpose(node.attrs.get("perm")) if source is not None and node.op == "Transpose" else source


def nearest(tensor: gs.Tensor, *ops: str) -> list[gs.Node]:
    """The first nodes of types ``ops`` met on each way upstream from ``tensor``, not looking behind a Shape."""
    return [node for node in upstream([tensor], lambda node: node.op in (*ops, "Shape")) if node.op in ops]


def scalar_factor(tensor: gs.Tensor) -> tuple[float, gs.Node | None]:
    """The product of constant scalars that a tensor was last multiplied by, and the node before them."""
    factor = 1.0
    while (node := producer(tensor)) is not None:
        if node.op in RESHAPING:
            tensor = node.inputs[0]
            continue
        if node.op != "Mul":
            break
        values = [constant_value(operand) for operand in node.inputs]
        scalars = [index for index, value in enumerate(values) if value is not None and value.size == 1]
        if not scalars:
            break
        factor *= float(values[scalars[0]].reshape(-1)[0])  # type: ignore[union-attr]
        tensor = node.inputs[1 - scalars[0]]
    return factor, node


def way_down(graph: gs.Graph, tensor: gs.Variable) -> Iterator[tuple[gs.Variable, gs.Node]]:
    """What reads ``tensor``, what reads its result, and so on while each has one reader: tensor and reader in turn."""
    results = {output.name for output in graph.outputs}
    while tensor.name not in results:
        users = [user for user in tensor.outputs if user.op != "Shape"]
        if len(users) != 1:
            return
        yield tensor, users[0]
        tensor = users[0].outputs[0]


def conv_weight(conv: gs.Node) -> Array:
    """The stored weight of a convolution. Raises NoMatch where it is computed."""
    value = constant_value(conv.inputs[1])
    if value is None:
        raise NoMatch(f"the weight of {conv.name} is computed, not stored")
    return value


def pointwise_weight(node: gs.Node | None, *, padded: bool = False) -> Array | None:
    """The stored weight [Cout, Cin, 1, 1] of a 1x1 convolution that keeps the map size, or pads the map where that is
    allowed; None for any other node."""
    if node is None or node.op != "Conv":
        return None
    attrs = node.attrs
    plain = attrs.get("group", 1) == 1 and {*attrs.get("strides", ()), 1} == {1}
    weight = constant_value(node.inputs[1])
    fits = plain and (padded or not any(attrs.get("pads", ())))
    return weight if fits and weight is not None and weight.shape[2:] == (1, 1) else None


def conv_bias(conv: gs.Node) -> Array:
    """The bias of a convolution in float64, zeros where it has none."""
    value = constant_value(conv.inputs[2]) if len(conv.inputs) > 2 else None
    return np.zeros(len(conv_weight(conv))) if value is None else value.astype(np.float64)


def region_between(graph: gs.Graph, x: gs.Variable, y: gs.Variable, given: gs.Variable | None = None) -> Region:
    """The region of the nodes on the ways from x to y that do not lead over ``given``.

    Others may read x, reshaped and transposed or not, but nothing else of what is between.

    Raises:
        NoMatch: something between is read from elsewhere or is an output of the graph.
    """
    above = list(upstream([y], lambda node: False, stop_at={x.name, *([given.name] if given else [])}))
    reached = {x.name}
    nodes = []
    for node in reversed(above):
        if any(tensor.name in reached for tensor in reads(node)):
            reached.update(tensor.name for tensor in node.outputs)
            nodes.append(node)
    inside = {id(node) for node in nodes}
    results = {tensor.name for tensor in graph.outputs}
    same = {x.name}
    for node in nodes:
        if node.op in RESHAPING and node.inputs[0].name in same:
            same.update(tensor.name for tensor in node.outputs)
            continue
        for tensor in node.outputs:
            if tensor is y:
                continue
            if tensor.name in results:
                raise NoMatch(f"the intermediate {tensor.name} is also an output of the graph", Reached.WHOLE)
            for user in tensor.outputs:
                if id(user) not in inside and user.op != "Shape":
                    reader = user.name or user.op
                    raise NoMatch(f"the intermediate {tensor.name} is also read by {reader}", Reached.WHOLE)
    outside = {
        tensor.name: tensor
        for node in nodes
        for tensor in reads(node)
        if isinstance(tensor, gs.Variable) and tensor.name not in reached
    }
    return Region(x, y, list(outside.values()), nodes)


def reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """What a node reads: its inputs, and what graphs inside it, as those of an If, read from outside."""
    yield from (tensor for tensor in node.inputs if tensor.name)
    for inner in node.attrs.values():
        if isinstance(inner, gs.Graph):
            made = {tensor.name for part in inner.nodes for tensor in part.outputs}
            made.update(tensor.name for tensor in inner.inputs)
            taken = [*inner.outputs, *(tensor for part in inner.nodes for tensor in reads(part))]
            yield from (tensor for tensor in taken if isinstance(tensor, gs.Variable) and tensor.name not in made)


def upstream(
    tensors: Iterable[gs.Tensor], stop_after: Callable[[gs.Node], bool], stop_at: Iterable[str] = ()
) -> Iterator[gs.Node]:
    """Nodes that ``tensors`` are computed from, each once, every node after the nodes that use it.

    Ways end after a node that ``stop_after`` accepts and at tensors named in ``stop_at``.
    """
    stop = set(stop_at)
    order: list[gs.Node] = []
    seen: set[int] = set()

    def start(tensor: gs.Tensor) -> list[gs.Node]:
        node = producer(tensor) if tensor.name not in stop else None
        return [node] if node is not None and id(node) not in seen else []

    # Depth-first with an explicit stack: deep graphs exceed Python's recursion limit.
    stack: list[tuple[gs.Node, Iterator[gs.Tensor]]] = []
    for tensor in tensors:
        for node in start(tensor):
            seen.add(id(node))
            stack.append((node, iter(() if stop_after(node) else reads(node))))
            while stack:
                current, inputs = stack[-1]
                for operand in inputs:
                    if found := start(operand):
                        seen.add(id(found[0]))
                        stack.append((found[0], iter(() if stop_after(found[0]) else reads(found[0]))))
                        break
                else:
                    order.append(current)
                    stack.pop()
    yield from reversed(order)


def as_float32(model: onnx.ModelProto, types: Collection[int] = FLOATS) -> onnx.ModelProto:
    """The model with every tensor of ``types`` widened, or narrowed, to float32; changes ``model`` in place."""

    def convert(tensor: onnx.TensorProto) -> None:
        if tensor.data_type in types:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))

    def convert_graph(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            convert(tensor)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type in types:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        convert_nodes(graph.node)

    def convert_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    convert(attribute.t)
                elif attribute.type == onnx.AttributeProto.GRAPH:
                    convert_graph(attribute.g)
                elif node.op_type == "Cast" and attribute.name == "to" and attribute.i in types:
                    attribute.i = TensorProto.FLOAT

    convert_graph(model.graph)
    for function in model.functions:
        convert_nodes(function.node)
    return model


def evaluate(
    graph: gs.Graph, outputs: list[gs.Variable], feeds: Feeds, functions: Iterable[onnx.FunctionProto] = ()
) -> list[Array]:
    """Compute tensors of a graph in float32 from the values of others.

    Args:
        graph: where ``outputs`` live.
        outputs: what to compute; nodes upstream of a fed tensor are left out.
        feeds: values by tensor name; those not needed are ignored.
        functions: bodies of the custom operators used.

    Raises:
        NoMatch: ONNX Runtime cannot run it, or it depends on something that is not fed.
    """
    model, used = piece(graph, outputs, feeds, functions)
    try:
        # Nodes as written: pieces of graphs trip ONNX Runtime's optimizer, and each runs only once or twice.
        return list(open_session(model, optimize=False).run(None, used))
    except UserError as error:
        raise NoMatch(f"it cannot be run on its own: {error.message}") from error
    except Exception as error:  # ONNX Runtime's error types share no base of their own
        raise NoMatch(f"it cannot be run on its own: {reason(error)}") from error


def piece(
    graph: gs.Graph, outputs: list[gs.Variable], feeds: Feeds, functions: Iterable[onnx.FunctionProto] = ()
) -> tuple[onnx.ModelProto, Feeds]:
    """What :func:`evaluate` runs, and the feeds that it needs, in float32. Raises NoMatch where one is missing."""
    nodes = list(reversed(list(upstream(outputs, lambda node: False, stop_at=feeds))))
    made = {tensor.name for node in nodes for tensor in node.outputs}
    needed = {
        tensor.name: tensor
        for tensor in [*(tensor for node in nodes for tensor in reads(node)), *outputs]
        if isinstance(tensor, gs.Variable) and tensor.name not in made
    }
    if unknown := needed.keys() - feeds.keys():
        raise NoMatch(f"it depends on {', '.join(sorted(unknown))} from outside")
    part = gs.Graph(nodes, opset=graph.opset, import_domains=graph.import_domains)
    model = as_float32(gs.export_onnx(part, do_type_check=False))
    model.ir_version = ir_version(graph.opset)
    used = {name: _float32(feeds[name]) for name in needed}
    model.graph.input.extend(
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in used.items()
    )
    model.graph.output.extend(onnx.ValueInfoProto(name=tensor.name) for tensor in outputs)
    model.functions.extend(functions)
    return model, used


def rewrite(original: onnx.ModelProto, before: list[gs.Node], graph: gs.Graph) -> onnx.ModelProto:
    """``original`` with the nodes of ``graph``, and nothing else of it changed.

    graphsurgeon would lose much: local functions, metadata and documentation of the model, its graph and its nodes,
    notes on quantization and on training, names of inner graphs. So it only tells which nodes go and come.

    Args:
        original: the model that ``graph`` was.
        before: the nodes of ``graph`` as they were, those of ``original`` in order.
        graph: as it is now.
    """
    graph.cleanup()
    index = {id(node): place for place, node in enumerate(before)}
    come = gs.Graph([node for node in graph.nodes if id(node) not in index], opset=graph.opset)
    written = gs.export_onnx(come, do_type_check=False).graph
    new = iter(written.node)
    nodes = [original.graph.node[index[id(node)]] if id(node) in index else next(new) for node in graph.nodes]
    stay = {index[id(node)] for node in graph.nodes if id(node) in index}
    gone = [node for place, node in enumerate(original.graph.node) if place not in stay]
    used = {value.name for value in original.graph.output}
    used.update(name for node in nodes for name in (*names_read(node), *node.output))
    lost = {name for node in gone for name in (*names_read(node), *node.output)} - used

    model = onnx.ModelProto()
    model.CopyFrom(original)
    target = model.graph
    stored = {tensor.name for tensor in target.initializer}
    keep(target.input, [value for value in target.input if value.name not in lost & stored])
    keep(target.initializer, [tensor for tensor in target.initializer if tensor.name not in lost])
    keep(target.sparse_initializer, [tensor for tensor in target.sparse_initializer if tensor.values.name not in lost])
    keep(target.value_info, [value for value in target.value_info if value.name not in lost])
    keep(
        target.quantization_annotation,
        [note for note in target.quantization_annotation if note.tensor_name not in lost],
    )
    keep(target.node, nodes)
    target.initializer.extend(written.initializer)
    told = {value.name for value in (*target.value_info, *target.output)}
    made = {name for node in written.node for name in node.output} - told
    target.value_info.extend(value for value in written.value_info if value.name in made)
    return model


def keep(entries: Any, kept: list[Any]) -> None:
    """Leave only ``kept`` in a repeated field."""
    del entries[:]
    entries.extend(kept)


def sizes_of(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """Of the axes of a declared tensor, names where they are free; 0 where nothing is told."""
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def fed(model: onnx.ModelProto) -> set[str]:
    """Tensors that depend on what is in the inputs, not on their sizes alone."""
    found = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "Shape" and not found.isdisjoint(node.input):
            found.update(node.output)
    return found


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node without a name one of its own, in place."""
    taken = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:
            node.name = next(name for n in count() if (name := f"{node.op_type}_{index + n}") not in taken)
            taken.add(node.name)


def in_order(model: onnx.ModelProto) -> None:
    """Put every node behind those whose results it reads, in place: converters append casts at the end of the graph.

    Nothing else changes, also of a model that is not valid, where onnx_ir makes up what is missing.
    """
    nodes = [*model.graph.node]
    writers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    needs = [{writers[name] for name in names_read(node) if name in writers} for node in nodes]
    readers: dict[int, list[int]] = {}
    for index, before in enumerate(needs):
        for writer in before:
            readers.setdefault(writer, []).append(index)
    ready, order = [index for index, before in enumerate(needs) if not before], []
    while ready:
        order.append(index := heappop(ready))
        for reader in readers.get(index, ()):
            needs[reader].remove(index)
            if not needs[reader]:
                heappush(ready, reader)
    if len(order) == len(nodes):  # a circle is for others to refuse
        keep(model.graph.node, [nodes[index] for index in order])


def tidied(model: onnx.ModelProto, *passes: onnx_ir.passes.PassBase) -> onnx.ModelProto:
    """The model after these passes, its nodes in order, without nodes and stored tensors that nothing reads."""
    held = onnx_ir.from_proto(model)
    onnx_ir.passes.Sequential(*passes, RemoveUnusedNodesPass(), TopologicalSortPass())(held)
    tidy = onnx_ir.to_proto(held)
    stored = {tensor.name for tensor in tidy.graph.initializer}  # which onnx_ir declares as well
    keep(tidy.graph.value_info, [value for value in tidy.graph.value_info if value.name not in stored])
    keep(tidy.metadata_props, [*model.metadata_props])  # which onnx_ir sorts
    return tidy


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the tensors that a node reads, those in graphs within it among them."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield from (value.name for value in attribute.g.output)
            for inner in attribute.g.node:
                yield from names_read(inner)


def count_nodes(model: onnx.ModelProto) -> int:
    """Nodes of a graph, without the Constant nodes that some exporters write for what others store."""
    return sum(node.op_type != "Constant" for node in model.graph.node)


def _float32(array: Array) -> Array:
    return array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array
