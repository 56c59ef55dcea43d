"""Windowed ACmix blocks in an ONNX graph: find them, measure their weights, and write them with one attention in the
form that runtimes know, one convolution and the projection. No PyTorch here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.attention import (
    MASKED,
    Attention,
    AttentionWriter,
    Heads,
    Linear,
    Size,
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
    producer,
    region_between,
    way_down,
)
from acmix_deploy.operators.spec import TOLERANCES


class Norm(NamedTuple):
    """A LayerNorm over the channels."""

    result: gs.Variable
    scale: Array
    """[C], or one number; so is the shift."""
    shift: Array
    epsilon: float


@dataclass(frozen=True)
class Match:
    """The parts of one block in a graph."""

    region: Region
    attention: Attention
    conv: gs.Node
    carried: gs.Tensor
    """The result of the attention where it is added to that of the convolution."""
    norm: Norm | None
    proj: Linear


def match(graph: gs.Graph, softmax: gs.Node) -> Match:
    """The block around a Softmax node, by structure alone.

    Raises:
        NoMatch: saying what is missing.
    """
    attention = attention_at(graph, softmax)
    total, carried = next_node(graph, attention.attended.outputs[0])
    own = linear(total) if total.op in ("MatMul", "Gemm") else None
    if own:
        total, carried = next_node(graph, own.result)
    operands = [operand for operand in total.inputs if operand is not carried]
    conv = _conv_behind(operands[0]) if total.op == "Add" and operands else None
    if conv is None:
        raise NoMatch("its result is not added to that of a depthwise convolution", Reached.NOTHING)
    x = common_origin([conv.inputs[0], *(part.source for part in attention.projections)])
    if own:
        raise NoMatch("its attention has a projection of its own")
    kernel, pads = conv_weight(conv).shape[2:], conv.attrs.get("pads", [0] * 4)
    if (
        len({*kernel}) != 1
        or pads != [kernel[0] // 2] * 4
        or {1} != {*conv.attrs.get("strides", np.array([1])), *conv.attrs.get("dilations", np.array([1]))}
    ):
        raise NoMatch(f"{conv.name} is not a depthwise convolution with an odd square kernel that keeps the map size")
    norm = _norm(total.outputs[0])
    node, _ = next_node(graph, norm.result if norm else total.outputs[0], Reached.PARTS)
    proj = linear(node) if node.op in ("MatMul", "Gemm") else None
    if proj is None:
        raise NoMatch(f"what it adds is not projected, perhaps after a LayerNorm, but goes to {node.name}")
    return Match(region_between(graph, x, _end(graph, node, proj)), attention, conv, carried, norm, proj)


def reduce(found: Match, request: Request) -> Reduced:
    """The block in its reduced form. Raises NoMatch where it computes something else than a windowed ACmix."""
    x = found.region.x
    shape = request.values[x.name].shape
    if len(shape) != 4:
        raise NoMatch(f"it reads {x.name} of shape {[*shape]}, no map")
    channels_first = _channels_first(found, request)
    batch, height, width = (shape[0], *shape[2:]) if channels_first else shape[:3]
    index = np.arange(batch * height * width).reshape(batch, height, width) + 1
    pixels = np.broadcast_to(index[:, None] if channels_first else index[..., None], shape)
    heads = measure(found.attention, x, found.carried, pixels, request.values, request.compute)
    window = math.isqrt(heads.tokens.shape[1])
    table = _table(heads, window, index)

    writer = AttentionWriter(x, request.name, request.opset, found.proj.weight.dtype)
    divides = not request.fixed_size and not _takes_any_size(found, window, channels_first, request)
    attended = _attend(writer, x, heads, window, table, channels_first, (batch, height, width), divides, request)
    y = writer.add("Add", "sum", attended, _convolve(writer, found, channels_first))
    if found.norm:
        width = found.proj.weight.shape[1]
        parameters = []
        for label, values in (("scale", found.norm.scale), ("shift", found.norm.shift)):
            if values.size not in (1, width):
                raise NoMatch(f"its norm has a {label} of shape {[*values.shape]}, not one number a channel")
            parameters.append(writer.constant(f"norm.{label}", np.broadcast_to(values.reshape(-1), width)))
        y = writer.add("LayerNormalization", "norm", y, *parameters, axis=-1, epsilon=found.norm.epsilon)
    y = writer.linear("y", y, found.proj.weight, found.proj.bias)
    (original,) = request.compute([found.region.y], request.values)
    if original.ndim == 3:
        y = writer.reshape("y.tokens", y, 0, -1, original.shape[-1])
    writer.graph.outputs = [y]
    settings = {
        "num_heads": len(heads.q[0]),
        "window_size": window,
        "kernel_size": conv_weight(found.conv).shape[2],
        "position_bias": table is not None,
        "norm": found.norm is not None,
    }
    smallest = window if divides else 1
    return Reduced(writer.graph, "MatMul, Softmax, MatMul", settings, smallest, height_axis=2 if channels_first else 1)


def _takes_any_size(found: Match, window: int, channels_first: bool, request: Request) -> bool:
    """Whether the block runs where its windows do not divide the map; so it is taken to, where nothing tells."""
    if any(constant_value(tensor) is None for tensor in found.region.outside):
        return True
    x = found.region.x
    batch, *sizes = request.values[x.name].shape
    channels = sizes[0] if channels_first else sizes[-1]
    size = window + 1, 2 * window + 1
    shape = (batch, channels, *size) if channels_first else (batch, *size, channels)
    try:
        request.compute([found.region.y], request.values | {x.name: np.zeros(shape, np.float32)})
    except NoMatch:
        return False
    return True


def _attend(
    writer: AttentionWriter,
    x: gs.Variable,
    heads: Heads,
    window: int,
    table: Array | None,
    channels_first: bool,
    shape: tuple[int, int, int],
    divides: bool,
    request: Request,
) -> gs.Variable:
    """The attention, [B, H, W, C]; ``divides`` where it is defined for maps alone that the windows divide."""
    pixels = writer.add("Transpose", "x.channels_last", x, perm=[0, 2, 3, 1]) if channels_first else x
    channels_in, channels = heads.v[0].shape[2], heads.v[0].shape[0] * heads.v[0].shape[1]
    batch, height, width = _sizes(writer, x, channels_first, shape, request)

    def windows(label: str, size: Size) -> tuple[Size, Size]:
        """How many windows lie over ``size`` pixels, and how many pixels they have."""
        if divides:
            return writer.arithmetic("Div", label, size, window), size
        count = writer.arithmetic("Div", label, writer.arithmetic("Add", f"{label}.up", size, window - 1), window)
        return count, writer.arithmetic("Mul", f"{label}.pixels", count, window)

    (rows, bottom), (columns, right) = windows("rows", height), windows("columns", width)
    whole = divides or (bottom, right) == (height, width)

    def cut(label: str, maps: gs.Tensor, padding: float, depth: int) -> gs.Variable:
        """[B, H, W, depth] -> [B * windows, N, depth]"""
        if not whole:
            more = (
                writer.arithmetic("Sub", f"{label}.below", bottom, height),
                writer.arithmetic("Sub", f"{label}.beside", right, width),
            )
            pads = writer.sizes(f"{label}.pads", 0, 0, 0, 0, 0, *more, 0)
            maps = writer.add(
                "Pad", f"{label}.padded", maps, pads, writer.constant(f"{label}.padding", np.array(padding))
            )
        # With the batch told no other size has this shape.
        grid = writer.reshape(f"{label}.grid", maps, batch if divides else -1, rows, window, columns, window, depth)
        by_window = writer.add("Transpose", f"{label}.by_window", grid, perm=[0, 1, 3, 2, 4, 5])
        return writer.reshape(label, by_window, -1, window * window, depth)

    mask: gs.Tensor | None = None
    if not whole and request.static:
        mask = writer.constant("mask", _cut(np.zeros(shape), window, MASKED)[:, None, None])
    elif not whole:
        zero = gs.Constant("zero", np.zeros(1, writer.dtype))
        inside = writer.add(
            "ConstantOfShape", "inside", writer.sizes("inside.shape", batch, height, width, 1), value=zero
        )
        keys = writer.add("Transpose", "mask.keys", cut("mask", inside, MASKED, 1), perm=[0, 2, 1])
        mask = writer.add("Unsqueeze", "mask.by_head", keys, writer.constant("mask.axes", np.array([1])))
    bias = None if table is None else writer.constant("position_bias", table[None])
    added = mask if bias is None else bias
    if bias is not None and mask is not None:
        added = writer.add("Add", "mask.and_position_bias", bias, mask)
    attended = writer.attention(cut("tokens", pixels, 0.0, channels_in), heads, added)
    grid = writer.reshape("attention.grid", attended, -1, rows, columns, window, window, channels)
    by_row = writer.add("Transpose", "attention.by_row", grid, perm=[0, 1, 3, 2, 4, 5])
    maps = writer.reshape("attention.map", by_row, -1, bottom, right, channels)
    if whole:
        return maps
    starts, ends, axes = (
        writer.constant("attention.starts", np.array([0, 0])),
        writer.sizes("attention.ends", height, width),
        writer.constant("attention.axes", np.array([1, 2])),
    )
    return writer.add("Slice", "attention.cropped", maps, starts, ends, axes)


def _sizes(
    writer: AttentionWriter, x: gs.Variable, channels_first: bool, shape: tuple[int, int, int], request: Request
) -> tuple[Size, Size, Size]:
    """Batch, height and width of x: numbers where they are fixed, and nodes where they are not."""

    def node(label: str, axis: int) -> gs.Variable:
        return writer.size(label, axis, axis + 1)

    batch = shape[0] if request.static else node("batch", 0)
    if request.fixed_size:
        return batch, *shape[1:]
    first = 2 if channels_first else 1
    return batch, node("height", first), node("width", first + 1)


def _convolve(writer: AttentionWriter, found: Match, channels_first: bool) -> gs.Variable:
    """The convolution, [B, H, W, C]."""
    x, conv = found.region.x, found.conv
    maps = x if channels_first else writer.add("Transpose", "x.channels_first", x, perm=[0, 3, 1, 2])
    attrs = {name: conv.attrs[name] for name in ("group", "pads")}
    convolved = writer.conv("convolution", maps, conv_weight(conv), conv_bias(conv), **attrs)
    return writer.add("Transpose", "convolution.channels_last", convolved, perm=[0, 2, 3, 1])


def _table(heads: Heads, window: int, index: Array) -> Array | None:
    """The bias [heads, N, N] that is added to the logits in every window, if any is.

    Args:
        heads: the attention.
        window: side of a window.
        index: 1 + index of each pixel [B, H, W].

    Raises:
        NoMatch: the attention is not one within windows, or padding is attended to.
    """
    if window**2 != heads.tokens.shape[1]:
        raise NoMatch(f"its Softmax runs over {heads.tokens.shape[1]} tokens, no square window")
    grid = _cut(index, window, 0)
    if not np.array_equal(np.unique(heads.tokens, axis=0), np.unique(grid, axis=0)):
        raise NoMatch(
            f"its tokens are not the pixels of {window}x{window} windows, row by row from the top left corner"
        )
    hidden = np.broadcast_to((heads.tokens == 0)[:, None], heads.added.shape)
    if not heads.hidden[hidden].all():
        raise NoMatch("pixels that only pad the map are attended to")
    corner = np.flatnonzero(heads.tokens[:, 0] == 1)
    if not np.array_equal(np.sort(heads.head[corner]), np.arange(len(heads.q[0]))):
        raise NoMatch("not every head attends within every window, once")
    first = corner[np.argsort(heads.head[corner])]
    table = np.where(heads.hidden[first], 0.0, heads.added[first])
    return table if table.any() else None


def _cut(maps: Array, window: int, padding: float) -> Array:
    """[B, H, W] -> [B * windows, N], padded at the bottom and at the right."""
    below, right = (-size % window for size in maps.shape[1:])
    padded = np.pad(maps, [(0, 0), (0, below), (0, right)], constant_values=padding)
    batch, height, width = padded.shape
    grid = padded.reshape(batch, height // window, window, width // window, window)
    by_window: Array = grid.swapaxes(2, 3).reshape(-1, window**2)
    return by_window


def _channels_first(found: Match, request: Request) -> bool:
    """Whether x is [B, C, H, W] rather than [B, H, W, C], by how the convolution reads it."""
    x = found.region.x
    shape = request.values[x.name].shape
    index: Array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
    (read,) = request.compute([found.conv.inputs[0]], request.values | {x.name: index})
    for channels_first, maps in ((True, index), (False, index.transpose(0, 3, 1, 2))):
        height, width = maps.shape[2:]
        if np.array_equal(read[:, :, :height, :width], maps) and (read > 0).sum() == maps.size:
            return channels_first
    raise NoMatch(f"{found.conv.name} does not read {x.name} as a map, perhaps padded at the bottom and at the right")


def _conv_behind(tensor: gs.Tensor) -> gs.Node | None:
    """The depthwise convolution that ``tensor`` is the result of, moved."""
    conv = computed_by(tensor)
    if conv is None or conv.op != "Conv":
        return None
    weight = conv_weight(conv)
    return conv if conv.attrs.get("group", 1) == len(weight) > 1 == weight.shape[1] else None


def _norm(total: gs.Variable) -> Norm | None:
    """The LayerNorm that reads ``total``: one node, or below opset 17 those that it is spelt with. Raises NoMatch."""
    readers = {user.op: user for user in total.outputs if user.op != "Shape"}
    if norm := readers.get("LayerNormalization"):
        stored = [constant_value(tensor) for tensor in norm.inputs[1:]]
        scale, shift = stored[0], stored[1] if len(stored) > 1 else np.zeros(1)
        if norm.attrs.get("axis", -1) not in (-1, 3) or scale is None or shift is None:
            raise NoMatch(f"{norm.name} does not normalise over the channels alone")
        return Norm(norm.outputs[0], scale, shift, norm.attrs.get("epsilon", 1e-5))
    if set(readers) != {"ReduceMean", "Sub"}:
        return None
    apart = _past_casts(readers["Sub"].outputs[0])
    divided = next((user for user in apart.outputs if user.op == "Div"), None)
    root = producer(divided.inputs[1]) if divided else None
    variance = producer(root.inputs[0]) if root is not None and root.op == "Sqrt" else None
    if divided is None or variance is None or variance.op != "Add":
        return None
    numbers = [value for tensor in variance.inputs if (value := constant_value(tensor)) is not None]
    epsilon = float(numbers[0].reshape(-1)[0]) if numbers else 0.0
    result, parameters = _past_casts(divided.outputs[0]), [np.ones(1), np.zeros(1)]
    for index, op in enumerate(("Mul", "Add")):
        user = result.outputs[0] if len(result.outputs) == 1 else None
        if user is not None and user.op == op:
            value = constant_value(user.inputs[user.inputs[0] is result])
            if value is not None:
                result, parameters[index] = user.outputs[0], value
    return Norm(result, parameters[0], parameters[1], epsilon)


def _past_casts(tensor: gs.Variable) -> gs.Variable:
    """``tensor`` behind the Casts that follow it alone, as around what is float32 in half precision."""
    while len(tensor.outputs) == 1 and tensor.outputs[0].op == "Cast":
        tensor = tensor.outputs[0].outputs[0]
    return tensor


def _end(graph: gs.Graph, node: gs.Node, proj: Linear) -> gs.Variable:
    """The result of a block: of its projection, as a map again, and cropped."""
    y, flat = proj.result, node.op == "Gemm"
    for _, user in way_down(graph, proj.result):
        if not (flat and user.op == "Reshape") and not _crops(user):
            break
        y, flat = user.outputs[0], False
    return y


def _crops(node: gs.Node) -> bool:
    """Whether a node takes the first rows or columns of [B, H, W, C]."""
    if node.op != "Slice" or len(node.inputs) < 4:
        return False
    starts, axes = constant_value(node.inputs[1]), constant_value(node.inputs[3])
    return starts is not None and axes is not None and not starts.any() and {*axes.tolist()} <= {1, 2}


WINDOWED_ACMIX = Family(
    name="windowed_acmix",
    anchors=("Softmax",),
    match=match,
    reduce=reduce,
    tolerances=TOLERANCES,
)
