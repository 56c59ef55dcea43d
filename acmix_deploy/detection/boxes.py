"""From what a detector gives to detections in the pixels of the image; needs neither PyTorch nor ONNX."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from acmix_deploy.detection.images import Boxes, Placement, opencv
from acmix_deploy.errors import UserError

Array = NDArray[Any]

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


def names_of(metadata: Mapping[str, str]) -> dict[int, str]:
    """The class names that an export left in a file's metadata, by index; empty where it left none.

    Raises:
        UserError: what is there is something else.
    """
    told = metadata.get("names", "{}")
    try:
        return _NAMES.validate_python(ast.literal_eval(told))
    except (ValueError, SyntaxError) as error:
        raise UserError(
            f"the metadata tell the names {told!r:.60}, and expected are names by class, such as {{0: 'person'}}",
            "Export the file from its checkpoint: acmix-deploy export",
        ) from error


_NAMES = TypeAdapter(dict[int, str])


def is_detector(metadata: Mapping[str, str], outputs: Mapping[str, Array]) -> bool:
    """Whether a file is a detector by its metadata and gives one output [B, 4 + classes, anchors]."""
    shapes = [output.shape for output in outputs.values()]
    return metadata.get("task") == "detect" and len(shapes) == 1 and len(shapes[0]) == 3 and shapes[0][1] > 4


def parts(output: Array) -> dict[str, Array]:
    """The boxes [B, 4, anchors] and the scores [B, classes, anchors] of a detector's output.

    Boxes are hundreds of pixels large and scores at most 1: a norm of both shows nothing of the scores.
    """
    return {"boxes": output[:, :4], "scores": output[:, 4:]}


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
