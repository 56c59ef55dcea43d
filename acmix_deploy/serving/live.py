"""Cameras and streams: read without a pause, the newest frame first, and opened again where they stop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from acmix_deploy.serving.frames import Frame, Sizes
from acmix_deploy.serving.video import next_image

if TYPE_CHECKING:
    from typing_extensions import Self

PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds before each try to open a source again that stopped."""

_MOMENT = 0.1  # seconds until a caller that waits for a frame sees that the source was closed


class Live(Iterator[Frame]):
    """The frames of a camera or stream as they come. A thread reads them always and keeps the newest one: what is not
    taken in time is dropped and counted, so that a slow caller is never more than a frame behind.

    Where frames stop, the source is opened again, with pauses; each stop, return and end is said in a frame without an
    image, and no such frame is dropped.
    """

    def __init__(self, name: str, capture: Any, reopen: Callable[[], Any]) -> None:
        """A source of a name that is open, and what opens it again: OpenCV's VideoCapture, or None if it cannot be."""
        self._name, self._capture, self._reopen = name, capture, reopen
        self._waiting: deque[Frame] = deque()  # at most one of them has an image
        self._dropped = 0
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
                frame, self._dropped = frame._replace(dropped=self._dropped), 0
            return frame

    def close(self) -> None:
        """End it. The thread ends by itself once OpenCV has returned to it, and releases the source."""
        self._stop.set()

    def _run(self) -> None:
        try:
            for frame in self._frames():
                with self._changed:
                    if frame.image is not None:
                        kept = [waiting for waiting in self._waiting if waiting.image is None]
                        self._dropped += len(self._waiting) - len(kept)
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
        number, sizes, image = 0, Sizes(self._name), self._next()
        while image is not None:
            yield from sizes(Frame(self._name, image, number=number))
            number += 1
            if (image := self._next()) is None and not self._stop.is_set():
                yield Frame(self._name, None, f"gives no more frames after {number}; it is opened again")
                stopped = time.monotonic()
                image = self._first_again()
                seconds = time.monotonic() - stopped
                if image is not None:
                    yield Frame(self._name, None, f"gives frames again after {seconds:.0f} s")
                elif not self._stop.is_set():
                    tried = f"{len(PAUSES)} tries over {seconds:.0f} s"
                    yield Frame(
                        self._name, None, f"could not be opened again in {tried}; it ends after {number} frames"
                    )
        yield from sizes.rest()

    def _next(self) -> Any:
        return None if self._stop.is_set() else next_image(self._capture)

    def _first_again(self) -> Any:
        """The first image after the source was opened again; None where it cannot be."""
        for pause in PAUSES:
            self._capture.release()
            if self._stop.wait(pause):
                return None
            capture = self._reopen()
            if capture is not None:
                self._capture = capture
                if (image := self._next()) is not None:
                    return image
        return None
