"""What a verification found: distances and detections are kept, so that limits can be applied to them later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, computed_field

from acmix_deploy.document import check_document, parse, read_json
from acmix_deploy.errors import CheckFailed
from acmix_deploy.onnx_file import some
from acmix_deploy.operators.spec import Tolerance
from acmix_deploy.runtime.metrics import Deviation
from acmix_deploy.verify.accuracy import Accuracy
from acmix_deploy.verify.detections import DetectionComparison, ImageComparison
from acmix_deploy.verify.half import HalfRange
from acmix_deploy.verify.layers import LayerErrors, Mend
from acmix_deploy.verify.limits import AS_SCORES, tolerance_of


class Comparison(Deviation):
    """One output of one candidate on one input, or a part of it, against the same of the reference."""

    candidate: str = Field(description="name of what was compared with the reference")
    precision: str = Field(
        description="element type that the candidate computes in: float32, float16 or int8; else unknown"
    )
    output: str = Field(description="name of the output, or of the part where the parts are known, such as scores")
    channel: int | None = Field(
        default=None,
        description="the worst channel, where outputs of unknown parts are compared by channel; relative_l2 is then "
        "relative to a tenth of the usual norm of such channels where its own is smaller",
    )
    input_shapes: dict[str, tuple[int, ...]] = Field(description="shape of each input")
    empty: bool = Field(
        default=False, description="neither the reference nor the candidate, both detectors, detects something here"
    )
    eager_error: float | None = Field(
        default=None, description="relative L2 of PyTorch's own model in the candidate's type, where it was measured"
    )
    limit: float | None = Field(
        description="largest relative L2 accepted; None where too little was detected to judge by it"
    )

    @computed_field(description="whether relative_l2 is there and within limit; null where there is no limit")  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool | None:
        if self.relative_l2 is None:
            return False
        return None if self.limit is None else self.relative_l2 <= self.limit

    @property
    def part(self) -> str:
        """What was compared, the same on every input."""
        return self.output if self.channel is None else f"{self.output} by channel"

    def judged_by(self, tolerances: Mapping[str, Tolerance | None]) -> Comparison:
        """The same under other limits, see :func:`acmix_deploy.verify.limits.tolerance_of`."""
        part = self.output if self.channel is None else "channel"
        tolerance = tolerance_of(tolerances, self.precision, part, self.empty)
        return self.model_copy(update={"limit": tolerance and tolerance.limit(self.eager_error or 0.0, self.rms)})

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {list(shape)}" for name, shape in self.input_shapes.items())
        accepted = "nothing to judge it by" if self.limit is None else f"at most {self.limit:.1e} is accepted"
        found = self.problem or f"relative L2 {self.relative_l2:.1e}, {accepted}"
        channel = "" if self.channel is None else f", channel {self.channel}"
        return f"{self.candidate}, {self.output}{channel} on {shapes}: {found}"


class Verification(BaseModel):
    """Every candidate against one reference. ``model_dump_json`` and ``model_validate_json`` keep and restore it."""

    model_config = ConfigDict(frozen=True)

    reference: str = Field(description="name of what the candidates were compared with")
    comparisons: tuple[Comparison, ...] = Field(description="one for each candidate, input and part of an output")
    detections: tuple[DetectionComparison, ...] = Field(
        default=(), description="one for each candidate, where detectors were compared on images"
    )
    accuracy: tuple[Accuracy, ...] = Field(
        default=(), description="mean average precision of the reference and of each candidate, on labelled images"
    )
    half: tuple[HalfRange, ...] = Field(
        default=(), description="one for each candidate that is an ONNX file with tensors in float16"
    )
    rounded: tuple[str, ...] = Field(
        default=(),
        description="candidates whose float16 tensors were rounded one by one, on a machine that computes in float32",
    )
    layers: tuple[LayerErrors, ...] = Field(
        default=(), description="the error along the graph, of candidates of which that was asked for"
    )
    notes: tuple[str, ...] = Field(default=(), description="inputs that could not be used, and why")

    @computed_field(  # type: ignore[prop-decorator]
        description="whether something was compared and nothing failed; null where nothing failed, but too little was "
        "detected to judge the scores of a candidate"
    )
    @property
    def passed(self) -> bool | None:
        if not (self.comparisons or self.detections) or self.failures or self.losses or self.overflows:
            return False
        unseen = not self.comparisons and all(found.passed is None for found in self.detections)
        return None if self.unjudged or unseen else True

    @property
    def failures(self) -> list[Comparison]:
        """The comparisons that failed."""
        return [comparison for comparison in self.comparisons if comparison.passed is False]

    @property
    def unjudged(self) -> list[str]:
        """The candidates that have a part which was judged on no input."""
        verdicts: dict[tuple[str, str], set[bool | None]] = {}
        for found in self.comparisons:
            verdicts.setdefault((found.candidate, found.part), set()).add(found.passed)
        return list(dict.fromkeys(candidate for (candidate, _), seen in verdicts.items() if seen == {None}))

    @property
    def overflows(self) -> list[HalfRange]:
        """The candidates that hold in float16 what it cannot hold."""
        return [found for found in self.half if not found.passed]

    @property
    def losses(self) -> list[DetectionComparison]:
        """The candidates that detect something else than the reference."""
        return [comparison for comparison in self.detections if comparison.passed is False]

    @property
    def beyond(self) -> list[str]:
        """The candidates of which something is beyond a limit."""
        names = (
            *(found.candidate for found in self.failures),
            *(found.candidate for found in self.losses),
            *(found.candidate for found in self.overflows),
        )
        return sorted({*names})

    @property
    def worst_image(self) -> ImageComparison | None:
        """The image in which a candidate's detections differ most from the reference's."""
        images = (found.images[0] for found in self.detections)
        return max(images, key=lambda image: image.badness, default=None)

    def worst(self, candidate: str) -> list[Comparison]:
        """The worst comparison for each part of a candidate's outputs: a failure, else the largest that was judged."""
        parts: dict[str, Comparison] = {}
        for found in (comparison for comparison in self.comparisons if comparison.candidate == candidate):
            if found.part not in parts or _badness(found) > _badness(parts[found.part]):
                parts[found.part] = found
        return list(parts.values())

    def limits_of(self, candidate: str) -> dict[str, Tolerance]:
        """Tolerances that are the smallest limits of a candidate's outputs, whatever widened them."""
        found: dict[str, Tolerance] = {}
        for one in self.comparisons:
            if one.candidate == candidate and one.limit is not None and one.channel is None:
                kind = f"{one.precision} scores" if one.output in AS_SCORES else one.precision
                found[kind] = Tolerance(floor=min(one.limit, found[kind].floor if kind in found else one.limit))
        return found

    def judged_by(
        self, tolerances: Mapping[str, Tolerance | None] | None = None, **detection_limits: float
    ) -> Verification:
        """The same findings under other limits.

        Args:
            tolerances: of outputs, by precision.
            detection_limits: ``lost``, ``score_change`` or ``iou`` (docs/verify.md), whatever the precision.
        """
        comparisons, detections, layers = self.comparisons, self.detections, self.layers
        if tolerances is not None:
            comparisons = tuple(found.judged_by(tolerances) for found in comparisons)
            layers = tuple(found.judged_by(tolerances) for found in layers)
        if detection_limits:
            detections = tuple(
                found.model_copy(update={"limits": found.limits.model_copy(update=detection_limits)})
                for found in detections
            )
        return self.model_copy(update={"comparisons": comparisons, "detections": detections, "layers": layers})

    def check(self) -> None:
        """Raise CheckFailed with the worst failure of each candidate, if there is any."""
        if self.passed is False:
            by_candidate = {failure.candidate: failure for failure in sorted(self.failures, key=_badness)}
            found = (*by_candidate.values(), *self.overflows, *self.losses)
            raise CheckFailed("; ".join(map(str, found)) or "nothing was compared", "\n".join(self._beginnings()))

    def _beginnings(self) -> Iterator[str]:
        """Where the errors of the candidates that are beyond a limit begin, and what mends them."""
        for along in self.layers:
            nodes = [one.node for half in self.overflows if half.candidate == along.candidate for one in half.overflows]
            if nodes and not along.lasting:  # inside the definition of a custom operator
                mend = Mend(option="--float32", nodes=tuple(nodes)).spelt(along.float32)
                yield f"{along.candidate} overflows in {some(nodes)}; keep it in floating point: {mend}"
            elif along.first and along.candidate in self.beyond:
                yield str(along)


def read_verification(path: Path) -> Verification:
    """What ``verify`` or ``export`` wrote as JSON.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    content = read_json(path)
    check_document(content, path, "verify", "export")
    return parse(Verification, content.get("verification") if content["document"] == "export" else content, path)


def _badness(comparison: Comparison) -> tuple[bool, bool, float]:
    relative = float("inf") if comparison.relative_l2 is None else comparison.relative_l2
    return comparison.passed is False, comparison.passed is not None, relative
