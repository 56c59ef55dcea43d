"""A detector in a process of its own: what kills or hangs a model stops there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from acmix_deploy.artifacts import read_artifact, sidecar
from acmix_deploy.detection.boxes import Detections
from acmix_deploy.detection.heads import Array
from acmix_deploy.detection.images import Image
from acmix_deploy.detection.metadata import Task
from acmix_deploy.errors import AcmixDeployError, CheckFailed
from acmix_deploy.process import ending
from acmix_deploy.runtime.inputs import Input, Shape

if TYPE_CHECKING:
    from acmix_deploy.serving.detector import Detector, Feed


Seconds = dict[str, float]
"""By the name of a step."""


class Steps:
    """The times of steps that follow each other."""

    def __init__(self) -> None:
        """The first one begins."""
        self.seconds: Seconds = {}
        self._began = time.perf_counter()

    def end(self, name: str) -> None:
        """A step is over, which began where the last one ended; one of the same name goes on."""
        self.tell({name: self.seconds.get(name, 0.0) + time.perf_counter() - self._began})

    def tell(self, seconds: Seconds) -> None:
        """Steps are over whose time was taken elsewhere."""
        self.seconds |= seconds
        self._began = time.perf_counter()


class Setup(NamedTuple):
    """What to serve."""

    path: Path
    """An ONNX file, or an engine with its manifest."""
    options: Mapping[str, Any] = {}
    """Other arguments of :meth:`acmix_deploy.serving.detector.Detector.load`."""
    max_batch: int = 8
    """Images in one run at most; fewer where the model takes fewer."""


class Served(NamedTuple):
    """What a detector tells of itself: the contract with its clients."""

    name: str
    names: dict[int, str]
    inputs: tuple[Input, ...]
    outputs: tuple[Input, ...]
    input_shape: Shape
    max_batch: int
    """Images in one run."""
    task: Task
    confidence: float
    """See :attr:`acmix_deploy.serving.detector.Detector.least`."""
    note: str
    """See :attr:`acmix_deploy.serving.detector.Detector.note`."""


class Died(Exception):
    """The process is gone."""


class Worker:
    """A process with a detector. For one caller at a time, but :meth:`kill` and :meth:`close` may come from any thread.

    It outlives neither this object's :meth:`close` nor the process that made it, and it leaves signals for a process
    group to that process, so that what has begun can be finished.
    """

    def __init__(self, setup: Setup) -> None:
        """Start the process, without waiting for the model."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._setup = setup

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def load(self) -> Served:
        """Load the model and try it.

        Raises:
            AcmixDeployError: what :meth:`Detector.load` raises, or the file fails :func:`tried`.
            Died: the process ended.
        """
        served: Served = self._ask(self._setup)
        return served

    def detect(self, images: Sequence[Image]) -> tuple[list[Detections], Seconds]:
        """What is in each of the images, and how long that took in the process, without the way there and back.

        See :class:`Detector` for what this raises, and Died.
        """
        found: tuple[list[Detections], Seconds] = self._ask(("detect", list(images)))
        return found

    def infer(self, feed: Feed) -> tuple[dict[str, Array], Seconds]:
        """The raw outputs, and the time, as of :meth:`detect`; raises what :meth:`Detector.infer` does, and Died."""
        outputs: tuple[dict[str, Array], Seconds] = self._ask(("infer", dict(feed)))
        return outputs

    def kill(self) -> None:
        """End the process at once; whoever waits for it is told that it died."""
        self._process.kill()

    def close(self) -> None:
        """End the process and wait until it is gone."""
        self.kill()
        self._process.wait()
        self._connection.close()

    def _ask(self, request: object) -> Any:
        try:
            self._connection.send(request)
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise Died(f"the model's process ended ({ending(code)})") from error
        if isinstance(answer, AcmixDeployError):
            raise answer
        return answer


def serve(connection: Connection) -> None:
    """The work of the process: a detector as the first message says, then images and arrays, until the other side ends.

    Answers are results or the :class:`AcmixDeployError` that stands for them.
    """
    from acmix_deploy.serving.detector import Detector

    detector: Detector | None = None
    with connection, ExitStack() as held, suppress(EOFError, OSError):
        while True:
            request = connection.recv()
            answer: object
            try:
                if isinstance(request, Setup):
                    if sidecar(request.path).is_file():
                        read_artifact(request.path)
                    detector = held.enter_context(Detector.load(request.path, **request.options))
                    answer = tried(detector, request.max_batch)
                else:
                    assert detector
                    kind, given = request
                    answer = detected(detector, given) if kind == "detect" else inferred(detector, given)
            except AcmixDeployError as error:
                answer = error
            except Exception as error:
                sys.excepthook(*sys.exc_info())
                answer = CheckFailed(f"the model fails: {type(error).__name__}: {error}")
            connection.send(answer)


def tried(detector: Detector, max_batch: int) -> Served:
    """A detector after a run of as many images as will come together; it runs no more from then on.

    Raises:
        CheckFailed: it fails.
    """
    detector.max_batch = most = min(max_batch, detector.max_batch or max_batch)
    detector([np.zeros((*detector.input_shape[2:], 3), np.uint8)] * most)
    return Served(
        name=detector.name,
        names=dict(detector.names),
        inputs=detector.inputs,
        outputs=detector.outputs,
        input_shape=detector.input_shape,
        max_batch=most,
        task=detector.head.task,
        confidence=detector.least,
        note=detector.note,
    )


def detected(detector: Detector, images: Sequence[Image]) -> tuple[list[Detections], Seconds]:
    """What is in each of the images, in runs of at most :attr:`Detector.max_batch`, and the time of each step."""
    found: list[Detections] = []
    steps, most = Steps(), detector.max_batch or max(len(images), 1)
    for start in range(0, len(images), most):
        fitted = detector.fit(images[start : start + most])
        steps.end("fit")
        outputs = detector.run(fitted)
        steps.end("run")
        found += detector.boxes(outputs, fitted.placements)
        steps.end("boxes")
    return found, steps.seconds


def inferred(detector: Detector, feed: Feed) -> tuple[dict[str, Array], Seconds]:
    """The raw outputs, and the time of the run."""
    steps = Steps()
    outputs = detector.infer(feed)
    steps.end("run")
    return outputs, steps.seconds


def main() -> None:
    """The process itself."""
    for of_a_group in (signal.SIGINT, signal.SIGTERM):
        signal.signal(of_a_group, signal.SIG_IGN)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(Connection(int(sys.argv[1])))


# Not `-m`, which would look for modules in the working directory before all others.
_MAIN = f"import json, sys; sys.path[:] = json.loads(sys.argv[2]); from {__name__} import main; main()"
