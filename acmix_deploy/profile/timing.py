"""What a profile holds: every sample, what was measured, and the machine it was measured on."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy import manifest
from acmix_deploy.artifacts import versions
from acmix_deploy.document import Document
from acmix_deploy.profile.layers import BlockTime, Layer, times_by_block
from acmix_deploy.profile.monitor import Conditions, Power
from acmix_deploy.profile.others import in_words
from acmix_deploy.runtime.onnxruntime import usable_cores
from acmix_deploy.targets import Precision


class Machine(BaseModel):
    """What latencies depend on besides the model; None for what took no part."""

    model_config = ConfigDict(frozen=True)

    cpu: str = Field(description="model name of the CPU")
    cores: int = Field(description="CPU cores that this process may run on")
    system: str = Field(description="operating system, kernel and architecture")
    versions: dict[str, str] = Field(description="versions of Python and of the packages that take part")
    gpu: str | None = Field(default=None, description="name and architecture of the GPU that ran the model")
    driver: str | None = Field(default=None, description="release of its driver")
    tensorrt: str | None = Field(default=None, description="TensorRT that ran the engine")

    @classmethod
    def this(cls, *, on_gpu: bool = False, tensorrt: str | None = None) -> Machine:
        """The machine that this process runs on.

        Args:
            on_gpu: whether the model ran on the GPU.
            tensorrt: what ran it, where it was an engine.
        """
        found = manifest.gpu_here() if on_gpu else {}
        return cls(
            cpu=_cpu(),
            cores=usable_cores(),
            system=platform.platform(),
            versions=versions(),
            gpu=manifest.device_title(found.get("gpu"), found.get("sm")) if on_gpu else None,
            driver=found.get("driver"),
            tensorrt=tensorrt,
        )


class Profile(BaseModel):
    """Latencies of one model at one input shape, one image batch after the other."""

    model_config = ConfigDict(frozen=True)

    file: str = Field(description="name of the file measured; its path where several have that name")
    input_shapes: dict[str, tuple[int, ...]] = Field(default={}, description="shape of each input")
    provider: str = Field(
        description="ONNX Runtime's execution provider, the TensorRT of an engine, PyTorch, or trtexec"
    )
    precision: Precision | None = Field(default=None, description="lowest type that the file computes in, if known")
    threads: int | None = Field(default=None, description="threads within an operator, on a CPU")
    rounds: int = Field(default=1, description="turns, one after the other; each gave a share of the samples")
    round_samples: tuple[int, ...] = Field(default=(), description="how many of samples_ms each round gave, in order")
    warmup_runs: int = Field(default=0, description="runs that were not counted, over all rounds")
    stable: bool | None = Field(
        default=None, description="whether latency had settled before counting began, in every round"
    )
    samples_ms: tuple[float, ...] = Field(
        min_length=1, description="every latency counted, in milliseconds and in order; of an engine on the GPU alone"
    )
    with_transfers_ms: tuple[float, ...] | None = Field(
        default=None, description="the same inferences with upload and download; None where there are none"
    )
    conditions: tuple[Conditions, ...] = Field(default=(), description="before and after each round, in order")
    power: Power | None = Field(default=None, description="power and energy, where they were asked for")
    layers: tuple[Layer, ...] = Field(default=(), description="every layer in order, where they were asked for")
    machine: Machine | None = Field(default=None, description="where it was measured; None for trtexec's times")
    notes: tuple[str, ...] = Field(default=(), description="what the numbers do not say, or what stands out in them")

    @computed_field(description="median of samples_ms")  # type: ignore[prop-decorator]
    @property
    def median_ms(self) -> float:
        return self.percentile(50)

    @computed_field(description="90th percentile of samples_ms")  # type: ignore[prop-decorator]
    @property
    def p90_ms(self) -> float:
        return self.percentile(90)

    @computed_field(description="95th percentile of samples_ms")  # type: ignore[prop-decorator]
    @property
    def p95_ms(self) -> float:
        return self.percentile(95)

    @computed_field(description="99th percentile of samples_ms")  # type: ignore[prop-decorator]
    @property
    def p99_ms(self) -> float:
        return self.percentile(99)

    @computed_field(description="median of with_transfers_ms")  # type: ignore[prop-decorator]
    @property
    def median_with_transfers_ms(self) -> float | None:
        return float(np.median(self.with_transfers_ms)) if self.with_transfers_ms else None

    @computed_field(description="time of the layers of each block")  # type: ignore[prop-decorator]
    @property
    def blocks(self) -> tuple[BlockTime, ...]:
        return times_by_block(self.layers)

    @computed_field(description="what held clocks down at any reading; None where nothing tells")  # type: ignore[prop-decorator]
    @property
    def throttling(self) -> tuple[str, ...] | None:
        readings = (*self.conditions, *(self.power.readings if self.power else ()))
        told = [reading.throttling for reading in readings if reading.throttling is not None]
        return tuple(dict.fromkeys(cause for causes in told for cause in causes)) if told else None

    @property
    def others(self) -> str:
        """Which other processes were at work during its turns, in words; empty where none was."""
        return in_words([reading.others for reading in self.conditions[1::2]])

    @property
    def where(self) -> str:
        """What ran the model, in words."""
        if self.machine is None:
            return self.provider
        by_onnxruntime = self.provider.endswith("ExecutionProvider")
        if self.machine.gpu:
            runtime = f"ONNX Runtime's {self.provider}" if by_onnxruntime else self.provider
            return f"{runtime} on {self.machine.gpu}, driver {self.machine.driver or 'unknown'}"
        return f"{'ONNX Runtime' if by_onnxruntime else self.provider}, {self.threads} threads of {self.machine.cpu}"

    def percentile(self, q: float) -> float:
        """Latency in milliseconds that ``q`` per cent of the samples do not exceed, interpolated linearly."""
        return float(np.percentile(self.samples_ms, q))


def compare(profiles: Sequence[Profile]) -> list[str]:
    """What stands out between files: INT8 that gains nothing over FP16 on the same device."""
    return [
        f"{int8.file} in INT8 is not faster than {half.file} in FP16: "
        f"{int8.median_ms:.3f} against {half.median_ms:.3f} ms"
        for int8 in profiles
        for half in profiles
        if (int8.precision, half.precision) == ("int8", "float16")
        and (int8.provider, int8.machine, int8.input_shapes) == (half.provider, half.machine, half.input_shapes)
        and int8.median_ms >= half.median_ms
    ]


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name"))
    return next(names, platform.processor() or platform.machine())


class ProfileDocument(Document):
    """Result of ``acmix-deploy profile``."""

    document: Literal["profile"] = "profile"
    profiles: list[Profile] = Field(min_length=1, description="one for each file, in the order given")

    @computed_field(description="what stands out between the files")  # type: ignore[prop-decorator]
    @property
    def notes(self) -> list[str]:
        return compare(self.profiles)
