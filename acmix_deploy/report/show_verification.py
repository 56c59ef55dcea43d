"""What `verify` found, for a person."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from acmix_deploy.report.tables import errors, half, layer_notes, table, verdict, worst_layers
from acmix_deploy.verify import DetectionComparison, Verification

_SHOWN = 8  # pairs of the worst image that do not match


def show_verification(verification: Verification, console: Console) -> None:
    """Print the errors of outputs, the changes of detections, the ranges of float16 and the notes."""
    if verification.comparisons:
        console.print(errors(verification))
    if verification.detections:
        console.print(detections(verification))
    for found in verification.detections:
        limits = found.limits
        console.print(
            f"Limits for {found.candidate}: {limits.lost:.1%} lost, and as many added; on average a score change of "
            f"{limits.score_change:g} and an IoU of {limits.iou:g}"
        )
        for line in worst_image(found):
            console.print(line)
    if verification.accuracy:
        console.print(accuracy(verification))
    if verification.half:
        console.print(half(verification))
    for along in verification.layers:
        console.print(f"Along {along.candidate}, the worst of {len(along.layers)} tensors:")
        console.print(worst_layers(along))
    for note in notes(verification):
        console.print(f"Note: {note}", style="yellow")


def notes(verification: Verification) -> list[str]:
    """What the tables do not say."""
    unjudged = (
        f"too little was detected to judge the scores of {name}: compare it on images with objects"
        for name in verification.unjudged
    )
    unseen = (
        f"{found.unknown} tensors of {found.candidate} were not looked at: they are inside a branch or loop, or their "
        "type is not known"
        for found in verification.half
        if found.unknown
    )
    rounding = [
        f"{' and '.join(verification.rounded)} computed here as a GPU does, every float16 tensor rounded (but for "
        "those inside branches) and sums in float32; TensorRT rounds less often where it fuses layers"
    ] * bool(verification.rounded)
    begins = (note for along in verification.layers for note in layer_notes(along))
    return [*verification.notes, *begins, *unjudged, *unseen, *rounding]


def detections(verification: Verification) -> Table:
    """What became of the reference's detections, for each candidate."""
    heads = "candidate", "images", "detections", "matched", "lost", "class changed", "added"
    more = any(map(_more, verification.detections))
    changes = ("score change, mean, max", "IoU, mean, min", *["of the task"] * more)
    rows = table(*heads, *changes, "", numeric=tuple(range(1, 10)))
    for found in verification.detections:
        counts = (len(found.images), found.expected, found.matched, found.lost, found.class_changes, found.added)
        rows.add_row(
            found.candidate,
            *map(str, counts),
            _two(found.mean_score_change, found.max_score_change, ".1e"),
            _two(found.mean_iou, found.min_iou, ".3f"),
            *([_more(found)] if more else []),
            verdict(found.passed, "too few detections"),
        )
    return rows


def _more(found: DetectionComparison) -> str:
    """What a task has beside boxes."""
    told = (
        (found.mean_mask_iou, "mask IoU {:.3f}"),
        (found.mean_keypoint_distance, "keypoints apart {:.1e}"),
        (found.mean_top5, "top 5 {:.1%}"),
    )
    return ", ".join(text.format(value) for value, text in told if value is not None)


def accuracy(verification: Verification) -> Table:
    """Mean average precision of every file."""
    rows = table("file", "labelled images", "objects", "mAP50", "mAP50-95", numeric=(1, 2, 3, 4))
    for found in verification.accuracy:
        rows.add_row(found.name, str(found.images), str(found.objects), f"{found.map50:.3f}", f"{found.map50_95:.3f}")
    return rows


def worst_image(found: DetectionComparison) -> list[str]:
    """The image with the most mismatches, and what they are; nothing where every detection matches."""
    worst = found.images[0]
    mismatches = worst.having("class changed", "lost", "added")
    if not mismatches:
        return []
    shown = [f"  {pair}" for pair in mismatches[:_SHOWN]]
    rest = [f"  and {len(mismatches) - _SHOWN} more"] if len(mismatches) > _SHOWN else []
    height, width = worst.size
    return [f"Worst image of {found.candidate}: {worst.image.name} at {height}x{width}", *shown, *rest]


def _two(first: float | None, second: float | None, form: str) -> str:
    return "" if first is None or second is None else f"{first:{form}}, {second:{form}}"
