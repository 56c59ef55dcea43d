"""Measure a candidate and its baseline in turn, each turn in a fresh process.

A round is baseline, candidate, candidate, baseline, and the next one the other way round, so that drift of the machine
meets both alike. A round in which something held the clocks down is repeated, then dropped and counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from acmix_deploy.document import write_document
from acmix_deploy.errors import AcmixDeployError, CheckFailed, Inconclusive, MissingComponent, UserError
from acmix_deploy.gate import worker
from acmix_deploy.gate.parity import parity_of
from acmix_deploy.gate.samples import GateSamples, Measured, merged
from acmix_deploy.gate.worker import Answer, Request
from acmix_deploy.process import importing_here, run
from acmix_deploy.profile.subjects import RunSettings

Progress = Callable[[str], None]

ROUNDS, SECONDS = 12, 2.0
_REPEATS = 2
"""How often a round that throttled is measured again."""
_ERRORS = {error.exit_code: error for error in (CheckFailed, UserError, MissingComponent)}


def measure(
    candidate: Path,
    output: Path,
    *,
    baseline: Path | None = None,
    rounds: int = ROUNDS,
    samples: int | None = None,
    seconds: float = SECONDS,
    setup: RunSettings | None = None,
    parity: Path | None = None,
    progress: Progress = lambda step: None,
) -> GateSamples:
    """Measure in rounds of two turns for each model, in ABBA order.

    Args:
        candidate, baseline: ONNX files, engines or checkpoints; without a baseline the candidate is measured alone.
        output: written after every round, so that an interruption leaves the rounds before it.
        rounds: how many.
        samples: to count in each turn; by default 1000 on a GPU, 100 on a CPU; fewer when the time is over.
        seconds: time of a turn, warm-up included; opening the file not.
        setup: how both are run. With provider tensorrt give it a folder for ``engines``, or every turn builds anew.
        parity: what ``verify -o`` wrote of the candidate; by default the ``report.json`` of ``export`` beside it, if
            that is of this very file.
        progress: told what is being done.

    Returns:
        Every sample, as it is in ``output``.

    Raises:
        UserError, MissingComponent, CheckFailed: a model cannot be run at all, or ``output`` would overwrite it.
        Inconclusive: a turn broke off in a later round, or its process crashed; or every round throttled.
    """
    files = {"baseline": baseline, "candidate": candidate} if baseline else {"candidate": candidate}
    for file in (*files.values(), *filter(None, [parity])):
        if output.resolve() == file.resolve():
            raise UserError(f"{file} is read, and what is measured would overwrite it", "Give another name with -o.")
    names = [file.name for file in files.values()]
    known: dict[str, dict[str, Any]] = {
        role: {"model": str(file) if names.count(file.name) > 1 else file.name} for role, file in files.items()
    }
    known["candidate"]["parity"] = parity_of(candidate, parity)
    requests = {
        role: Request(file=file, setup=setup or RunSettings(), samples=samples, seconds=seconds)
        for role, file in files.items()
    }
    kept: dict[str, list[Measured]] = {role: [] for role in files}
    dropped = 0
    document = None
    for index in range(rounds):
        progress(f"round {index + 1} of {rounds}")
        try:
            taken = _take_round(requests, index)
            for _ in range(_REPEATS):
                if not (causes := _throttling(taken)):
                    break
                progress(f"round {index + 1} of {rounds} again: clocks were held down by {causes}")
                taken = _take_round(requests, index)
            if causes := _throttling(taken):
                dropped += 1
            else:
                kept = {role: [*turns, *taken[role]] for role, turns in kept.items()}
            models = {role: merged(turns, dropped=dropped, **known[role]) for role, turns in kept.items() if turns}
        except AcmixDeployError as error:
            if not document:
                raise
            raise Inconclusive(
                f"round {index + 1} of {rounds} broke off: {error.message}",
                f"The rounds before it, {len(document.candidate.rounds)}, are in {output}.",
            ) from error
        if models:
            document = GateSamples(
                baseline=models.get("baseline"), candidate=models["candidate"], interleaved=baseline is not None
            )
            write_document(document, output)
    if not document:
        raise Inconclusive(
            f"no round counts: in every one clocks were held down by {causes}",
            "Cool the machine, or set clocks or a power mode that it can hold.",
        )
    return document


def _take_round(requests: Mapping[str, Request], index: int) -> dict[str, list[Measured]]:
    """The turns of every model, by its role: in the order ABBA, or BAAB where the index is odd."""
    roles = [*requests][:: -1 if index % 2 else 1]
    taken: dict[str, list[Measured]] = {role: [] for role in roles}
    for position, role in enumerate((*roles, *roles[::-1])):
        request = requests[role].model_copy(update={"index": index, "position": position})
        taken[role].append(_ask(request))
    return taken


def _throttling(taken: Mapping[str, Sequence[Measured]]) -> str:
    """What held clocks down in a round, in words."""
    turns = (turn for measured in taken.values() for one in measured for turn in one.turns)
    return ", ".join(dict.fromkeys(cause for turn in turns for cause in turn.throttling))


def _ask(request: Request) -> Measured:
    """A turn in a process of its own, which ends when this is interrupted.

    Raises:
        Inconclusive: the process ended without an answer.
        UserError, MissingComponent, CheckFailed: what it refused.
    """
    done = run([sys.executable, worker.__file__], request.model_dump_json(), environment=importing_here())
    try:
        answer = Answer.model_validate_json(done.stdout)
    except ValidationError as error:
        raise Inconclusive(
            f"the process with {request.file} crashed ({done.how}): {done.last_words}",
            "SIGKILL is what the system sends when memory runs out." if done.killed else "",
        ) from error
    if answer.measured is None:
        assert answer.refusal
        code, message, hint = answer.refusal
        raise _ERRORS[code](message, hint)
    return answer.measured
