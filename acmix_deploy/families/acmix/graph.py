"""ACmix blocks in an ONNX graph: find them, measure their weights, and write them in their reduced form.

A block is looked for from its Softmax outwards: attention within a window of x (``families/local_window.py``), with
something else of x added to its result. What that computes is measured. A graph that computes anything but a block
leaves a residual and is not taken for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.acmix.branch import Branch, measure
from acmix_deploy.families.attention import check_linear
from acmix_deploy.families.conv_branch import ConvBranch, by_head_dim
from acmix_deploy.families.family import Family
from acmix_deploy.families.local_window import Found, Window, find, way_to_result
from acmix_deploy.families.local_window import measure as measure_window
from acmix_deploy.families.reduction import Reduced, Request, Writer
from acmix_deploy.graph import Array, NoMatch, Reached, Region, producer, reads, region_between
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.local_attention.body import function_body

_LONGEST_BRANCH = 256  # tensors from what is added to the attention up to x; exporters need 30 to 100


@dataclass(frozen=True)
class Match:
    """One block in a graph."""

    region: Region
    attention: Found


def match(graph: gs.Graph, softmax: gs.Node) -> Match:
    """The block around a Softmax node, by structure alone: it ends where nothing inside is read outside.

    Raises:
        NoMatch: saying what is missing.
    """
    found = find(graph, softmax)
    refusal = NoMatch("its result is not added to that of a convolution", Reached.KIND)
    way = way_to_result(graph, found)
    known = {id(producer(part.result)) for part in found.projections} | {id(node) for _, node in way}
    convolved = False
    for tensor, node in way:
        if node.op != "Add":
            continue
        convolved = convolved or _convolves(node.inputs[node.inputs[0] is tensor], found.x, known)
        if not convolved:
            continue
        try:
            return Match(region_between(graph, found.x, node.outputs[0]), found)
        except NoMatch as error:
            refusal = max(refusal, error, key=lambda reason: reason.reached)
    raise refusal


def reduce(found: Match, request: Request, conv_branch: ConvBranch = "dense") -> Reduced:
    """The block in its reduced form. Raises NoMatch where it computes something else than ACmix."""
    check_linear(found.region.nodes, [found.region.x.name])
    window = measure_window(found.attention, found.region.y, request.values, request.compute)
    if window.border is not None or window.dilation > 1 or window.bias.any() or window.layout != "BCHW":
        around = "reflected" if window.border is None else window.border.name.lower()
        biases = "with" if window.bias.any() else "without"
        raise NoMatch(
            f"its attention has a border that is {around}, dilation {window.dilation}, {biases} biases; ACmix's is "
            "reflected, 1, without"
        )
    branch = measure(window, found.region.y)
    if branch.grouped is None or (branch.kept.any() and window.stride != 1):
        conv_branch = "dense"
    if not branch.dense.weight.any():
        raise NoMatch("no convolution is added to its result", Reached.KIND)
    dtype = found.attention.projections[0].weight.dtype
    map_size = request.values[found.region.x.name].shape[2:] if request.static else None
    writer = Writer(found.region.x, request.name, request.opset, dtype)
    graph = rewrite(writer, window, branch, conv_branch, map_size)
    (attention,) = (node for node in graph.nodes if node.domain == LOCAL_ATTENTION.domain)
    smallest = -(-(window.kernel_size // 2 + 1) // window.stride) * window.stride
    return Reduced(graph, attention.op, {**attention.attrs, "conv_branch": conv_branch}, smallest)


def rewrite(
    write: Writer, window: Window, branch: Branch, conv_branch: ConvBranch, map_size: tuple[int, int] | None
) -> gs.Graph:
    """The block in its reduced form, as a graph of its own from x to one output.

    Args:
        write: for the block's x.
        window: its attention.
        branch: what is added to it.
        conv_branch: "dense", one 3x3 convolution of x, or "grouped", one of qkv.
        map_size: H and W of x where they are fixed.
    """
    heads, head_dim = window.channels.shape[1:]
    grouped = branch.grouped if conv_branch == "grouped" else None
    weight, bias = window.qkv(gain=not grouped)
    strided: dict[str, Any] = {"pads": [1] * 4, "strides": [window.stride] * 2}
    qkv = write.conv("qkv", write.x, weight[:, :, None, None], bias)
    attended = write.operator(
        LOCAL_ATTENTION,
        "attention",
        qkv,
        write.constant("position_weight", window.position_weight),
        num_heads=heads,
        kernel_size=window.kernel_size,
        stride=window.stride,
        scale=window.scale,
    )
    if grouped:
        attended = _scaled(write, "rate1", attended, window.gain)
        order = write.constant("by_head_dim.order", by_head_dim(len(weight), head_dim))
        source: gs.Tensor = write.add("Gather", "by_head_dim", qkv, order, axis=1)
    else:
        source = write.x
    kernel, bias, border = grouped or branch.dense
    convolved = write.conv("convolution", source, kernel, bias, group=head_dim if grouped else 1, **strided)
    if border.any():
        biases = write.conv("biases", write.ones(map_size), border, **strided)
        convolved = write.add("Add", "convolution_with_biases", convolved, biases)
    if grouped and branch.kept.any():
        convolved = write.add("Add", "with_x", convolved, _scaled(write, "kept", write.x, branch.kept))
    # In this order: OpenVINO 2026.4.1 adds something else to an attention that comes first, where sizes are fixed.
    write.graph.outputs = [write.add("Add", "y", convolved, attended)]
    return write.graph


def _scaled(write: Writer, label: str, tensor: gs.Variable, factors: Array) -> gs.Variable:
    """``tensor`` [B, C, H, W] times ``factors`` [C]."""
    alike = np.ptp(factors) < 1e-6 * np.abs(factors).max()
    if alike and abs(factors.mean() - 1) < 1e-6:
        return tensor
    factor = factors.mean() if alike else factors[:, None, None]
    return write.add("Mul", label, tensor, write.constant(f"{label}.value", np.asarray(factor)))


def _convolves(tensor: gs.Tensor, x: gs.Variable, known: set[int]) -> bool:
    """Whether a tensor is computed from ``x``, by a few nodes with a convolution that is none of ``known``."""
    ways, seen, found = [tensor] if tensor is not x else [], {tensor.name}, False
    while ways and len(seen) < _LONGEST_BRANCH:
        node = producer(ways.pop(0))
        if node is None or node.op == "Shape":
            continue
        found = found or (node.op == "Conv" and id(node) not in known)
        read = [one for one in reads(node) if one.name not in seen]
        seen.update(one.name for one in read)
        ways += (one for one in read if one is not x)
    return found and x.name in seen


ACMIX = Family(
    name="acmix",
    anchors=("Softmax",),
    match=match,
    reduce=reduce,
    reduce_grouped=partial(reduce, conv_branch="grouped"),
    operators=((LOCAL_ATTENTION, function_body),),
    tolerances=LOCAL_ATTENTION.tolerances,
)
