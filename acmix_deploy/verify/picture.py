"""The worst image as a picture: what the reference detects beside what the candidate detects."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from acmix_deploy.artifacts import replacing
from acmix_deploy.detection.images import IMAGE_SUFFIXES, Image, opencv, read
from acmix_deploy.errors import UserError
from acmix_deploy.verify.detections import Detection, ImageComparison, Outcome

_SMALLEST = 640  # pixels of each half's width, so that names can be read
_COLOURS: dict[Outcome, tuple[int, int, int]] = {
    "matched": (90, 160, 60),
    "class changed": (0, 140, 255),
    "lost": (40, 40, 230),
    "added": (220, 60, 200),
}  # BGR


def check_name(target: Path) -> None:
    """Raise UserError where a picture cannot have this name."""
    if target.suffix.lower() not in IMAGE_SUFFIXES:
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{target} does not end like a picture", f"Pictures end in one of {known}.")


def draw(comparison: ImageComparison, target: Path) -> None:
    """Write both halves side by side, the reference's on the left.

    Boxes that match are green; on the left what is lost is red, on the right what is added is violet, and on both
    sides what changed its class is orange.

    Raises:
        UserError: the image cannot be read any more, or the picture cannot be written.
        MissingComponent: OpenCV is not installed.
    """
    check_name(target)
    image = read(comparison.image)
    if image is None:
        raise UserError(f"{comparison.image} cannot be read to draw on it")
    cv2 = opencv()
    factor = max(1.0, _SMALLEST / image.shape[1])
    size = round(image.shape[1] * factor), round(image.shape[0] * factor)
    halves = [np.asarray(cv2.resize(image, size)) for _ in range(2)]
    for pair in sorted(comparison.pairs, key=lambda pair: pair.outcome != "matched"):
        for half, detection in zip(halves, (pair.reference, pair.candidate), strict=True):
            if detection:
                _box(half, detection, factor, _COLOURS[pair.outcome])
    done, data = cv2.imencode(target.suffix.lower(), np.hstack(halves))
    assert done
    with replacing(target) as temporary:
        temporary.write_bytes(data.tobytes())


def _box(image: Image, detection: Detection, factor: float, colour: tuple[int, int, int]) -> None:
    cv2 = opencv()
    left, top, right, bottom = (round(edge * factor) for edge in detection.box)
    text, width = f"{detection.name} {detection.score:.2f}", max(2, image.shape[1] // 400)
    scale = width / 4
    cv2.rectangle(image, (left, top), (right, bottom), colour, width)
    (wide, high), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    base = max(top, high + below)
    cv2.rectangle(image, (left, base - high - below), (left + wide, base), colour, cv2.FILLED)
    cv2.putText(image, text, (left, base - below), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
