"""What a verification found: distances and detections are kept, so that limits can be applied to them later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.operators.spec import Tolerance
from acmix_deploy.runtime.metrics import Deviation
from acmix_deploy.runtime.reason import reason
from acmix_deploy.verify.detections import DetectionComparison, ImageComparison
from acmix_deploy.verify.limits import tolerance_of


class Comparison(Deviation):
    """One output of one candidate on one input, against the same output of the reference."""

    candidate: str = Field(description="name of what was compared with the reference")
    precision: str = Field(description="element type that the candidate computes in: float32, float16 or int8")
    output: str = Field(description="name of the output; boxes and scores of a detector's")
    input_shapes: dict[str, tuple[int, ...]] = Field(description="shape of each input")
    empty: bool = Field(default=False, description="the reference is a detector and detects nothing on this input")
    eager_error: float | None = Field(
        default=None, description="relative L2 of PyTorch's own model in the candidate's type, where it was measured"
    )
    limit: float = Field(description="largest relative L2 accepted")

    @computed_field(description="whether there is a relative_l2 and it is within limit")  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        return self.relative_l2 is not None and self.relative_l2 <= self.limit

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.input_shapes.items())
        found = self.problem or f"relative L2 {self.relative_l2:.1e}, at most {self.limit:.1e} is accepted"
        return f"{self.candidate}, {self.output} on {shapes}: {found}"


class Verification(BaseModel):
    """Every candidate against one reference. ``model_dump_json`` and ``model_validate_json`` keep and restore it."""

    model_config = ConfigDict(frozen=True)

    reference: str = Field(description="name of what the candidates were compared with")
    comparisons: tuple[Comparison, ...] = Field(description="one for each candidate, input and output")
    detections: tuple[DetectionComparison, ...] = Field(
        default=(), description="one for each candidate, where detectors were compared on images"
    )
    notes: tuple[str, ...] = Field(default=(), description="inputs that could not be used, and why")

    @computed_field(description="whether something was compared and nothing failed")  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and not self.failures and not self.losses

    @property
    def failures(self) -> list[Comparison]:
        """The comparisons that did not pass."""
        return [comparison for comparison in self.comparisons if not comparison.passed]

    @property
    def losses(self) -> list[DetectionComparison]:
        """The candidates that detect something else than the reference."""
        return [comparison for comparison in self.detections if comparison.passed is False]

    @property
    def worst_image(self) -> ImageComparison | None:
        """The image in which a candidate's detections differ most from the reference's."""
        images = (found.images[0] for found in self.detections)
        return max(images, key=lambda image: image.badness, default=None)

    def worst(self, candidate: str) -> list[Comparison]:
        """The worst comparison for each output of a candidate: one that failed first, then by its relative L2."""
        outputs: dict[str, Comparison] = {}
        for found in (comparison for comparison in self.comparisons if comparison.candidate == candidate):
            if found.output not in outputs or _badness(found) > _badness(outputs[found.output]):
                outputs[found.output] = found
        return list(outputs.values())

    def judged_by(self, tolerances: Mapping[str, Tolerance] | None = None, **detection_limits: float) -> Verification:
        """The same findings under other limits.

        Args:
            tolerances: of outputs, by precision.
            detection_limits: ``lost``, ``score_change`` or ``iou`` of :class:`DetectionLimits`, whatever the precision.
        """
        comparisons, detections = self.comparisons, self.detections
        if tolerances is not None:
            limits = (tolerance_of(tolerances, it.precision, it.output, it.empty) for it in comparisons)
            comparisons = tuple(
                found.model_copy(update={"limit": limit.limit(found.eager_error or 0.0)})
                for found, limit in zip(comparisons, limits, strict=True)
            )
        if detection_limits:
            detections = tuple(
                found.model_copy(update={"limits": found.limits.model_copy(update=detection_limits)})
                for found in detections
            )
        return self.model_copy(update={"comparisons": comparisons, "detections": detections})

    def check(self) -> None:
        """Raise CheckFailed with the worst failure of each candidate, if there is any."""
        if not self.passed:
            by_candidate = {failure.candidate: failure for failure in sorted(self.failures, key=_badness)}
            raise CheckFailed("; ".join(map(str, (*by_candidate.values(), *self.losses))) or "nothing was compared")


def read_verification(path: Path) -> Verification:
    """What ``verify`` or ``export`` wrote as JSON.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Verification.model_validate(document.get("verification", document))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} holds no result of a verification: {reason(error)}",
            "Give what `verify` wrote with -o, or the report.json of `export`.",
        ) from error


def _badness(comparison: Comparison) -> tuple[bool, float]:
    return not comparison.passed, float("inf") if comparison.relative_l2 is None else comparison.relative_l2
