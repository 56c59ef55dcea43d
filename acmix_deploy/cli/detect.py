"""Detect in images, folders, videos and cameras: boxes as text or JSON lines, and drawn.

example:
  acmix-deploy detect model.engine photos -o found
  acmix-deploy detect model.engine street.mp4 --json -o found.mp4
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, get_args

from acmix_deploy.cli.common import (
    FILES,
    add_detector,
    add_max_pixels,
    console,
    limit_pixels,
    print_line,
    progress,
    tell,
)
from acmix_deploy.errors import UserError
from acmix_deploy.options import Decoder

if TYPE_CHECKING:
    from acmix_deploy.serving.frames import Frame, Source
    from acmix_deploy.serving.path import PathTimes
    from acmix_deploy.serving.sources import DetectDocument

_EVERY = 2.0  # seconds between two lines of progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file, or engine with its manifest")
    source = parser.add_argument("source", help="image, folder of images, video, index of a camera, or URL of a stream")
    source.complete = FILES  # type: ignore[attr-defined]
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="also draw the boxes: a folder for images, an .mp4 or .avi else",
    )
    parser.add_argument(
        "--decoder",
        choices=get_args(Decoder),
        default="auto",
        help="what decodes and encodes video; auto: gstreamer on a Jetson whose OpenCV is built with it, else opencv",
    )
    parser.add_argument(
        "--fast-decode",
        action="store_true",
        help="decode JPEG files of at least twice the size that the model sees at a half, quarter or eighth of it: "
        "boxes move a little",
    )
    parser.add_argument(
        "--stats", action="store_true", help="also tell the time of each step, and which of them the others wait for"
    )
    add_detector(parser)
    add_max_pixels(parser)


def run(options: argparse.Namespace) -> int:
    limit_pixels(options)
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # broken videos are told of in our own words
    from acmix_deploy.serving.annotate import annotate, open_output
    from acmix_deploy.serving.detector import Detector
    from acmix_deploy.serving.path import Clock, detect
    from acmix_deploy.serving.sources import DetectDocument, open_source, reduced

    if options.fast_decode and options.output:
        raise UserError("--fast-decode leaves no whole pictures for --output to draw into", "Leave one of both out.")
    source = open_source(options.source, options.decoder)
    output = open_output(options.output, source, options.decoder) if options.output else nullcontext()
    with progress() as report_progress:
        report_progress(f"loading {options.model}")
        with (
            Detector.load(
                options.model, plugin=options.plugin, confidence=options.confidence, provider=options.provider
            ) as detector,
            output as write,
            _closed_by_signals(source),
        ):
            if detector.note:
                tell(f"Note: {detector.note}")
            if options.fast_decode:
                source = reduced(source, detector.place)
            seen, clock = _Seen(source.total), Clock()
            try:
                with closing(detect(detector, source, clock)) as frames:
                    for frame, found in frames:
                        _tell(DetectDocument.of(frame, found, detector.names), as_json=options.json)
                        if write and frame.image is not None and found is not None:
                            with clock.step("draw"):
                                drawn = annotate(frame.image, found, detector.names)
                                for _ in range(1 + frame.dropped):  # the video is as long as what it shows took
                                    write(frame.source, drawn)
                        seen.add(frame, report_progress)
            finally:
                if seen.images or seen.skipped:
                    tell(seen)
                if options.stats:
                    times = clock.times(source, seen.images, detector.input_shape[0], seen.dropped, seen.skipped)
                    _tell_times(options, source.name, times)
    if not seen.images:
        raise UserError(f"nothing in {source.name} can be read")
    return 0


class _Seen:
    """What came of a source until now."""

    def __init__(self, total: int | None) -> None:
        self.images = self.dropped = self.skipped = 0
        self._total = f" of {total}" if total else ""
        self._start = self._told = time.perf_counter()

    def add(self, frame: Frame, report_progress: Callable[[str], None]) -> None:
        self.images += frame.image is not None
        self.skipped += frame.lost
        self.dropped += frame.dropped
        if time.perf_counter() - self._told > _EVERY:
            self._told = time.perf_counter()
            report_progress(f"{self.images}{self._total} images, {self._rate}")

    @property
    def _rate(self) -> str:
        return f"{self.images / (time.perf_counter() - self._start):.1f} a second"

    def __str__(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        dropped = f", {self.dropped} dropped" if self.dropped else ""
        return f"{self.images} images{skipped}{dropped}, {self._rate}"


def _tell(line: DetectDocument, *, as_json: bool) -> None:
    if as_json:
        print_line(line.model_dump_json(by_alias=True, exclude_none=True))
    if line.problem:
        print(line, file=sys.stderr)
    elif not as_json:
        print_line(str(line))


def _tell_times(options: argparse.Namespace, source: str, times: PathTimes) -> None:
    if options.json:
        from acmix_deploy.serving.path import DetectStats

        print_line(DetectStats(source=source, times=times).model_dump_json(by_alias=True, exclude_none=True))
        return
    from acmix_deploy.report.show_path import show_times

    show_times([(options.model.name, times)], console(stderr=True))


@contextmanager
def _closed_by_signals(source: Source) -> Iterator[None]:
    """A signal ends a live source before anything else: threads that wait for its next frame are waited for."""

    def closed(before: Callable[[int, FrameType | None], object]) -> Callable[[int, FrameType | None], None]:
        def handler(number: int, where: FrameType | None) -> None:
            source.close()
            before(number, where)

        return handler

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, before in handlers.items():
            if callable(before):
                signal.signal(number, closed(before))
        yield
    finally:
        source.close()
        for number, before in handlers.items():
            if callable(before):
                signal.signal(number, before)
