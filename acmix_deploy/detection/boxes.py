"""From what a model gives to detections in the pixels of the image; needs neither PyTorch nor ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.detection import rotated
from acmix_deploy.detection.heads import Array, Head, NoHead, head_of
from acmix_deploy.detection.images import Boxes, Placement, opencv
from acmix_deploy.detection.masks import Mask, Polygon, masks_of
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.detection.suppression import CONFIDENCE, IOU, MOST, Suppression
from acmix_deploy.errors import UserError

TOP = 5
"""Classes of an image that are told, of the task "classify"."""


class Detections(NamedTuple):
    """What was found in one image, the highest score first."""

    boxes: Boxes
    """[N, 4] float32, corners (x1, y1, x2, y2) in pixels of the original image; the whole image for "classify"."""
    scores: NDArray[np.float32]
    """[N]"""
    classes: NDArray[np.int64]
    """[N], indices of classes."""
    by_class: NDArray[np.float32] | None = None
    """[N, classes], the scores of every class, where they were asked for and the model tells them."""
    keypoints: NDArray[np.float32] | None = None
    """[N, K, 2 or 3] of "pose": x and y in pixels of the original image, and how visible the point is, 0 to 1."""
    corners: NDArray[np.float32] | None = None
    """[N, 4, 2] of "obb": of the rotated box, which may reach beyond the image."""
    masks: Sequence[Mask] | None = None
    """N of "segment"."""
    of_image: bool = False
    """Whether they are classes of the image as a whole."""

    def only(self, index: int) -> Detections:
        """One of them."""
        told = {name: value for name, value in self._asdict().items() if value is not None and name != "of_image"}
        return self._replace(**{name: value[index : index + 1] for name, value in told.items()})


class Detection(BaseModel):
    """A box in an image."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="name of the class")
    score: float = Field(description="0 to 1")
    box: tuple[float, float, float, float] = Field(description="x1, y1, x2, y2 in pixels of the original image")
    keypoints: list[tuple[float, ...]] | None = Field(
        default=None, description="of pose: x, y in pixels, and where the model tells it how visible, 0 to 1"
    )
    corners: list[tuple[float, float]] | None = Field(
        default=None, description="of obb: x, y of the four corners of the rotated box, in pixels"
    )
    mask: list[Polygon] | None = Field(
        default=None, description="of segment: outlines of the object's parts, each as points x, y in pixels"
    )

    def __str__(self) -> str:
        return f"{self.name} {self.score:.2f} at {', '.join(f'{edge:.0f}' for edge in self.box)}"


def named(found: Detections, names: Mapping[int, str]) -> list[Detection]:
    """Detections one by one; a class without a name is called by its index."""

    def rounded(array: Array) -> list[list[float]]:
        return array.astype(np.float64).round(2).tolist()  # type: ignore[no-any-return]

    detections = []
    for index, (kind, score) in enumerate(zip(found.classes.tolist(), found.scores.tolist(), strict=True)):
        more: dict[str, object] = {}
        if found.keypoints is not None:
            more["keypoints"] = rounded(found.keypoints[index])
        if found.corners is not None:
            more["corners"] = rounded(found.corners[index])
        if found.masks is not None:
            more["mask"] = found.masks[index].polygons()
        box = rounded(found.boxes[index])
        detections.append(
            Detection.model_validate({"name": names.get(kind, str(kind)), "score": round(score, 5), "box": box, **more})
        )
    return detections


def unlike_detector(metadata: ModelMetadata, outputs: Mapping[str, Array]) -> str:
    """Why what a file gave cannot be decoded, by its axes and its values; empty where it can be.

    Args:
        metadata: what the exporter left in the file.
        outputs: what it gave, by name, on an image or on noise.
    """
    try:
        head = head_of(metadata, {name: output.shape for name, output in outputs.items()})
    except NoHead as error:
        return str(error)
    output, name = outputs[head.output].astype(np.float32), head.output
    like_rows = output.shape[2] == 6 if head.layout == "anchors" else head.layout == "objectness" and head.width == 6
    if like_rows and _are_ranked(output):
        return f"gives {name} {list(output.shape)}, whose rows are a box, a score and a class"
    rows = _by_box(head, output)
    if head.ranks and not _are_ranked(rows):
        return f"gives {name} {list(output.shape)}, whose rows are no box, score and class"
    scores = rows[..., 4:5] if head.ranks else _scores(head, rows)
    if not _within(scores) and np.isfinite(scores).all():
        return f"gives {name} with scores from {scores.min():.3g} to {scores.max():.3g}, which are 0 to 1"
    return ""


def _are_ranked(rows: Array) -> bool:
    """Whether the rows [B, N, 6 or more] have a score and a class behind the box."""
    return _within(rows[..., 4]) and _are_classes(rows[..., 5], 0)


def no_detector(name: str, found: str) -> UserError:
    """What to raise for a file that ``found`` tells from those that are decoded."""
    return UserError(
        f"{name} is not a detector: it {found}; expected are one image input [B, 3, H, W], and a task and outputs of "
        "those that docs/detect.md lists",
        NO_DETECTOR_HINT,
    )


NO_DETECTOR_HINT = (
    "Export it from its checkpoint: acmix-deploy export. An ONNX file of another exporter can be told what it lacks: "
    "docs/detect.md#a-file-that-does-not-tell."
)


def spoilt(head: Head, outputs: Mapping[str, Array], confidence: float) -> str:
    """What keeps outputs from being decoded; empty where nothing does.

    A box that is not finite spoils nothing where its score is finite and not above the confidence.
    """
    rows = _by_box(head, outputs[head.output])
    if head.layout == "classes":
        best = rows.max(axis=-1, keepdims=True)
        rows = rows[:, None]
    else:
        best = rows[..., 4] if head.ranks else _scores(head, rows).max(axis=-1)
    counted = ~((best >= -_ROUNDING) & (best <= confidence))  # NaN where one is among the scores
    scores, boxes = best[counted], rows[counted]
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        return "boxes or scores that are not finite"
    if not _within(scores):
        return f"scores from {scores.min():.3g} to {scores.max():.3g}, which are 0 to 1"
    if len(scores) and head.prototypes and not np.isfinite(outputs[head.prototypes]).all():
        return "prototypes of masks that are not finite"
    if head.ranks and not _are_classes(boxes[:, 5], head.classes):
        return f"classes from {boxes[:, 5].min():.3g} to {boxes[:, 5].max():.3g}, which are 0 to {head.classes - 1}"
    return ""


def _are_classes(indices: Array, classes: int) -> bool:
    """Whether they are indices of that many classes, 0 where their number is not known."""
    return bool(((indices >= 0) & (indices == indices.round()) & (indices < (classes or np.inf))).all())


def _within(scores: Array) -> bool:
    return bool(((scores >= -_ROUNDING) & (scores <= 1 + _ROUNDING)).all())


_ROUNDING = 0.01  # beyond [0, 1] that a score may lie; a step of float16 at 1 is 0.001


def _by_box(head: Head, output: Array) -> Array:
    """The first output with the values of a box last."""
    return output.swapaxes(1, 2) if head.layout == "anchors" else output


def _scores(head: Head, rows: Array) -> Array:
    """[..., classes] of a head that does not rank."""
    if head.layout == "classes":
        return rows
    scores = rows[..., head.width - head.classes : head.width]
    return scores * rows[..., 4:5] if head.layout == "objectness" else scores


def decode(
    head: Head,
    outputs: Mapping[str, Array],
    placements: Sequence[Placement],
    *,
    confidence: float = CONFIDENCE,
    iou: float = IOU,
    most: int | None = MOST,
    by_class: bool = False,
) -> list[Detections]:
    """Detections as Ultralytics' ``predict`` finds them: by class-wise non-maximum suppression, or as the head selects.

    Args:
        head: what the outputs are.
        outputs: by name, any floating-point type. A box counts for its best class alone, and one that is not finite
            does not count.
        placements: of each image in the input.
        confidence: scores have to be above it, but for "classify", of which the best :data:`TOP` classes are told.
        iou: of two boxes of one class that overlap by more, as intersection over union, the one of the higher score
            stays; of rotated boxes see :func:`acmix_deploy.detection.rotated.kept`.
        most: detections in an image at most; all of them with None.
        by_class: tell the scores of the other classes too.

    Raises:
        MissingComponent: OpenCV is not installed.
    """
    rows = _by_box(head, outputs[head.output].astype(np.float32, copy=False))
    found = []
    for index, placement in enumerate(placements):
        if head.layout == "classes":
            found.append(_best_classes(rows[index], placement, most, by_class))
            continue
        image, scores, classes, every = _counted(head, rows[index], confidence)
        boxes, extra = image[:, :4], image[:, head.width :]
        turned = np.hstack((boxes, extra[:, -1:])) if head.task == "obb" else None
        if head.layout != "rows":
            boxes = _corners(boxes)
        if head.layout in ("queries", "ranked queries"):
            boxes = boxes * np.tile(np.array(placement.canvas[::-1], np.float32), 2)
        if head.selects:
            kept = np.argsort(-scores, kind="stable")
        elif turned is not None:
            kept = rotated.kept(turned, scores, classes, iou)
        else:
            kept = _suppressed(boxes, scores, classes, confidence, iou)
        kept = kept[:most]
        boxes = placement.undo(boxes[kept])
        corners = keypoints = masks = None
        if turned is not None:
            corners = placement.points(rotated.corners(turned[kept]))
            height, width = placement.original
            ends = corners.min(axis=1, initial=np.inf), corners.max(axis=1, initial=-np.inf)
            boxes = np.hstack(ends).clip(0, (width, height) * 2) if len(kept) else boxes
        if head.task == "pose":
            keypoints = extra[kept].reshape(-1, *head.keypoints)
            edge = placement.original[::-1]
            points = placement.points(keypoints[..., :2]).clip(0, edge)
            keypoints = np.concatenate((points, keypoints[..., 2:]), axis=2).astype(np.float32)
        if head.prototypes:
            masks = masks_of(outputs[head.prototypes][index], extra[kept], boxes, placement)
            there = [place for place, mask in enumerate(masks) if mask.pixels.any()]
            boxes, kept, masks = boxes[there], kept[there], [masks[place] for place in there]
        told = every[kept] if by_class and every is not None else None
        found.append(Detections(boxes, scores[kept], classes[kept], told, keypoints, corners, masks))
    return found


def suppressed(head: Head, outputs: Mapping[str, Array], suppression: Suppression) -> NDArray[np.float32]:
    """What a file gives that has the suppression inside: rows [B, N, 6], (x1, y1, x2, y2, score, class), corners in
    pixels of the network's input, the highest score first, then zeros. All rows of an image are NaN in which a score is
    not finite, or a box that would count.

    Args:
        head: what the outputs are, of the task "detect", in the layout "anchors" or "objectness".
        outputs: by name, any floating-point type; see :func:`decode`.
        suppression: thresholds, and N.

    Raises:
        MissingComponent: OpenCV is not installed.
    """
    rows = _by_box(head, outputs[head.output].astype(np.float32))
    found = np.zeros((len(rows), suppression.most, 6), np.float32)
    for image, told in zip(rows, found, strict=True):
        every = _scores(head, image)
        harmless = np.isfinite(every).all(axis=1) & (every.max(axis=1) <= suppression.confidence)
        if not np.isfinite(image[~harmless]).all():
            told[:] = np.nan
            continue
        counted, scores, classes, _ = _counted(head, image, suppression.confidence)
        boxes = _corners(counted[:, :4])
        apart = classes if suppression.by_class else np.zeros_like(classes)
        kept = _suppressed(boxes, scores, apart, suppression.confidence, suppression.iou)[: suppression.most]
        told[: len(kept)] = np.column_stack((boxes[kept], scores[kept], classes[kept]))
    return found


def _counted(head: Head, rows: Array, confidence: float) -> tuple[Array, Array, Array, Array | None]:
    """Of an image the rows whose best score is above the confidence, that score, its class, and where they are told
    the scores of all classes; what is not finite is left out."""
    every = None if head.ranks else _scores(head, rows)
    scores = rows[:, 4] if every is None else every.max(axis=1)
    seen = scores > confidence
    seen[seen] = np.isfinite(rows[seen]).all(axis=1)
    rows, scores, every = rows[seen], scores[seen], None if every is None else every[seen]
    classes = rows[:, 5].astype(np.int64) if every is None else every.argmax(axis=1)
    return rows, scores, classes, every


def _corners(boxes: Array) -> Array:
    """Boxes (x, y, width, height) by their corners."""
    half = boxes[:, 2:] / 2
    return np.hstack((boxes[:, :2] - half, boxes[:, :2] + half))


def _suppressed(boxes: Array, scores: Array, classes: Array, confidence: float, iou: float) -> NDArray[np.int64]:
    # OpenCV keeps classes apart by shifting their boxes, for which none may be negative.
    rectangles = np.hstack((boxes[:, :2] - boxes[:, :2].min(axis=0, initial=0), boxes[:, 2:] - boxes[:, :2]))
    suppress = opencv().dnn.NMSBoxesBatched
    kept = suppress(rectangles.astype(np.float64), scores, classes, confidence, iou)
    return np.asarray(kept, np.int64).reshape(-1)


def _best_classes(scores: Array, placement: Placement, most: int | None, by_class: bool) -> Detections:
    """The best classes of an image, each with the box of all of it."""
    kept = np.argsort(-scores, kind="stable")[: TOP if most is None else min(TOP, most)]
    height, width = placement.original
    boxes = np.tile(np.array([0, 0, width, height], np.float32), (len(kept), 1))
    every = np.tile(scores, (len(kept), 1)) if by_class else None
    return Detections(boxes, scores[kept], kept.astype(np.int64), every, of_image=True)
