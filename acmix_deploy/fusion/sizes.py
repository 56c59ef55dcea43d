"""Choose image sizes to evaluate a graph at, and the values that its blocks see there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from acmix_deploy.errors import UserError
from acmix_deploy.graph import Feeds, NoMatch, evaluate
from acmix_deploy.runtime.onnxruntime import inputs_of, open_session

_TRIALS = ((2, 24, 32), (1, 40, 24), (2, 160, 192), (1, 192, 128), (1, 320, 416), (1, 640, 640))
"""Batch, height and width to try for free axes, small ones first: which of them a model accepts is its own affair."""

_FROZEN = tuple(
    (1, side, side) for side in (640, 416, 320, 512, 224, 256, 384, 448, 608, 736, 768, 896, 960, 1024, 1280)
)
"""Tried when none of _TRIALS runs: some exporters declare axes free in a graph that holds for one size alone."""

_ENOUGH = 2


def values_at_sizes(
    graph: gs.Graph, tensors: Iterable[gs.Variable], functions: Collection[onnx.FunctionProto]
) -> list[Feeds]:
    """Values of ``tensors`` for random inputs: at one size where the graph is static, at two where it is not.

    Raises:
        UserError: the graph runs at none of the sizes tried.
    """
    wanted = list({tensor.name: tensor for tensor in tensors}.values())
    found: list[Feeds] = []
    reason = NoMatch("no size was tried")

    def values(feeds: Feeds) -> Feeds:
        return dict(zip((tensor.name for tensor in wanted), evaluate(graph, wanted, feeds, functions), strict=True))

    for feeds in _trial_inputs(graph, _TRIALS):
        try:
            found.append(values(feeds))
        except NoMatch as error:
            reason = error
        if len(found) == _ENOUGH:
            break
    for feeds in _trial_inputs(graph, () if found or is_static(graph) else _FROZEN):
        with suppress(NoMatch):
            found.append(values(feeds))
            break
    if not found:
        raise UserError(
            f"the graph runs at none of the sizes tried: {reason.reason}",
            "If it holds for one size alone although it declares free axes, export it with fixed ones.",
        )
    return found


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
    session = open_session(_sizes_of(model, maps))
    inputs = inputs_of(session)

    def defined(height: int, width: int) -> bool:
        free = {2: height, 3: width}
        feeds = {
            name: np.zeros([n if isinstance(n, int) else free.get(axis, 1) for axis, n in enumerate(dims)], dtype)
            for name, dims, dtype in inputs
        }
        try:
            sizes = dict(zip(maps, session.run(None, feeds), strict=True))
        except Exception:  # ONNX Runtime's error types share no base of their own
            return False
        return all(sizes[need.x][need.height_axis :][:2].min() >= need.smallest for need in needs)

    def sizes(axis: int, end: int) -> Iterable[int]:
        fixed = [size for _, dims, _ in inputs if len(dims) == 4 and isinstance(size := dims[axis], int)]
        return fixed or range(step, end + 1, step)

    tried = [(height + -height % step, width + -width % step) for _, height, width in (*_TRIALS, *_FROZEN)]
    start = next((size for size in tried if defined(*size)), None)
    if start is None:
        raise UserError("the fused file runs at none of the sizes tried")
    height = next((size for size in sizes(2, start[0]) if defined(size, start[1])), start[0])
    width = next((size for size in sizes(3, start[1]) if defined(start[0], size)), start[1])
    return height, width


def _sizes_of(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """The part of a model that makes the tensors ``names``, with their shapes for its outputs."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    wanted = set(names)
    nodes = [helper.make_node("Shape", [name], [f"{name}/shape"]) for name in names]
    for node in reversed(model.graph.node):
        if wanted.intersection(node.output):
            nodes.append(node)
            wanted.update(_read_by(node))
    for field in (part.graph.node, part.graph.output, part.graph.initializer):
        del field[:]
    part.graph.node.extend(reversed(nodes))
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in wanted)
    part.graph.output.extend(
        helper.make_tensor_value_info(f"{name}/shape", onnx.TensorProto.INT64, None) for name in names
    )
    return part


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, its branches and loops included."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read_by(inner)


def is_static(graph: gs.Graph) -> bool:
    """Whether every axis of every input is fixed."""
    return all(isinstance(size, int) for tensor in graph.inputs for size in tensor.shape)


def free_sides(graph: gs.Graph) -> tuple[bool, bool]:
    """Whether the height and the width of images are free."""
    images = [tensor.shape for tensor in graph.inputs if len(tensor.shape) == 4]
    height, width = (any(not isinstance(shape[axis], int) for shape in images) for axis in (2, 3))
    return height, width


def has_fixed_size(graph: gs.Graph) -> bool:
    """Whether every axis of every input is fixed but the first, the batch."""
    return all(isinstance(size, int) for tensor in graph.inputs for size in tensor.shape[1:])


def _trial_inputs(graph: gs.Graph, trials: Sequence[tuple[int, int, int]]) -> Iterator[Feeds]:
    """Random inputs at each size to try; only one where no axis is free."""
    random = np.random.default_rng(0)
    for batch, height, width in trials[:1] if is_static(graph) else trials:
        free = {0: batch, 2: height, 3: width}
        shapes = {
            tensor.name: [
                size if isinstance(size, int) else free.get(axis, 1) for axis, size in enumerate(tensor.shape)
            ]
            for tensor in graph.inputs
        }
        yield {
            tensor.name: random.random(shapes[tensor.name]).astype(tensor.dtype or np.float32)
            for tensor in graph.inputs
        }
