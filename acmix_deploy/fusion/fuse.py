"""Plain ONNX to fused ONNX: every block of every family becomes its reduced form, or stays and says why."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.artifacts import Made, check_output, replacing, write_artifact
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.families import FAMILIES, part
from acmix_deploy.families.reduction import ConvBranch, Reduced, Request, anchors
from acmix_deploy.fusion.prepare import load
from acmix_deploy.fusion.sizes import (
    Need,
    Patience,
    Source,
    free_sides,
    smallest_image,
    sources,
    sources_of,
    values_at_sizes,
)
from acmix_deploy.graph import Array, Feeds, NoMatch, Reached, Region, count_nodes, evaluate, names_read
from acmix_deploy.operators.spec import Operator, Tolerance
from acmix_deploy.options import ConvBranchChoice
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session

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
    inlined: list[str] = Field(default=[], description="local functions that their calls were replaced by")
    unknown: dict[str, list[str]] = Field(
        default={},
        description="operators that ONNX Runtime does not know, with their nodes; blocks behind these were proven on "
        "random numbers for their results",
    )
    unproven: str = Field(
        default="",
        description="why ONNX Runtime refuses the fused file, where it refuses the source too: as a whole the file is "
        "not proven to run, each block is proven by itself",
    )

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
) -> Made[FusionReport]:
    """Fuse the blocks of an ONNX file and write the result.

    A block is rewritten only after original and replacement agreed on random input, at two sizes where the axes are
    dynamic. A file with nothing to fuse is written too, unchanged in meaning. ONNX Runtime loads what is written,
    unless it does not load the source either, as for an operator that it does not know; the report says so then.

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
    check_output(target, source)
    model, inlined = load(source)
    graph = gs.import_onnx(model)
    before = list(graph.nodes)
    inputs = sources(graph, model.functions)
    branch: ConvBranch = AUTO_BRANCH if conv_branch == "auto" else conv_branch

    blocks: list[FusedBlock] = []
    left_alone: dict[str, tuple[Reached, FusedBlock]] = {}
    functions: list[tuple[Operator, onnx.FunctionProto]] = []
    needs: list[Need] = []
    patience = Patience()
    for family in FAMILIES:
        known = [*model.functions, *(body for _, body in functions)]
        found, left, used, needed = _fuse_family(graph, family, branch, known, inputs, patience, progress)
        blocks += found.values()
        needs += needed
        functions += [(operator, body) for operator, body in used if all(operator != other for other, _ in functions)]
        for anchor in found:
            left_alone.pop(anchor, None)
        for anchor, (reached, block) in left.items():
            if anchor not in left_alone or reached > left_alone[anchor][0]:
                left_alone[anchor] = (reached, block)
    blocks += (block for _, block in left_alone.values())

    fused = _export(graph, before, model, functions)
    report = FusionReport(
        blocks=blocks,
        nodes_before=count_nodes(model),
        nodes_after=count_nodes(fused),
        opset=graph.opset,
        inlined=inlined,
        unknown=_by_operator(inputs),
    )
    if expect is not None and report.fused != expect:
        reasons = "; ".join(f"{block.name}: {block.reason}" for block in blocks if not block.fused)
        raise CheckFailed(
            f"{report.fused} blocks fused in {source}, expected {expect}",
            f"Left alone: {reasons}" if reasons else "Nothing else in the graph resembles a block.",
        )
    if needs and not all(source.has_fixed_size for source in inputs):
        progress("finding the smallest image")
        try:
            _note_smallest_image(fused, needs)
        except UserError as error:
            if not report.unknown:  # else nothing can be run that is in front of a block
                raise CheckFailed(f"the fused file cannot be used: {error.message}") from error
    progress("loading the fused file")
    report = report.model_copy(update={"unproven": _refusal(fused, model, source, inputs)})
    with replacing(target) as temporary:
        onnx.save(fused, temporary)
    settings = {"conv_branch": conv_branch}
    return Made(write_artifact(target, "fused", parents=[source], settings=settings), report)


def _note_smallest_image(model: onnx.ModelProto, needs: list[Need]) -> None:
    """Write into the metadata for which images all fused blocks are defined, those of an earlier run among them."""
    metadata = ModelMetadata.of(model)
    found = smallest_image(model, needs, metadata.stride)
    smallest = [max(pair) for pair in zip(found, metadata.min_size, strict=True)]
    if smallest != [1, 1]:
        onnx.helper.set_model_props(model, metadata.updated(min_size=smallest).entries)


def _fuse_family(
    graph: gs.Graph,
    family: str,
    branch: ConvBranch,
    functions: list[onnx.FunctionProto],
    inputs: list[Source],
    patience: Patience,
    progress: Callable[[str], None],
) -> tuple[
    dict[str, FusedBlock],
    dict[str, tuple[Reached, FusedBlock]],
    list[tuple[Operator, onnx.FunctionProto]],
    list[Need],
]:
    """Fuse the blocks of one family in ``graph``, in place.

    ``functions`` are the definitions of the custom operators that are in the graph, ``inputs`` what values come from.

    Returns:
        By the name of their anchor, blocks that are fused, and those that are not with how far they came; and the
        operators that came in, with their bodies; and what the blocks need of their maps.
    """
    kit: Any = part(family, "graph")
    fused: dict[str, FusedBlock] = {}
    left: dict[str, tuple[Reached, FusedBlock]] = {}
    matches = []

    def leave(anchor: gs.Node, error: NoMatch, least: Reached = Reached.NOTHING) -> None:
        if reached := max(error.reached, least):
            left[anchor.name] = reached, FusedBlock(name=anchor.name, family=family, fused=False, reason=error.reason)

    for anchor in anchors(graph, kit.ANCHOR):
        try:
            matches.append((anchor, kit.match(graph, anchor)))
        except NoMatch as error:
            leave(anchor, error)
    if not matches:
        return fused, left, [], []

    progress(f"evaluating the graph around {len(matches)} candidate blocks")
    seen = _values(graph, [found.region for _, found in matches], functions, inputs, patience)
    bodies = {operator.op_type: (operator, body(graph.opset)) for operator, body in kit.OPERATORS}
    present = {(body.domain, body.name) for body in functions}
    missing = [body for _, body in bodies.values() if (body.domain, body.name) not in present]
    used: set[str] = set()
    needs: list[Need] = []
    for index, ((anchor, found), block) in enumerate(zip(matches, seen, strict=True), _first_free(graph, family)):
        if isinstance(block, NoMatch):
            leave(anchor, block, Reached.WHOLE)
            continue
        name = f"{family}_{index}"
        progress(f"fusing {name}")
        region: Region = found.region
        at = {tensor.name: block.values[0][tensor.name] for tensor in (region.x, *region.outside)}
        request = Request(
            name=name,
            opset=graph.opset,
            static=all(source.is_static for source in block.inputs),
            fixed_size=all(source.has_fixed_size for source in block.inputs),
            values=at,
            compute=lambda outputs, feeds: evaluate(graph, outputs, feeds),
            conv_branch=branch,
        )
        reached = Reached.WHOLE
        try:
            reduced: Reduced = kit.reduce(found, request)
            reached = Reached.REDUCED
            free, known = free_sides(block.inputs), [*functions, *missing]
            relative_l2 = _compare(graph, region, reduced, block.values, free, kit.TOLERANCES, known)
        except NoMatch as error:
            leave(anchor, error, reached)
            continue
        _splice(graph, reduced.graph, region.y)
        if reduced.smallest > 1:
            needs.append(Need(region.x.name, reduced.height_axis, reduced.smallest))
        used |= {node.op for node in reduced.graph.nodes if node.op in bodies}
        fused[anchor.name] = FusedBlock(
            name=name,
            family=family,
            fused=True,
            operator=reduced.operator,
            settings=dict(reduced.settings),
            relative_l2=relative_l2,
        )
    if fused:
        graph.cleanup()  # what fell away is no anchor of another family
    return fused, left, [bodies[op] for op in sorted(used)], needs


class _Seen(NamedTuple):
    """What a block sees when the graph is run."""

    values: list[Feeds]
    """Of its x and of the tensors outside it, by name, at one or two sizes."""
    inputs: list[Source]
    """What they come from."""


def _values(
    graph: gs.Graph,
    regions: list[Region],
    functions: list[onnx.FunctionProto],
    inputs: list[Source],
    patience: Patience,
) -> list[_Seen | NoMatch]:
    """What each block sees, or why that cannot be told: found for all at once, or where that fails for each alone."""
    read = sources_of([tensor for region in regions for tensor in (region.x, region.y, *region.outside)], inputs)
    try:
        return [_Seen(values_at_sizes(graph, regions, functions, read, patience), read)] * len(regions)
    except NoMatch as error:
        if len(regions) == 1:
            return [error]
    return [one for region in regions for one in _values(graph, [region], functions, inputs, patience)]


def _first_free(graph: gs.Graph, family: str) -> int:
    """The first index that no block has in a file that was fused before."""
    taken = (re.match(rf"{family}_(\d+)\.", node.name) for node in graph.nodes)
    return max((int(found[1]) + 1 for found in taken if found), default=0)


def _compare(
    graph: gs.Graph,
    region: Region,
    reduced: Reduced,
    values: list[Feeds],
    free: tuple[bool, bool],
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
    place = next(index for index, node in enumerate(graph.nodes) if node is y.inputs[0])
    y.inputs.clear()
    last.outputs = [y]
    graph.nodes[place:place] = replacement.nodes


def _export(
    graph: gs.Graph,
    before: list[gs.Node],
    original: onnx.ModelProto,
    functions: list[tuple[Operator, onnx.FunctionProto]],
) -> onnx.ModelProto:
    """``original`` with the nodes of ``graph``, and nothing else of it changed.

    graphsurgeon would lose much: local functions, metadata and documentation of the model, its graph and its nodes,
    notes on quantization and on training, names of inner graphs. So it only tells which nodes go and come.

    Args:
        graph: as it is now.
        before: its nodes as they were, those of ``original`` in order.
        original: the model that ``graph`` was.
        functions: operators that came in, with their bodies.
    """
    graph.cleanup()
    index = {id(node): place for place, node in enumerate(before)}
    come = gs.Graph([node for node in graph.nodes if id(node) not in index], opset=graph.opset)
    written = gs.export_onnx(come, do_type_check=False).graph
    new = iter(written.node)
    nodes = [original.graph.node[index[id(node)]] if id(node) in index else next(new) for node in graph.nodes]
    stay = {index[id(node)] for node in graph.nodes if id(node) in index}
    gone = [node for place, node in enumerate(original.graph.node) if place not in stay]
    used = {value.name for value in original.graph.output}
    used.update(name for node in nodes for name in (*names_read(node), *node.output))
    lost = {name for node in gone for name in (*names_read(node), *node.output)} - used

    model = onnx.ModelProto()
    model.CopyFrom(original)
    target = model.graph
    stored = {tensor.name for tensor in target.initializer}
    _keep(target.input, [value for value in target.input if value.name not in lost & stored])
    _keep(target.initializer, [tensor for tensor in target.initializer if tensor.name not in lost])
    _keep(target.sparse_initializer, [tensor for tensor in target.sparse_initializer if tensor.values.name not in lost])
    _keep(target.value_info, [value for value in target.value_info if value.name not in lost])
    _keep(
        target.quantization_annotation,
        [note for note in target.quantization_annotation if note.tensor_name not in lost],
    )
    _keep(target.node, nodes)
    target.initializer.extend(written.initializer)
    told = {value.name for value in (*target.value_info, *target.output)}
    made = {name for node in written.node for name in node.output} - told
    target.value_info.extend(value for value in written.value_info if value.name in made)
    present = {(body.domain, body.name) for body in original.functions}
    model.functions.extend(body for _, body in functions if (body.domain, body.name) not in present)
    for operator, _ in functions:
        if all(entry.domain != operator.domain for entry in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(operator.domain, operator.version))
    onnx.checker.check_model(model)
    return model


def _keep(entries: Any, kept: list[Any]) -> None:
    """Leave only ``kept`` in a repeated field."""
    del entries[:]
    entries.extend(kept)


def _by_operator(inputs: list[Source]) -> dict[str, list[str]]:
    """Names of the nodes that ONNX Runtime does not know, by their operator."""
    found: dict[str, list[str]] = {}
    for source in inputs:
        if source.operator and (name := source.tensor.inputs[0].name) not in found.setdefault(source.operator, []):
            found[source.operator].append(name)
    return found


def _refusal(fused: onnx.ModelProto, model: onnx.ModelProto, source: Path, inputs: list[Source]) -> str:
    """Why ONNX Runtime refuses a fused file whose source it refuses too; nothing where it loads it.

    Where that is for operators that it does not know, what is left without them has to load as it did before.

    Raises:
        CheckFailed: it loaded what it now refuses.
    """
    refused = _loading(fused)
    if not refused:
        return ""
    rest = [_without_unknown(one, inputs) for one in (fused, model)]
    for after, before in ((refused, _loading(model)), (refused, _loading(source)), [*map(_loading, rest)]):
        if after and not before:
            raise CheckFailed(f"the fused file cannot be used: {after}")
    return refused


def _loading(model: onnx.ModelProto | Path) -> str:
    """Why ONNX Runtime does not load a model; nothing where it does."""
    try:
        open_session(model, once=True)
    except UserError as error:
        return error.message
    return ""


def _without_unknown(model: onnx.ModelProto, inputs: list[Source]) -> onnx.ModelProto:
    """The model with inputs in the place of nodes that ONNX Runtime does not know."""
    unknown = {source.tensor.name: source for source in inputs if source.operator}
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    _keep(rest.graph.node, [node for node in rest.graph.node if not unknown.keys() & set(node.output)])
    _keep(rest.graph.output, [value for value in rest.graph.output if value.name not in unknown])
    _keep(rest.graph.value_info, [value for value in rest.graph.value_info if value.name not in unknown])
    for name, source in unknown.items():
        dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(source.tensor.dtype or np.float32))
        rest.graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, source.shape))
    return rest
