"""Weighted sums of neighbours in an ONNX graph, with weights that the graph computes. No PyTorch here.

One is looked for from the Pad that surrounds a map with zeros: downstream, over all that only moves values, to a
product with something computed, and to the sum behind that. How the map is unfolded does not matter, nor how the
weights are made: they stay as they are. Which neighbour has which weight is measured, and the whole compared on random
numbers with the operator's definition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.attention import MOVING, PRODUCTS, is_product, layers_above
from acmix_deploy.families.reduction import Reduced, Request, Writer
from acmix_deploy.graph import (
    RESHAPING,
    Array,
    NoMatch,
    Reached,
    Region,
    constant_value,
    producer,
    region_between,
    way_down,
)
from acmix_deploy.operators.reassembly import REASSEMBLY

_MOVING = MOVING | {"Concat", "DepthToSpace", "Resize", "Tile"}
_REPEATING = frozenset({"Expand", "Resize", "Tile"})
_SHUFFLING = frozenset({"DepthToSpace", "Transpose"})
_ARITHMETIC = RESHAPING | {"Add", "Div", "Mul", "Sub"}
_RESIDUAL = 1e-4  # of sums evaluated in float32, relative L2


@dataclass(frozen=True)
class Match:
    """The parts of one weighted sum in a graph."""

    region: Region
    weights: list[gs.Variable]
    """What the weights were before and after each movement, in order: one of them may be the operator's."""
    sums: list[gs.Variable]
    """The same of the sums, the region's result last."""
    tail: list[gs.Node]
    """The nodes between ``sums``."""
    zeros: bool
    """Whether the map is surrounded by zeros."""
    dtype: np.dtype[Any]
    """Of the result."""


def match(graph: gs.Graph, pad: gs.Node, *, upsamples: bool) -> Match:
    """The weighted sum of what a Pad node surrounds, by structure alone.

    Args:
        graph: the graph.
        pad: the node.
        upsamples: whether something in it repeats or shuffles pixels, as an upsampling does; the map is then the one
            before a Resize in front of the Pad.

    Raises:
        NoMatch: saying what is missing.
    """
    moved, product, moves = _first_reader(pad.outputs[0])
    if product.op not in PRODUCTS or len(product.inputs) != 2:
        raise NoMatch("it is not unfolded and multiplied", Reached.NOTHING)
    operands = [tensor for tensor in product.inputs if tensor is not moved]
    if len(operands) != 1 or constant_value(operands[0]) is not None:
        raise NoMatch("it is not multiplied with weights that are computed", Reached.NOTHING)
    weights = [*_origins(operands[0])][::-1]
    layers, nodes = layers_above(weights[0])
    if is_product(nodes, layers) and any(node.op in ("Einsum", "MatMul", "ReduceSum") for node in nodes):
        raise NoMatch("its weights are products of queries and keys", Reached.NOTHING)
    sums, tail = _sums(graph, product)
    if _are_logits(graph, sums[-1]):
        raise NoMatch("its sums are logits", Reached.NOTHING)
    x = pad.inputs[0]
    if (margins := constant_value(pad.inputs[1])) is not None and not margins.any():
        raise NoMatch("it pads nothing", Reached.NOTHING)
    if upsamples:
        if (node := producer(x)) is not None and node.op == "Resize":
            x, moves = node.inputs[0], moves | {"Resize"}
        if not moves & _REPEATING and not {node.op for node in tail} & _SHUFFLING:
            raise NoMatch("nothing in it upsamples", Reached.NOTHING)
    if not isinstance(x, gs.Variable) or any(x is weight for weight in weights):
        raise NoMatch("it is weighed by itself", Reached.NOTHING)
    border = constant_value(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2].name else None
    zeros = pad.attrs.get("mode", "constant") == "constant" and (border is None or not border.any())
    region = region_between(graph, x, sums[-1], given=weights[0])
    read = [tensor for weight in weights[1:] for tensor in weight.inputs[0].inputs if isinstance(tensor, gs.Variable)]
    inside = {tensor.name for node in region.nodes for tensor in node.outputs} - {weight.name for weight in weights}
    outside = {tensor.name: tensor for tensor in (*region.outside, *weights, *read) if tensor.name not in inside}
    stored = [weight.dtype for layer in layers if (weight := constant_value(layer.inputs[1])) is not None]
    dtype = np.dtype(next(iter(stored), x.dtype or np.float32))
    return Match(Region(x, region.y, [*outside.values()], region.nodes), weights, sums, tail, zeros, dtype)


def reduce(found: Match, request: Request, *, upsamples: bool) -> Reduced:
    """The weighted sum as one node.

    Args:
        found: the weighted sum.
        request: how it is to be written.
        upsamples: whether its result is larger than its map.

    Raises:
        NoMatch: it is not the operator's; with nothing reached where it is no map of sums over neighbours.
    """
    x = request.values[found.region.x.name]
    results = request.compute(found.sums, request.values)
    reasons = []
    for weight in found.weights:
        w = request.values[weight.name]
        for place, result in enumerate(results):
            if not x.ndim == w.ndim == result.ndim == 4 or result.shape[:2] != x.shape[:2]:
                continue
            stride, upsampling = _resampling(x.shape[2:], result.shape[2:])
            if (len(w), *w.shape[2:]) != (len(x), *result.shape[2:]) or not stride or (upsampling > 1) != upsamples:
                continue
            if not found.zeros:
                raise NoMatch("its map is not surrounded by zeros")
            try:
                settings = _measured(found, request, weight, found.sums[place], stride, upsampling)
            except NoMatch as reason:
                reasons.append(reason)
            else:
                return Reduced(_written(found, request, weight, place, settings), REASSEMBLY.op_type, settings)
    raise reasons[0] if reasons else NoMatch("it has no map of weights for a map of sums", Reached.NOTHING)


def _first_reader(tensor: gs.Variable) -> tuple[gs.Variable, gs.Node, set[str]]:
    """The one node that does more than move what ``tensor`` holds, after its operand, and types of the nodes that do no
    more. Raises NoMatch."""
    readers: dict[int, tuple[gs.Variable, gs.Node]] = {}
    moves: set[str] = set()
    seen, left = {tensor.name}, [tensor]
    while left:
        tensor = left.pop()
        for node in tensor.outputs:
            if node.op in _MOVING:
                new = [output for output in node.outputs if output.name not in seen]
                seen.update(output.name for output in new)
                moves.add(node.op)
                left += new
            elif node.op != "Shape":
                readers[id(node)] = tensor, node
    if len(readers) != 1:
        raise NoMatch("it is read by several nodes", Reached.NOTHING)
    return *next(iter(readers.values())), moves


def _origins(tensor: gs.Tensor) -> Iterator[gs.Variable]:
    """``tensor``, and what its values were before each movement, nearest first."""
    while isinstance(tensor, gs.Variable):
        yield tensor
        node = producer(tensor)
        if node is None or node.op not in _MOVING:
            return
        tensor = node.inputs[0]


def _sums(graph: gs.Graph, product: gs.Node) -> tuple[list[gs.Variable], list[gs.Node]]:
    """The sum of a product and what it becomes by movement, and the nodes between these. Raises NoMatch."""
    total = product.outputs[0]
    if product.op == "Mul":
        _, node, _ = _first_reader(total)
        if node.op != "ReduceSum":
            raise NoMatch("its products are not summed", Reached.NOTHING)
        total = node.outputs[0]
    sums = [total]
    tail: list[gs.Node] = []
    for _, node in way_down(graph, total):
        if node.op == "ReduceSum":
            sums, tail = [node.outputs[0]], []
        elif node.op in RESHAPING or node.op == "DepthToSpace":
            sums.append(node.outputs[0])
            tail.append(node)
        else:
            break
    return sums, tail


def _are_logits(graph: gs.Graph, tensor: gs.Variable) -> bool:
    """Whether a Softmax reads it, with or without terms and factors."""
    reader = next((node for _, node in way_down(graph, tensor) if node.op not in _ARITHMETIC), None)
    return reader is not None and reader.op == "Softmax"


def _resampling(size: tuple[int, ...], out: tuple[int, ...]) -> tuple[int, int]:
    """Stride and upsampling between two sizes of maps, zeros where they are no whole numbers."""
    for stride, upsampling in ((max(1, size[0] // out[0]), 1), (1, max(1, out[0] // size[0]))):
        if all(pixels * upsampling == stride * others for pixels, others in zip(size, out, strict=True)):
            return stride, upsampling
    return 0, 0


def _measured(
    found: Match, request: Request, weight: gs.Variable, result: gs.Variable, stride: int, upsampling: int
) -> dict[str, Any]:
    """The operator's attributes: they follow from the pixel that the first weight is for. Raises NoMatch where it is
    another sum."""
    x_name, moved = found.region.x.name, {tensor.name for tensor in found.weights}
    others = {name: value for name, value in request.values.items() if name not in moved}
    x_shape, w_shape = request.values[x_name].shape, request.values[weight.name].shape

    def sums(x: Array, w: Array) -> Array:
        (computed,) = request.compute([result], others | {x_name: x, weight.name: w})
        return computed

    height, width = x_shape[2:]
    pixels = np.arange(1, height * width + 1, dtype=np.float32).reshape(height, width)
    first = np.zeros(w_shape, np.float32)
    first[:, 0] = 1
    seen = np.rint(sums(np.broadcast_to(pixels, x_shape), first)[0, :, -1, -1]).astype(int)
    group_channels = np.count_nonzero(seen)
    if not group_channels or x_shape[1] % group_channels:
        raise NoMatch("its first weight is not that of a first group of channels", Reached.WHOLE)
    groups = x_shape[1] // int(group_channels)
    kernel_size = math.isqrt(w_shape[1] // groups)
    if kernel_size**2 * groups != w_shape[1] or kernel_size < 3 or kernel_size % 2 == 0:
        raise NoMatch(
            f"its {w_shape[1]} weights a pixel are not K*K for each of {groups} groups, for an odd K of at least 3",
            Reached.WHOLE,
        )
    last = [(pixels - 1) * stride // upsampling for pixels in w_shape[2:]]
    away = [own - there for own, there in zip(last, divmod(int(seen[0]) - 1, width), strict=True)]
    dilation = away[0] // (kernel_size // 2)
    if dilation < 1 or away != [dilation * (kernel_size // 2)] * 2:
        raise NoMatch(f"its first weight is not that of the first of {kernel_size}x{kernel_size} pixels around its own")

    settings = {
        "groups": groups,
        "kernel_size": kernel_size,
        "stride": stride,
        "upsampling": upsampling,
        "dilation": dilation,
    }
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(shape).astype(np.float32) for shape in (x_shape, w_shape))
    expected = _defined(x, w, **settings)
    residual = float(np.linalg.norm(sums(x, w) - expected) / np.linalg.norm(expected))
    if not residual < _RESIDUAL:
        raise NoMatch(
            f"it is no sum over {kernel_size}x{kernel_size} neighbours, row by row, and zeros outside: relative "
            f"residual {residual:.1e}, limit {_RESIDUAL:.0e}"
        )
    return settings


def _defined(x: Array, w: Array, groups: int, kernel_size: int, stride: int, upsampling: int, dilation: int) -> Array:
    """What the operator computes."""
    margin = dilation * (kernel_size // 2)
    padded = np.pad(x, [(0, 0), (0, 0), (margin, margin), (margin, margin)])
    padded = padded.reshape(len(x), groups, -1, *padded.shape[2:])
    weights = w.reshape(len(x), groups, 1, kernel_size, kernel_size, *w.shape[2:])
    rows, columns = (np.arange(pixels) * stride // upsampling for pixels in w.shape[2:])
    terms = (
        weights[:, :, :, row, column] * padded[..., (rows + dilation * row)[:, None], columns + dilation * column]
        for row in range(kernel_size)
        for column in range(kernel_size)
    )
    total: Array = next(terms)
    for term in terms:
        total = total + term
    return total.reshape(len(x), x.shape[1], *w.shape[2:])


def _written(found: Match, request: Request, weight: gs.Variable, place: int, settings: dict[str, Any]) -> gs.Graph:
    """The reduced form as a graph of its own, new nodes and tensors called ``request.name.``..."""
    write = Writer(found.region.x, request.name, request.opset, found.dtype)
    y = write.operator(REASSEMBLY, "sum", found.region.x, weight, **settings)
    for number, (node, before) in enumerate(zip(found.tail[place:], found.sums[place:], strict=False)):
        inputs = [y if tensor is before else tensor for tensor in node.inputs]
        y = write.add(node.op, f"moved_{number}", *inputs, **node.attrs)
    write.graph.outputs = [y]
    return write.graph
