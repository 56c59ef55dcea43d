"""Time ONNX files, engines and checkpoints, fairly against each other."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

from acmix_deploy.errors import UserError
from acmix_deploy.options import Provider
from acmix_deploy.profile.layers import Layer, between_conversions, in_planes
from acmix_deploy.profile.monitor import Conditions, Monitor, Power
from acmix_deploy.profile.subjects import Engine, RunSettings, Sample, Subject, layers_of, open_subject
from acmix_deploy.profile.timing import Profile
from acmix_deploy.profile.trtexec import read_times

_SETTLED = 0.05
"""By how much the medians of two windows of warm-up runs may differ."""
_MOST_WINDOWS = 10
_LOAD_SECONDS = (1.0, 2.0)
"""Load for power: before the first reading, since sensors average, and while reading."""


def profile(
    files: Sequence[Path],
    *,
    input_shape: tuple[int, ...] | None = None,
    samples: int | None = None,
    rounds: int = 3,
    seconds: float = 6.0,
    threads: int | None = None,
    plugin: Path | None = None,
    provider: Provider = "cpu",
    arch: str | None = None,
    trust: bool = False,
    code: Path | None = None,
    layers: bool = False,
    power: bool = False,
) -> list[Profile]:
    """Time files against each other, fairly: in rounds, each file in turn, with one of them open at a time.

    Idle threads of a second session spin and disturb the one being timed; one file after the other in a single round
    would charge a machine's passing load to one of them. Of an engine a CUDA graph is launched between events, between
    an upload from and a download to pinned memory, with one inference in flight.

    Args:
        files: ONNX files, engines, checkpoints, and times that trtexec exported (.json), which are only read.
        input_shape, threads, plugin, provider, arch, trust, code: see :class:`RunSettings`.
        samples: latencies to count for each file, over all rounds; fewer when the time is over, at least one a round.
            By default 1000 on a GPU, 50 on a CPU.
        rounds: how often each file has its turn.
        seconds: time for each file, warm-up included; opening it, layers and power not.
        layers: also time every layer, after all rounds.
        power: also measure power, in each round after its latencies, under the same load.

    Returns:
        One for each file, in their order.

    Raises:
        UserError: a file does not exist, cannot be loaded, or does not run at the shape; or its layers are not timed.
        MissingComponent: what an engine, a checkpoint or the provider needs is not there, or nothing tells power.
        CheckFailed: TensorRT does not run an engine.
    """
    setup = RunSettings(
        input_shape=input_shape, threads=threads, plugin=plugin, provider=provider, arch=arch, trust=trust, code=code
    )
    exported = {index: read_times(file) for index, file in enumerate(files) if file.suffix == ".json"}
    with keeping_engines(setup) as setup:
        subjects = {index: open_subject(file, setup) for index, file in enumerate(files) if index not in exported}
        if plugin and not any(_takes_plugin(subject) for subject in subjects.values()):
            raise UserError(
                f"{plugin} is for engines and --provider tensorrt, and there is nothing of these", "Leave out --plugin."
            )
        time_layers = {index: layers_of(subject) for index, subject in subjects.items()} if layers else {}
        monitors = {on_gpu: Monitor(nvml=on_gpu) for on_gpu in {subject.on_gpu for subject in subjects.values()}}
        for monitor in monitors.values():
            if power:
                monitor.need_power()
        turns: dict[int, list[Taken]] = {index: [] for index in subjects}
        for _ in range(rounds):
            for index, subject in subjects.items():
                share = -(-(samples or subject.samples) // rounds)
                turns[index].append(take_turn(subject, monitors[subject.on_gpu], share, seconds / rounds, power))
    found = {index: times() for index, times in time_layers.items()}
    timed = {index: _profile(subject, turns[index], found.get(index, ())) for index, subject in subjects.items()}
    profiles = [profile for _, profile in sorted({**exported, **timed}.items())]
    names = [file.name for file in files]
    return [
        profile.model_copy(update={"file": str(file)}) if names.count(file.name) > 1 else profile
        for file, profile in zip(files, profiles, strict=True)
    ]


@contextmanager
def keeping_engines(setup: RunSettings) -> Iterator[RunSettings]:
    """The setup with a folder, for as long as the block lasts, in which provider tensorrt finds what it built before:
    by itself it builds anew for every session."""
    if setup.provider != "tensorrt":
        yield setup
        return
    with tempfile.TemporaryDirectory() as folder:
        yield setup.model_copy(update={"engines": Path(folder)})


def _takes_plugin(subject: Subject) -> bool:
    return isinstance(subject, Engine) or subject.plugin_sha256 is not None


class Taken(NamedTuple):
    """One file's turn in a round; fields as in :class:`Profile`."""

    warmup_runs: int
    stable: bool
    samples: list[Sample]
    conditions: tuple[Conditions, Conditions]
    readings: list[Conditions]
    """Under load, where power is asked for."""
    inference_ms: float
    """Under that load."""


def take_turn(subject: Subject, monitor: Monitor, samples: int, seconds: float, power: bool = False) -> Taken:
    """Open a file, warm it up until its latency settles, count samples and close it.

    Args:
        subject: what is timed.
        monitor: reads the conditions before and after.
        samples: how many to count; fewer when the time is over, at least one.
        seconds: time for warm-up, at most half of it, and samples.
        power: also load it for :data:`_LOAD_SECONDS` and read conditions meanwhile.
    """
    with subject.open() as run:
        before, processes = monitor.read(), monitor.processes()
        start = time.perf_counter()
        window, warmup = subject.window, [run().alone]
        while (
            not _settled(warmup, window)
            and len(warmup) < _MOST_WINDOWS * window
            and time.perf_counter() < start + seconds / 2
        ):
            warmup.append(run().alone)
        counted = [run()]
        while len(counted) < samples and time.perf_counter() < start + seconds:
            counted.append(run())
        after = monitor.read_since(processes)
        readings, inference_ms = _under_load(run, monitor) if power else ([], 0.0)
    stable = _settled(warmup, window)
    return Taken(1 + len(warmup), stable, counted, (before, after), readings, inference_ms)


def _settled(warmup: Sequence[float], window: int) -> bool:
    if len(warmup) < 2 * window:
        return False
    before, now = median(warmup[-2 * window : -window]), median(warmup[-window:])
    return abs(now - before) <= _SETTLED * before


def _under_load(run: Callable[[], Sample], monitor: Monitor) -> tuple[list[Conditions], float]:
    """Readings while a model runs again and again, and the time that each run took in ms."""
    first, rest = _LOAD_SECONDS
    _repeat(run, first)
    with monitor.watching() as readings:
        inference_ms = _repeat(run, rest)
    return readings, inference_ms


def _repeat(run: Callable[[], Sample], seconds: float) -> float:
    """Run for some seconds, at least once; the time that a run took in ms."""
    start = time.perf_counter()
    runs = 0
    while not runs or time.perf_counter() < start + seconds:
        run()
        runs += 1
    return (time.perf_counter() - start) * 1e3 / runs


def _profile(subject: Subject, taken: Sequence[Taken], layers: tuple[Layer, ...]) -> Profile:
    shapes = {name: array.shape for name, array in subject.feed.items()}
    samples = [sample for turn in taken for sample in turn.samples]
    transfers = tuple(sample.with_transfers for sample in samples if sample.with_transfers is not None)
    conditions = [reading for turn in taken for reading in turn.conditions]
    readings = [reading for turn in taken for reading in turn.readings]
    power = None
    if readings:
        images = next(iter(shapes.values()))[0]
        power = Power.of(readings, fmean(turn.inference_ms for turn in taken), images)
    return Profile(
        file=subject.file.name,
        input_shapes=shapes,
        provider=subject.provider,
        precision=subject.precision,
        threads=subject.threads,
        rounds=len(taken),
        round_samples=tuple(len(turn.samples) for turn in taken),
        warmup_runs=sum(turn.warmup_runs for turn in taken),
        stable=all(turn.stable for turn in taken),
        samples_ms=tuple(sample.alone for sample in samples),
        with_transfers_ms=transfers or None,
        conditions=tuple(conditions) if any(reading.known for reading in conditions) else (),
        power=power,
        layers=layers,
        machine=subject.machine,
        notes=(*subject.notes, *between_conversions(layers), *in_planes(layers)),
    )
