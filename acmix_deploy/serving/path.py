"""Frames through a detector: its steps in threads that overlap, and the time that each of them takes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from pydantic import BaseModel, Field

from acmix_deploy.detection.boxes import Detections
from acmix_deploy.detection.heads import Array
from acmix_deploy.detection.images import Placement
from acmix_deploy.document import Document
from acmix_deploy.serving.detector import Detector, Fitted
from acmix_deploy.serving.frames import Frame, Source

T = TypeVar("T")

Step = Literal["decode", "fit", "copy", "run", "boxes", "draw"]

KEPT = 10_000
"""Times of a step that its median and its p99 are of: the last ones."""


class StepTimes(BaseModel):
    """How long a step took."""

    step: Step = Field(
        description="decode: a picture or frame is read and decoded, of a live source waited for; fit: letterboxed and "
        "turned into what the model takes; copy: to the device of an engine; run: the model; boxes: outputs to "
        "detections; draw: drawn, encoded and written"
    )
    times: int = Field(description="how often; decode and draw are done for each image, the others for each batch")
    median_ms: float = Field(description=f"of the last {KEPT} times")
    p99_ms: float = Field(description=f"of the last {KEPT} times")
    busy: float = Field(description="share of all the time that was spent in this step; they overlap")


class PathTimes(BaseModel):
    """How long the steps took from the source to the boxes, and what that came to."""

    images: int = Field(description="that went through the model")
    batch: int = Field(description="images in a run")
    seconds: float = Field(description="from the first step to the last; loading the model is before")
    images_per_second: float = Field(description="images that went through the model in a second")
    steps: list[StepTimes] = Field(description="those that were done, in their order")
    bottleneck: Step | Literal["source"] | None = Field(
        description="the step that was busy for the largest share; source: a camera or stream was waited for"
    )
    fps: float | None = Field(default=None, description="frames in a second of a video or camera")
    dropped: int = Field(default=0, description="frames of a camera or stream that newer ones replaced")
    kept_up: bool | None = Field(
        default=None,
        description="whether no frame of a camera or stream was dropped, or a video took no longer than it lasts",
    )


class DetectStats(Document):
    """Last line of ``acmix-deploy detect --stats --json``."""

    document: Literal["detect stats"] = "detect stats"
    source: str = Field(description="name of what was looked at")
    times: PathTimes = Field(description="how long each step took")


class Clock:
    """Takes the times of steps. Each is done by one thread at a time."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """A clock that tells seconds, and starts."""
        self._now = now
        self._steps: dict[Step, _Times] = {}
        self.seconds = 0.0
        """Between calls of :meth:`resume` and :meth:`pause`."""
        self.resume()

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._since: float | None = self._now()

    def pause(self) -> None:
        """Let time pass that belongs to no step; steps that end meanwhile are not counted."""
        if self._since is not None:
            self.seconds += self._now() - self._since
        self._since = None

    @contextmanager
    def step(self, name: Step, copying: Callable[[], float | None] = lambda: None) -> Iterator[None]:
        """Count the time of a block, unless it raises; the seconds of it that were ``copying``, as step "copy"."""
        start = self._now()
        yield
        seconds = self._now() - start
        if (copied := copying()) is not None:
            self._add("copy", copied)
        self._add(name, seconds - (copied or 0.0))

    def over(self, name: Step, items: Iterable[T]) -> Iterator[T]:
        """The items, with the time that each takes to be there."""
        rest = iter(items)
        while True:
            start = self._now()
            try:
                item = next(rest)
            except StopIteration:
                return
            self._add(name, self._now() - start)
            yield item

    def times(self, source: Source, images: int, batch: int, dropped: int = 0, lost: int = 0) -> PathTimes:
        """What was counted until now, for images of a source; others were dropped, or lost as they cannot be read."""
        self.pause()
        seconds = max(self.seconds, 1e-9)
        order = {step: taken for step in get_args(Step) if (taken := self._steps.get(step))}
        steps = [
            StepTimes(
                step=step,
                times=taken.count,
                median_ms=float(np.median(taken.last)) * 1e3,
                p99_ms=float(np.percentile(taken.last, 99)) * 1e3,
                busy=taken.seconds / seconds,
            )
            for step, taken in order.items()
        ]
        longest = max(steps, key=lambda step: step.busy).step if steps else None
        reached = images / seconds
        kept_up = not dropped if source.live else (images + lost) / seconds >= source.fps if source.fps else None
        return PathTimes(
            images=images,
            batch=batch,
            seconds=seconds,
            images_per_second=reached,
            steps=steps,
            bottleneck="source" if source.live and longest == "decode" else longest,
            fps=source.fps,
            dropped=dropped,
            kept_up=kept_up,
        )

    def _add(self, name: Step, seconds: float) -> None:
        if self._since is None:
            return
        taken = self._steps.setdefault(name, _Times())
        taken.last.append(seconds)
        taken.count += 1
        taken.seconds += seconds


class _Times:
    """Of a step, in seconds."""

    def __init__(self) -> None:
        self.last: deque[float] = deque(maxlen=KEPT)
        self.count, self.seconds = 0, 0.0


def detect(
    detector: Detector, source: Source, clock: Clock | None = None
) -> Generator[tuple[Frame, Detections | None]]:
    """The frames of a source in their order with what is in them, None where there is no image.

    Three threads decode, fit and run what follows while the caller has a frame: at most five batches are in memory. Of
    a live source a single thread does all three, one batch ahead, so that what is seen is not old. To be closed before
    the detector is.

    Raises:
        CheckFailed: the model fails, or gives what is no box or score.
    """
    clock = clock or Clock()
    with ExitStack() as threads:

        def thread(items: Iterable[T], count: int) -> Iterator[T]:
            return threads.enter_context(closing(ahead(items, count)))

        batch = detector.input_shape[0]
        decoded = clock.over("decode", source.frames)
        if source.live:
            fitted = _fit(detector, _batches(decoded, batch, live=True), clock)
        else:
            fitted = thread(_fit(detector, _batches(thread(decoded, 2 * batch), batch), clock), 1)
        for frames, outputs, placements in thread(_run(detector, fitted, clock), 1):
            found: Iterator[Detections] = iter(())
            if placements:
                with clock.step("boxes"):
                    found = iter(detector.boxes(outputs, placements))
            for frame in frames:
                yield frame, None if frame.image is None else next(found)


def _batches(frames: Iterable[Frame], count: int, live: bool = False) -> Iterator[list[Frame]]:
    """So many frames at a time. Of a live source one without an image ends a batch, since the next may never come."""
    batch: list[Frame] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == count or (live and frame.image is None):
            yield batch
            batch = []
    if batch:
        yield batch


def _fit(
    detector: Detector, batches: Iterable[list[Frame]], clock: Clock
) -> Iterator[tuple[list[Frame], Fitted | None]]:
    for frames in batches:
        fitted = None
        if images := [frame.image for frame in frames if frame.image is not None]:
            with clock.step("fit"):
                fitted = detector.fit(images)
        yield frames, fitted


def _run(
    detector: Detector, batches: Iterable[tuple[list[Frame], Fitted | None]], clock: Clock
) -> Iterator[tuple[list[Frame], Mapping[str, Array], list[Placement]]]:
    for frames, fitted in batches:
        if fitted is None:
            yield frames, {}, []
            continue
        with clock.step("run", detector.copy_seconds):
            outputs = detector.run(fitted)
        yield frames, outputs, fitted.placements


def ahead(items: Iterable[T], count: int) -> Generator[T]:
    """The items, the next ``count`` of which are made in a thread while one is used. Raises what making one raises."""
    rest, end = iter(items), object()
    making, over = threading.Lock(), False

    def following() -> Any:
        with making:
            return end if over else next(rest, end)

    with ThreadPoolExecutor(1) as thread:
        try:
            coming: deque[Future[Any]] = deque(thread.submit(following) for _ in range(count))
            while (item := coming.popleft().result()) is not end:
                coming.append(thread.submit(following))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)
            with making:  # where a signal came while the thread was started, the pool does not know it
                over = True
