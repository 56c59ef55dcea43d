"""What a profile holds: every sample, what was measured, and the machine it was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy.artifacts import versions
from acmix_deploy.runtime.onnxruntime import usable_cores


class Machine(BaseModel):
    """What latencies depend on besides the model."""

    model_config = ConfigDict(frozen=True)

    cpu: str = Field(description="model name of the CPU")
    cores: int = Field(description="CPU cores that this process may run on")
    system: str = Field(description="operating system, kernel and architecture")
    versions: dict[str, str] = Field(description="versions of Python and of the packages that take part")

    @classmethod
    def this(cls) -> Machine:
        """The machine that this process runs on."""
        return cls(cpu=_cpu(), cores=usable_cores(), system=platform.platform(), versions=versions())


class Profile(BaseModel):
    """Latencies of one model at one input shape, one image batch after the other."""

    model_config = ConfigDict(frozen=True)

    file: str = Field(description="name of the file measured")
    input_shapes: dict[str, tuple[int, ...]] = Field(description="shape of each input")
    provider: str = Field(description="execution provider of ONNX Runtime")
    threads: int = Field(description="threads within an operator")
    rounds: int = Field(description="sessions that were opened one after the other; each gave a share of the samples")
    warmup_runs: int = Field(description="runs that were not counted, over all rounds")
    stable: bool = Field(description="whether latency had settled before counting began, in every round")
    samples_ms: tuple[float, ...] = Field(description="every latency counted, in milliseconds and in order")
    machine: Machine = Field(description="where it was measured")
    note: str = Field(default="", description="what the numbers do not say")

    @computed_field(description="median of samples_ms")  # type: ignore[prop-decorator]
    @property
    def median_ms(self) -> float:
        return self.percentile(50)

    @computed_field(description="90th percentile of samples_ms")  # type: ignore[prop-decorator]
    @property
    def p90_ms(self) -> float:
        return self.percentile(90)

    @computed_field(description="99th percentile of samples_ms")  # type: ignore[prop-decorator]
    @property
    def p99_ms(self) -> float:
        return self.percentile(99)

    def percentile(self, q: float) -> float:
        """Latency in milliseconds that ``q`` per cent of the samples do not exceed, interpolated linearly."""
        return float(np.percentile(self.samples_ms, q))


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name"))
    return next(names, platform.processor() or platform.machine())
