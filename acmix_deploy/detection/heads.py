"""What the outputs of a model of a task are: which of them holds what, along which axis, in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from acmix_deploy.detection.metadata import Layout, ModelMetadata, Task
from acmix_deploy.errors import UserError

Array = NDArray[Any]
Dims = Sequence[int | str | None]

_SELECTED = ("rows", "queries", "ranked queries")


@dataclass(frozen=True)
class Head:
    """The outputs of a model that can be decoded."""

    task: Task
    layout: Layout
    output: str
    """Name of the first output."""
    classes: int
    """Their number; 0 where neither names nor sizes tell it."""
    prototypes: str = ""
    """Of the task "segment": name of the output [B, E, h, w] of masks, of which coefficients make one for a box."""
    keypoints: tuple[int, int] = (0, 0)
    """Of the task "pose": their number, and the values of each, 2 or 3: x, y and whether it is visible."""

    @property
    def axis(self) -> int:
        """Of the values of a box, in the first output."""
        return 1 if self.layout in ("anchors", "classes") else 2

    @property
    def selects(self) -> bool:
        """Whether boxes that overlap were left out already."""
        return self.layout in _SELECTED

    @property
    def ranks(self) -> bool:
        """Whether score and class of a box are told, not the scores of every class."""
        return self.layout in ("rows", "ranked queries")

    @property
    def width(self) -> int:
        """Values of a box before the extra ones."""
        return 6 if self.ranks else self.classes + {"objectness": 5, "classes": 0}.get(self.layout, 4)


class NoHead(Exception):
    """Why outputs cannot be decoded: the rest of a sentence that begins with the name of the file."""


def head_of(metadata: ModelMetadata, outputs: Mapping[str, Dims]) -> Head:
    """The head of a file by its metadata and the axes of its outputs, which may be free.

    Raises:
        NoHead: its task is none of :data:`Task`, or the outputs are none of :data:`Layout`.
    """
    given = f"gives {', '.join(f'{name} {list(dims)}' for name, dims in outputs.items())}"
    task: Any = metadata.task
    if not metadata.detects:
        raise NoHead(f"{given}, and its task is {task or 'not told'}")
    (first, dims), *others = outputs.items()
    prototypes = [name for name, axes in others if len(axes) == 4]
    if len(others) != (task == "segment") or len(prototypes) != len(others):
        raise NoHead(f"{given}, which is not {_EXPECTED[task]}")
    try:
        classes, layouts = len(metadata.names), _possible(metadata, task)
        keypoints = (metadata.kpt_shape or (0, 0)) if task == "pose" else (0, 0)
    except UserError as error:
        raise NoHead(f"cannot be decoded: {error.message}") from error
    if task == "pose" and not keypoints[0]:
        raise NoHead(f"{given}, and its metadata tell no kpt_shape")
    extra: Any = {"obb": 1, "pose": keypoints[0] * keypoints[1]}.get(task, 0)
    if prototypes and not isinstance(extra := outputs[prototypes[0]][1], int):
        raise NoHead(f"{given}, and how many prototypes there are is not told")
    told = [Head(task, layout, first, classes, next(iter(prototypes), ""), keypoints) for layout in layouts]
    told = [head for head in told if len(dims) == (2 if head.layout == "classes" else 3)]
    free = [head for head in told if head.layout == layouts[0] and not isinstance(dims[head.axis], int)]
    if {"queries", "ranked queries"} <= {*layouts} and told and dims[2] == 6 and classes in (0, 2):
        raise NoHead(f"{given}, whose rows may end in the scores of two classes or in a score and a class")
    for head in told:
        size = dims[head.axis]
        if not isinstance(size, int):
            continue
        if not classes and not head.ranks and size > head.width + extra:
            return replace(head, classes=size - head.width - extra)
        if size == head.width + extra and (head.ranks or classes):
            return head
    if free:
        return free[0]
    rows = len(dims) == 3 and dims[2] == 6 + extra and "rows" not in layouts
    untold = ", and its metadata do not tell end2end or nms" if rows else ""
    raise NoHead(f"{given}, which is not {_EXPECTED[task]}{f' for {classes} classes' if classes else ''}{untold}")


def unlike_told(metadata: ModelMetadata, outputs: Mapping[str, Dims]) -> str:
    """Why a file cannot be decoded, as far as that can be told without running it; empty where nothing tells."""
    try:
        head_of(metadata, outputs)
    except NoHead as error:
        return str(error)
    return ""


_EXPECTED = {
    "detect": "one output [B, 4 + classes, anchors], or rows of a box, a score and a class that its metadata tell",
    "segment": "an output [B, 4 + classes + masks, anchors], or such rows, and prototypes [B, masks, h, w]",
    "pose": "one output [B, 4 + classes + keypoints, anchors], or such rows, by the kpt_shape of its metadata",
    "obb": "one output [B, 4 + classes + 1, anchors], or such rows",
    "classify": "one output [B, classes]",
}


def _possible(metadata: ModelMetadata, task: Task) -> Sequence[Layout]:
    """The layouts that metadata leave open, the likeliest first."""
    if metadata.suppression:  # the layout is the network's
        return ["rows"]
    if metadata.layout:
        return [metadata.layout]
    if task == "classify":
        return ["classes"]
    if metadata.head == "RTDETRDecoder":
        return ["queries", "ranked queries"]
    if metadata.end2end or metadata.nms:
        return ["rows"]
    return ["anchors", "objectness"] if metadata.names and task in ("detect", "segment") else ["anchors"]
