"""What is timed: an ONNX file on a provider of ONNX Runtime, an engine on its GPU, or a checkpoint on PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy import checkpoint
from acmix_deploy.artifacts import read_artifact, sha256
from acmix_deploy.checkpoint.refusals import does_not_run
from acmix_deploy.detection.images import batches, find
from acmix_deploy.errors import UserError
from acmix_deploy.files import expect
from acmix_deploy.manifest import read_manifest, this_machine
from acmix_deploy.options import Provider
from acmix_deploy.process import WHOLE_PROCESS
from acmix_deploy.profile.layers import Blocks, Layer, block_of, blocks_of, nodes_in, onnx_layers
from acmix_deploy.profile.timing import Machine
from acmix_deploy.runtime.cuda import Event
from acmix_deploy.runtime.inputs import Input, as_taken, random_images
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.runtime.models import Model, open_model
from acmix_deploy.runtime.onnxruntime import PROVIDERS, open_session, usable_cores
from acmix_deploy.runtime.reason import reason
from acmix_deploy.runtime.tensorrt import EngineRunner
from acmix_deploy.targets import Precision

FP16_NOTE = "CPU latency; FP16 on a CPU predicts nothing for a GPU"
CALL_NOTE = (
    "latency of an ONNX file on a GPU is that of a whole call of ONNX Runtime, with upload, download and what is left "
    "to the CPU; an engine's is that of the GPU alone, so compare its time with transfers"
)
CHECKPOINT_NOTE = "a checkpoint runs in PyTorch on the CPU, whatever --provider says"

_LAYER_RUNS = 50
_ON_CPU, _ON_GPU = (50, 3), (1000, 50)
"""How many samples are counted by default, and runs whose median says whether warm-up is over."""


class Sample(NamedTuple):
    """One inference, in ms."""

    alone: float
    with_transfers: float | None = None


class RunSettings(BaseModel):
    """How a model is run."""

    model_config = ConfigDict(frozen=True)

    input_shape: tuple[int, ...] | None = Field(
        default=None,
        description="[B, C, H, W] for the axes that are free; by default what an engine is built for, else what the "
        "metadata tell, else [1, 3, 640, 640]",
    )
    images: Path | None = Field(default=None, description="folder to fill a batch from; noise of a fixed seed without")
    threads: int | None = Field(
        default=None, description="threads within an operator on a CPU; by default one for each core it may use"
    )
    plugin: Path | None = Field(
        default=None,
        description="the plugin library of an engine, by default where its manifest says, and of ONNX files on "
        "provider tensorrt",
    )
    provider: Provider = Field(default="cpu", description="what ONNX Runtime runs ONNX files on")
    engines: Path | None = Field(
        default=None, description="folder in which provider tensorrt keeps what it builds, for the turns that follow"
    )
    arch: str | None = Field(
        default=None, description="of a state dict: package.module:factory, called for the module that it belongs to"
    )
    trust: bool = Field(default=False, description="let a checkpoint run code; only for files that you trust")
    code: Path | None = Field(default=None, description="with trust: folder of the code that a checkpoint needs")


class OnnxFile:
    """An ONNX file on the CPU or on a GPU, from a call of its session to the outputs on the host.

    Raises:
        UserError: ONNX Runtime refuses it, or it takes something else than images.
        MissingComponent: the provider is not in this ONNX Runtime, or does not start here.
    """

    def __init__(self, file: Path, setup: RunSettings) -> None:
        self._run_by: dict[str, Any] = {"provider": setup.provider, "plugin": setup.plugin}
        if setup.engines:  # in a folder for each file: ONNX Runtime tells what it kept by the names in a graph alone
            self._run_by["engines"] = setup.engines.joinpath(*file.resolve().parts[1:])
            self._run_by["engines"].mkdir(parents=True, exist_ok=True)
        opened = open_model(file, **self._run_by)
        self.file, self.precision = file, opened.precision
        self.feed = _feed(file, opened, setup)
        self.plugin_sha256 = sha256(setup.plugin) if setup.plugin and setup.provider == "tensorrt" else None
        self.on_gpu = setup.provider != "cpu"
        self.samples, self.window = _ON_GPU if self.on_gpu else _ON_CPU
        self.provider = PROVIDERS[setup.provider]
        self.threads = None if self.on_gpu else setup.threads or usable_cores()
        self._threads = setup.threads  # of what the provider leaves to the CPU too
        self.machine = Machine.this(on_gpu=self.on_gpu)
        self.notes: tuple[str, ...] = (CALL_NOTE,) if self.on_gpu else (FP16_NOTE,) * (self.precision == "float16")

    @contextmanager
    def open(self) -> Iterator[Callable[[], Sample]]:
        """What runs the file on its feed, after a first run. Raises UserError: it does not run at the shape."""
        session = open_session(self.file, self._threads, **self._run_by)
        try:
            session.run(None, self.feed)  # memory is planned and allocated here
        except Exception as error:  # ONNX Runtime's error types share no base of their own
            raise _does_not_run(self.file, self.feed, error) from error

        def run() -> Sample:
            start = time.perf_counter()
            session.run(None, self.feed)
            taken = (time.perf_counter() - start) * 1e3
            return Sample(taken, taken if self.on_gpu else None)

        yield run

    def layers(self) -> tuple[Layer, ...]:
        """Times of the nodes, measured apart, on the CPU."""
        return onnx_layers(self.file, self.feed, _LAYER_RUNS, self.threads)


class Engine:
    """An engine on the GPU, launched as a CUDA graph; attributes and methods as those of :class:`OnnxFile`.

    Raises:
        UserError: there is no manifest, or the file has changed since.
        MissingComponent: its TensorRT is not installed.
    """

    samples, window = _ON_GPU
    on_gpu, threads, notes = True, None, ()

    def __init__(self, file: Path, setup: RunSettings) -> None:
        opened = open_model(file, plugin=setup.plugin)
        self.file, self.precision = file, opened.precision
        self.feed = _feed(file, opened, setup)
        self.runner: EngineRunner = opened.runner
        manifest = read_manifest(file)
        self.plugin_sha256 = manifest.plugin.sha256 if manifest.plugin else None
        self.provider = this_machine(manifest.machine.backend).tensorrt
        self.machine = Machine.this(on_gpu=True, tensorrt=self.provider)

    @contextmanager
    def open(self) -> Iterator[Callable[[], Sample]]:
        """See :class:`OnnxFile`. Raises also MissingComponent and CheckFailed, see :class:`EngineRunner`."""
        with self.runner as runner, ExitStack() as held:
            runner.prepare(self.feed)
            graph = runner.capture()
            events = [held.enter_context(Event()) for _ in range(4)]
            steps = (runner.upload, lambda: graph.launch(runner.stream), runner.download)

            def run() -> Sample:
                events[0].record(runner.stream)
                for step, event in zip(steps, events[1:], strict=True):
                    step()
                    event.record(runner.stream)
                runner.stream.synchronize()
                start, uploaded, computed, downloaded = events
                return Sample(computed.ms_since(uploaded), downloaded.ms_since(start))

            yield run

    def layers(self) -> tuple[Layer, ...]:
        """Times of the layers, measured apart."""
        with self.runner as runner:
            runner.prepare(self.feed)
            runner.upload()
            known = {layer.name: layer for layer in runner.layers()}
            times = runner.profile_layers(_LAYER_RUNS)
        blocks = _blocks_of_source(self.file)
        found = []
        for name, samples in times.items():
            layer = known.get(name)
            nodes = layer.nodes if layer else ()
            found.append(
                Layer(
                    name=name,
                    kind=layer.type if layer else "",
                    nodes=nodes,
                    inputs=layer.inputs if layer else (),
                    block=block_of(nodes or nodes_in(name), blocks),
                    median_ms=median(samples),
                )
            )
        return tuple(found)


class Checkpoint:
    """A checkpoint as it was trained, in float32 on the CPU; attributes and methods as those of :class:`OnnxFile`.

    Raises:
        UserError: it cannot be loaded, see :func:`acmix_deploy.checkpoint.load`.
        MissingComponent: PyTorch, or Ultralytics for a file that needs it, is not installed.
    """

    samples, window = _ON_CPU
    on_gpu, provider, plugin_sha256 = False, "PyTorch", None
    precision: Precision = "float32"

    def __init__(self, file: Path, setup: RunSettings) -> None:
        loaded = checkpoint.load(file, arch=setup.arch, trust=setup.trust, code=setup.code)
        from torch.export import ExportedProgram

        from acmix_deploy.runtime.torch import TorchRunner

        module = loaded.module.module() if isinstance(loaded.module, ExportedProgram) else loaded.module
        self.file, self.module = file, module
        self.runner = TorchRunner(module)
        self.threads: int | None = setup.threads or usable_cores()
        images = Input(self.runner.input_name, (None,) * 4, np.dtype(np.float32))
        opened = Model(self.runner, (images,), self.precision, loaded.metadata, profiles={})
        self.feed = _feed(file, opened, setup)
        self.machine = Machine.this()
        self.notes = (CHECKPOINT_NOTE,) if setup.provider != "cpu" else ()

    @contextmanager
    def open(self) -> Iterator[Callable[[], Sample]]:
        """See :class:`OnnxFile`."""
        import torch

        with WHOLE_PROCESS, ExitStack() as stack:
            before = torch.get_num_threads()
            stack.callback(torch.set_num_threads, before)
            torch.set_num_threads(self.threads or before)
            runner = stack.enter_context(self.runner)
            try:
                runner.infer(self.feed)
            except Exception as error:  # whatever the module raises
                (image,) = self.feed.values()
                raise does_not_run(str(self.file), self.module, image.shape, error) from error

            def run() -> Sample:
                runner.infer(self.feed)
                return Sample(runner.last_inference_time() * 1e3)

            yield run


Subject = OnnxFile | Engine | Checkpoint


def open_subject(file: Path, setup: RunSettings) -> Subject:
    """What is timed of a file. Raises UserError where it is none of these, and what the constructors raise."""
    kind = expect(file, "onnx", "engine", "checkpoint", "program")
    if kind == "onnx":
        return OnnxFile(file, setup)
    return Engine(file, setup) if kind == "engine" else Checkpoint(file, setup)


def layers_of(subject: Subject) -> Callable[[], tuple[Layer, ...]]:
    """What times the layers of a subject.

    Raises:
        UserError: it is a checkpoint, since layers are those of files that are deployed; or ONNX Runtime runs it on a
            GPU, where its profiler tells when a node was launched and not how long it took.
    """
    if isinstance(subject, Checkpoint):
        raise UserError(
            f"{subject.file} is a checkpoint, whose layers are not timed", "Leave out --layers, or export it."
        )
    if isinstance(subject, OnnxFile) and subject.on_gpu:
        raise UserError(
            f"{subject.file} runs on a GPU, where ONNX Runtime does not tell how long a layer takes",
            "Leave out --layers, or time layers on the CPU or of an engine.",
        )
    return subject.layers


def _feed(file: Path, opened: Model, setup: RunSettings) -> dict[str, Array]:
    feed: dict[str, Array] = {}
    for name, dims, dtype in opened.inputs:
        wanted = setup.input_shape or opened.usual_shape(name)
        if len(dims) != len(wanted):
            raise UserError(f"{file} takes {name} of {list(dims)}; a shape like {list(wanted)} is expected")
        shape = tuple(dim if isinstance(dim, int) else size for dim, size in zip(dims, wanted, strict=True))
        opened.metadata.check_size(str(file), shape)
        if setup.images:
            photos = find(setup.images, shape[0]).paths
            images = next(batches(photos, [shape], opened.metadata.letterbox))
        else:
            images = random_images(shape)
        feed[name] = images.astype(dtype)
    feed = as_taken(feed, opened.metadata.pixels)
    return feed


def _does_not_run(file: Path, feed: Mapping[str, Array], error: Exception) -> UserError:
    shapes = {name: array.shape for name, array in feed.items()}
    return UserError(f"{file} does not run on {shapes}: {reason(error)}")


def _blocks_of_source(engine: Path) -> Blocks:
    """The blocks of the ONNX file that an engine was built from, where that is still in its folder."""
    for parent in read_artifact(engine).parents:
        source = engine.with_name(parent.name)
        if source.suffix == ".onnx" and source.is_file() and sha256(source) == parent.sha256:
            return blocks_of(onnx.load(source))
    return {}
