"""TensorRT and CUDA for Ultralytics where there is neither: engines run on the CPU, by pointers to its memory.

An engine is an ONNX file behind the 28 bytes that a real one begins with. Any release of Ultralytics may be there.
"""

from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import torch

BEGINNING = b"ftrt" + bytes(20) + bytes((10, 3, 0, 26))
VERSION = "10.3.0"
LARGEST = 4
"""Images in a batch at most."""


class Logger:
    INFO, WARNING, ERROR, VERBOSE = range(4)

    def __init__(self, severity: int = 0) -> None:
        self.min_severity = severity


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = range(2)


class Runtime:
    """``loaded`` are the plans, with whether the library ``wanted`` was there before."""

    wanted = ""
    loaded: list[tuple[bytes, bool]] = []  # noqa: RUF012

    def __init__(self, logger: Logger) -> None:
        pass

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        there = bool(self.wanted) and self.wanted in Path("/proc/self/maps").read_text()
        self.loaded.append((plan, there))
        if not plan.startswith(BEGINNING) or (self.wanted and not there):
            return None
        return Engine(plan.removeprefix(BEGINNING))


class Engine:
    """Names that TensorRT 10 has."""

    def __init__(self, model: bytes) -> None:
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.tensors = self.inputs | {node.name: node for node in self.session.get_outputs()}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return {"tensor(float)": np.float32, "tensor(float16)": np.float16}[self.tensors[name].type]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        batch, *image = self.get_tensor_shape(name)
        assert batch == -1
        sizes = [size if size > 0 else 160 for size in image]
        return [(1, *sizes), (1, *sizes), (LARGEST, *sizes)]

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self.shapes[name] = tuple(shape)
        probe = {name: np.zeros(shape, self.engine.get_tensor_dtype(name))}
        outputs = self.engine.session.run(None, probe)
        names = [node.name for node in self.engine.session.get_outputs()]
        self.shapes |= {name: output.shape for name, output in zip(names, outputs, strict=True)}
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def execute_v2(self, pointers: Sequence[int]) -> bool:
        def array(name: str, pointer: int) -> Any:
            dtype, shape = np.dtype(self.engine.get_tensor_dtype(name)), self.shapes[name]
            block = (ctypes.c_ubyte * (dtype.itemsize * int(np.prod(shape)))).from_address(pointer)
            return np.frombuffer(block, dtype).reshape(shape)

        arrays = {name: array(name, pointer) for name, pointer in zip(self.engine.tensors, pointers, strict=True)}
        feed = {name: arrays[name] for name in self.engine.inputs}
        for node, output in zip(self.engine.session.get_outputs(), self.engine.session.run(None, feed), strict=True):
            arrays[node.name][...] = output
        return True


@contextmanager
def pretended(wanted: str = "") -> Iterator[list[tuple[bytes, bool]]]:
    """Within, Ultralytics finds TensorRT, and what it puts on a GPU stays here.

    Args:
        wanted: the library without which engines are not deserialised.

    Yields:
        The plans that are deserialised, each with whether that library was loaded before.
    """
    tensorrt = ModuleType("tensorrt")
    vars(tensorrt).update(
        __spec__=ModuleSpec("tensorrt", None),
        __version__=VERSION,
        Logger=Logger,
        Runtime=Runtime,
        TensorIOMode=TensorIOMode,
        nptype=lambda dtype: dtype,
    )
    from ultralytics.nn.autobackend import AutoBackend

    to = torch.Tensor.to

    def here(self: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        named = {name: value for name, value in named.items() if name != "device"}
        kept = [value for value in arguments if not (isinstance(value, (torch.device, str)))]
        return to(self, *kept, **named) if kept or named else self

    with ExitStack() as held:
        for replaced in (
            mock.patch.dict(sys.modules, tensorrt=tensorrt),
            mock.patch.object(torch.Tensor, "to", here),
            mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
            mock.patch.object(torch.cuda, "synchronize"),
            mock.patch.object(AutoBackend, "warmup"),
            mock.patch.object(Runtime, "wanted", wanted),
            mock.patch.object(Runtime, "loaded", []),
        ):
            held.enter_context(replaced)
        yield Runtime.loaded
