"""What can be deployed: one folder a family of blocks, named in ``FAMILIES``.

A family's folder holds ``module`` (the block, needs torch), ``recognise`` (its blocks in a module, needs torch) and
``graph`` (its blocks in an ONNX graph, without torch). Each is imported when it is asked for, by :func:`part`.
"""

from __future__ import annotations

import re
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from torch import nn

FAMILIES: tuple[str, ...] = ("acmix", "swin_acmix", "shift_conv", "outlook", "windowed_acmix", "gated_acmix")

FUSED_NODE = re.compile(rf"((?:{'|'.join(FAMILIES)})_\d+)\.")
"""Start of the name of every node of a fused block, ``acmix_0.attention``; its group is the block."""


class BlockReport(BaseModel):
    """What became of one block, or of a module that looked like one."""

    name: str
    """Its path in the model, e.g. ``model.16``; a block used in several places has the paths joined by ``, ``."""
    class_name: str
    family: str
    status: Literal["canonical", "replaced", "left alone"]
    reason: str = ""
    """Why it was left alone."""
    repaired: list[str] = []
    """Faults of the original that the replacement does not have."""
    geometry: dict[str, int] | None = None
    """The arguments that the family's own module is built with."""
    reached: int = Field(default=0, exclude=True)
    """How close a module that was left alone came, a :class:`acmix_deploy.graph.Reached`."""


def part(family: str, name: Literal["module", "recognise", "graph"]) -> ModuleType:
    """The submodule ``name`` of a family, imported now."""
    return import_module(f"{__name__}.{family}.{name}")


def by_parts(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The family that a module belongs to by its parts alone, and the family's own module with its parameters.

    For modules whose code is not here, so that nothing proves them equal; None where the parts leave a doubt.
    """
    for family in FAMILIES:
        recognise = part(family, "recognise")
        if hasattr(recognise, "by_parts") and (block := recognise.by_parts(module)):
            return family, block
    return None


def canonicalise(model: nn.Module) -> tuple[nn.Module, list[BlockReport]]:
    """Swap, in place, every block of every family for the family's own module, proven equal at one size.

    See :func:`acmix_deploy.families.proof.keep_proven` for other sizes.

    Returns:
        The model (another object where the model itself was a block), and a report for each block found; one that is
        left alone is told by the family that it came closest to.
    """
    reports: list[BlockReport] = []
    for family in FAMILIES:
        model, found = part(family, "recognise").canonicalise(model)
        reports += found
    taken = {report.name for report in reports if report.status != "left alone"}
    closest: dict[str, BlockReport] = {}
    for report in reports:
        if report.name not in closest or report.reached > closest[report.name].reached:
            closest[report.name] = report
    return model, [
        report
        for report in reports
        if report.status != "left alone" or (report.name not in taken and closest[report.name] is report)
    ]
