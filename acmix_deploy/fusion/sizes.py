"""Choose image sizes to evaluate a graph at, and the values that its blocks see there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from acmix_deploy.errors import UserError
from acmix_deploy.graph import Feeds, NoMatch, evaluate

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


def is_static(graph: gs.Graph) -> bool:
    """Whether every axis of every input is fixed."""
    return all(isinstance(size, int) for tensor in graph.inputs for size in tensor.shape)


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
