"""Whether a candidate is slower than its baseline by more than is tolerated, and as exact as it has to be.

Reference: Holm, Scandinavian Journal of Statistics 6 (1979), for the correction.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy.errors import UserError
from acmix_deploy.gate.bootstrap import TAIL, Estimate, estimate
from acmix_deploy.gate.compare import check_fields, differences
from acmix_deploy.gate.samples import GateSamples, Measured, Parity

Outcome = Literal["pass", "inconclusive", "not comparable", "fail"]
"""From the best to the worst."""

FEWEST_ROUNDS = 5

_Key = tuple[int, str]
"""Index of a pair, and metric."""
_MOST_TIMES = 20
"""More rounds than this many times those measured are not asked for."""


class Judged(BaseModel):
    """One percentile of the latency of one model against its baseline."""

    model_config = ConfigDict(frozen=True)

    metric: str = Field(description="the percentile, such as 'p50'")
    outcome: Outcome = Field(description="pass, fail or inconclusive")
    reason: str = Field(description="why, as changes of latency")
    rounds: tuple[int, int] | None = Field(default=None, description="rounds of the baseline and of the candidate")
    baseline_ms: float | None = Field(default=None, description="typical percentile of a round of the baseline, in ms")
    candidate_ms: float | None = Field(default=None, description="the same of the candidate")
    ratio: float | None = Field(default=None, description="candidate over baseline, more than 1 where it is slower")
    low: float | None = Field(default=None, description="lower bound of the 95% interval of the ratio")
    high: float | None = Field(default=None, description="upper bound of it")
    spread: float | None = Field(
        default=None, description="standard deviation of the logarithm of the ratio from round to round"
    )
    p_slower: float | None = Field(
        default=None, description="how often chance alone would show as much, if the ratio were at the tolerance"
    )
    more_rounds: int | None = Field(default=None, description="how many more would probably settle it")


class Comparison(BaseModel):
    """A candidate against its baseline."""

    model_config = ConfigDict(frozen=True)

    baseline: str = Field(description="file name of the baseline")
    candidate: str = Field(description="file name of the candidate")
    paired: bool = Field(description="whether both were measured in turn, so that rounds were compared in pairs")
    judged: tuple[Judged, ...] = Field(default=(), description="one for each percentile")
    parity: tuple[Parity, ...] = Field(default=(), description="how exact the candidate is, as it was stored")
    differences: tuple[str, ...] = Field(
        default=(), description="what makes the two not comparable; nothing is judged then"
    )
    notes: tuple[str, ...] = Field(default=(), description="what the numbers do not say")

    @computed_field(description="fail if anything failed, then not comparable, inconclusive, pass")  # type: ignore[prop-decorator]
    @property
    def outcome(self) -> Outcome:
        if not all(found.passed for found in self.parity):
            return "fail"
        return "not comparable" if self.differences else _worst(found.outcome for found in self.judged)


class Verdict(BaseModel):
    """Candidates against their baselines."""

    model_config = ConfigDict(frozen=True)

    tolerance: float = Field(description="by which share a candidate may be slower; 0.03 is 3%")
    comparisons: tuple[Comparison, ...] = Field(description="one for each candidate")

    @computed_field(description="the worst of the comparisons")  # type: ignore[prop-decorator]
    @property
    def outcome(self) -> Outcome:
        return _worst(comparison.outcome for comparison in self.comparisons)


def judge(
    pairs: Sequence[GateSamples],
    metrics: Sequence[str] = ("p50",),
    tolerance: float = 0.03,
    allow: Collection[str] = (),
) -> Verdict:
    """Judge candidates by percentiles of their latency, and by how exact they are.

    A percentile fails where the whole 95% interval of its ratio to the baseline's lies beyond the tolerance, passes
    where the whole lies within, and is inconclusive otherwise. Among several percentiles and candidates failing is held
    to Holm's correction: the probability that any fails by chance is at most 2.5%. Passing needs none, since all have
    to pass. Where the models were measured in turn, rounds of one index pair; those that only one has do not count.

    Args:
        pairs: each candidate with its baseline.
        metrics: percentiles, such as p50, p99 and p99.9.
        tolerance: by which share a candidate may be slower.
        allow: what may differ, such as "driver" (docs/gate.md); the latency of a pair that differs in
            anything else is not judged.

    Returns:
        The verdict on each pair; ``outcome`` is the worst of them.

    Raises:
        UserError: no such metric or field, a negative tolerance, or a pair without a baseline.
    """
    if not 0 <= tolerance < math.inf:
        raise UserError(f"the tolerance is {tolerance:g}; a share of 0 or more is expected", "For 3% give 0.03.")
    check_fields(allow)
    percentiles = {metric: _percentile(metric) for metric in metrics}
    sides = [_sides(pair) for pair in pairs]
    forbidding = [tuple(str(one) for one in differences(*both) if one.field not in allow) for both in sides]
    found = {
        (index, metric): _estimate(*sides[index], pair.interleaved, metric, q)
        for index, pair in enumerate(pairs)
        if not forbidding[index]
        for metric, q in percentiles.items()
    }
    slower = _slower({key: one for key, one in found.items() if isinstance(one, Estimate)}, math.log1p(tolerance))
    return Verdict(
        tolerance=tolerance,
        comparisons=tuple(
            Comparison(
                baseline=baseline.model,
                candidate=candidate.model,
                paired=pair.interleaved,
                judged=tuple(
                    _judged(metric, one, tolerance, (at, metric) in slower, len(found))
                    for (at, metric), one in found.items()
                    if at == index
                ),
                parity=candidate.parity,
                differences=forbidding[index],
                notes=(*_unknown(candidate), *baseline.remarks, *candidate.remarks),
            )
            for index, (pair, (baseline, candidate)) in enumerate(zip(pairs, sides, strict=True))
        ),
    )


def _sides(pair: GateSamples) -> tuple[Measured, Measured]:
    """Baseline and candidate, of rounds that pair those alone which both have."""
    baseline, candidate = pair.baseline, pair.candidate
    if baseline is None:
        raise UserError(
            f"{candidate.model} was measured alone, and there is nothing to compare it with",
            "Give the samples of a baseline too.",
        )
    if not pair.interleaved:
        return baseline, candidate
    both = sorted({one.index for one in baseline.rounds} & {one.index for one in candidate.rounds})
    first, second = (
        side.model_copy(update={"rounds": tuple({one.index: one for one in side.rounds}[index] for index in both)})
        for side in (baseline, candidate)
    )
    return first, second


def _percentile(metric: str) -> float:
    """99.9 for ``p99.9``."""
    if not re.fullmatch(r"p\d{1,2}(\.\d+)?", metric) or not float(metric[1:]):
        raise UserError(f"{metric!r} is no metric", "Metrics are percentiles: p50, p99, p99.9.")
    return float(metric[1:])


def _estimate(baseline: Measured, candidate: Measured, paired: bool, metric: str, q: float) -> Estimate | str:
    """The ratio of a percentile, or why there are not enough samples for it."""
    for side in (baseline, candidate):
        if len(side.rounds) < FEWEST_ROUNDS:
            found = f"{len(side.rounds)} rounds" + (" that pair" if paired else "")
            return f"{side.model} has {found}; at least {FEWEST_ROUNDS} are needed"
        fewest = min(len(turn.samples_ms) for turn in side.turns)
        needed = math.ceil(round(100 / min(q, 100 - q), 6))
        if fewest < needed:
            return f"{side.model} has {fewest} samples in a turn; {metric} needs at least {needed}"
    return estimate(baseline.rounds, candidate.rounds, q, paired=paired)


def _slower(estimates: Mapping[_Key, Estimate], limit: float) -> set[_Key]:
    """Those beyond the limit by Holm's procedure: any of them is so by chance with a probability of at most 2.5%."""
    p = {key: one.p_above(limit) for key, one in estimates.items()}
    rejected: set[_Key] = set()
    for key in sorted(p, key=p.__getitem__):
        if p[key] > TAIL / (len(p) - len(rejected)):
            break
        rejected.add(key)
    return rejected


def _judged(metric: str, found: Estimate | str, tolerance: float, slower: bool, among: int) -> Judged:
    if isinstance(found, str):
        return Judged(metric=metric, outcome="inconclusive", reason=found)
    limit = math.log1p(tolerance)
    low, high = found.interval()
    tolerated = f"{100 * tolerance:+.3g}% is tolerated"
    outcome: Outcome
    more = None
    if slower:
        outcome, reason = "fail", f"{_change(low)} at least, {tolerated}"
    elif high <= limit:
        outcome, reason = "pass", f"{_change(high)} at most, {tolerated}"
    else:
        outcome, reason = "inconclusive", f"{_change(low)} to {_change(high)}, {tolerated}"
        if low > limit:
            reason += f"; among {among} comparisons chance may show as much"
        few = min(found.rounds)
        wanted = found.rounds_to_settle(limit)
        if wanted <= _MOST_TIMES * few:
            more = max(1, math.ceil(wanted) - few)
            reason += f"; {more} more rounds would probably settle it"
        else:
            reason += f"; it would take more than {_MOST_TIMES * few} rounds to settle it"
    return Judged(
        metric=metric,
        outcome=outcome,
        reason=reason,
        rounds=found.rounds,
        baseline_ms=found.baseline_ms,
        candidate_ms=found.candidate_ms,
        ratio=math.exp(found.log_ratio),
        low=math.exp(low),
        high=math.exp(high),
        spread=found.spread,
        p_slower=found.p_above(limit),
        more_rounds=more,
    )


def _change(log_ratio: float) -> str:
    return f"{math.expm1(log_ratio):+.1%}"


def _unknown(candidate: Measured) -> Iterator[str]:
    if not candidate.parity:
        yield f"how exact {candidate.model} is was not stored, so its latency alone is judged"


def _worst(outcomes: Iterable[Outcome]) -> Outcome:
    return max(outcomes, key=get_args(Outcome).index, default="pass")
