"""Engines on a GPU against ONNX Runtime: as exported, tiled and by the plugin. Any TensorRT; meant for 8.6.0 too.

What it takes from elsewhere is in engines.py.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tests.gpu.engines")  # first, since a machine for GPU tests may lack what it imports

from acmix_deploy.errors import MissingComponent
from acmix_deploy.manifest import read_manifest
from acmix_deploy.profile import profile
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.tensorrt import EngineRunner
from tests.gpu import engines
from tests.gpu.engines import BLOCKS, DETECTOR, FORMS, WITHOUT, Variant

pytestmark = pytest.mark.skipif(bool(engines.missing()), reason=engines.missing())

VARIANTS = [
    *(Variant(model, form, dtype) for model in BLOCKS for form in FORMS for dtype in ("float32", "float16")),
    *(Variant(DETECTOR, form, "float16") for form in FORMS),
    *(Variant(DETECTOR, "plugin", dtype) for dtype in ("float32", "int8")),
    Variant(WITHOUT, "exported", "float16"),
]


def built(variant: Variant):
    try:
        return variant.engine(), np.load(engines.models() / f"{variant.model}.npz")
    except MissingComponent as error:
        pytest.skip(error.message)


def tensors(case, kind):
    return {key.partition(":")[2]: case[key] for key in case if key.startswith(f"{kind}:")}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_engine_computes_what_onnx_runtime_does(variant):
    engine, case = built(variant)
    with EngineRunner(engine) as runner:
        layers = runner_layers(runner, tensors(case, "input"))
        assert layers == (int(case["blocks"]) if variant.form == "plugin" else 0)
        compare(runner.infer(tensors(case, "input")), case, variant.dtype)


def runner_layers(runner, feed):
    """How many layers the plugin computes."""
    runner.prepare(feed)
    return sum("plugin" in layer.type.lower() and "acmix" in layer.name for layer in runner.layers())


def compare(found, case, dtype):
    for name, expected in tensors(case, "output").items():
        error = deviation(expected, found[name])
        assert error.relative_l2 is not None, error.problem
        assert error.relative_l2 <= case[f"limit:{dtype}"], (name, error)


@pytest.mark.parametrize("form", FORMS)
def test_graph_computes_from_new_inputs(form):
    """A captured launch reads what was uploaded after the capture."""
    engine, case = built(Variant(BLOCKS[0], form, "float16"))
    (image,) = tensors(case, "input")
    with EngineRunner(engine) as runner:
        runner.prepare({image: np.full_like(case[f"input:{image}"], 0.5)})
        graph = runner.capture()
        runner.prepare(tensors(case, "input"))
        for array in runner.outputs.values():
            array.fill(np.nan)
        runner.upload()
        graph.launch(runner.stream)
        runner.download()
        runner.stream.synchronize()
        compare(runner.outputs, case, "float16")


def test_profile():
    """Every sample is a time, and what the layers take adds up to about what the engine takes."""
    engine, _ = built(Variant(DETECTOR, "plugin", "float16"))
    (found,) = profile([engine], samples=100, layers=True)
    assert len(found.samples_ms) >= 100
    assert min(found.samples_ms) > 0
    assert found.with_transfers_ms is not None
    assert np.median(found.with_transfers_ms) > found.median_ms
    total = sum(layer.median_ms for layer in found.layers)
    assert 0.5 * found.median_ms < total < 5 * found.median_ms
    assert {layer.block for layer in found.layers} >= {"acmix_0", "acmix_1", "acmix_2"}
    assert found.provider.startswith(read_manifest(engine).machine.tensorrt)
