"""What a verification found: distances that are kept, so that limits can be applied to them later."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy.errors import CheckFailed
from acmix_deploy.operators.spec import Tolerance
from acmix_deploy.runtime.metrics import Deviation


class Comparison(Deviation):
    """One output of one candidate on one input, against the same output of the reference."""

    candidate: str = Field(description="name of what was compared with the reference")
    precision: str = Field(description="element type that the candidate computes in: float32 or float16")
    output: str = Field(description="name of the output")
    input_shapes: dict[str, tuple[int, ...]] = Field(description="shape of each input")
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
    notes: tuple[str, ...] = Field(default=(), description="inputs that could not be used, and why")

    @computed_field(description="whether something was compared and every comparison passed")  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and not self.failures

    @property
    def failures(self) -> list[Comparison]:
        """The comparisons that did not pass."""
        return [comparison for comparison in self.comparisons if not comparison.passed]

    def worst(self, candidate: str) -> list[Comparison]:
        """The comparison with the largest relative L2 for each output of a candidate; a problem is worse than any."""
        outputs: dict[str, Comparison] = {}
        for found in (comparison for comparison in self.comparisons if comparison.candidate == candidate):
            if found.output not in outputs or _badness(found) > _badness(outputs[found.output]):
                outputs[found.output] = found
        return list(outputs.values())

    def judged_by(self, tolerances: Mapping[str, Tolerance]) -> Verification:
        """The same distances under other limits. ``tolerances`` has one for each precision."""
        comparisons = (
            comparison.model_copy(
                update={"limit": tolerances[comparison.precision].limit(comparison.eager_error or 0.0)}
            )
            for comparison in self.comparisons
        )
        return self.model_copy(update={"comparisons": tuple(comparisons)})

    def check(self) -> None:
        """Raise CheckFailed with the worst failure of each candidate, if there is any."""
        if not self.passed:
            by_candidate = {failure.candidate: failure for failure in sorted(self.failures, key=_badness)}
            raise CheckFailed("; ".join(map(str, by_candidate.values())) or "nothing was compared")


def _badness(comparison: Comparison) -> float:
    return float("inf") if comparison.relative_l2 is None else comparison.relative_l2
