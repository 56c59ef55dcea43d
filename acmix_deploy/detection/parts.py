"""What the values of a model's outputs are: coordinates, scores and the like differ by orders of magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from acmix_deploy.detection.heads import Array, Head, NoHead, head_of
from acmix_deploy.detection.metadata import ModelMetadata

Index = tuple[slice | NDArray[np.int64], ...]
Parts = dict[str, Index]
"""Where in an output each part is, by name."""


def known_head(metadata: ModelMetadata, outputs: Mapping[str, Array]) -> Head | None:
    """The head of a file by what it gave; None where it cannot be decoded."""
    with suppress(NoHead):
        return head_of(metadata, {name: output.shape for name, output in outputs.items()})
    return None


def parts_of(head: Head | None, outputs: Mapping[str, Array]) -> dict[str, Parts]:
    """The parts of each output; none of outputs that are not known.

    The first output has 4 "boxes", "scores" ("objectness" before them, or "classes" behind one) and behind them
    "mask coefficients", "keypoints" (x and y) and their "visibility", or "angles"; the second of "segment" is
    "prototypes".
    """
    found: dict[str, Parts] = {name: {} for name in outputs}
    if head is None:
        return found
    if head.layout == "classes":
        return found | {head.output: {"scores": (slice(None),)}}
    behind = np.arange(head.width, outputs[head.output].shape[head.axis])
    channels = {"boxes": np.arange(4)}
    if head.ranks:
        channels |= {"scores": np.array([4]), "classes": np.array([5])}
    else:
        channels["scores"] = np.arange(head.width - head.classes, head.width)
    if head.layout == "objectness":
        channels["objectness"] = np.array([4])
    if head.task == "pose":
        points = behind.reshape(head.keypoints)
        channels["keypoints"] = points[:, :2].ravel()
        if head.keypoints[1] == 3:
            channels["visibility"] = points[:, 2]
    elif len(behind):
        channels["angles" if head.task == "obb" else "mask coefficients"] = behind
    ahead = (slice(None),) * head.axis
    found[head.output] = {part: (*ahead, members) for part, members in channels.items()}
    if head.prototypes:
        found[head.prototypes] = {"prototypes": (slice(None),)}
    return found
