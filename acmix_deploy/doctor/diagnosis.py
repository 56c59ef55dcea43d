"""What a diagnosis says."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy.doctor.faults import FAULTS
from acmix_deploy.families import BlockReport
from acmix_deploy.faults import FaultId
from acmix_deploy.fusion import FusedBlock

State = Literal["ok", "missing", "fault"]


class Component(BaseModel):
    """Something that this machine has or lacks."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="what it is, such as TensorRT")
    state: State = Field(description="missing is no fault: what it says is what cannot be done without it")
    found: str = Field(description="version, or what was found or looked for")
    advice: str = Field(default="", description="what to do about it")


class Finding(BaseModel):
    """A fault that a file has."""

    model_config = ConfigDict(frozen=True)

    fault: FaultId = Field(description="its name in docs/doctor.md")
    where: str = Field(default="", description="block, node or axis; empty where it is the file")
    found: str = Field(description="what was seen")
    remedy: str = Field(description="what mends it")

    @classmethod
    def of(cls, fault: FaultId, found: str = "", where: str = "", remedy: str = "") -> Finding:
        """With the words of the fault where there are no better ones."""
        known = FAULTS[fault]
        return cls(fault=fault, where=where, found=found or known.what, remedy=remedy or known.remedy)


class Examination(BaseModel):
    """What is in a file, and what is wrong with it."""

    model_config = ConfigDict(frozen=True)

    path: Path = Field(description="the file")
    kind: Literal["checkpoint", "onnx", "engine", "plugin"] = Field(description="what it is, by its content")
    contents: dict[str, str] = Field(description="what it holds, in words")
    module_blocks: tuple[BlockReport, ...] = Field(default=(), description="blocks in the module of a checkpoint")
    graph_blocks: tuple[FusedBlock, ...] = Field(default=(), description="blocks in the graph of an ONNX file")
    findings: tuple[Finding, ...] = Field(description="known faults that it has")
    notes: tuple[str, ...] = Field(default=(), description="what was chosen, and what could not be looked at")


class Diagnosis(BaseModel):
    """Result of ``acmix-deploy doctor``."""

    machine: str = Field(default="This machine", description="which machine it is")
    environment: tuple[Component, ...] = Field(description="what the machine has and lacks")
    file: Examination | None = Field(default=None, description="what is in the file that was named, if one was")

    @computed_field(description="whether nothing is wrong; what is missing is not")  # type: ignore[prop-decorator]
    @property
    def healthy(self) -> bool:
        return all(component.state != "fault" for component in self.environment) and not (
            self.file and self.file.findings
        )
