"""Measurements that nobody made."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np

from acmix_deploy.document import Document
from acmix_deploy.gate.samples import GateSamples, Measured, Round, Turn
from acmix_deploy.profile.monitor import Conditions
from acmix_deploy.profile.timing import Machine

CPU = Machine(cpu="a CPU", cores=4, system="Linux", versions={"onnxruntime": "1.22.0", "torch": "2.13.0"})
GPU = CPU.model_copy(update={"gpu": "Orin (sm_87)", "driver": "540.4.0", "tensorrt": "TensorRT 10.3.0"})
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def measured(
    model: str = "model.onnx",
    median_ms: float = 10.0,
    *,
    rounds: int = 8,
    samples: int = 100,
    seed: int = 0,
    start: datetime = START,
    after: Conditions = Conditions(),  # noqa: B008  it is frozen
    **changed: Any,
) -> Measured:
    """One model: two turns a round, with 1% noise within a turn and between rounds."""
    random = np.random.default_rng(seed)
    found = [
        Round(
            index=index,
            turns=tuple(
                Turn(
                    samples_ms=tuple(median_ms * level * np.exp(random.normal(0, 0.01, samples))),
                    stable=True,
                    after=after,
                    started=start + timedelta(seconds=10 * index + position),
                    position=position,
                )
                for position in (0, 3)
            ),
        )
        for index, level in enumerate(np.exp(random.normal(0, 0.01, rounds)))
    ]
    fields: dict[str, Any] = {
        "model": model,
        "sha256": "0" * 64,
        "kind": "onnx",
        "provider": "CPUExecutionProvider",
        "precision": "float32",
        "input_shapes": {"images": (1, 3, 64, 64)},
        "fed_with": "noise",
        "threads": 4,
        "machine": CPU,
        "rounds": tuple(found),
    }
    return Measured(**fields | changed)


def pair(ratio: float = 1.0, **changed: Any) -> GateSamples:
    """A baseline and a candidate that takes ``ratio`` times its time, measured in turn."""
    baseline, candidate = measured("old.onnx"), measured("new.onnx", 10.0 * ratio, seed=1, **changed)
    return GateSamples(baseline=baseline, candidate=candidate, interleaved=True)


def alone(*arguments: Any, **options: Any) -> GateSamples:
    """One model by itself; arguments as of :func:`measured`."""
    return GateSamples(candidate=measured(*arguments, **options), interleaved=False)


def text(document: Document) -> str:
    """The JSON of a document."""
    return document.model_dump_json(by_alias=True)


def trtexec(times_ms: Sequence[float]) -> list[dict[str, float]]:
    """What ``trtexec --exportTimes`` writes."""
    return [{"computeMs": time, "h2dMs": 0.1, "d2hMs": 0.1, "latencyMs": time + 0.2} for time in times_ms]
