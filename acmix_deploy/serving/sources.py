"""What is looked at: images, folders, videos and cameras, one frame after another, decoded ahead in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import Field

from acmix_deploy.detection.boxes import Detection, Detections, named
from acmix_deploy.detection.images import Image, opencv, read
from acmix_deploy.detection.listing import IMAGE_SUFFIXES, in_folder
from acmix_deploy.detection.pictures import TooLarge, Unreadable, check_pixels
from acmix_deploy.document import Document
from acmix_deploy.errors import UserError
from acmix_deploy.serving.detector import Detector

T = TypeVar("T")

_FPS = 25.0  # of a camera that tells none
_PATIENCE = 1000  # frames in a row that cannot be decoded, after which the rest of a video is taken for lost
_TIMEOUT_MS = 10_000  # for a URL to answer


class Frame(NamedTuple):
    """An image, or why there is none."""

    source: str
    """Name of the file; of a URL without user and password."""
    image: Image | None
    """[h, w, 3] in BGR."""
    problem: str = ""
    """What is wrong where there is no image."""
    number: int | None = None
    """Of a frame in a video, from 0."""
    seconds: float | None = None
    """From the start of a video file to the frame."""
    lost: int = 0
    """Images or frames that the problem stands for."""


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


class DetectDocument(Document):
    """One line of ``acmix-deploy detect --json``: an image, or a frame of a video."""

    document: Literal["detect"] = "detect"
    source: str = Field(description="name of the file, index of the camera, or URL without user and password")
    frame: int | None = Field(default=None, description="of a video or camera, from 0")
    seconds: float | None = Field(default=None, description="from the start of a video file")
    width: int | None = Field(default=None, description="of the image in pixels")
    height: int | None = Field(default=None, description="of the image in pixels")
    detections: list[Detection] = Field(default=[], description="the highest score first")
    problem: str | None = Field(default=None, description="why it was skipped, where it was")

    @classmethod
    def of(cls, frame: Frame, found: Detections | None, names: Mapping[int, str]) -> DetectDocument:
        """A frame and what is in it, with the names of classes by their indices."""
        height, width = frame.image.shape[:2] if frame.image is not None else (None, None)
        return cls(
            source=frame.source,
            frame=frame.number,
            seconds=frame.seconds,
            width=width,
            height=height,
            detections=named(found, names) if found else [],
            problem=frame.problem or None,
        )

    def __str__(self) -> str:
        place = self.source if self.frame is None else f"{self.source} frame {self.frame}"
        return f"{place}: {self.problem or '; '.join(map(str, self.detections)) or 'nothing'}"


def open_source(text: str) -> Source:
    """The source of a name.

    Args:
        text: an image (by its suffix), a folder of images, a video, the index of a camera or a URL.

    Raises:
        UserError: there is no such thing, or it is none of these.
        MissingComponent: OpenCV is not installed.
    """
    path = Path(text)
    if path.is_dir():
        if not (files := in_folder(path)):
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            raise UserError(f"{path} holds no image", f"Images end in one of {known}.")
        return _images(str(path), files)
    if path.is_file():
        return _images(path.name, [path]) if path.suffix.lower() in IMAGE_SUFFIXES else _video(path)
    if text.isdecimal():
        return _live(text, int(text))
    if "://" in text:
        return _live(urlsplit(text)._replace(netloc=urlsplit(text).netloc.rpartition("@")[2]).geturl(), text)
    raise UserError(f"{text} does not exist", "Give an image, a folder, a video, the index of a camera or a URL.")


def detect(detector: Detector, frames: Iterable[Frame]) -> Iterator[tuple[Frame, Detections | None]]:
    """The frames in their order with what is in them, None where there is no image.

    The next frames are decoded while the detector runs, at most three batches of them.
    """
    batch = detector.input_shape[0]
    with closing(ahead(frames, 2 * batch)) as decoded:
        while taken := list(islice(decoded, batch)):
            found = iter(detector([frame.image for frame in taken if frame.image is not None]))
            for frame in taken:
                yield frame, None if frame.image is None else next(found)


def ahead(items: Iterable[T], count: int) -> Generator[T]:
    """The items, the next ``count`` of which are made in a thread while one is used. Raises what making one raises."""
    rest, end = iter(items), object()

    def following() -> Any:
        return next(rest, end)

    with ThreadPoolExecutor(1) as thread:
        coming: deque[Future[Any]] = deque(thread.submit(following) for _ in range(count))
        try:
            while (item := coming.popleft().result()) is not end:
                coming.append(thread.submit(following))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)


def _images(name: str, files: Sequence[Path]) -> Source:
    def frames() -> Iterator[Frame]:
        for file in files:
            try:
                yield Frame(file.name, read(file))
            except Unreadable as error:
                yield Frame(file.name, None, f"is no image that can be read: {error}", lost=1)

    return Source(name, frames(), files=files, total=len(files))


def _video(path: Path) -> Source:
    cv2 = opencv()
    capture = cv2.VideoCapture(str(path.resolve()))
    if not capture.isOpened():
        raise UserError(
            f"{path} is neither an image by its suffix nor a video that OpenCV can open",
            "Videos that were cut off at their end often cannot be opened; ffmpeg may repair them.",
        )
    _check_frames(path.name, capture)
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))

    def frames() -> Iterator[Frame]:
        """Where a frame cannot be decoded the next one may: only their number tells the end."""
        tried = read = failed = 0
        while failed < _PATIENCE and (tried < total or not failed):
            image = _next(capture)
            failed = 0 if image is not None else failed + 1
            if image is not None:
                seconds = round(capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3, 3)
                yield Frame(path.name, image, number=tried, seconds=seconds)
                read += 1
            tried += 1
        if read < total:
            yield Frame(path.name, None, f"{total - read} of {total} frames cannot be read", lost=total - read)

    return Source(path.name, _released(capture, frames), [path], _fps(capture), total if total > 0 else None)


def _live(name: str, address: int | str) -> Source:
    cv2 = opencv()
    timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
    capture = cv2.VideoCapture(address, cv2.CAP_ANY, timeouts if isinstance(address, str) else [])
    if not capture.isOpened():
        raise UserError(
            f"{name} cannot be opened as {'a camera' if isinstance(address, int) else 'a video stream'}",
            "Is it there, and may you use it?",
        )
    _check_frames(name, capture)

    def frames() -> Iterator[Frame]:
        index = 0
        while (image := _next(capture)) is not None:
            yield Frame(name, image, number=index)
            index += 1

    return Source(name, _released(capture, frames), fps=_fps(capture))


def _check_frames(name: str, capture: Any) -> None:
    """Raise UserError where the frames, as the stream tells their size, are larger than images may be."""
    cv2 = opencv()
    try:
        check_pixels(*(round(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)))
    except TooLarge as error:
        capture.release()
        raise UserError(f"{name} has frames that are too large: {error}", "Raise --max-pixels.") from error


def _next(capture: Any) -> Image | None:
    done, image = capture.read()
    return image if done else None


def _fps(capture: Any) -> float:
    fps = float(capture.get(opencv().CAP_PROP_FPS))
    return fps if 0 < fps < 1000 else _FPS


def _released(capture: Any, frames: Callable[[], Iterator[Frame]]) -> Iterator[Frame]:
    try:
        yield from frames()
    finally:
        capture.release()
