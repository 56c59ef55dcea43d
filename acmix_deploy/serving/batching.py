"""Requests that come one by one, run together: a bounded queue, batches, deadlines, and another model meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np

from acmix_deploy.detection.boxes import Detections
from acmix_deploy.detection.heads import Array
from acmix_deploy.detection.images import Image
from acmix_deploy.errors import AcmixDeployError, CheckFailed
from acmix_deploy.serving.detector import Feed
from acmix_deploy.serving.worker import Died, Seconds, Served, Setup, Worker

log = logging.getLogger(__name__)
T = TypeVar("T")

_LOADING = 600.0
"""Seconds for a model to load; TensorRT may build an engine for an ONNX file meanwhile."""
_BETWEEN_STARTS = 2.0
"""Seconds after a model that did not start before the next attempt."""


class Overloaded(Exception):
    """There is no room for more; ask again later."""


class Expired(Exception):
    """The deadline passed before there was an answer."""


class Unavailable(Exception):
    """There is no model that answers."""


class Budget:
    """So much of something at a time. Who asks for more is refused, not queued; the first one always fits."""

    def __init__(self, limit: int, of: str) -> None:
        self.limit, self.of = limit, of
        self.held = 0

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Take some of it for as long as the block lasts. Raises Overloaded."""
        if self.held and self.held + amount > self.limit:
            raise Overloaded(f"too much at a time: {self.held} of {self.limit} {self.of} are being worked on")
        self.held += amount
        try:
            yield
        finally:
            self.held -= amount


class Limits(NamedTuple):
    """Of the time and the places that requests get."""

    max_delay: float = 0.005
    """Seconds that an image waits for others at most, to fill a batch."""
    max_queue: int = 64
    """Images that are waiting or running at most."""
    deadline: float = 10.0
    """Seconds for a head, a body, its pictures and the answer, each; a model that takes longer is taken for hung."""


class Times(NamedTuple):
    """Of a request, in seconds."""

    waited: float
    """Until its run began: for others to fill a batch, and for runs before."""
    copied: float
    """On the way to the model's process and back."""
    ran: Seconds
    """In that process, by step, with what others had in the same run."""


class _Job(NamedTuple):
    """A request: images, which are run together with those of others, or arrays, which are run by themselves."""

    images: Sequence[Image]
    feed: Feed | None
    answer: asyncio.Future[Any]
    arrived: float


class Batcher:
    """Answers from one model to many callers. For the event loop that it is opened in.

    A model whose process ends, or that is ended because it did not answer, is started again, and what it was at is
    tried once more.
    """

    served: Served
    """The model, as it was when it was first loaded; another one has to be equal to it in all that clients see."""

    def __init__(
        self,
        setup: Setup,
        limits: Limits,
        observe: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        """See :meth:`open`. ``observe`` is told the images and the seconds of every run."""
        self.limits = limits
        self.places = Budget(limits.max_queue, "images")
        """Hold some for as long as images are to be decoded, to wait and to run: that bounds the queue."""
        self.starts = 0
        """How often a model was loaded."""
        self._setup, self._observe = setup, observe
        self._jobs: deque[_Job] = deque()
        self._arrived = asyncio.Event()
        self._turn = asyncio.Lock()  # whoever runs the worker, or puts another into its place
        self._reload = asyncio.Lock()
        self._worker: Worker | None = None
        self._failure: tuple[float, str] | None = None
        self._answered = float("-inf")

    async def open(self) -> None:
        """Load the model and begin. Raises AcmixDeployError where it does not load."""
        self._worker, self.served = await self._loaded()
        self._dispatching = asyncio.create_task(self._dispatch())

    async def close(self) -> None:
        """End the model; nobody may be waiting any more."""
        self._dispatching.cancel()
        if self._worker:
            self._worker.close()

    async def detect(self, images: Sequence[Image]) -> tuple[list[Detections], Times]:
        """What is in each of the images, which stay together in one run where they fit. The caller holds their places.

        Raises:
            Expired, Unavailable: there is no answer.
            AcmixDeployError: see :class:`acmix_deploy.serving.detector.Detector`.
        """
        found: list[Detections]
        found, times = await self._put(images, None)
        return found, times

    async def infer(self, feed: Feed) -> dict[str, Array]:
        """The raw outputs for arrays of the model's inputs, in a run of their own; otherwise as :meth:`detect`."""
        outputs: dict[str, Array]
        outputs, _ = await self._put((), feed)
        return outputs

    async def ready(self) -> bool:
        """Whether the model answers: it has within the time for an answer, or does now."""
        if self._worker and _now() - self._answered < self.limits.deadline:
            return True
        height, width = self.served.input_shape[2:]
        try:
            with self.places.hold(1):
                await self.detect([np.zeros((height, width, 3), np.uint8)])
        except (Overloaded, Expired, Unavailable, AcmixDeployError):
            return False
        return True

    async def reload(self) -> None:
        """Put the file as it is now into the place of the model; requests go on meanwhile.

        Raises:
            AcmixDeployError: it does not load or is another model to its clients. The old one stays.
        """
        async with self._reload:
            worker, _ = await self._loaded()
            async with self._turn:
                old, self._worker, self._failure = self._worker, worker, None
            if old:
                await asyncio.to_thread(old.close)

    async def _put(self, images: Sequence[Image], feed: Feed | None) -> tuple[Any, Times]:
        job = _Job(images, feed, asyncio.get_running_loop().create_future(), _now())
        self._jobs.append(job)
        self._arrived.set()
        try:
            answer: tuple[Any, Times] = await asyncio.wait_for(job.answer, self.limits.deadline)
        except asyncio.TimeoutError as error:
            raise Expired(f"there was no answer in {self.limits.deadline:g} s") from error
        return answer

    async def _dispatch(self) -> None:
        while True:
            jobs = await self._next()
            try:
                await self._answer(jobs)
            except Exception as error:  # whatever it is, it is not to end this loop
                if not isinstance(error, (AcmixDeployError, Unavailable)):
                    log.exception("a batch failed")
                for job in jobs:
                    if not job.answer.done():
                        job.answer.set_exception(error)

    async def _next(self) -> list[_Job]:
        """The jobs of the next run, as soon as they fill it or the first one has waited long enough."""
        while True:
            while self._jobs and self._jobs[0].answer.done():  # nobody waits for it any more
                self._jobs.popleft()
            if self._jobs:
                left = self._jobs[0].arrived + self.limits.max_delay - _now()
                taken, full = self._fitting()
                if full or left <= 0:
                    return [job for job in (self._jobs.popleft() for _ in range(taken)) if not job.answer.done()]
            else:
                left = None
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except asyncio.TimeoutError:
                continue

    def _fitting(self) -> tuple[int, bool]:
        """How many jobs, from the first on, go into one run, and whether no other would."""
        images = 0
        for index, job in enumerate(self._jobs):
            images += len(job.images)
            if index and (job.feed is not None or images > self.served.max_batch):
                return index, True
            if job.feed is not None or images >= self.served.max_batch:
                return index + 1, True
        return len(self._jobs), False

    async def _answer(self, jobs: Sequence[_Job]) -> None:
        """Have the model do something, at most twice. Raises Unavailable where it ends both times."""
        async with self._turn:
            for _ in range(2):
                jobs = [job for job in jobs if not job.answer.done()]
                if not jobs:
                    return
                worker = self._worker or await self._started()
                start = _now()
                try:
                    results, ran = await _within(self.limits.deadline, worker, partial(_work, jobs))
                except Died as error:
                    log.error("%s", error)
                    self._worker = None
                    await asyncio.to_thread(worker.close)
                    continue
                self._answered = _now()
                seconds = self._answered - start
                self._observe(sum(len(job.images) for job in jobs), seconds)
                for job, result in zip(jobs, results, strict=True):
                    if not job.answer.done():
                        job.answer.set_result((result, Times(start - job.arrived, seconds - sum(ran.values()), ran)))
                return
        raise Unavailable("the model ended while it worked on this")

    async def _started(self) -> Worker:
        """A worker in the place of one that died. Raises Unavailable where it does not start."""
        if self._failure and _now() - self._failure[0] < _BETWEEN_STARTS:
            raise Unavailable(self._failure[1])
        try:
            self._worker, _ = await self._loaded()
        except AcmixDeployError as error:
            log.error("the model does not start again: %s", error)
            self._failure = _now(), "the model does not start again"
            raise Unavailable(self._failure[1]) from error
        self._failure = None
        return self._worker

    async def _loaded(self) -> tuple[Worker, Served]:
        worker = Worker(self._setup)
        try:
            served = await _within(_LOADING, worker, Worker.load)
            if hasattr(self, "served") and served != self.served:
                raise CheckFailed(
                    f"{self._setup.path} is another model to its clients: {_difference(self.served, served)}",
                    "Start the server anew to serve it.",
                )
        except Died as error:
            worker.close()
            raise CheckFailed(f"{self._setup.path} does not load: {error}") from error
        except BaseException:
            worker.close()
            raise
        self.starts += 1
        return worker, served


async def _within(seconds: float, worker: Worker, work: Callable[[Worker], T]) -> T:
    """What a worker does in a thread; it is killed when it takes longer, or when nobody waits for it any more."""
    running = asyncio.create_task(asyncio.to_thread(work, worker))
    try:
        done, _ = await asyncio.wait({running}, timeout=seconds)
    except asyncio.CancelledError:
        worker.kill()
        raise
    if not done:
        log.error("the model did not answer in %g s", seconds)
        worker.kill()
    return await running


def _work(jobs: Sequence[_Job], worker: Worker) -> tuple[list[Any], Seconds]:
    """The results of jobs that go into one run, and its time in the process of the model."""
    if jobs[0].feed is not None:
        outputs, seconds = worker.infer(jobs[0].feed)
        return [outputs], seconds
    answer, seconds = worker.detect([image for job in jobs for image in job.images])
    found = iter(answer)
    return [[*islice(found, len(job.images))] for job in jobs], seconds


def _difference(old: Served, new: Served) -> str:
    name = next(name for name in Served._fields if getattr(old, name) != getattr(new, name))
    return f"its {name} were {getattr(old, name)} and are {getattr(new, name)}"


def _now() -> float:
    return asyncio.get_running_loop().time()
