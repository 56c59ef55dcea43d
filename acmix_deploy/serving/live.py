"""Cameras and streams: read without a pause, the newest frame first, and opened again where they stop. What waits for
OpenCV does so in threads that are left behind where a signal ends it, since OpenCV cannot be told to stop."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from acmix_deploy.detection.images import Image
from acmix_deploy.serving import video
from acmix_deploy.serving.frames import Checked, Frame
from acmix_deploy.serving.video import next_image

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before each try to open a source again that stopped."""

STEADY = 30.0
"""Seconds that a source has to give frames until its tries are counted from the first again."""

_PATIENCE = 10  # frames in a row that cannot be decoded, after which a source is taken to have stopped
_AT_ONCE = 1.0  # seconds; a source that fails after more than that has timed out

_MOMENT = 0.1  # seconds until a caller that waits for a frame sees that the source was closed


def interruptible(make: Callable[[], T]) -> T:
    """What a call gives, or raises, that a signal does not wait for."""
    made: Future[T] = Future()

    def run() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return made.result()


def closable(frames: Generator[Frame]) -> tuple[Iterator[Frame], Callable[[], None]]:
    """Frames that are made in a thread, one ahead, and what ends them within a moment, from any thread."""
    coming: queue.Queue[Frame | BaseException | None] = queue.Queue(1)
    stop = threading.Event()

    def put(item: Frame | BaseException | None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                return coming.put(item, timeout=_MOMENT)

    def run() -> None:
        with closing(frames):
            try:
                for frame in frames:
                    put(frame)
                    if stop.is_set():
                        return
                put(None)
            except BaseException as error:
                put(error)

    def given() -> Iterator[Frame]:
        threading.Thread(target=run, daemon=True).start()
        try:
            while not stop.is_set():
                try:
                    item = coming.get(timeout=_MOMENT)
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()

    return given(), stop.set


class Live(Iterator[Frame]):
    """The frames of a camera or stream as they come. A thread reads them always and keeps the newest one: what is not
    taken in time is dropped and counted, so that a slow caller is never more than a frame behind.

    Where frames stop, the source is opened again after :data:`PAUSES`; each stop, return and end is said in a frame
    without an image, and no such frame is dropped.
    """

    def __init__(self, name: str, capture: Any, reopen: Callable[[], Any]) -> None:
        """A source of a name that is open, and what opens it again: OpenCV's VideoCapture, or None if it cannot be."""
        self._name, self._capture, self._reopen = name, capture, reopen
        self._waiting: deque[Frame] = deque()  # at most one of them has an image
        self._dropped = self._lost = 0
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"frames of {name}", daemon=True)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Frame:
        if not self._thread.ident:
            self._thread.start()
        with self._changed:
            while not (self._waiting or self._ended or self._stop.is_set()):
                self._changed.wait(_MOMENT)
            if self._stop.is_set():
                raise StopIteration
            if not self._waiting:
                error, self._error = self._error, None
                raise error or StopIteration
            frame = self._waiting.popleft()
            if frame.image is not None:
                frame = frame._replace(dropped=self._dropped, lost=frame.lost + self._lost)
                self._dropped = self._lost = 0
            return frame

    def close(self) -> None:
        """End it. The thread ends by itself once OpenCV has returned to it, and releases the source."""
        self._stop.set()

    def wait(self) -> None:
        """After :meth:`close` wait until the source is released, so that it can be opened again."""
        if self._thread.ident:
            self._thread.join(video.TIMEOUT_MS / 1e3 + _AT_ONCE)
        else:
            self._capture.release()

    def _run(self) -> None:
        try:
            for frame in self._frames():
                with self._changed:
                    if frame.image is not None:
                        kept = [waiting for waiting in self._waiting if waiting.image is None]
                        self._dropped += len(self._waiting) - len(kept)
                        self._lost += sum(waiting.lost for waiting in self._waiting if waiting.image is not None)
                        self._waiting = deque(kept)
                    self._waiting.append(frame)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            if self._capture is not None:
                self._capture.release()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _frames(self) -> Iterator[Frame]:
        checked, number, image = Checked(self._name), 0, next_image(self._capture)
        opened, pauses = time.monotonic(), iter(PAUSES)
        while image is not None and not self._stop.is_set():
            yield from checked(Frame(self._name, image, number=number))
            image, broken = self._next()
            for _ in range(broken if image is not None else 0):
                number += 1
                yield from checked.broken(Frame(self._name, None, number=number))
            number += 1
            if image is not None or self._stop.is_set():
                continue
            stopped = time.monotonic()
            if stopped - opened > STEADY:
                pauses = iter(PAUSES)
            yield self._said(f"gives no more frames after {number}; it is opened again")
            image, opened = self._first_again(pauses), time.monotonic()
            if image is not None:
                yield self._said(f"gives frames again after {opened - stopped:.0f} s")
            elif not self._stop.is_set():
                yield self._said(f"is given up after {len(PAUSES)} tries; it ends after {number} frames")
        yield from checked.rest()

    def _said(self, text: str) -> Frame:
        return Frame(self._name, None, text)

    def _next(self) -> tuple[Image | None, int]:
        """The next frame, None where the source has stopped, and how many before it cannot be decoded."""
        for broken in range(_PATIENCE):
            asked = time.monotonic()
            image = next_image(self._capture)
            if image is not None or time.monotonic() - asked > _AT_ONCE or self._stop.is_set():
                return image, broken
        return None, _PATIENCE

    def _first_again(self, pauses: Iterator[float]) -> Image | None:
        """The first image after the source was opened again; None where it cannot be with the pauses that are left."""
        for pause in pauses:
            self._capture.release()
            if self._stop.wait(pause):
                return None
            capture = self._reopen()
            if capture is not None:
                self._capture = capture
                if (image := next_image(capture)) is not None:
                    return image
        return None
