"""How far a file may be from the reference: the one place that says so for whole models."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.detection.matching import NEAR
from acmix_deploy.operators import spec
from acmix_deploy.operators.spec import Tolerance

TOLERANCES: Mapping[str, Tolerance | None] = MappingProxyType(
    spec.TOLERANCES
    | {
        "float32 scores": Tolerance(floor=2e-4, absolute=5e-8),
        "float16 scores": Tolerance(floor=2e-2),
        "int8": Tolerance(floor=0.25),
        "int8 scores": Tolerance(floor=0.5),
        "int8 scores of nothing": None,
    }
)
"""Of outputs, by the type that the candidate computes in; and of scores, which are logistic functions: the relative
error of a small score is the absolute one of its logit. In float32 they may be off by what ONNX Runtime's own logistic
function is, which it computes from its middle, 0.5: an RMS of up to 4.4e-8 was measured, on logits around each whole
number from -20 to 3, on a CPU. Where nothing is detected, as on noise, all scores are small
and say nothing of a file that was calibrated on images: there they are not judged."""

UNKNOWN = "unknown"
"""The type of an engine of which nobody knows it. It has the limits of float32, so that it passes by none that is not
its own."""

FILE_TOLERANCES: Mapping[str, Tolerance | None] = MappingProxyType(
    {**TOLERANCES, "float16": Tolerance(floor=1e-2), "float16 scores": Tolerance(floor=0.1)}
)
"""The same where PyTorch's own error in the type is not known."""

AS_SCORES = frozenset({"scores", "objectness", "visibility", "angles", "channel"})
"""Parts that have the limits of scores: other logistic functions, and single channels of an output that is also judged
as a whole."""

CHANNEL_FLOOR = 0.1
"""What a channel's error is relative to at least, as a share of the norm of the channels of its kind."""

PIXELS = 10.0
"""Channels that reach it are of another kind than those that do not: coordinates in pixels, and scores, angles in
radians or coefficients."""


class DetectionLimits(BaseModel):
    """How far a candidate's detections may be from the reference's."""

    model_config = ConfigDict(frozen=True)

    lost: float = Field(description="largest share of the reference's detections lost or changed, and of such added")
    score_change: float = Field(description="largest mean difference of the scores of matches")
    iou: float = Field(
        description="smallest mean intersection over union of matches, of their boxes and of their masks; 1 minus the "
        "largest mean distance of their keypoints"
    )
    near: float = Field(
        description="difference of scores by which a match may cross the threshold; one lost and one added detection "
        "are excused within twice that of it"
    )


DETECTION_LIMITS: Mapping[str, DetectionLimits] = MappingProxyType(
    {
        "float32": DetectionLimits(lost=0.001, score_change=0.001, iou=0.999, near=NEAR["float32"]),
        "float16": DetectionLimits(lost=0.01, score_change=0.01, iou=0.95, near=NEAR["float16"]),
        "int8": DetectionLimits(lost=0.05, score_change=0.05, iou=0.93, near=NEAR["int8"]),
    }
)
"""Of detections, by the type that the candidate computes in."""


def limits_for(precision: str) -> str:
    """The type whose limits a candidate has that computes in ``precision``."""
    return "float32" if precision == UNKNOWN else precision


def tolerance_of(
    tolerances: Mapping[str, Tolerance | None], precision: str, part: str, empty: bool = False
) -> Tolerance | None:
    """The tolerance of one part: its own for the type, else that of the type; None where it is not to be judged.

    Args:
        tolerances: such as :data:`TOLERANCES`.
        precision: type that the candidate computes in, or :data:`UNKNOWN`.
        part: name of the output or of the part; "channel" for one channel.
        empty: whether nothing is detected.
    """
    precision = limits_for(precision)
    kind = "scores" if part in AS_SCORES else part
    names = f"{precision} {kind} of nothing", f"{precision} {kind}", precision
    return next(tolerances[name] for name in names[not empty :] if name in tolerances)


def relative_at_most(limit: float) -> dict[str, Tolerance]:
    """One limit for the relative L2 of every output, whatever the type, PyTorch's own error in it and what is seen."""
    return dict.fromkeys((name for name, known in TOLERANCES.items() if known), Tolerance(floor=limit, factor=0))
