"""The ratio of two models' latency percentiles and its interval, from the noise between rounds.

What is compared is the logarithm of a percentile, the mean over a model's turns in a round: its difference in rounds
that pair, its location in each model where they were measured apart. ABBA rounds cancel drift that is linear in time.
Location is the 10% trimmed mean over rounds: of ten rounds one may be disturbed.

The interval is that of a hierarchical, studentized bootstrap. Blocks of successive samples are drawn within each turn,
since samples resemble their neighbours, and then rounds. Drawing at both levels counts the noise of samples twice;
dividing each draw by its own standard error takes that out again, and makes good that few rounds understate their
spread. Rounds are smoothed: without it those that tie, as clocks have steps, make draws with no spread at all. Where
all rounds tie, the standard error is that of rounding to the clock's steps.

References: Davison and Hinkley, Bootstrap Methods and their Application (1997), sections 2.4 (studentized), 3.4
(smoothed) and 3.8 (hierarchical); Politis and Romano, in Exploring the Limits of Bootstrap (1992), for circular
blocks; Tukey and McLaughlin, Sankhya A 25 (1963), for the standard error of a trimmed mean; Silverman, Density
Estimation (1986), equation 3.31, for the width of the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from acmix_deploy.gate.samples import Round

TAIL = 0.025
"""Probability on each side of an interval."""

_DRAWS = 10_000
_DRAWS_OF_TURN = 100
_POWER = 0.8

_Floats = NDArray[np.float64]
_Row = list[tuple[int, Round]]
"""What is drawn as one: a round of the candidate, which counts 1, of the baseline, -1, or a pair of both."""


class Estimate(NamedTuple):
    """How much slower a candidate is than its baseline, as logarithms of ratios: 0.03 is about 3%."""

    log_ratio: float
    """Candidate over baseline."""
    error: float
    """Standard error of it."""
    spread: float
    """Standard deviation of the logarithm of the ratio from round to round."""
    baseline_ms: float
    """The percentile in a typical round of the baseline, in ms."""
    candidate_ms: float
    """The same of the candidate."""
    rounds: tuple[int, int]
    """Of the baseline and of the candidate."""
    draws: _Floats
    """Studentized draws of the bootstrap, float64 [draws]: each distance from ``log_ratio`` in standard errors."""

    def __neg__(self) -> Estimate:
        """The same with the places of the models changed."""
        turned = self.candidate_ms, self.baseline_ms, self.rounds[::-1], -self.draws
        return Estimate(-self.log_ratio, self.error, self.spread, *turned)

    def interval(self) -> tuple[float, float]:
        """Bounds that the ratio is below, and above, with a probability of :data:`TAIL` each."""
        below, above = np.quantile(self.draws, (TAIL, 1 - TAIL))
        return float(self.log_ratio - above * self.error), float(self.log_ratio - below * self.error)

    def p_above(self, limit: float) -> float:
        """Probability of a ratio as high as this, or higher, if the true one were ``limit``."""
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.nan_to_num(np.divide(self.log_ratio - limit, self.error))
        return (1 + int(np.count_nonzero(self.draws >= distance))) / (1 + len(self.draws))

    def rounds_to_settle(self, limit: float) -> float:
        """With how many rounds in all the interval would probably, with 80%, lie on one side of ``limit``."""
        wanted = NormalDist().inv_cdf(1 - TAIL) + NormalDist().inv_cdf(_POWER)
        distance = abs(self.log_ratio - limit)
        return min(self.rounds) * (wanted * self.error / distance) ** 2 if distance else math.inf


def estimate(baseline: Sequence[Round], candidate: Sequence[Round], q: float, *, paired: bool) -> Estimate:
    """Compare percentile ``q``, 0 to 100, of two models.

    Equal samples give equal estimates, in any unit and any order of rounds; to change the places of the models negates
    ratio and interval.

    Args:
        baseline: its rounds, two or more.
        candidate: the same; where rounds pair, in the order of the baseline's.
        q: the percentile.
        paired: whether rounds pair.
    """
    plus: list[_Row] = [[(1, one)] for one in candidate]
    minus: list[_Row] = [[(-1, one)] for one in baseline]
    groups = [[one + other for one, other in zip(plus, minus, strict=True)]] if paired else [plus, minus]
    groups = [sorted(rows, key=_samples) for rows in groups]
    values = [np.array([sum(sign * _level(one, q) for sign, one in row) for row in rows]) for rows in groups]
    rounding = _rounding([*baseline, *candidate]) * math.sqrt(2 if paired else 1)
    log_ratio, error = _sum(_location(found, rounding) for found in values)
    if log_ratio < 0:  # so that both orders of the models make the same draws
        return -estimate(candidate, baseline, q, paired=paired)
    rng = np.random.default_rng(0)
    drawn, errors = _sum(_draw(rows, found, rounding, q, rng) for rows, found in zip(groups, values, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = np.nan_to_num((drawn - log_ratio) / errors)
    return Estimate(
        log_ratio=float(log_ratio),
        error=float(error),
        spread=math.hypot(*(found.std(ddof=1) for found in values)),
        baseline_ms=_typical(baseline, q),
        candidate_ms=_typical(candidate, q),
        rounds=(len(baseline), len(candidate)),
        draws=draws,
    )


def _samples(row: _Row) -> list[tuple[float, ...]]:
    return [turn.samples_ms for _, one in row for turn in one.turns]


def _level(one: Round, q: float) -> float:
    """Logarithm of the percentile in a round, the mean of its turns'."""
    return fmean(math.log(np.percentile(turn.samples_ms, q)) for turn in one.turns)


def _typical(rounds: Sequence[Round], q: float) -> float:
    return math.exp(_location(np.array([_level(one, q) for one in rounds]))[0])


def _rounding(rounds: Sequence[Round]) -> float:
    """Standard deviation of the logarithm of a time that is rounded to a step of the clock.

    The step is the smallest difference between two samples; 0 where all are equal.
    """
    samples = np.concatenate([one.samples_ms for one in rounds])
    step = np.diff(np.unique(samples)).min(initial=np.inf)
    return float(step / np.median(samples)) / math.sqrt(12) if step < np.inf else 0.0


def _draw(
    rows: Sequence[_Row], values: _Floats, rounding: float, q: float, rng: np.random.Generator
) -> tuple[_Floats, _Floats]:
    """Location of draws of rounds with its standard errors, both [draws]."""
    noise = np.array([_noise(row, q, rng) for row in rows])
    shape = _DRAWS, len(rows)
    picked = rng.integers(len(rows), size=shape)
    _, error = _location(values, rounding)
    width = 0.9 * len(rows) ** -0.2 * error * math.sqrt(len(rows))
    drawn = values[picked] + noise[picked, rng.integers(_DRAWS_OF_TURN, size=shape)]
    return _location(drawn + width * rng.standard_normal(shape))


def _noise(row: _Row, q: float, rng: np.random.Generator) -> _Floats:
    """Distances of draws of one observation, blocks drawn within each turn, from their mean: [draws of a turn]."""

    def of_turn(samples: _Floats) -> _Floats:
        length = round(len(samples) ** (1 / 3))
        starts = rng.integers(len(samples), size=(_DRAWS_OF_TURN, -(-len(samples) // length), 1))
        blocks = (starts + np.arange(length)).reshape(_DRAWS_OF_TURN, -1)[:, : len(samples)] % len(samples)
        logs = np.log(np.percentile(samples[blocks], q, axis=1))
        return np.asarray(logs - logs.mean(), np.float64)

    noise: _Floats = np.add.reduce(
        [sign / len(one.turns) * of_turn(np.array(turn.samples_ms)) for sign, one in row for turn in one.turns]
    )
    return noise


def _location(values: _Floats, rounding: float = 0.0) -> tuple[_Floats, _Floats]:
    """Trimmed mean over the last axis, and its standard error: ``rounding`` where all that count tie."""
    count = values.shape[-1]
    trimmed = count // 10
    kept = np.sort(values)[..., trimmed : count - trimmed]
    winsorized = np.clip(values, kept[..., :1], kept[..., -1:])
    error = winsorized.std(axis=-1, ddof=1) / ((1 - 2 * trimmed / count) * math.sqrt(count))
    return kept.mean(axis=-1), np.where(np.ptp(kept, axis=-1) > 0, error, rounding)


def _sum(parts: Iterable[tuple[_Floats, _Floats]]) -> tuple[_Floats, _Floats]:
    """Sum of independent locations, and its standard error."""
    locations, errors = zip(*parts, strict=True)
    return sum(locations, start=np.float64(0)), np.sqrt(sum(error**2 for error in errors))
