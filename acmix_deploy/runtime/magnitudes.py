"""How large the tensors of an ONNX graph become."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from acmix_deploy.runtime.onnxruntime import open_session

LARGEST_HALF = float(np.finfo(np.float16).max)
"""65504: what float16 cannot hold is larger."""

SMALLEST_HALF = float(np.finfo(np.float16).smallest_subnormal)
"""6e-8: what is half of it or less becomes zero in float16."""

_INFINITY, _ZERO = "infinity/float32", "zero/float32"  # names of two constants


class Magnitude(NamedTuple):
    """Of one tensor."""

    finite: float
    """The largest magnitude, infinities and NaNs left out; 0 where nothing is left."""
    infinite: bool
    """Whether there is an infinity beside it."""
    low: float
    """The smallest value, cut to ``finite``; where there is a NaN, minus that."""
    high: float
    """The largest value, likewise."""


def largest(values: NDArray[Any]) -> float:
    """The largest magnitude of an array, infinities and NaNs left out; 0 for an empty one."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0))


def magnitudes(
    model: onnx.ModelProto, names: Collection[str], samples: Iterable[Mapping[str, NDArray[Any]]]
) -> Iterator[dict[str, Magnitude]]:
    """The :class:`Magnitude` of each of the float32 tensors ``names``, sample by sample.

    Minima and maxima are computed inside the graph, so that no activation is kept. That infinities are left out takes
    three more passes over a tensor, and only those that had one go through them: each sample runs once, and once more
    where a tensor has its first infinity.

    Args:
        model: the graph, in which nothing else is called ``infinity/float32`` or ``zero/float32``.
        names: any of its tensors.
        samples: inputs by name.
    """
    unbounded: set[str] = set()
    session = None
    for feed in samples:
        while True:
            session = session or open_session(_reducing(model, names, unbounded), reduces=True)
            extremes = dict(zip(_outputs(names, unbounded), session.run(None, feed), strict=True))
            ends = {name: [extremes[f"{name}/max"], extremes[f"{name}/min"]] for name in names}
            new = {name for name, both in ends.items() if not np.isfinite(both).all()} - unbounded
            if not new:
                break
            unbounded |= new
            session = None
        found = {}
        for name, both in ends.items():
            finite = float(extremes[f"{name}/finite"]) if name in unbounded else largest(np.array(both))
            high, low = np.clip(np.where(np.isnan(both), [finite, -finite], both), -finite, finite)
            found[name] = Magnitude(finite, bool(np.isinf(both).any()), float(low), float(high))
        yield found


def largest_magnitudes(
    model: onnx.ModelProto, names: Collection[str], samples: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, float]:
    """The largest finite magnitude of each of the float32 tensors ``names`` over all samples, empty without any."""
    found: dict[str, float] = {}
    for sample in magnitudes(model, names, samples):
        for name, magnitude in sample.items():
            found[name] = max(found.get(name, 0), magnitude.finite)
    return found


def _outputs(names: Iterable[str], unbounded: Collection[str]) -> list[str]:
    ends = [f"{name}/{end}" for name in names for end in ("max", "min")]
    return ends + [f"{name}/finite" for name in names if name in unbounded]


def _reducing(model: onnx.ModelProto, names: Collection[str], unbounded: Collection[str]) -> onnx.ModelProto:
    """The model with the smallest and the largest value of each tensor as its only outputs; of those that are
    ``unbounded`` the largest finite magnitude too."""
    reducing = onnx.ModelProto()
    reducing.CopyFrom(model)
    graph = reducing.graph
    del graph.output[:]
    for name, value in ((_INFINITY, np.inf), (_ZERO, 0)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    for name in names:
        graph.node.append(helper.make_node("ReduceMax", [name], [f"{name}/max"], keepdims=0))
        graph.node.append(helper.make_node("ReduceMin", [name], [f"{name}/min"], keepdims=0))
        if name in unbounded:
            size, bounded, kept = (f"{name}/{step}" for step in ("abs", "bounded", "kept"))
            graph.node.append(helper.make_node("Abs", [name], [size]))
            graph.node.append(helper.make_node("Less", [size, _INFINITY], [bounded]))
            graph.node.append(helper.make_node("Where", [bounded, size, _ZERO], [kept]))
            graph.node.append(helper.make_node("ReduceMax", [kept], [f"{name}/finite"], keepdims=0))
    graph.output.extend(onnx.ValueInfoProto(name=output) for output in _outputs(names, unbounded))
    return reducing
