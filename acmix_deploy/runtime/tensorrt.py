"""TensorRT and TensorRT-RTX engines, 8.5 to 11: polygraphy's runner of them, in steps that can be timed one by one.

Needs NumPy and TensorRT's Python module; neither PyTorch nor ONNX.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from acmix_deploy.engine_file import read_engine
from acmix_deploy.errors import AcmixDeployError, CheckFailed, MissingComponent, UserError
from acmix_deploy.manifest import EngineTensor, Manifest, Shape, read_fitting
from acmix_deploy.runtime import cuda, hints
from acmix_deploy.runtime.inputs import Input, as_images, as_taken, image_shape
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.runtime.reason import out_of_memory

_DTYPES = {
    "FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64,
    "BOOL": np.bool_,
}  # fmt: skip
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_SHOWN = 3  # errors in a message

PLUGIN_LAYER = re.compile("plugin|custom", re.IGNORECASE)
"""In the type of a layer that a plugin computes: PluginV2, PluginV3, and custom_layer of TensorRT-RTX."""


class Layer(NamedTuple):
    """A layer of an engine, as TensorRT's inspector describes it."""

    name: str
    type: str
    """Such as CaskConvolution, Reformat or PluginV3; empty where the engine was built with names alone."""
    nodes: tuple[str, ...]
    """Names of the ONNX nodes that it was made from, where the engine tells (TensorRT 8.6 and later)."""
    inputs: tuple[str, ...]
    """Type and format of each input, in TensorRT's words, such as 'Row major linear FP32'."""
    outputs: tuple[str, ...]
    """The same of each output."""


def numpy_dtype(tensor: str, name: str) -> np.dtype[Any]:
    """NumPy's type for an element type by TensorRT's name, such as HALF.

    Raises:
        UserError: NumPy has no such type, naming the ``tensor``.
    """
    if name not in _DTYPES:
        raise UserError(
            f"{tensor} is of type {name}, which NumPy does not know; known are {', '.join(_DTYPES)}",
            "Build the engine from a file with inputs and outputs in float32 or float16.",
        )
    return np.dtype(_DTYPES[name])


def inputs_of(manifest: Manifest) -> tuple[Input, ...]:
    """The inputs of an engine; free axes are None. Raises UserError: a type that NumPy does not know."""
    return tuple(_described(tensor, "input") for tensor in manifest.inputs)


def outputs_of(manifest: Manifest) -> tuple[Input, ...]:
    """What an engine gives, described as inputs are. Raises UserError: a type that NumPy does not know."""
    return tuple(_described(tensor, "output") for tensor in manifest.outputs)


def _described(tensor: EngineTensor, kind: str) -> Input:
    dims = tuple(None if size < 0 else size for size in tensor.shape)
    return Input(tensor.name, dims, numpy_dtype(f"{kind} {tensor.name}", tensor.dtype))


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """Runs an engine on the first device. Before activation nothing is loaded and no GPU is needed.

    :meth:`infer` does everything. To time the steps: :meth:`prepare`, then :meth:`upload`, :meth:`launch` (or a graph
    from :meth:`capture`) and :meth:`download` put their work on :attr:`stream` and return at once; after
    ``stream.synchronize()`` the results are in :attr:`outputs`. Not for several threads at a time.

    Args:
        engine: the file, with its manifest beside it.
        plugin: the plugin library, if the engine uses it; where the manifest says, by default.
        name: how reports call it; the file's name by default.

    Raises:
        UserError: when it is activated: there is no manifest, or it does not fit this machine. Nothing has been
            deserialized then.
        MissingComponent: no TensorRT, no device, or too little memory.
        CheckFailed: TensorRT does not take the engine.
    """

    stream: cuda.Stream
    """Where all work of the device is put."""
    manifest: Manifest
    """What the engine was built with and for."""
    copy_time: float
    """Seconds that the inputs of the last :meth:`infer` took to pinned memory and from there to the device."""
    _trt: Any
    _log: Any
    _runtime: Any
    _engine: Any
    _context: Any
    _around_upload: tuple[cuda.Event, cuda.Event]

    def __init__(self, engine: Path, plugin: Path | None = None, name: str = "") -> None:
        super().__init__(name=name or engine.name)
        self.path = engine
        self.plugin = plugin
        self._shapes: dict[str, Shape] = {}
        self._inputs: dict[str, cuda.Buffer] = {}
        self._outputs: dict[str, cuda.Buffer] = {}
        self._for_shapes = ExitStack()  # buffers and graphs
        self._held = ExitStack()  # the rest, undone from the last to the first: a context goes before its engine

    def activate_impl(self) -> None:
        """Check the manifest, load, and allot what does not depend on shapes."""
        self.manifest = read_fitting(self.path, plugin=self.plugin)
        trt = importlib.import_module(self.manifest.machine.backend)
        with self._held as held:
            self._hold("_trt", trt)
            self._hold("_log", _logger(trt))
            trt.init_libnvinfer_plugins(self._log, "")
            if self.manifest.plugin:
                load_plugin(self.plugin or self.manifest.plugin.path)
            self._hold("stream", held.enter_context(cuda.Stream()))
            self._hold("_around_upload", tuple(held.enter_context(cuda.Event()) for _ in range(2)))
            self._hold("_runtime", self._made("a runtime", _runtime(trt, self._log)))
            plan = read_engine(self.path)
            self._hold("_engine", self._made("an engine", self._runtime.deserialize_cuda_engine(plan)))
            self._hold("_context", self._made("a context", self._engine.create_execution_context()))
            held.callback(self._release)
            self._held = held.pop_all()

    def deactivate_impl(self) -> None:
        """Free everything, whatever is still on the stream."""
        with suppress(AcmixDeployError):
            self.stream.synchronize()
        self._held.close()

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs, of pixels those of images in floats; free axes are None."""
        metadata = TensorMetadata()
        for node in (as_images(node, self.manifest.metadata.pixels) for node in inputs_of(self.manifest)):
            metadata.add(node.name, dtype=node.dtype, shape=node.dims)
        return metadata

    def infer(self, feed_dict: Mapping[str, Array], check_inputs: bool = False) -> dict[str, Array]:
        """Outputs by name, in arrays of their own.

        Args:
            feed_dict: see :meth:`prepare`, which checks it.
            check_inputs: let polygraphy check it too; that refuses float32 for a half-precision input.
        """
        outputs: dict[str, Array] = super().infer(feed_dict, check_inputs=check_inputs)
        return outputs

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        """See :meth:`infer`. The inference time includes both transfers."""
        called = time.perf_counter()
        self.prepare(feed_dict)
        start = time.perf_counter()
        before, after = self._around_upload
        before.record(self.stream)
        self.upload()
        after.record(self.stream)
        self.launch()
        self.download()
        self.stream.synchronize()
        self.inference_time = time.perf_counter() - start
        self.copy_time = start - called + after.ms_since(before) / 1e3
        return {name: array.copy() for name, array in self.outputs.items()}

    def prepare(self, feed: Mapping[str, Array]) -> None:
        """Put arrays where :meth:`upload` takes them from; memory is allotted when their shapes change.

        Args:
            feed: an array for each input, of the input's own type; float32 becomes float16 where that is wanted, and
                images in floats become pixels where the engine takes those.

        Raises:
            UserError: other inputs, types or shapes than the engine was built for, or an output whose shape depends
                on the data.
            MissingComponent: too little memory.
        """
        wanted = {node.name: node for node in inputs_of(self.manifest)}
        if feed.keys() != wanted.keys():
            raise UserError(f"{self.name} takes {', '.join(wanted)}, and is given {', '.join(feed) or 'nothing'}")
        feed = as_taken(feed, self.manifest.metadata.pixels)
        for name, array in feed.items():
            dtype = wanted[name].dtype
            if array.dtype != dtype and not (array.dtype == np.float32 and dtype == np.float16):
                raise UserError(f"input {name} of {self.name} is {dtype}, and is given {array.dtype}")
        self.stream.synchronize()
        shapes = {name: array.shape for name, array in feed.items()}
        if shapes != self._shapes:
            self._allot(shapes)
        for name, array in feed.items():
            np.copyto(self._inputs[name].array, array, casting="same_kind")

    def upload(self) -> None:
        """Copy the inputs to the device; asynchronous."""
        for buffer in self._inputs.values():
            buffer.upload(self.stream)

    def launch(self) -> None:
        """Run the engine; asynchronous. Raises CheckFailed: TensorRT does not start it."""
        if not self._context.execute_async_v3(self.stream.address):
            raise self._failure("run")

    def download(self) -> None:
        """Copy the outputs to the host; asynchronous."""
        for buffer in self._outputs.values():
            buffer.download(self.stream)

    @property
    def outputs(self) -> dict[str, Array]:
        """The outputs by name, as the last :meth:`download` left them; overwritten by the next."""
        return {name: buffer.array for name, buffer in self._outputs.items()}

    def capture(self) -> cuda.Graph:
        """:meth:`launch` as a graph, for the shapes that were prepared; other shapes close it."""
        self.launch()  # TensorRT finishes work that depends on shapes in the first launch
        self.stream.synchronize()
        return self._for_shapes.enter_context(self.stream.capture(self.launch))

    def layers(self) -> list[Layer]:
        """The layers in the order in which they run, for the shapes that were prepared."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        described = json.loads(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        return [_layer(layer) for layer in described.get("Layers", ())]

    def profile_layers(self, runs: int) -> dict[str, list[float]]:
        """Milliseconds of each layer in each of ``runs`` launches, by TensorRT's profiler.

        The layers are timed one by one: their sum is more than what a launch takes without a profiler. What was
        prepared or captured is gone afterwards.
        """
        profiler = _profiler(self._trt)
        self.launch()
        self.stream.synchronize()
        self._context.profiler = profiler
        try:
            for _ in range(runs):
                profiler.runs.append({})
                self.launch()
                self.stream.synchronize()
        finally:  # a context does not give up its profiler
            self._release()
            self._context = None
            self._context = self._made("a context", self._engine.create_execution_context())
        names = dict.fromkeys(name for run in profiler.runs for name in run)
        return {name: [run.get(name, 0.0) for run in profiler.runs] for name in names}

    def _hold(self, attribute: str, value: Any) -> None:
        """An attribute for as long as the runner is active."""
        setattr(self, attribute, value)
        self._held.callback(delattr, self, attribute)

    def _release(self) -> None:
        """Free what depends on shapes."""
        self._for_shapes.close()
        self._shapes, self._inputs, self._outputs = {}, {}, {}

    def _allot(self, shapes: dict[str, Shape]) -> None:
        """Memory for inputs of these shapes and for the outputs that follow from them."""
        self._check_range(shapes)
        self._release()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._failure(f"take {name} {list(shape)}")
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            is_input = self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT
            shape = tuple(self._context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                raise UserError(
                    f"the shape of output {name} of {self.name} depends on the data: {list(shape)}",
                    "Build the engine from a file without such outputs: boxes before NMS, not after it.",
                )
            dtype = numpy_dtype(f"{'input' if is_input else 'output'} {name}", self._engine.get_tensor_dtype(name).name)
            buffer = cuda.Buffer(shape, dtype)
            self._for_shapes.callback(buffer.close)
            (self._inputs if is_input else self._outputs)[name] = buffer
            self._context.set_tensor_address(name, buffer.address)
        self._shapes = shapes

    def _check_range(self, shapes: dict[str, Shape]) -> None:
        for tensor in self.manifest.inputs:
            shape = shapes[tensor.name]
            smallest, _, largest = self.manifest.profiles.get(tensor.name, (tensor.shape,) * 3)
            fits = len(shape) == len(smallest) and all(
                a <= size <= b for a, size, b in zip(smallest, shape, largest, strict=True)
            )
            if not fits:
                built = f"{list(smallest)} to {list(largest)}" if smallest != largest else f"{list(smallest)} alone"
                raise UserError(
                    f"input {tensor.name} of {self.name} is built for {built}, and is given {list(shape)}",
                    hints.OTHER_SHAPE,
                )
            metadata = self.manifest.metadata
            metadata.check_size(self.name, image_shape(shape, metadata.pixels))

    def _made(self, what: str, made: Any) -> Any:
        if made is None:
            raise self._failure(f"make {what}")
        return made

    def _failure(self, what: str) -> AcmixDeployError:
        """What TensorRT said since the last failure, as an error."""
        text = "; ".join(dict.fromkeys(self._log.errors[:_SHOWN])) or "it gives no reason"
        self._log.errors.clear()
        device = self.manifest.machine
        if out_of_memory(text):
            return MissingComponent(
                f"too little device memory on {device.device} for {device.tensorrt} to {what} for {self.name}: {text}",
                "End other programs on the device, or build the engine for a smaller --max.",
            )
        return CheckFailed(f"{device.tensorrt} does not {what} for {self.name}: {text}")


def load_plugin(plugin: Path) -> None:
    """Load a plugin library, which registers its creators; TensorRT has to be imported before.

    Raises:
        UserError: the system cannot load it.
    """
    try:
        ctypes.CDLL(str(plugin))
    except OSError as error:
        raise UserError(
            f"the plugin cannot be loaded: {error}", "Build it here: acmix-deploy plugin build, and the engine with it."
        ) from error


def _runtime(trt: Any, log: Any) -> Any:
    try:
        return trt.Runtime(log)
    except TypeError:  # how the binding says that it got none
        return None


def _layer(described: dict[str, Any] | str) -> Layer:
    """A layer out of the inspector's JSON; its name alone for an engine that was built without details."""
    if isinstance(described, str):
        return Layer(described, "", (), (), ())
    formats = (
        tuple(tensor.get("Format/Datatype", "") for tensor in described.get(side, ())) for side in ("Inputs", "Outputs")
    )
    nodes = dict.fromkeys(_ONNX_NODE.findall(described.get("Metadata") or ""))
    return Layer(described["Name"], described.get("LayerType", ""), tuple(nodes), *formats)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps the errors."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message.strip())

    return Log()


def _profiler(trt: Any) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]
        """Adds up milliseconds by layer in the last of ``runs``."""

        def __init__(self) -> None:
            super().__init__()
            self.runs: list[dict[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.runs[-1][layer_name] = self.runs[-1].get(layer_name, 0.0) + ms

    return Profiler()
