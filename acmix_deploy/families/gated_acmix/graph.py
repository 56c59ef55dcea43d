"""Gated ACmix blocks in an ONNX graph: find them, measure their weights, and write them with one attention in the form
that runtimes know, one convolution and the gate. No PyTorch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.attention import (
    Attention,
    AttentionWriter,
    Heads,
    Linear,
    attention_at,
    common_origin,
    computed_by,
    linear,
    measure,
    next_node,
    origins,
)
from acmix_deploy.families.family import Family
from acmix_deploy.families.reduction import Reduced, Request
from acmix_deploy.graph import (
    Array,
    NoMatch,
    Reached,
    Region,
    constant_value,
    conv_bias,
    conv_weight,
    pointwise_weight,
    region_between,
)
from acmix_deploy.operators.spec import TOLERANCES


class Gate(NamedTuple):
    """The weights of the branches: ``sigmoid(second(relu(first(mean of x))))``."""

    pooled: gs.Variable
    """What is averaged."""
    first: Linear
    second: Linear
    sigmoid: gs.Variable
    """[B, 2]."""


@dataclass(frozen=True)
class Match:
    """The parts of one block in a graph."""

    region: Region
    attention: Attention
    proj: Linear
    carried: gs.Tensor
    """The result of the attention where it is projected."""
    weight: gs.Tensor
    """The gate's weight of the attention, where it is multiplied."""
    gate: Gate
    conv: gs.Node
    norm: gs.Node | None
    convolved: gs.Variable
    """The result of the convolution and its ReLU."""
    in_series: bool
    """Whether the attention reads ``convolved``, not x."""


def match(graph: gs.Graph, softmax: gs.Node) -> Match:
    """The block around a Softmax node, by structure alone.

    Raises:
        NoMatch: saying what is missing.
    """
    attention = attention_at(graph, softmax)
    node, carried = next_node(graph, attention.attended.outputs[0])
    proj = linear(node) if node.op in ("MatMul", "Gemm") else None
    if proj is None:
        raise NoMatch("its result is not projected", Reached.NOTHING)
    product, projected = next_node(graph, proj.result)
    weight = _other(product, projected) if product.op == "Mul" else None
    if weight is None or computed_by(weight) is None:
        raise NoMatch("its projected result is not weighed", Reached.NOTHING)
    total, weighed = next_node(graph, product.outputs[0])
    convolved = computed_by(_other(total, weighed)) if total.op == "Add" else None
    if convolved is None or convolved.op != "Mul":
        raise NoMatch("its weighed result is not added to another", Reached.NOTHING)

    gate = _gate(computed_by(weight))
    branches = [operand for operand in convolved.inputs if computed_by(operand) is not computed_by(weight)]
    relu = computed_by(branches[0]) if len(branches) == 1 else None
    if relu is None or relu.op != "Relu":
        raise NoMatch("beside its attention it does not weigh the ReLU of a convolution by the same gate")
    read = [part.source for part in attention.projections]
    in_series = all(any(one is relu.outputs[0] for one in origins(tensor)) for tensor in read)
    node = computed_by(relu.inputs[0])
    norm = node if node is not None and node.op == "BatchNormalization" else None
    conv = computed_by(norm.inputs[0]) if norm else node
    if conv is None or conv.op != "Conv":
        raise NoMatch(f"{relu.name} does not come from a convolution, perhaps with BatchNorm")
    if norm and any(constant_value(tensor) is None for tensor in norm.inputs[1:]):
        raise NoMatch(f"the weights of {norm.name} are computed, not stored")
    x = common_origin([conv.inputs[0], gate.pooled, *([] if in_series else read)], Reached.PARTS)
    region = region_between(graph, x, total.outputs[0])
    return Match(region, attention, proj, carried, weight, gate, conv, norm, relu.outputs[0], in_series)


def reduce(found: Match, request: Request) -> Reduced:
    """The block in its reduced form. Raises NoMatch where it computes something else than a gated ACmix."""
    x = found.region.x
    shape, channels = request.values[x.name].shape, found.gate.first.weight.shape[1]
    if len(shape) != 4 or shape[1] != channels:
        raise NoMatch(f"it reads {x.name} of shape {[*shape]}, no map of {channels} channels")
    attended_to = found.convolved if found.in_series else x
    (values,) = request.compute([attended_to], request.values)
    batch, _, height, width = values.shape
    index = np.arange(batch * height * width).reshape(batch, height, width) + 1
    pixels = np.broadcast_to(index[:, None], values.shape)
    heads = measure(found.attention, attended_to, found.carried, pixels, request.values, request.compute)
    if heads.added.any():
        raise NoMatch("its logits are not those of queries and keys alone")
    tokens = _tokens(heads, index)
    alone = request.static and heads.tokens.shape[1] == 1

    writer = AttentionWriter(x, request.name, request.opset, found.proj.weight.dtype)
    convolved = writer.add("Relu", "convolution.relu", _convolve(writer, found))
    source = convolved if found.in_series else x
    size = (height, width) if request.fixed_size else None
    attended = _alone(writer, source, found, heads) if alone else _attend(writer, source, found, heads, tokens, size)
    weights = _weigh(writer, found, request)
    weighed = [
        writer.add("Mul", f"{label}.weighed", branch, weight)
        for label, branch, weight in zip(("convolution", "attention"), (convolved, attended), weights, strict=True)
    ]
    writer.graph.outputs = [writer.add("Add", "y", *weighed)]
    settings = {
        "num_heads": len(heads.q[0]),
        "kernel_size": conv_weight(found.conv).shape[2],
        "sequence_first": tokens.sequence_first,
        "in_series": found.in_series,
        "window_size": tokens.window,
    }
    smallest = tokens.window or 1
    return Reduced(writer.graph, "Conv" if alone else "MatMul, Softmax, MatMul", settings, smallest)


def _attend(
    writer: AttentionWriter,
    source: gs.Variable,
    found: Match,
    heads: Heads,
    tokens: Tokens,
    size: tuple[int, int] | None,
) -> gs.Variable:
    """The attention over ``source`` and its projection, [B, C, H, W]; ``size`` is H and W where they are fixed."""
    channels, window = heads.q[0].shape[2], tokens.window
    if window is None:
        to_tokens, to_maps = ([2, 0, 1], [1, 2, 0]) if tokens.sequence_first else ([0, 2, 1], [0, 2, 1])
        cut = writer.add("Transpose", "tokens", writer.reshape("pixels", source, 0, channels, -1), perm=to_tokens)
        attended = writer.linear("projected", writer.attention(cut, heads, None), found.proj.weight, found.proj.bias)
        pixels = writer.add("Transpose", "attention.pixels", attended, perm=to_maps)
        if size is None:
            return writer.add("Reshape", "attention.map", pixels, writer.size("size", 0, 4, source))
        return writer.reshape("attention.map", pixels, 0, channels, *size)

    sides = size or [writer.size(label, axis, axis + 1, source) for axis, label in ((2, "height"), (3, "width"))]
    rows, columns = (
        writer.arithmetic("Div", label, side, window) for label, side in zip(("rows", "columns"), sides, strict=True)
    )
    grid = writer.reshape("grid", source, 0, 0, rows, window, columns, window)
    by_window = writer.add("Transpose", "by_window", grid, perm=[0, 2, 4, 3, 5, 1])
    cut = writer.reshape("windows", by_window, -1, window * window, channels)
    if tokens.sequence_first:
        cut = writer.add("Transpose", "tokens", cut, perm=[1, 0, 2])
    attended = writer.linear("projected", writer.attention(cut, heads, None), found.proj.weight, found.proj.bias)
    if tokens.sequence_first:
        attended = writer.add("Transpose", "attention.windows", attended, perm=[1, 0, 2])
    grid = writer.reshape("attention.grid", attended, -1, rows, columns, window, window, channels)
    by_row = writer.add("Transpose", "attention.by_row", grid, perm=[0, 5, 1, 3, 2, 4])
    return writer.reshape("attention.map", by_row, 0, 0, *sides)


def _alone(writer: AttentionWriter, source: gs.Variable, found: Match, heads: Heads) -> gs.Variable:
    """The attention and its projection for tokens that have nothing but themselves to attend to, [B, C, H, W]."""
    values, value_bias = heads.v[0].reshape(-1, heads.v[0].shape[2]), heads.v[1].reshape(-1)
    project = found.proj.weight.astype(np.float64)
    bias = found.proj.bias + project @ value_bias
    return writer.conv("attention", source, (project @ values)[:, :, None, None], bias)


def _convolve(writer: AttentionWriter, found: Match) -> gs.Variable:
    """The convolution with its BatchNorm in its weights."""
    weight, bias = conv_weight(found.conv).astype(np.float64), conv_bias(found.conv)
    if found.norm:
        stored = (constant_value(tensor) for tensor in found.norm.inputs[1:])
        scale, shift, mean, variance = (array.astype(np.float64) for array in stored if array is not None)
        factor = scale / np.sqrt(variance + found.norm.attrs.get("epsilon", 1e-5))
        weight, bias = weight * factor[:, None, None, None], (bias - mean) * factor + shift
    names = ("group", "pads", "strides", "dilations")
    attrs = {name: found.conv.attrs[name] for name in names if name in found.conv.attrs}
    return writer.conv("convolution", found.region.x, weight, bias, **attrs)


def _weigh(writer: AttentionWriter, found: Match, request: Request) -> list[gs.Variable]:
    """The gate's weights of the convolution and of the attention, [B, 1, 1, 1] each."""
    gate = found.gate
    (sigmoid,) = request.compute([gate.sigmoid], request.values)
    if sigmoid.shape[1] != 2:
        raise NoMatch(f"its gate has {sigmoid.shape[1]} weights, not 2")
    marks = np.broadcast_to(np.arange(2).reshape(2, *[1] * (sigmoid.ndim - 2)), sigmoid.shape).astype(np.float32)
    (place,) = request.compute([found.weight], request.values | {gate.sigmoid.name: marks})
    gated = writer.reshape("gate.mean", writer.add("GlobalAveragePool", "gate.pool", found.region.x), 0, -1)
    for label, layer, activation in (("first", gate.first, "Relu"), ("second", gate.second, "Sigmoid")):
        operands = (
            writer.constant(f"gate.{label}.weight", layer.weight),
            writer.constant(f"gate.{label}.bias", layer.bias),
        )
        gated = writer.add(
            activation, f"gate.{label}.active", writer.add("Gemm", f"gate.{label}", gated, *operands, transB=1)
        )
    maps = writer.reshape("gate.maps", gated, 0, 2, 1, 1)
    last = int(place.max())
    return [
        writer.add("Gather", f"gate.{label}", maps, writer.constant(f"gate.{label}.index", np.array([at])), axis=1)
        for label, at in (("convolution", 1 - last), ("attention", last))
    ]


class Tokens(NamedTuple):
    """What attends to each other."""

    window: int | None
    """Side of the windows; None where there are none."""
    sequence_first: bool
    """Whether a sequence is one place in all images, or windows, rather than all pixels of one."""


def _tokens(heads: Heads, index: Array) -> Tokens:
    """The sequences of ``heads``, for 1 + index of each pixel [B, H, W]. Raises NoMatch for others than there are."""
    rows = np.unique(np.sort(heads.tokens, axis=1), axis=0)
    batch, height, width = index.shape
    count = heads.tokens.shape[1]
    sides = (math.isqrt(pixels) for pixels in (count, index.size // count))
    windows = [side for side in sides if side and height % side == width % side == 0]
    for window in (None, *windows):
        cut = index.reshape(batch, -1)
        if window is not None:
            grid = index.reshape(batch, height // window, window, width // window, window)
            cut = grid.swapaxes(2, 3).reshape(-1, window * window)
        for sequence_first, sequences in ((False, cut), (True, cut.T)):
            if np.array_equal(rows, np.unique(np.sort(sequences, axis=1), axis=0)):
                return Tokens(window, sequence_first)
    raise NoMatch("its tokens are not the pixels of an image or of a square window, nor one place in all of these")


def _gate(node: gs.Node | None) -> Gate:
    """The gate that ends with ``node``. Raises NoMatch."""
    if node is None or node.op != "Sigmoid":
        raise NoMatch(f"its result is weighed by {node.op if node else 'an input'}, not by the Sigmoid of a gate")
    layers: list[Linear] = []
    before = node
    for following in ("Relu", "GlobalAveragePool"):
        before = computed_by(before.inputs[0])
        if before is not None and before.op == "Add":  # the bias
            before = next((computed_by(tensor) for tensor in before.inputs if constant_value(tensor) is None), None)
        layer = _layer(before)
        before = computed_by(layer.source) if layer else None
        if layer is None or before is None or before.op not in (following, "ReduceMean"):
            raise NoMatch(f"{node.name} is not that of two linear layers with a ReLU between them of a mean")
        layers.append(layer)
    return Gate(before.inputs[0], layers[1], layers[0], node.outputs[0])


def _layer(node: gs.Node | None) -> Linear | None:
    """A linear layer of the gate: a product with a matrix, or a 1x1 convolution."""
    if node is not None and (weight := pointwise_weight(node)) is not None:
        return Linear(node.inputs[0], node.outputs[0], weight[:, :, 0, 0], conv_bias(node))
    return linear(node) if node is not None and node.op in ("MatMul", "Gemm") else None


def _other(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    """The operand of a node with two that is not ``tensor``."""
    return node.inputs[node.inputs[0] is tensor]


GATED_ACMIX = Family(
    name="gated_acmix",
    anchors=("Softmax",),
    match=match,
    reduce=reduce,
    tolerances=TOLERANCES,
)
