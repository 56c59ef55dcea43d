"""Stands for TensorRT 8.6 where a test needs what TensorRT-RTX without a GPU does not do.

FAKE_TENSORRT says what a build does: work, wait for ever, run out of memory, crash, or be killed. What it was asked for
goes into the engine, as JSON. It has no name that TensorRT 8.6 has not: test_engine.test_names_of_tensorrt_86.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import time
from types import SimpleNamespace
from typing import Any

__version__ = "8.6.0"


def _enum(name: str, members: str) -> Any:
    return enum.IntEnum(name, members, start=0)


NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH EXPLICIT_PRECISION")
BuilderFlag = _enum("BuilderFlag", "FP16 INT8")
ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED")
LayerInformationFormat = _enum("LayerInformationFormat", "ONELINE JSON")


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
        self.flags: list[str] = []
        self.profiles: list[Any] = []

    def set_flag(self, flag: Any) -> None:
        self.flags.append(flag.name)

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
        tensor = SimpleNamespace(name="images", dtype=SimpleNamespace(name="FLOAT"), shape=(1, 3, 32, 32))
        return SimpleNamespace(
            flags=flags, num_inputs=1, num_outputs=1, get_input=lambda index: tensor, get_output=lambda index: tensor
        )

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
        asked = {
            "network": network.flags,
            "level": config.builder_optimization_level,
            "verbosity": config.profiling_verbosity,
            "flags": config.flags,
            "profiles": config.profiles,
        }
        return json.dumps(asked).encode()


class OnnxParser:
    num_errors = 0

    def __init__(self, network: Any, logger: ILogger) -> None:
        pass

    def parse_from_file(self, path: str) -> bool:
        return True


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        layers = [
            {"Name": "acmix_0.qkv", "LayerType": "CaskConvolution"},
            {"Name": "acmix_0.attention", "LayerType": "PluginV2"},
        ]
        information = json.dumps({"Layers": layers})
        inspector = SimpleNamespace(get_engine_information=lambda form: information)
        return SimpleNamespace(create_engine_inspector=lambda: inspector)


def init_libnvinfer_plugins(logger: ILogger, namespace: str) -> bool:
    return True
