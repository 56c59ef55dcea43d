"""The images that a model is calibrated on, and whether they can be right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from acmix_deploy.detection.boxes import decode, unlike_detector
from acmix_deploy.detection.images import Batch, Placement, find, placed_batches
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.detection.parts import known_head
from acmix_deploy.detection.suppression import CONFIDENCE
from acmix_deploy.graph import Feeds
from acmix_deploy.runtime.onnxruntime import open_session

_FEW = 32  # images
_SAME = 0.01  # of 1, from black to white: as much as noise of a camera


class Samples(NamedTuple):
    """Images as a model takes them."""

    paths: list[Path]
    skipped: list[str]
    """Those that could not be read, and why."""
    input: str
    shape: tuple[int, int, int, int]
    metadata: ModelMetadata

    @classmethod
    def find(
        cls, source: Path, limit: int, name: str, shape: tuple[int, int, int, int], metadata: ModelMetadata
    ) -> Samples:
        """Up to ``limit`` images of a folder or a data set as batches of the input ``name``.

        Raises:
            UserError: there is no readable image.
            MissingComponent: OpenCV is not installed.
        """
        photos = find(source, limit)
        skipped = [f"{path}: {why}" for path, why in photos.skipped.items()]
        return cls(photos.paths, skipped, name, shape, metadata)

    def batches(self) -> Iterator[Batch]:
        """All of them, read anew."""
        return placed_batches(self.paths, [self.shape], self.metadata.letterbox)

    def feeds(self) -> Iterator[Feeds]:
        """The same as inputs."""
        return ({self.input: batch.images} for batch in self.batches())


def doubts(samples: Samples, model: Path | onnx.ModelProto) -> list[str]:
    """A sentence for each reason why a float model should not be calibrated on these images."""
    found = []
    count = len(samples.paths)
    if count < _FEW:
        found.append(f"calibrated on {count} image{'s' * (count > 1)}: below {_FEW} ranges are those of few scenes")
    first: NDArray[np.float32] | None = None
    alike = blank = True
    for batch in samples.batches():
        for image, placement in zip(batch.images, batch.placements, strict=True):
            picture = _without_border(image, placement)
            blank &= float(np.ptp(picture, axis=(1, 2)).max()) < _SAME
            first = image if first is None else first
            alike &= float(np.abs(image - first).mean()) < _SAME
        if not alike and not blank:
            break
    if blank:
        found.append("every calibration image is of one colour: ranges are not those of what the model will see")
    elif alike and count > 1:
        found.append("the calibration images are all alike: ranges are those of one scene")
    if _sees_nothing(samples, model):
        found.append(
            f"the float model detects nothing above {CONFIDENCE:g} in any calibration image: are they of the kind that "
            "it was trained on?"
        )
    if "imgsz" in samples.metadata.entries and (told := samples.metadata.imgsz) != samples.shape[2:]:
        height, width = samples.shape[2:]
        found.append(
            f"calibrated at {height}x{width}, and its metadata tell that it is used at {told[0]}x{told[1]}: ranges "
            "depend on the size of objects"
        )
    return found


def _without_border(image: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    top, left = max(placement.top, 0), max(placement.left, 0)
    return image[:, top : placement.top + placement.fitted[0], left : placement.left + placement.fitted[1]]


def _sees_nothing(samples: Samples, model: Path | onnx.ModelProto) -> bool:
    """Whether a detector finds nothing at all; False where it is none."""
    session = open_session(model)
    names = [node.name for node in session.get_outputs()]
    for batch in samples.batches():
        outputs = dict(zip(names, session.run(None, {samples.input: batch.images}), strict=True))
        head = known_head(samples.metadata, outputs)
        if head is None or head.layout == "classes" or unlike_detector(samples.metadata, outputs):
            return False
        if any(len(found.scores) for found in decode(head, outputs, batch.placements)):
            return False
    return True
