"""Choose image sizes to evaluate a graph at, and the values that its blocks see there."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, product
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, shape_inference

from acmix_deploy.errors import UserError
from acmix_deploy.graph import (
    SHAPE_OF,
    Feeds,
    NoMatch,
    Region,
    constant_value,
    evaluate,
    names_read,
    piece,
    reads,
    upstream,
)
from acmix_deploy.options import channels_last
from acmix_deploy.runtime.onnxruntime import folded, inputs_of, known_operators, open_session

Size = tuple[int, int, int]
"""Batch, height and width."""

_TRIALS: tuple[Size, ...] = ((2, 24, 32), (1, 40, 24), (2, 160, 192), (1, 192, 128), (1, 320, 416), (1, 640, 640))
"""Sizes to try for free axes, small ones first: which of them a model accepts is its own affair."""

_FROZEN = (416, 320, 512, 224, 256, 384, 448, 608, 736, 768, 896, 960, 1024, 1280)
"""More sides to try where none of _TRIALS runs: a graph may hold for one size alone though it declares axes free."""

_STRIDES = (1, 2, 4, 8, 16, 32)
"""Of maps, against the image: a graph that holds for one size has the sizes of its maps in its constants."""

_LARGEST = 2048  # pixels, of a side that is worth trying
_SMALL = 16  # values of a constant that may be a shape
_MOST = 6  # sizes of maps, and batches, that constants name
_ENOUGH = 2


@dataclass
class Patience:
    """How long may be spent on sizes that do not run, in all: seconds of CPU time."""

    seconds: float = 8.0
    """What is left of it."""


@dataclass(frozen=True)
class Source:
    """Where values come from: an input of the graph, or the result of a node that ONNX Runtime does not know."""

    tensor: gs.Variable
    shape: tuple[int | str | None, ...] | None
    """None or a name for a free size; None altogether where not even the number of axes is known."""
    operator: str = ""
    """Of the node, with its domain."""

    @property
    def origin(self) -> str:
        """In words where it comes from, for the end of a sentence; nothing for an input."""
        return f": it comes from {self.operator}, which ONNX Runtime does not know" if self.operator else ""

    @property
    def is_static(self) -> bool:
        return self.shape is not None and all(isinstance(size, int) for size in self.shape)

    @property
    def has_fixed_size(self) -> bool:
        """Whether every axis is fixed but the first, the batch."""
        return self.shape is not None and all(isinstance(size, int) for size in self.shape[1:])


def sources(graph: gs.Graph, functions: Collection[onnx.FunctionProto]) -> list[Source]:
    """The inputs of a graph, and the results of nodes that ONNX Runtime does not know: nothing here can compute them.

    Sizes of such a result are those that the file declares, else the channels that a convolution behind it reads.
    """
    known = known_operators() | {(function.domain, function.name) for function in functions}
    found = [Source(tensor, _sizes(tensor)) for tensor in graph.inputs]
    for node in graph.nodes:
        if unknown := _unknown(node, known):
            found += [
                Source(tensor, _sizes(tensor) or _sizes_by_reader(tensor), unknown)
                for tensor in node.outputs
                if tensor.name
            ]
    return found


def sources_of(tensors: Iterable[gs.Variable], all_sources: Collection[Source]) -> list[Source]:
    """The sources that ``tensors`` are computed from."""
    tensors = list(tensors)
    by_name = {source.tensor.name: source for source in all_sources}
    nodes = upstream(tensors, lambda node: False, stop_at=by_name)
    read = {tensor.name for tensor in chain(tensors, chain.from_iterable(map(reads, nodes)))}
    return [source for name, source in by_name.items() if name in read]


def free_sides(inputs: Iterable[Source]) -> tuple[bool, bool]:
    """Whether the height and the width of images are free."""
    images = [source.shape for source in inputs if source.shape and len(source.shape) == 4]
    height, width = (any(not isinstance(shape[_sides(shape)[side]], int) for shape in images) for side in (0, 1))
    return height, width


def _sides(shape: Sequence[int | str | None]) -> tuple[int, int]:
    """The axes of an image's height and width."""
    return (1, 2) if channels_last(shape) else (2, 3)


class Need(NamedTuple):
    """What a fused block asks of the map that it reads."""

    x: str
    """Name of the map."""
    height_axis: int
    """Of the map; the width's is the next."""
    smallest: int
    """Fewest rows and columns."""


def smallest_image(model: onnx.ModelProto, needs: Collection[Need], step: int) -> tuple[int, int]:
    """The smallest height and width at which the maps of all blocks are as large as they need.

    The part of the file that makes the maps is run, so it does not matter how sizes go through it. Height and width
    are found one after the other, both as multiples of ``step``; one that is fixed stays as it is.

    Raises:
        UserError: ONNX Runtime refuses the file, or it runs at none of the sizes tried.
    """
    maps = list(dict.fromkeys(need.x for need in needs))
    session = open_session(_sizes_of(model, maps), optimize=False)
    inputs = inputs_of(session)

    def defined(height: int, width: int) -> bool:
        feeds = {name: np.zeros(_filled(dims, (1, height, width)), dtype) for name, dims, dtype in inputs}
        try:
            sizes = dict(zip(maps, session.run(None, feeds), strict=True))
        except Exception:  # ONNX Runtime's error types share no base of their own
            return False
        return all(sizes[need.x][need.height_axis :][:2].min() >= need.smallest for need in needs)

    def sizes(side: int, end: int) -> Iterable[int]:
        fixed = [size for _, dims, _ in inputs if len(dims) == 4 and isinstance(size := dims[_sides(dims)[side]], int)]
        return fixed or range(step, end + 1, step)

    known = (*((height, width) for _, height, width in _TRIALS), *zip(_FROZEN, _FROZEN, strict=True))
    tried = [(height + -height % step, width + -width % step) for height, width in known]
    start = next((size for size in tried if defined(*size)), None)
    if start is None:
        raise UserError("the fused file runs at none of the sizes tried")
    height = next((size for size in sizes(0, start[0]) if defined(size, start[1])), start[0])
    width = next((size for size in sizes(1, start[1]) if defined(start[0], size)), start[1])
    return height, width


def _sizes_of(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """The part of a model that makes the tensors ``names``, with their shapes for its outputs."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    wanted = set(names)
    nodes = [helper.make_node("Shape", [name], [SHAPE_OF.format(name)]) for name in names]
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            nodes.append(node)
            wanted.update(names_read(node))
    for field in (part.graph.node, part.graph.output, part.graph.initializer):
        del field[:]
    part.graph.node.extend(reversed(nodes))
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in wanted)
    part.graph.output.extend(
        helper.make_tensor_value_info(SHAPE_OF.format(name), onnx.TensorProto.INT64, None) for name in names
    )
    return part


def values_at_sizes(
    graph: gs.Graph,
    regions: Sequence[Region],
    functions: Collection[onnx.FunctionProto],
    inputs: Sequence[Source],
    patience: Patience,
) -> list[Feeds]:
    """Values of what ``regions`` read, by name, for two draws of random inputs: at two sizes where it runs at two.

    What comes from the image without being x differs between them, so that it is not taken for a constant.

    A size that does not run may take long to say so. So small ones come first, after one that did not run only those
    whose shapes fit, the others last, and the time is limited.

    Args:
        graph: where ``regions`` live.
        regions: blocks, whose results can be computed at these sizes as well.
        functions: bodies of the custom operators used.
        inputs: what they are computed from.
        patience: time for sizes that do not run; what is spent of it is taken away.

    Raises:
        NoMatch: it runs at none of the sizes tried, or the sizes of an input are not known.
    """
    if unknown := next((source for source in inputs if source.shape is None), None):
        raise NoMatch(f"it depends on {unknown.tensor.name}, whose sizes the file does not tell{unknown.origin}")
    wanted = {tensor.name: tensor for region in regions for tensor in (region.x, *region.outside)}
    every = [*(wanted | {region.y.name: region.y for region in regions}).values()]
    static = all(source.is_static for source in inputs)
    found: list[Feeds] = []
    failed: dict[Size, str] = {}
    doubtful: list[Size] = []
    fits: Callable[[Size], bool] | None = None
    likely = _TRIALS[:1] if static else chain(_TRIALS, _frozen_sizes(graph, every))
    for size, again in chain(((size, False) for size in likely), ((size, True) for size in doubtful)):
        if len(found) == _ENOUGH or (found and (again or size not in _TRIALS)) or patience.seconds < 0:
            break
        start = time.process_time()
        if fits and not again and not fits(size):
            doubtful.append(size)
        else:
            certain = static or (doubtful and not again)  # then what is not wanted need not be computed
            computed = [*wanted.values()] if certain else every
            try:
                values = evaluate(graph, computed, _random(inputs, size, len(found)), functions)
            except NoMatch as error:
                failed[size] = error.reason
                fits = fits or _shape_check(graph, regions, every, inputs, functions)
            else:
                found.append({tensor.name: value for tensor, value in zip(computed, values, strict=True)})
                ran = size
                start = time.process_time()  # time well spent
        patience.seconds -= time.process_time() - start
    if not found:
        reason = next(reversed(failed.values()), "")
        if not static:
            sizes = ", ".join("x".join(map(str, size)) for size in failed) or "none"
            late = ", when time was up" if patience.seconds < 0 else ""
            reason = f"it runs at none of the sizes that were tried ({sizes}{late}): {reason}"
        raise NoMatch(reason)
    if len(found) < _ENOUGH:
        computed = [*wanted.values()]
        values = evaluate(graph, computed, _random(inputs, ran, len(found)), functions)
        found.append({tensor.name: value for tensor, value in zip(computed, values, strict=True)})
    return found


def _random(inputs: Iterable[Source], size: Size, draw: int = 0) -> Feeds:
    """Random inputs whose free axes have ``size``."""
    random = np.random.default_rng(draw)
    feeds = {}
    for source in inputs:
        values = random.random(_filled(source.shape or (), size))
        pixels = source.tensor.dtype == np.uint8
        feeds[source.tensor.name] = (values * 256 if pixels else values).astype(source.tensor.dtype or np.float32)
    return feeds


def _filled(dims: Sequence[int | str | None], size: Size) -> list[int]:
    """The shape of an input whose free axes have ``size``, and 1 where they are neither the batch nor a side."""
    free = dict(zip((0, *_sides(dims)), size, strict=True))
    return [n if isinstance(n, int) else free.get(axis, 1) for axis, n in enumerate(dims)]


def _shape_check(
    graph: gs.Graph,
    regions: Sequence[Region],
    wanted: list[gs.Variable],
    inputs: Sequence[Source],
    functions: Collection[onnx.FunctionProto],
) -> Callable[[Size], bool]:
    """Whether shapes fit together at a size, as ONNX Runtime infers them, in milliseconds: no map is computed."""
    model, used = piece(graph, wanted, _random(inputs, _TRIALS[0]), functions)
    del model.graph.value_info[:]
    for tensor in [tensor for tensor in model.graph.initializer if np.prod(tensor.dims) > _SMALL]:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)

    def fits(size: Size) -> bool:
        feeds = _random(inputs, size)
        for value in model.graph.input:
            if value.name in used:
                for axis, number in zip(value.type.tensor_type.shape.dim, feeds[value.name].shape, strict=True):
                    axis.dim_value = number
        try:
            inferred = shape_inference.infer_shapes(folded(model), strict_mode=True, data_prop=True).graph
        except (UserError, shape_inference.InferenceError):
            return False
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        sizes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in values}
        reshapes = [node for node in inferred.node if node.op_type == "Reshape"]
        counts = ([math.prod(sizes.get(name, [0])) for name in (node.input[0], node.output[0])] for node in reshapes)
        maps = ((sizes.get(region.x.name, []), sizes.get(region.y.name, [])) for region in regions)
        return all(before == after or not before or not after for before, after in counts) and all(
            _alike(x, y, size[0]) for x, y in maps
        )

    return fits


def _alike(x: list[int], y: list[int], batch: int) -> bool:
    """Whether the result of a block can be of as many images as what it reads, and of maps of the same proportions.

    Where a Reshape holds all sizes, another size of as many pixels runs as well.
    """
    if len(x) != 4 or len(y) != 4 or not all((*x, *y)):
        return True
    return y[0] % batch == 0 and any(x[a] * y[b + 1] == x[a + 1] * y[b] for a in (1, 2) for b in (1, 2))


def _frozen_sizes(graph: gs.Graph, wanted: list[gs.Variable]) -> Iterator[Size]:
    """Sizes that a graph may hold for alone: usual ones, and those whose maps have a size that a constant names."""
    usual = [(1, side, side) for side in _FROZEN]
    yield from usual
    maps: Counter[tuple[int, int]] = Counter()
    batches = Counter({1: 1})
    for node in upstream(wanted, lambda node: False):
        for tensor in node.inputs:
            if isinstance(tensor, gs.Variable) and (tensor.inputs and tensor.inputs[0].op != "Constant"):
                continue
            value = constant_value(tensor)
            if value is None:
                continue
            shapes = [value.shape]
            if value.ndim == 1 and 1 < value.size <= _SMALL and np.issubdtype(value.dtype, np.integer):
                shapes.append(tuple(value.tolist()))
                batches.update(value[:1].tolist())
            for shape in shapes:
                squares = ((side, side) for length in shape if (side := math.isqrt(max(length, 0))) ** 2 == length)
                maps.update(pair for pair in (*pairwise(shape), *squares) if min(pair) > 1)
    named = product(
        (size for size, _ in maps.most_common(_MOST)),
        (batch for batch, _ in batches.most_common(_MOST) if batch > 0),
        _STRIDES,
    )
    sizes = dict.fromkeys((batch, height * stride, width * stride) for (height, width), batch, stride in named)
    yield from (size for size in sizes if max(size) <= _LARGEST and size not in (*_TRIALS, *usual))


def _unknown(node: gs.Node, known: Collection[tuple[str, str]]) -> str:
    """The operator that keeps a node, or a graph within it, from being run: domain and type; empty where none does."""
    domain = "" if node.domain in (None, "ai.onnx") else node.domain
    if (domain, node.op) not in known:
        return f"{domain}::{node.op}"
    inner = (part for attribute in node.attrs.values() if isinstance(attribute, gs.Graph) for part in attribute.nodes)
    return next(filter(None, (_unknown(part, known) for part in inner)), "")


def _sizes(tensor: gs.Variable) -> tuple[int | str | None, ...] | None:
    return None if tensor.shape is None else tuple(tensor.shape)


def _sizes_by_reader(tensor: gs.Variable) -> tuple[int | str | None, ...] | None:
    """The sizes of a map as far as a convolution that reads it tells them."""
    for node in tensor.outputs:
        weight = constant_value(node.inputs[1]) if node.op == "Conv" and node.inputs[0] is tensor else None
        if weight is not None and weight.ndim == 4:
            return None, weight.shape[1] * node.attrs.get("group", 1), None, None
    return None
