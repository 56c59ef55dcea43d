"""Attention within a local window in an ONNX graph, from its Softmax outwards to its projections. No PyTorch here.

Parts are found by structure as loosely as can be: layers, products, and that a pixel reads its neighbours. Which
channel, head, pixel and tap goes where is measured: the projections' results and the weights of the taps are set to
numbers that say what they are, and read again behind the products. So it does not matter how a graph cuts, moves, pads
and sums them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from acmix_deploy.families.attention import (
    MASKED_BELOW,
    PRODUCTS,
    RESIDUAL,
    Compute,
    check_residual,
    layers_above,
    linear,
)
from acmix_deploy.graph import (
    RESHAPING,
    Array,
    Feeds,
    NoMatch,
    Reached,
    constant_value,
    conv_bias,
    conv_weight,
    pointwise_weight,
    producer,
    way_down,
)
from acmix_deploy.operators.neighborhood_attention import Border

Index = npt.NDArray[np.int64]

LOUDER = float(2**40)
"""Beside it nothing matters that a graph adds to results."""

_LONGEST_WAY = 24  # nodes from the weighted sum to the block's end; exporters need 6 to 14
_MOST_READERS = 512  # nodes behind a Softmax that are looked at for one that weighs values; a window of 7x7 has 150
_LARGEST_ID = 2**20  # numbers that float32 tells apart after two roundings
_AXES = {False: (0, 1, 2, 3), True: (0, 3, 1, 2)}  # of a map: batch, channels, height, width, if these are last
_LOUD = float(2**30)  # beside it nothing matters that a graph adds to logits
_SOFT = 0.125  # keys, where it is what a graph adds that matters
_ROUNDED_POSITION = 5e-2  # of the logits; P l stored in half precision


@dataclass(frozen=True)
class Projection:
    """A layer that is linear in the channels of a map."""

    x: gs.Variable
    """The map."""
    x_last: bool
    """Whether it is [B, H, W, Cin], not [B, Cin, H, W]."""
    source: gs.Variable
    """What the layer reads: the map, moved and padded or not."""
    result: gs.Variable
    weight: Array
    """[Cout, Cin]."""
    bias: Array
    """[Cout]."""
    channels_last: bool
    """Of the layer."""
    pads: tuple[int, ...] = (0, 0, 0, 0)
    """Rows and columns of zeros that the layer itself puts around the map: top, left, bottom, right."""

    @property
    def moves(self) -> bool:
        """Whether the places of its result are not the pixels of x one by one."""
        return self.source is not self.x or self.channels_last or any(self.pads)


@dataclass(frozen=True)
class Found:
    """The parts of one attention in a graph."""

    softmax: gs.Node
    x: gs.Variable
    x_last: bool
    """Whether it is [B, H, W, C], not [B, C, H, W]."""
    projections: list[Projection]
    """Of x, to queries, keys and values: one, or several of which each knows its own channels."""
    products: list[tuple[gs.Node, list[frozenset[int]]]]
    """Nodes that multiply queries and keys, and by operand which projections it comes from."""
    weighed: list[gs.Node]
    """Nodes that multiply weights and values."""


@dataclass(frozen=True)
class Window:
    """What an attention computes: ``softmax_n(scale q_i . (k_n - P l_n) + bias[n - i]) v_n`` over the K x K neighbours
    n of pixel i, with l = (x, y) in [-1, 1]^2."""

    q: tuple[Array, Array]
    """Weight [N, d, Cin] and bias [N, d]."""
    k: tuple[Array, Array]
    v: tuple[Array, Array]
    """Ordered as the channels of the result."""
    gain: Array
    """[N * d]: factor of each channel in the result."""
    scale: float
    kernel_size: int
    stride: int
    dilation: int
    border: Border | None
    """What is around the map; None for its reflection."""
    position_weight: Array
    """P, [d, 2]."""
    bias: Array
    """[N, 2K - 1, 2K - 1], by relative offset in steps of the dilation, plus K - 1."""
    layout: str
    """Of the result, by its axes: ``BCHW``, ``BHWC``, ``BCP`` or ``BPC`` with P = H * W."""
    rows: _Rows
    channels: Index
    """[3, N, d]: those of q, k and v among the projections'."""
    neighbours: Index
    """[queries, K * K]: pixels, by tap in the order of the weights."""

    def qkv(self, *, gain: bool) -> tuple[Array, Array]:
        """Weight [3 * N * d, Cin] and bias of queries, keys and values, the latter with ``gain`` in them or not."""
        factor = self.gain.reshape(*self.v[1].shape) if gain else np.ones(self.v[1].shape)
        values = self.v[0] * factor[..., None], self.v[1] * factor
        weight, bias = zip(self.q, self.k, values, strict=True)
        return np.concatenate(weight).reshape(-1, weight[0].shape[-1]), np.concatenate(bias).reshape(-1)

    def attend(self, content: Array, weights: Array, queries: Index) -> Array:
        """[queries, N, d]: the sum of values from ``content``, by the probe's ``weights`` instead of the softmax."""
        values = content[:, self.channels[2]].astype(np.float64)
        taps = range(self.neighbours.shape[1])
        total: Array = sum(weights[queries, :, t, None] * values[self.neighbours[queries, t]] for t in taps)
        return total


def find(graph: gs.Graph, softmax: gs.Node) -> Found:
    """The attention around a Softmax node, by structure alone. Raises NoMatch."""
    weighed, values = _weighed(softmax)
    layers, nodes = layers_above(softmax.inputs[0])
    reading = [projection for layer in values if (projection := _projection(layer))]
    x = reading[0].x if reading else None
    if x is None or any(projection.x is not x for projection in reading) or len(reading) < len(values):
        near = bool(weighed) and _products(nodes, layers) and _spreads(nodes, layers)
        raise NoMatch("its values do not come from 1x1 convolutions of one tensor", _kind(near))
    own = [layer for layer in layers if (projection := _projection(layer)) and projection.x is x]
    products = _products(nodes, own)
    above = ((part, producer(part.source)) for part in reading)
    padded = any(any(part.pads) or (node is not None and node.op == "Pad") for part, node in above)
    if not products or not (padded or _spreads(nodes, own)):
        named = " and ".join(layer.name for layer in layers) or "no layer"
        near = bool(_products(nodes, layers)) and _spreads(nodes, layers)
        raise NoMatch(f"its logits come from {named}, not from 1x1 convolutions of {x.name}", _kind(near))
    projections = [_projection(layer) for layer in own] + reading
    unique = {projection.result.name: projection for projection in projections if projection}
    return Found(softmax, x, reading[0].x_last, [*unique.values()], products, weighed)


def way_to_result(graph: gs.Graph, found: Found) -> list[tuple[gs.Variable, gs.Node]]:
    """From the weighted sum, where all its parts are in, downstream while each tensor has one reader: both in turn."""
    most = _LONGEST_WAY + 2 * len(found.weighed)
    ways = [[*islice(way_down(graph, node.outputs[0]), most)] for node in found.weighed]
    shared = set.intersection(*({tensor.name for tensor, _ in way} for way in ways))
    return [step for step in ways[0] if step[0].name in shared]


def _kind(near: object) -> Reached:
    return Reached.KIND if near else Reached.NOTHING


def _weighed(softmax: gs.Node) -> tuple[list[gs.Node], list[gs.Node]]:
    """The nodes that multiply what comes from a Softmax with what comes from layers, and these layers."""
    found: dict[int, gs.Node] = {}
    layers: dict[int, gs.Node] = {}
    ways, seen = [softmax.outputs[0]], {softmax.outputs[0].name}
    while ways and len(seen) < _MOST_READERS:
        tensor = ways.pop(0)
        for node in tensor.outputs:
            above: list[gs.Node] = []
            if node.op in PRODUCTS:
                for operand in node.inputs:
                    if operand is not tensor and constant_value(operand) is None and operand.name not in seen:
                        above += layers_above(operand)[0]
            if above:
                found[id(node)] = node
                layers.update((id(layer), layer) for layer in above)
            elif node.op != "Shape":
                ways += [output for output in node.outputs if output.name not in seen]
                seen.update(output.name for output in node.outputs)
    return [*found.values()], [*layers.values()]


def _projection(layer: gs.Node) -> Projection | None:
    """A layer as a projection of a map, if it is one."""
    source = layer.inputs[0]
    if not isinstance(source, gs.Variable):
        return None
    weight = pointwise_weight(layer, padded=True)
    if weight is not None:  # an exporter may have put a Pad into the convolution behind it
        x = source
        while (node := producer(x)) is not None and node.op == "Pad" and isinstance(node.inputs[0], gs.Variable):
            x = node.inputs[0]
        pads = tuple(layer.attrs.get("pads", (0, 0, 0, 0)))
        return Projection(x, False, source, layer.outputs[0], weight[:, :, 0, 0], conv_bias(layer), False, pads)
    if layer.op == "Conv":  # its result is the map, and q, k and v are channels of it
        x, channels = layer.outputs[0], len(conv_weight(layer))
        identity = np.eye(channels, dtype=conv_weight(layer).dtype)
        return Projection(x, False, x, x, identity, np.zeros(channels), False)
    own = linear(layer) if layer.op in ("Gemm", "MatMul") else None
    above = _map_above(source)
    return Projection(above or source, not above, source, own.result, own.weight, own.bias, True) if own else None


def _map_above(tokens: gs.Variable) -> gs.Variable | None:
    """The map [B, C, H, W] whose pixels ``tokens`` [..., C] are."""
    flat = False
    tensor: gs.Tensor = tokens
    while (node := producer(tensor)) is not None and node.op in RESHAPING:
        tensor = node.inputs[0]
        if node.op == "Transpose":
            flat = len(node.attrs.get("perm", ())) < 4
            if not flat:
                return tensor if isinstance(tensor, gs.Variable) else None
        elif flat and node.op in ("Flatten", "Reshape"):
            return tensor if isinstance(tensor, gs.Variable) else None
    return None


def _reach(nodes: Iterable[gs.Node], layers: Sequence[gs.Node]) -> dict[str, frozenset[int]]:
    """By tensor that ``nodes``, in order, make of the results of ``layers``: which of these it depends on."""
    reached = {tensor.name: frozenset({index}) for index, layer in enumerate(layers) for tensor in layer.outputs}
    for node in nodes:
        above = frozenset().union(*(reached.get(tensor.name, frozenset()) for tensor in node.inputs))
        if above and node.op != "Shape":
            reached.update((tensor.name, above) for tensor in node.outputs)
    return reached


def _products(nodes: Sequence[gs.Node], layers: Sequence[gs.Node]) -> list[tuple[gs.Node, list[frozenset[int]]]]:
    """The nodes that multiply two tensors that both depend on ``layers``, and by operand on which."""
    reached = _reach(nodes, layers)
    both = ((node, [reached.get(tensor.name, frozenset()) for tensor in node.inputs]) for node in nodes)
    return [(node, of) for node, of in both if node.op in PRODUCTS and len(of) == 2 and all(of)]


def _spreads(nodes: Sequence[gs.Node], layers: Sequence[gs.Node]) -> bool:
    """Whether one of ``nodes`` may bring a pixel of what ``layers`` make its neighbours: it pads, or picks several."""
    reached = _reach(nodes, layers)
    for node in nodes:
        if not node.inputs or node.inputs[0].name not in reached:
            continue
        if node.op in ("Gather", "GatherElements", "GatherND"):
            index = constant_value(node.inputs[1])
            if index is None or index.size > 1:
                return True
        if node.op == "Pad":
            return True
    return False


class Probe:
    """Sets the projections of an attention, and the weights of its taps, to numbers, and reads what becomes of them.

    Contents are [B * H * W, channels], pixel by pixel, with the channels of all projections one after the other.
    """

    def __init__(self, found: Found, values: Feeds, compute: Compute) -> None:
        shape = values[found.x.name].shape
        if len(shape) != 4:
            raise NoMatch(f"{found.x.name} has shape {[*shape]}, which is not that of maps", Reached.KIND)
        self.found, self.values, self.compute = found, values, compute
        self.batch, self.cin, self.height, self.width = (shape[axis] for axis in _AXES[found.x_last])
        self.weight = np.concatenate([part.weight for part in found.projections]).astype(np.float64)
        self.bias = np.concatenate([part.bias for part in found.projections]).astype(np.float64)
        widths = np.cumsum([0, *(len(part.weight) for part in found.projections)])
        self.starts = [int(width) for width in widths]
        self.pixels = self.batch * self.height * self.width
        self._places = self._read_places()

    def _read_places(self) -> dict[str, Index]:
        """By result of a layer that does not read x as it is: the pixel that each of its places is, or -1."""
        x = self.found.x
        moved = [part for part in self.found.projections if part.moves]
        if not moved:
            return {}
        index = np.repeat(1 + np.arange(self.pixels, dtype=np.float32), self.cin).reshape(-1, self.cin)
        arrays = self.compute([part.source for part in moved], self.values | {x.name: self.x(index)})
        places = {}
        for part, array in zip(moved, arrays, strict=True):
            top, left, bottom, right = part.pads
            own = array[..., 0] if part.channels_last else array[:, 0]
            if any(part.pads):
                own = np.pad(own, ((0, 0), (top, bottom), (left, right)))
            places[part.result.name] = own.astype(np.int64) - 1
        return places

    def x(self, array: Array) -> Array:
        """[B * H * W, Cin] as x is laid out."""
        maps: Array = array.reshape(self.batch, self.height, self.width, -1)
        return np.ascontiguousarray(maps if self.found.x_last else maps.transpose(0, 3, 1, 2))

    def run(self, tensors: list[gs.Variable], content: Array, more: Feeds) -> list[Array]:
        """Tensors of the graph for projections set to ``content``, and others to ``more``."""
        feeds = dict(more)
        for part, start in zip(self.found.projections, self.starts, strict=False):
            own = content[:, start : start + len(part.weight)]
            places = self._places.get(part.result.name)
            if places is None:
                feeds[part.result.name] = self.x(own)
            else:
                tokens = np.where(places[..., None] >= 0, own[places], 0)
                feeds[part.result.name] = tokens if part.channels_last else np.moveaxis(tokens, -1, 1)
        set_to = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        return self.compute(tensors, self.values | set_to)

    def blank(self) -> Array:
        return np.zeros((self.pixels, self.starts[-1]), np.float32)

    def random(self, random: np.random.Generator) -> Array:
        return random.standard_normal((self.pixels, self.starts[-1]), np.float32)


@dataclass(frozen=True)
class _Rows:
    """How the logits of a graph are laid out."""

    probe: Probe
    raw: tuple[int, ...]
    """Their shape, with the axis of the taps last."""
    order: Index
    """[queries, heads]: their row, where each has one axis of taps."""
    queries: Index
    """The pixel of each query."""
    stride: int
    added: Array
    """[queries, heads, taps]: the logits of zeros."""

    @property
    def axis(self) -> int:
        return int(self.probe.found.softmax.attrs.get("axis", -1))

    def logits(self, content: Array) -> Array:
        """[queries, heads, taps]: what ``content`` adds to logits; 0 where that is not finite."""
        (raw,) = self.probe.run([self.probe.found.softmax.inputs[0]], content, {})
        read = np.moveaxis(raw, self.axis, -1).reshape(-1, self.raw[-1])[self.order].astype(np.float64)
        with np.errstate(invalid="ignore"):  # what is hidden is -inf in both
            moved: Array = np.nan_to_num(read - self.added, nan=0.0, posinf=0.0, neginf=0.0)
        return moved

    @cached_property
    def hidden(self) -> Array:
        """[queries, heads, taps]: whether a tap takes no part in the softmax."""
        hidden: Array = ~(self.added > self.added.max(-1, keepdims=True) + MASKED_BELOW)
        return hidden

    def weights(self, weights: Array) -> Feeds:
        """What [queries, heads, taps] are behind the Softmax."""
        rows = np.empty((self.order.size, self.raw[-1]), np.float32)
        rows[self.order] = weights
        return {self.probe.found.softmax.outputs[0].name: np.moveaxis(rows.reshape(self.raw), -1, self.axis)}


def measure(found: Found, result: gs.Variable, values: Feeds, compute: Compute) -> Window:
    """What an attention computes.

    Args:
        found: the attention.
        result: what its result becomes, in a layout of :class:`Window`: each channel times a factor, and anything
            added that does not depend on the weights of the taps. Whether that holds is not looked at.
        values: of x, and of what else is needed from outside.
        compute: tensors of the graph from the values of others, in float32.

    Raises:
        NoMatch: its logits are none of attention within a window, or its values are weighed otherwise.
    """
    probe = Probe(found, values, compute)
    q, k = _roles(probe)
    try:
        rows, unit = _rows(probe, q, k)
    except NoMatch as error:
        if error.reached == Reached.WHOLE:
            raise
        try:
            rows, unit = _rows(probe, k, q)
        except NoMatch:
            raise error from None
        q, k = k, q
    heads = rows.order.shape[1]
    d = len(q) // heads
    if len(q) != len(k) or len(q) % heads:
        raise NoMatch(f"{len(q)} channels of queries and {len(k)} of keys do not fit {heads} heads")
    scale, usual = unit / d, d**-0.5
    scale = usual if math.isclose(scale, usual, rel_tol=1e-6) else scale
    q, k, neighbours = _pairs(rows, q, k, scale)
    kernel_size = math.isqrt(neighbours.shape[1])
    neighbours, offsets, border, dilation = _border(rows, neighbours, kernel_size)
    bias = _bias(rows, offsets, kernel_size)
    position = _position(rows, np.stack([q, k]), neighbours, scale)
    v, gain, order, layout = _values(rows, neighbours, result)
    if v.shape != q.shape:
        raise NoMatch(f"its values have {v.shape[1]} channels a head, its queries and keys {d}")
    channels = np.stack([q[order], k[order], v])
    rows = _Rows(probe, rows.raw, rows.order[:, order], rows.queries, rows.stride, rows.added[:, order])
    own_q, own_k, own_v = ((probe.weight[part], probe.bias[part]) for part in channels)
    return Window(
        q=own_q,
        k=own_k,
        v=own_v,
        gain=gain,
        scale=scale,
        kernel_size=kernel_size,
        stride=rows.stride,
        dilation=dilation,
        border=border,
        position_weight=position,
        bias=bias[order],
        layout=layout,
        rows=rows,
        channels=channels,
        neighbours=neighbours,
    )


def _roles(probe: Probe) -> tuple[Index, Index]:
    """The channels of the two operands that are multiplied to logits."""
    starts = probe.starts
    sets = [frozenset().union(*(of[side] for _, of in probe.found.products)) for side in (0, 1)]
    if not sets[0] & sets[1]:
        q, k = ([c for part in sorted(side) for c in range(starts[part], starts[part + 1])] for side in sets)
        return np.array(q), np.array(k)
    operands = [tensor for node, _ in probe.found.products for tensor in node.inputs]
    ones = probe.blank() + np.float32(_LOUD)
    numbered = ones * (np.arange(starts[-1], dtype=np.float32) + 1)
    unit, numbers = (probe.run(operands, content, {}) for content in (ones, numbered))
    read: list[set[int]] = [set(), set()]
    for index, (one, number) in enumerate(zip(unit, numbers, strict=True)):
        there = np.isfinite(one) & np.isfinite(number) & (np.abs(one) > _LOUD * 1e-6)
        ids = np.rint(number[there] / one[there]).astype(np.int64) - 1
        read[index % 2].update(np.unique(ids).tolist())
    both = read[0] | read[1]
    if not read[0] or not read[1] or read[0] & read[1] or min(both) < 0 or max(both) >= starts[-1]:
        raise NoMatch("its queries and keys are not made of channels of their own")
    return np.array(sorted(read[0])), np.array(sorted(read[1]))


def _rows(probe: Probe, q: Index, k: Index) -> tuple[_Rows, float]:
    """How logits are laid out, if these are the channels of queries and of keys; and scale * head_dim."""
    content = probe.blank()
    content[:, q] = 1 + np.arange(probe.pixels)[:, None]
    content[:, k] = _LOUD
    logits = [probe.found.softmax.inputs[0]]
    axis = probe.found.softmax.attrs.get("axis", -1)
    raw, added = (
        np.moveaxis(probe.run(logits, one, {})[0].astype(np.float64), axis, -1) for one in (content, probe.blank())
    )
    height, width = probe.height, probe.width
    with np.errstate(invalid="ignore"):  # what is hidden is -inf in both
        raw = raw - added
    taps = raw.shape[-1]
    kernel_size = math.isqrt(taps)
    if kernel_size**2 != taps or kernel_size % 2 == 0 or not 3 <= kernel_size < 2 * min(height, width):
        raise NoMatch(
            f"its Softmax runs over {taps} values, no odd K*K that fits a {height}x{width} map", Reached.WHOLE
        )
    read = raw.reshape(-1, taps) / _LOUD
    finite = np.where(np.isfinite(read), np.abs(read), 0.0)
    there = finite > 1e-3 * finite.max(1, keepdims=True)  # others are of padding
    low, high = np.where(there, finite, np.inf).min(1), finite.max(1)
    unit = low.min()  # of the first pixel, whose number is 1
    wrong = NoMatch(f"its logits, {[*raw.shape]}, are not scale * q.k in one K x K window per pixel and head")
    if not there.any(1).all():
        raise wrong
    if (high > low * (1 + 1e-4)).any():
        raise NoMatch("its logits are not scale * q.k: those of equal keys differ")
    numbers = np.rint(low / unit).astype(np.int64)
    if np.abs(low / unit - numbers).max() > 0.3:
        raise NoMatch("its logits are not scale * q.k with one scale for all heads")
    queries, counts = np.unique(numbers - 1, return_counts=True)
    if len(set(counts.tolist())) != 1 or queries[-1] >= probe.pixels:
        raise wrong
    grid = np.arange(probe.pixels).reshape(probe.batch, height, width)
    strides = (s for s in range(1, min(height, width) + 1) if height % s == 0 == width % s)
    stride = next((s for s in strides if np.array_equal(grid[:, ::s, ::s].ravel(), queries)), None)
    if stride is None:
        raise wrong
    order = np.argsort(numbers, kind="stable").reshape(len(queries), -1)
    sign = np.sign(read[order[0, 0]][there[order[0, 0]]][0])
    added = added.reshape(-1, taps)[order]
    return _Rows(probe, raw.shape, order, queries, stride, added), float(sign * (low / numbers).mean())


def _pairs(rows: _Rows, q: Index, k: Index, scale: float) -> tuple[Index, Index, Index]:
    """The channels [N, d] of queries and of keys, head by head and in pairs; and the pixel of each query's tap, or -1.

    One channel of queries is heard at each query, and keys tell their channel and their pixel.
    """
    probe, total = rows.probe, len(q)
    count, heads = rows.order.shape
    pixel, channel = np.arange(probe.pixels)[:, None], np.arange(total)[None]
    # All in one number where float32 holds it.
    codes = (
        [channel + total * pixel] if total * probe.pixels < _LARGEST_ID else [channel + 0 * pixel, pixel + 0 * channel]
    )
    paired: dict[int, tuple[int, int]] = {}
    neighbours: Index | None = None
    for start in range(0, total, count):
        heard = (start + np.arange(count)) % total
        content = probe.blank()
        content[rows.queries, q[heard]] = 1
        numbers = []
        for code in codes:
            content[:, k] = _LOUD * (1 + code)
            numbers.append(rows.logits(content) / (scale * _LOUD))
        head = np.nan_to_num(np.abs(numbers[0]), posinf=0, neginf=0).max(2).argmax(1)
        own = [number[np.arange(count), head] for number in numbers]
        read = [np.where(np.isfinite(number), np.rint(number), 0).astype(np.int64) for number in own]
        if any((np.abs(a - b)[b > 0] > 0.3).any() for a, b in zip(own, read, strict=True)) or (read[0] < 0).any():
            raise NoMatch("its logits are not scale * q.k: channels of queries and keys do not go together in pairs")
        there = read[0] > 0
        keys, pixels = (read[0] - 1, read[1] - 1) if len(read) == 2 else ((read[0] - 1) % total, (read[0] - 1) // total)
        first = there.argmax(1)
        key = keys[np.arange(count), first]
        if (keys != key[:, None])[there].any() or (keys >= total).any() or (pixels >= probe.pixels).any():
            raise NoMatch("its logits are not scale * q.k: channels of queries and keys do not go together in pairs")
        if neighbours is None:
            neighbours = np.where(there, pixels, -1)
        paired.update(zip(heard.tolist(), zip(head.tolist(), key.tolist(), strict=True), strict=True))
    assert neighbours is not None
    by_head: list[list[tuple[int, int]]] = [[] for _ in range(heads)]
    for query in sorted(paired):
        by_head[paired[query][0]].append((query, paired[query][1]))
    if len({len(pairs) for pairs in by_head}) != 1:
        raise NoMatch(f"its heads have {', '.join(str(len(pairs)) for pairs in by_head)} channels")
    pairs = np.array(by_head)
    return q[pairs[..., 0]], k[pairs[..., 1]], neighbours


def _border(rows: _Rows, neighbours: Index, kernel_size: int) -> tuple[Index, Index, Border | None, int]:
    """What is around the map, and how far taps are apart. Raises NoMatch where they are no K x K window.

    Returns:
        The pixel of each query's tap, -1 for none; its offset [queries, taps], which is (2K - 1) * row + column in the
        table of biases; the border; the dilation.
    """
    probe, hidden = rows.probe, rows.hidden
    if (hidden != hidden[:, :1]).any():
        raise NoMatch("its heads see other pixels")
    neighbours = np.where(hidden[:, 0], -1, neighbours)
    outside = bool((neighbours < 0).any())
    borders = (Border.MASKED if hidden.any() else Border.ZEROS,) if outside else (None, Border.SHIFTED)
    middle = rows.queries.searchsorted(probe.height // 2 * probe.width + probe.width // 2)
    near = neighbours[min(middle, len(neighbours) - 1)]
    columns = np.unique(near[near >= 0] % probe.width)
    for border, dilation in itertools.product(borders, np.unique(np.diff(columns)).tolist()):
        expected, offsets = window(probe, kernel_size, rows.stride, dilation, border)
        taps: dict[bytes, list[int]] = {}  # on a map of few pixels several taps read the same
        for index, column in enumerate(np.ascontiguousarray(expected.T)):
            taps.setdefault(column.tobytes(), []).append(index)
        places = [taps.get(column.tobytes(), []) for column in np.ascontiguousarray(neighbours.T)]
        if all(places.count(place) == len(place) for place in places):
            return neighbours, offsets[:, [place.pop(0) for place in places]], border, dilation
    around = "the map is padded otherwise" if outside else "other pixels are read"
    raise NoMatch(f"its logits are not scale * q.k over a K x K neighbourhood: {around}", Reached.WHOLE)


def window(probe: Probe, kernel_size: int, stride: int, dilation: int, border: Border | None) -> tuple[Index, Index]:
    """Of each query and tap [queries, K * K] the pixel, -1 outside of the map, and the offset in a table of biases."""
    taps = np.arange(kernel_size)

    def along(size: int) -> tuple[Index, Index]:
        """Pixels and offsets along one axis, [size / stride, K]."""
        place = np.arange(0, size, stride)[:, None]
        if border == Border.SHIFTED:
            remainder, own = place % dilation, place // dilation
            members = (size - 1 - remainder) // dilation + 1
            steps = np.clip(own - kernel_size // 2, 0, np.maximum(members - kernel_size, 0)) + taps
            return np.where(steps < members, remainder + steps * dilation, -1), steps - own + kernel_size - 1
        seen = place + (taps - kernel_size // 2) * dilation
        if border is None:
            seen = size - 1 - np.abs(size - 1 - np.abs(seen))
        return np.where((seen >= 0) & (seen < size), seen, -1), np.broadcast_to(taps + kernel_size // 2, seen.shape)

    (y, dy), (x, dx) = (along(size) for size in (probe.height, probe.width))
    row, column = y[None, :, None, :, None], x[None, None, :, None, :]
    image = np.arange(probe.batch)[:, None, None, None, None] * (probe.height * probe.width)
    pixels = np.where((row >= 0) & (column >= 0), image + row * probe.width + column, -1)
    offsets = np.broadcast_to(dy[:, None, :, None] * (2 * kernel_size - 1) + dx[:, None, :], pixels.shape)
    return pixels.reshape(-1, kernel_size**2), offsets.reshape(-1, kernel_size**2)


def _bias(rows: _Rows, offsets: Index, kernel_size: int) -> Array:
    """What is added to the logits, [N, 2K - 1, 2K - 1] by offset. Raises NoMatch where it depends on more than that."""
    seen, side = ~rows.hidden[:, 0], 2 * kernel_size - 1
    added = np.where(rows.hidden, 0.0, rows.added)
    counts = np.bincount(offsets[seen], minlength=side**2)
    sums = [np.bincount(offsets[seen], head[seen], side**2) for head in np.moveaxis(added, 1, 0)]
    table: Array = np.stack(sums) / np.maximum(counts, 1)
    left = np.abs(added - np.moveaxis(table[:, offsets], 0, 1))[np.broadcast_to(seen[:, None], added.shape)]
    if left.max() > RESIDUAL * np.abs(table).max():
        raise NoMatch("what it adds to its logits depends on more than the offset of a tap")
    return table.reshape(-1, side, side)


def sampled(rows: _Rows) -> Index:
    """Queries to look at: of a short axis all, of a long one some, and all that are near its ends."""
    probe = rows.probe
    grid = np.arange(len(rows.queries)).reshape(probe.batch, probe.height // rows.stride, -1)
    places = []
    for length in grid.shape[1:]:
        near, between = np.arange(min(length, 8)), np.linspace(0, length - 1, min(length, 16)).astype(np.int64)
        places.append(np.arange(length) if length <= 32 else np.unique([*near, *between, *(length - 1 - near)]))
    return grid[:, places[0][:, None], places[1]].ravel()


def _position(rows: _Rows, qk: Index, neighbours: Index, scale: float) -> Array:
    """P [d, 2] from what is left of logits beside scale * q.k, which is -scale * q.P l_n, by least squares. What is the
    same for all taps of a query drops out of the softmax.

    In a half-precision file P l may be stored rounded, and neighbours differ by little more than that on a large map:
    there the residual only has to be small, and the comparison of the whole block decides.
    """
    probe, random, queries = rows.probe, np.random.default_rng(0), sampled(rows)
    heads, d = qk.shape[1:]
    y, x = np.meshgrid(np.linspace(-1, 1, probe.height), np.linspace(-1, 1, probe.width), indexing="ij")
    place = np.tile(np.stack([x, y]).reshape(2, -1), probe.batch)
    near, seen = neighbours[queries], ~rows.hidden[queries, :1]
    inside = near >= 0
    moved = _centred(np.where(inside, -place[:, near], 0), seen[:, 0])  # [2, queries, taps]
    gram, sums, size, square = np.zeros((d, 2, d, 2)), np.zeros((d, 2)), 0.0, 0.0
    # As many queries as P has rows, at least, so that they determine it: a tiny map needs several rounds.
    for _ in range(math.ceil(2 * d / (len(queries) * heads))):
        content = probe.random(random)
        content[:, qk[1]] *= _SOFT
        query = scale * content[rows.queries[queries][:, None, None], qk[0]].astype(np.float64)
        keys = content[:, qk[1]].astype(np.float64)
        products = np.stack([(query * keys[near[:, t]]).sum(-1) for t in range(near.shape[1])], -1)
        logits = rows.logits(content)[queries]
        left = _centred(logits - np.where(inside[:, None], products, 0), seen)
        # Linear in P: left = the sum over d and the two coordinates of query * P * moved.
        gram += np.einsum("qnd,qne,aqt,bqt->daeb", query, query, moved, moved, optimize=True)
        sums += np.einsum("qnd,qnt,aqt->da", query, left, moved, optimize=True)
        size += float(np.square(np.where(seen, logits, 0)).sum())
        square += float(np.square(left).sum())
    flat = gram.reshape(2 * d, -1)
    weight = np.linalg.solve(flat + 1e-12 * np.trace(flat) * np.eye(2 * d), sums.ravel()).reshape(d, 2)
    explained = (weight * (2 * sums - np.einsum("daeb,eb->da", gram, weight))).sum()
    residual = math.sqrt(max(square - explained, 0) / (square + 1e-4 * size))
    half = any(part.weight.dtype != np.float32 for part in probe.found.projections)
    check_residual(
        residual,
        "scale * q.(k - P l), linear in the coordinates l of the keys",
        _ROUNDED_POSITION if half else RESIDUAL,
    )
    return np.asarray(weight)


def _centred(array: Array, seen: Array) -> Array:
    """Without the mean over the taps that are ``seen``, its last axis; 0 at others."""
    mean = np.where(seen, array, 0).sum(-1, keepdims=True) / seen.sum(-1, keepdims=True)
    centred: Array = np.where(seen, array - mean, 0)
    return centred


def _values(rows: _Rows, neighbours: Index, result: gs.Variable) -> tuple[Index, Array, Index, str]:
    """The channels of values [N, d] in the order of the result's, the factor of each, the head of each N, and the
    result's layout.

    Each query weighs the pixel that it is at, where values tell their channel and weights their head.
    """
    probe = rows.probe
    count, heads = rows.order.shape
    here = (neighbours == rows.queries[:, None]).argmax(1)
    kinds = (1.0, 1.0 + np.arange(probe.starts[-1]), 1.0), (1.0, 1.0, 2.0 + np.arange(heads))
    read: list[list[Array]] = [[], [], []]
    layout = ""
    for turn in range(1 if count >= 3 else 3):
        kind = (np.arange(count) + turn) % 3
        content, weights = probe.blank(), np.zeros((count, heads, neighbours.shape[1]))
        for one in range(3):
            own = np.flatnonzero(kind == one)
            content[rows.queries[own]] = kinds[0][one]
            weights[own, :, here[own]] = LOUDER * kinds[1][one]
        x = probe.x(np.zeros((probe.pixels, probe.cin), np.float32))
        (maps,) = probe.run([result], content, {**rows.weights(weights), probe.found.x.name: x})
        layout = layout or _layout(maps.shape, probe, rows.stride, heads)
        channels = layout.index("C")
        by_query = np.moveaxis(maps, channels, -1).reshape(count, -1).astype(np.float64) / LOUDER
        for one in range(3):
            read[one].append(by_query[kind == one])
    gain, channel, head = (np.concatenate(one).mean(0) for one in read)
    if not (np.abs(gain) > 1e-9).all():
        raise NoMatch("its result is not linear in the attention, or in some channels does not depend on it")
    channel, head = channel / gain - 1, head / gain - 2
    v, of = np.rint(channel).astype(np.int64), np.rint(head).astype(np.int64).reshape(heads, -1)
    if (
        max(np.abs(channel - v).max(), np.abs(head - of.ravel()).max()) > 0.3
        or not np.array_equal(np.sort(of[:, 0]), np.arange(heads))
        or (of != of[:, :1]).any()
        or not 0 <= v.min() <= v.max() < probe.starts[-1]
    ):
        raise NoMatch("the channels of its result are not those of one head after another", Reached.WHOLE)
    return v.reshape(heads, -1), gain, of[:, 0], layout


def _layout(shape: tuple[int, ...], probe: Probe, stride: int, heads: int) -> str:
    """Of a result with this shape. Raises NoMatch where it is none that is known."""
    sizes = {"B": probe.batch, "H": probe.height // stride, "W": probe.width // stride}
    sizes["P"] = sizes["H"] * sizes["W"]
    for layout in ("BHWC", "BCHW", "BPC", "BCP") if probe.found.x_last else ("BCHW", "BHWC", "BCP", "BPC"):
        fits = len(shape) == len(layout) and shape[layout.index("C")] % heads == 0
        if fits and all(sizes.get(axis, size) == size for axis, size in zip(layout, shape, strict=True)):
            return layout
    raise NoMatch(f"its result has shape {[*shape]}, not [B, N * d, H / {stride}, W / {stride}]")
