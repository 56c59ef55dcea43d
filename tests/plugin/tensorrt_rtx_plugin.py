"""Asks TensorRT-RTX, without a GPU, in a process of its own; prints one JSON object.

python tensorrt_rtx_plugin.py build LIBRARY|- FILE...    parse and build ONNX files, with or without the plugin library
python tensorrt_rtx_plugin.py create LIBRARY CASES       create nodes of the phase and with the fields in a JSON list
python tensorrt_rtx_plugin.py load LIBRARY               load it in both ways, take it back, load it again
python tensorrt_rtx_plugin.py copies LIBRARY COPY        load one copy, then the other in both ways
python tensorrt_rtx_plugin.py unread - OPERATOR...       which operators the parser does not read
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx as trt


class Log(trt.ILogger):
    """Keeps the errors, the plugin's warnings, and what the builder says about the layers of an engine."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.layers: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        # On a machine without a GPU each error is followed by one about the missing driver.
        if severity <= trt.ILogger.Severity.ERROR and "cudaError 35" not in message:
            self.errors.append(message)
        elif severity == trt.ILogger.Severity.WARNING and "acmix" in message:
            self.warnings.append(message)
        elif message.startswith("Layers:"):
            self.layers += message.splitlines()[1:]


def build(log: Log, path: Path) -> dict[str, Any]:
    """What the parser and the builder make of one file, which nodes became custom layers, and which attention."""
    log.errors.clear()
    log.layers.clear()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        return {"parsed": False, "errors": list(log.errors)}
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = {0: (1, 1, 2), 2: (128, 160, 192), 3: (128, 160, 192)}
        shapes = [
            tuple(sizes[axis][which] if size < 0 else size for axis, size in enumerate(tensor.shape))
            for which in range(3)
        ]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    output = tuple(network.get_output(0).shape)
    engine = builder.build_serialized_network(network, config)
    custom = [line for line in log.layers if "LayerType: custom_layer" in line]
    return {
        "parsed": True,
        "errors": list(log.errors),
        "output": output,
        "built": engine is not None,
        "plans": bytes(engine).count(b"acmix_plan") if engine else 0,
        "layers": len(log.layers),
        "plugins": [name for line in custom for name in _nodes(line)],
        "attention": [_nodes(line) for line in log.layers if "_gemm_mha" in line],
        "types": sorted({name for line in custom for name in re.findall(r"Datatype: (\w+)", line)}),
    }


def _nodes(layer: str) -> list[str]:
    """The ONNX nodes that a layer of an engine computes."""
    return re.findall(r"\[ONNX Layer: ([^\]]+)\]", layer)


def create(log: Log, cases: list[Any]) -> list[list[str]]:
    """For each [op_type, phase, {field: values}], the errors that creating the node ends with; none where it works."""
    answers = []
    for op_type, phase, fields in cases:
        collection = []
        for name, values in fields.items():
            array = np.array(values, np.float32 if isinstance(values[0], float) else np.int32)
            kind = trt.PluginFieldType.FLOAT32 if array.dtype == np.float32 else trt.PluginFieldType.INT32
            collection.append(trt.PluginField(name, array, kind))
        creator = trt.get_plugin_registry().get_creator(op_type, "1", "")
        log.errors.clear()
        plugin = creator.create_plugin("node", trt.PluginFieldCollection(collection), getattr(trt.TensorRTPhase, phase))
        assert (plugin is None) == bool(log.errors)
        answers.append(list(log.errors))
    return answers


def names() -> list[str]:
    """The library's creators in the registry."""
    creators = trt.get_plugin_registry().all_creators
    return sorted(creator.name for creator in creators if creator.name.startswith("Acmix"))


def load(library: str) -> list[list[str]]:
    """The library's creators in the registry after each step."""
    registry = trt.get_plugin_registry()
    steps = [names()]
    ctypes.CDLL(library)
    steps.append(names())
    for _ in range(2):
        handle = registry.load_library(library)
        steps.append(names())
        registry.deregister_library(handle)
        steps.append(names())
    return steps


def copies(library: str, copy: str) -> dict[str, Any]:
    """The same for two copies of the library, and whether loadLibrary takes the second one."""
    steps = []
    for path in (library, copy):
        ctypes.CDLL(path)
        steps.append(names())
    taken = trt.get_plugin_registry().load_library(copy) is not None
    return {"steps": [*steps, names()], "taken": taken}


if __name__ == "__main__":
    verb, library, *rest = sys.argv[1:]
    log = Log()
    keep = trt.Builder(log)  # without one the registry has no logger
    if library != "-" and verb not in ("load", "copies"):
        ctypes.CDLL(library)
    if verb == "build":
        answer: Any = [build(log, Path(name)) for name in rest]
    elif verb == "unread":
        parser = trt.OnnxParser(keep.create_network(0), log)
        answer = [operator for operator in rest if not parser.supports_operator(operator)]
    elif verb == "create":
        answer = create(log, json.loads(rest[0]))
    elif verb == "copies":
        answer = {**copies(library, *rest), "warnings": log.warnings}
    else:
        answer = {"steps": load(library), "errors": log.errors}
    json.dump(answer, sys.stdout)
