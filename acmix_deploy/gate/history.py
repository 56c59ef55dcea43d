"""How a model's latency went over many stored measurements: a step, a trend, or neither.

References: Pettitt, Applied Statistics 28 (1979), for the step; Sen, Journal of the American Statistical Association 63
(1968), for the slope. Probabilities are those of random permutations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.errors import UserError
from acmix_deploy.gate.compare import differences
from acmix_deploy.gate.read import read_samples
from acmix_deploy.gate.samples import Measured

_BY_CHANCE = 0.05
"""Probability below which something is called a step or a trend."""
_PERMUTATIONS = 9999

_LAST = datetime.max.replace(tzinfo=timezone.utc)

_Floats = NDArray[np.float64]


class Run(BaseModel):
    """One measurement."""

    model_config = ConfigDict(frozen=True)

    file: str = Field(description="the file that it is stored in")
    started: datetime | None = Field(description="when it began; None where the samples do not tell")
    median_ms: float = Field(description="median over its rounds of the median of each")
    ratio: float = Field(description="that over the first run's")
    changed: tuple[str, ...] = Field(description="what is not as in the run before: hashes, driver, clocks")


class Drift(BaseModel):
    """What the runs have besides noise: whichever of a step and a line fits them better."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["step", "trend"] = Field(description="step: from one run to the next; trend: a little with every run")
    since: str = Field(description="the file of the first run behind the step; of a trend, of the first of all")
    ratio: float = Field(description="of the medians behind and before the step; of the trend's end and start")
    p: float = Field(description="how often the same runs in random order show as much")


class GateHistory(BaseModel):
    """One model over time."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(description="file name, without its folder")
    runs: tuple[Run, ...] = Field(description="in the order of time")
    drift: Drift | None = Field(description="None where noise explains all")


def read_history(folder: Path) -> tuple[list[GateHistory], list[str]]:
    """The candidates of all measurements in a folder, with steps and trends of their latency.

    Args:
        folder: holds what :func:`gate_run` wrote, a file for each run.

    Returns:
        One history for each model, by the name of its file; and what was left out, and why.

    Raises:
        UserError: it is no folder, or no file in it holds samples.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "Give a folder with what `gate run` wrote, a file for each run.")
    named: list[tuple[str, Measured]] = []
    notes: list[str] = []
    for file in sorted(folder.glob("*.json")):
        try:
            named += [(file.name, samples.candidate) for samples in read_samples(file)]
        except UserError as error:
            notes.append(error.message)
    if not named:
        raise UserError("; ".join([f"{folder} holds no measurement", *notes]), "Keep there what `gate run` writes.")
    return histories(named), notes


def histories(named: Iterable[tuple[str, Measured]]) -> list[GateHistory]:
    """The same of measurements, each with the name of its file."""
    models: dict[str, list[tuple[str, Measured]]] = {}
    for file, measured in named:
        if measured.rounds:
            models.setdefault(Path(measured.model).name, []).append((file, measured))
    return [_history(model, found) for model, found in models.items()]


def _history(model: str, found: Sequence[tuple[str, Measured]]) -> GateHistory:
    ordered = sorted(found, key=lambda entry: (entry[1].started or _LAST, entry[0]))
    medians = [_median(measured) for _, measured in ordered]
    runs = tuple(
        Run(
            file=file,
            started=measured.started,
            median_ms=value,
            ratio=value / medians[0],
            changed=_changed(ordered[index - 1][1], measured) if index else (),
        )
        for index, ((file, measured), value) in enumerate(zip(ordered, medians, strict=True))
    )
    return GateHistory(model=model, runs=runs, drift=_drift([run.file for run in runs], medians))


def _median(measured: Measured) -> float:
    return median(median(one.samples_ms) for one in measured.rounds)


def _changed(before: Measured, now: Measured) -> tuple[str, ...]:
    def system(measured: Measured) -> str | None:
        return measured.machine.system if measured.machine else None

    names = {"model": (before.sha256, now.sha256), "plugin": (before.plugin_sha256, now.plugin_sha256)}
    hashes = [f"{name}: another file" for name, (old, new) in names.items() if old != new]
    systems = [f"system: {system(before)} against {system(now)}"] if system(before) != system(now) else []
    return (*hashes, *map(str, differences(before, now)), *systems)


def _drift(files: Sequence[str], medians: Sequence[float]) -> Drift | None:
    """A step or a trend of the logarithms of medians, by ranks: one wild run has little weight."""
    logs, time = np.log(medians), np.arange(len(medians))
    if len(logs) < 2:
        return None
    _, place, count = np.unique(logs, return_inverse=True, return_counts=True)
    ranks = (count.cumsum() - (count + len(logs)) / 2)[place]  # means where equal; their own mean is 0
    shuffled = np.random.default_rng(0).permuted(np.tile(ranks, (_PERMUTATIONS, 1)), axis=1)
    ranks = np.vstack([ranks, shuffled])
    steps, trends = np.abs(ranks.cumsum(axis=1)), np.abs(ranks @ time)
    first = int(steps[0, :-1].argmax()) + 1  # behind the step
    step = np.where(time < first, np.median(logs[:first]), np.median(logs[first:]))
    earlier, later = np.triu_indices(len(logs), 1)
    line = np.median((logs[later] - logs[earlier]) / (later - earlier)) * time
    line += np.median(logs - line)
    if np.abs(logs - step).sum() < np.abs(logs - line).sum():
        found = _found("step", files[first], step, steps.max(axis=1))
    else:
        found = _found("trend", files[0], line, trends)
    return found if found.p < _BY_CHANCE else None


def _found(kind: Literal["step", "trend"], since: str, fit: _Floats, statistic: _Floats) -> Drift:
    """Args: the logarithm of each run as it should be; the statistic of the runs, then of their permutations."""
    p = float(np.mean(statistic >= statistic[0]))
    return Drift(kind=kind, since=since, ratio=math.exp(fit[-1] - fit[0]), p=p)
