"""What the verbs print with --json; ``export`` prints its :class:`ExportReport`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from acmix_deploy.artifacts import Artifact, StageResult
from acmix_deploy.doctor.diagnosis import Diagnosis
from acmix_deploy.document import Document
from acmix_deploy.engine.adopt import AdoptReport
from acmix_deploy.engine.build import BuildReport
from acmix_deploy.forms import TargetReport
from acmix_deploy.fusion import FusionReport
from acmix_deploy.gate.history import GateHistory
from acmix_deploy.gate.verdict import Verdict
from acmix_deploy.plugin.library import PluginLibrary
from acmix_deploy.precision import Fp16Report, Int8Report
from acmix_deploy.report.inspection import Inspection
from acmix_deploy.verify import Verification

if TYPE_CHECKING:
    from typing_extensions import Self


class StageDocument(Document):
    """Result of a verb that runs one stage."""

    artifact: Artifact = Field(description="the file that was written, and what it was made from")

    @classmethod
    def of(cls, made: StageResult[Any], **more: Any) -> Self:
        """What a stage returned, and the fields that are not its own."""
        return cls(**made.found.model_dump(), artifact=made.artifact, **more)


class FuseDocument(FusionReport, StageDocument):
    """Result of ``acmix-deploy fuse``."""

    document: Literal["fuse"] = "fuse"
    target: TargetReport | None = Field(default=None, description="the file to carry to the target that was asked for")


class Fp16Document(Fp16Report, StageDocument):
    """Result of ``acmix-deploy fp16``."""

    document: Literal["fp16"] = "fp16"


class QuantizeDocument(Int8Report, StageDocument):
    """Result of ``acmix-deploy quantize``."""

    document: Literal["quantize"] = "quantize"


class VerifyDocument(Verification, Document):
    """Result of ``acmix-deploy verify``."""

    document: Literal["verify"] = "verify"


class PluginDocument(PluginLibrary, Document):
    """Result of ``acmix-deploy plugin build`` and ``acmix-deploy plugin check``."""

    document: Literal["plugin"] = "plugin"


class BuildDocument(BuildReport, StageDocument):
    """Result of ``acmix-deploy build``."""

    document: Literal["build"] = "build"


class AdoptDocument(AdoptReport, StageDocument):
    """Result of ``acmix-deploy adopt``."""

    artifact: Artifact = Field(description="the engine, as its new sidecar describes it")
    document: Literal["adopt"] = "adopt"


class InspectDocument(Inspection, Document):
    """Result of ``acmix-deploy inspect``."""

    document: Literal["inspect"] = "inspect"


class DoctorDocument(Diagnosis, Document):
    """Result of ``acmix-deploy doctor``."""

    document: Literal["doctor"] = "doctor"


class HtmlDocument(Document):
    """Result of ``acmix-deploy report``."""

    document: Literal["report"] = "report"
    file: Path = Field(description="the report")
    documents: list[str] = Field(description="names of the files that it was made of")
    notes: list[str] = Field(description="files that were left out, and why")


class GateDocument(Verdict, Document):
    """Result of ``acmix-deploy gate check``; ``gate run`` prints its :class:`GateSamples`."""

    document: Literal["gate check"] = "gate check"


class HistoryDocument(Document):
    """Result of ``acmix-deploy gate history``."""

    document: Literal["gate history"] = "gate history"
    histories: list[GateHistory] = Field(description="one for each model, by the name of its file")
    notes: list[str] = Field(default=[], description="the files that were left out, and why")
