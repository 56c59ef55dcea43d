"""What ``acmix-deploy export`` found, as one JSON document."""

from __future__ import annotations

from pathlib import Path

import onnx
from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy.artifacts import Artifact
from acmix_deploy.export import ExportResult
from acmix_deploy.families import BlockReport
from acmix_deploy.fusion import FusionReport
from acmix_deploy.graph import count_nodes
from acmix_deploy.profile import Profile
from acmix_deploy.report.documents import Document
from acmix_deploy.targets import Form, Target, target_named
from acmix_deploy.verify import Verification


class FileReport(BaseModel):
    """One file that a stage wrote."""

    model_config = ConfigDict(frozen=True)

    artifact: Artifact
    size_bytes: int = Field(description="size of the file")
    nodes: int = Field(description="nodes of the graph, Constant nodes not counted; a function call is one")
    profile: Profile | None = Field(default=None, description="latency on ONNX Runtime, where it was measured")


class TargetReport(BaseModel):
    """The file to carry to a target."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="the target, as in docs/targets.md")
    tensorrt: str = Field(description="its TensorRT, major and minor version")
    form: Form = Field(description="any: nodes and definitions; plugin: nodes alone; plain: standard operators")
    file: str = Field(description="name of the file")
    inlined: dict[str, str] = Field(
        description="nodes that the plugin refuses, and why; standard operators in the file"
    )

    @classmethod
    def of(cls, target: Target, artifact: Artifact, inlined: dict[str, str]) -> TargetReport:
        """What was written for ``target``."""
        return cls(
            name=target.name,
            tensorrt=target.version,
            form=artifact.settings["form"],
            file=artifact.path.name,
            inlined=inlined,
        )

    @property
    def notes(self) -> list[str]:
        """What a person has to know about the file."""
        notes = [
            f"{name} has {what}, which the plugin does not take: standard operators in {self.file}"
            for name, what in self.inlined.items()
        ]
        if self.form == "plugin":
            notes.append(
                f"{self.file} needs the plugin, so ONNX Runtime verified it with the definitions that were taken out"
            )
        return notes


class ExportReport(Document):
    """Everything that one run of the pipeline found."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(description="the checkpoint, as it was named")
    notes: tuple[str, ...] = Field(description="what was done to the checkpoint on loading")
    blocks: tuple[BlockReport, ...] = Field(description="blocks found in the module, and modules that resemble one")
    export: ExportResult
    fusion: FusionReport
    files: dict[str, FileReport] = Field(description="by role: plain, fused, fp16, target")
    target: TargetReport | None = Field(default=None, description="the file to carry to the target that was asked for")
    verification: Verification
    seconds: dict[str, float] = Field(description="time that each stage took")
    next_steps: tuple[str, ...] = Field(description="what to run on the target")

    @computed_field(description="whether every file is as exact as the operator's definition asks")  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        return self.verification.passed


def describe_file(artifact: Artifact, profile: Profile | None = None) -> FileReport:
    """Size and node count of a written ONNX file."""
    model = onnx.load(artifact.path, load_external_data=False)
    return FileReport(
        artifact=artifact, size_bytes=artifact.path.stat().st_size, nodes=count_nodes(model), profile=profile
    )


def next_steps(files: dict[str, str], exported: ExportResult, target: TargetReport | None = None) -> tuple[str, ...]:
    """What to run on the target, by the runtime that is on it; ``files`` are names by role."""
    shapes = _trtexec_shapes(exported)
    if target:
        return _target_steps(target, shapes, fp16="fp16" in files)
    best = files.get("fp16", files["fused"])
    typed = " --stronglyTyped" if "fp16" in files else ""
    return (
        f"TensorRT 10.7 and later: {_trtexec(best, typed + shapes)}",
        "  with the fused kernels: acmix-deploy plugin build, and add --staticPlugins=./libacmix_plugin.so",
        "Jetson, and TensorRT 8.5 to 10.6: export again with --for, such as --for jetpack-6.2",
        f"ONNX Runtime: acmix-deploy profile {files['fused']}",
    )


def _target_steps(report: TargetReport, shapes: str, *, fp16: bool) -> tuple[str, ...]:
    """What to run on the machine that a file was made for."""
    target = target_named(report.name)
    strong = " --stronglyTyped" * (target.tensorrt < (11, 0))  # from 11 on there is nothing else
    options = (strong if target.strongly_typed else " --fp16") * fp16 + shapes
    alone = _trtexec(report.file, options)
    where = f"{target.name}, TensorRT {target.version}:"
    if report.form == "plain":
        return (f"{where} {alone}",)
    plugin = " --plugins" if target.tensorrt < (8, 6) else " --staticPlugins"
    build, library = "acmix-deploy plugin build", "./libacmix_plugin.so"
    if not target.package:
        build, library = "cmake -S plugins -B build && cmake --build build", "./build/libacmix_plugin.so"
    return (
        f"{where} {build}",
        f"  {_trtexec(report.file, f'{options}{plugin}={library}')}",
        f"  without the plugin: {'export again with --target plain' if report.form == 'plugin' else alone}",
    )


def _trtexec(file: str, options: str) -> str:
    return f"trtexec --onnx={file}{options} --saveEngine={Path(file).stem}.engine"


def _trtexec_shapes(exported: ExportResult) -> str:
    """The options that trtexec needs for free axes: the range of the shapes that the export was checked at."""
    image = exported.inputs[0]
    if all(isinstance(size, int) for size in image.shape):
        return ""
    sizes = list(zip(*exported.checked_shapes, strict=True))
    ranges = {"min": map(min, sizes), "opt": exported.checked_shapes[0], "max": map(max, sizes)}
    return "".join(f" --{name}Shapes={image.name}:{'x'.join(map(str, shape))}" for name, shape in ranges.items())
