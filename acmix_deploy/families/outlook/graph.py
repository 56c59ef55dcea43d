"""Outlook attention in an ONNX graph: find it, read its two inner projections, and write what is between as one node.

A block is looked for from its Softmax: upstream to the linear layer of the logits, downstream over the weighted sum of
the values to the last linear layer, which stays as it is. In which layout the layers work, and how unfold and fold are
spelt, does not matter: both forms are compared as they compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.attention import is_product, layers_above
from acmix_deploy.families.family import Family
from acmix_deploy.families.reduction import Reduced, Request, Writer
from acmix_deploy.graph import (
    Array,
    NoMatch,
    Reached,
    Region,
    constant_value,
    conv_bias,
    nearest,
    pointwise_weight,
    producer,
    region_between,
    scalar_factor,
    way_down,
)
from acmix_deploy.operators.outlook_attention import OUTLOOK_ATTENTION
from acmix_deploy.operators.outlook_attention.body import function_body

_WEIGHTED_SUM = ("MatMul", "Einsum", "Mul")
_TO_NCHW, _TO_NHWC = [0, 3, 1, 2], [0, 2, 3, 1]


@dataclass(frozen=True)
class _Linear:
    """A linear layer over channels."""

    x: gs.Variable
    layout: str
    """Of x: NHWC before a MatMul, NCHW before a 1x1 convolution."""
    weight: Array
    """[Cout, Cin]."""
    bias: Array
    """[Cout]."""


@dataclass(frozen=True)
class Match:
    """The parts of one block in a graph."""

    region: Region
    x_layout: str
    y_layout: str
    logits: _Linear
    values: _Linear
    softmax: gs.Node
    scale: float
    stride: int
    ceil_mode: int
    """Of the average over squares: whether a map that they do not divide has one more."""


def match(graph: gs.Graph, softmax: gs.Node) -> Match:
    """The block around a Softmax node, by structure alone.

    Raises:
        NoMatch: saying what is missing.
    """
    logits = _nearest_linear(softmax.inputs[0])
    if logits is None:
        raise NoMatch("its logits do not come from one linear layer", Reached.NOTHING)
    layers, nodes = layers_above(softmax.inputs[0])
    if is_product(nodes, layers):
        raise NoMatch("its logits are products of queries and keys, not those of one linear layer", Reached.NOTHING)
    way = way_down(graph, softmax.outputs[0])
    weighted = next(((tensor, node) for tensor, node in way if node.op in _WEIGHTED_SUM), None)
    values = _nearest_linear(weighted[1].inputs[weighted[1].inputs[0] is weighted[0]]) if weighted else None
    if values is None:
        raise NoMatch("its weights are not multiplied with what comes from one linear layer", Reached.NOTHING)
    last = next((layer for _, node in way if (layer := _linear(node))), None)
    if last is None:
        raise NoMatch("its weighted sum is not read by one linear layer in the end")

    from_values = {tensor.name: layout for tensor, layout, pool in _upwards(values) if pool is None}
    shared = [found for found in _upwards(logits) if from_values.get(found[0].name) == found[1]]
    if not shared:
        raise NoMatch("its logits and its values do not come from one tensor, but for an average over squares")
    x, x_layout, pool = shared[-1]  # before it was transposed, where it was
    y, y_layout = last.x, last.layout
    before = producer(y)
    if y_layout == "NHWC" and before is not None and before.op == "Transpose" and before.attrs["perm"] == _TO_NHWC:
        y, y_layout = before.inputs[0], "NCHW"
    scale, _ = scalar_factor(softmax.inputs[0])
    stride, ceil_mode = (pool.attrs["strides"][0], pool.attrs.get("ceil_mode", 0)) if pool else (1, 0)
    return Match(region_between(graph, x, y), x_layout, y_layout, logits, values, softmax, scale, stride, ceil_mode)


def reduce(found: Match, request: Request) -> Reduced:
    """The block up to its last linear layer, as two 1x1 convolutions and the operator.

    Raises:
        NoMatch: its windows are not those of the operator.
    """
    (raw,) = request.compute([found.softmax.inputs[0]], request.values)
    places = raw.shape[found.softmax.attrs.get("axis", -1)]
    kernel_size = math.isqrt(places)
    if kernel_size**2 != places or kernel_size % 2 == 0 or kernel_size < 3:
        raise NoMatch(f"its Softmax runs over {places} values, no K*K for an odd K of at least 3")
    num_heads, rest = divmod(len(found.logits.weight), places**2)
    if rest or not num_heads or len(found.values.weight) % num_heads:
        raise NoMatch(
            f"{len(found.logits.weight)} logits a window and {len(found.values.weight)} channels are no heads with "
            f"{places}x{places} logits each"
        )
    attributes = {
        "num_heads": num_heads,
        "kernel_size": kernel_size,
        "stride": found.stride,
        "scale": found.scale,
    }
    graph = _rewrite(found, attributes, request.name, request.opset)
    return Reduced(graph, OUTLOOK_ATTENTION.op_type, attributes, height_axis=found.x_layout.index("H"))


def _rewrite(found: Match, attributes: dict[str, Any], name: str, opset: int) -> gs.Graph:
    """The reduced form as a graph of its own from x to one output, new nodes and tensors called ``name.``..."""
    x, stride = found.region.x, found.stride
    write = Writer(x, name, opset, found.values.weight.dtype)
    maps = x if found.x_layout == "NCHW" else write.add("Transpose", "maps", x, perm=_TO_NCHW)
    squares = maps
    if stride > 1:
        window: dict[str, Any] = {"kernel_shape": [stride] * 2, "strides": [stride] * 2}
        squares = write.add("AveragePool", "squares", maps, ceil_mode=found.ceil_mode, **window)
    logits, values = (
        write.conv(label, source, layer.weight[..., None, None], layer.bias)
        for label, source, layer in (("logits", squares, found.logits), ("values", maps, found.values))
    )
    y = write.operator(OUTLOOK_ATTENTION, "attention", logits, values, **attributes)
    write.graph.outputs = [y if found.y_layout == "NCHW" else write.add("Transpose", "y", y, perm=_TO_NHWC)]
    return write.graph


def _nearest_linear(tensor: gs.Tensor) -> _Linear | None:
    """The linear layer that ``tensor`` comes from; None where it comes from several or from another product."""
    found = nearest(tensor, "Conv", "MatMul")
    return _linear(found[0]) if len(found) == 1 else None


def _linear(node: gs.Node) -> _Linear | None:
    """A MatMul with a stored matrix and its bias, or a 1x1 convolution, as a linear layer; None for any other node."""
    if node.op not in ("Conv", "MatMul") or not isinstance(node.inputs[0], gs.Variable):
        return None
    if (pointwise := pointwise_weight(node)) is not None:
        return _Linear(node.inputs[0], "NCHW", pointwise[:, :, 0, 0], conv_bias(node))
    weight = constant_value(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return None
    sums = [user for user in node.outputs[0].outputs if user.op == "Add"]
    terms = [value for user in sums for operand in user.inputs if (value := constant_value(operand)) is not None]
    bias = terms[0].astype(np.float64) if terms and terms[0].shape == weight.shape[1:] else np.zeros(weight.shape[1])
    return _Linear(node.inputs[0], "NHWC", weight.T, bias)


def _upwards(layer: _Linear) -> Iterator[tuple[gs.Variable, str, gs.Node | None]]:
    """What a layer reads, and what that was before it was transposed or averaged over squares, with its layout and the
    node that averages."""
    tensor, layout = layer.x, layer.layout
    pool: gs.Node | None = None
    yield tensor, layout, pool
    while (node := producer(tensor)) is not None:
        if node.op == "Transpose" and len(perm := node.attrs["perm"]) == len(layout):
            layout = "".join(layout[perm.index(axis)] for axis in range(len(layout)))
        elif node.op == "AveragePool" and layout == "NCHW" and pool is None and _averages_squares(node):
            pool = node
        else:
            return
        tensor = node.inputs[0]
        yield tensor, layout, pool


def _averages_squares(pool: gs.Node) -> bool:
    height, width = pool.attrs["kernel_shape"]
    return height == width and pool.attrs.get("strides") == [height, width] and not any(pool.attrs.get("pads", []))


OUTLOOK = Family(
    name="outlook",
    anchors=("Softmax",),
    match=match,
    reduce=reduce,
    operators=((OUTLOOK_ATTENTION, function_body),),
    tolerances=OUTLOOK_ATTENTION.tolerances,
)
