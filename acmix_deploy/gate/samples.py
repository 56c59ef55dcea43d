"""What the gate stores of a measurement: every sample with the conditions it was taken under, round by round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from acmix_deploy.document import Document
from acmix_deploy.errors import Inconclusive
from acmix_deploy.profile.monitor import Conditions
from acmix_deploy.profile.others import in_words
from acmix_deploy.profile.timing import Machine
from acmix_deploy.targets import Precision

Kind = Literal["pytorch", "onnx", "engine", "trtexec"]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Turn(BaseModel):
    """One model's samples from one process."""

    model_config = ConfigDict(frozen=True)

    samples_ms: tuple[Milliseconds, ...] = Field(
        min_length=1, description="every latency counted, in ms and in order; of an engine on the GPU alone"
    )
    warmup_runs: int = Field(default=0, ge=0, description="runs before, which were not counted")
    stable: bool | None = Field(default=None, description="whether latency had settled before counting began")
    before: Conditions = Field(default=Conditions(), description="the machine before the first sample")
    after: Conditions = Field(default=Conditions(), description="the machine after the last sample")
    started: AwareDatetime | None = Field(default=None, description="when the process began")
    position: int = Field(default=0, ge=0, description="place among the turns of its round, of both models, from 0")

    @property
    def throttling(self) -> tuple[str, ...]:
        """What held clocks down before or after, as far as the machine tells."""
        return tuple(dict.fromkeys((*(self.before.throttling or ()), *(self.after.throttling or ()))))


class Round(BaseModel):
    """One model's turns in one round: two, at positions 0 and 3 or 1 and 2, where two models were measured in turn."""

    model_config = ConfigDict(frozen=True)

    index: int = Field(ge=0, description="number of the round, from 0; the same for both models")
    turns: tuple[Turn, ...] = Field(min_length=1, description="in the order of time")

    @property
    def samples_ms(self) -> tuple[float, ...]:
        """The samples of all turns, in order."""
        return tuple(sample for turn in self.turns for sample in turn.samples_ms)


class Parity(BaseModel):
    """One distance between a model and what it was made from, as `verify` or `export` found it."""

    model_config = ConfigDict(frozen=True)

    metric: str = Field(description="what was compared, such as 'relative L2 of boxes'")
    value: float | None = Field(description="the worst over all inputs; None where nothing could be compared")
    limit: float = Field(description="what it was judged by")
    passed: bool = Field(description="whether it is within the limit")


class Measured(BaseModel):
    """One model: what it is, what ran it, and its rounds."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(description="file name")
    sha256: str | None = Field(default=None, description="SHA-256 of the file; None where only times are known")
    plugin_sha256: str | None = Field(default=None, description="the same of the plugin library that ran it")
    kind: Kind = Field(description="what kind of file: pytorch, onnx, engine, or times of trtexec")
    provider: str = Field(description="what ran it: an execution provider of ONNX Runtime, a TensorRT, PyTorch")
    precision: Precision | None = Field(default=None, description="lowest type that it computes in, if known")
    input_shapes: dict[str, tuple[int, ...]] = Field(default={}, description="shape of each input")
    fed_with: str | None = Field(default=None, description="what the inputs hold: noise, or images and which")
    threads: int | None = Field(default=None, description="threads within an operator, on a CPU")
    machine: Machine | None = Field(default=None, description="where it was measured; None for trtexec's times")
    rounds: tuple[Round, ...] = Field(description="rounds that count, in the order of time")
    dropped: int = Field(default=0, ge=0, description="rounds that throttled again and again, and do not count")
    parity: tuple[Parity, ...] = Field(default=(), description="how exact it is, where that was found and kept")
    notes: tuple[str, ...] = Field(default=(), description="what the numbers do not say, or what stands out in them")

    @property
    def turns(self) -> Iterator[Turn]:
        """The turns of all rounds."""
        return (turn for one in self.rounds for turn in one.turns)

    @property
    def started(self) -> datetime | None:
        """When the first turn that tells it began."""
        return next((turn.started for turn in self.turns if turn.started), None)

    @property
    def power_mode(self) -> str | None:
        """The power mode, or all of them by commas where it changed on the way."""
        modes = {reading.power_mode for turn in self.turns for reading in (turn.before, turn.after)} - {None}
        return ", ".join(sorted(map(str, modes))) or None

    @property
    def remarks(self) -> Iterator[str]:
        """What a reader of the numbers should know: rounds that do not count, unsettled turns, and the notes."""
        if self.dropped:
            yield f"{self.dropped} rounds of {self.model} throttled and do not count"
        if unsettled := sum(turn.stable is False for turn in self.turns):
            yield f"latency of {self.model} had not settled when counting began, in {unsettled} of its turns"
        if others := in_words([turn.after.others for turn in self.turns]):
            yield f"other processes were at work while {self.model} was measured: {others}"
        yield from (f"{self.model}: {note}" for note in self.notes)

    def clock(self, name: Literal["cpu_mhz", "gpu_mhz", "memory_mhz"]) -> float | None:
        """Median of a clock after each turn, in MHz: before it the machine may have been idle."""
        told = [clock for turn in self.turns if (clock := getattr(turn.after, name)) is not None]
        return median(told) if told else None


def merged(parts: Sequence[Measured], **known: Any) -> Measured:
    """One model with the turns of all parts, by round.

    Args:
        parts: of one model, at least one.
        known: fields to set.

    Raises:
        Inconclusive: the parts differ in what was measured or what ran it.
    """
    first = parts[0]
    turns: dict[int, list[Turn]] = {}
    for part in parts:
        if different := [name for name in _IDENTITY if getattr(part, name) != getattr(first, name)]:
            raise Inconclusive(
                f"the rounds of {first.model} do not belong together: {', '.join(different)} changed on the way",
                "Measure again, all rounds of one file on one machine.",
            )
        for one in part.rounds:
            turns.setdefault(one.index, []).extend(one.turns)
    rounds = tuple(Round(index=index, turns=tuple(found)) for index, found in sorted(turns.items()))
    return first.model_copy(update={"rounds": rounds, **known})


_IDENTITY = sorted(Measured.model_fields.keys() - {"rounds", "dropped", "parity", "notes"})


class GateSamples(Document):
    """What ``acmix-deploy gate run`` writes and ``gate check`` judges."""

    model_config = ConfigDict(frozen=True)

    document: Literal["gate run"] = "gate run"
    baseline: Measured | None = Field(default=None, description="the model before; None where one was measured alone")
    candidate: Measured = Field(description="the model that is judged")
    interleaved: bool = Field(description="whether both were measured in turn, so that rounds of one index are a pair")
