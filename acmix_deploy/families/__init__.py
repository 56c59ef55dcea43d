"""What can be deployed: one folder a family of blocks.

A family's folder holds ``module`` (the block, needs torch), ``recognise`` (its blocks in a module, needs torch),
``graph`` (its blocks in an ONNX graph, without torch) and ``examples`` (what tests run it on).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from acmix_deploy.families.acmix.graph import ACMIX
from acmix_deploy.families.cafm.graph import CAFM
from acmix_deploy.families.carafe.graph import CARAFE
from acmix_deploy.families.family import Family
from acmix_deploy.families.gated_acmix.graph import GATED_ACMIX
from acmix_deploy.families.involution.graph import INVOLUTION
from acmix_deploy.families.local_attention.graph import LOCAL_ATTENTION
from acmix_deploy.families.outlook.graph import OUTLOOK
from acmix_deploy.families.shift_conv.graph import SHIFT_CONV
from acmix_deploy.families.swin_acmix.graph import SWIN_ACMIX
from acmix_deploy.families.windowed_acmix.graph import WINDOWED_ACMIX
from acmix_deploy.faults import FaultId

if TYPE_CHECKING:
    from torch import nn

FAMILIES: tuple[Family[Any], ...] = (
    ACMIX,
    SWIN_ACMIX,
    SHIFT_CONV,
    OUTLOOK,
    WINDOWED_ACMIX,
    GATED_ACMIX,
    CAFM,
    LOCAL_ATTENTION,
    CARAFE,
    INVOLUTION,
)


class BlockReport(BaseModel):
    """What became of one block, or of a module that looked like one."""

    name: str = Field(
        description="its path in the model, such as model.16; of a block used in several places all of them"
    )
    class_name: str = Field(description="of the module as it was loaded")
    family: str = Field(description="family of blocks that it belongs to, or resembles")
    status: Literal["canonical", "replaced", "left alone"] = Field(
        description="canonical: it is this package's own module; replaced: by that module, which gives the same"
    )
    reason: str = Field(default="", description="why it was left alone")
    fault: FaultId | None = Field(default=None, description="the known fault that is the reason")
    repaired: list[FaultId] = Field(default=[], description="faults of the original that the replacement does not have")
    geometry: dict[str, int] | None = Field(
        default=None, description="arguments that the family's own module is built with"
    )
    reached: int = Field(
        default=0,
        exclude=True,
        description="how close a module that was left alone came, a :class:`acmix_deploy.graph.Reached`",
    )


def by_parts(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The family that a module belongs to by its parts alone, and the family's own module with its parameters.

    For modules whose code is not here, so that nothing proves them equal; None where the parts leave a doubt.
    """
    for family in FAMILIES:
        if block := family.recogniser.by_parts(module):
            return family.name, block
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
        model, found = family.recogniser.canonicalise(model)
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
