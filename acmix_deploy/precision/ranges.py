"""How much of what tensors become on sample inputs INT8 is to cover."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np
import onnx
from onnxruntime.quantization.calibrate import HistogramCollector

from acmix_deploy.graph import Feeds
from acmix_deploy.options import Method
from acmix_deploy.process import unprinted
from acmix_deploy.runtime.magnitudes import largest, largest_magnitudes, magnitudes
from acmix_deploy.runtime.onnxruntime import open_session

_PERCENTILE = 99.99
_BINS = {"percentile": 2048, "entropy": 1024}  # entropy has both signs, and takes time by the square of its bins
_LEVELS = 256  # of int8


def calibrate(
    model: onnx.ModelProto, names: Collection[str], samples: Callable[[], Iterable[Feeds]], method: Method
) -> dict[str, float]:
    """For float32 tensors the magnitude that becomes 127.

    ``minmax`` takes the largest one; ``percentile`` leaves a ten-thousandth of the values beyond it; ``entropy`` loses
    least information, the Kullback-Leibler divergence of the quantised from the original distribution (S. Migacz, 8-bit
    inference with TensorRT, GTC 2017). Histograms and thresholds are onnxruntime's; its calibrators are not used, for
    they keep the activations of all samples, and let the first sample alone choose the width of the bins.
    """
    maxima = largest_magnitudes(model, names, samples())
    if method == "minmax":
        return maxima
    fetching = onnx.ModelProto()
    fetching.CopyFrom(model)
    del fetching.graph.output[:]
    computed = [name for name in names if name not in {value.name for value in model.graph.input}]
    fetching.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed)
    session = open_session(fetching)
    collector = HistogramCollector(method, True, _BINS[method], _LEVELS, _PERCENTILE, scenario="same")
    with unprinted():  # it prints
        collector.collect({name: np.array([0, -m, m], np.float32) for name, m in maxima.items()})  # fixes the bins
        for feed in samples():
            values = feed | dict(zip(computed, session.run(computed, feed) if computed else (), strict=True))
            collector.collect({name: values[name] for name in names})
        thresholds = collector.compute_collection_result()
    return {name: largest(np.array(thresholds[name][:2])) for name in names}


def bounds(
    model: onnx.ModelProto, limits: Mapping[str, float], samples: Iterable[Feeds]
) -> dict[str, tuple[float, float]]:
    """The smallest and the largest value of float32 tensors, cut to the magnitudes ``limits`` by name."""
    found = dict.fromkeys(limits, (np.inf, -np.inf))
    for sample in magnitudes(model, limits, samples):
        for name, seen in sample.items():
            low, high = found[name]
            found[name] = min(low, max(seen.low, -limits[name])), max(high, min(seen.high, limits[name]))
    return found
