"""One turn of one model, in a process of its own: a request on stdin, an answer on stdout, both as JSON."""

from __future__ import annotations

import hashlib
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

from pydantic import BaseModel, Field

from acmix_deploy.artifacts import sha256
from acmix_deploy.errors import AcmixDeployError
from acmix_deploy.gate.samples import Measured, Round, Turn
from acmix_deploy.profile.monitor import Monitor
from acmix_deploy.profile.run import take_turn
from acmix_deploy.profile.subjects import Checkpoint, OnnxFile, RunSettings, Subject, open_subject

FEWEST_SAMPLES = 100
"""That are counted by default: as many as the 99th percentile of a turn needs."""


class Request(BaseModel):
    """What to measure."""

    file: Path
    setup: RunSettings
    samples: int | None = Field(description="how many to count; by default as many as `profile` does, at least 100")
    seconds: float = Field(description="time for the turn, opening it not included")
    index: int = Field(default=0, description="number of the round")
    position: int = Field(default=0, description="see :class:`Turn`")


class Answer(BaseModel):
    """What came of it: one of the two."""

    measured: Measured | None = Field(default=None, description="the model with this one turn")
    refusal: tuple[int, str, str] | None = Field(default=None, description="exit code, message and hint of an error")


def measure(request: Request) -> Measured:
    """Raises what :func:`acmix_deploy.profile.subjects.open_subject` raises."""
    started = datetime.now(timezone.utc)
    digest = sha256(request.file)
    subject = open_subject(request.file, request.setup)
    monitor = Monitor(nvml=subject.on_gpu)
    taken = take_turn(subject, monitor, request.samples or max(subject.samples, FEWEST_SAMPLES), request.seconds)
    before, after = taken.conditions
    turn = Turn(
        samples_ms=tuple(sample.alone for sample in taken.samples),
        warmup_runs=taken.warmup_runs,
        stable=taken.stable,
        before=before,
        after=after,
        started=started,
        position=request.position,
    )
    return Measured(
        model=request.file.name,
        sha256=digest,
        plugin_sha256=subject.plugin_sha256,
        kind="onnx" if isinstance(subject, OnnxFile) else "pytorch" if isinstance(subject, Checkpoint) else "engine",
        provider=subject.provider,
        precision=subject.precision,
        input_shapes={name: array.shape for name, array in subject.feed.items()},
        fed_with=f"images, SHA-256 {_digest(subject)}" if request.setup.images else "noise",
        threads=subject.threads,
        machine=subject.machine,
        rounds=(Round(index=request.index, turns=(turn,)),),
        notes=subject.notes,
    )


def _digest(subject: Subject) -> str:
    """Of the inputs in half precision, so that it does not depend on the type that a model takes."""
    digest = hashlib.sha256()
    for array in subject.feed.values():
        digest.update(array.astype("float16").tobytes())
    return digest.hexdigest()[:12]


def main() -> None:
    """Answer the request. What libraries print goes to stderr."""
    answer_to = os.dup(1)
    os.dup2(2, 1)
    request = Request.model_validate_json(sys.stdin.buffer.read())
    try:
        answer = Answer(measured=measure(request))
    except AcmixDeployError as error:
        answer = Answer(refusal=(error.exit_code, error.message, error.hint))
    with os.fdopen(answer_to, "w", encoding="utf-8") as stream:
        stream.write(answer.model_dump_json())


if __name__ == "__main__":
    main()
