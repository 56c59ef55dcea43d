"""The worst image as a picture: what the reference detects beside what the candidate detects."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from acmix_deploy.artifacts import replacing
from acmix_deploy.detection.drawing import draw_box
from acmix_deploy.detection.images import Image, opencv, read
from acmix_deploy.detection.listing import IMAGE_SUFFIXES
from acmix_deploy.detection.pictures import Unreadable
from acmix_deploy.errors import UserError
from acmix_deploy.verify.detections import ImageComparison, Outcome

_SMALLEST = 640  # pixels of each half's width, so that names can be read

COLOURS: dict[Outcome, str] = {
    "matched": "#009e73",
    "class changed": "#56b4e9",
    "lost": "#d55e00",
    "added": "#cc79a7",
}
"""Of boxes: green, blue, vermilion and purple, apart for colour-blind eyes too (Okabe and Ito)."""


def check_name(target: Path) -> None:
    """Raise UserError where a picture cannot have this name."""
    if target.suffix.lower() not in IMAGE_SUFFIXES:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{target} does not end like a picture", f"Pictures end in one of {known}.")


def draw(comparison: ImageComparison, target: Path) -> None:
    """Write both :func:`halves` side by side.

    Raises:
        UserError: the image cannot be read any more, or the picture cannot be written.
        MissingComponent: OpenCV is not installed.
    """
    check_name(target)
    done, data = opencv().imencode(target.suffix.lower(), np.hstack(halves(comparison)))
    assert done
    with replacing(target) as temporary:
        temporary.write_bytes(data.tobytes())


def halves(comparison: ImageComparison, longest: int | None = None) -> tuple[Image, Image]:
    """The image twice, with what the reference detects and with what the candidate detects.

    Boxes that match are green; in the first what is lost is vermilion, in the second what is added is purple, and in
    both what changed its class is blue.

    Args:
        longest: longer side of each in pixels; by default the image's own, with a width of at least 640.

    Raises:
        UserError: the image cannot be read any more.
        MissingComponent: OpenCV is not installed.
    """
    try:
        image = read(comparison.image)
    except Unreadable as error:
        raise UserError(f"{comparison.image} cannot be read to draw on it: {error}") from error
    factor = longest / max(image.shape[:2]) if longest else max(1.0, _SMALLEST / image.shape[1])
    size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
    reference, candidate = (np.asarray(opencv().resize(image, size)) for _ in range(2))
    for pair in sorted(comparison.pairs, key=lambda pair: pair.outcome != "matched"):
        for half, detection in ((reference, pair.reference), (candidate, pair.candidate)):
            if detection:
                corners = [edge * factor for edge in detection.box]
                draw_box(half, corners, f"{detection.name} {detection.score:.2f}", COLOURS[pair.outcome])
    return reference, candidate
