"""How fast models are from a source to the boxes, beside each other."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from acmix_deploy.document import Document
from acmix_deploy.errors import UserError
from acmix_deploy.files import expect
from acmix_deploy.options import Provider
from acmix_deploy.profile import Machine
from acmix_deploy.runtime.onnxruntime import usable_cores
from acmix_deploy.serving.detector import Detector
from acmix_deploy.serving.frames import Frame, Source
from acmix_deploy.serving.path import Clock, PathTimes, detect
from acmix_deploy.serving.sources import open_source


class ModelTimes(BaseModel):
    """What a file took."""

    file: str = Field(description="its path")
    rates: list[float] = Field(description="images a second in each round")
    times: PathTimes = Field(description="over all rounds")


class EndToEndDocument(Document):
    """Result of ``acmix-deploy profile --end-to-end``."""

    document: Literal["profile end-to-end"] = "profile end-to-end"
    source: str = Field(description="name of what was looked at")
    provider: Provider = Field(description="what ran the ONNX files")
    threads: int = Field(description="within an operator, on a CPU")
    models: list[ModelTimes] = Field(description="one for each file, in the order given")
    machine: Machine = Field(description="what it was measured on")


class _Turn(NamedTuple):
    source: Source
    batch: int
    images: int
    dropped: int
    seconds: float


def end_to_end(
    files: Sequence[Path],
    source: str,
    *,
    seconds: float = 30.0,
    rounds: int = 3,
    threads: int | None = None,
    plugin: Path | None = None,
    provider: Provider = "cpu",
) -> EndToEndDocument:
    """Have files detect in turn, several rounds of it, with one of them loaded at a time.

    Args:
        files: ONNX files, and engines with their manifests.
        source: an image, a folder of them, a video, or a camera by its index. It begins again where it ends.
        seconds: for each file, over all rounds; loading it not. At least one batch a round.
        rounds: how often each file has its turn.
        threads, plugin, provider: see :meth:`Detector.load`.

    Returns:
        The time of each step, and images a second, of each file.

    Raises:
        UserError, MissingComponent, CheckFailed: a file cannot be used or fails, or there is nothing in the source.
    """
    kinds = {expect(file, "onnx", "engine") for file in files}
    clocks = [Clock() for _ in files]
    for clock in clocks:
        clock.pause()
    turns: list[list[_Turn]] = [[] for _ in files]
    with tempfile.TemporaryDirectory() as engines:
        for _ in range(rounds):
            for index, file in enumerate(files):
                kept = Path(engines, str(index)) if provider == "tensorrt" else None
                with Detector.load(file, plugin=plugin, threads=threads, provider=provider, engines=kept) as detector:
                    turns[index].append(_turn(detector, source, clocks[index], seconds / rounds))
    return EndToEndDocument(
        source=turns[0][0].source.name,
        provider=provider,
        threads=threads or usable_cores(),
        models=[
            ModelTimes(
                file=str(file),
                rates=[turn.images / turn.seconds for turn in taken],
                times=clock.times(
                    taken[-1].source,
                    sum(turn.images for turn in taken),
                    taken[-1].batch,
                    sum(turn.dropped for turn in taken),
                ),
            )
            for file, clock, taken in zip(files, clocks, turns, strict=True)
        ],
        machine=Machine.this(on_gpu="engine" in kinds or provider != "cpu"),
    )


def _turn(detector: Detector, text: str, clock: Clock, seconds: float) -> _Turn:
    source = open_source(text)
    if not source.live:
        source = source._replace(frames=_again_and_again(source, text))
    images = dropped = 0
    start = time.perf_counter()
    clock.resume()
    with closing(detect(detector, source, clock)) as frames:
        try:
            for frame, found in frames:
                dropped += frame.dropped
                images += found is not None
                if time.perf_counter() - start > seconds and images:
                    break
        finally:
            clock.pause()
            took = time.perf_counter() - start
            source.close()
            source.wait()
    if not images:
        raise UserError(f"nothing in {source.name} can be read")
    return _Turn(source, detector.input_shape[0], images, dropped, took)


def _again_and_again(source: Source, text: str) -> Iterator[Frame]:
    """The frames of a source, and of the same one opened again; it ends where it has no image."""
    images = 1
    while images:
        images = 0
        for frame in source.frames:
            images += frame.image is not None
            yield frame
        source = open_source(text)
