"""What an exporter left in a file about its model, typed."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, RootModel, TypeAdapter, ValidationError

from acmix_deploy.detection.suppression import MOST, Suppression
from acmix_deploy.errors import UserError
from acmix_deploy.options import channels_last

if TYPE_CHECKING:
    import onnx

    from acmix_deploy.detection.images import Letterbox

Task = Literal["detect", "segment", "pose", "obb", "classify"]
"""What models are for, as Ultralytics calls it."""

Layout = Literal["anchors", "rows", "queries", "ranked queries", "objectness", "classes"]
"""How the first output is laid out; E are the extra values of a task: mask coefficients, keypoints, an angle.

- anchors: [B, 4 + classes + E, anchors], boxes as (x, y, width, height) around their centres; Ultralytics' own, and
  that of YOLOv9's repository.
- rows: [B, N, 6 + E], detections that are selected already: corners (x1, y1, x2, y2), of the task "obb" (x, y, width,
  height), then score, class and extra values. End-to-end heads, and files with non-maximum suppression in them.
- queries: [B, N, 4 + classes], (x, y, width, height) as shares of the image, none of which overlap. RT-DETR.
- ranked queries: [B, N, 6], the same with score and class. RT-DETR of later releases.
- objectness: [B, anchors, 5 + classes + E], boxes as with anchors, then whether there is anything at all, by which the
  scores are multiplied. YOLOv5 and YOLOv7 of their own repositories.
- classes: [B, classes], of an image as a whole.
"""

Pixels = Literal["rgb", "bgr"]
"""Order of the channels of images [B, H, W, 3] in uint8."""

T = TypeVar("T")
D = TypeVar("D")


class ModelMetadata(RootModel[dict[str, str]]):
    """The entries of an ONNX file's metadata, spelt as Ultralytics spells them.

    An entry is parsed when it is first asked for, so that one that is wrong stops only what needs it, always with the
    same UserError: it names the entry, what is there and what is expected. One that is missing has a default. Entries
    that are not known stay as they are.
    """

    model_config = ConfigDict(frozen=True)

    root: dict[str, str] = Field(default={}, description="the entries as they are in the file")

    @classmethod
    def of(cls, model: onnx.ModelProto) -> ModelMetadata:
        """Those in a file."""
        return cls({entry.key: entry.value for entry in model.metadata_props})

    @classmethod
    def of_header(cls, header: Mapping[str, Any]) -> ModelMetadata:
        """Those that Ultralytics writes before an engine, as JSON."""
        told = {name: value for name, value in header.items() if value is not None}
        if isinstance(names := told.get("names"), dict):
            told["names"] = {int(key) if key.isdecimal() else key: name for key, name in names.items()}
        return cls().updated(**told)

    def header(self, dims: Sequence[object], shape: Sequence[int], precision: str | None = None) -> dict[str, Any]:
        """These as Ultralytics writes them before an engine, which its releases then load.

        Args:
            dims: of the engine's input [B, C, H, W]; anything but a positive number is free.
            shape: what free ones usually are.
            precision: lowest type that the engine may compute in, where that is known.

        Raises:
            UserError: an entry without which some release fails is missing, or one is wrong; the engine takes pixels.
        """
        if self.pixels:
            raise UserError(
                "it takes images in uint8, and Ultralytics feeds floats", "Export the file again, without --input."
            )
        axes = zip(("batch", "channels", "height", "width"), dims, strict=True)
        free = [axis for axis, size in axes if not isinstance(size, int) or size < 0]
        told = self.for_file(shape, free)
        # Where a size is fixed, releases that are told "dynamic" do not notice a wrong one.
        args = told._arguments | {"dynamic": {"batch", "height", "width"} <= {*free}}
        if precision:
            args |= {"half": precision == "float16", "int8": precision == "int8"}
        return told.updated(args=args)._header()

    def _header(self) -> dict[str, Any]:
        if missing := [name for name in ("stride", "task", "names") if name not in self.root]:
            raise UserError(
                f"the metadata tell no {', no '.join(missing)}, which Ultralytics asks an engine for",
                "Export the file from its checkpoint: acmix-deploy export",
            )
        typed = {
            "stride": self.stride,
            "names": self.names,
            "batch": self._literal("batch", _COUNT, 1, "a number of images, such as 1"),
            "imgsz": list(self.imgsz),
            "channels": self.channels,
            "end2end": self.end2end,
            "kpt_shape": self.kpt_shape and list(self.kpt_shape),
            "args": self._arguments,
        }
        return {**self.root, **{name: value for name, value in typed.items() if name in self.root}}

    @property
    def entries(self) -> dict[str, str]:
        """As they are in the file."""
        return self.root

    def updated(self, /, **values: object) -> ModelMetadata:
        """These and the entries of ``values``: strings, what Python's literals can spell, a letterbox, a
        suppression."""
        return ModelMetadata(self.root | {name: _spelt(value) for name, value in values.items()})

    def for_file(self, shape: Sequence[int], free: Collection[str] = ()) -> ModelMetadata:
        """These as Ultralytics' exporter writes them for a file: what it reads there is the file's, not of training.

        Args:
            shape: [B, C, H, W] that the file was exported at.
            free: axes that are free, out of "batch", "height" and "width". Where the batch is, the file is dynamic to
                Ultralytics: some of its releases then fail on one that says that it is not.
        """
        batch, _, *size = shape
        arguments = {"batch": batch, "dynamic": "batch" in free, "nms": self.nms}
        return self.updated(batch=batch, imgsz=size, args=arguments)

    @property
    def task(self) -> str | None:
        """detect, segment, pose, obb, classify or another; None where it is not told."""
        return self.root.get("task")

    @property
    def detects(self) -> bool:
        """Whether the file names a task whose outputs are decoded here."""
        return self.task in get_args(Task)

    @property
    def head(self) -> str | None:
        """Class of the last layer, such as RTDETRDecoder; None where it is not told."""
        return self.root.get("head")

    @cached_property
    def layout(self) -> Layout | None:
        """Of the first output; None where the other entries and its sizes have to tell it."""
        told: Any = self.root.get("layout")
        if told is not None and told not in get_args(Layout):
            raise self._wrong("layout", " or ".join(get_args(Layout)))
        return told  # type: ignore[no-any-return]

    @cached_property
    def pixels(self) -> Pixels | None:
        """Channels of the images [B, H, W, 3] in uint8 that the file takes; None where it takes [B, 3, H, W] in RGB, as
        floats from 0 to 1."""
        told: Any = self.root.get("pixels")
        if told is not None and told not in get_args(Pixels):
            raise self._wrong("pixels", " or ".join(get_args(Pixels)))
        return told  # type: ignore[no-any-return]

    @cached_property
    def suppression(self) -> Suppression | None:
        """What suppresses boxes in the file, where nodes of ours do."""
        if (told := self.root.get("suppression")) is None:
            return None
        try:
            return Suppression.model_validate_json(told)
        except ValidationError as error:
            raise self._wrong("suppression", f"{', '.join(Suppression.model_fields)} as JSON") from error

    @property
    def most(self) -> int:
        """Detections of an image at most: of a file that suppresses boxes its own number."""
        return self.suppression.most if self.suppression else MOST

    def with_suppression(self, suppression: Suppression | None) -> ModelMetadata:
        """These for a file with nodes of ours that suppress boxes, or without; Ultralytics reads ``nms``."""
        if suppression is None and "suppression" not in self.root:
            return self
        others = ModelMetadata({name: value for name, value in self.root.items() if name != "suppression"})
        told = others.updated(args=self._arguments | {"nms": suppression is not None})
        return told.updated(suppression=suppression) if suppression else told

    @cached_property
    def names(self) -> dict[int, str]:
        """Of the classes, by index; empty where they are not told."""
        return self._literal("names", _NAMES, {}, "names by class, such as {0: 'person'}")

    @cached_property
    def stride(self) -> int:
        """What the sides of an image are multiples of, in pixels; 1 where it is not told."""
        return self._literal("stride", _COUNT, 1, "a number of pixels, such as 32")

    @cached_property
    def channels(self) -> int:
        """Of an image; 3 where they are not told."""
        return self._literal("channels", _COUNT, 3, "a number, such as 3")

    @cached_property
    def imgsz(self) -> tuple[int, int]:
        """Height and width of images, in pixels: of a file's example, of a checkpoint's training; else 640."""
        return self._literal("imgsz", _SIZE, (640, 640), "a height and a width, such as [640, 640]")

    @cached_property
    def min_size(self) -> tuple[int, int]:
        """Height and width of the smallest image that all fused blocks are defined for; 1 where they are not told."""
        return self._literal("min_size", _SIZE, (1, 1), "a height and a width, such as [1, 1]")

    @cached_property
    def kpt_shape(self) -> tuple[int, int] | None:
        """How many keypoints there are, and values of each, 2 or 3; None where they are not told."""
        return self._literal("kpt_shape", _KEYPOINTS, None, "keypoints and values of each, such as [17, 3]")

    @cached_property
    def end2end(self) -> bool:
        """Whether the head selects boxes itself."""
        return self._literal("end2end", _FLAG, False, "True or False")

    @cached_property
    def nms(self) -> bool:
        """From ``args``: whether non-maximum suppression is in the file."""
        return bool(self._arguments.get("nms"))

    @cached_property
    def lowered(self) -> Literal["float16", "int8"] | None:
        """From ``args``: the type below float32 that Ultralytics let TensorRT compute in; None where they tell none."""
        told = self._arguments
        if told.get("int8"):
            return "int8"
        return "float16" if told.get("half") else _QUANTIZE.get(str(told.get("quantize")))

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        return self._literal("args", _ARGUMENTS, {}, "settings by name, such as {'nms': False}")

    @cached_property
    def letterbox(self) -> Letterbox:
        """By which images are fitted into a size; Ultralytics' own rule for the task where it is not told."""
        from acmix_deploy.detection.images import Letterbox

        usual = {"fit": "crop" if self.task == "classify" else "stretch" if self.head == "RTDETRDecoder" else "pad"}
        try:
            return Letterbox.model_validate_json(self.root.get("letterbox", json.dumps(usual)))
        except ValidationError as error:
            raise self._wrong("letterbox", f"{', '.join(Letterbox.model_fields)} as JSON") from error

    @property
    def usual_shape(self) -> tuple[int, int, int, int]:
        """[1, C, H, W] of an image of the size that is told."""
        return 1, self.channels, *self.imgsz

    def check_size(self, name: str, shape: Sequence[int]) -> None:
        """Refuse images that are smaller than those that the file is defined for: an engine takes them.

        Args:
            name: of the file, and of what gives the shape where that is not plain.
            shape: of its input, [B, C, H, W], or of a file from elsewhere [B, H, W, C].

        Raises:
            UserError: naming both sizes.
        """
        height, width = self.min_size
        rows, columns = (shape[1:3] if channels_last(shape) else shape[2:]) if len(shape) == 4 else self.min_size
        if rows < height or columns < width:
            raise UserError(
                f"{name}: images of {rows}x{columns} pixels are smaller than {height}x{width}, from which on its "
                "blocks are defined",
                f"Give images of at least {height}x{width}; below, attention windows do not fit into the maps.",
            )

    def _literal(self, entry: str, form: TypeAdapter[T], default: D, expected: str) -> T | D:
        """An entry that is spelt as a literal of Python."""
        if entry not in self.root:
            return default
        try:
            return form.validate_python(ast.literal_eval(self.root[entry]))
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
            raise self._wrong(entry, expected) from error

    def _wrong(self, entry: str, expected: str) -> UserError:
        return UserError(
            f"the metadata tell the {entry} {self.root[entry]!r:.60}, and expected are {expected}",
            "Export the file from its checkpoint: acmix-deploy export",
        )


_COUNT: TypeAdapter[int] = TypeAdapter(PositiveInt)
_SIZE: TypeAdapter[tuple[int, int]] = TypeAdapter(tuple[PositiveInt, PositiveInt])
_NAMES = TypeAdapter(dict[int, str])
_KEYPOINTS: TypeAdapter[tuple[int, int]] = TypeAdapter(tuple[PositiveInt, Literal[2, 3]])
_FLAG = TypeAdapter(bool)
_ARGUMENTS = TypeAdapter(dict[str, Any])
_QUANTIZE: dict[str, Literal["float16", "int8"]] = {"16": "float16", "8": "int8"}


def _spelt(value: object) -> str:
    return json.dumps(value.model_dump()) if isinstance(value, BaseModel) else str(value)
