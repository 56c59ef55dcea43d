"""What is timed: an ONNX file on ONNX Runtime's CPU provider, or an engine on its GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import onnx

from acmix_deploy.artifacts import read_artifact, sha256
from acmix_deploy.errors import UserError
from acmix_deploy.manifest import read_manifest, this_machine
from acmix_deploy.profile.layers import Blocks, Layer, block_of, blocks_of, nodes_in, onnx_layers
from acmix_deploy.profile.timing import Machine
from acmix_deploy.runtime.cuda import Event
from acmix_deploy.runtime.inputs import random_images
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.runtime.models import Model, open_model
from acmix_deploy.runtime.onnxruntime import PROVIDER, open_session, usable_cores
from acmix_deploy.runtime.reason import reason
from acmix_deploy.runtime.tensorrt import EngineRunner

FP16_NOTE = "CPU latency; FP16 on a CPU predicts nothing for a GPU"

_LAYER_RUNS = 50


class Sample(NamedTuple):
    """One inference, in ms."""

    alone: float
    with_transfers: float | None = None


class OnnxFile:
    """An ONNX file on the CPU.

    Raises:
        UserError: ONNX Runtime refuses it, or it takes something else than images.
    """

    samples = 50
    """How many to count by default."""
    window = 3
    """Runs whose median says whether warm-up is over."""
    on_gpu = False
    provider = PROVIDER

    def __init__(self, file: Path, input_shape: Sequence[int] | None, threads: int | None) -> None:
        opened = open_model(file)
        self.file, self.precision = file, opened.precision
        self.feed = _feed(file, opened, input_shape)
        self.threads: int | None = threads or usable_cores()
        self.machine = Machine.this()
        self.notes = (FP16_NOTE,) if self.precision == "float16" else ()

    @contextmanager
    def open(self) -> Iterator[Callable[[], Sample]]:
        """What runs the file on its feed, after a first run. Raises UserError: it does not run at the shape."""
        session = open_session(self.file, self.threads)
        try:
            session.run(None, self.feed)  # memory is planned and allocated here
        except Exception as error:  # ONNX Runtime's error types share no base of their own
            shapes = {name: array.shape for name, array in self.feed.items()}
            raise UserError(f"{self.file} does not run on {shapes}: {reason(error)}") from error

        def run() -> Sample:
            start = time.perf_counter()
            session.run(None, self.feed)
            return Sample((time.perf_counter() - start) * 1e3)

        yield run

    def layers(self) -> tuple[Layer, ...]:
        """Times of the nodes, measured apart."""
        return onnx_layers(self.file, self.feed, _LAYER_RUNS, self.threads)


class Engine:
    """An engine on the GPU, launched as a CUDA graph; attributes and methods as those of :class:`OnnxFile`.

    Raises:
        UserError: there is no manifest, or the file has changed since.
        MissingComponent: its TensorRT is not installed.
    """

    samples, window, on_gpu, threads, notes = 1000, 50, True, None, ()

    def __init__(self, file: Path, input_shape: Sequence[int] | None, plugin: Path | None) -> None:
        opened = open_model(file, plugin=plugin)
        self.file, self.precision = file, opened.precision
        self.feed = _feed(file, opened, input_shape)
        self.runner: EngineRunner = opened.runner
        device = this_machine(read_manifest(file).machine.backend)
        self.provider = device.tensorrt
        self.machine = Machine.this(device)

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
            nodes = known[name].nodes if name in known else ()
            found.append(
                Layer(
                    name=name,
                    kind=known[name].type if name in known else "",
                    nodes=nodes,
                    block=block_of(nodes or nodes_in(name), blocks),
                    median_ms=median(samples),
                )
            )
        return tuple(found)


def _feed(file: Path, opened: Model, input_shape: Sequence[int] | None) -> dict[str, Array]:
    feed: dict[str, Array] = {}
    for name, dims, dtype in opened.inputs:
        wanted = input_shape or opened.usual_shape(name)
        if len(dims) != len(wanted):
            raise UserError(f"{file} takes {name} of {list(dims)}; a shape like {list(wanted)} is expected")
        shape = tuple(dim if isinstance(dim, int) else size for dim, size in zip(dims, wanted, strict=True))
        feed[name] = random_images(shape).astype(dtype)
    return feed


def _blocks_of_source(engine: Path) -> Blocks:
    """The blocks of the ONNX file that an engine was built from, where that is still in its folder."""
    for parent in read_artifact(engine).parents:
        source = engine.with_name(parent.name)
        if source.suffix == ".onnx" and source.is_file() and sha256(source) == parent.sha256:
            return blocks_of(onnx.load(source))
    return {}
