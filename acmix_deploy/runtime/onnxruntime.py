"""ONNX Runtime: sessions with errors that say what to do, and polygraphy's runner of them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnxruntime
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata

from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.files import expect
from acmix_deploy.options import Provider
from acmix_deploy.process import WHOLE_PROCESS
from acmix_deploy.runtime import hints
from acmix_deploy.runtime.inputs import Input, as_images, as_taken
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.runtime.reason import reason
from acmix_deploy.runtime.refusals import refused, unreadable
from acmix_deploy.targets import Precision

if TYPE_CHECKING:
    import onnx

Model: TypeAlias = "Path | bytes | onnx.ModelProto"
PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
"""ONNX Runtime's name of each; what one cannot run the ones before it do."""
PROVIDER = PROVIDERS["cpu"]

_NOT_INSTALLED = "Please install"  # how ONNX Runtime begins its advice on libraries that are missing
_WARNING, _FATAL = 2, 4  # errors are raised, so ONNX Runtime need not print them too


def usable_cores() -> int:
    """How many CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(
    model: Model,
    threads: int | None = None,
    *,
    optimize: bool = True,
    reduces: bool = False,
    lean: bool = False,
    spin: bool = True,
    provider: Provider = "cpu",
    plugin: Path | None = None,
    engines: Path | None = None,
) -> onnxruntime.InferenceSession:
    """A session on the CPU, or on a GPU: what the provider leaves goes to CUDA, then to the CPU.

    Two live sessions disturb each other's timing: their idle threads spin. Close one (drop it) before timing another.

    Args:
        model: a file, its bytes or a model in memory.
        threads: threads within an operator; :func:`usable_cores` by default.
        optimize: let ONNX Runtime rewrite the graph; without it every node runs as it is written.
        reduces: for a graph whose outputs are sums or maxima of many tensors: compute these as soon as a tensor is
            there, which ONNX Runtime by itself puts off until every activation is in memory.
        lean: give memory back as soon as it is free; by itself ONNX Runtime keeps it for the next run.
        spin: have threads without work look for it all the time, which is faster where nothing else needs the cores.
        provider: what runs it.
        plugin: library that provider "tensorrt" loads.
        engines: folder in which provider "tensorrt" keeps what it builds, for another session of the same file.

    Raises:
        UserError: the file does not exist, is none of ONNX, or ONNX Runtime refuses it, with its reason.
        MissingComponent: the provider is not in this ONNX Runtime, or does not start here; the CPU never takes over.
    """
    name = str(model) if isinstance(model, Path) else "the model"
    if isinstance(model, Path):
        expect(model, "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = _FATAL
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = options.enable_mem_pattern = not lean
    if not spin:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if reduces:
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    source = model if isinstance(model, (Path, bytes)) else model.SerializeToString()
    providers = _providers(provider, plugin, engines)
    missing = ""
    try:
        with ExitStack() as stack:
            if provider != "cpu":
                stack.enter_context(unlogged())  # the libraries of CUDA that are not found
                missing = _preload()
            session = onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=False)
    except Exception as error:  # ONNX Runtime's error types share no base of their own
        if _NOT_INSTALLED in str(error):
            raise _does_not_start(provider, missing or reason(error)) from error
        raise refused(name, error) from error
    if PROVIDERS[provider] not in session.get_providers():
        raise _does_not_start(provider, missing)
    return session


def _providers(provider: Provider, plugin: Path | None, engines: Path | None) -> list[tuple[str, dict[str, str]]]:
    """ONNX Runtime's providers, the wanted one first, with their options.

    Raises:
        MissingComponent: this ONNX Runtime was built without it.
    """
    name, available = PROVIDERS[provider], onnxruntime.get_available_providers()
    if name not in available:
        raise MissingComponent(f"this ONNX Runtime has no {name}, but {', '.join(available)}", hints.NO_PROVIDER)
    names = list(PROVIDERS.values())
    options = {}
    if provider == "tensorrt" and plugin:
        options["trt_extra_plugin_lib_paths"] = str(plugin.resolve())
    if provider == "tensorrt" and engines:
        options |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(engines)}
    return [(name, options), *((other, {}) for other in names[: names.index(name)][::-1])]


def _does_not_start(provider: Provider, why: str) -> MissingComponent:
    return MissingComponent(
        f"ONNX Runtime has {PROVIDERS[provider]}, which does not start here{': ' + why if why else ''}",
        hints.PROVIDER_NEEDS,
    )


@contextmanager
def unlogged() -> Iterator[None]:
    """Nothing is told by what opens sessions without options; afterwards ONNX Runtime has its default severity again,
    since it does not say which it had."""
    with WHOLE_PROCESS:
        onnxruntime.set_default_logger_severity(_FATAL)
        try:
            yield
        finally:
            onnxruntime.set_default_logger_severity(_WARNING)


def _preload() -> str:
    """Load CUDA's libraries from their Python packages; what ONNX Runtime prints of those that it does not find."""
    with redirect_stdout(StringIO()) as printed:
        onnxruntime.preload_dlls()
    return reason(RuntimeError(printed.getvalue())) if printed.getvalue() else ""


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model with all computed that follows from what it stores and from the sizes of its inputs.

    Raises:
        UserError: ONNX Runtime refuses it, also where shapes cannot be those of its inputs.
    """
    import onnx

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "folded.onnx"))
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDER])
        except Exception as error:  # ONNX Runtime's error types share no base of their own
            raise UserError(f"ONNX Runtime refuses the model: {reason(error)}") from error
        return onnx.load(options.optimized_model_filepath)


@cache
def known_operators() -> frozenset[tuple[str, str]]:
    """Domain and type of every operator that this ONNX Runtime has a definition of; "" is ONNX's own domain."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    return frozenset((schema.domain, schema.name) for schema in get_all_operator_schema())


def ir_version(opset: int) -> int:
    """The file format to write with an opset: 8 is the newest that TensorRT 8 reads, 10 that ONNX Runtime 1.22 does."""
    return 8 if opset <= 18 else 10


class OnnxRunner(OnnxrtRunner):  # type: ignore[misc]
    """Polygraphy's runner of a session, which feeds a file that takes pixels with images in floats too."""

    sess: onnxruntime.InferenceSession

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs; of pixels those of images in floats."""
        metadata, order = TensorMetadata(), metadata_of(self.sess).pixels
        for node in (as_images(node, order) for node in inputs_of(self.sess)):
            metadata.add(node.name, dtype=node.dtype, shape=node.dims)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name. The inference time is that of the session alone."""
        feed = as_taken(feed_dict, metadata_of(self.sess).pixels)
        start = time.perf_counter()
        outputs = self.sess.run(None, feed)
        self.inference_time = time.perf_counter() - start
        return {node.name: array for node, array in zip(self.sess.get_outputs(), outputs, strict=True)}


def onnx_runner(
    model: Model,
    name: str,
    threads: int | None = None,
    *,
    provider: Provider = "cpu",
    plugin: Path | None = None,
) -> OnnxRunner:
    """A runner of an ONNX model; its session lives from activation to deactivation only.

    Args:
        model: a file, its bytes, or a model in memory.
        name: how reports call it.
        threads: threads within an operator; by default one for each core that this process may use.
        provider: what ONNX Runtime runs it on.
        plugin: library that provider "tensorrt" loads.

    Returns:
        A runner of polygraphy: in a ``with`` statement ``infer`` takes and gives arrays by name.

    Raises:
        UserError: ONNX Runtime refuses the model, when the runner is activated.
        MissingComponent: the provider is not here, at the same time.
    """
    return OnnxRunner(lambda: open_session(model, threads, provider=provider, plugin=plugin), name=name)


def inputs_of(session: onnxruntime.InferenceSession) -> list[Input]:
    """The inputs that a session wants, in their order."""
    return _described(session.get_inputs())


def outputs_of(session: onnxruntime.InferenceSession) -> list[Input]:
    """What a session gives, in its order, described as inputs are."""
    return _described(session.get_outputs())


def metadata_of(session: onnxruntime.InferenceSession) -> ModelMetadata:
    """What the exporter left in the file of a session."""
    return ModelMetadata(session.get_modelmeta().custom_metadata_map)


def _described(nodes: Sequence[onnxruntime.NodeArg]) -> list[Input]:
    types = {"float": "float32", "double": "float64"}
    elements = [(node, node.type.removeprefix("tensor(").removesuffix(")")) for node in nodes]
    return [Input(node.name, tuple(node.shape), np.dtype(types.get(kind, kind))) for node, kind in elements]


def why_refused(model: Model) -> str:
    """Why ONNX Runtime does not load a model; nothing where it does."""
    try:
        open_session(model)
    except UserError as error:
        return error.message
    return ""


def precision_of(model: Path | onnx.ModelProto) -> Precision:
    """The lowest type that a model computes in: int8 with Q/DQ nodes, float16 as soon as a tensor of it is.

    Raises:
        UserError: the file is not an ONNX file.
    """
    import onnx

    if isinstance(model, Path):
        expect(model, "onnx")
        try:
            model = onnx.load(model, load_external_data=False)
        except Exception as error:  # a protobuf error or OSError
            raise unreadable(model, error) from error
    graph = model.graph
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.node):
        return "int8"
    declared = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)]
    stored = [tensor.data_type for tensor in graph.initializer]
    cast = [attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute]
    return "float16" if onnx.TensorProto.FLOAT16 in (*declared, *stored, *cast) else "float32"
