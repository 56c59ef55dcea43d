"""Engines with the plugin on a GPU, against ONNX Runtime. Any TensorRT that Python can import; meant for 8.6.0.

    ACMIX_GPU_MODELS          folder that make_models.py wrote; without it the models are made now
    ACMIX_TENSORRT_HEADERS    folder with one folder of headers a release; without it they are searched for
    ACMIX_PLUGIN              a built libacmix_plugin.so; without it one is built now

This file needs neither torch nor onnx where the models are given, as TensorRT 8.6.0 wants Python 3.10.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import device
import kernels
import numpy as np
import pytest

from acmix_deploy.errors import MissingComponent
from acmix_deploy.plugin.toolchain import find_tensorrt

pytestmark = pytest.mark.skipif(bool(device.missing()), reason=device.missing())

NAMES = ("block-64x80", "block-128x40", "block-256x20", "yolov8n")


@pytest.fixture(scope="session")
def trt() -> Any:
    pytest.importorskip("polygraphy")
    return pytest.importorskip("tensorrt", exc_type=ImportError)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    given = os.environ.get("ACMIX_GPU_MODELS")
    if given:
        return Path(given)
    for package in ("torch", "onnx", "onnxruntime", "ultralytics"):
        pytest.importorskip(package, reason=f"no {package} to make models with: name a folder in ACMIX_GPU_MODELS")
    import make_models

    folder = tmp_path_factory.mktemp("models")
    for name, model in make_models.models().items():
        make_models.make(folder, name, *model)
    return folder


@pytest.fixture(scope="session")
def plugin(trt) -> Path:
    """The plugin for this TensorRT."""
    given = os.environ.get("ACMIX_PLUGIN")
    if given:
        return Path(given)
    folder = os.environ.get("ACMIX_TENSORRT_HEADERS")
    version = tuple(map(int, trt.__version__.split(".")[:2]))
    try:
        sets = [find_tensorrt(path.parent) for path in sorted(Path(folder).glob("*/NvInfer.h"))] if folder else []
        headers = next((t for t in sets if t.version[:2] == version), None) or find_tensorrt()
    except MissingComponent as error:
        pytest.skip(error.message)
    sources = [*kernels.SOURCES, *sorted((device.PLUGINS / "tensorrt").glob("*.cpp"))]
    return device.build(f"libacmix_plugin_{headers}.so", sources, headers.include)


@pytest.fixture
def build(trt, plugin, models):
    """Build a model's engine in one type."""
    from polygraphy.backend.trt import CreateConfig, LoadPlugins, NetworkFromOnnxPath, engine_from_network

    typed = int(trt.__version__.split(".")[0]) >= 10
    sources = [getattr(trt.TacticSource, f"{name}_CONVOLUTIONS") for name in ("EDGE_MASK", "JIT")]
    cache = device.BUILD / f"timing-{trt.__version__}.cache"

    def engine(name: str, dtype: str) -> Any:
        path = models / f"{name}{'.fp16' if dtype == 'float16' else ''}.onnx"
        parse = NetworkFromOnnxPath(str(path), **({"strongly_typed": True} if typed else {}))
        config = CreateConfig(
            fp16=dtype == "float16" and not typed,
            tactic_sources=sources,
            builder_optimization_level=1,
            profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
            load_timing_cache=str(cache) if cache.exists() else None,
        )
        return engine_from_network(LoadPlugins([str(plugin)], obj=parse), config, save_timing_cache=str(cache))

    return engine


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_engine(trt, models, build, name, dtype):
    from polygraphy.backend.trt import TrtRunner

    engine = build(name, dtype)
    case = np.load(models / f"{name}.npz")

    inspector = engine.create_engine_inspector()
    layers = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))["Layers"]
    plugins = [layer for layer in layers if re.search("plugin|custom", layer["LayerType"], re.IGNORECASE)]
    ours = [layer for layer in plugins if "acmix" in json.dumps(layer).lower()]
    assert len(ours) == case["blocks"], layers
    wanted = {"float32": ("FP32", "Float"), "float16": ("FP16", "Half")}[dtype]
    for layer in ours:
        assert any(word in json.dumps(layer["Inputs"]) for word in wanted), layer

    def tensors(kind: str) -> dict[str, Any]:
        return {key.partition(":")[2]: case[key] for key in case if key.startswith(f"{kind}:")}

    with TrtRunner(engine) as runner:
        found = runner.infer(tensors("input"))
        for output, expected in tensors("output").items():
            error = np.linalg.norm(found[output] - expected) / np.linalg.norm(expected)
            assert error <= case[f"limit:{dtype}"], (output, error)
