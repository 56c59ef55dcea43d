"""How far a file may be from the reference: the one place that says so for whole models."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.spec import Tolerance

TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    LOCAL_ATTENTION.tolerances
    | {
        "float32 scores": Tolerance(floor=2e-4),
        "float16 scores": Tolerance(floor=2e-2),
        "int8": Tolerance(floor=0.25),
        "int8 scores": Tolerance(floor=0.5),
        "int8 scores of nothing": Tolerance(floor=10),
    }
)
"""Of outputs, by the type that the candidate computes in; and of a detector's scores, which are logistic functions:
the relative error of a small score is the absolute one of its logit. Where the reference detects nothing, as on noise,
all scores are small and say nothing of a file that was calibrated on images: there the limit only refuses nonsense."""

FILE_TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {**TOLERANCES, "float16": Tolerance(floor=1e-2), "float16 scores": Tolerance(floor=0.1)}
)
"""The same where PyTorch's own error in the type is not known."""


class DetectionLimits(BaseModel):
    """How far a candidate's detections may be from the reference's."""

    model_config = ConfigDict(frozen=True)

    lost: float = Field(description="largest share of the reference's detections lost or changed, and of such added")
    score_change: float = Field(description="largest mean difference of the scores of matches")
    iou: float = Field(description="smallest mean intersection over union of matches")
    near: float = Field(
        description="difference of scores by which a match may cross the threshold; one lost and one added detection "
        "are excused within twice that of it"
    )


DETECTION_LIMITS: Mapping[str, DetectionLimits] = MappingProxyType(
    {
        "float32": DetectionLimits(lost=0.001, score_change=0.001, iou=0.999, near=0.002),
        "float16": DetectionLimits(lost=0.01, score_change=0.01, iou=0.95, near=0.02),
        "int8": DetectionLimits(lost=0.05, score_change=0.05, iou=0.93, near=0.15),
    }
)
"""Of detections, by the type that the candidate computes in."""


def tolerance_of(tolerances: Mapping[str, Tolerance], precision: str, output: str, empty: bool = False) -> Tolerance:
    """The tolerance of one output: its own for the type, else that of the type; ``empty`` where nothing is detected."""
    names = f"{precision} {output} of nothing", f"{precision} {output}", precision
    return next(tolerances[name] for name in names[not empty :] if name in tolerances)


def relative_at_most(limit: float) -> dict[str, Tolerance]:
    """One limit for the relative L2 of every output, whatever the type and PyTorch's own error in it."""
    return dict.fromkeys(TOLERANCES, Tolerance(floor=limit, factor=0))
