"""Detections drawn into the images they were made in, as image files or as a video."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

from acmix_deploy.artifacts import no_space, replacing
from acmix_deploy.detection.boxes import Detections, named
from acmix_deploy.detection.drawing import PALETTE, draw_box, draw_outlines, draw_points, draw_text
from acmix_deploy.detection.images import Image, opencv
from acmix_deploy.detection.listing import IMAGE_SUFFIXES
from acmix_deploy.errors import UserError
from acmix_deploy.options import Decoder
from acmix_deploy.serving.frames import Source
from acmix_deploy.serving.video import CODECS, Writer, frame_count, open_writer

Write = Callable[[str, Image], None]
"""Writes an annotated image that came from a file of a name; frames of a video in their order."""

_RESERVE = 1 << 20  # bytes that a video leaves free on the disk, to be finished with


def annotate(image: Image, found: Detections, names: Mapping[int, str]) -> Image:
    """A copy of an image [h, w, 3] in BGR with names, scores and what a task has: boxes, masks, keypoints, rotated
    boxes, or the classes of the image as lines of text. The highest score is on top."""
    drawn: Image = image.copy()
    rows = [(PALETTE[kind % len(PALETTE)], one) for kind, one in zip(found.classes, named(found, names), strict=True)]
    for colour, one in rows:
        draw_outlines(drawn, one.mask or [], colour, filled=True)
    for place, (colour, one) in reversed(list(enumerate(rows, 1))):
        text = f"{one.name} {one.score:.2f}"
        if found.of_image:
            draw_text(drawn, (0, round(place * drawn.shape[0] / (len(rows) + 1))), text, colour)
        elif one.corners:
            draw_outlines(drawn, [one.corners], colour, filled=False)
            draw_text(drawn, (round(one.box[0]), round(one.box[1])), text, colour)
        else:
            draw_box(drawn, one.box, text, colour)
        draw_points(drawn, one.keypoints or [], colour)
    return drawn


def open_output(out: Path, source: Source, decoder: Decoder = "auto") -> AbstractContextManager[Write]:
    """Where annotated images go: of a video to a video, of a folder to a folder, of an image to either of its kind.

    What was written before something fails or is interrupted stays, a video up to its last frame.

    Args:
        out: a folder, or a file by its suffix.
        source: what is drawn into.
        decoder: what encodes a video.

    Raises:
        UserError: it does not fit the source, would overwrite it, or cannot be written; the disk is full.
    """
    suffix = out.suffix.lower()
    if source.fps and suffix not in CODECS:
        raise UserError(f"{out} does not end like a video", f"Videos end in one of {', '.join(sorted(CODECS))}.")
    if not source.fps and suffix in CODECS:
        raise UserError(f"{out} ends like a video, and {source.name} is none", "Name a folder.")
    one = source.fps or (suffix in IMAGE_SUFFIXES and len(source.files) == 1 and not out.is_dir())
    targets = {file.name: out if one else out / file.name for file in source.files}
    for file in source.files:
        if targets[file.name].resolve() == file.resolve():
            raise UserError(f"{file} would be overwritten", "Name another place.")
    return _video(out, source.fps, decoder) if source.fps else _pictures(targets)


@contextmanager
def _pictures(targets: Mapping[str, Path]) -> Iterator[Write]:
    def write(name: str, image: Image) -> None:
        target = targets[name]
        done, data = opencv().imencode(target.suffix.lower(), image)
        assert done
        with replacing(target) as temporary:
            temporary.write_bytes(data.tobytes())

    yield write


@contextmanager
def _video(path: Path, fps: float, decoder: Decoder) -> Iterator[Write]:
    """OpenCV tells nothing of a full disk: there has to be room before each frame, and all frames in the end."""
    cv2 = opencv()
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}{path.suffix}")
    writer: Writer | None = None
    size, written = (0, 0), 0

    def write(_: str, image: Image) -> None:
        nonlocal writer, size, written
        if writer is None:
            height, width = image.shape[:2]
            size = width + width % 2, height + height % 2  # codecs cut off what is odd
            writer = _writer(temporary, path, fps, size, decoder)
        if shutil.disk_usage(path.parent).free < image.nbytes + _RESERVE:
            raise no_space(path, f"less than {(image.nbytes + _RESERVE) / 1e6:.1f} MB are free")
        if (image.shape[1], image.shape[0]) != size:
            image = _fitted(image, size)
        writer.cv2_writer.write(image)
        written += 1

    try:
        yield write
    finally:
        if writer is not None:
            writer.release()
            temporary.replace(path)
    if writer is not None:
        capture = cv2.VideoCapture(str(path.resolve()))
        there = 0
        if capture.isOpened():
            there = written if capture.getBackendName() == "GSTREAMER" else frame_count(capture)
        capture.release()
        if there != written:
            raise no_space(path, f"of {written} frames {there} have arrived")


def _writer(temporary: Path, path: Path, fps: float, size: tuple[int, int], decoder: Decoder) -> Writer:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", "Choose a folder that you may write to.") from error
    writer = open_writer(temporary, fps, size, decoder)
    if writer is None:
        temporary.unlink()
        raise UserError(f"OpenCV here cannot write {path}", f"Try another of {', '.join(sorted(CODECS))}.")
    return writer


def _fitted(image: Image, size: tuple[int, int]) -> Image:
    """The image in another size: a row or a column repeated where that suffices, else resized."""
    cv2 = opencv()
    right, below = size[0] - image.shape[1], size[1] - image.shape[0]
    if {right, below} <= {0, 1}:
        return np.asarray(cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE))
    return np.asarray(cv2.resize(image, size))
