"""How exact a model is, from what `verify` or `export` found and stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from acmix_deploy.artifacts import sha256
from acmix_deploy.document import document_of, read_json
from acmix_deploy.errors import UserError
from acmix_deploy.gate.samples import Parity
from acmix_deploy.runtime.magnitudes import LARGEST_HALF
from acmix_deploy.verify import Verification, read_verification
from acmix_deploy.verify.detections import DetectionComparison

REPORT = "report.json"
"""What `export` calls its report, in the folder of the files that it wrote."""


def parity_of(model: Path, stored: Path | None = None) -> tuple[Parity, ...]:
    """The worst of each output, and of the detections where those were compared.

    Args:
        model: the file.
        stored: what `verify` wrote with -o. Without it, the report of `export` beside the model is taken if it is of
            this very file; else nothing is known.

    Raises:
        UserError: ``stored`` cannot be read, or is of other files.
    """
    if stored is None:
        return tuple(_metrics(read_verification(model.with_name(REPORT)), model.name)) if _reported(model) else ()
    verification = read_verification(stored)
    names = dict.fromkeys(comparison.candidate for comparison in verification.comparisons)
    candidate = next((name for name in names if Path(name).name == model.name), None)
    if candidate is None:
        raise UserError(
            f"{stored} says nothing of {model.name}, but of {', '.join(names) or 'nothing at all'}",
            f"Run: acmix-deploy verify REFERENCE {model} -o {stored}",
        )
    return tuple(_metrics(verification, candidate))


def _reported(model: Path) -> bool:
    try:
        content = read_json(model.with_name(REPORT))
        files = content["files"].values() if document_of(content) == "export" else ()
        return sha256(model) in [file["artifact"]["sha256"] for file in files]
    except (UserError, LookupError, TypeError, AttributeError):
        return False


def _metrics(verification: Verification, candidate: str) -> Iterator[Parity]:
    for found in verification.worst(candidate):
        if found.passed is not None:
            metric = f"relative L2 of {found.part}"
            limit = found.limit or 0.0  # none where the scores are of nothing, and a problem fails them all the same
            yield Parity(metric=metric, value=found.relative_l2, limit=limit, passed=found.passed)
    for half in verification.half:
        if half.candidate == candidate:
            metric = "largest magnitude in float16"
            yield Parity(metric=metric, value=half.largest, limit=LARGEST_HALF, passed=half.passed)
    for detections in verification.detections:
        if detections.candidate == candidate and detections.passed is not None:
            yield from _detections(detections)


def _detections(found: DetectionComparison) -> Iterator[Parity]:
    limits = found.limits
    others = []
    if found.mean_score_change is not None and found.mean_iou is not None:
        for metric, value, limit in (
            ("mean change of a score", found.mean_score_change, limits.score_change),
            ("1 - mean IoU", 1 - found.mean_iou, 1 - limits.iou),
        ):
            others.append(Parity(metric=metric, value=value, limit=limit, passed=value <= limit))
    share = max(found.lost_share, found.added_share)
    # One detection near the threshold is excused, so that the share alone does not tell.
    passed = len(found.faults) == sum(not other.passed for other in others)
    yield Parity(metric="share of detections lost or added", value=share, limit=limits.lost, passed=passed)
    yield from others
