"""What the verbs print with --json; ``export`` prints its :class:`ExportReport`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from acmix_deploy.engine.build import BuildReport
from acmix_deploy.fusion import FusionReport
from acmix_deploy.plugin.library import Library
from acmix_deploy.precision import Int8Report
from acmix_deploy.profile import Profile
from acmix_deploy.report.inspection import Inspection
from acmix_deploy.verify import Verification


class Document(BaseModel):
    """A JSON document with the version of its form."""

    schema_version: Literal[1] = Field(
        default=1, alias="schema", description="version of this form; grows when a field is renamed or changes meaning"
    )


class FuseDocument(FusionReport, Document):
    """Result of ``acmix-deploy fuse``."""


class QuantizeDocument(Int8Report, Document):
    """Result of ``acmix-deploy quantize``."""


class VerifyDocument(Verification, Document):
    """Result of ``acmix-deploy verify``."""


class ProfileDocument(Document):
    """Result of ``acmix-deploy profile``."""

    profiles: list[Profile] = Field(description="one for each file, in the order given")


class PluginDocument(Library, Document):
    """Result of ``acmix-deploy plugin build`` and ``acmix-deploy plugin check``."""


class BuildDocument(BuildReport, Document):
    """Result of ``acmix-deploy build``."""


class InspectDocument(Inspection, Document):
    """Result of ``acmix-deploy inspect``."""
