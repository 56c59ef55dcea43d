"""How often the latency gate is right on samples made up with the noise of real ones: what docs/gate-power.md shows.

The logarithm of a sample is the sum of a level for each turn, a drift from turn to turn, a step in some turns, noise
that resembles its neighbours, and outliers.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from acmix_deploy.document import parse_document, read_json
from acmix_deploy.gate.bootstrap import estimate
from acmix_deploy.gate.samples import GateSamples, Measured, Round, Turn
from acmix_deploy.gate.verdict import judge

RUNS = 200
SPREADS = (0.01, 0.02, 0.05, 0.1)
ROUNDS = (6, 12, 24)
SLOWER = (0.0, 0.05, 0.1, 0.2)
CURVE = (0.0, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2)

_OUTLIER = 4.0
"""Above the median of the turn, in robust standard deviations of its samples."""
_ORDERS = ((0, 1, 1, 0), (1, 0, 0, 1))
"""Baseline 0 and candidate 1 in even and odd rounds."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """Parameters; standard deviations are those of logarithms."""

    turn: float
    """Standard deviation of the level of a turn, whatever came before it."""
    drift: float
    """Standard deviation of the drift."""
    drift_memory: float
    """Correlation of the drift in successive turns."""
    step_share: float
    """Share of the turns in which the level changes on the way."""
    step: float
    """Standard deviation of such a change."""
    sample: float
    """Standard deviation of samples within a turn."""
    sample_memory: float
    """Correlation of successive samples."""
    outlier_share: float
    """Share of the samples that are outliers."""
    outlier: float
    """Mean of the exponential distribution by which they are above what makes an outlier."""

    def scaled(self, spread: float, samples: int = 60) -> Noise:
        """The same shape with another spread: the standard deviation of the log ratio of medians between rounds."""
        rounds = simulate(np.random.default_rng(0), self, rounds=2000, samples=samples)
        factor = spread / float(np.std(log_ratios(rounds), ddof=1))
        sizes = {name: getattr(self, name) * factor for name in ("turn", "drift", "step", "sample")}
        return replace(self, **sizes)


MEASURED = Noise(
    turn=0.039,
    drift=0.048,
    drift_memory=0.84,
    step_share=0.021,
    step=0.145,
    sample=0.076,
    sample_memory=0.48,
    outlier_share=0.230,
    outlier=2.06,
)
"""Of one ACmix block on ONNX Runtime while others kept the machine busy, see docs/gate-power.md."""


def simulate(
    rng: np.random.Generator, noise: Noise, *, rounds: int = 12, samples: int = 60, slower: float = 0.0
) -> GateSamples:
    """A baseline and a candidate measured in turn, 1 ms in the median or so.

    Args:
        rng: source of random numbers.
        noise: what the machine does.
        rounds: how many, of four turns.
        samples: in a turn.
        slower: by which share the candidate is slower.
    """
    turns = 4 * rounds
    logs = rng.normal(scale=noise.turn, size=(turns, 1)) + _memory(rng, noise.drift, noise.drift_memory, (turns, 1))
    stepping = rng.random((turns, 1)) < noise.step_share
    begun = np.arange(samples) >= rng.integers(samples, size=(turns, 1))
    logs = logs + stepping * begun * rng.normal(scale=noise.step, size=(turns, 1))
    logs = logs + _memory(rng, noise.sample, noise.sample_memory, (samples, turns)).T
    outliers = rng.random(logs.shape) < noise.outlier_share
    logs = logs + outliers * (_OUTLIER * noise.sample + rng.exponential(noise.outlier, size=logs.shape))
    sides: tuple[list[Round], list[Round]] = ([], [])
    for index, four in enumerate(np.exp(logs).reshape(rounds, 4, samples)):
        order = _ORDERS[index % 2]
        for side, share in enumerate((1.0, 1.0 + slower)):
            own = [position for position in range(4) if order[position] == side]
            sides[side].append(
                # Not validated: that would take longer than all else.
                Round.model_construct(
                    index=index,
                    turns=tuple(
                        Turn.model_construct(samples_ms=tuple((four[position] * share).tolist()), position=position)
                        for position in own
                    ),
                )
            )
    return paired(*sides)


def paired(baseline: Sequence[Round], candidate: Sequence[Round]) -> GateSamples:
    """Rounds as the gate keeps them."""
    first, second = (
        Measured.model_construct(model=name, kind="onnx", provider="simulation", rounds=tuple(rounds))
        for name, rounds in (("baseline.onnx", baseline), ("candidate.onnx", candidate))
    )
    return GateSamples.model_construct(baseline=first, candidate=second, interleaved=True)


def log_ratios(samples: GateSamples) -> Floats:
    """Logarithm of the ratio of the medians in each round, the mean of its turns': [rounds]."""
    assert samples.baseline is not None
    first, second = (
        np.array([np.mean([math.log(np.median(turn.samples_ms)) for turn in one.turns]) for one in side.rounds])
        for side in (samples.baseline, samples.candidate)
    )
    return np.asarray(second - first)


def fit(turns: Sequence[Sequence[float]]) -> Noise:
    """The noise of turns of one model, in the order of time, by the method of moments.

    Args:
        turns: samples of each turn, as many in each.
    """
    logs = np.log(np.array(turns))
    levels = np.median(logs, axis=1)
    rest = logs - levels[:, None]
    ordinary = np.full(rest.shape, True)
    for _ in range(20):  # clipping, again and again, until outliers no longer count
        usual, sample = float(np.median(rest[ordinary])), _robust(rest[ordinary])
        ordinary = rest <= usual + _OUTLIER * sample
    neighbours = ordinary[:, 1:] & ordinary[:, :-1]
    middle = logs.shape[1] // 2
    moves = np.median(logs[:, middle:], axis=1) - np.median(logs[:, :middle], axis=1)
    steps = moves[np.abs(moves) > 3 * _robust(moves)]
    centred = levels - levels.mean()
    variance, next_one, next_but_one = (
        float(np.mean(centred[lag:] * centred[: len(centred) - lag])) for lag in range(3)
    )
    memory = min(max(next_but_one / next_one, 0.1), 0.9) if next_one > 0 else 0.0
    drift = min(next_one / memory, variance) if memory else 0.0
    return Noise(
        turn=math.sqrt(variance - drift),
        drift=math.sqrt(drift),
        drift_memory=memory,
        step_share=len(steps) / len(moves),
        step=float(np.sqrt(np.mean(steps**2))) if len(steps) else 0.0,
        sample=sample,
        sample_memory=float(np.corrcoef(rest[:, 1:][neighbours], rest[:, :-1][neighbours])[0, 1]),
        outlier_share=float(1 - ordinary.mean()),
        outlier=float(np.mean(rest[~ordinary])) - usual - _OUTLIER * sample,
    )


def _robust(values: Floats) -> float:
    """Standard deviation by the median absolute deviation."""
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def _memory(rng: np.random.Generator, deviation: float, memory: float, shape: tuple[int, int]) -> Floats:
    """A stationary autoregression of first order along the first axis."""
    made = rng.normal(scale=deviation, size=shape)
    for index in range(1, len(made)):
        made[index] = memory * made[index - 1] + math.sqrt(1 - memory**2) * made[index]
    return made


def outcomes(spread: float, rounds: int, slower: float, runs: int = RUNS) -> Counter[str]:
    """Verdicts at a tolerance of 3%."""
    noise = MEASURED.scaled(spread)
    rng = np.random.default_rng(1)
    return Counter(judge([simulate(rng, noise, rounds=rounds, slower=slower)]).outcome for _ in range(runs))


def errors(runs: int = 5 * RUNS) -> dict[str, Floats]:
    """Of 95% intervals from 12 rounds at a spread of 5%: how often too high, how often too low, mean width."""
    noise = MEASURED.scaled(0.05)
    rng = np.random.default_rng(2)
    found: dict[str, Floats] = {}
    for _ in range(runs):
        samples = simulate(rng, noise)
        assert samples.baseline is not None
        ratios = log_ratios(samples)
        intervals = {
            f"scipy.stats.bootstrap, {method}": stats.bootstrap(
                (ratios,), np.mean, method=method, n_resamples=2000, rng=rng
            ).confidence_interval
            for method in ("percentile", "BCa")
        }
        intervals["Student's t"] = stats.ttest_1samp(ratios, 0).confidence_interval()
        intervals["the gate's"] = estimate(
            samples.baseline.rounds, samples.candidate.rounds, 50, paired=True
        ).interval()
        for name, (low, high) in intervals.items():
            found[name] = found.get(name, np.zeros(3)) + np.array([low > 0, high < 0, high - low]) / runs
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fit", type=Path, metavar="FILE", help="print the noise in what `gate run` wrote of one model"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the curve, as SVG")
    options = parser.parse_args()
    if options.fit:
        samples = parse_document(GateSamples, read_json(options.fit), options.fit)
        print(fit(in_order(samples)))
        return
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        print(
            _table(("parameter", "value"), ((f"`{name}`", f"{value:.3f}") for name, value in asdict(MEASURED).items()))
        )
        cells = [(spread, rounds, slower) for spread in SPREADS for rounds in ROUNDS for slower in SLOWER]
        found = dict(zip(cells, pool.map(outcomes, *zip(*cells, strict=True)), strict=True))
        rows = []
        for spread in SPREADS:
            for rounds in ROUNDS:
                same, *others = (found[spread, rounds, slower] for slower in SLOWER)
                shares = [same["pass"], same["fail"], *(other["fail"] for other in others)]
                rows.append((f"{spread:.0%}", str(rounds), *(f"{share / RUNS:.1%}" for share in shares)))
        heads = (f"{slower:.0%} slower: fails" for slower in SLOWER[1:])
        print(_table(("spread", "rounds", "equal: passes", "equal: fails", *heads), rows))
        print(
            _table(
                ("interval", "lies above the truth", "below it", "mean width"),
                ((name, f"{high:.1%}", f"{low:.1%}", f"{width:.3f}") for name, (high, low, width) in errors().items()),
            )
        )
        if options.plot:
            _plot(pool, options.plot)


def _plot(pool: ProcessPoolExecutor, file: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "acmix", "font.family": "sans-serif"})
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for spread in SPREADS:
        arguments = ((spread,) * len(CURVE), (12,) * len(CURVE), CURVE)
        shares = [found["fail"] / RUNS for found in pool.map(outcomes, *arguments)]
        axes.plot([100 * slower for slower in CURVE], shares, marker=".", label=f"spread {spread:.0%}")
    axes.axvline(3, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="candidate slower by, %", ylabel="share of runs that fail", ylim=(-0.02, 1.02))
    axes.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})


def in_order(samples: GateSamples) -> list[list[float]]:
    """Samples of all turns in the order of time, as many of each."""
    sides = [side for side in (samples.baseline, samples.candidate) if side]
    turns = sorted(
        (one.index, turn.position, turn.samples_ms) for side in sides for one in side.rounds for turn in one.turns
    )
    fewest = min(len(times) for *_, times in turns)
    return [list(times[:fewest]) for *_, times in turns]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)) + "\n"


if __name__ == "__main__":
    main()
