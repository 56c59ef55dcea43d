"""What ``acmix-deploy export`` found, as one JSON document."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Literal

import onnx
from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy import onnx_file
from acmix_deploy.artifacts import Artifact
from acmix_deploy.device.stages import DeviceReport
from acmix_deploy.document import Document
from acmix_deploy.engine.build import BuildReport
from acmix_deploy.exported import ExportResult, ReferenceReport
from acmix_deploy.families import BlockReport
from acmix_deploy.forms import TargetReport, takes_plugin
from acmix_deploy.fusion import FusionReport
from acmix_deploy.graph import count_nodes, read
from acmix_deploy.manifest import KIND as ENGINE
from acmix_deploy.precision import Fp16Report, Int8Report
from acmix_deploy.profile import Profile
from acmix_deploy.report.target import carry, engine_steps, obstacles, target_steps
from acmix_deploy.targets import NEWEST, Precision
from acmix_deploy.verify import Verification


class FileReport(BaseModel):
    """One file that a stage wrote."""

    model_config = ConfigDict(frozen=True)

    artifact: Artifact = Field(description="the file, and what it was made from")
    size_bytes: int = Field(description="size of the file")
    nodes: int | None = Field(
        description="nodes of the graph, Constant nodes not counted; a function call is one; None of an engine"
    )
    profile: Profile | None = Field(default=None, description="latency, where it was measured")


class ExportReport(Document):
    """Result of ``acmix-deploy export``, which also writes it as ``report.json``."""

    model_config = ConfigDict(frozen=True)

    document: Literal["export"] = Field(default="export", description="which document it is")
    model: str = Field(description="the checkpoint, as it was named")
    notes: tuple[str, ...] = Field(description="what was done to the checkpoint on loading")
    blocks: tuple[BlockReport, ...] = Field(description="blocks found in the module, and modules that resemble one")
    reference: ReferenceReport = Field(
        description="what files were compared with: the model as it was loaded, unless something is listed here"
    )
    export: ExportResult = Field(description="what was exported, and how")
    fusion: FusionReport = Field(description="what became of each block")
    files: dict[str, FileReport] = Field(description="by role: plain, fused, fp16, int8, target, fp16 engine, ...")
    target: TargetReport | None = Field(default=None, description="the file to carry to the target that was asked for")
    fp16: Fp16Report | None = Field(default=None, description="what stays in float32 in the fp16 file")
    int8: Int8Report | None = Field(default=None, description="layers in INT8 and what each one costs")
    engines: dict[str, BuildReport] = Field(
        default={}, description="by role, as in files, of those that this package built, here or on the device"
    )
    device: DeviceReport | None = Field(default=None, description="what ran on another machine, with --on")
    verification: Verification = Field(description="every file compared with the model")
    seconds: dict[str, float] = Field(description="time that each stage took")
    next_steps: tuple[str, ...] = Field(description="what to run next, line by line")

    @computed_field(description="files that were not compared with the model")  # type: ignore[prop-decorator]
    @property
    def uncompared(self) -> tuple[str, ...]:
        """By their names."""
        compared = {comparison.candidate for comparison in self.verification.comparisons}
        return tuple(file.artifact.path.name for file in self.files.values() if file.artifact.path.name not in compared)

    @computed_field(  # type: ignore[prop-decorator]
        description="whether every file that was compared is as exact as the operator's definition asks; false goes "
        "with exit code 1. null, with exit code 0: nothing failed, and too little was detected to judge the scores of "
        "a file; a script that wants proof asks for true, and for nothing in uncompared"
    )
    @property
    def passed(self) -> bool | None:
        """Of which reference, the model as it was loaded or as it was repaired, ``reference`` says."""
        return self.verification.passed


def describe_file(artifact: Artifact, profile: Profile | None = None, size: int | None = None) -> FileReport:
    """Size of a written file, which is given where it is not here, and node count of an ONNX file."""
    nodes = count_nodes(onnx.load(artifact.path, load_external_data=False)) if artifact.kind != ENGINE else None
    size = artifact.path.stat().st_size if size is None else size
    return FileReport(artifact=artifact, size_bytes=size, nodes=nodes, profile=profile)


def next_steps(
    artifacts: Mapping[str, Artifact],
    exported: ExportResult,
    target: TargetReport | None,
    device: DeviceReport | None,
    *,
    detector: bool,
) -> tuple[str, ...]:
    """What to run next.

    Args:
        artifacts: files by role.
        exported: for the input's name and shapes.
        target: what the files were made for, where that was told.
        device: where engines were built, if it was not here.
        detector: whether detections can be compared.
    """
    engines = [str(artifact.path) for role, artifact in artifacts.items() if role.endswith(ENGINE)]
    if device and device.commands:
        return tuple(f"On {device.name}: {command}" for command in device.commands)
    if engines and device and device.machine and not device.machine.gpu:
        return (f"{device.name} has no GPU, so its engines are for a machine with one",)
    if engines:
        there = f" --on {shlex.quote(device.name)}" if device else ""
        return (f"acmix-deploy profile {shlex.join(engines)} --layers --power{there}",)
    typed: tuple[tuple[str, Precision], ...] = (("int8", "int8"), ("fp16", "float16"), ("fused", "float32"))
    role, precision = next(pair for pair in typed if pair[0] in artifacts)
    shapes = exported.shapes_to_build
    file, reference = artifacts[role].path.name, artifacts["fused"].path.name
    if target:
        image = exported.inputs[0]
        pixels = image.dtype == "uint8"
        return target_steps(target, reference, precision, shapes, image.name, pixels=pixels, detector=detector)
    model = read(artifacts[role].path, weights=False)
    if unread := onnx_file.unread(model, NEWEST):
        return obstacles(file, unread)
    since = max(onnx_file.read_since(model), _STRONGLY_TYPED)
    release = ".".join(map(str, since)).removesuffix(".0")
    commands = engine_steps(file, reference, shapes, plugin=takes_plugin(model), detector=detector)
    return (
        *carry((file, reference), f"TensorRT {release} or later", commands),
        "For a Jetson or for TensorRT 8 export again with --for, such as --for jetpack-6.2",
    )


_STRONGLY_TYPED = (10, 0)  # the first TensorRT that takes types from the file
