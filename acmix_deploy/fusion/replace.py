"""Blocks of a graph, replaced by their reduced forms where both compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.families.blocks import find, free_names
from acmix_deploy.families.conv_branch import ConvBranch
from acmix_deploy.families.family import Family, M
from acmix_deploy.families.reduction import Reduced, Request
from acmix_deploy.fusion.sizes import Need, Patience, Source, free_sides, sources_of, values_at_sizes
from acmix_deploy.graph import Array, Feeds, NoMatch, Reached, Region, evaluate
from acmix_deploy.operators.spec import Operator, Tolerance
from acmix_deploy.runtime.metrics import deviation

_ODD = (11, 13)
"""Rows and columns of a map that neither strides nor windows divide, to compare free sizes at."""


class FusedBlock(BaseModel):
    """What became of one block, or of a Softmax that came close to being one."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="prefix of the new nodes, or the anchor node of a block left alone")
    family: str = Field(description="family of blocks that it belongs to, or resembles")
    fused: bool = Field(description="whether it was replaced")
    reason: str = Field(default="", description="why it was left alone")
    operator: str = Field(default="", description="the operator in its place")
    settings: dict[str, Any] = Field(default_factory=dict, description="attributes of the operator, and more")
    relative_l2: float | None = Field(default=None, description="fused against original block on random input, float32")


@dataclass
class Fusion:
    """A graph whose blocks are replaced in place, family by family, and what became of them."""

    graph: gs.Graph
    functions: list[onnx.FunctionProto]
    """Definitions of the custom operators in the graph; those that come in are added."""
    inputs: Sequence[Source]
    """What values come from."""
    conv_branch: ConvBranch
    progress: Callable[[str], None]
    fused: list[FusedBlock] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    """Those of the fused blocks."""
    needs: list[Need] = field(default_factory=list)
    """What the fused blocks ask of their maps."""
    _closest: dict[str, tuple[Reached, FusedBlock]] = field(default_factory=dict)
    """By anchor, the family that came closest to a block there."""
    _patience: Patience = field(default_factory=Patience)

    @property
    def blocks(self) -> list[FusedBlock]:
        """What was fused, then what was not though it came close."""
        return [*self.fused, *(block for _, block in self._closest.values())]

    def fuse(self, family: Family[M]) -> None:
        """Replace the blocks of one family."""
        matches: list[tuple[gs.Node, M]] = []
        for anchor, found in find(family, self.graph):
            if isinstance(found, NoMatch):
                self._leave(anchor, family, found)
            else:
                matches.append((anchor, found))
        if not matches:
            return
        self.progress(f"evaluating the graph around {len(matches)} candidate blocks")
        seen = _look(self.graph, [match.region for _, match in matches], self.functions, self.inputs, self._patience)
        names = free_names(family, self.graph)
        before = len(self.fused)
        for (anchor, match), values, name in zip(matches, seen, names, strict=False):
            if isinstance(values, NoMatch):
                self._leave(anchor, family, values, Reached.WHOLE)
            else:
                self._replace(anchor, family, match, values, name)
        if len(self.fused) > before:
            self.graph.cleanup()  # what fell away is no anchor of another family

    def _leave(self, anchor: gs.Node, family: Family[M], why: NoMatch, least: Reached = Reached.NOTHING) -> None:
        reached = max(why.reached, least) if why.reached else why.reached
        closest = self._closest.get(anchor.name, (Reached.NOTHING, None))[0]
        if reached > closest:
            block = FusedBlock(name=anchor.name, family=family.name, fused=False, reason=why.reason)
            self._closest[anchor.name] = reached, block

    def _replace(self, anchor: gs.Node, family: Family[M], match: M, seen: _Seen, name: str) -> None:
        """Put the reduced form of a block in its place, if it computes the same."""
        self.progress(f"fusing {name}")
        region = match.region
        request = Request(
            name=name,
            opset=self.graph.opset,
            static=all(source.is_static for source in seen.inputs),
            fixed_size=all(source.has_fixed_size for source in seen.inputs),
            values={tensor.name: seen.values[0][tensor.name] for tensor in (region.x, *region.outside)},
            compute=lambda outputs, feeds: evaluate(self.graph, outputs, feeds),
        )
        grouped = family.reduce_grouped if self.conv_branch == "grouped" else None
        present = {(body.domain, body.name) for body in self.functions}
        reached = Reached.WHOLE
        try:
            reduced = (grouped or family.reduce)(match, request)
            reached = Reached.REDUCED
            used = {node.op for node in reduced.graph.nodes}
            operators = [(operator, body) for operator, body in family.operators if operator.op_type in used]
            bodies = [
                body(self.graph.opset)
                for operator, body in operators
                if (operator.domain, operator.op_type) not in present
            ]
            relative_l2 = _compare(self.graph, region, reduced, seen, family.tolerances, [*self.functions, *bodies])
        except NoMatch as error:
            self._leave(anchor, family, error, reached)
            return
        _splice(self.graph, reduced.graph, region.y)
        self.functions += bodies
        self.operators += [operator for operator, _ in operators if operator not in self.operators]
        if reduced.smallest > 1:
            self.needs.append(Need(region.x.name, reduced.height_axis, reduced.smallest))
        self._closest.pop(anchor.name, None)
        self.fused.append(
            FusedBlock(
                name=name,
                family=family.name,
                fused=True,
                operator=reduced.operator,
                settings=dict(reduced.settings),
                relative_l2=relative_l2,
            )
        )


class _Seen(NamedTuple):
    """What a block sees when the graph is run."""

    values: list[Feeds]
    """Of its x and of the tensors outside it, by name, at one or two sizes."""
    inputs: list[Source]
    """What they come from."""


def _look(
    graph: gs.Graph,
    regions: list[Region],
    functions: Sequence[onnx.FunctionProto],
    inputs: Sequence[Source],
    patience: Patience,
) -> list[_Seen | NoMatch]:
    """What each block sees, or why that cannot be told: found for all at once, or where that fails for each alone."""
    read = sources_of([tensor for region in regions for tensor in (region.x, region.y, *region.outside)], inputs)
    try:
        return [_Seen(values_at_sizes(graph, regions, functions, read, patience), read)] * len(regions)
    except NoMatch as error:
        if len(regions) == 1:
            return [error]
    return [one for region in regions for one in _look(graph, [region], functions, inputs, patience)]


def _compare(
    graph: gs.Graph,
    region: Region,
    reduced: Reduced,
    seen: _Seen,
    tolerances: Mapping[str, Tolerance],
    functions: Sequence[onnx.FunctionProto],
) -> float:
    """The largest relative L2 error on random input. Raises NoMatch where it is beyond the operator's tolerance, or
    where the reduced form runs and the block does not."""
    limit = tolerances[str(reduced.graph.outputs[0].dtype)].floor
    random = np.random.default_rng(1)

    def reduced_form(feeds: Feeds) -> Array:
        return evaluate(reduced.graph, reduced.graph.outputs, feeds, functions)[0]

    def error(original: Array, candidate: Array) -> float:
        difference = deviation(original, candidate)
        if difference.relative_l2 is None or difference.relative_l2 > limit:
            distance = difference.problem or f"relative L2 {difference.relative_l2:.1e}, limit {limit:.0e}"
            raise NoMatch(f"the block computes something else than its fused form ({distance})")
        return difference.relative_l2

    def inputs(shape: Sequence[int], at: Feeds) -> Feeds:
        x = random.standard_normal(shape).astype(np.float32)
        return {tensor.name: at[tensor.name] for tensor in region.outside} | {region.x.name: x}

    worst = 0.0
    free = free_sides(seen.inputs)
    for at in seen.values:
        feeds = inputs(at[region.x.name].shape, at)
        (original,) = evaluate(graph, [region.y], feeds)
        worst = max(worst, error(original, reduced_form(feeds)))
    first, last = seen.values[0], seen.values[-1]
    same = all(np.array_equal(first[tensor.name], last[tensor.name]) for tensor in region.outside)
    sizes = {at[region.x.name].shape for at in seen.values}
    if len(sizes) > 1 and any(free) and same:  # else the block is of the sizes that were tried
        shape = list(first[region.x.name].shape)
        for axis, (side, is_free) in enumerate(zip(_ODD, free, strict=True), reduced.height_axis):
            shape[axis] = max(side, reduced.smallest) if is_free else shape[axis]
        feeds = inputs(shape, first)
        if (block := _try(lambda: evaluate(graph, [region.y], feeds)[0])) is not None:
            worst = max(worst, error(block, reduced_form(feeds)))
        elif _try(lambda: reduced_form(feeds)) is not None:
            raise NoMatch(f"the block does not run at {shape}, and its fused form does")
    return worst


def _try(compute: Callable[[], Array]) -> Array | None:
    try:
        return compute()
    except NoMatch:
        return None


def _splice(graph: gs.Graph, replacement: gs.Graph, y: gs.Variable) -> None:
    """Put the nodes of ``replacement`` in the place of those that computed ``y``, which fall away on clean-up."""
    (result,) = replacement.outputs
    last = result.inputs[0]
    place = next(index for index, node in enumerate(graph.nodes) if node is y.inputs[0])
    y.inputs.clear()
    last.outputs = [y]
    graph.nodes[place:place] = replacement.nodes
