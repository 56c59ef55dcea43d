"""Plain ONNX to fused ONNX: every block of every family becomes its reduced form, or stays and says why."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.artifacts import replacing
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.families import FAMILIES, part
from acmix_deploy.families.reduction import ConvBranch, Reduced, Request, anchors
from acmix_deploy.fusion.prepare import load
from acmix_deploy.fusion.sizes import Need, free_sides, has_fixed_size, is_static, smallest_image, values_at_sizes
from acmix_deploy.graph import Array, Feeds, NoMatch, Region, count_nodes, evaluate
from acmix_deploy.operators.spec import Operator, Tolerance
from acmix_deploy.runtime.inputs import MIN_SIZE, min_size
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session

ConvBranchChoice = Literal["auto", "dense", "grouped"]

AUTO_BRANCH: ConvBranch = "dense"
"""What "auto" means. In a prototype on a GPU the dense form was 1.5 to 2.8 times faster (docs/benchmarks.md); the CPU
prefers the grouped one from about 128 channels, but the file is made for the target."""

_ODD = (11, 13)
"""Rows and columns of a map that neither strides nor windows divide, to compare free sizes at."""


class FusedBlock(BaseModel):
    """What became of one block, or of a Softmax that came close to being one."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="prefix of the new nodes, or the anchor node of a block left alone")
    family: str
    fused: bool
    reason: str = Field(default="", description="why it was left alone")
    operator: str = ""
    settings: dict[str, Any] = Field(default_factory=dict, description="attributes of the operator, and more")
    relative_l2: float | None = Field(default=None, description="fused against original block on random input, float32")


class FusionReport(BaseModel):
    """Result of one run of :func:`fuse`."""

    model_config = ConfigDict(frozen=True)

    blocks: list[FusedBlock]
    nodes_before: int
    nodes_after: int
    opset: int

    @property
    def fused(self) -> int:
        """How many blocks were fused."""
        return sum(block.fused for block in self.blocks)


def fuse(
    source: Path,
    target: Path,
    *,
    conv_branch: ConvBranchChoice = "auto",
    expect: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> FusionReport:
    """Fuse the blocks of an ONNX file and write the result.

    A block is rewritten only after original and replacement agreed on random input, at two sizes where the axes are
    dynamic. A file with nothing to fuse is written too, unchanged in meaning.

    Args:
        source: ONNX file of opset 13 to 21, float32 or float16, from any exporter; float64 becomes float32.
        target: where the fused file goes, another path than ``source``.
        conv_branch: form of the convolution branch.
        expect: the number of blocks that must fuse.
        progress: told what is being done.

    Raises:
        UserError: the file cannot be used.
        CheckFailed: another number of blocks than ``expect`` fused, or ONNX Runtime refuses the result; nothing is
            written then.
    """
    if target.resolve() == source.resolve():
        raise UserError(f"{target} is the file to be fused", "Give another name with -o.")
    model = load(source)
    graph = gs.import_onnx(model)
    branch: ConvBranch = AUTO_BRANCH if conv_branch == "auto" else conv_branch

    blocks: list[FusedBlock] = []
    functions: list[tuple[Operator, onnx.FunctionProto]] = []
    needs: list[Need] = []
    for family in FAMILIES:
        known = [*model.functions, *(body for _, body in functions)]
        found, used, needed = _fuse_family(graph, family, branch, known, progress)
        blocks += found
        needs += needed
        functions += [(operator, body) for operator, body in used if all(operator != other for other, _ in functions)]

    fused = _export(graph, model, functions)
    report = FusionReport(
        blocks=blocks, nodes_before=count_nodes(model), nodes_after=count_nodes(fused), opset=graph.opset
    )
    if expect is not None and report.fused != expect:
        left_alone = "; ".join(f"{block.name}: {block.reason}" for block in blocks if not block.fused)
        raise CheckFailed(
            f"{report.fused} blocks fused in {source}, expected {expect}",
            f"Left alone: {left_alone}" if left_alone else "Nothing else in the graph resembles a block.",
        )
    with replacing(target) as temporary:
        try:
            if needs and not has_fixed_size(graph):
                progress("finding the smallest image")
                _note_smallest_image(fused, needs)
            onnx.save(fused, temporary)
            if report.fused:
                progress("loading the fused file")
                open_session(temporary, once=True)
        except UserError as error:
            raise CheckFailed(f"the fused file cannot be used: {error.message}") from error
    return report


def _note_smallest_image(model: onnx.ModelProto, needs: list[Need]) -> None:
    """Write into the metadata for which images all fused blocks are defined, those of an earlier run among them."""
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    found = smallest_image(model, needs, int(metadata.get("stride", 1)))
    before = min_size(metadata)
    metadata[MIN_SIZE] = str([max(pair) for pair in zip(found, before, strict=True)])
    onnx.helper.set_model_props(model, metadata)


def _fuse_family(
    graph: gs.Graph,
    family: str,
    branch: ConvBranch,
    functions: list[onnx.FunctionProto],
    progress: Callable[[str], None],
) -> tuple[list[FusedBlock], list[tuple[Operator, onnx.FunctionProto]], list[Need]]:
    """Fuse the blocks of one family in ``graph``, in place; also the operators that came in, with their bodies, and
    what the blocks need of their maps.

    ``functions`` are the definitions of the custom operators that are in the graph.
    """
    kit: Any = part(family, "graph")
    blocks: list[FusedBlock] = []
    matches = []
    for anchor in anchors(graph, kit.ANCHOR):
        try:
            matches.append((anchor, kit.match(graph, anchor)))
        except NoMatch as error:
            if error.near:
                blocks.append(FusedBlock(name=anchor.name, family=family, fused=False, reason=error.reason))
    if not matches:
        return blocks, [], []

    progress(f"evaluating the graph around {len(matches)} candidate blocks")
    regions = [found.region for _, found in matches]
    ends = [tensor for region in regions for tensor in (region.x, region.y, *region.outside)]
    values = values_at_sizes(graph, ends, functions)
    bodies = {operator.op_type: (operator, body(graph.opset)) for operator, body in kit.OPERATORS}
    present = {(body.domain, body.name) for body in functions}
    missing = [body for _, body in bodies.values() if (body.domain, body.name) not in present]
    used: set[str] = set()
    needs: list[Need] = []
    for index, (anchor, found) in enumerate(matches, _first_free(graph, family)):
        name = f"{family}_{index}"
        progress(f"fusing {name}")
        region: Region = found.region
        at = {tensor.name: values[0][tensor.name] for tensor in (region.x, *region.outside)}
        request = Request(
            name=name,
            opset=graph.opset,
            static=is_static(graph),
            fixed_size=has_fixed_size(graph),
            values=at,
            compute=lambda outputs, feeds: evaluate(graph, outputs, feeds),
            conv_branch=branch,
        )
        try:
            reduced: Reduced = kit.reduce(found, request)
            relative_l2 = _compare(graph, region, reduced, values, kit.TOLERANCES, [*functions, *missing])
        except NoMatch as error:
            blocks.append(FusedBlock(name=anchor.name, family=family, fused=False, reason=error.reason))
            continue
        _splice(graph, reduced.graph, region.y)
        if reduced.smallest > 1:
            needs.append(Need(region.x.name, reduced.height_axis, reduced.smallest))
        used |= {node.op for node in reduced.graph.nodes if node.op in bodies}
        blocks.append(
            FusedBlock(
                name=name,
                family=family,
                fused=True,
                operator=reduced.operator,
                settings=dict(reduced.settings),
                relative_l2=relative_l2,
            )
        )
    return blocks, [bodies[op] for op in sorted(used)], needs


def _first_free(graph: gs.Graph, family: str) -> int:
    """The first index that no block has in a file that was fused before."""
    taken = (re.match(rf"{family}_(\d+)\.", node.name) for node in graph.nodes)
    return max((int(found[1]) + 1 for found in taken if found), default=0)


def _compare(
    graph: gs.Graph,
    region: Region,
    reduced: Reduced,
    values: list[Feeds],
    tolerances: Mapping[str, Tolerance],
    functions: list[onnx.FunctionProto],
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
    for at in values:
        feeds = inputs(at[region.x.name].shape, at)
        (original,) = evaluate(graph, [region.y], feeds)
        worst = max(worst, error(original, reduced_form(feeds)))
    first, last = values[0], values[-1]
    same = all(np.array_equal(first[tensor.name], last[tensor.name]) for tensor in region.outside)
    free = free_sides(graph)
    if len(values) > 1 and any(free) and same:  # else the block is of the sizes that were tried
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
    y.inputs.clear()
    last.outputs = [y]
    graph.nodes.extend(replacement.nodes)


def _export(
    graph: gs.Graph, original: onnx.ModelProto, functions: list[tuple[Operator, onnx.FunctionProto]]
) -> onnx.ModelProto:
    """The graph as a model, with what graphsurgeon does not carry: functions, metadata, the IR version."""
    graph.cleanup().toposort()
    model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = original.ir_version
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    del model.functions[:]
    model.functions.extend(original.functions)
    present = {(body.domain, body.name) for body in original.functions}
    model.functions.extend(body for _, body in functions if (body.domain, body.name) not in present)
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)
    for operator, _ in functions:
        if all(entry.domain != operator.domain for entry in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(operator.domain, operator.version))
    onnx.checker.check_model(model)
    return model
