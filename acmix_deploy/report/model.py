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
from acmix_deploy.verify import Verification


class FileReport(BaseModel):
    """One file that a stage wrote."""

    model_config = ConfigDict(frozen=True)

    artifact: Artifact
    size_bytes: int = Field(description="size of the file")
    nodes: int = Field(description="nodes of the graph, Constant nodes not counted; a function call is one")
    profile: Profile | None = Field(default=None, description="latency on ONNX Runtime, where it was measured")


class ExportReport(Document):
    """Everything that one run of the pipeline found."""

    model_config = ConfigDict(frozen=True)

    model: str = Field(description="the checkpoint, as it was named")
    notes: tuple[str, ...] = Field(description="what was done to the checkpoint on loading")
    blocks: tuple[BlockReport, ...] = Field(description="blocks found in the module, and modules that resemble one")
    export: ExportResult
    fusion: FusionReport
    files: dict[str, FileReport] = Field(description="by role: plain, fused, fp16")
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


def next_steps(files: dict[str, str], exported: ExportResult) -> tuple[str, ...]:
    """What to run on the target, by the runtime that is on it; ``files`` are names by role."""
    best = files.get("fp16", files["fused"])
    typed = " --stronglyTyped" if "fp16" in files else ""
    shapes = _trtexec_shapes(exported)
    build = f"trtexec --onnx={best}{typed}{shapes} --saveEngine={Path(best).stem}.engine"
    steps = [
        f"TensorRT 10 and later: {build}",
        "  with the fused kernels, from 10.7 on: acmix-deploy plugin build, and add --staticPlugins=libacmix_plugin.so",
        f"ONNX Runtime: acmix-deploy profile {files['fused']}",
    ]
    if exported.opset > 17:
        steps.append("TensorRT 8.5 and 8.6 read opset 17 at most: export again with --opset 17")
    else:
        plain = files["plain"]
        steps.append(
            f"TensorRT 8.5 and 8.6 know no functions, so they take the plain file: "
            f"trtexec --onnx={plain} --fp16{shapes} --saveEngine={Path(plain).stem}.engine"
        )
    return tuple(steps)


def _trtexec_shapes(exported: ExportResult) -> str:
    """The options that trtexec needs for free axes: the range of the shapes that the export was checked at."""
    image = exported.inputs[0]
    if all(isinstance(size, int) for size in image.shape):
        return ""
    sizes = list(zip(*exported.checked_shapes, strict=True))
    ranges = {"min": map(min, sizes), "opt": exported.checked_shapes[0], "max": map(max, sizes)}
    return "".join(f" --{name}Shapes={image.name}:{'x'.join(map(str, shape))}" for name, shape in ranges.items())
