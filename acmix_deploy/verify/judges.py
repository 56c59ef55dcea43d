"""What a model in memory loses against the file that it was made from: judges of a search for a better one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from acmix_deploy.detection.boxes import decode, no_detector, unlike_detector
from acmix_deploy.detection.heads import NoHead, head_of
from acmix_deploy.detection.images import Batch, find, placed_batches
from acmix_deploy.detection.matching import NEAR
from acmix_deploy.detection.suppression import CONFIDENCE
from acmix_deploy.errors import UserError
from acmix_deploy.half import runnable
from acmix_deploy.process import polygraphy_unlogged
from acmix_deploy.processing import network_of
from acmix_deploy.runtime.inputs import Shape
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.runtime.models import Model, open_model
from acmix_deploy.runtime.onnxruntime import onnx_runner, open_session
from acmix_deploy.verify.accuracy import HINT, Seen, average_precision, labelled, look, read_truth
from acmix_deploy.verify.detections import DetectionComparison, Scenes, compare_detections
from acmix_deploy.verify.limits import DETECTION_LIMITS

_FOLDS = 5  # of the images, to tell how much their choice matters
_IMAGES = 128  # at most, where outputs of the float file are kept


class ByLabels:
    """The mean average precision of a model, and its drop against the float file in points of mAP50-95.

    Args:
        source: the float file, an ONNX detector of a task whose boxes are along the axes of the image.
        shape: [B, 3, H, W] to run at.
        images: a folder or a data set with labels in YOLO's form.
        accepted: drop that is, for a note where there are too few labels to tell it.

    Raises:
        UserError: there are no labels, too many that cannot be used, or the file is not such a detector.
        MissingComponent: pycocotools is not installed.
    """

    def __init__(self, source: Path, shape: Shape, images: Path, accepted: float) -> None:
        self._float = _network(source)
        self._shape = shape
        metadata = self._float.metadata
        if not metadata.detects or metadata.task in ("classify", "obb"):
            raise UserError(
                f"mean average precision is of boxes along the axes of the image, and the task of {source} is "
                f"{metadata.task or 'not told'}",
                "Judge it by --max-lost and --max-score-change."
                if metadata.detects
                else "Export it from its checkpoint: acmix-deploy export.",
            )
        photos = find(images).paths
        self.images = labelled(photos)
        if not self.images:
            raise UserError(
                f"none of the {len(photos)} images of {images} has labels, expected beside it or in labels/ beside "
                "images/",
                "Without labels judge by --max-lost and --max-score-change.",
            )
        self._truth = read_truth(self.images, metadata)
        if not self._truth.objects:
            raise UserError(f"the label files of the {len(self.images)} images of {images} hold no label", HINT)
        self._right = self._look(network_of(source))
        map50, map50_95 = average_precision(self._right)
        self.reference = {"map50": map50, "map50_95": map50_95}
        if not map50_95:
            raise UserError(
                f"{source} finds nothing of what the labels in {images} tell, so that nothing can be lost",
                "Give the images and labels that it was validated on.",
            )
        self._notes = [*self._truth.notes]
        if unlabelled := len(photos) - len(self.images):
            self._notes.append(f"{unlabelled} of {len(photos)} images have no file of labels and were left out")
        objects, limit = self._truth.objects, f"{accepted:g} points"
        self._notes += _too_few(len(self.images), objects, "labels", accepted / 100, limit)
        self._accepted, self._error = accepted, 0.0

    @property
    def notes(self) -> list[str]:
        """What to say of the labels, and of how much could be told from them."""
        if self._error <= self._accepted:
            return self._notes
        return [
            *self._notes,
            f"{len(self.images)} images tell a drop to {self._error:.2g} points (standard error), and "
            f"{self._accepted:g} cannot be told from chance",
        ]

    def __call__(self, model: onnx.ModelProto) -> dict[str, float]:
        """map50, map50_95, map_drop, and its standard error where there are enough images."""
        found = self._look(model)
        map50, map50_95 = average_precision(found)
        figures = {"map50": map50, "map50_95": map50_95}
        figures["map_drop"] = round(100 * (self.reference["map50_95"] - map50_95), 3)
        if len(found) >= 2 * _FOLDS:
            self._error = figures["map_drop_error"] = round(self._spread(found) / _FOLDS**0.5, 3)
        return figures

    def _spread(self, found: Sequence[Seen]) -> float:
        """Standard deviation of the drop in every fifth image, in points."""
        folds = range(_FOLDS)
        before = [average_precision(self._right[fold::_FOLDS])[1] for fold in folds]
        after = [average_precision(found[fold::_FOLDS])[1] for fold in folds]
        return 100 * float(np.std(np.subtract(before, after), ddof=1))

    def _look(self, model: Path | onnx.ModelProto) -> list[Seen]:
        runner = onnx_runner(runnable(model), model.name if isinstance(model, Path) else "INT8")
        with polygraphy_unlogged():
            return look(self._float._replace(runner=runner), self._shape, self._truth, self._float.metadata)


class ByDetections:
    """The detections that a model loses against the float file, and how far scores are off.

    Args:
        source: the float file, an ONNX detector.
        shape: [B, 3, H, W] to run at.
        images: a folder or a data set, of which at most 128 images are taken.
        accepted: share that may be lost, for a note where there are too few detections to tell it.

    Raises:
        UserError: the file is no detector, or detects nothing.
    """

    def __init__(self, source: Path, shape: Shape, images: Path, accepted: float) -> None:
        model = _network(source)
        (node,) = model.inputs
        self._scenes = Scenes(node.name, (), model.metadata.names)
        self._shape, self._letterbox = shape, model.metadata.letterbox
        photos = find(images, _IMAGES)
        self.images = photos.paths
        self._expected = self._run(open_session(network_of(source)))
        for outputs in self._expected:
            try:
                self._head = head_of(model.metadata, {name: array.shape for name, array in outputs.items()})
            except NoHead as error:
                raise no_detector(str(source), str(error)) from error
            if unlike := unlike_detector(model.metadata, outputs):
                raise no_detector(str(source), unlike)
        count = sum(
            len(found.scores)
            for batch, outputs in zip(self._batches(), self._expected, strict=True)
            for found in decode(self._head, outputs, batch.placements, confidence=CONFIDENCE)
        )
        if not count:
            raise UserError(
                f"{source} detects nothing in the {len(self.images)} images of {images}, so that nothing can be lost",
                "Give images of what it was trained on.",
            )
        self.reference = {"detections": float(count)}
        self.notes = _too_few(len(self.images), count, "detections", accepted, f"{accepted:.1%}")

    def __call__(self, model: onnx.ModelProto) -> dict[str, float]:
        """lost, which is the larger one of the shares that are lost or added, and score_change, on average."""
        actual = self._run(open_session(runnable(model)))
        images = [
            image
            for batch, right, other in zip(self._batches(), self._expected, actual, strict=True)
            for image in compare_detections(
                self._scenes._replace(batches=[batch]), self._head, [(right, other)], NEAR["int8"]
            )
        ]
        found = DetectionComparison(
            candidate="INT8",
            precision="int8",
            confidence=0.0 if self._head.layout == "classes" else CONFIDENCE,
            images=tuple(images),
            limits=DETECTION_LIMITS["int8"],
        )
        change = 1.0 if found.mean_score_change is None else found.mean_score_change
        return {"lost": round(max(found.lost_share, found.added_share), 5), "score_change": round(change, 5)}

    def _batches(self) -> Iterator[Batch]:
        return placed_batches(self.images, [self._shape], self._letterbox)

    def _run(self, session: Any) -> list[dict[str, Array]]:
        names = [node.name for node in session.get_outputs()]
        return [
            dict(zip(names, session.run(None, {self._scenes.input: batch.images}), strict=True))
            for batch in self._batches()
        ]


def _network(source: Path) -> Model:
    """A file, told as the network in it."""
    model = open_model(source)
    return model._replace(metadata=model.metadata.with_suppression(None))


def _too_few(images: int, objects: int, what: str, accepted: float, limit: str) -> list[str]:
    """A note where one object more or less changes the figure by more than is accepted."""
    if objects * accepted >= 1:
        return []
    return [
        f"judged on {images} image{'s' * (images > 1)} with {objects} {what}: one of them is {1 / objects:.1%}, and "
        f"{limit} cannot be told"
    ]
