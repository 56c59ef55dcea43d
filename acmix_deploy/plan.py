"""What ``acmix-deploy export`` is to do: every option of the verb with its help text, and the rules between them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from acmix_deploy.detection.metadata import Pixels
from acmix_deploy.detection.suppression import CONFIDENCE, Suppression
from acmix_deploy.errors import AcmixDeployError, UserError
from acmix_deploy.options import (
    AXES,
    FLOAT32,
    ConvBranchChoice,
    HeadChoice,
    Option,
    bchw,
    check_axes,
    check_code,
    check_python,
    count,
    duration,
    float32_list,
    names,
    parses,
    positive,
    sides,
)
from acmix_deploy.targets import DEFAULT_OPSET, INT8_OPSET, PLAIN, Form, Target, check_opset, target_named

_SUFFIXES = {"plain": ".onnx", "fused": ".fused.onnx", "fp16": ".fp16.onnx", "int8": ".int8.onnx"}


InputType = Literal["float32", "uint8", "uint8-bgr"]
_PIXELS: dict[InputType, Pixels | None] = {"float32": None, "uint8": "rgb", "uint8-bgr": "bgr"}

_Size = Annotated[int, Field(gt=0)]


_SUPPRESSION = {"conf": "confidence", "iou": "iou", "max_det": "most"}


@parses(
    "settings by commas: conf from 0 to below 1, iou from 0 to 1, max_det from 1 to 3000, agnostic; such as "
    "conf=0.4,iou=0.5,max_det=100,agnostic"
)
def suppression(text: str) -> Suppression:
    """``conf=0.4,agnostic`` as settings, by the names of Ultralytics' options."""
    parts = text.split(",")
    if len({part.partition("=")[0] for part in parts}) < len(parts):
        raise ValueError(text)
    told: dict[str, object] = {"by_class": "agnostic" not in parts}
    for name, _, value in (part.partition("=") for part in parts if part != "agnostic"):
        if name not in _SUPPRESSION:
            raise ValueError(text)
        told[_SUPPRESSION[name]] = value
    return Suppression.model_validate(told)


def _sides(size: object) -> object:
    return (size, size) if isinstance(size, int) else size


def _named(target: object) -> object:
    return target_named(target) if isinstance(target, str) else target


class Plan(BaseModel):
    """Which files are made of a checkpoint, how, and where.

    A plan is checked as a whole when it is made: nothing is loaded, written or deleted before.

    Raises:
        UserError: the options contradict each other, the target or this machine, or there is no image to calibrate on.
        MissingComponent: calibration images cannot be read, since OpenCV is not installed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: Annotated[Path, Option(Path)] = Field(
        description="checkpoint of PyTorch or Ultralytics (.pt, .pth) or program (.pt2)"
    )
    out: Annotated[Path, Option(Path, "DIR")] = Field(
        default_factory=lambda plan: Path(f"{plan['checkpoint'].stem}-deploy"),
        description="folder for the files (default: MODEL-deploy)",
    )
    fp16: Annotated[bool, Option()] = Field(
        default=False, description="also write a file that computes in half precision"
    )
    fp16_io: Annotated[bool, Option()] = Field(
        default=False, description="the same, with inputs and outputs in half precision too"
    )
    float32: Annotated[tuple[str, ...], Option(float32_list, "LIST")] = Field(
        default=FLOAT32,
        description="what stays in float32 beside float16: decode, softmax, range (docs/pipeline.md#half-precision) "
        "and patterns of names of nodes or weights, by commas; none for nothing (default: decode,softmax,range)",
    )
    int8: Annotated[bool, Option()] = Field(
        default=False, description="also write a file whose layers are INT8; --calibration"
    )
    calibration: Annotated[Path | None, Option(Path, "DIR|YAML")] = Field(
        default=None,
        description="images for --int8, like those to be seen: a folder, or a data set's YAML; every file is verified "
        "on them too",
    )
    image_size: Annotated[tuple[_Size, _Size] | None, BeforeValidator(_sides), Option(sides, "N|H,W")] = Field(
        default=None, description="side of the image, or height and width (default: the model's own)"
    )
    batch: Annotated[int | None, Option(positive, "N")] = Field(
        default=None, gt=0, description="images in the file's batch (default: 1)"
    )
    input_shape: Annotated[tuple[_Size, _Size, _Size, _Size] | None, Option(bchw, "B,C,H,W")] = Field(
        default=None, description="e.g. 1,3,384,640"
    )
    dynamic: Annotated[tuple[str, ...], Option(names, "AXES", bare=",".join(AXES))] = Field(
        default=(), description="axes to leave free: batch, height, width, separated by commas; all where none is named"
    )
    input: Annotated[InputType, Option()] = Field(
        default="float32",
        description="what the files take: float32 [B,3,H,W] in RGB from 0 to 1; uint8 [B,H,W,3] in RGB or, as OpenCV "
        "reads images, in BGR, scaled and transposed in the file",
    )
    nms: Annotated[Suppression | None, Option(suppression, "LIST", bare=f"conf={CONFIDENCE}")] = Field(
        default=None,
        description="suppress boxes that overlap in the files, which then give [B,N,6]: corners, score, class; LIST by "
        "commas: conf=0.25, iou=0.7, max_det=300, and agnostic for all classes as one (docs/pipeline.md#boxes-out)",
    )
    opset: Annotated[int | None, Option(int, "N")] = Field(
        default=None, description="17 to 21 (default: 18, 19 with --int8, or what the target reads)"
    )
    target: Annotated[Target | None, BeforeValidator(_named), Option(str, "TARGET", "--for")] = Field(
        default=None, description="also write the file for a target, e.g. jetpack-6.2 or openvino (docs/targets.md)"
    )
    form: Annotated[Form | None, Option(flag="--target")] = Field(
        default=None,
        description="form of that file, not the device (default: what the target takes); plain needs no --for",
    )
    plugin: Annotated[Path | None, Option(Path, "FILE")] = Field(
        default=None, description="library for the engine (default: made here, if it can be)"
    )
    no_engine: Annotated[bool, Option()] = Field(default=False, description="write files alone, also where TensorRT is")
    conv_branch: Annotated[ConvBranchChoice, Option()] = Field(
        default="auto",
        description="form of the convolution branch: dense is fast on a GPU, grouped on a CPU (auto: dense, or grouped "
        "with --for onnxruntime)",
    )
    expect: Annotated[int | None, Option(count, "N")] = Field(
        default=None, ge=0, description="fail unless exactly N blocks fuse"
    )
    arch: Annotated[str | None, Option(str, "PACKAGE.MODULE:FACTORY")] = Field(
        default=None, description="makes the model for a bare state dict"
    )
    head: Annotated[HeadChoice | None, Option()] = Field(
        default=None,
        description="of a detector with two, such as YOLOv10 and YOLO26 (default: the one that the checkpoint sets)",
    )
    trust: Annotated[bool, Option()] = Field(
        default=False, description="let the checkpoint run code; only for files you trust"
    )
    code: Annotated[Path | None, Option(Path, "DIR")] = Field(
        default=None,
        description="with --trust: the folder of the code that the checkpoint needs, such as a repository of YOLOv5 "
        "or a changed copy of Ultralytics",
    )
    python: Annotated[Path | None, Option(Path, "PATH")] = Field(
        default=None,
        description="with --trust: another interpreter that loads, runs and exports the checkpoint with its own "
        "packages, such as an older Ultralytics",
    )
    seconds: Annotated[float, Option(duration, "S")] = Field(
        default=4.0, gt=0, allow_inf_nan=False, description="time to measure the latency of each file for (default: 4)"
    )
    no_profile: Annotated[bool, Option()] = Field(default=False, description="measure no latencies")
    fetch: Annotated[bool, Option()] = Field(
        default=False, description="with --on: also bring the engines here, not their manifests alone"
    )
    engine_target: Target | None = Field(
        default=None,
        description="what the TensorRT of the device takes that engines are built on, if it is not this machine's",
    )

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            found = error.errors()[0]
            place = ".".join(map(str, found["loc"]))
            raise UserError(f"the plan's {place} is {found['input']!r}: {found['msg']}") from error

    @model_validator(mode="after")
    def _whole(self) -> Plan:
        if self.int8 != (self.calibration is not None):
            raise UserError(
                "--int8 and --calibration go together", "Give both: --int8 --calibration DIR, a folder of images."
            )
        if self.image_size is not None and self.input_shape is not None:
            raise UserError("--image-size and --input-shape both tell the size of images", "Give one of them.")
        if self.batch is not None and self.input_shape is not None:
            raise UserError("--batch and --input-shape both tell how many images there are", "Give one of them.")
        check_axes(self.dynamic)
        check_code(self.code, self.trust)
        check_python(self.python, self.trust, self.arch, self.head)
        made_for(self.target, self.form)
        if self.engine_target and self.target:
            raise UserError(
                f"--on builds for the device's own TensorRT, and --for names {self.target.name}", "Leave out --for."
            )
        if self.engine_target and self.plugin:
            raise UserError("--on compiles the plugin on the device", "Leave out --plugin.")
        if self.plugin and not self.device:
            raise UserError(f"{self.plugin} is for an engine, and {self._why_no_engine}", "Leave out --plugin.")
        if self.plugin and not self.plugin.is_file():
            raise UserError(
                f"there is no {self.plugin}", "Give --plugin the library, or leave it out to have one made."
            )
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"{self.out} is no folder", "Give --out another name.")
        check_opset(self.chosen_opset)
        if reader := self.target or self.device:
            reader.check_opset(self.chosen_opset, "the file asked for")
        if self.calibration:
            from acmix_deploy.detection.images import find

            find(self.calibration, limit=1)
        return self

    @property
    def half(self) -> bool:
        """Whether a file in half precision is asked for."""
        return self.fp16 or self.fp16_io

    @property
    def pixels(self) -> Pixels | None:
        """Channels of the images in uint8 that the files take; None where they take floats."""
        return _PIXELS[self.input]

    @property
    def chosen_opset(self) -> int:
        """The opset of the files: the one asked for, or the newest that suits them and what reads them."""
        if self.opset is not None:
            return self.opset
        wanted = INT8_OPSET if self.int8 else DEFAULT_OPSET
        reader = self.target or self.device
        return min(wanted, reader.opset) if reader else wanted

    @property
    def made_for(self) -> Target | None:
        """What a file is written for beside those of every export."""
        return made_for(self.target, self.form)

    @property
    def chosen_branch(self) -> ConvBranchChoice:
        """The form of the convolution branch."""
        return chosen_branch(self.conv_branch, self.target)

    @property
    def device(self) -> Target | None:
        """What the TensorRT of this machine takes, where an engine is built with it."""
        return self._machine if isinstance(self._machine, Target) else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Why no engine is built, where there is a TensorRT."""
        return (f"no engine was built: {self._machine}",) if isinstance(self._machine, str) else ()

    @cached_property
    def _machine(self) -> Target | str | None:
        """What the TensorRT of this machine takes; the message of the error where it cannot be used; None where there
        is none or no engine is asked for."""
        if self.target or self.no_engine:
            return None
        if self.engine_target:
            return self.engine_target
        from acmix_deploy.engine.build import target_here

        try:
            return target_here()
        except AcmixDeployError as error:
            return error.message

    @property
    def _why_no_engine(self) -> str:
        if self.target or self.no_engine:
            return "none is asked for"
        return f"none is built: {self._machine or 'there is no TensorRT with a GPU'}"

    def path(self, role: str) -> Path:
        """Where the file of a role goes: plain, fused, fp16, int8, or "ROLE engine"."""
        role, _, engine = role.partition(" ")
        path = self.out / f"{self.checkpoint.stem}{_SUFFIXES[role]}"
        return path.with_suffix(".engine") if engine else path

    @property
    def report(self) -> Path:
        """Where the report goes."""
        return self.out / "report.json"

    def role_for(self, target: Target, role: str | None = None) -> str:
        """Role of the file to give to ``target`` where ``role`` is meant, by default that of the lowest type planned.

        They differ where types do not come from the file: half precision is a flag of the builder then, and the file
        is the fused one.
        """
        role = role or ("int8" if self.int8 else "fp16" if self.half else "fused")
        return "fused" if role == "fp16" and not target.strongly_typed else role


def chosen_branch(asked: ConvBranchChoice, target: Target | None) -> ConvBranchChoice:
    """The form of a convolution branch: the one asked for, or the one that is faster on the target."""
    return "grouped" if asked == "auto" and target and target.grouped else asked


def made_for(target: Target | None, form: Form | None) -> Target | None:
    """What a file is written for: the target, or whatever reads standard operators where that form alone is told.

    Raises:
        UserError: another form is asked for and no target, or a target that does not take it.
    """
    if form and not target:
        if form != "plain":
            raise UserError(
                f"--target {form} is the form of the file for a target, and none is named", "Add --for TARGET."
            )
        return PLAIN
    if form and target:
        target.check_form(form)
    return target
