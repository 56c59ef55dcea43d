"""Which layers to leave in floating point so that a file in INT8 meets a target: as few as are found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import onnx
from pydantic import BaseModel, ConfigDict, Field

Figures = Mapping[str, float]
Excluded = frozenset[str]
"""Names of layers that are left in floating point."""


class Judge(Protocol):
    """Tells what a model loses against the float one, on images that both see."""

    @property
    def reference(self) -> Figures:
        """Of the float model, by name."""

    @property
    def images(self) -> Sequence[Path]:
        """What it judges on."""

    @property
    def notes(self) -> Sequence[str]:
        """What to say of the images, and of how much can be told from them."""

    def __call__(self, model: onnx.ModelProto) -> Figures:
        """What the model reaches and loses, by name; the lower, the better where there is a limit."""


class Goal(NamedTuple):
    """What an INT8 file has to reach."""

    limits: Figures
    """The largest of each figure that is accepted."""
    judge: Callable[[Path, tuple[int, ...]], Judge]
    """Measures the float file at [B, C, H, W]."""
    seconds: float | None = None
    """After which no other set of layers is tried."""


class SearchStep(BaseModel):
    """One set of layers that was tried."""

    model_config = ConfigDict(frozen=True)

    trial: str = Field(description="what was tried")
    layers: int = Field(description="layers in INT8")
    multiply_adds: float = Field(description="share of the multiply-adds that is in INT8, 0 to 1")
    figures: dict[str, float] = Field(description="what the file reaches, and what it loses against the float file")
    met: bool = Field(description="whether all that it loses is within the limits")
    seconds: float = Field(description="that it took")


class SearchReport(BaseModel):
    """How the layers that are left in floating point were found."""

    model_config = ConfigDict(frozen=True)

    limits: dict[str, float] = Field(
        description="what may be lost at most: map_drop, in points of mAP50-95; or lost, a share of the detections, "
        "and score_change, on average"
    )
    reference: dict[str, float] = Field(description="what the float file reaches")
    images: int = Field(description="images that every file was judged on")
    steps: list[SearchStep] = Field(description="the sets that were tried, in order")
    chosen: int = Field(description="index of the step whose layers the file has")
    excluded: list[str] = Field(
        description="layers left in floating point for it. None of them could be taken back when that was tried; sets "
        "that were not tried may be smaller"
    )
    stopped: Literal["", "time limit", "interrupted"] = Field(description="what ended the search before its end")

    @property
    def best(self) -> SearchStep:
        """That of the file."""
        return self.steps[self.chosen]

    @property
    def met(self) -> bool:
        """Whether the file is within the limits."""
        return self.best.met


def search(
    layers: Mapping[str, int],
    total: int,
    write: Callable[[Excluded], onnx.ModelProto],
    judge: Judge,
    goal: Goal,
    progress: Callable[[str], None],
) -> SearchReport:
    """Find few layers that a file has to keep in floating point to be within the limits.

    First the worst layers are left out, one, two, four and so on, until the target is met, and the number is found by
    bisection. Then it is tried to take them back, half of them at once, and where that fails half of these, down to
    single ones.

    Args:
        layers: the multiply-adds of each that can be INT8, by name, the most sensitive first.
        total: multiply-adds of all layers, with those that cannot.
        write: makes the model with all of ``layers`` but these in INT8.
        judge: measures it.
        goal: what is accepted.
        progress: told of every step.

    Raises:
        KeyboardInterrupt: before the first set was judged; later ones end the search alone.
    """
    run = _Search(layers, total, write, judge, goal, progress)
    stopped: Literal["", "time limit", "interrupted"] = ""
    try:
        run.all()
    except _TimeIsUp:
        stopped = "time limit"
    except KeyboardInterrupt:
        if not run.steps:
            raise
        stopped = "interrupted"
        progress("interrupted, writing the best file so far")
    best = min(run.steps, key=run.rank)
    return SearchReport(
        limits=dict(goal.limits),
        reference=dict(judge.reference),
        images=len(judge.images),
        steps=list(run.steps.values()),
        chosen=list(run.steps).index(best),
        excluded=[name for name in layers if name in best],
        stopped=stopped,
    )


class _TimeIsUp(Exception):
    pass


@dataclass
class _Search:
    layers: Mapping[str, int]
    total: int
    write: Callable[[Excluded], onnx.ModelProto]
    judge: Judge
    goal: Goal
    progress: Callable[[str], None]
    steps: dict[Excluded, SearchStep] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + (math.inf if self.goal.seconds is None else self.goal.seconds)

    def all(self) -> None:
        """Try sets until none is left to be tried. Raises _TimeIsUp."""
        if self._meets(frozenset(), "all in INT8"):
            return
        names = list(self.layers)
        fails, count, most = 0, 1, len(names) - 1  # a file without any layer in INT8 is none

        def without(count: int) -> bool:
            return self._meets(frozenset(names[:count]), f"the worst {count} in float")

        while not without(count := min(count, most)):
            if count >= most:
                return
            fails, count = count, count * 2
        while count - fails > 1:
            middle = (fails + count) // 2
            fails, count = (fails, middle) if without(middle) else (middle, count)
        self._take_back(names[:count], frozenset(names[:count]))

    def rank(self, excluded: Excluded) -> tuple[bool, float, int, float]:
        """The lower, the better."""
        step = self.steps[excluded]
        return not step.met, 0.0 if step.met else self._excess(step.figures), len(excluded), -step.multiply_adds

    def _take_back(self, group: Sequence[str], excluded: Excluded) -> Excluded:
        """What is left of ``excluded`` when all of ``group`` that can be is in INT8 again."""
        without = excluded.difference(group)
        if self._meets(without, f"{', '.join(group)} back" if len(group) < 3 else f"{len(group)} back"):
            return without
        if len(group) > 1:
            middle = len(group) // 2
            for half in (group[middle:], group[:middle]):
                excluded = self._take_back(half, excluded)
        return excluded

    def _meets(self, excluded: Excluded, trial: str) -> bool:
        if excluded in self.steps:
            return self.steps[excluded].met
        start = time.monotonic()
        if self.steps and start > self._end:
            raise _TimeIsUp
        kept = len(self.layers) - len(excluded)
        before = f"; so far {self._told()}" if self.steps else ""
        self.progress(f"step {len(self.steps) + 1}, {kept} of {len(self.layers)} layers in INT8{before}")
        figures = dict(self.judge(self.write(excluded)))
        self.steps[excluded] = SearchStep(
            trial=trial,
            layers=kept,
            multiply_adds=round(sum(self.layers[name] for name in self.layers.keys() - excluded) / self.total, 5),
            figures=figures,
            met=self._excess(figures) <= 0,
            seconds=round(time.monotonic() - start, 2),
        )
        return self.steps[excluded].met

    def _excess(self, figures: Figures) -> float:
        return max(figures[name] - limit for name, limit in self.goal.limits.items())

    def _told(self) -> str:
        """The last step and the best one that meets the limits."""
        last = [*self.steps.values()][-1]
        figures = ", ".join(f"{name} {last.figures[name]:.3g} of {limit:g}" for name, limit in self.goal.limits.items())
        best = self.steps[min(self.steps, key=self.rank)]
        return f"{figures}, and {f'{best.layers} layers meet it' if best.met else 'no set meets it'}"
