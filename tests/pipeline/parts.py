"""The whole way, with little time for latencies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from acmix_deploy.pipeline import deploy
from acmix_deploy.plan import Plan
from acmix_deploy.report.model import ExportReport


def deployed(
    checkpoint: Path, out: Path, progress: Callable[[str], None] = lambda step: None, **options: Any
) -> ExportReport:
    """What :func:`deploy` finds for the plan with these options."""
    return deploy(Plan(checkpoint=checkpoint, out=out, **{"seconds": 0.1, **options}), progress)
