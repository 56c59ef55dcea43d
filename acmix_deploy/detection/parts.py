"""What the channels of a model's outputs are: coordinates, scores and the like differ by orders of magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from acmix_deploy.detection.boxes import Array
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import UserError

Parts = dict[str, NDArray[np.int64]]
"""Channels, by the name of the part that they make up."""

_BEHIND = {"segment": "mask coefficients", "obb": "angles"}
_BOXES = ("detect", "pose", *_BEHIND)


def parts_of(metadata: ModelMetadata, outputs: Mapping[str, Array]) -> dict[str, Parts]:
    """What the channels, axis 1, of each output are, as Ultralytics' exporters lay them out; nothing where unknown.

    The first output of the tasks "detect", "segment", "pose" and "obb" is [B, C, anchors]: 4 "boxes", the "scores" of
    the classes, and behind them nothing, "mask coefficients", "keypoints" (x and y) and their "visibility", or
    "angles". The second output of "segment" is [B, C, H, W], "prototypes"; that of "classify" [B, C], "scores".

    Args:
        metadata: what an exporter left: ``task``, ``names`` of the classes, and for keypoints ``kpt_shape``, their
            number and how many values each has, 2 or 3. What is no box of a "detect" without names is a score.
        outputs: on one input, by name.
    """
    task, found = metadata.task, dict[str, Parts]()
    for index, (name, output) in enumerate(outputs.items()):
        parts: Parts = {}
        if task in _BOXES and index == 0 and output.ndim == 3:
            with suppress(UserError):  # metadata that tell nothing of the channels
                parts = _of_anchors(output.shape[1], task, metadata)
        elif task == "segment" and index == 1 and output.ndim == 4:
            parts = {"prototypes": np.arange(output.shape[1])}
        elif task == "classify" and output.ndim == 2:
            parts = {"scores": np.arange(output.shape[1])}
        found[name] = parts
    return found


def _of_anchors(channels: int, task: str, metadata: ModelMetadata) -> Parts:
    classes = len(metadata.names) or (channels - 4 if task == "detect" else 0)
    if classes < 1 or channels < 4 + classes:
        return {}
    boxes, scores, behind = np.split(np.arange(channels), [4, 4 + classes])
    parts = {"boxes": boxes, "scores": scores}
    if not len(behind):
        return parts
    if task in _BEHIND:
        return parts | {_BEHIND[task]: behind}
    each = metadata.kpt_shape[1] if task == "pose" and metadata.kpt_shape else 0
    if not each or len(behind) % each:
        return {}
    points = behind.reshape(-1, each)
    return parts | {"keypoints": points[:, :2].ravel()} | ({"visibility": points[:, 2]} if each == 3 else {})
