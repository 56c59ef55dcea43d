"""Options of the command line that are fields of a model: each is stated once, its help text is its description."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from acmix_deploy.errors import UserError

T = TypeVar("T")
N = TypeVar("N", int, float)

ConvBranchChoice = Literal["auto", "dense", "grouped"]
"""Forms of a convolution branch; "auto" is the one that is faster on a GPU."""

HeadChoice = Literal["anchors", "end-to-end"]
"""Of a detector that has both: boxes for every anchor, or those that its end-to-end head selects."""

AXES = {"batch": 0, "height": 2, "width": 3}
"""The axes of an image input [B, C, H, W] that may be free, by their names."""

_CHANNELS = (1, 3, 4)  # of images


def channels_last(shape: Sequence[object]) -> bool:
    """Whether an image input of these sizes, free ones anything but numbers, is [B, H, W, C] and not [B, C, H, W]: its
    last axis is as many channels as an image has, and its second is not."""
    return len(shape) == 4 and shape[3] in _CHANNELS and shape[1] not in _CHANNELS


Provider = Literal["cpu", "cuda", "tensorrt"]
"""What ONNX Runtime runs a file on."""

Decoder = Literal["auto", "opencv", "gstreamer"]
"""What decodes and encodes video, see :func:`acmix_deploy.serving.video.elements`."""

Method = Literal["percentile", "entropy", "minmax"]
"""How the range of an activation follows from its values."""

FLOAT32 = ("decode", "softmax", "range")
"""Groups of nodes that stay in float32 when all else becomes float16, see :func:`acmix_deploy.precision.to_fp16`."""


@dataclass(frozen=True)
class Option:
    """How a field is spelt on the command line, as far as its name and type do not tell."""

    parse: Callable[[str], object] | None = None
    metavar: str | None = None
    flag: str = ""
    bare: str = ""
    """What the option means without a value, spelt as one; empty where it needs one."""


def add_options(parser: argparse.ArgumentParser, model: type[BaseModel], *names: str) -> None:
    """Add the fields of ``model`` called ``names``, by default all that have an :class:`Option`.

    A field without a default is an argument of its own. Where a default depends on other fields, nothing is set unless
    the option is given.
    """
    for name, field in model.model_fields.items():
        option = next((entry for entry in field.metadata if isinstance(entry, Option)), None)
        if option and (not names or name in names):
            flags = [name] if field.is_required() else [option.flag or f"--{name.replace('_', '-')}"]
            parser.add_argument(*flags, **_keywords(name, field, option))


def _keywords(name: str, field: FieldInfo, option: Option) -> dict[str, Any]:
    found: dict[str, Any] = {"help": field.description}
    if field.is_required():
        return found | {"type": option.parse, "metavar": option.metavar}
    found |= {"dest": name, "default": argparse.SUPPRESS if field.default_factory else field.default}
    if field.annotation is bool:
        return found | {"action": "store_true"}
    if choices := _choices(field.annotation):
        return found | {"choices": choices}
    if option.bare:
        found |= {"nargs": "?", "const": option.parse(option.bare) if option.parse else option.bare}
    return found | {"type": option.parse, "metavar": option.metavar}


def _choices(annotation: Any) -> tuple[str, ...]:
    """Those of a Literal, or of a Literal or None."""
    kinds = (annotation, *get_args(annotation))
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def parses(expected: str) -> Callable[[Callable[[str], T]], Callable[[str], T]]:
    """For a function that parses an option: have its ValueError told as what was ``expected``."""

    def told(parse: Callable[[str], T]) -> Callable[[str], T]:
        @wraps(parse)
        def parsed(text: str) -> T:
            try:
                return parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from error

        return parsed

    return told


@parses("a list by commas such as decode,model.22.*, and not none alone")
def float32_list(text: str) -> tuple[str, ...]:
    """``decode,model.22.*`` as its parts, ``none`` as nothing."""
    parts = tuple(text.split(","))
    if parts == ("none",):
        return ()
    if "none" in parts or "" in parts:
        raise ValueError(text)
    return parts


def check_axes(dynamic: Collection[str]) -> None:
    """Raises UserError where one of the axes that are to be free is none of :data:`AXES`."""
    if unknown := set(dynamic) - AXES.keys():
        raise UserError(f"unknown dynamic axis {', '.join(sorted(unknown))}; it must be one of {', '.join(AXES)}")


def check_code(code: Path | None, trust: bool) -> None:
    """Raises UserError for a folder of code that is none, or whose code may not run."""
    if code and not code.is_dir():
        raise UserError(f"--code {code} is no folder", "Name the folder of the code that the checkpoint needs.")
    if code and not trust:
        raise UserError(
            f"--code {code} would have the checkpoint run the code in that folder",
            "Add --trust, which also runs code from the file: use it only if you know where both come from.",
        )


def check_python(python: Path | None, trust: bool, arch: str | None = None, head: HeadChoice | None = None) -> None:
    """Raises UserError for an interpreter that may not load a checkpoint, or cannot."""
    if python and not trust:
        raise UserError(
            f"--python {python} would run code from the checkpoint",
            "Add --trust: use it only if you know where the file comes from.",
        )
    if python and (arch or head):
        raise UserError(
            f"--{'arch' if arch else 'head'} is for a model that is loaded here, and --python loads it elsewhere",
            "Give one of them.",
        )


@parses("names by commas such as batch,height; where it is to mean all axes, --dynamic stands at the end")
def names(text: str) -> tuple[str, ...]:
    """``batch,height`` as its parts."""
    parts = tuple(name for name in text.split(",") if name)
    if not all(name.isidentifier() for name in parts):
        raise ValueError(text)
    return parts


def provider(text: str) -> str:
    """``cuda`` as it is; ``0``, ``cuda:0`` and ``gpu``, as others call the first GPU, as that."""
    return "cuda" if text in ("0", "cuda:0", "gpu") else text


@parses("B,C,H,W, four whole numbers of at least 1")
def bchw(text: str) -> tuple[int, int, int, int]:
    """``1,3,640,640`` as [B, C, H, W]."""
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(text)
    return sizes


@parses("N or H,W, whole numbers of at least 1")
def sides(text: str) -> tuple[int, int]:
    """``640`` or ``480,640`` as (height, width)."""
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) > 2 or min(sizes) < 1:
        raise ValueError(text)
    return sizes[0], sizes[-1]


def _number(kind: Callable[[str], N], within: Callable[[N], bool], expected: str) -> Callable[[str], N]:
    @parses(expected)
    def parse(text: str) -> N:
        if not within(value := kind(text)):
            raise ValueError(text)
        return value

    return parse


count = _number(int, lambda value: value >= 0, "a whole number of at least 0")
positive = _number(int, lambda value: value >= 1, "a whole number of at least 1")
grey = _number(int, lambda value: 0 <= value < 1 << 8, "a grey, 0 to 255")
port = _number(int, lambda value: 0 <= value < 1 << 16, "a port, 0 to 65535")
share = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
not_negative = _number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
duration = _number(float, lambda value: 0 < value < math.inf, "a number of more than 0")
