"""TensorRT and TensorRT-RTX by their Python modules, 8.5 to 11: the one place that knows how their versions differ.

Runs in a process of its own, so that a build can be ended, a crash is only a message, and TensorRT-RTX finds its
libraries; deserialising an engine is done here for the same reasons. :func:`main` reads one request from stdin and
writes JSON lines to stdout: progress, then the answer. Needs nothing but the standard library and TensorRT, so that it
runs wherever TensorRT does.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RTX = "tensorrt_rtx"
_SECONDS_BETWEEN_REPORTS = 1.0
_NO_DRIVER = "cudaError 35"  # without a GPU TensorRT-RTX adds a line with it to each error


def build(request: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Parse an ONNX file, build an engine from it, and look for the plugin's layers in the engine.

    Args:
        request: ``module``; the paths ``onnx``, ``engine`` and, each of them or None, ``plugin``, ``cache_read``,
            ``cache_write``; ``level``; ``flags`` and ``tactic_sources``, names of BuilderFlag and TacticSource;
            ``strongly_typed``; ``profiles``, [min, opt, max] by input; ``operators``, the types that the file has.
        progress: called with what is being done.

    Returns:
        ``inputs``, ``outputs``, ``layers``, ``plugin_layers``, ``compute_capabilities``, ``notes``; or ``failure``,
        the step, with ``errors`` and, if the file could not be parsed, ``unknown`` operators.
    """
    trt = importlib.import_module(request["module"])
    log = _logger(trt)
    trt.init_libnvinfer_plugins(log, "")
    if request["plugin"]:
        try:
            ctypes.CDLL(request["plugin"])
        except OSError as error:
            return {"failure": "plugin", "errors": [str(error)]}
    try:
        builder = trt.Builder(log)
    except TypeError:  # how the binding says that it got no builder
        return {"failure": "start", "errors": log.errors}

    progress("parsing")
    network = builder.create_network(_network_flags(trt, request["strongly_typed"]))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["onnx"]):
        errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
        known = {creator.name for creator in _creators(trt)}
        unknown = [op for op in request["operators"] if op not in known and not parser.supports_operator(op)]
        return {"failure": "parse", "errors": errors or log.errors, "unknown": unknown}

    config = builder.create_builder_config()
    _configure(trt, builder, config, request)
    notes = []
    if not hasattr(config, "builder_optimization_level"):  # since 8.6
        notes.append(f"TensorRT {trt.__version__} has no optimization levels; the level was not set")
    if request["cache_write"]:
        stored = Path(request["cache_read"]).read_bytes() if request["cache_read"] else b""
        cache = config.create_timing_cache(stored)  # has to live until the engine is built
        if not config.set_timing_cache(cache, False):
            notes.append("the timing cache is of another TensorRT or device and was started anew")
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
    if monitor := _monitor(trt, progress):
        config.progress_monitor = monitor
    progress("building")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"failure": "build", "errors": log.errors}
    Path(request["engine"]).write_bytes(plan)
    if request["cache_write"]:
        Path(request["cache_write"]).write_bytes(config.get_timing_cache().serialize())

    layers = log.layers if request["module"] == RTX else _inspect(trt, log, plan)
    return {
        "inputs": [_tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(index)) for index in range(network.num_outputs)],
        "layers": len(layers),
        "plugin_layers": _by_plugin(layers),
        "compute_capabilities": _compute_capabilities(trt, config) if request["module"] == RTX else [],
        "notes": notes,
    }


def describe(request: Mapping[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Deserialise an engine and ask it what it is, first without the plugin and then, where that fails, with it.

    Args:
        request: ``module``; ``engine``, a path; ``offset``, the bytes that stand before the engine in it; ``plugin``, a
            path or None.
        progress: called with what is being done.

    Returns:
        ``inputs`` and ``outputs``, each with ``format`` and ``location``; ``profiles``, [min, opt, max] by input;
        ``profile_count``; ``layers``; ``plugin_layers``, those that the engine describes as such; ``needs_plugin``;
        ``hardware``, its HardwareCompatibilityLevel by name; or ``failure``, the step, with ``errors``.
    """
    trt = importlib.import_module(request["module"])
    log = _logger(trt)
    trt.init_libnvinfer_plugins(log, "")
    try:
        runtime = trt.Runtime(log)
    except TypeError:  # how the binding says that it got no runtime
        return {"failure": "start", "errors": log.errors}
    progress("deserialising")
    plan = Path(request["engine"]).read_bytes()[request["offset"] :]
    engine = runtime.deserialize_cuda_engine(plan)
    needs_plugin = engine is None and request["plugin"] is not None
    if needs_plugin:
        log.errors.clear()
        try:
            ctypes.CDLL(request["plugin"])
        except OSError as error:
            return {"failure": "plugin", "errors": [str(error)]}
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        return {"failure": "deserialize", "errors": log.errors}
    answer = _told(trt, engine)
    del engine  # before its runtime
    return answer | {"needs_plugin": needs_plugin}


def _told(trt: Any, engine: Any) -> dict[str, Any]:
    """What an engine says of itself, see :func:`describe`."""
    tensors = [_engine_tensor(engine, engine.get_tensor_name(index)) for index in range(engine.num_io_tensors)]
    inputs = [tensor for tensor in tensors if tensor["mode"] == "INPUT"]
    layers = _layers(trt, engine)
    return {
        "inputs": inputs,
        "outputs": [tensor for tensor in tensors if tensor["mode"] == "OUTPUT"],
        "profiles": {
            tensor["name"]: [list(shape) for shape in engine.get_tensor_profile_shape(tensor["name"], 0)]
            for tensor in inputs
            if -1 in tensor["shape"]
        },
        "profile_count": engine.num_optimization_profiles,
        "layers": len(layers),
        "plugin_layers": _by_plugin(layers),
        "hardware": getattr(getattr(engine, "hardware_compatibility_level", None), "name", "NONE"),  # since 8.6
    }


def _network_flags(trt: Any, strongly_typed: bool) -> int:
    """EXPLICIT_BATCH has to be asked for up to 9 and is gone in 11, STRONGLY_TYPED exists since 9.1."""
    known = trt.NetworkDefinitionCreationFlag.__members__
    wanted = ["STRONGLY_TYPED"] if strongly_typed else []
    if int(trt.__version__.partition(".")[0]) in (8, 9):
        wanted.append("EXPLICIT_BATCH")
    return sum(1 << int(known[name]) for name in wanted if name in known)


def _configure(trt: Any, builder: Any, config: Any, request: Mapping[str, Any]) -> None:
    """Flags, level and profile."""
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; rounds what is float32 to 10 bits
    for name in request["flags"]:
        config.set_flag(trt.BuilderFlag.__members__[name])
    if sources := request["tactic_sources"]:
        config.set_tactic_sources(sum(1 << int(trt.TacticSource.__members__[name]) for name in sources))
    if hasattr(config, "builder_optimization_level"):
        config.builder_optimization_level = request["level"]
    if request["profiles"]:
        profile = builder.create_optimization_profile()
        for name, shapes in request["profiles"].items():
            profile.set_shape(name, *map(tuple, shapes))
        config.add_optimization_profile(profile)


def _compute_capabilities(trt: Any, config: Any) -> list[int]:
    """What an engine of TensorRT-RTX runs on, 86 for sm_86; where none was asked for, those of its manual."""
    found = [config.get_compute_capability(index) for index in range(config.num_compute_capabilities)]
    return [int(name.name[2:]) for name in found if name.name.startswith("SM")] or [80, 86, 89, 120]


def _inspect(trt: Any, log: Any, plan: Any) -> list[tuple[str, list[str]]]:
    """Type of each layer of an engine, and the names by which it may be the layer of an ONNX node."""
    runtime = trt.Runtime(log)  # has to outlive the engine
    return _layers(trt, runtime.deserialize_cuda_engine(plan))


def _layers(trt: Any, engine: Any) -> list[tuple[str, list[str]]]:
    """See :func:`_inspect`. An engine that was built without details tells names alone, or nothing."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    found = []
    for layer in json.loads(text).get("Layers", []):
        if isinstance(layer, str):
            found.append(("", [layer]))
            continue
        names = re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer.get("Metadata") or "")
        found.append((layer.get("LayerType", ""), list(dict.fromkeys([layer["Name"], *names]))))
    return found


def _by_plugin(layers: list[tuple[str, list[str]]]) -> list[str]:
    return [name for kind, names in layers if re.search("plugin|custom", kind, re.I) for name in names]


def _creators(trt: Any) -> list[Any]:
    registry = trt.get_plugin_registry()
    return list(getattr(registry, "all_creators", None) or registry.plugin_creator_list)


def _parser_error(error: Any) -> dict[str, str]:
    """Since 10.0 an error names its node."""
    return {
        "reason": str(error.desc()),
        "node": str(error.node_name()) if hasattr(error, "node_name") else "",
        "operator": str(error.node_operator()) if hasattr(error, "node_operator") else "",
    }


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def _engine_tensor(engine: Any, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "dtype": engine.get_tensor_dtype(name).name,
        "shape": list(engine.get_tensor_shape(name)),
        "mode": engine.get_tensor_mode(name).name,
        "format": engine.get_tensor_format(name).name,
        "location": engine.get_tensor_location(name).name,
    }


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors, and the layers that the builder of TensorRT-RTX lists: there is no other way to see those
        of an engine without a device."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.layers: list[tuple[str, list[str]]] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR and _NO_DRIVER not in message:
                self.errors.append(message)
            elif message.startswith("Layers:"):
                for line in message.splitlines()[1:]:
                    kind = re.search(r"LayerType: (\w+)", line)
                    self.layers.append((kind[1] if kind else "", re.findall(r"\[ONNX Layer: ([^\]]+)\]", line)))

    return Log()


def _monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    """Tells how far the build is; None before TensorRT 10."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.last = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self.last > _SECONDS_BETWEEN_REPORTS:
                self.last = time.monotonic()
                progress(f"building: {phase_name}, step {step + 1} of {self.steps.get(phase_name, 0)}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def main() -> None:
    """Answer one request; what libraries print on stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    request = json.load(sys.stdin)
    try:
        answer = (build if "onnx" in request else describe)(request, lambda step: say(progress=step))
    except Exception as error:
        answer = {"failure": "crash", "errors": [f"{type(error).__name__}: {error}"]}
    say(answer=answer)


if __name__ == "__main__":
    main()
