"""Time ONNX files on ONNX Runtime's CPU provider."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import onnxruntime

from acmix_deploy.errors import UserError
from acmix_deploy.profile.timing import Machine, Profile
from acmix_deploy.runtime.inputs import random_images
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.runtime.onnxruntime import PROVIDER, element_type, inputs_of, open_session, usable_cores
from acmix_deploy.runtime.reason import reason

FP16_NOTE = "CPU latency; FP16 on a CPU predicts nothing for a GPU"

_WINDOW = 3  # runs whose median must not move by more than _SETTLED
_SETTLED = 0.05
_MOST_WARMUP_RUNS = 30


def profile(
    files: Sequence[Path],
    *,
    input_shape: Sequence[int] = (1, 3, 640, 640),
    samples: int = 50,
    rounds: int = 3,
    seconds: float = 6.0,
    threads: int | None = None,
) -> list[Profile]:
    """Time files against each other, fairly: in rounds, each file in turn, with one live session at a time.

    Idle threads of a second session spin and disturb the one being timed; one file after the other in a single round
    would charge a machine's passing load to one of them.

    Args:
        files: ONNX files.
        input_shape: sizes for the axes that are free; fixed ones are the file's.
        samples: latencies to count for each file, over all rounds; fewer when the time is over, at least one a round.
        rounds: how often each file has its turn.
        seconds: time for each file, warm-up included, session creation not.
        threads: threads within an operator; by default one for each core the process may use.

    Raises:
        UserError: a file does not exist, cannot be loaded, or does not run at the shape.
    """
    turns: list[list[_Turn]] = [[] for _ in files]
    for _ in range(rounds):
        for file, taken in zip(files, turns, strict=True):
            taken.append(_take_turn(file, input_shape, -(-samples // rounds), seconds / rounds, threads))
    machine = Machine.this()
    return [
        Profile(
            file=file.name,
            input_shapes=taken[0].input_shapes,
            provider=PROVIDER,
            threads=threads or usable_cores(),
            rounds=rounds,
            warmup_runs=sum(turn.warmup_runs for turn in taken),
            stable=all(turn.stable for turn in taken),
            samples_ms=tuple(sample for turn in taken for sample in turn.samples_ms),
            machine=machine,
            note=FP16_NOTE if element_type(file) == "float16" else "",
        )
        for file, taken in zip(files, turns, strict=True)
    ]


class _Turn(NamedTuple):
    """One file's share of a round; fields as in :class:`Profile`."""

    input_shapes: dict[str, tuple[int, ...]]
    warmup_runs: int
    stable: bool
    samples_ms: list[float]


def _take_turn(file: Path, input_shape: Sequence[int], samples: int, seconds: float, threads: int | None) -> _Turn:
    """Open a session, warm it up until its latency settles, count samples and drop it."""
    session = open_session(file, threads)
    feed = _feed(file, session, input_shape)
    shapes = {name: array.shape for name, array in feed.items()}
    start = time.perf_counter()
    try:
        session.run(None, feed)  # memory is planned and allocated here
    except Exception as error:  # ONNX Runtime's error types share no base of their own
        raise UserError(f"{file} does not run on {shapes}: {reason(error)}") from error
    warmup = [_milliseconds(session, feed)]
    while not _settled(warmup) and len(warmup) < _MOST_WARMUP_RUNS and time.perf_counter() < start + seconds / 2:
        warmup.append(_milliseconds(session, feed))
    counted = [_milliseconds(session, feed)]
    while len(counted) < samples and time.perf_counter() < start + seconds:
        counted.append(_milliseconds(session, feed))
    return _Turn(shapes, 1 + len(warmup), _settled(warmup), counted)


def _settled(warmup: Sequence[float]) -> bool:
    if len(warmup) < 2 * _WINDOW:
        return False
    before, now = median(warmup[-2 * _WINDOW : -_WINDOW]), median(warmup[-_WINDOW:])
    return abs(now - before) <= _SETTLED * before


def _milliseconds(session: onnxruntime.InferenceSession, feed: Mapping[str, Array]) -> float:
    start = time.perf_counter()
    session.run(None, feed)
    return (time.perf_counter() - start) * 1e3


def _feed(file: Path, session: onnxruntime.InferenceSession, input_shape: Sequence[int]) -> dict[str, Array]:
    feed: dict[str, Array] = {}
    for name, dims, dtype in inputs_of(session):
        if len(dims) != len(input_shape):
            raise UserError(f"{file} takes {name} of {list(dims)}; a shape like {list(input_shape)} is expected")
        shape = tuple(dim if isinstance(dim, int) else size for dim, size in zip(dims, input_shape, strict=True))
        feed[name] = random_images(shape).astype(dtype)
    return feed
