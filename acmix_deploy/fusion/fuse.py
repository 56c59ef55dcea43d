"""Plain ONNX to fused ONNX: every block of every family becomes its reduced form, or stays and says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.artifacts import replacing
from acmix_deploy.errors import CheckFailed
from acmix_deploy.families import FAMILIES, part
from acmix_deploy.fusion.prepare import load
from acmix_deploy.fusion.sizes import values_at_sizes
from acmix_deploy.graph import Array, Feeds, NoMatch, count_nodes, evaluate
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.runtime.metrics import deviation

ConvBranchChoice = Literal["auto", "dense", "grouped"]

AUTO_BRANCH: Literal["dense", "grouped"] = "dense"
"""What "auto" means. On a GPU the dense form was 1.5 to 2.8 times faster (docs/benchmarks.md); ONNX Runtime's CPU
prefers the grouped one from about 128 channels, but the file is made for the target."""


class FusedBlock(BaseModel):
    """What became of one block, or of a Softmax that came close to being one."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="prefix of the new nodes, or the anchor node of a block left alone")
    family: str
    fused: bool
    reason: str = Field(default="", description="why it was left alone")
    operator: str = ""
    settings: dict[str, Any] = Field(default_factory=dict, description="the operator's attributes, and conv_branch")
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
        source: ONNX file of opset 13 to 21, float32 or float16, from any exporter.
        target: where the fused file goes.
        conv_branch: form of the convolution branch.
        expect: the number of blocks that must fuse.
        progress: told what is being done.

    Raises:
        UserError: the file cannot be used.
        CheckFailed: another number of blocks than ``expect`` fused; nothing is written then.
    """
    model = load(source)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    graph = gs.import_onnx(model)
    nodes_before = count_nodes(model)
    branch = AUTO_BRANCH if conv_branch == "auto" else conv_branch

    blocks: list[FusedBlock] = []
    functions: dict[str, onnx.FunctionProto] = {}
    for family in FAMILIES:
        kit = part(family, "graph")
        bodies = {name: body(opset) for name, body in kit.FUNCTIONS.items()}
        matches = []
        for anchor in [node for node in graph.nodes if node.op == kit.ANCHOR]:
            try:
                matches.append((anchor, kit.match(graph, anchor)))
            except NoMatch as error:
                if error.near:
                    blocks.append(FusedBlock(name=anchor.name, family=family, fused=False, reason=error.reason))
        if not matches:
            continue
        progress(f"evaluating the graph around {len(matches)} candidate blocks")
        regions = [found.region for _, found in matches]
        values = values_at_sizes(graph, [tensor for region in regions for tensor in (region.x, *region.outside)])
        for index, (anchor, found) in enumerate(matches):
            name = f"{family}_{index}"
            progress(f"fusing {name}")
            try:
                replacement, settings, error_found = _replace(
                    graph, kit, found, values, branch, name, opset, list(bodies.values())
                )
            except NoMatch as error:
                blocks.append(FusedBlock(name=anchor.name, family=family, fused=False, reason=error.reason))
                continue
            _splice(graph, replacement, found.region.y)
            used = {node.op for node in replacement.nodes}
            functions.update({op: body for op, body in bodies.items() if op in used})
            blocks.append(
                FusedBlock(
                    name=name,
                    family=family,
                    fused=True,
                    operator=next(op for op in bodies if op in used),
                    settings={**settings, "conv_branch": branch},
                    relative_l2=error_found,
                )
            )

    fused = _export(graph, model, functions)
    report = FusionReport(blocks=blocks, nodes_before=nodes_before, nodes_after=count_nodes(fused), opset=opset)
    if expect is not None and report.fused != expect:
        found_text = "; ".join(f"{block.name}: {block.reason}" for block in blocks if not block.fused)
        raise CheckFailed(
            f"{report.fused} blocks fused in {source}, expected {expect}",
            f"Left alone: {found_text}" if found_text else "Nothing else in the graph resembles a block.",
        )
    with replacing(target) as temporary:
        onnx.save(fused, temporary)
    return report


def _replace(
    graph: gs.Graph,
    kit: Any,
    found: Any,
    values: list[Feeds],
    branch: str,
    name: str,
    opset: int,
    bodies: list[onnx.FunctionProto],
) -> tuple[gs.Graph, dict[str, Any], float]:
    """The replacement of one matched block, its attributes, and its relative L2 error, which is within tolerance."""
    region = found.region
    seen = [{tensor.name: at[tensor.name] for tensor in (region.x, *region.outside)} for at in values]

    def compute(outputs: list[gs.Variable], feeds: Feeds) -> list[Array]:
        return evaluate(graph, outputs, feeds)

    weights = kit.recover(found, seen[0], compute)
    sizes = {at[region.x.name].shape[2:] for at in seen}
    static = len(values) == 1
    replacement = kit.rewrite(found, weights, branch, name, opset, next(iter(sizes)) if static else None)

    dtype = str(replacement.outputs[0].dtype)
    limit = LOCAL_ATTENTION.tolerances[dtype].floor
    random = np.random.default_rng(1)
    worst = 0.0
    for at in seen:
        feeds = {**at, region.x.name: random.standard_normal(at[region.x.name].shape).astype(np.float32)}
        (original,) = compute([region.y], feeds)
        (candidate,) = evaluate(replacement, replacement.outputs, feeds, bodies)
        difference = deviation(original, candidate)
        if difference.problem or difference.relative_l2 is None or not difference.relative_l2 <= limit:
            found_text = difference.problem or f"relative L2 {difference.relative_l2:.1e}, limit {limit:.0e}"
            raise NoMatch(f"the block computes something else than its fused form ({found_text})")
        worst = max(worst, difference.relative_l2)
    settings = next(dict(node.attrs) for node in replacement.nodes if node.domain == LOCAL_ATTENTION.domain)
    return replacement, settings, worst


def _splice(graph: gs.Graph, replacement: gs.Graph, y: gs.Variable) -> None:
    """Put the nodes of ``replacement`` in the place of those that computed ``y``, which fall away on clean-up."""
    (result,) = replacement.outputs
    last = result.inputs[0]
    y.inputs.clear()
    last.outputs = [y]
    graph.nodes.extend(replacement.nodes)


def _export(graph: gs.Graph, original: onnx.ModelProto, functions: dict[str, onnx.FunctionProto]) -> onnx.ModelProto:
    """The graph as a model, with what graphsurgeon does not carry: functions, metadata, the IR version."""
    graph.cleanup().toposort()
    model: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    model.ir_version = original.ir_version
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)
    for body in functions.values():
        model.functions.append(body)
        if all(entry.domain != body.domain for entry in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(body.domain, LOCAL_ATTENTION.version))
    onnx.checker.check_model(model)
    return model
