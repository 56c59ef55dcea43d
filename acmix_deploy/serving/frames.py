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
    """Images or frames that the problem stands for; with an image, those before it that are left out and not said."""
    original: tuple[int, int] | None = None
    """Height and width of the picture, where the image is smaller."""
    dropped: int = 0
    """Frames of a camera or stream that came since the one before and were replaced by newer ones."""

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
    """Ends the frames of a camera or URL within a moment, from any thread and from a handler of signals."""
    wait: Callable[[], None] = _nothing
    """After that, waits until a live source is released and can be opened again."""


class Checked:
    """The frames of one stream as they go through. Another size is said once; frames of too many pixels and frames that
    cannot be decoded are said once each, and counted."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._size: tuple[int, int] | None = None
        self._resized = False
        self._left_out: dict[str, int] = {}
        self._untold = 0

    def __call__(self, frame: Frame) -> Iterator[Frame]:
        """A frame with an image, or what is said of it."""
        assert frame.size
        height, width = frame.size
        try:
            check_pixels(width, height)
        except TooLarge as error:
            yield from self.lost("too large", f"is too large: {error}", frame)
            return
        if self._size not in (None, frame.size) and not self._resized:
            self._resized = True
            before, now = (f"{wide} x {high}" for high, wide in (self._size or (0, 0), frame.size))
            yield Frame(self._name, None, f"frames change their size, from {before} to {now}", frame.number)
        self._size = frame.size
        yield frame._replace(lost=self._untold)
        self._untold = 0

    def broken(self, frame: Frame) -> Iterator[Frame]:
        """What is said of a frame that cannot be decoded."""
        yield from self.lost("broken", "cannot be decoded", frame)

    def lost(self, kind: str, problem: str, frame: Frame) -> Iterator[Frame]:
        """What is said of a frame that is left out: nothing but once for each kind."""
        if kind in self._left_out:
            self._left_out[kind] += 1
            self._untold += 1
            return
        self._left_out[kind] = 0
        yield Frame(self._name, None, problem, frame.number, frame.seconds, lost=1)

    def rest(self) -> Iterator[Frame]:
        """What is left to say at the end."""
        for kind, count in self._left_out.items():
            if count:
                yield Frame(self._name, None, f"{count} more frames were {kind}", lost=self._untold)
                self._untold = 0
