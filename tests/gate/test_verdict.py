"""The verdict: what it may depend on, and what it must not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from acmix_deploy.errors import UserError
from acmix_deploy.gate import bootstrap
from acmix_deploy.gate.bootstrap import Estimate, estimate
from acmix_deploy.gate.samples import GateSamples, Measured, Parity, Round, Turn
from acmix_deploy.gate.verdict import Judged, judge
from tests.gate.parts import measured, pair


def made(seed: int, rounds: int, samples: int, slower: float, noise: float, paired: bool) -> GateSamples:
    """Samples with noise between rounds and within."""
    random = np.random.default_rng(seed)

    def side(name: str, level: float) -> Measured:
        times = np.exp(level + random.normal(0, noise, (rounds, 2, 1)) + random.normal(0, 0.05, (rounds, 2, samples)))
        return measured(name, rounds=0).model_copy(
            update={"rounds": tuple(map(a_round, range(rounds), times.tolist()))}
        )

    return GateSamples(baseline=side("old.onnx", 1), candidate=side("new.onnx", 1 + slower), interleaved=paired)


Pairs = st.builds(
    made,
    seed=st.integers(0, 2**32 - 1),
    rounds=st.integers(5, 13),
    samples=st.integers(2, 30),
    slower=st.floats(-0.2, 0.2),
    noise=st.sampled_from((0.001, 0.03, 0.2)),
    paired=st.booleans(),
)
properties = settings(max_examples=15, deadline=None)


def a_round(index: int, turns: list[list[float]]) -> Round:
    return Round(index=index, turns=tuple(Turn(samples_ms=tuple(times)) for times in turns))


def the_one(samples: GateSamples, tolerance: float = 0.03, metric: str = "p50") -> Judged:
    (comparison,) = judge([samples], [metric], tolerance).comparisons
    (judged,) = comparison.judged
    return judged


def changed(samples: GateSamples, change: Callable[[Measured], Measured]) -> GateSamples:
    assert samples.baseline is not None
    return samples.model_copy(
        update={"baseline": change(samples.baseline), "candidate": change(samples.candidate)},
    )


def scaled(factor: float) -> Callable[[Measured], Measured]:
    def scale(side: Measured) -> Measured:
        turns = [[[factor * time for time in turn.samples_ms] for turn in one.turns] for one in side.rounds]
        rounds = (a_round(one.index, times) for one, times in zip(side.rounds, turns, strict=True))
        return side.model_copy(update={"rounds": tuple(rounds)})

    return scale


@properties
@given(Pairs, st.sampled_from((1e-3, 1e3, 7.3)))
def test_the_unit_of_time_changes_nothing(samples: GateSamples, factor: float) -> None:
    ours, theirs = the_one(samples), the_one(changed(samples, scaled(factor)))
    assert (theirs.outcome, theirs.more_rounds, theirs.rounds) == (ours.outcome, ours.more_rounds, ours.rounds)
    assert (theirs.ratio, theirs.low, theirs.high) == pytest.approx((ours.ratio, ours.low, ours.high), rel=1e-9)
    assert theirs.baseline_ms == pytest.approx(factor * ours.baseline_ms)


@properties
@given(Pairs, st.randoms(use_true_random=False))
def test_the_order_of_rounds_changes_nothing(samples: GateSamples, random: object) -> None:
    def shuffle(side: Measured) -> Measured:
        rounds = list(side.rounds)
        random.shuffle(rounds)  # type: ignore[attr-defined]
        return side.model_copy(update={"rounds": tuple(rounds)})

    assert the_one(changed(samples, shuffle)) == the_one(samples)


@properties
@given(Pairs, st.booleans())
def test_the_order_of_files_changes_nothing(samples: GateSamples, paired: bool) -> None:
    """Of those that are rounds of one model, and of those that are models."""

    def renamed(side: Measured) -> Measured:
        rounds = [one.model_copy(update={"index": len(side.rounds) - one.index}) for one in side.rounds]
        return side.model_copy(update={"rounds": tuple(rounds[::-1])})

    samples = samples.model_copy(update={"interleaved": paired})
    assert the_one(changed(samples, renamed)) == the_one(samples)
    several = [samples, made(1, 6, 20, 0.06, 0.03, True), made(2, 6, 20, 0.06, 0.03, True)]
    there, back = judge(several).comparisons, judge(several[::-1]).comparisons
    assert there == back[::-1]


@properties
@given(Pairs)
def test_changing_places_negates_the_interval(samples: GateSamples) -> None:
    turned = samples.model_copy(update={"baseline": samples.candidate, "candidate": samples.baseline})
    ours, theirs = the_one(samples), the_one(turned)
    logs = [-math.log(x) for x in (ours.ratio, ours.high, ours.low)]
    assert [math.log(x) for x in (theirs.ratio, theirs.low, theirs.high)] == pytest.approx(logs, abs=1e-12)
    assert (theirs.baseline_ms, theirs.spread) == (ours.candidate_ms, pytest.approx(ours.spread))


@properties
@given(Pairs, st.lists(st.floats(0, 0.5), min_size=2, max_size=3))
def test_more_tolerance_never_judges_worse(samples: GateSamples, tolerances: list[float]) -> None:
    order = ("fail", "inconclusive", "pass")
    outcomes = [order.index(judge([samples], ["p50", "p75"], one).outcome) for one in sorted(tolerances)]
    assert outcomes == sorted(outcomes)


@properties
@given(Pairs, st.floats(0, 0.2))
def test_the_verdict_is_where_the_interval_lies(samples: GateSamples, tolerance: float) -> None:
    found = the_one(samples, tolerance)
    assert found.low <= found.ratio <= found.high
    expected = "fail" if found.low > 1 + tolerance else "pass" if found.high <= 1 + tolerance else "inconclusive"
    if abs(found.p_slower - 0.025) > 2e-4:  # quantiles are interpolated, probabilities are not
        assert found.outcome == expected


def test_without_noise_in_a_turn_the_interval_is_close_to_that_of_students_t() -> None:
    random = np.random.default_rng(3)
    widths = []
    for _ in range(30):
        logs = random.normal(0, 0.05, 9)  # too few for any to be trimmed
        rounds = [a_round(index, [[math.exp(log)] * 2]) for index, log in enumerate(logs)]
        ones = [a_round(index, [[1.0, 1.0]]) for index in range(len(logs))]
        low, high = estimate(ones, rounds, 50, paired=True).interval()
        expected = stats.ttest_1samp(logs, 0).confidence_interval()
        widths.append((high - low) / (expected.high - expected.low))
    assert np.median(widths) == pytest.approx(1, abs=0.1)
    assert min(widths) > 0.6


def test_the_trimmed_mean_and_its_error_are_those_of_scipy() -> None:
    logs = np.random.default_rng(4).normal(0, 0.05, 12)
    rounds = [a_round(index, [[math.exp(log)] * 2]) for index, log in enumerate(logs)]
    ones = [a_round(index, [[1.0, 1.0]]) for index in range(12)]
    found = estimate(ones, rounds, 50, paired=True)
    assert found.log_ratio == pytest.approx(stats.trim_mean(logs, 0.1))
    winsorized = stats.mstats.winsorize(logs, (0.1, 0.1)).std(ddof=1)
    assert found.error == pytest.approx(winsorized / ((1 - 2 / 12) * math.sqrt(12)))
    assert found.spread == pytest.approx(logs.std(ddof=1))


def test_drift_that_meets_both_alike_cancels() -> None:
    """In pairs: unpaired, the same samples say nothing."""
    drift = np.linspace(0, 0.5, 48)
    sides: tuple[list[Round], list[Round]] = ([], [])
    for index in range(12):
        for side, positions in enumerate(((0, 3), (1, 2)) if index % 2 == 0 else ((1, 2), (0, 3))):
            times = [[math.exp(drift[4 * index + position] + 0.05 * side)] * 5 for position in positions]
            sides[side].append(a_round(index, times))
    paired, apart = (estimate(*sides, 50, paired=paired) for paired in (True, False))
    assert paired.log_ratio == pytest.approx(0.05, abs=1e-9)
    assert paired.interval() == pytest.approx((0.05, 0.05), abs=0.01)  # the samples look like those of a coarse clock
    assert apart.interval()[0] < 0 < apart.interval()[1]


def test_one_disturbed_round_of_twelve_hides_nothing() -> None:
    samples = made(5, 12, 30, 0.1, 0.01, True)
    slow = scaled(3.0)(samples.baseline)
    rounds = (*samples.baseline.rounds[:-1], slow.rounds[-1])
    disturbed = samples.model_copy(update={"baseline": slow.model_copy(update={"rounds": rounds})})
    assert the_one(disturbed).outcome == the_one(samples).outcome == "fail"


@pytest.mark.parametrize("log_ratio", [0.01, 0.05])
def test_the_rounds_asked_for_settle_it_four_times_of_five(log_ratio: float) -> None:
    """By the power of Student's test at that many rounds, if the ratio and the spread are what they look like."""
    spread, limit = 0.05, 0.03
    rounds = round(
        Estimate(log_ratio, spread / math.sqrt(12), spread, 1, 1, (12, 12), np.zeros(1)).rounds_to_settle(limit)
    )
    distance = abs(log_ratio - limit) / (spread / math.sqrt(rounds))
    power = stats.nct.sf(stats.t.isf(bootstrap.TAIL, rounds - 1), rounds - 1, distance)
    assert power == pytest.approx(0.8, abs=0.03)


def test_the_rounds_asked_for_are_more_or_none() -> None:
    found = [the_one(made(seed, 8, 20, 0.04, 0.05, True)) for seed in range(12)]
    unsettled = [judged for judged in found if judged.outcome == "inconclusive"]
    asked = [judged.more_rounds for judged in unsettled if judged.more_rounds]
    assert asked
    assert all(1 <= more <= 20 * 8 for more in asked)
    assert all(f"{judged.more_rounds} more rounds" in judged.reason for judged in unsettled if judged.more_rounds)
    assert all("more than 160 rounds" in judged.reason for judged in unsettled if not judged.more_rounds)
    assert not any(judged.more_rounds for judged in found if judged.outcome != "inconclusive")


def test_rounds_that_tie_have_an_interval() -> None:
    """As those of a clock with coarse steps do: many draws are of ties alone, and have no spread."""
    ones = [a_round(index, [[1.0] * 4]) for index in range(12)]
    coarse = [a_round(index, [[1 + 0.01 * (index % 4 == 0)] * 4]) for index in range(12)]
    low, high = estimate(ones, coarse, 50, paired=True).interval()
    assert -0.005 < low < 0.0025 < high < 0.01


def test_rounds_that_tie_all_are_as_exact_as_the_clock() -> None:
    """Two steps apart, and rounded both: the ratio may be one step more or less, and hardly any other."""
    step, rounds = 0.02, range(12)
    ones = [a_round(index, [[1.0, 1.0, 1.0 + step]]) for index in rounds]
    others = [a_round(index, [[1.0 + 2 * step, 1.0 + 2 * step, 1.0 + 3 * step]]) for index in rounds]
    for paired in (True, False):
        low, high = estimate(ones, others, 50, paired=paired).interval()
        assert (low, high) == pytest.approx((step, 3 * step), abs=0.3 * step)
    slow = GateSamples(
        baseline=measured("old.onnx").model_copy(update={"rounds": tuple(ones)}),
        candidate=measured("new.onnx").model_copy(update={"rounds": tuple(others)}),
        interleaved=True,
    )
    assert [the_one(slow, tolerance).outcome for tolerance in (0.01, 0.03, 0.05, 0.08)] == [
        "fail", "inconclusive", "inconclusive", "pass",
    ]  # fmt: skip


def test_noise_of_samples_is_not_counted_twice() -> None:
    """Where rounds differ by it alone, blocks show it once more than rounds did."""
    random = np.random.default_rng(9)
    ones = [a_round(index, [[1.0] * 4]) for index in range(9)]
    widths = []
    for _ in range(30):
        times = np.exp(random.normal(0, 0.05, (9, 1, 25)))
        low, high = estimate(ones, list(map(a_round, range(9), times.tolist())), 50, paired=True).interval()
        expected = stats.ttest_1samp(np.log(np.median(times, axis=(1, 2))), 0).confidence_interval()
        widths.append((high - low) / (expected.high - expected.low))
    assert np.median(widths) == pytest.approx(1, abs=0.15)


def test_the_tail_is_judged_apart_from_the_median() -> None:
    samples = pair(1.0, samples=200)
    times = [[[t * (1.5 if i % 20 == 0 else 1) for i, t in enumerate(turn.samples_ms)] for turn in one.turns]
             for one in samples.candidate.rounds]  # fmt: skip
    tail = samples.candidate.model_copy(update={"rounds": tuple(map(a_round, range(len(times)), times))})
    (found,) = judge([samples.model_copy(update={"candidate": tail})], ["p50", "p99"]).comparisons
    assert [judged.outcome for judged in found.judged] == ["pass", "fail"]
    assert found.outcome == "fail"


def test_among_many_only_what_chance_would_not_show_fails() -> None:
    """Holm: of ten comparisons one whose lower bound is just beyond the tolerance is not enough, and says so."""
    noisy = (made(7, 12, 30, slower, 0.03, True) for slower in np.arange(0.02, 0.12, 0.003))
    slower = next(samples for samples in noisy if 0.005 < the_one(samples).p_slower < 0.02)
    assert the_one(slower).outcome == "fail"
    verdict = judge([slower, *[made(8, 12, 30, 0.0, 0.001, True)] * 9])
    (first,) = verdict.comparisons[0].judged
    assert (first.outcome, verdict.outcome) == ("inconclusive", "inconclusive")
    assert first.low > 1.03
    assert "among 10 comparisons" in first.reason


def test_a_candidate_that_is_not_exact_enough_fails_however_fast() -> None:
    wrong = Parity(metric="relative L2 of boxes", value=0.5, limit=0.01, passed=False)
    verdict = judge([pair(0.5, parity=(wrong,))])
    assert [judged.outcome for judged in verdict.comparisons[0].judged] == ["pass"]
    assert verdict.outcome == "fail"
    right = judge([pair(0.5, parity=(wrong.model_copy(update={"passed": True}),))])
    assert right.outcome == "pass"
    assert not any("was not stored" in note for note in right.comparisons[0].notes)


def test_unknown_parity_is_said() -> None:
    assert "was not stored" in judge([pair(0.5)]).comparisons[0].notes[0]


def test_what_cannot_be_compared_is_not_judged() -> None:
    pairs = [pair(2.0, threads=2), pair(1.0)]
    verdict = judge(pairs)
    first, second = verdict.comparisons
    assert (first.judged, first.outcome, second.outcome) == ((), "not comparable", "pass")
    assert (first.differences, verdict.outcome) == (("threads: 4 against 2",), "not comparable")
    assert judge(pairs, allow=["threads"]).outcome == "fail"


@pytest.mark.parametrize(
    ("samples", "metric", "words"),
    [
        (pair(rounds=4), "p50", "new.onnx has 4 rounds; at least 5 are needed"),
        (pair(samples=99), "p99", "new.onnx has 99 samples in a turn; p99 needs at least 100"),
        (pair(samples=99), "p1", "p1 needs at least 100"),
        (pair(samples=100), "p99.9", "p99.9 needs at least 1000"),
    ],
)
def test_too_few_samples_settle_nothing(samples: GateSamples, metric: str, words: str) -> None:
    apart = samples.model_copy(update={"interleaved": False})
    found = the_one(apart, metric=metric)
    assert found.outcome == "inconclusive"
    assert words in found.reason


def test_rounds_that_one_model_lacks_do_not_count_in_pairs() -> None:
    samples = pair()
    shorter = samples.candidate.model_copy(update={"rounds": samples.candidate.rounds[1:]})
    assert the_one(samples.model_copy(update={"candidate": shorter})).rounds == (7, 7)


@pytest.mark.parametrize("metric", ["p0", "p100", "50", "median", "p", "p-1", "p50,p99", ""])
def test_what_is_no_percentile_is_refused(metric: str) -> None:
    with pytest.raises(UserError, match=f"'{metric}' is no metric"):
        judge([pair()], [metric])


@pytest.mark.parametrize("tolerance", [-0.01, math.nan, math.inf])
def test_a_tolerance_has_to_be_a_share(tolerance: float) -> None:
    with pytest.raises(UserError, match="tolerance"):
        judge([pair()], tolerance=tolerance)


def test_a_model_alone_is_refused() -> None:
    with pytest.raises(UserError, match="measured alone"):
        judge([pair().model_copy(update={"baseline": None})])


def test_equal_samples_make_no_difference() -> None:
    samples = measured("old.onnx")
    found = the_one(GateSamples(baseline=samples, candidate=samples, interleaved=True))
    assert (found.ratio, found.outcome) == (1.0, "pass")
    constant = [a_round(index, [[2.0] * 4]) for index in range(12)]
    exact = estimate(constant, constant, 50, paired=True)
    assert exact.interval() == (0, 0)
    assert isinstance(exact, Estimate)


def test_blocks_are_as_noisy_as_samples_that_resemble_their_neighbours() -> None:
    """Against the true deviation of the median, over many turns; samples drawn one by one show less than half."""
    random = np.random.default_rng(8)
    steps = random.normal(0, 0.05, (400, 1000))
    for index in range(1, 1000):
        steps[:, index] += 0.8 * steps[:, index - 1]
    truth = np.std(np.median(steps, axis=1))
    turns = [[(1, a_round(0, [times.tolist()]))] for times in np.exp(steps[:20])]
    drawn = np.mean([bootstrap._noise(turn, 50, random).std() for turn in turns])
    assert drawn == pytest.approx(truth, rel=0.35)
