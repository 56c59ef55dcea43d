"""ACmix blocks in an ONNX graph: find them, recover their weights, and write them in their reduced form.

A block is looked for from its Softmax outwards. What cannot be read off the graph is measured on it: the logits are
evaluated for chosen queries and keys, and position_weight, the window and the scale follow from the values. A graph
that computes anything else leaves a residual and is not taken for a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.acmix.algebra import AcmixWeights, dense_conv, grouped_conv, qkv_conv
from acmix_deploy.families.attention import RESIDUAL, check_residual, fitted, is_product, layers_above
from acmix_deploy.families.conv_branch import ConvBranch, by_head_dim, is_dep_conv, meeting
from acmix_deploy.families.family import Family
from acmix_deploy.families.reduction import Reduced, Request, Writer
from acmix_deploy.graph import (
    Array,
    Feeds,
    NoMatch,
    Reached,
    Region,
    constant_value,
    conv_bias,
    conv_weight,
    nearest,
    pointwise_weight,
    region_between,
    upstream,
)
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.local_attention.body import function_body

_ROUNDED_POSITION = 5e-2  # of the logits; P l stored in half precision


@dataclass(frozen=True)
class Match:
    """The parts of one block in a graph; which of ``logit_convs`` is the query is not known from the structure."""

    region: Region
    softmax: gs.Node
    logit_convs: list[gs.Node]
    value_conv: gs.Node
    fc: gs.Node
    dep_conv: gs.Node
    rate1: float
    rate2: float


def match(graph: gs.Graph, softmax: gs.Node) -> Match:
    """The block around a Softmax node, by structure alone.

    Raises:
        NoMatch: saying what is missing.
    """
    by_input: dict[str, list[gs.Node]] = {}
    for conv in nearest(softmax.inputs[0], "Conv"):
        if pointwise_weight(conv) is not None:
            by_input.setdefault(conv.inputs[0].name, []).append(conv)
    pairs = [convs for convs in by_input.values() if len(convs) == 2]
    if len(pairs) != 1:
        raise _without_projections(graph, softmax)
    (logit_convs,) = pairs
    x = logit_convs[0].inputs[0]

    met = meeting(graph, softmax)
    if met is None:
        raise NoMatch("its result is not added to that of a convolution")
    last, _, rate1, rate2, dep_conv = met
    if not is_dep_conv(dep_conv):
        raise NoMatch(f"{dep_conv.name} is not a 3x3 convolution of 9 maps per group with padding 1")
    fcs = nearest(dep_conv.inputs[0], "Conv")
    if len(fcs) != 1 or len(fcs[0].inputs) > 2 or conv_weight(fcs[0]).shape[::2] != (9, 1):
        raise NoMatch(f"{dep_conv.name} does not read one 1x1 convolution to 9 maps without bias")
    projections = [
        conv for conv in nearest(fcs[0].inputs[0], "Conv") if conv.inputs[0] is x and pointwise_weight(conv) is not None
    ]
    values = [conv for conv in projections if conv not in logit_convs]
    if len(projections) != 3 or len(values) != 1:
        raise NoMatch(f"{fcs[0].name} does not read three 1x1 convolutions of {x.name}")
    region = region_between(graph, x, last.outputs[0])
    return Match(region, softmax, logit_convs, values[0], fcs[0], dep_conv, rate1, rate2)


def reduce(found: Match, request: Request, conv_branch: ConvBranch = "dense") -> Reduced:
    """The block in its reduced form. Raises NoMatch where it computes something else than ACmix."""
    weights = recover(found, request.values, request.compute)
    map_size = request.values[found.region.x.name].shape[2:] if request.static else None
    graph = rewrite(found, weights, conv_branch, request.name, request.opset, map_size)
    (attention,) = (node for node in graph.nodes if node.domain == LOCAL_ATTENTION.domain)
    smallest = -(-(weights.kernel_size // 2 + 1) // weights.stride) * weights.stride
    return Reduced(graph, attention.op, {**attention.attrs, "conv_branch": conv_branch}, smallest)


def recover(found: Match, values: Feeds, compute: Callable[[list[gs.Variable], Feeds], list[Array]]) -> AcmixWeights:
    """The weights of a matched block, measured where the graph does not state them.

    Args:
        found: the block.
        values: of x and of the tensors outside the region, by name, at one image size.
        compute: tensors of the graph from the values of others, in float32.

    Raises:
        NoMatch: the attention branch is not the operator's definition for any weights.
    """
    x = found.region.x
    head_dim = int(found.dep_conv.attrs.get("group", 1))
    channels = len(conv_weight(found.dep_conv))
    heads = channels // head_dim
    stride, other_stride = found.dep_conv.attrs.get("strides", [1, 1])
    widths = [len(conv_weight(conv)) for conv in (*found.logit_convs, found.value_conv)]
    if widths != [channels] * 3 or conv_weight(found.fc).shape[1] != 3 * heads or stride != other_stride:
        raise NoMatch(f"channels {widths} of q, k, v do not fit {heads} heads of {head_dim}")

    trials = []
    for order in (found.logit_convs, found.logit_convs[::-1]):
        trials.append((_measure(found.softmax, order, heads, stride, values, values[x.name].shape, compute), order))
        if trials[-1][0].residual < RESIDUAL:
            break
    best, (query_conv, key_conv) = min(trials, key=lambda trial: trial[0].residual)
    check_residual(best.residual, "scale * q.k over a reflected K x K neighbourhood")

    convs = (query_conv, key_conv, found.value_conv)
    return AcmixWeights(
        qkv_weight=np.concatenate([conv_weight(conv).astype(np.float64)[:, :, 0, 0] for conv in convs]),
        qkv_bias=np.concatenate([conv_bias(conv) for conv in convs]),
        position_weight=_position_weight(best, stride, values[x.name].shape[2:], conv_weight(query_conv).dtype),
        fc=conv_weight(found.fc).astype(np.float64)[:, :, 0, 0],
        dep_conv_weight=conv_weight(found.dep_conv).astype(np.float64),
        dep_conv_bias=conv_bias(found.dep_conv),
        rate1=found.rate1,
        rate2=found.rate2,
        num_heads=heads,
        kernel_size=best.kernel_size,
        stride=stride,
        scale=best.scale,
    )


def rewrite(
    found: Match,
    weights: AcmixWeights,
    conv_branch: ConvBranch,
    name: str,
    opset: int,
    map_size: tuple[int, int] | None,
) -> gs.Graph:
    """The block in its reduced form, as a graph of its own from x to one output.

    Args:
        found: the block, for x and the element type.
        weights: its weights.
        conv_branch: "dense", one 3x3 convolution of x, or "grouped", one of qkv.
        name: prefix of new nodes and tensors.
        opset: of the graph.
        map_size: H and W of x where they are fixed.
    """
    x = found.region.x
    dtype = conv_weight(found.value_conv).dtype
    write = Writer(x, name, opset, dtype)
    strided: dict[str, Any] = {"pads": [1] * 4, "strides": [weights.stride] * 2}
    qkv = write.conv("qkv", x, *qkv_conv(weights, fold_rate1=conv_branch == "dense"))
    attended = write.add(
        LOCAL_ATTENTION.op_type,
        "attention",
        qkv,
        write.constant("position_weight", weights.position_weight),
        domain=LOCAL_ATTENTION.domain,
        num_heads=weights.num_heads,
        kernel_size=weights.kernel_size,
        stride=weights.stride,
        scale=weights.scale,
        plugin_version=LOCAL_ATTENTION.attribute("plugin_version").default,
        plugin_namespace=LOCAL_ATTENTION.attribute("plugin_namespace").default,
    )
    if conv_branch == "grouped":
        if weights.rate1 != 1:
            attended = write.add("Mul", "rate1", attended, write.constant("rate1.value", np.array(weights.rate1)))
        order = write.constant("by_head_dim.order", by_head_dim(len(weights.qkv_weight), weights.head_dim))
        source = write.add("Gather", "by_head_dim", qkv, order, axis=1)
        weight, bias, _ = grouped_conv(weights)
        convolved = write.conv("convolution", source, weight, bias, group=weights.head_dim, **strided)
    else:
        weight, bias, border = dense_conv(weights)
        convolved = write.conv("convolution", x, weight, bias, **strided)
        if border.any():
            biases = write.conv("biases", write.ones(map_size), border, **strided)
            convolved = write.add("Add", "convolution_with_biases", convolved, biases)
    write.graph.outputs = [write.add("Add", "y", attended, convolved)]
    return write.graph


def _without_projections(graph: gs.Graph, softmax: gs.Node) -> NoMatch:
    """Where the logits of a Softmax come from, if not from two convolutions, and how close to ACmix that is."""
    layers, nodes = layers_above(softmax.inputs[0])
    met = meeting(graph, softmax)
    branch = met is not None and constant_value(met.dep_conv.inputs[1]) is not None and is_dep_conv(met.dep_conv)
    near = len(layers) == 1 and is_product(nodes, layers) and any(map(_takes_neighbours, nodes))
    if not branch and not near:
        return NoMatch("its logits do not come from two 1x1 convolutions of one tensor", Reached.NOTHING)
    read = [layer for layer in layers if _reads_an_input(graph, layer)]
    reached = Reached.PARTS if branch and all(layer.op == "Conv" for layer in read) else Reached.KIND
    found = " and ".join(layer.name for layer in read) or "no layer"
    return NoMatch(f"its logits come from {found}, not from two 1x1 convolutions of one tensor", reached)


def _reads_an_input(graph: gs.Graph, layer: gs.Node) -> bool:
    """Whether a layer depends on more of the graph's inputs than on their sizes."""
    inputs = {tensor.name for tensor in graph.inputs}
    nodes = [layer, *upstream([layer.inputs[0]], lambda node: node.op == "Shape")]
    return any(tensor.name in inputs for node in nodes if node.op != "Shape" for tensor in node.inputs)


def _takes_neighbours(node: gs.Node) -> bool:
    """Whether a node may bring a pixel its neighbours: it pads, or picks more than one part of a tensor."""
    if node.op in ("Gather", "GatherElements", "GatherND"):
        index = constant_value(node.inputs[1])
        return index is None or bool(index.size > 1)
    return str(node.op) == "Pad"


@dataclass(frozen=True)
class _Logits:
    """The logits of a block, evaluated for random queries; M = rounds*B*N, and h, w count the queries looked at."""

    kernel_size: int
    scale: float
    residual: float
    """Of the part that depends on the keys, against scale * q.k, relative."""
    queries: Array
    """[M, d, h, w]."""
    from_position: Array
    """[M, h, w, K*K]: what is left for keys of zero."""
    grid: tuple[Array, Array]
    """Rows [h, 1] and columns [w] of the queries looked at: of a large map some, those at its borders among them."""


def _measure(
    softmax: gs.Node,
    order: list[gs.Node],
    heads: int,
    stride: int,
    values: Feeds,
    shape: tuple[int, ...],
    compute: Callable[[list[gs.Variable], Feeds], list[Array]],
) -> _Logits:
    """Evaluate the logits under the assumption that ``order`` is [query, key], for maps x of ``shape``."""
    query_conv, key_conv = order
    batch, _, height, width = shape
    channels = len(conv_weight(query_conv))
    out = (height // stride, width // stride)
    random = np.random.default_rng(0)
    # As many queries as P has rows, at least, so that they determine it: a tiny map needs several rounds.
    rounds = math.ceil(2 * (channels // heads) / (batch * heads * out[0] * out[1]))
    maps = random.standard_normal((rounds + 1, batch, channels, height, width)).astype(np.float32)
    key, query_rounds = maps[0], maps[1:]

    def logits(query: Array, key: Array) -> Array:
        feeds = {**values, query_conv.outputs[0].name: query, key_conv.outputs[0].name: key}
        (raw,) = compute([softmax.inputs[0]], feeds)
        axis = softmax.attrs.get("axis", -1)
        taps = raw.shape[axis]
        kernel_size = math.isqrt(taps)
        if kernel_size**2 != taps or kernel_size % 2 == 0 or not 3 <= kernel_size < 2 * min(height, width):
            raise NoMatch(f"its Softmax runs over {taps} values, no odd K*K that fits a {height}x{width} map")
        if raw.size != batch * heads * out[0] * out[1] * taps:
            raise NoMatch(f"its logits have shape {list(raw.shape)}: not one K x K window per pixel and head")
        return np.moveaxis(raw, axis, -1)

    rows, columns = _sampled(out[0])[:, None], _sampled(out[1])

    def by_head(maps: Array) -> Array:
        return maps.astype(np.float64).reshape(-1, channels // heads, height, width)

    of_position = [logits(query, np.zeros_like(key)) for query in query_rounds]
    of_keys = logits(query_rounds[0], key) - of_position[0]
    taps = of_keys.shape[-1]
    queries = by_head(query_rounds)[:, :, ::stride, ::stride][..., rows, columns]
    first = queries[: batch * heads]
    neighbours = _neighbours(by_head(key), math.isqrt(taps), stride)
    products = np.stack([(first * near[..., rows, columns]).sum(1) for near in neighbours], -1)
    found = []
    # Below opset 13 exporters put a Transpose before a Softmax over another axis than the last: its rows are columns.
    for turned in (False, True):

        def arranged(raw: Array, turned: bool = turned) -> Array:
            maps = raw.reshape(batch * heads, *(out[::-1] if turned else out), taps)
            return (maps.swapaxes(1, 2) if turned else maps)[:, rows, columns].astype(float)

        from_keys = arranged(of_keys)
        fit = fitted(from_keys, products, queries.shape[1])
        from_position = np.concatenate([arranged(raw) for raw in of_position])
        found.append(_Logits(math.isqrt(taps), *fit, queries, from_position, (rows, columns)))
    return min(found, key=lambda logits: logits.residual)


def _sampled(length: int) -> Array:
    """Places along an axis of queries: all of a short one; of a long one some, and all that are near its ends."""
    near, between = np.arange(min(length, 8)), np.linspace(0, length - 1, min(length, 48)).astype(np.int64)
    return np.arange(length) if length <= 64 else np.unique(np.concatenate([near, between, length - 1 - near]))


def _neighbours(maps: Array, kernel_size: int, stride: int) -> Iterator[Array]:
    """The K*K shifted views of maps [M, d, H, W] under reflection padding, each [M, d, H/s, W/s]."""
    margin = kernel_size // 2
    height, width = maps.shape[2:]
    padded = np.pad(maps, [(0, 0), (0, 0), (margin, margin), (margin, margin)], mode="reflect")
    for y in range(kernel_size):
        for x in range(kernel_size):
            yield padded[:, :, y : y + height : stride, x : x + width : stride]


def _position_weight(logits: _Logits, stride: int, map_size: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """P [d, 2] from the logits that zero keys leave, scale * q.(P l_i - P l_n), by least squares.

    In a half-precision file P l may be stored rounded, and neighbours differ by little more than that on a large map:
    there the residual only has to be small, and the comparison of the whole block decides.
    """
    height, width = map_size
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    place = np.stack([x, y])[None]
    own = place[:, :, ::stride, ::stride]
    rows, columns = logits.grid
    offsets = ((own - near)[0][..., rows, columns] for near in _neighbours(place, logits.kernel_size, stride))
    moved = np.stack([*offsets], -1)  # [2, h, w, K*K]
    # For one query the logits are linear in u = scale * P^T q, two unknowns; all queries together give P.
    gram = np.einsum("ahwn,bhwn->hwab", moved, moved)
    target = np.einsum("ahwn,mhwn->mhwa", moved, logits.from_position)
    u = np.linalg.solve(gram[None], target[..., None])[..., 0].reshape(-1, 2)
    scaled = logits.scale * logits.queries
    weight, *_ = np.linalg.lstsq(np.moveaxis(scaled, 1, -1).reshape(len(u), -1), u, rcond=None)
    expected = np.einsum("mdhw,da,ahwn->mhwn", scaled, weight, moved, optimize=True)
    size = np.linalg.norm(logits.from_position) + 1e-3 * np.linalg.norm(scaled)  # P may be all zeros
    residual = float(np.linalg.norm(logits.from_position - expected) / size)
    limit = RESIDUAL if dtype == np.float32 else _ROUNDED_POSITION
    check_residual(residual, "q.(P l_i - P l_n) beside the keys, linear in the coordinates", limit)
    return np.asarray(weight)


ACMIX = Family(
    name="acmix",
    anchors=("Softmax",),
    match=match,
    reduce=reduce,
    reduce_grouped=partial(reduce, conv_branch="grouped"),
    operators=((LOCAL_ATTENTION, function_body),),
    tolerances=LOCAL_ATTENTION.tolerances,
)
