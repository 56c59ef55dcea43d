"""What is looked at: images, folders, videos and cameras, one frame after another."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from acmix_deploy.detection.boxes import Detection, Detections, named
from acmix_deploy.detection.images import Image, Placement, opencv, read, read_reduced
from acmix_deploy.detection.listing import IMAGE_SUFFIXES, in_folder
from acmix_deploy.detection.pictures import TooLarge, Unreadable, check_pixels
from acmix_deploy.document import Document
from acmix_deploy.errors import UserError
from acmix_deploy.options import Decoder
from acmix_deploy.serving.frames import Checked, Frame, Source
from acmix_deploy.serving.live import Live, closable, interruptible
from acmix_deploy.serving.video import frame_count, next_image, open_capture, seconds_of

_KNOWN = ", ".join(sorted(IMAGE_SUFFIXES))
_LAST_CAMERA = 2**31 - 1  # OpenCV's indices are C's int
_FPS = 25.0  # of a camera that tells none
_PATIENCE = 1000  # frames in a row that cannot be decoded, after which the rest of a video is taken for lost


class DetectDocument(Document):
    """One line of ``acmix-deploy detect --json``: an image, or a frame of a video."""

    document: Literal["detect"] = "detect"
    source: str = Field(description="name of the file, index of the camera, or URL without user and password")
    frame: int | None = Field(default=None, description="of a video or camera, from 0")
    seconds: float | None = Field(default=None, description="from the start of a video file")
    width: int | None = Field(default=None, description="of the image in pixels")
    height: int | None = Field(default=None, description="of the image in pixels")
    dropped: int | None = Field(
        default=None, description="frames of a camera or stream that newer ones replaced since the one before"
    )
    detections: list[Detection] = Field(default=[], description="the highest score first")
    problem: str | None = Field(
        default=None, description="why it was skipped, where it was, or what happened to the source"
    )

    @classmethod
    def of(cls, frame: Frame, found: Detections | None, names: Mapping[int, str]) -> DetectDocument:
        """A frame and what is in it, with the names of classes by their indices."""
        height, width = frame.size or (None, None)
        return cls(
            source=frame.source,
            frame=frame.number,
            seconds=frame.seconds,
            width=width,
            height=height,
            dropped=frame.dropped or None,
            detections=[_in_picture(one, frame) for one in named(found, names)] if found else [],
            problem=frame.problem or None,
        )

    def __str__(self) -> str:
        place = self.source if self.frame is None else f"{self.source} frame {self.frame}"
        return f"{place}: {self.problem or '; '.join(map(str, self.detections)) or 'nothing'}"


def _in_picture(found: Detection, frame: Frame) -> Detection:
    """From pixels of a frame's image to those of its picture."""
    if frame.image is None or frame.original is None:
        return found
    down, across = (whole / part for whole, part in zip(frame.original, frame.image.shape, strict=False))

    def moved(x: float, y: float, *seen: float) -> tuple[float, ...]:
        return round(x * across, 2), round(y * down, 2), *seen

    changed: dict[str, object] = {"box": moved(*found.box[:2]) + moved(*found.box[2:])}
    if found.keypoints:
        changed["keypoints"] = [moved(*point) for point in found.keypoints]
    if found.corners:
        changed["corners"] = [moved(*point) for point in found.corners]
    if found.mask:
        changed["mask"] = [[moved(*point) for point in part] for part in found.mask]
    return found.model_copy(update=changed)


def open_source(text: str, decoder: Decoder = "auto") -> Source:
    """The source of a name.

    Args:
        text: an image (by its suffix), a folder of images, a video, the index of a camera or a URL.
        decoder: what decodes videos, cameras and streams.

    Raises:
        UserError: there is no such thing, or it is none of these.
        MissingComponent: OpenCV is not installed, or the decoder is not there.
    """
    path = Path(text)
    if path.is_dir():
        if not (files := in_folder(path)):
            raise UserError(f"{path} holds no image", f"Images end in one of {_KNOWN}.")
        return _images(str(path), files)
    if path.is_file():
        return _images(path.name, [path]) if path.suffix.lower() in IMAGE_SUFFIXES else _video(path, decoder)
    if path.exists():
        raise UserError(f"{path} is neither a file nor a folder", "A camera is given by its index, such as 0.")
    if text.isdecimal() and int(text) <= _LAST_CAMERA:
        return _live(text, int(text), decoder)
    if "://" in text:
        return _live(urlsplit(text)._replace(netloc=urlsplit(text).netloc.rpartition("@")[2]).geturl(), text, decoder)
    raise UserError(f"{text} does not exist", "Give an image, a folder, a video, the index of a camera or a URL.")


def _images(name: str, files: Sequence[Path]) -> Source:
    return Source(name, _pictures(files, read), files=files, total=len(files))


def reduced(source: Source, place: Callable[[tuple[int, ...]], Placement]) -> Source:
    """A source whose JPEG files are decoded at the smallest scale that is no smaller than what a model sees.

    Args:
        source: with frames that are not begun; a video stays as it is.
        place: where an image [h, w, ...] comes to lie in what the model sees.
    """
    if source.fps:
        return source

    def smaller(file: Path) -> tuple[Image, tuple[int, int]]:
        return read_reduced(file, lambda height, width: place((height, width, 3)).fitted)

    return source._replace(frames=_pictures(source.files, smaller))


def _pictures(
    files: Sequence[Path], reader: Callable[[Path], Image | tuple[Image, tuple[int, int]]]
) -> Iterator[Frame]:
    for file in files:
        try:
            got = reader(file)
        except Unreadable as error:
            yield Frame(file.name, None, f"is no image that can be read: {error}", lost=1)
            continue
        image, original = got if isinstance(got, tuple) else (got, None)
        yield Frame(file.name, image, original=original)


def _video(path: Path, decoder: Decoder) -> Source:
    capture = open_capture(path, decoder)
    if capture is None:
        raise UserError(
            f"{path} is neither an image by its suffix nor a video that OpenCV can open",
            f"Images end in one of {_KNOWN}. Videos that were cut off at their end often cannot be opened; ffmpeg may "
            "repair them.",
        )
    return _film(path.name, capture, [path])


def _film(name: str, capture: Any, files: Sequence[Path]) -> Source:
    """A video that ends, of which no frame is left out; without files it is behind a URL, which may fall silent."""
    _check_frames(name, capture)
    total = frame_count(capture)

    def frames() -> Iterator[Frame]:
        """Where a frame cannot be decoded the next one may: only their number tells the end."""
        checked = Checked(name)
        tried = read = failed = 0
        while failed < _PATIENCE and (tried < total or not failed):
            image = next_image(capture)
            failed = 0 if image is not None else failed + 1
            if image is not None:
                yield from checked(Frame(name, image, number=tried, seconds=seconds_of(capture, tried)))
                read += 1
            tried += 1
        yield from checked.rest()
        if read < total:
            yield Frame(name, None, f"{total - read} of {total} frames cannot be read", lost=total - read)

    film = Source(name, iter(()), files, _fps(capture), total or None)
    if files:
        return film._replace(frames=_released(capture, frames))
    given, close = closable(_released(capture, frames))
    return film._replace(frames=given, close=close)


def _live(name: str, address: int | str, decoder: Decoder) -> Source:
    """A camera or stream. A URL of a video that tells how many frames it has is read as a file is."""
    capture = interruptible(lambda: open_capture(address, decoder))
    if capture is None:
        raise UserError(
            f"{name} cannot be opened as {'a camera' if isinstance(address, int) else 'a video stream'}",
            "Is it there, and may you use it?",
        )
    if isinstance(address, str) and frame_count(capture):
        return _film(name, capture, [])
    _check_frames(name, capture)
    live = Live(name, capture, lambda: open_capture(address, decoder))
    return Source(name, live, fps=_fps(capture), live=True, close=live.close, wait=live.wait)


def _check_frames(name: str, capture: Any) -> None:
    """Raise UserError where the frames, as the stream tells their size, are larger than images may be."""
    cv2 = opencv()
    try:
        check_pixels(*(round(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)))
    except TooLarge as error:
        capture.release()
        raise UserError(f"{name} has frames that are too large: {error}", "Raise --max-pixels.") from error


def _fps(capture: Any) -> float:
    fps = float(capture.get(opencv().CAP_PROP_FPS))
    return fps if 0 < fps < 1000 else _FPS


def _released(capture: Any, frames: Callable[[], Iterator[Frame]]) -> Generator[Frame]:
    try:
        yield from frames()
    finally:
        capture.release()
