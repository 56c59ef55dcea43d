"""What the verbs print with --json; ``export`` prints its :class:`ExportReport`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, computed_field

from acmix_deploy.artifacts import Artifact
from acmix_deploy.doctor import Diagnosis
from acmix_deploy.document import Document
from acmix_deploy.engine.build import BuildReport
from acmix_deploy.forms import TargetReport
from acmix_deploy.fusion import FusionReport
from acmix_deploy.gate.history import History
from acmix_deploy.gate.verdict import Verdict
from acmix_deploy.plugin.library import Library
from acmix_deploy.precision import Fp16Report, Int8Report
from acmix_deploy.profile import Profile, compare
from acmix_deploy.report.inspection import Inspection
from acmix_deploy.verify import Verification


class StageDocument(Document):
    """Result of a verb that runs one stage."""

    artifact: Artifact = Field(description="the file that was written, and what it was made from")


class FuseDocument(FusionReport, StageDocument):
    """Result of ``acmix-deploy fuse``."""

    target: TargetReport | None = Field(default=None, description="the file to carry to the target that was asked for")


class Fp16Document(Fp16Report, StageDocument):
    """Result of ``acmix-deploy fp16``."""


class QuantizeDocument(Int8Report, StageDocument):
    """Result of ``acmix-deploy quantize``."""


class VerifyDocument(Verification, Document):
    """Result of ``acmix-deploy verify``."""


class ProfileDocument(Document):
    """Result of ``acmix-deploy profile``."""

    profiles: list[Profile] = Field(description="one for each file, in the order given")

    @computed_field(description="what stands out between the files")  # type: ignore[prop-decorator]
    @property
    def notes(self) -> list[str]:
        return compare(self.profiles)


class PluginDocument(Library, Document):
    """Result of ``acmix-deploy plugin build`` and ``acmix-deploy plugin check``."""


class BuildDocument(BuildReport, StageDocument):
    """Result of ``acmix-deploy build``."""


class InspectDocument(Inspection, Document):
    """Result of ``acmix-deploy inspect``."""


class DoctorDocument(Diagnosis, Document):
    """Result of ``acmix-deploy doctor``."""


class HtmlDocument(Document):
    """Result of ``acmix-deploy report``."""

    file: Path = Field(description="the report")
    documents: list[str] = Field(description="names of the files that it was made of")
    notes: list[str] = Field(description="files that were left out, and why")


class GateDocument(Verdict, Document):
    """Result of ``acmix-deploy gate check``; ``gate run`` prints its :class:`GateSamples`."""


class HistoryDocument(Document):
    """Result of ``acmix-deploy gate history``."""

    histories: list[History] = Field(description="one for each model, by the name of its file")
    notes: list[str] = Field(default=[], description="the files that were left out, and why")
