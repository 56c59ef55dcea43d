"""How many of the labelled objects a detector finds: mean average precision, as COCO defines it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.detection.boxes import Detections, decode, no_detector
from acmix_deploy.detection.heads import Array, NoHead, head_of
from acmix_deploy.detection.images import Boxes, placed_batches
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.detection.suppression import IOU, MOST
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.process import unprinted
from acmix_deploy.runtime.inputs import Shape
from acmix_deploy.runtime.models import Model

UNUSABLE = 0.1
"""Share of the labels that may be malformed or of a class that the model does not have; these are left out."""

_LEAST = 0.001  # confidence, as Ultralytics' `val` has it
_EDGE = 0.01  # beyond the image's edge, as a share of it, that a label may lie for rounding
_SHOWN = 3  # labels that are named
HINT = "Labels are in YOLO's form: a class, then x, y, width and height as shares of the image, 0 to 1."


class Accuracy(BaseModel):
    """Of one file, on labelled images."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="of the file")
    images: int = Field(description="labelled images that it was run on")
    objects: int = Field(description="labels in them")
    map50: float = Field(description="mean average precision at an intersection over union of 0.5, 0 to 1")
    map50_95: float = Field(description="the mean of those at 0.5, 0.55 and so on to 0.95")


class Labels(NamedTuple):
    """What is in one image."""

    classes: NDArray[np.int64]
    """[N]"""
    boxes: Boxes
    """[N, 4], corners (x1, y1, x2, y2) as shares of the image."""
    unusable: tuple[str, ...] = ()
    """What is wrong with each of the other lines."""


class Seen(NamedTuple):
    """One image."""

    labels: Labels
    detections: Detections
    size: tuple[int, int]
    """Height and width in pixels."""


class Truth(NamedTuple):
    """Labelled images."""

    labels: dict[Path, Labels]
    """By image."""
    notes: tuple[str, ...]
    """Which labels are left out."""

    @property
    def objects(self) -> int:
        """How many there are in all images."""
        return sum(len(labels.classes) for labels in self.labels.values())


def label_file(image: Path) -> Path:
    """Where the labels of an image are in YOLO's form: beside it, or in ``labels`` where it is in ``images``."""
    parts = [*image.with_suffix(".txt").parts]
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts)


def read_labels(path: Path, metadata: ModelMetadata) -> Labels:
    """The labels of an image, a line for each object: class, then x, y, width and height of its box (and keypoints
    behind it, of the task "pose"), or the points of its outline; as shares of the image.

    Args:
        path: the file. Lines that are something else are left out.
        metadata: tell the task, and the names of the classes where all others are left out.
    """
    classes, boxes, unusable = [], [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            kind, box = _parsed(line, metadata.task)
        except ValueError:
            unusable.append(f"{where} is {line!r:.60}")
            continue
        if metadata.names and kind not in metadata.names:
            unusable.append(f"{where} is of the class {kind}, and the model has {len(metadata.names)}")
            continue
        classes.append(kind)
        boxes.append(box)
    return Labels(np.array(classes, np.int64), np.array(boxes, np.float32).reshape(-1, 4), tuple(unusable))


def _parsed(line: str, task: str | None) -> tuple[int, list[float]]:
    """Class and corners. Raises ValueError where a line is no label."""
    kind, *values = map(float, line.split())
    if kind != int(kind) or kind < 0:
        raise ValueError(line)
    if len(values) > 4 and task != "pose":
        points = np.array(values).reshape(-1, 2)
        box = [*points.min(axis=0), *points.max(axis=0)]
    else:
        x, y, width, height = values[:4]
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    if not all(-_EDGE <= edge <= 1 + _EDGE for edge in box):
        raise ValueError(line)
    return int(kind), box


def read_truth(images: Sequence[Path], metadata: ModelMetadata) -> Truth:
    """The labels of all images.

    Args:
        images: with labels, see :func:`label_file`.
        metadata: see :func:`read_labels`.

    Raises:
        UserError: more than :data:`UNUSABLE` of the labels cannot be used.
    """
    truth = {image: read_labels(label_file(image), metadata) for image in images}
    unusable = [why for labels in truth.values() for why in labels.unusable]
    found = Truth(truth, ())
    shown = "; ".join(unusable[:_SHOWN]) + (f"; and {len(unusable) - _SHOWN} more" if len(unusable) > _SHOWN else "")
    count = found.objects + len(unusable)
    if len(unusable) > UNUSABLE * count:
        raise UserError(
            f"{len(unusable)} of {count} labels cannot be used, and at most {UNUSABLE:.0%} may be so: {shown}", HINT
        )
    return found._replace(notes=(f"{len(unusable)} of {count} labels are left out: {shown}",) if unusable else ())


def labelled(images: Sequence[Path]) -> list[Path]:
    """Those that have a file of labels; an empty one is that of a background."""
    return [image for image in images if label_file(image).is_file()]


def measure(model: Model, shape: Shape, truth: Truth, metadata: ModelMetadata) -> Accuracy:
    """Run a file on labelled images and compare the boxes that it finds with the labels. See :func:`look`."""
    map50, map50_95 = average_precision(look(model, shape, truth, metadata))
    name = model.runner.name
    return Accuracy(name=name, images=len(truth.labels), objects=truth.objects, map50=map50, map50_95=map50_95)


def look(model: Model, shape: Shape, truth: Truth, metadata: ModelMetadata) -> list[Seen]:
    """Run a file on labelled images.

    Args:
        model: of a task whose boxes are along the axes of the image; not active.
        shape: [B, 3, H, W] to run it at.
        truth: what is in which images.
        metadata: what the file gives, and how images are fitted.

    Raises:
        UserError: the outputs cannot be decoded.
        MissingComponent: pycocotools is not installed.
    """
    _coco()
    images = list(truth.labels)
    found: dict[Path, Detections] = {}
    sizes: dict[Path, tuple[int, int]] = {}
    (node,) = model.inputs
    with model.runner as runner:
        for batch in placed_batches(images, [shape], metadata.letterbox):
            outputs: dict[str, Array] = runner.infer({node.name: batch.images.astype(node.dtype)})
            try:
                head = head_of(metadata, {name: array.shape for name, array in outputs.items()})
            except NoHead as error:
                raise no_detector(runner.name, str(error)) from error
            each = decode(head, outputs, batch.placements, confidence=_LEAST, iou=IOU, most=MOST)
            for path, placement, detections in zip(batch.paths, batch.placements, each, strict=True):
                found[path], sizes[path] = detections, placement.original
    return [Seen(truth.labels[image], found[image], sizes[image]) for image in images]


def average_precision(images: Sequence[Seen]) -> tuple[float, float]:
    """At an overlap of 0.5, and averaged over those from 0.5 to 0.95; of every class that is in the labels."""
    coco, evaluator = _coco()
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for index, (labels, detections, (height, width)) in enumerate(images, 1):
        for kind, corners in zip(labels.classes.tolist(), labels.boxes * np.tile((width, height), 2), strict=True):
            box = _sides(corners)
            area = box[2] * box[3]
            own = {"id": len(annotations) + 1, "image_id": index, "category_id": kind}
            annotations.append({**own, "bbox": box, "area": area, "iscrowd": 0})
        rows = zip(detections.classes.tolist(), detections.scores.tolist(), detections.boxes, strict=True)
        results += [
            {"image_id": index, "category_id": kind, "bbox": _sides(corners), "score": score}
            for kind, score, corners in rows
        ]
    if not annotations or not results:
        return 0.0, 0.0
    truth = coco()
    truth.dataset = {
        "info": {},
        "images": [{"id": index + 1} for index in range(len(images))],
        "annotations": annotations,
        "categories": [{"id": kind} for kind in sorted({entry["category_id"] for entry in annotations})],
    }
    with unprinted():
        truth.createIndex()
        evaluation = evaluator(truth, truth.loadRes(results), "bbox")
        evaluation.params.maxDets = [MOST]
        evaluation.evaluate()
        evaluation.accumulate()
    precision: Any = evaluation.eval["precision"][:, :, :, 0, 0]  # [overlaps, recalls, classes], of objects of any size
    return round(float(precision[0].mean()), 5), round(float(precision.mean()), 5)


def _coco() -> tuple[Any, Any]:
    """The classes COCO and COCOeval. Raises MissingComponent."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as error:
        raise MissingComponent(
            "mean average precision needs pycocotools, which is not installed", "Run: pip install pycocotools"
        ) from error
    return COCO, COCOeval


def _sides(corners: NDArray[Any]) -> list[float]:
    """Left, top, width and height."""
    left, top, right, bottom = map(float, corners)
    return [left, top, right - left, bottom - top]
