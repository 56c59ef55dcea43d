"""Videos, cameras and streams opened, and videos written, by OpenCV: with what it has, or through GStreamer."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from acmix_deploy.detection.images import Image, opencv
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.options import Decoder
from acmix_deploy.serving import gstreamer
from acmix_deploy.serving.gstreamer import JETSON, SOFTWARE, Elements

CODECS = {".avi": "MJPG", ".mp4": "mp4v"}
"""What OpenCV's own packages can write, by the file's suffix."""

TIMEOUT_MS = 10_000
"""For a URL to answer, and for its next frame to come."""


def elements(decoder: Decoder) -> Elements | None:
    """Those of GStreamer that are taken on this machine; None where OpenCV takes what it has.

    "auto" is "gstreamer" on a Jetson whose OpenCV was built with it, else "opencv".

    Raises:
        MissingComponent: GStreamer is asked for, and OpenCV was built without it.
    """
    if decoder == "opencv":
        return None
    built_with = _has_gstreamer()
    if decoder == "gstreamer" and not built_with:
        raise MissingComponent(
            "OpenCV is built without GStreamer here, as those of pip are",
            "Take an OpenCV that is built with it, such as Debian's or JetPack's python3-opencv, or --decoder opencv.",
        )
    if built_with and gstreamer.has_element("nvv4l2decoder"):
        return JETSON
    return SOFTWARE if decoder == "gstreamer" else None


@cache
def _has_gstreamer() -> bool:
    return bool(re.search(r"GStreamer:\s*YES", opencv().getBuildInformation()))


def open_capture(source: Path | int | str, decoder: Decoder = "auto") -> Any:
    """OpenCV's VideoCapture of a video file, the index of a camera or a URL; None where it cannot be opened.

    Raises:
        UserError: a camera of a Jetson that is none.
        MissingComponent: OpenCV is not installed, or the decoder is not there.
    """
    cv2, taken = opencv(), elements(decoder)
    timeouts: list[int] = []
    if isinstance(source, str):
        timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT_MS]
        if urlsplit(source).scheme == gstreamer.CSI:
            _check_csi(source, taken)
    if taken:
        capture = cv2.VideoCapture(gstreamer.reading(source, taken), cv2.CAP_GSTREAMER, timeouts)
    else:
        address = str(source.resolve()) if isinstance(source, Path) else source
        capture = cv2.VideoCapture(address, cv2.CAP_ANY, timeouts)
    return capture if capture.isOpened() else None


def _check_csi(source: str, taken: Elements | None) -> None:
    if not urlsplit(source).netloc.isdecimal():
        raise UserError(f"{source} is no camera of a Jetson", "They are csi://0, csi://1 and so on.")
    if taken is None:
        raise MissingComponent(
            f"{source} needs a Jetson and an OpenCV that is built with GStreamer", "Is --decoder opencv given?"
        )


def next_image(capture: Any) -> Image | None:
    """The next frame [h, w, 3] in BGR; None at the end, and where it cannot be decoded."""
    done, image = capture.read()
    return image if done else None


def seconds_of(capture: Any, number: int) -> float | None:
    """From the start of a video to a frame that has just been read; None where it is not known.

    Of GStreamer OpenCV tells how far the pipeline is, which is ahead of the frame: the frame's number tells it there.
    """
    cv2 = opencv()
    if capture.getBackendName() != "GSTREAMER":
        return round(float(capture.get(cv2.CAP_PROP_POS_MSEC)) / 1e3, 3)
    fps = float(capture.get(cv2.CAP_PROP_FPS))
    return round(number / fps, 3) if fps > 0 else None


def frame_count(capture: Any) -> int:
    """How many frames a video tells to have; 0 of a stream, and where GStreamer decodes, which guesses."""
    if capture.getBackendName() == "GSTREAMER":
        return 0
    return max(0, int(capture.get(opencv().CAP_PROP_FRAME_COUNT)))


class Writer(NamedTuple):
    """An open video file."""

    cv2_writer: Any
    file: Any = None
    """What GStreamer writes to."""

    def release(self) -> None:
        """Finish the file."""
        self.cv2_writer.release()
        if self.file:
            self.file.close()


def open_writer(path: Path, fps: float, size: tuple[int, int], decoder: Decoder = "auto") -> Writer | None:
    """A video file to write to: by a Jetson's encoder where :func:`elements` has one and the suffix is .mp4, else with
    :data:`CODECS`. None where it cannot be opened.

    Args:
        path: ends in one of :data:`CODECS`.
        fps: frames in a second.
        size: width and height of the frames, even.
    """
    cv2, taken = opencv(), elements(decoder)
    if taken and taken.encode and path.suffix.lower() == ".mp4":
        file = path.open("wb")
        pipeline = gstreamer.writing(file.fileno(), size, fps, taken)
        writer = cv2.VideoWriter(pipeline, cv2.CAP_GSTREAMER, 0, fps, size, True)
        if writer.isOpened():
            return Writer(writer, file)
        file.close()  # an Orin Nano has no encoder
    code = cv2.VideoWriter_fourcc(*CODECS[path.suffix.lower()])
    writer = cv2.VideoWriter(str(path.resolve()), code, fps, size)
    return Writer(writer) if writer.isOpened() else None
