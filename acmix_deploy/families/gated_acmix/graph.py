"""Gated ACmix blocks in an ONNX graph: find them, measure their weights, and write them with one attention in the form
that runtimes know, one convolution and the gate. No PyTorch here."""

from __future__ import annotations

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
    node = computed_by(relu.inputs[0])
    norm = node if node is not None and node.op == "BatchNormalization" else None
    conv = computed_by(norm.inputs[0]) if norm else node
    if conv is None or conv.op != "Conv":
        raise NoMatch(f"{relu.name} does not come from a convolution, perhaps with BatchNorm")
    if norm and any(constant_value(tensor) is None for tensor in norm.inputs[1:]):
        raise NoMatch(f"the weights of {norm.name} are computed, not stored")
    x = common_origin([conv.inputs[0], gate.pooled, *(part.source for part in attention.projections)], Reached.PARTS)
    region = region_between(graph, x, total.outputs[0])
    return Match(region, attention, proj, carried, weight, gate, conv, norm)


def reduce(found: Match, request: Request) -> Reduced:
    """The block in its reduced form. Raises NoMatch where it computes something else than a gated ACmix."""
    x = found.region.x
    shape = request.values[x.name].shape
    channels = len(conv_weight(found.conv))
    if len(shape) != 4 or shape[1] != channels:
        raise NoMatch(f"it reads {x.name} of shape {[*shape]}, no map of {channels} channels")
    batch, _, height, width = shape
    index = np.arange(batch * height * width).reshape(batch, 1, height, width) + 1
    heads = measure(found.attention, x, found.carried, np.broadcast_to(index, shape), request.values, request.compute)
    if heads.added.any():
        raise NoMatch("its logits are not those of queries and keys alone")
    sequence_first = _attends_along_the_batch(heads, index.reshape(batch, -1))
    alone = sequence_first and request.static and batch == 1

    writer = AttentionWriter(x, request.name, request.opset, found.proj.weight.dtype)
    attended = _alone(writer, found, heads) if alone else _attend(writer, found, heads, sequence_first, request)
    convolved = writer.add("Relu", "convolution.relu", _convolve(writer, found))
    weights = _weigh(writer, found, request)
    weighed = [
        writer.add("Mul", f"{label}.weighed", branch, weight)
        for label, branch, weight in zip(("convolution", "attention"), (convolved, attended), weights, strict=True)
    ]
    writer.graph.outputs = [writer.add("Add", "y", *weighed)]
    settings = {
        "num_heads": len(heads.q[0]),
        "kernel_size": conv_weight(found.conv).shape[2],
        "sequence_first": sequence_first,
    }
    return Reduced(writer.graph, "Conv" if alone else "MatMul, Softmax, MatMul", settings)


def _attend(writer: AttentionWriter, found: Match, heads: Heads, sequence_first: bool, request: Request) -> gs.Variable:
    """The attention and its projection, [B, C, H, W]."""
    x = found.region.x
    _, channels, height, width = request.values[x.name].shape
    to_tokens, to_maps = ([2, 0, 1], [1, 2, 0]) if sequence_first else ([0, 2, 1], [0, 2, 1])
    tokens = writer.add("Transpose", "tokens", writer.reshape("pixels", x, 0, channels, -1), perm=to_tokens)
    attended = writer.linear("projected", writer.attention(tokens, heads, None), found.proj.weight, found.proj.bias)
    pixels = writer.add("Transpose", "attention.pixels", attended, perm=to_maps)
    if request.fixed_size:
        return writer.reshape("attention.map", pixels, 0, channels, height, width)
    return writer.add("Reshape", "attention.map", pixels, writer.size("size", 0, 4))


def _alone(writer: AttentionWriter, found: Match, heads: Heads) -> gs.Variable:
    """The attention and its projection for tokens that have nothing but themselves to attend to, [B, C, H, W]."""
    values, value_bias = heads.v[0].reshape(-1, heads.v[0].shape[2]), heads.v[1].reshape(-1)
    project = found.proj.weight.astype(np.float64)
    bias = found.proj.bias + project @ value_bias
    return writer.conv("attention", found.region.x, (project @ values)[:, :, None, None], bias)


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
    marks = np.broadcast_to(np.arange(2), sigmoid.shape).astype(np.float32) if sigmoid.shape[-1] == 2 else None
    if marks is None:
        raise NoMatch(f"its gate has {sigmoid.shape[-1]} weights, not 2")
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


def _attends_along_the_batch(heads: Heads, index: Array) -> bool:
    """Whether a sequence is one pixel of all images rather than all pixels of one image. Raises NoMatch for others."""
    rows = np.unique(heads.tokens, axis=0)
    for sequence_first, sequences in ((False, index), (True, index.T)):
        if np.array_equal(rows, np.unique(sequences, axis=0)):
            return sequence_first
    raise NoMatch("its tokens are neither all pixels of an image nor one pixel of all images")


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
        layer = linear(before) if before is not None and before.op in ("MatMul", "Gemm") else None
        before = computed_by(layer.source) if layer else None
        if layer is None or before is None or before.op not in (following, "ReduceMean"):
            raise NoMatch(f"{node.name} is not that of two linear layers with a ReLU between them of a mean")
        layers.append(layer)
    return Gate(before.inputs[0], layers[1], layers[0], node.outputs[0])


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
