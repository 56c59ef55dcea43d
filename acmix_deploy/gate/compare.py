"""Whether the latencies of two models may be compared: what ran them has to be the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.errors import UserError
from acmix_deploy.gate.samples import Measured

CLOCKS_APART = 0.05
"""By which share clocks may differ."""

_Fact = Callable[[Measured], str | None]


class Difference(BaseModel):
    """One thing that has to be the same and is not."""

    model_config = ConfigDict(frozen=True)

    field: str = Field(description="what --allow calls it")
    baseline: str | None = Field(description="what it was for the baseline; None where nothing is known of it")
    candidate: str | None = Field(description="what it was for the candidate")

    def __str__(self) -> str:
        return f"{self.field}: {self.baseline or 'unknown'} against {self.candidate or 'unknown'}"


def differences(baseline: Measured, candidate: Measured) -> tuple[Difference, ...]:
    """Everything that forbids to compare; the model, its precision and its plugin are what may differ."""
    found = []
    for field, fact in _FACTS.items():
        ours, theirs = fact(baseline), fact(candidate)
        if ours != theirs and (field not in _OFTEN_UNKNOWN or None not in (ours, theirs)):
            found.append(Difference(field=field, baseline=ours, candidate=theirs))
    for field, clock in _CLOCKS.items():
        before, now = clock(baseline), clock(candidate)
        if before and now and max(before, now) > (1 + CLOCKS_APART) * min(before, now):
            found.append(Difference(field=field, baseline=f"{before:.0f} MHz", candidate=f"{now:.0f} MHz"))
    return tuple(found)


def runtime(measured: Measured) -> str | None:
    """What ran a model, with its version."""
    versions = measured.machine.versions if measured.machine else {}
    if measured.kind == "onnx":
        version = next((versions[name] for name in ("onnxruntime-gpu", "onnxruntime") if name in versions), "")
        return f"ONNX Runtime {version}, {measured.provider}"
    if measured.kind == "pytorch":
        return f"PyTorch {versions.get('torch', '')}"
    return measured.provider


def _of_machine(name: str) -> _Fact:
    def fact(measured: Measured) -> str | None:
        value = getattr(measured.machine, name, None)
        return None if value is None else str(value)

    return fact


def _shapes(measured: Measured) -> str | None:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(measured.input_shapes.items())) or None


def _on_gpu(measured: Measured) -> bool:
    return bool(measured.machine and measured.machine.gpu)


_FACTS: dict[str, _Fact] = {
    "gpu": _of_machine("gpu"),
    "driver": _of_machine("driver"),
    "cpu": _of_machine("cpu"),
    "cores": _of_machine("cores"),
    "runtime": runtime,
    "threads": lambda measured: None if measured.threads is None else str(measured.threads),
    "power_mode": lambda measured: measured.power_mode,
    "input_shapes": _shapes,
    "inputs": lambda measured: measured.fed_with,
}
_OFTEN_UNKNOWN = ("inputs",)  # a profile does not tell them
_CLOCKS: dict[str, Callable[[Measured], float | None]] = {
    "cpu_clock": lambda measured: None if _on_gpu(measured) else measured.clock("cpu_mhz"),
    "gpu_clock": lambda measured: measured.clock("gpu_mhz") if _on_gpu(measured) else None,
    "memory_clock": lambda measured: measured.clock("memory_mhz") if _on_gpu(measured) else None,
}

FIELDS = (*_FACTS, *_CLOCKS)
"""What --allow takes."""


def check_fields(fields: Iterable[str]) -> None:
    """Raise UserError for a field that :func:`differences` does not look at."""
    if unknown := [field for field in fields if field not in FIELDS]:
        raise UserError(
            f"nothing is called {', '.join(unknown)}", f"What may be allowed to differ: {', '.join(FIELDS)}"
        )
