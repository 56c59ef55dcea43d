"""CAFM blocks in an ONNX graph: find them, measure their temperatures, and write them without a depth of 1. No PyTorch
here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.attention import AttentionWriter, check_residual, computed_by, next_node
from acmix_deploy.families.family import Family
from acmix_deploy.families.reduction import Reduced, Request
from acmix_deploy.graph import (
    Array,
    NoMatch,
    Reached,
    Region,
    conv_bias,
    conv_weight,
    nearest,
    producer,
    region_between,
)
from acmix_deploy.operators.spec import TOLERANCES

_EPSILON = 1e-12
"""Least length that a row is divided by, as torch.nn.functional.normalize has it."""


@dataclass(frozen=True)
class Match:
    """The parts of one block in a graph."""

    region: Region
    softmax: gs.Node
    qkv: gs.Node
    depthwise: gs.Node
    fc: gs.Node
    dep_conv: gs.Node
    proj: gs.Node


def match(graph: gs.Graph, softmax: gs.Node) -> Match:
    """The block around a Softmax node, by structure alone.

    Raises:
        NoMatch: saying what is missing.
    """
    sources = nearest(softmax.inputs[0], "Conv")
    attended, weights = next_node(graph, softmax.outputs[0])
    if len(sources) != 1 or attended.op != "MatMul" or attended.inputs[0] is not weights:
        raise NoMatch("its logits do not come from one convolution, or weigh no values", Reached.NOTHING)
    (depthwise,) = sources
    proj, _ = next_node(graph, attended.outputs[0])
    total, projected = next_node(graph, proj.outputs[0]) if proj.op == "Conv" else (proj, weights)
    if proj.op != "Conv" or total.op != "Add":
        raise NoMatch("its result is not that of a convolution added to another", Reached.NOTHING)
    dep_conv = computed_by(total.inputs[total.inputs[0] is projected])
    fc = _conv_before(dep_conv)
    if dep_conv is None or dep_conv.op != "Conv" or fc is None or _conv_before(fc) is not depthwise:
        raise NoMatch("beside its attention there are not two convolutions of the same queries, keys and values")
    qkv = _conv_before(depthwise)
    if qkv is None:
        raise NoMatch("its queries, keys and values do not come from two convolutions")
    x = qkv.inputs[0]
    unsqueeze = producer(x)
    if conv_weight(qkv).ndim == 5 and unsqueeze is not None and unsqueeze.op in ("Unsqueeze", "Reshape"):
        x = unsqueeze.inputs[0]
    return Match(region_between(graph, x, total.outputs[0]), softmax, qkv, depthwise, fc, dep_conv, proj)


def reduce(found: Match, request: Request) -> Reduced:
    """The block in its reduced form. Raises NoMatch where it computes something else than a CAFM."""
    x = found.region.x
    shape = request.values[x.name].shape
    weights = {name: _flat(getattr(found, name)) for name in ("qkv", "depthwise", "fc", "dep_conv", "proj")}
    dim, heads = len(weights["proj"]), weights["fc"].shape[1] // 3
    d = dim // heads if heads else 0
    expected = {
        "qkv": (3 * dim, dim, 1, 1),
        "depthwise": (3 * dim, 1, 3, 3),
        "fc": (9, 3 * heads, 1, 1),
        "dep_conv": (dim, 9, 3, 3),
        "proj": (dim, dim, 1, 1),
    }
    if len(shape) != 4 or any(weights[name].shape != wanted for name, wanted in expected.items()) or d * heads != dim:
        raise NoMatch(f"its convolutions are not those of {dim} channels and {heads} heads: {_told(weights)}")
    temperature, reads = _temperature(found, request, heads), _reads(found, request, heads)

    writer = AttentionWriter(x, request.name, request.opset, weights["proj"].dtype)

    def conv(label: str, source: gs.Tensor, node: gs.Node) -> gs.Variable:
        weight, group = weights[label], node.attrs.get("group", 1)
        pads = {"pads": [1] * 4} if weight.shape[2:] == (3, 3) else {}
        return writer.conv(label, source, weight, conv_bias(node), group=group, **pads)

    qkv = conv("depthwise", conv("qkv", x, found.qkv), found.depthwise)
    by_head = writer.reshape("by_head", qkv, 0, 3 * heads, d, -1)
    attended = _attend(writer, by_head, heads, temperature, request.opset)
    if reads == "pixel":
        rows = writer.add("Transpose", "rows", by_head, perm=[0, 1, 3, 2])
    elif reads == "head":
        rows = writer.reshape("rows", qkv, 0, 3 * heads, -1, d)
    else:
        memory = writer.reshape("memory", qkv, 0, -1, 3 * heads, d)
        rows = writer.add("Transpose", "rows", memory, perm=[0, 2, 1, 3])
    mixed = conv("fc", rows, found.fc)
    columns = writer.add("Transpose", "by_column", mixed, perm=[0, 3, 1, 2])
    size = shape[2:] if request.fixed_size else (writer.size("height", 2, 3), writer.size("width", 3, 4))
    convolved = conv("dep_conv", writer.reshape("maps", columns, 0, 9 * d, *size), found.dep_conv)
    projected = conv("proj", writer.reshape("attended.map", attended, 0, dim, *size), found.proj)
    writer.graph.outputs = [writer.add("Add", "y", projected, convolved)]
    return Reduced(writer.graph, "MatMul, Softmax, MatMul", {"num_heads": heads, "reads": reads})


def _attend(writer: AttentionWriter, by_head: gs.Variable, heads: int, temperature: Array, opset: int) -> gs.Variable:
    """The attention of channels to channels, [B, heads, d, H*W], of q, k and v [B, 3 * heads, d, H*W]."""

    def part(label: str, source: gs.Tensor, start: int, end: int) -> gs.Variable:
        limits = (
            writer.constant(f"{label}.{name}", np.array([value]))
            for name, value in (("start", start), ("end", end), ("axis", 1))
        )
        return writer.add("Slice", label, source, *limits)

    read = part("queries_and_keys", by_head, 0, 2 * heads)
    axes = np.array([3])
    lengths = (
        writer.add("ReduceL2", "length", read, axes=axes.tolist(), keepdims=1)
        if opset < 18
        else writer.add("ReduceL2", "length", read, writer.constant("length.axes", axes), keepdims=1)
    )
    least = writer.add("Max", "length.least", lengths, writer.constant("length.epsilon", np.array(_EPSILON)))
    normal = writer.add("Div", "normal", read, least)
    queries, keys = part("q", normal, 0, heads), part("k", normal, heads, 2 * heads)
    logits = writer.add("MatMul", "products", queries, writer.add("Transpose", "k.transposed", keys, perm=[0, 1, 3, 2]))
    scaled = writer.add("Mul", "logits", logits, writer.constant("temperature", temperature.reshape(-1, 1, 1)))
    weights = writer.add("Softmax", "weights", scaled, axis=-1)
    return writer.add("MatMul", "attended", weights, part("v", by_head, 2 * heads, 3 * heads))


def _temperature(found: Match, request: Request, heads: int) -> Array:
    """The factor of each head's logits, by the logits of random queries and keys. Raises NoMatch for other logits."""
    read = found.depthwise.outputs[0]
    (values,) = request.compute([read], request.values)
    random = np.random.default_rng(0).standard_normal(values.shape).astype(np.float32)
    (logits,) = request.compute([found.softmax.inputs[0]], request.values | {read.name: random})
    parts = random.astype(np.float64).reshape(len(random), 3, heads, values.shape[1] // (3 * heads), -1)
    q, k = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (parts[:, 0], parts[:, 1]))
    products = q @ k.swapaxes(-1, -2)
    axis = found.softmax.attrs.get("axis", -1)
    if logits.shape != products.shape or axis not in (-1, 3):
        raise NoMatch(f"its logits have shape {[*logits.shape]}, not one map of channels and channels a head")
    factor = (logits * products).sum((0, 2, 3), keepdims=True) / (products**2).sum((0, 2, 3), keepdims=True)
    residual = float(np.linalg.norm(logits - factor * products) / (np.linalg.norm(logits) or 1.0))
    check_residual(residual, "temperature times q.k of rows of length 1")
    temperature: Array = factor.reshape(-1)
    return temperature


def _reads(found: Match, request: Request, heads: int) -> Literal["memory", "head", "pixel"]:
    """What the maps are that are mixed to nine: of one pixel, or neighbours in the memory of all maps or of a head's.

    Raises:
        NoMatch: they are others.
    """
    read = found.depthwise.outputs[0]
    (values,) = request.compute([read], request.values)
    index: Array = np.arange(values.size).astype(np.float32)
    (mixed,) = request.compute([found.fc.inputs[0]], request.values | {read.name: index.reshape(values.shape)})
    batch, channels, pixels = len(values), values.shape[1], values[0, 0].size
    d = channels // (3 * heads)
    orders: dict[Literal["memory", "head", "pixel"], Array] = {
        "memory": index.reshape(batch, pixels, 3 * heads, d).swapaxes(1, 2),
        "head": index,
        "pixel": index.reshape(batch, 3 * heads, d, pixels).swapaxes(2, 3),
    }
    for name, order in orders.items():
        if np.array_equal(mixed.reshape(-1), order.reshape(-1)):
            return name
    raise NoMatch("what it mixes to nine maps are neither the maps of one pixel nor neighbours in memory")


def _conv_before(node: gs.Node | None) -> gs.Node | None:
    before = computed_by(node.inputs[0]) if node is not None else None
    return before if before is not None and before.op == "Conv" else None


def _flat(conv: gs.Node) -> Array:
    """The weight of a convolution without its depth, where that is 1. Raises NoMatch for weights that are computed."""
    weight = conv_weight(conv)
    flat: Array = weight[:, :, weight.shape[2] // 2] if weight.ndim == 5 else weight
    return flat


def _told(weights: dict[str, Array]) -> str:
    return ", ".join(f"{name} {[*weight.shape]}" for name, weight in weights.items())


CAFM = Family(
    name="cafm",
    anchors=("Softmax",),
    match=match,
    reduce=reduce,
    tolerances=TOLERANCES,
)
