"""Stored samples of every form as pairs to judge: of `gate run`, of `profile --json`, of `trtexec --exportTimes`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from acmix_deploy.document import check_document, document_of, parse_document, read_json
from acmix_deploy.errors import UserError
from acmix_deploy.gate.samples import GateSamples, Kind, Measured, Round, Turn, merged
from acmix_deploy.profile import Profile, ProfileDocument
from acmix_deploy.profile.monitor import Conditions
from acmix_deploy.profile.trtexec import read_times


def read_pairs(paths: Sequence[Path]) -> list[GateSamples]:
    """Candidates with their baselines.

    Args:
        paths: the baseline and the candidate; or any number of files that hold both.

    Raises:
        UserError: a file cannot be read, two hold the same samples, or the files are neither.
        Inconclusive: the files of a folder are not of one model.
    """
    found = [read_samples(path) for path in paths]
    _refuse_copies(paths, found)
    singles = [samples for samples in found if len(samples) == 1 and samples[0].baseline is None]
    if not singles:
        return [pair for samples in found for pair in samples]
    if len(singles) == len(found) == 2:
        (baseline,), (candidate,) = singles
        return [GateSamples(baseline=baseline.candidate, candidate=candidate.candidate, interleaved=False)]
    alone = ", ".join(str(path) for path, samples in zip(paths, found, strict=True) if samples in singles)
    raise UserError(
        f"of {len(paths)} given, these hold one model alone: {alone}",
        "Give two of those, the baseline first, or any number that hold a baseline and a candidate.",
    )


def read_samples(path: Path) -> list[GateSamples]:
    """What one file holds, or one folder, in which each file is a round.

    Of the profiles of several files the first is the baseline of the others, as for `profile` itself.

    Raises:
        UserError: it cannot be read, or holds no samples, or such as no clock gives, or in two files the same ones.
        Inconclusive: the files of a folder are not of one model.
    """
    if path.is_dir():
        return [_read_folder(path)]
    content = read_json(path)
    if isinstance(content, list):
        return [GateSamples(candidate=_measured(path, read_times(path)), interleaved=False)]
    if document_of(content) == "profile":
        first, *others = (
            _measured(path, profile) for profile in parse_document(ProfileDocument, content, path).profiles
        )
        if not others:
            return [GateSamples(candidate=first, interleaved=False)]
        return [
            GateSamples(baseline=first, candidate=other, interleaved="trtexec" not in (first.kind, other.kind))
            for other in others
        ]
    check_document(content, path, "gate run", "profile")
    return [parse_document(GateSamples, content, path)]


def _read_folder(folder: Path) -> GateSamples:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"{folder} holds no .json file", "Give a folder with one file for each round.")
    in_files = [read_samples(file) for file in files]
    _refuse_copies(files, in_files)
    found = [samples for one in in_files for samples in one]
    if len(found) != len(files) or len({samples.baseline is None for samples in found}) == 2:
        raise UserError(f"the files in {folder} do not hold the same models", "Keep those of other models elsewhere.")
    baselines = [samples.baseline for samples in found if samples.baseline]
    return GateSamples(
        baseline=_as_rounds(folder, baselines) if baselines else None,
        candidate=_as_rounds(folder, [samples.candidate for samples in found]),
        interleaved=bool(baselines),
    )


def _refuse_copies(files: Sequence[Path], read: Sequence[Sequence[GateSamples]]) -> None:
    """Raise UserError where two files hold the same samples: of one measurement no noise can be told."""
    seen: dict[object, Path] = {}
    for file, found in zip(files, read, strict=True):
        times = tuple(turn.samples_ms for samples in found for turn in samples.candidate.turns)
        if times and (first := seen.setdefault(times, file)) is not file:
            raise UserError(f"{first} and {file} hold the same samples", "Give measurements, each of its own.")


def _as_rounds(folder: Path, parts: Sequence[Measured]) -> Measured:
    """One model, each part a round."""
    rounds = []
    for index, part in enumerate(parts):
        update = {"rounds": (Round(index=index, turns=tuple(part.turns)),)}
        # Files of trtexec are called after their times, not after the engine.
        rounds.append(part.model_copy(update=update | ({"model": folder.name} if part.kind == "trtexec" else {})))
    return merged(rounds, dropped=sum(part.dropped for part in parts))


def _measured(path: Path, profile: Profile) -> Measured:
    """A profile as rounds of one turn."""
    counts = profile.round_samples or (len(profile.samples_ms),)
    if sum(counts) != len(profile.samples_ms):
        raise UserError(f"{path} does not hold what it should: round_samples do not add up to samples_ms")
    readings = iter(profile.conditions or (Conditions(),) * 2 * len(counts))
    samples = iter(profile.samples_ms)
    try:
        turns = [
            Turn(
                samples_ms=tuple(islice(samples, count)),
                stable=profile.stable,
                before=next(readings, Conditions()),
                after=next(readings, Conditions()),
            )
            for count in counts
        ]
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path} holds latencies that no clock gives: {first['input']}, {first['msg']}") from error
    return Measured(
        model=profile.file,
        kind=_kind(profile),
        provider=profile.provider,
        precision=profile.precision,
        input_shapes=profile.input_shapes,
        threads=profile.threads,
        machine=profile.machine,
        rounds=tuple(Round(index=index, turns=(turn,)) for index, turn in enumerate(turns)),
        notes=profile.notes,
    )


def _kind(profile: Profile) -> Kind:
    if profile.provider == "trtexec":
        return "trtexec"
    if profile.provider == "PyTorch":
        return "pytorch"
    return "onnx" if profile.provider.endswith("ExecutionProvider") else "engine"
