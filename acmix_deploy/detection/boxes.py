"""From what a detector gives to detections in the pixels of the image; needs neither PyTorch nor ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.detection.images import Boxes, Placement, opencv
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import UserError

Array = NDArray[Any]
Dims = Sequence[int | str | None]

CONFIDENCE = 0.25
IOU = 0.7
MOST = 300
"""Defaults of Ultralytics' ``predict``: smallest score, overlap of two boxes of one class, detections in an image."""


class Detections(NamedTuple):
    """What was found in one image, the highest score first."""

    boxes: Boxes
    """[N, 4] float32, corners (x1, y1, x2, y2) in pixels of the original image."""
    scores: NDArray[np.float32]
    """[N]"""
    classes: NDArray[np.int64]
    """[N], indices of classes."""
    by_class: NDArray[np.float32] | None = None
    """[N, classes], the scores of every class, where they were asked for."""


class Detection(BaseModel):
    """A box in an image."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="name of the class")
    score: float = Field(description="0 to 1")
    box: tuple[float, float, float, float] = Field(description="x1, y1, x2, y2 in pixels of the original image")

    def __str__(self) -> str:
        return f"{self.name} {self.score:.2f} at {', '.join(f'{edge:.0f}' for edge in self.box)}"


def named(found: Detections, names: Mapping[int, str]) -> list[Detection]:
    """Detections one by one; a class without a name is called by its index."""
    boxes = found.boxes.astype(np.float64).round(2).tolist()
    rows = zip(found.classes.tolist(), found.scores.tolist(), boxes, strict=True)
    return [Detection(name=names.get(kind, str(kind)), score=round(score, 5), box=box) for kind, score, box in rows]


def unlike_detector(metadata: ModelMetadata, outputs: Mapping[str, Array]) -> str:
    """What tells a file that calls itself a detector from those that :func:`decode` is for; empty where nothing does.

    Args:
        metadata: what the exporter left in the file. Where their task is another, the file claims nothing.
        outputs: what it gave, by name, on an image or on noise.
    """
    found = unlike_told(metadata, {name: output.shape for name, output in outputs.items()})
    if found or not metadata.detects:
        return found
    ((name, output),) = outputs.items()
    values = output.astype(np.float32)
    if values.shape[2] == 6:
        scores, classes = values[:, :, 4], values[:, :, 5]
        if _within(scores) and (classes >= 0).all() and (classes == classes.round()).all():
            return f"gives {name} {list(output.shape)}, whose rows are a box, a score and a class"
    if not _within(scores := values[:, 4:]) and np.isfinite(scores).all():
        return f"gives {name} with scores from {scores.min():.3g} to {scores.max():.3g}, which are 0 to 1"
    return ""


def unlike_told(metadata: ModelMetadata, outputs: Mapping[str, Dims]) -> str:
    """:func:`unlike_detector` without running the file; free axes in its shapes are names or None.

    Files with non-maximum suppression or an end-to-end head in them give rows [B, N, 6] of boxes, scores and classes,
    which their shape alone does not tell from 4 + classes and 6 anchors.
    """
    if not metadata.detects:
        return ""
    given = _given(outputs)
    shapes = [*outputs.values()]
    rows = shapes[0][1] if [len(dims) for dims in shapes] == [3] else 0
    if isinstance(rows, int) and rows <= 4:
        return given
    try:
        if metadata.end2end:
            return f"{given} of an end-to-end head (end2end in its metadata)"
        if metadata.nms:
            return f"{given} after non-maximum suppression (nms in its metadata)"
        names = metadata.names
    except UserError as error:
        return f"cannot be decoded: {error.message}"
    if names and isinstance(rows, int) and rows - 4 != len(names):
        return f"{given}, which would be {rows - 4} classes, and its metadata name {len(names)}"
    return ""


def other_task(metadata: ModelMetadata, outputs: Mapping[str, Dims]) -> str:
    """What to say of a file that does not call itself a detector; empty of one that does."""
    return "" if metadata.detects else f"{_given(outputs)}, and its task is {metadata.task or 'not told'}"


def _given(outputs: Mapping[str, Dims]) -> str:
    return f"gives {', '.join(f'{name} {list(dims)}' for name, dims in outputs.items())}"


def no_detector(name: str, found: str) -> UserError:
    """What to raise for a file that ``found`` tells from a detector."""
    return UserError(
        f"{name} is not a detector: it {found}; expected is one image input [B, 3, H, W], one output "
        "[B, 4 + classes, anchors] and the task detect in its metadata",
        NO_DETECTOR_HINT,
    )


NO_DETECTOR_HINT = (
    "Export it from its checkpoint: acmix-deploy export. Non-maximum suppression and end-to-end heads in a file are "
    "not supported yet."
)


def spoilt(output: Array, confidence: float) -> str:
    """What keeps an output [B, 4 + classes, anchors] from being decoded; empty where nothing does.

    A box that is not finite spoils nothing where its score is finite and not above the confidence.
    """
    best = output[:, 4:].max(axis=1)  # NaN where one is among the scores
    counted = ~((best >= -_ROUNDING) & (best <= confidence))
    scores, boxes = best[counted], output[:, :4].transpose(0, 2, 1)[counted]
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        return "boxes or scores that are not finite"
    if not _within(scores):
        return f"scores from {scores.min():.3g} to {scores.max():.3g}, which are 0 to 1"
    return ""


def _within(scores: Array) -> bool:
    return bool(((scores >= -_ROUNDING) & (scores <= 1 + _ROUNDING)).all())


_ROUNDING = 0.01  # beyond [0, 1] that a score may lie; a step of float16 at 1 is 0.001


def decode(
    output: Array,
    placements: Sequence[Placement],
    *,
    confidence: float = CONFIDENCE,
    iou: float = IOU,
    most: int | None = MOST,
    by_class: bool = False,
) -> list[Detections]:
    """Detections by class-wise non-maximum suppression, as Ultralytics' ``predict`` finds them.

    Args:
        output: [B, 4 + classes, anchors], any floating-point type: (x, y, width, height) of boxes around their centres
            in pixels of the input, then the score of each class in [0, 1]. A box counts for its best class alone, and
            one that is not finite does not count.
        placements: of each image in the input.
        confidence: scores have to be above it.
        iou: of two boxes of one class that overlap by more, as intersection over union, the one of the higher score
            stays.
        most: detections in an image at most; all of them with None.
        by_class: tell the scores of the other classes too.

    Raises:
        MissingComponent: OpenCV is not installed.
    """
    suppress = opencv().dnn.NMSBoxesBatched
    found = []
    for image, placement in zip(output.astype(np.float32), placements, strict=True):
        boxes, scores = image[:4].T, image[4:].max(axis=0)
        seen = (scores > confidence) & np.isfinite(boxes).all(axis=1)
        boxes, scores, classes = boxes[seen], scores[seen], image[4:, seen].argmax(axis=0)
        half = boxes[:, 2:] / 2
        corners = np.hstack((boxes[:, :2] - half, boxes[:, :2] + half))
        # OpenCV keeps classes apart by shifting their boxes, for which none may be negative.
        rectangles = np.hstack((corners[:, :2] - corners[:, :2].min(axis=0, initial=0), boxes[:, 2:]))
        kept = np.asarray(suppress(rectangles.astype(np.float64), scores, classes, confidence, iou), np.int64)
        kept = kept.reshape(-1)[:most]
        every = image[4:, seen][:, kept].T if by_class else None
        found.append(Detections(placement.undo(corners[kept]), scores[kept], classes[kept], every))
    return found
