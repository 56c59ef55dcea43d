"""1x1 convolutions and fixed shifts in an ONNX graph: find them, and write them as the one convolution they are.

A shift is a convolution whose filters have one weight each, or a Pad and a Slice. The block is looked for from its
1x1 convolutions, behind or before which the shifts are; what the shifts do is measured on the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.family import Family
from acmix_deploy.families.reduction import Reduced, Request, Writer
from acmix_deploy.families.shift_conv.algebra import collapse, is_shift, read_shifts
from acmix_deploy.graph import (
    Array,
    NoMatch,
    Reached,
    Region,
    constant_value,
    conv_bias,
    conv_weight,
    pointwise_weight,
    producer,
    region_between,
)
from acmix_deploy.operators.spec import TOLERANCES

_SUMS = frozenset({"Add", "Concat", "Sum"})
_MOVES = frozenset({"Gather", "Identity", "Pad", "ReduceSum", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze"})
"""Without Transpose: a 1x1 convolution of something else than channels, such as ACmix's over heads, is no part."""

_ENDS = frozenset({"Add", "Concat", "Conv", "ReduceSum", "Slice", "Squeeze", "Sum"})
_LONGEST = 64  # nodes from a 1x1 convolution to the end of the sum; 7 x 7 maps added one by one take 52


@dataclass(frozen=True)
class Match:
    """One block: 1x1 convolutions, of x with shifts behind them, or one of what shifts make of x."""

    region: Region
    pointwise: list[gs.Node]
    shifts_first: bool


def match(graph: gs.Graph, conv: gs.Node) -> Match:
    """The block that a 1x1 convolution is part of, the first part if there are several.

    Raises:
        NoMatch: there are no shifts, or their maps are used elsewhere too.
    """
    weight = pointwise_weight(conv)
    if weight is None:
        raise NoMatch("it is no 1x1 convolution", Reached.NOTHING)
    forms = (_shifts_behind, _shifts_before)
    for form in forms if len(weight) >= weight.shape[1] else reversed(forms):
        if found := form(graph, conv):
            return found
    raise NoMatch("there are no fixed shifts around it", Reached.NOTHING)


def reduce(found: Match, request: Request) -> Reduced:
    """The block as one convolution. Raises NoMatch where its shifts do more than to shift and add."""
    x, y = found.region.x, found.region.y
    weights = [conv_weight(conv)[:, :, 0, 0] for conv in found.pointwise]
    bias = np.concatenate([conv_bias(conv) for conv in found.pointwise])
    size = request.values[x.name].shape
    if found.shifts_first:
        source, target = [x], found.pointwise[0].inputs[0]
        widths = [size[1]]
    else:
        source, target = [conv.outputs[0] for conv in found.pointwise], y
        widths = [len(weight) for weight in weights]

    def run(maps: Array) -> Array:
        parts = np.split(maps, np.cumsum(widths)[:-1], axis=1)
        feeds = {tensor.name: part for tensor, part in zip(source, parts, strict=True)}
        (result,) = request.compute([target], {**request.values, **feeds})
        return result

    shifts = read_shifts(run, (size[0], sum(widths), *size[2:]))
    one = collapse(np.concatenate(weights), bias, shifts, shifts_first=found.shifts_first)
    write = Writer(x, request.name, request.opset, weights[0].dtype)
    attrs: dict[str, Any] = {"pads": list(one.pads), "strides": [one.stride] * 2}
    result = write.conv("convolution", x, one.weight, one.bias, **attrs)
    if one.border.any():
        ones = write.ones(size[2:] if request.fixed_size else None)
        result = write.add("Add", "y", result, write.conv("biases", ones, one.border, **attrs))
    write.graph.outputs = [result]
    settings = {"kernel_shape": list(one.weight.shape[2:]), "stride": one.stride, "maps": sum(widths)}
    return Reduced(write.graph, "Conv", settings)


def _shifts_behind(graph: gs.Graph, conv: gs.Node) -> Match | None:
    """1x1 convolutions of one tensor, shifted and added: the block ends as late as it can. Raises NoMatch."""
    reason: NoMatch | None = None
    for y in reversed([*_downstream(conv.outputs[0])]):
        nodes = _nodes_between(y, lambda tensor: pointwise_weight(producer(tensor)) is not None)
        if nodes is None or not _shift_among(nodes):
            continue
        starts = {id(node): node for node in map(producer, _open_ends(nodes)) if node is not None}
        x = conv.inputs[0]
        pointwise = [node for node in x.outputs if id(node) in starts]
        if len(pointwise) < len(starts):
            reason = NoMatch(f"{y.name} adds maps that are not all 1x1 convolutions of {x.name}")
        elif pointwise[0] is not conv:
            raise NoMatch(f"its block is that of {pointwise[0].name}", Reached.NOTHING)
        else:
            try:
                return Match(region_between(graph, x, y), pointwise, shifts_first=False)
            except NoMatch as error:
                reason = error
    if reason:
        raise reason
    return None


def _shifts_before(graph: gs.Graph, conv: gs.Node) -> Match | None:
    """A 1x1 convolution of shifted maps: the block begins as late as it can. Raises NoMatch."""
    shifted = conv.inputs[0]
    for x in _upstream(shifted):
        nodes = _nodes_between(shifted, partial(operator.is_, x))
        if nodes is not None and _shift_among(nodes):
            return Match(region_between(graph, x, conv.outputs[0]), [conv], shifts_first=True)
    return None


def _downstream(tensor: gs.Variable) -> Iterator[gs.Variable]:
    """Where a block may end: results of what moves or adds the maps of ``tensor``, one after the other."""
    for _ in range(_LONGEST):
        node = next((user for user in tensor.outputs if _moves_or_adds(user)), None)
        if node is None:
            return
        tensor = node.outputs[0]
        if node.op in _ENDS:
            yield tensor


def _upstream(tensor: gs.Tensor) -> Iterator[gs.Variable]:
    """Where a block may begin: what the maps of ``tensor`` were made from, one before the other."""
    for _ in range(_LONGEST):
        node = producer(tensor)
        if node is None or not _moves_or_adds(node):
            return
        tensor = node.inputs[0]
        if isinstance(tensor, gs.Variable):
            yield tensor


def _nodes_between(y: gs.Variable, begins: Callable[[gs.Tensor], bool]) -> list[gs.Node] | None:
    """The nodes from tensors that ``begins`` accepts to ``y``; None if one does more than to move and add maps."""
    nodes: dict[int, gs.Node] = {}
    waiting: list[gs.Tensor] = [y]
    while waiting:
        tensor = waiting.pop()
        if begins(tensor) or constant_value(tensor) is not None:
            continue
        node = producer(tensor)
        if node is None or not _moves_or_adds(node):
            return None
        if id(node) not in nodes:
            nodes[id(node)] = node
            waiting += _maps(node)
    return list(nodes.values())


def _open_ends(nodes: Iterable[gs.Node]) -> Iterator[gs.Tensor]:
    """The maps that ``nodes`` read and do not make."""
    nodes = list(nodes)
    made = {id(tensor) for node in nodes for tensor in node.outputs}
    return (tensor for node in nodes for tensor in _maps(node) if id(tensor) not in made)


def _maps(node: gs.Node) -> list[gs.Tensor]:
    """The inputs of a node that are maps, not sizes."""
    return list(node.inputs) if node.op in _SUMS else [node.inputs[0]]


def _moves_or_adds(node: gs.Node) -> bool:
    return node.op in _MOVES or node.op in _SUMS or _is_shift(node)


def _shift_among(nodes: list[gs.Node]) -> bool:
    return any(map(_is_shift, nodes)) or {"Pad", "Slice"} <= {node.op for node in nodes}


def _is_shift(node: gs.Node) -> bool:
    weight = constant_value(node.inputs[1]) if node.op == "Conv" else None
    return weight is not None and is_shift(weight)


SHIFT_CONV = Family(
    name="shift_conv",
    anchors=("Conv",),
    match=match,
    reduce=reduce,
    tolerances=TOLERANCES,
)
