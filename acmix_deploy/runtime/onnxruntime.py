"""ONNX Runtime on the CPU: sessions with errors that say what to do, and polygraphy's runner of them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto
from polygraphy.backend.onnxrt import OnnxrtRunner

from acmix_deploy.errors import UserError
from acmix_deploy.runtime.reason import reason

Model = Path | bytes | onnx.ModelProto
PROVIDER = "CPUExecutionProvider"

_FLOAT64_CONV = re.compile(r"Could not find an implementation for Conv\(\d+\)")
_FATAL = 4  # errors are raised, so ONNX Runtime need not print them too


class Input(NamedTuple):
    """One input of a session: its name, its axes (free ones are names or None) and its numpy type."""

    name: str
    dims: tuple[int | str | None, ...]
    dtype: np.dtype[np.generic]


def usable_cores() -> int:
    """How many CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(model: Model, threads: int | None = None, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    """A session on the CPU.

    Two live sessions disturb each other's timing: their idle threads spin. Close one (drop it) before timing another.

    Args:
        model: a file, its bytes or a model in memory.
        threads: threads within an operator; :func:`usable_cores` by default.
        optimize: let ONNX Runtime rewrite the graph; without it every node runs as it is written.

    Raises:
        UserError: the file does not exist or ONNX Runtime refuses it, with its reason.
    """
    name = str(model) if isinstance(model, Path) else "the model"
    if isinstance(model, Path) and not model.is_file():
        raise UserError(f"{model} {'is a folder' if model.is_dir() else 'does not exist'}", "Give an ONNX file.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = _FATAL
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    try:
        return onnxruntime.InferenceSession(source, options, providers=[PROVIDER])
    except Exception as error:  # ONNX Runtime's error types share no base of their own
        text = reason(error)
        hint = (
            "The graph computes the position term in float64; `acmix-deploy fuse` repairs it."
            if _FLOAT64_CONV.search(text)
            else "Check that it is a complete ONNX file of opset 21 or below."
        )
        raise UserError(f"ONNX Runtime refuses {name}: {text}", hint) from error


def ir_version(opset: int) -> int:
    """The file format to write with an opset: 8 is the newest that TensorRT 8 reads, 10 that ONNX Runtime 1.22 does."""
    return 8 if opset <= 18 else 10


def onnx_runner(model: Model, name: str, threads: int | None = None) -> OnnxrtRunner:
    """Polygraphy's runner of a model; its session lives from activation to deactivation only."""
    return OnnxrtRunner(lambda: open_session(model, threads), name=name)


def inputs_of(session: onnxruntime.InferenceSession) -> list[Input]:
    """The inputs that a session wants, in their order."""
    types = {"float": "float32", "double": "float64"}
    elements = [(node, node.type.removeprefix("tensor(").removesuffix(")")) for node in session.get_inputs()]
    return [Input(node.name, tuple(node.shape), np.dtype(types.get(kind, kind))) for node, kind in elements]


def element_type(model: Path | onnx.ModelProto) -> str:
    """The type that a model computes in: ``"float16"`` as soon as a tensor of it is, else ``"float32"``.

    Raises:
        UserError: the file is not an ONNX file.
    """
    if isinstance(model, Path):
        try:
            model = onnx.load(model, load_external_data=False)
        except Exception as error:  # a protobuf error or OSError
            raise UserError(f"{model} cannot be read as an ONNX file: {reason(error)}") from error
    graph = model.graph
    declared = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)]
    stored = [tensor.data_type for tensor in graph.initializer]
    cast = [attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute]
    return "float16" if TensorProto.FLOAT16 in (*declared, *stored, *cast) else "float32"
