"""Judge a detector by what it detects: distances of outputs say little about boxes that come and go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy.detection.boxes import TOP, Detection, Detections, decode, named
from acmix_deploy.detection.drawing import SEEN
from acmix_deploy.detection.heads import Head
from acmix_deploy.detection.images import Batch, find, placed_batches
from acmix_deploy.detection.matching import Match, match
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.detection.suppression import CONFIDENCE
from acmix_deploy.runtime.inputs import Shape
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.verify.limits import DetectionLimits

_MOST = 1000  # detections in an image, more than predictions give, so that the last one is not lost by its rank

Outcome = Literal["matched", "class changed", "lost", "added"]


class Scenes(NamedTuple):
    """Images to compare detections on."""

    input: str
    """Name of the model's input."""
    batches: Sequence[Batch]
    """The images as the model takes them, and where each lies in it."""
    names: Mapping[int, str]
    """Of the classes, by their indices; a class without a name is called by its index."""
    confidence: float = CONFIDENCE
    """Score above which there is a detection."""
    skipped: Mapping[str, str] = MappingProxyType({})
    """Files of the folder that cannot be read, and why."""

    @classmethod
    def read(
        cls,
        name: str,
        folder: Path,
        shapes: Sequence[Shape],
        metadata: ModelMetadata,
        *,
        limit: int,
        confidence: float = CONFIDENCE,
    ) -> Scenes:
        """Up to ``limit`` images of a folder as batches of all ``shapes`` of the input ``name``.

        Raises:
            UserError: there is no readable image, or a shape is not that of colour images.
            MissingComponent: OpenCV is not installed.
        """
        photos = find(folder, limit)
        batches = [*placed_batches(photos.paths, shapes, metadata.letterbox)]
        return cls(name, batches, metadata.names, confidence, photos.skipped)

    @property
    def feeds(self) -> list[dict[str, Array]]:
        """The images as inputs."""
        return [{self.input: batch.images} for batch in self.batches]


class DetectionPair(BaseModel):
    """A detection of the reference and what the candidate has in its place."""

    model_config = ConfigDict(frozen=True)

    reference: Detection | None = Field(description="None where only the candidate has one")
    candidate: Detection | None = Field(description="None where only the reference has one")
    iou: float = Field(description="intersection over union of the two boxes, 0 where there is one alone")
    mask_iou: float | None = Field(default=None, description="the same of the two masks, where there are two")
    keypoint_distance: float | None = Field(
        default=None,
        description="mean distance of the keypoints that either sees, over the square root of the reference's box",
    )
    top5: float | None = Field(
        default=None, description="share of the reference's five best classes that are among the candidate's"
    )

    @computed_field(description="whether the two match, are of different classes, or one is missing")  # type: ignore[prop-decorator]
    @property
    def outcome(self) -> Outcome:
        if self.reference is None:
            return "added"
        if self.candidate is None:
            return "lost"
        return "matched" if self.reference.name == self.candidate.name else "class changed"

    @property
    def score_change(self) -> float:
        """Absolute difference of the scores, of a pair."""
        return abs(self.reference.score - self.candidate.score) if self.reference and self.candidate else 0.0

    @property
    def score(self) -> float:
        """That of the reference, or of the candidate where it is alone."""
        detection = self.reference or self.candidate
        assert detection
        return detection.score

    def __str__(self) -> str:
        if self.outcome == "class changed":
            return f"{self.reference} became {self.candidate}"
        return f"{self.reference or self.candidate} {self.outcome}"


class ImageComparison(BaseModel):
    """The detections of a candidate in one image, against those of the reference."""

    model_config = ConfigDict(frozen=True)

    image: Path = Field(description="the file")
    size: tuple[int, int] = Field(description="height and width that it was letterboxed to")
    pairs: tuple[DetectionPair, ...] = Field(description="one for each detection of either")

    def having(self, *outcomes: Outcome) -> list[DetectionPair]:
        """The pairs of these outcomes."""
        return [pair for pair in self.pairs if pair.outcome in outcomes]

    @property
    def badness(self) -> tuple[int, float]:
        """What the worst image has most of: pairs that do not match, then the change of a score or a box."""
        changes = [
            max(
                pair.score_change,
                1 - pair.iou,
                1 - (1 if pair.mask_iou is None else pair.mask_iou),
                pair.keypoint_distance or 0,
            )
            for pair in self.having("matched")
        ]
        return len(self.having("class changed", "lost", "added")), max(changes, default=0.0)


class DetectionComparison(BaseModel):
    """The detections of one candidate in all images."""

    model_config = ConfigDict(frozen=True)

    candidate: str = Field(description="name of what was compared with the reference")
    precision: str = Field(description="element type that the candidate computes in, or unknown")
    confidence: float = Field(description="score above which there is a detection")
    images: tuple[ImageComparison, ...] = Field(description="one for each image and size, the worst first")
    limits: DetectionLimits = Field(description="what is accepted")

    @computed_field(description="detections of the reference")  # type: ignore[prop-decorator]
    @property
    def expected(self) -> int:
        scores = (pair.reference.score for image in self.images for pair in image.pairs if pair.reference)
        return sum(score > self.confidence for score in scores)

    @computed_field(description="those of them that the candidate has too, of the same class")  # type: ignore[prop-decorator]
    @property
    def matched(self) -> int:
        return self.expected - self.lost - self.class_changes

    @computed_field(description="those whose box the candidate has with another class")  # type: ignore[prop-decorator]
    @property
    def class_changes(self) -> int:
        return self._count("class changed")

    @computed_field(description="those that the candidate does not have at all")  # type: ignore[prop-decorator]
    @property
    def lost(self) -> int:
        return self._count("lost")

    @computed_field(description="detections that the candidate alone has")  # type: ignore[prop-decorator]
    @property
    def added(self) -> int:
        return self._count("added")

    @computed_field(description="share of the reference's detections that are lost or changed their class")  # type: ignore[prop-decorator]
    @property
    def lost_share(self) -> float:
        return (self.lost + self.class_changes) / max(self.expected, 1)

    @computed_field(description="added detections for each of the reference's")  # type: ignore[prop-decorator]
    @property
    def added_share(self) -> float:
        return self.added / max(self.expected, 1)

    @computed_field(description="mean absolute difference of the scores of matches")  # type: ignore[prop-decorator]
    @property
    def mean_score_change(self) -> float | None:
        return self._mean(pair.score_change for pair in self._pairs("matched"))

    @computed_field(description="largest one")  # type: ignore[prop-decorator]
    @property
    def max_score_change(self) -> float | None:
        return max((pair.score_change for pair in self._pairs("matched")), default=None)

    @computed_field(description="mean intersection over union of matches")  # type: ignore[prop-decorator]
    @property
    def mean_iou(self) -> float | None:
        return self._mean(pair.iou for pair in self._pairs("matched"))

    @computed_field(description="smallest one")  # type: ignore[prop-decorator]
    @property
    def min_iou(self) -> float | None:
        return min((pair.iou for pair in self._pairs("matched")), default=None)

    @computed_field(description="mean intersection over union of the masks of matches")  # type: ignore[prop-decorator]
    @property
    def mean_mask_iou(self) -> float | None:
        return self._mean(pair.mask_iou for pair in self._pairs("matched"))

    @computed_field(description="mean distance of the keypoints of matches, over the square root of a box's area")  # type: ignore[prop-decorator]
    @property
    def mean_keypoint_distance(self) -> float | None:
        return self._mean(pair.keypoint_distance for pair in self._pairs("matched"))

    @computed_field(description="mean share of the reference's five best classes among the candidate's")  # type: ignore[prop-decorator]
    @property
    def mean_top5(self) -> float | None:
        return self._mean(pair.top5 for image in self.images for pair in image.pairs)

    @computed_field(description="whether all is within the limits; null where nothing was there to match")  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool | None:
        if self.faults:
            return False
        return True if self._pairs("matched") else None

    @property
    def faults(self) -> list[str]:
        """What is beyond its limit."""
        faults = []
        accepted, near = self.limits.lost * self.expected, self.confidence + 2 * self.limits.near
        for outcomes in (("lost", "class changed"), ("added",)):
            pairs = self._pairs(*outcomes)
            excused = any(pair.score < near for pair in pairs)
            if len(pairs) - excused > accepted:
                faults.append(
                    f"of {self.expected} detections {self.lost} are lost, {self.class_changes} changed their class, "
                    f"{self.added} are added, {self.limits.lost:.1%} is accepted"
                )
                break
        if self.mean_score_change is not None and self.mean_score_change > self.limits.score_change:
            faults.append(
                f"scores differ by {self.mean_score_change:.2g} on average, {self.limits.score_change:g} is accepted"
            )
        if self.mean_iou is not None and self.mean_iou < self.limits.iou:
            faults.append(f"boxes overlap by {self.mean_iou:.3f} on average, {self.limits.iou:g} is expected")
        if self.mean_mask_iou is not None and self.mean_mask_iou < self.limits.iou:
            faults.append(f"masks overlap by {self.mean_mask_iou:.3f} on average, {self.limits.iou:g} is expected")
        if (distance := self.mean_keypoint_distance) is not None and distance > 1 - self.limits.iou:
            faults.append(
                f"keypoints are {distance:.2g} of a box's side apart on average, {1 - self.limits.iou:.2g} is accepted"
            )
        if self.mean_top5 is not None and self.mean_top5 < 1 - self.limits.lost:
            faults.append(
                f"of the five best classes {self.mean_top5:.1%} are the same, {1 - self.limits.lost:.1%} are expected"
            )
        return faults

    def __str__(self) -> str:
        mismatches = self.images[0].having("class changed", "lost", "added")
        shown = "; ".join(map(str, mismatches[:3])) + (" ..." if len(mismatches) > 3 else "")
        worst = [f"worst in {self.images[0].image.name}: {shown}"] if mismatches else []
        return f"{self.candidate}: {'; '.join((*self.faults, *worst))}"

    def _pairs(self, *outcomes: Outcome) -> list[DetectionPair]:
        return [pair for image in self.images for pair in image.having(*outcomes)]

    @staticmethod
    def _mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    def _count(self, *outcomes: Outcome) -> int:
        return len(self._pairs(*outcomes))


def compare_detections(
    scenes: Scenes, head: Head, outputs: Sequence[tuple[Mapping[str, Array], Mapping[str, Array]]], near: float
) -> tuple[ImageComparison, ...]:
    """Compare the detections in every image, the worst image first.

    Args:
        scenes: the images.
        head: what the outputs are.
        outputs: for each batch those of the reference and of the candidate, by name.
        near: difference of scores by which a match may cross the threshold; at most half of that is taken.
    """
    confidence = scenes.confidence
    if head.layout == "classes":
        confidence, most = 0.0, 1
    else:
        near, most = min(near, confidence / 2), _MOST
    found: dict[tuple[Path, tuple[int, int]], ImageComparison] = {}
    for batch, (expected, actual) in zip(scenes.batches, outputs, strict=True):
        height, width = batch.images.shape[2:]
        detections = (
            decode(head, given, batch.placements, confidence=confidence - near, most=most, by_class=True)
            for given in (expected, actual)
        )
        for path, right, other in zip(batch.paths, *detections, strict=True):  # an image may fill up a batch
            pairs = tuple(
                _pair(found, right, other, scenes.names, near) for found in match(right, other, confidence, near)
            )
            found[path, (height, width)] = ImageComparison(image=path, size=(height, width), pairs=pairs)
    return tuple(sorted(found.values(), key=lambda image: image.badness, reverse=True))


def _pair(
    found: Match, reference: Detections, candidate: Detections, names: Mapping[int, str], near: float
) -> DetectionPair:
    """A match with what it changes, as far as both sides tell it."""
    i, j = found.reference, found.candidate
    right, other = (
        None if index is None else named(side.only(index), names)[0] for side, index in ((reference, i), (candidate, j))
    )
    changes: dict[str, float] = {}
    if i is not None and j is not None and right and other:
        if found.tie and candidate.by_class is not None:
            score = float(candidate.by_class[j, reference.classes[i]])
            other = other.model_copy(update={"name": right.name, "score": round(score, 5)})
        if reference.masks is not None and candidate.masks is not None:
            changes["mask_iou"] = reference.masks[i].overlap(candidate.masks[j])
        if reference.keypoints is not None and candidate.keypoints is not None:
            distance = _apart(reference.keypoints[i], candidate.keypoints[j], right.box)
            changes |= {} if distance is None else {"keypoint_distance": distance}
        if reference.of_image and reference.by_class is not None and candidate.by_class is not None:
            changes["top5"] = _shared(reference.by_class[i], candidate.by_class[j], near)
    rounded = {name: round(value, 5) for name, value in changes.items()}
    return DetectionPair(reference=right, candidate=other, iou=round(found.iou, 5), **rounded)


def _apart(reference: Array, candidate: Array, box: tuple[float, float, float, float]) -> float | None:
    """Mean distance of keypoints [K, 2 or 3] over the square root of the area, of those that either side sees where
    that is told; None where neither sees any."""
    seen = np.ones(len(reference), bool)
    if reference.shape[1] == 3:
        seen = np.maximum(reference[:, 2], candidate[:, 2]) > SEEN
    if not seen.any():
        return None
    area = max((box[2] - box[0]) * (box[3] - box[1]), 1.0)
    distances = np.linalg.norm((reference - candidate)[seen, :2].astype(np.float64), axis=1)
    return float(distances.mean() / np.sqrt(area))


def _shared(reference: Array, candidate: Array, near: float) -> float:
    """Share of the best classes of one that are among those of the other, or lower than the last of these by no more
    than the share ``near``: these scores sum to 1."""
    best = np.argsort(-reference, kind="stable")[:TOP]
    last = np.sort(candidate)[-len(best)]
    return float((candidate[best] >= last * (1 - near)).mean())
