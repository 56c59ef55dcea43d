"""What sources give: frames, each with an image or a sentence why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from acmix_deploy.detection.images import Image
from acmix_deploy.detection.pictures import TooLarge, check_pixels


class Frame(NamedTuple):
    """An image, or what there is to say where there is none."""

    source: str
    """Name of the file; of a URL without user and password."""
    image: Image | None
    """[h, w, 3] in BGR."""
    problem: str = ""
    """What is wrong, or happened to the source, where there is no image."""
    number: int | None = None
    """Of a frame in a video, from 0; of a camera or stream as they came, with those that were dropped."""
    seconds: float | None = None
    """From the start of a video file to the frame."""
    lost: int = 0
    """Images or frames that the problem stands for."""
    original: tuple[int, int] | None = None
    """Height and width of the picture, where the image is smaller by a whole factor (:attr:`reduced`)."""
    dropped: int = 0
    """Frames of a camera or stream that came since the one before and were replaced by newer ones."""

    @property
    def reduced(self) -> int:
        """Pixels of the picture, a side, that a pixel of the image stands for: 1, 2, 4 or 8."""
        if self.image is None or self.original is None:
            return 1
        return int(round(max(self.original) / max(self.image.shape[:2])))

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the picture; None where there is no image."""
        return None if self.image is None else self.original or (self.image.shape[0], self.image.shape[1])


def _nothing() -> None:
    pass


class Source(NamedTuple):
    """Frames that are read when they are asked for, once."""

    name: str
    frames: Iterator[Frame]
    files: Sequence[Path] = ()
    """Where the frames come from, if they are of files."""
    fps: float | None = None
    """Frames in a second of a video or camera."""
    total: int | None = None
    """How many frames there are, where it is known."""
    live: bool = False
    """Whether frames come by themselves: what waits becomes old, so that none should be asked for ahead."""
    close: Callable[[], None] = _nothing
    """Ends the frames of a live source within a moment, from any thread and from a handler of signals."""


class Sizes:
    """The frames of one stream as they go through: another size is said once, and too many pixels are left out, said
    once, and counted."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._size: tuple[int, int] | None = None
        self._said_size = self._said_large = False
        self._left_out = 0

    def __call__(self, frame: Frame) -> Iterator[Frame]:
        """The frame, or what is said of it; it has an image."""
        assert frame.size
        height, width = frame.size
        try:
            check_pixels(width, height)
        except TooLarge as error:
            if self._said_large:
                self._left_out += 1
            else:
                self._said_large = True
                said = f"is too large, and so may others be: {error}"
                yield Frame(self._name, None, said, frame.number, frame.seconds, lost=1)
            return
        if self._size not in (None, frame.size) and not self._said_size:
            self._said_size = True
            before, now = (f"{wide} x {high}" for high, wide in (self._size or (0, 0), frame.size))
            yield Frame(self._name, None, f"frames change their size, from {before} to {now}; it goes on", frame.number)
        self._size = frame.size
        yield frame

    def rest(self) -> Iterator[Frame]:
        """What is left to say at the end."""
        if self._left_out:
            yield Frame(self._name, None, f"{self._left_out} more frames were too large", lost=self._left_out)
