"""Attention between linear projections in an ONNX graph: q k^T, Softmax, times v. No PyTorch here.

Its parts are found by structure. Which channel, pixel and factor goes where is measured: the projections are set to
numbers that say where they are, and read again where they are multiplied. So it does not matter how a graph cuts, moves
and scales them.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.reduction import Writer
from acmix_deploy.graph import (
    RESHAPING,
    Array,
    Feeds,
    NoMatch,
    Reached,
    constant_value,
    nearest,
    producer,
    upstream,
    way_down,
)

MASKED = -1e4
"""Added to the logits of keys that nothing attends to: exp of it is 0, and float16 holds it. Of Swin's -100 it is a
denormal number in float32, which processors are slow with."""

RESIDUAL = 1e-3  # of logits, relative; evaluated in float32, so that a real block leaves about 1e-6
MASKED_BELOW = -50.0
"""What a graph adds to hide a key; exp of it is lost in float32."""
PRODUCTS = frozenset({"Einsum", "MatMul", "Mul"})
MOVING = RESHAPING | {"Expand", "Gather", "Pad", "Slice", "Split"}

_LINEAR = frozenset(
    {
        *MOVING, "Add", "BatchNormalization", "CastLike", "Concat", "Conv", "DepthToSpace", "Div", "Dropout", "Einsum",
        "GatherElements", "GatherND", "Gemm", "MatMul", "Mul", "Neg", "ReduceMean", "ReduceSum", "Softmax", "Sub",
        "Sum", "Tile", "Where",
    }
)  # fmt: skip

_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.floordiv,
}  # fmt: skip

Size: TypeAlias = "int | gs.Tensor"
"""A size that is known, or a tensor [1] that holds it."""

Compute = Callable[[list[gs.Variable], Feeds], list[Array]]


@dataclass(frozen=True)
class Linear:
    """A product with a constant matrix, and the bias added to it."""

    source: gs.Variable
    """[..., Cin]."""
    result: gs.Variable
    """[..., Cout]."""
    weight: Array
    """[Cout, Cin]."""
    bias: Array
    """[Cout]."""


@dataclass(frozen=True)
class Attention:
    """The parts of one attention in a graph."""

    softmax: gs.Node
    logits: gs.Node
    """MatMul of q [..., N, d] and k^T [..., d, N]."""
    attended: gs.Node
    """MatMul of the weights [..., N, N] and v [..., N, d]."""
    projections: list[Linear]
    """To q, k and v: one, or up to three, of which each knows its own channels."""


class Heads(NamedTuple):
    """What an attention computes: ``softmax(q_i . k_n + added) v_n`` for each of L batches of N tokens and one head."""

    q: tuple[Array, Array]
    """Weight [heads, d, Cin] and bias [heads, d], the scale of the logits included."""
    k: tuple[Array, Array]
    v: tuple[Array, Array]
    """Ordered as the channels of the result."""
    added: Array
    """[L, N, N] for query, key: to the logits."""
    head: Array
    """[L]: which head."""
    tokens: Array
    """[L, N]: 1 + index of the pixel in [B, H, W] that a token is made of, 0 for padding."""

    @property
    def hidden(self) -> Array:
        """[L, N, N]: whether a key is masked for a query."""
        return np.less(self.added, MASKED_BELOW)


class Fit(NamedTuple):
    """Logits as ``scale * q.k``."""

    scale: float
    residual: float
    """What is left of the logits, relative."""


def fitted(logits: Array, products: Array, head_dim: int) -> Fit:
    """The factor of ``products`` q.k in ``logits`` of the same shape; the usual one, where only rounding differs."""
    scale = float((logits * products).sum() / (products * products).sum())
    residual = float(np.linalg.norm(logits - scale * products) / (np.linalg.norm(logits) or 1.0))
    usual = head_dim**-0.5
    return Fit(usual if math.isclose(scale, usual, rel_tol=1e-4) else scale, residual)


def check_residual(residual: float, what: str, limit: float = RESIDUAL) -> None:
    """Refuse logits that differ from ``what`` by more than rounding does. Raises NoMatch."""
    if not residual < limit:
        raise NoMatch(f"its logits are not {what}: relative residual {residual:.1e}, limit {limit:.0e}")


def check_linear(nodes: Iterable[gs.Node], sources: Iterable[str]) -> None:
    """Refuse what does more to tensors ``sources`` than to move, multiply and add them, beside a Softmax.

    A block is measured with few numbers, on which a Clip or a Relu may not show.

    Args:
        nodes: those behind the sources, in order.
        sources: names of tensors.

    Raises:
        NoMatch: naming the operators.
    """
    reached, others = {*sources}, set()
    for node in nodes:
        if node.op != "Shape" and any(tensor.name in reached for tensor in node.inputs):
            reached.update(tensor.name for tensor in node.outputs)
            others |= {node.op} - _LINEAR
    if others:
        raise NoMatch(f"within it are operators that are not linear: {', '.join(sorted(others))}", Reached.WHOLE)


def linear(node: gs.Node) -> Linear | None:
    """A Gemm or MatMul with the Add behind it, if its matrix is constant."""
    weight = constant_value(node.inputs[1])
    if weight is None or weight.ndim != 2 or not isinstance(node.inputs[0], gs.Variable):
        return None
    result = node.outputs[0]
    if node.op == "Gemm":
        usual = node.attrs.get("alpha", 1.0) == node.attrs.get("beta", 1.0) == 1.0 and not node.attrs.get("transA", 0)
        weight = weight if node.attrs.get("transB", 0) else weight.T
        bias = constant_value(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(len(weight))
        return Linear(node.inputs[0], result, weight, bias) if usual and bias is not None else None
    bias = np.zeros(weight.shape[1])
    if len(result.outputs) == 1 and (user := result.outputs[0]).op == "Add":
        stored = constant_value(user.inputs[user.inputs[0] is result])
        if stored is not None and stored.shape == bias.shape:
            result, bias = user.outputs[0], stored
    return Linear(node.inputs[0], result, weight.T, bias)


def layers_above(tensor: gs.Tensor) -> tuple[list[gs.Node], list[gs.Node]]:
    """The nearest layers with stored weights that ``tensor`` comes from, and the nodes from them to it, in order."""

    def is_layer(node: gs.Node) -> bool:
        return node.op in ("Conv", "Gemm", "MatMul") and constant_value(node.inputs[1]) is not None

    above = [*upstream([tensor], lambda node: is_layer(node) or node.op == "Shape")][::-1]
    return [node for node in above if is_layer(node)], [node for node in above if not is_layer(node)]


def is_product(nodes: Iterable[gs.Node], layers: Iterable[gs.Node]) -> bool:
    """Whether one of ``nodes``, in order, multiplies two tensors that both come from ``layers``."""
    reached = {tensor.name for layer in layers for tensor in layer.outputs}
    for node in nodes:
        depends = [tensor.name in reached for tensor in node.inputs]
        if node.op in PRODUCTS and sum(depends) > 1:
            return True
        if any(depends) and node.op != "Shape":
            reached.update(tensor.name for tensor in node.outputs)
    return False


def attention_at(graph: gs.Graph, softmax: gs.Node) -> Attention:
    """The attention around a Softmax node. Raises NoMatch, with nothing reached, where there is none."""
    products = [node for node in nearest(softmax.inputs[0], "MatMul") if constant_value(node.inputs[1]) is None]
    if len(products) != 1:
        raise NoMatch("its logits are not one product of queries and keys", Reached.NOTHING)
    attended, weights = next_node(graph, softmax.outputs[0])
    if attended.op != "MatMul" or attended.inputs[0] is not weights:
        raise NoMatch("it does not weigh values", Reached.NOTHING)
    found: dict[str, Linear] = {}
    for operand in (*products[0].inputs, attended.inputs[1]):
        parts = [linear(node) for node in nearest(operand, "MatMul", "Gemm")]
        if len(parts) != 1 or parts[0] is None:
            raise NoMatch("queries, keys and values do not each come from one linear layer", Reached.NOTHING)
        found[parts[0].result.name] = parts[0]
    return Attention(softmax, products[0], attended, [*found.values()])


def next_node(graph: gs.Graph, tensor: gs.Tensor, reached: Reached = Reached.NOTHING) -> tuple[gs.Node, gs.Tensor]:
    """The next node downstream that does more than move values, and its operand. Raises NoMatch where ways part."""
    for operand, node in way_down(graph, tensor):
        if node.op not in MOVING:
            return node, operand
    raise NoMatch(f"the intermediate {tensor.name} is read by several nodes or is an output of the graph", reached)


def origins(tensor: gs.Tensor) -> Iterator[gs.Tensor]:
    """``tensor``, and what its values were before each movement, nearest first."""
    yield tensor
    while (node := producer(tensor)) is not None and node.op in MOVING:
        tensor = node.inputs[0]
        yield tensor


def computed_by(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computed ``tensor``, before it was moved."""
    return producer([*origins(tensor)][-1])


def common_origin(tensors: Iterable[gs.Tensor], reached: Reached = Reached.NOTHING) -> gs.Variable:
    """The one tensor that all are made of by movement alone, before any padding. Raises NoMatch."""
    first, *others = ([*origins(tensor)] for tensor in tensors)
    shared = [tensor for tensor in first if all(any(tensor is one for one in other) for other in others)]
    if not shared:
        raise NoMatch("its attention and what it is added to do not read one tensor", reached)
    x = shared[0]
    while (node := producer(x)) is not None and node.op == "Pad":
        x = node.inputs[0]
    return x


def measure(
    found: Attention, x: gs.Variable, result: gs.Tensor, pixels: Array, feeds: Feeds, compute: Compute
) -> Heads:
    """What an attention computes.

    Args:
        found: the attention.
        x: the tensor that it reads.
        result: what its result becomes by movement, channels first or last.
        pixels: for x, 1 + index of the pixel in [B, H, W], in every channel.
        feeds: values of x and of what else is needed from outside.
        compute: tensors of the graph from the values of others.

    Raises:
        NoMatch: it moves values in a way that no attention does.
    """
    parts = found.projections
    ends = [*found.logits.inputs, found.attended.inputs[1]]
    results = [part.result.name for part in parts]
    check_linear([*upstream(ends, lambda node: node.op == "Shape", stop_at=results)][::-1], results)
    shapes = [array.shape for array in compute([part.result for part in parts], feeds)]

    def operands(contents: Sequence[Array]) -> list[Array]:
        """q, k and v [L, N, d] for projections set to ``contents``."""
        set_to = {
            part.result.name: np.broadcast_to(content, shape).astype(np.float32)
            for part, content, shape in zip(parts, contents, shapes, strict=True)
        }
        q, k, v = compute(ends, feeds | set_to)
        lead = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
        return [
            np.broadcast_to(array, lead + array.shape[-2:]).reshape(-1, *array.shape[-2:])
            for array in (q, np.swapaxes(k, -1, -2), v)
        ]

    def logits(content: float) -> Array:
        set_to = {
            part.result.name: np.full(shape, content, np.float32) for part, shape in zip(parts, shapes, strict=True)
        }
        (array,) = compute([found.softmax.inputs[0]], feeds | set_to)
        return array.reshape(-1, *array.shape[-2:]).astype(np.float64)

    axis = found.softmax.attrs.get("axis", -1)
    added = logits(0.0)
    factors = [float(array.max()) for array in operands([np.ones(1)] * len(parts))]
    if axis not in (-1, len(compute([found.softmax.inputs[0]], feeds)[0].shape) - 1) or not all(factors):
        raise NoMatch("its Softmax does not run over the keys")

    def located(contents: Sequence[Array]) -> list[Array]:
        """1 + what was put into the projections for every q, k and v [L, N, d]; 0 for padding."""
        return [
            np.rint(array / factor).astype(np.int64) for array, factor in zip(operands(contents), factors, strict=True)
        ]

    widths = np.cumsum([0, *(len(part.weight) for part in parts)])
    channels = located([np.arange(start, end) + 1 for start, end in itertools.pairwise(widths)])
    places = compute([part.source for part in parts], feeds | {x.name: pixels.astype(np.float32)})
    tokens = [array[:, :, 0] for array in located([place[..., :1] for place in places])]
    rows = [array.max(1) for array in channels]
    if len({row.shape[1] for row in rows}) != 1:
        raise NoMatch("its values are of another width than its queries and keys")
    if any(((array != row[:, None]) & (array > 0)).any() for array, row in zip(channels, rows, strict=True)):
        raise NoMatch("its queries, keys and values are of other channels from token to token")
    if (
        not all(np.array_equal(tokens[0], other) for other in tokens[1:])
        or added.shape[1:] != (tokens[0].shape[1],) * 2
    ):
        raise NoMatch("its queries, keys and values are not of the same pixels")
    if len(added) != len(rows[0]):
        raise NoMatch("its logits are not one N x N map per batch and head")

    # Heads in order of their channels in the result.
    d = rows[0].shape[1]
    sets, first, head = np.unique(np.concatenate(rows, 1), axis=0, return_index=True, return_inverse=True)
    del sets
    head = head.reshape(-1)
    (shape,) = (array.shape for array in compute([found.attended.outputs[0]], feeds))
    marks = (head[:, None] * d + np.arange(d) + 1)[:, None]
    set_to = np.broadcast_to(marks, (len(head), tokens[0].shape[1], d)).reshape(shape).astype(np.float32)
    (carried,) = compute([result], feeds | {found.attended.outputs[0].name: set_to})
    order = _channels_of(np.rint(carried).astype(np.int64) - 1, len(first) * d)
    if order is None or (order.reshape(-1, d) // d != order.reshape(-1, d)[:, :1] // d).any():
        raise NoMatch("the channels of its result are not those of one head after another")
    heads = order.reshape(-1, d)[:, 0] // d
    inverse = np.argsort(heads)

    weight = np.concatenate([part.weight for part in parts]).astype(np.float64)
    bias = np.concatenate([part.bias for part in parts]).astype(np.float64)

    def part(row: Array, inner: Array, factor: float) -> tuple[Array, Array]:
        index = np.take_along_axis(row[first][heads] - 1, inner, 1)
        return weight[index] * factor, bias[index] * factor

    straight = np.broadcast_to(np.arange(d), (len(heads), d))
    of_ones = (logits(1.0) - added)[added >= MASKED_BELOW]
    return Heads(
        q=part(rows[0], straight, fitted(of_ones, np.full(of_ones.shape, d), d).scale),
        k=part(rows[1], straight, 1.0),
        v=part(rows[2], order.reshape(-1, d) % d, factors[2]),
        added=added,
        head=inverse[head],
        tokens=tokens[0],
    )


def _channels_of(array: Array, count: int) -> Array | None:
    """The ``count`` distinct values along the channel axis, last or second, of an array that only varies along it."""
    for axis in (array.ndim - 1, 1):
        line: Array = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])[0]
        if len(line) == count and len(np.unique(line)) == count:
            return line
    return None


class AttentionWriter(Writer):
    """Writes reduced forms with attention, whose sizes may be computed in the graph."""

    def reshape(self, label: str, tensor: gs.Tensor, *sizes: Size) -> gs.Variable:
        """``tensor`` in another shape: 0 keeps a size, -1 is found; a tensor [1] is a size that is computed."""
        return self.add("Reshape", label, tensor, self.sizes(f"{label}.shape", *sizes))

    def sizes(self, label: str, *sizes: Size) -> gs.Tensor:
        """Sizes as one tensor."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(label, np.array(sizes))
        parts = [
            self.constant(f"{label}.{i}", np.array([size])) if isinstance(size, int) else size
            for i, size in enumerate(sizes)
        ]
        return self.add("Concat", label, *parts, axis=0, dtype=np.int64)

    def arithmetic(self, op: str, label: str, left: Size, right: Size) -> Size:
        """Add, Sub, Mul or Div of sizes: at once where both are known, else by a node."""
        if isinstance(left, int) and isinstance(right, int):
            return _ARITHMETIC[op](left, right)
        operands = [
            self.constant(f"{label}.{i}", np.array([size])) if isinstance(size, int) else size
            for i, size in enumerate((left, right))
        ]
        return self.add(op, label, *operands, dtype=np.int64)

    def linear(self, label: str, tensor: gs.Tensor, weight: Array, bias: Array) -> gs.Variable:
        """``tensor`` [..., Cin] times ``weight`` [Cout, Cin], plus ``bias`` [Cout] where there is one."""
        product = self.add(
            "MatMul", f"{label}.product" if bias.any() else label, tensor, self.constant(f"{label}.weight", weight.T)
        )
        return self.add("Add", label, product, self.constant(f"{label}.bias", bias)) if bias.any() else product

    def attention(self, tokens: gs.Tensor, heads: Heads, added: gs.Tensor | None) -> gs.Variable:
        """Multi-head attention over ``tokens`` [B, N, Cin], to [B, N, heads * d].

        Written as MatMul, Add, Softmax, MatMul on [B, heads, N, d], each of q, k and v with a MatMul, Add, Reshape and
        Transpose of its own: the form that TensorRT takes for multi-head attention.

        Args:
            tokens: the tokens.
            heads: the weights.
            added: to the logits [B, heads, N, N], broadcast, or nothing.
        """
        number, d, _ = heads.q[0].shape
        parts = []
        for label, (weight, bias), perm in zip(
            "qkv", heads[:3], ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True
        ):
            projected = self.linear(label, tokens, weight.reshape(number * d, -1), bias.reshape(-1))
            split = self.reshape(f"{label}.by_head", projected, 0, 0, number, d)
            parts.append(self.add("Transpose", f"{label}.heads", split, perm=perm))
        logits = self.add("MatMul", "logits", parts[0], parts[1])
        if added is not None:
            logits = self.add("Add", "logits.added", logits, added)
        attended = self.add("MatMul", "attended", self.add("Softmax", "weights", logits, axis=-1), parts[2])
        joined = self.add("Transpose", "attended.by_token", attended, perm=[0, 2, 1, 3])
        return self.reshape("attention", joined, 0, 0, number * d)
