"""Stands for TensorRT 8.6 where a test needs what TensorRT-RTX without a GPU does not do.

FAKE_TENSORRT says what a build does: work, wait for ever, run out of memory, crash, or be killed. An engine is JSON of
what was asked for and of the ONNX file; 28 bytes may stand before it, as a real one begins. On tests/engine/fake_cuda
it runs: ONNX Runtime computes it, with the definition of the custom operator where that is left to the plugin. It has
no name that TensorRT 8.6 has not: test_build.test_names_of_tensorrt_86.
"""

from __future__ import annotations

import base64
import enum
import itertools
import json
import os
import pathlib
import signal
import time
from functools import cached_property
from types import SimpleNamespace
from typing import Any

__version__ = "8.6.0"


def _enum(name: str, members: str) -> Any:
    return enum.IntEnum(name, members, start=0)


NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH EXPLICIT_PRECISION")
BuilderFlag = _enum("BuilderFlag", "FP16 INT8 TF32")
TacticSource = _enum("TacticSource", "CUBLAS CUBLAS_LT CUDNN EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS")
ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED")
LayerInformationFormat = _enum("LayerInformationFormat", "ONELINE JSON")
TensorIOMode = _enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation = _enum("TensorLocation", "DEVICE HOST")
TensorFormat = _enum("TensorFormat", "LINEAR CHW2 HWC8")
HardwareCompatibilityLevel = _enum("HardwareCompatibilityLevel", "NONE AMPERE_PLUS")
DataType = _enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8")


class ILogger:
    Severity = _enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")

    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class IBuilderConfig:
    builder_optimization_level = 3

    def __init__(self) -> None:
        self.flags = ["TF32"]
        self.profiles: list[Any] = []
        self.sources: int | None = None

    def set_tactic_sources(self, sources: int) -> bool:
        self.sources = sources
        return True

    def set_flag(self, flag: Any) -> None:
        self.flags.append(flag.name)

    def clear_flag(self, flag: Any) -> None:
        self.flags.remove(flag.name)

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile.shapes)

    def create_timing_cache(self, content: bytes) -> ITimingCache:
        return ITimingCache(content)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not cache.content.startswith(b"other")

    def get_timing_cache(self) -> ITimingCache:
        return self.cache


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: Any) -> None:
        self.shapes[name] = shapes


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> Any:
        return SimpleNamespace(flags=flags)

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: Any, config: IBuilderConfig) -> bytes | None:
        mode = os.environ.get("FAKE_TENSORRT", "work")
        if mode == "wait":
            time.sleep(60)
        elif mode == "memory":
            self.logger.log(ILogger.Severity.ERROR, "Requested amount of GPU memory failed: out of memory")
            return None
        elif mode != "work":
            os.kill(os.getpid(), getattr(signal, mode))
        plan: dict[str, Any] = {"onnx": network.onnx, "profiles": config.profiles[0] if config.profiles else {}}
        plan["asked"] = {
            "network": network.flags,
            "level": config.builder_optimization_level,
            "verbosity": config.profiling_verbosity,
            "flags": config.flags,
            "sources": config.sources,
        }
        return json.dumps(plan).encode()


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Any, logger: ILogger) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network.onnx = base64.b64encode(pathlib.Path(path).read_bytes()).decode()
        model = _Model({"onnx": self.network.onnx, "profiles": {}})
        for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
            tensors = [
                SimpleNamespace(name=value.name, dtype=model.types[value.name], shape=model.dims(value))
                for value in values
            ]
            setattr(self.network, f"num_{kind}s", len(tensors))
            setattr(self.network, f"get_{kind}", tensors.__getitem__)
        return True


class IProfiler:
    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


_BEGINNING = 28
_events: list[str] = []  # what was loaded and dropped, in its order, with what nobody may do


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self._alive = SimpleNamespace(engines=0)
        if os.environ.get("FAKE_TENSORRT") == "driver":
            logger.log(ILogger.Severity.ERROR, "the driver is too old")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        _events.append("deserialized")
        if plan.startswith(b"broken"):
            self._logger.log(ILogger.Severity.ERROR, "the plan is broken")
            return None
        described = json.loads(plan[_BEGINNING:] if plan.startswith(b"ftrt") else plan)
        if failure := described.get("refused"):
            self._logger.log(ILogger.Severity.ERROR, failure)
            return None
        if (needed := described.get("plugin")) and needed not in pathlib.Path("/proc/self/maps").read_text():
            self._logger.log(
                ILogger.Severity.ERROR,
                "IPluginCreator not found in Plugin Registry for AcmixLocalAttention, version 1",
            )
            return None
        return ICudaEngine(self._logger, self._alive, described)

    def __del__(self) -> None:
        _events.append("runtime dropped" + " before its engine" * bool(self._alive.engines))


class ICudaEngine:
    """Holds no reference to its runtime, as little as a context to it: to drop them in order is the caller's."""

    def __init__(self, logger: ILogger, runtime: Any, plan: dict[str, Any]) -> None:
        self._logger, self._runtime, self._plan = logger, runtime, plan
        self._alive = SimpleNamespace(contexts=0)
        runtime.engines += 1
        self._model = _Model(plan)

    def __del__(self) -> None:
        self._runtime.engines -= 1
        _events.append("engine dropped" + " before its context" * bool(self._alive.contexts))

    @property
    def num_io_tensors(self) -> int:
        return len(self._model.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._model.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name in self._model.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._model.types[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._model.dims(self._model.tensors[name])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._plan["profiles"][name]]

    def get_tensor_format(self, name: str) -> Any:
        return TensorFormat[self._plan.get("formats", {}).get(name, "LINEAR")]

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation[self._plan.get("locations", {}).get(name, "DEVICE")]

    @property
    def num_optimization_profiles(self) -> int:
        return int(self._plan.get("profile_count", 1))

    @property
    def hardware_compatibility_level(self) -> Any:
        return HardwareCompatibilityLevel[self._plan.get("hardware", "NONE")]

    def create_execution_context(self) -> Any:
        if os.environ.get("FAKE_TENSORRT") == "memory":
            self._logger.log(ILogger.Severity.ERROR, "Requested amount of GPU memory failed: out of memory")
            return None
        if self._alive.contexts:
            self._logger.log(ILogger.Severity.ERROR, "another context has the profile")
            return None
        return IExecutionContext(self._logger, self._alive, self._model)

    def create_engine_inspector(self) -> Any:
        return EngineInspector(self._model, self._plan.get("names_only", False))


class EngineInspector:
    execution_context: Any = None

    def __init__(self, model: Any, names_only: bool) -> None:
        self._model, self._names_only = model, names_only

    def get_engine_information(self, format: Any) -> str:
        if self._names_only:
            return json.dumps({"Layers": [f"my_{node.name}" for node in self._model.graph.node], "Bindings": []})
        form = [{"Name": "x", "Format/Datatype": "Row major linear FP32"}]
        layers = [
            {"Name": f"my_{node.name}", "LayerType": "PluginV2" if node.domain else node.op_type}
            | ({"Inputs": form, "Outputs": form} if self.execution_context else {})
            | {"Metadata": f"[ONNX Layer: {node.name}]\x1e[ONNX Layer: {node.name}]"}
            for node in self._model.graph.node
        ]
        return json.dumps({"Layers": layers, "Bindings": []})


class IExecutionContext:
    profiler: Any = None

    def __init__(self, logger: ILogger, engine: Any, model: Any) -> None:
        self._logger, self._engine, self._model = logger, engine, model
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._state = SimpleNamespace(alive=True, warm=False)
        engine.contexts += 1

    def __del__(self) -> None:
        self._state.alive = False
        self._engine.contexts -= 1
        _events.append("context dropped")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self._model.profiles.get(name) or (self._model.inputs[name],) * 3
        if not all(a <= size <= b for a, size, b in itertools.zip_longest(smallest, shape, largest, fillvalue=-1)):
            self._logger.log(ILogger.Severity.ERROR, f"{name} {shape} is not in the profile")
            return False
        self._shapes[name], self._state.warm = tuple(shape), False
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._model.shapes(self._shapes)[name]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        from acmix_deploy.driver import library

        cuda = library()
        capturing = cuda.capturing(stream_handle)
        missing = [name for name in self._model.tensors if name not in self._addresses]
        if missing or (capturing and (self.profiler or not self._state.warm)):
            self._logger.log(ILogger.Severity.ERROR, f"not ready: {missing or 'a capture'}")
            return False
        model, shapes, addresses, state = self._model, dict(self._shapes), dict(self._addresses), self._state

        def compute() -> None:
            if not state.alive:
                _events.append("ran without its context")
            model.compute(cuda, shapes, addresses)

        cuda.put(stream_handle, compute)
        if not capturing:
            state.warm = True
        if self.profiler:
            cuda.run(stream_handle)
            for index, node in enumerate(self._model.graph.node):
                self.profiler.report_layer_time(f"my_{node.name}", index + 1.0)
        return True


class _Model:
    """An ONNX model and what a context has to know of it."""

    def __init__(self, plan: dict[str, Any]) -> None:
        import onnx

        self.profiles = plan["profiles"]
        self.proto = onnx.load_from_string(base64.b64decode(plan["onnx"]))
        defined = {function.name for function in self.proto.functions}
        if {node.op_type for node in self.proto.graph.node if node.domain} - defined:
            from acmix_deploy.operators.local_attention.body import function_body

            (opset,) = (entry.version for entry in self.proto.opset_import if not entry.domain)
            self.proto.functions.append(function_body(opset))
        self.graph = self.proto.graph
        self.inputs = {value.name: self.dims(value) for value in self.graph.input}
        self.tensors = {value.name: value for value in (*self.graph.input, *self.graph.output)}
        names = {1: "FLOAT", 2: "UINT8", 10: "HALF", 6: "INT32", 7: "INT64", 9: "BOOL", 16: "BF16"}
        self.types = {
            name: SimpleNamespace(name=names[value.type.tensor_type.elem_type]) for name, value in self.tensors.items()
        }

    @staticmethod
    def dims(value: Any) -> tuple[int, ...]:
        return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim)

    def shapes(self, inputs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        for value in model.graph.input:
            for dim, size in zip(value.type.tensor_type.shape.dim, inputs.get(value.name, ()), strict=False):
                dim.dim_value = size
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        return {value.name: self.dims(value) for value in (*inferred.input, *inferred.output)}

    @cached_property
    def session(self) -> Any:
        import onnxruntime

        return onnxruntime.InferenceSession(self.proto.SerializeToString(), providers=["CPUExecutionProvider"])

    def compute(self, cuda: Any, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        import numpy as np
        from onnx import helper

        def array(name: str) -> Any:
            dtype = helper.tensor_dtype_to_np_dtype(self.tensors[name].type.tensor_type.elem_type)
            return np.frombuffer(cuda.block(addresses[name]), dtype)

        feed = {name: array(name)[: int(np.prod(shapes[name]))].reshape(shapes[name]) for name in self.inputs}
        for value, result in zip(self.graph.output, self.session.run(None, feed), strict=True):
            array(value.name)[: result.size] = result.ravel()


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    return True
