"""Plain ONNX to fused ONNX: every block of every family becomes its reduced form, or stays and says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.artifacts import StageResult, check_output, replacing, write_artifact
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.families import FAMILIES
from acmix_deploy.families.conv_branch import ConvBranch
from acmix_deploy.fusion.loading import by_operator, note_smallest_image, refusal
from acmix_deploy.fusion.prepare import load
from acmix_deploy.fusion.quantized import quantization, without_pairs
from acmix_deploy.fusion.replace import FusedBlock, Fusion
from acmix_deploy.fusion.sizes import sources
from acmix_deploy.graph import count_nodes, rewrite, with_weights
from acmix_deploy.onnx_file import counted, fused_nodes
from acmix_deploy.options import ConvBranchChoice
from acmix_deploy.processing import attach, detach

AUTO_BRANCH: ConvBranch = "dense"
"""What "auto" means. In a prototype on a GPU the dense form was 1.5 to 2.8 times faster (docs/benchmarks.md); the CPU
prefers the grouped one from about 128 channels, but the file is made for the target."""


_PAIR = {"QuantizeLinear", "DequantizeLinear"}


class FusionReport(BaseModel):
    """Result of one run of :func:`fuse`."""

    model_config = ConfigDict(frozen=True)

    blocks: list[FusedBlock] = Field(description="blocks of the file, fused or left alone")
    nodes_before: int = Field(description="nodes of the graph before")
    nodes_after: int = Field(description="nodes of the graph after")
    opset: int = Field(description="of the file that was written")
    already: dict[str, int] = Field(
        default={},
        description="operators of this package that the file had before, as one that is fused has, and how often",
    )
    inlined: list[str] = Field(default=[], description="local functions that their calls were replaced by")
    unknown: dict[str, list[str]] = Field(
        default={},
        description="operators that ONNX Runtime does not know, with their nodes; blocks behind these were proven on "
        "random numbers for their results",
    )
    quantized: dict[str, int] = Field(
        default={}, description="operators that quantise or compute in integers, and how often the file has each"
    )
    hidden: int = Field(
        default=0, description="blocks that would be fused if the file were not quantised: Q/DQ nodes hide them"
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

    @property
    def why_hidden(self) -> str:
        """What to say of a file that was quantised too early; empty where it was not."""
        if self.hidden:
            hidden = f"hide {self.hidden} block{'s' * (self.hidden > 1)}"
        elif self.fused or self.already or not self.quantized.keys() - _PAIR:
            return ""
        else:
            hidden = "hide what blocks there may be"
        return (
            f"it was quantised before it was fused, and {counted(self.quantized)} {hidden}: fuse the float file, then "
            "quantise the fused one (acmix-deploy quantize)"
        )


def fuse(
    source: Path,
    target: Path,
    *,
    conv_branch: ConvBranchChoice = "auto",
    expect: int | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> StageResult[FusionReport]:
    """Fuse the blocks of an ONNX file and write the result.

    A block is rewritten only after original and replacement agreed on random input, at two sizes where the axes are
    dynamic. A file with nothing to fuse is written too, unchanged in meaning. ONNX Runtime loads what is written,
    unless it does not load the source either, as for an operator that it does not know; the report says so then.

    Args:
        source: ONNX file of opset 11 or above, float32 or float16, from any exporter; float64 becomes float32, and an
            opset below 17 or above 21 the nearest of these.
        target: where the fused file goes, another path than ``source``.
        conv_branch: form of the convolution branch.
        expect: the number of blocks that must fuse.
        progress: told what is being done.

    Returns:
        The file with its sidecar, and what became of each block.

    Raises:
        UserError: the file cannot be used.
        CheckFailed: another number of blocks than ``expect`` fused, or ONNX Runtime refuses the result; nothing is
            written then.
    """
    check_output(target, source)
    model, inlined = load(source)
    around = detach(model)
    graph = gs.import_onnx(model)
    before = list(graph.nodes)
    already = Counter(node.op_type for node in fused_nodes(model))
    branch: ConvBranch = AUTO_BRANCH if conv_branch == "auto" else conv_branch
    fusion = Fusion(graph, [*model.functions], sources(graph, model.functions), branch, progress)
    for family in FAMILIES:
        fusion.fuse(family)
    quantized = quantization(model)
    hidden = _hidden(model, branch, fusion, progress) if quantized else 0
    fused = _written(model, before, fusion)
    report = FusionReport(
        blocks=fusion.blocks,
        nodes_before=count_nodes(model),
        nodes_after=count_nodes(fused),
        opset=graph.opset,
        already=already,
        inlined=inlined,
        unknown=by_operator(fusion.inputs),
        quantized=quantized,
        hidden=hidden,
    )
    if expect is not None and report.fused != expect:
        reasons = "; ".join(f"{block.name}: {block.reason}" for block in report.blocks if not block.fused)
        raise CheckFailed(
            f"{report.fused} blocks fused in {source}, expected {expect}",
            f"{report.why_hidden[0].upper()}{report.why_hidden[1:]}."
            if report.why_hidden
            else f"Left alone: {reasons}"
            if reasons
            else f"It is fused already: it has {counted(already)}."
            if already
            else "Nothing else in the graph resembles a block.",
        )
    if fusion.needs and not all(source.has_fixed_size for source in fusion.inputs):
        progress("finding the smallest image")
        try:
            note_smallest_image(fused, fusion.needs)
        except UserError as error:
            if not report.unknown:  # else nothing can be run that is in front of a block
                raise CheckFailed(f"the fused file cannot be used: {error.message}") from error
    progress("loading the fused file")
    report = report.model_copy(update={"unproven": refusal(fused, model, source, fusion.inputs)})
    attach(fused, around)
    with replacing(target) as temporary:
        onnx.save(fused, temporary)
    settings = {"conv_branch": conv_branch}
    return StageResult(write_artifact(target, "fused", parents=with_weights(source), settings=settings), report)


def _hidden(model: onnx.ModelProto, branch: ConvBranch, found: Fusion, progress: Callable[[str], None]) -> int:
    """How many more blocks would be fused without Q/DQ pairs."""
    progress("looking for blocks behind Q/DQ nodes")
    graph = gs.import_onnx(without_pairs(model))
    plain = Fusion(graph, [*model.functions], sources(graph, model.functions), branch, progress)
    for family in FAMILIES:
        plain.fuse(family)
    return max(0, len(plain.fused) - len(found.fused))


def _written(model: onnx.ModelProto, before: list[gs.Node], fusion: Fusion) -> onnx.ModelProto:
    """``model``, whose nodes were ``before``, with those of ``fusion`` and the definitions that they need."""
    fused = rewrite(model, before, fusion.graph)
    fused.functions.extend(fusion.functions[len(model.functions) :])
    imported = {entry.domain for entry in model.opset_import}
    new = {operator.domain: operator.version for operator in fusion.operators if operator.domain not in imported}
    fused.opset_import.extend(onnx.helper.make_opsetid(*entry) for entry in new.items())
    onnx.checker.check_model(fused)
    return fused
