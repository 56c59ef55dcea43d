"""Local attention in an ONNX graph: find it, measure it, and write it as one convolution and one operator.

A block begins where its projections read one map and ends where its result has been moved into place: what projects the
result, or adds to it, stays as it is. What it computes is measured (``families/local_window.py``). No PyTorch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.attention import AttentionWriter, check_linear
from acmix_deploy.families.family import Family
from acmix_deploy.families.local_window import Found, Window, find, measure, way_to_result
from acmix_deploy.families.reduction import Reduced, Request
from acmix_deploy.graph import RESHAPING, NoMatch, Region, region_between
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION as LOCAL
from acmix_deploy.operators.local_attention import body as local_body
from acmix_deploy.operators.neighborhood_attention import NEIGHBORHOOD_ATTENTION as NEIGHBORHOOD
from acmix_deploy.operators.neighborhood_attention import Border
from acmix_deploy.operators.neighborhood_attention import body as neighborhood_body

_SUMMING = RESHAPING | {"ReduceSum"}


@dataclass(frozen=True)
class Match:
    """One block in a graph."""

    region: Region
    attention: Found


def match(graph: gs.Graph, softmax: gs.Node) -> Match:
    """The block around a Softmax node, by structure alone. Raises NoMatch, saying what is missing."""
    found = find(graph, softmax)
    result = found.weighed[-1].outputs[0]
    for _, node in way_to_result(graph, found):
        if node.op not in _SUMMING:
            break
        result = node.outputs[0]
    return Match(region_between(graph, found.x, result), found)


def reduce(found: Match, request: Request) -> Reduced:
    """The block in its reduced form. Raises NoMatch where it computes something else than local attention."""
    check_linear(found.region.nodes, [found.region.x.name])
    window = measure(found.attention, found.region.y, request.values, request.compute)
    reflected = window.border is None
    if reflected and (window.dilation > 1 or window.bias.any()):
        raise NoMatch("its map is reflected, and its taps are apart or have biases")
    if not reflected and window.stride > 1:
        raise NoMatch(f"it looks at every {window.stride}-th pixel of a map that is not reflected")
    writer = AttentionWriter(found.region.x, request.name, request.opset, found.attention.projections[0].weight.dtype)
    _write(writer, found.attention, window)
    (attention,) = (node for node in writer.graph.nodes if node.domain)
    least = {None: window.kernel_size // 2 + 1, Border.SHIFTED: window.kernel_size * window.dilation}
    smallest = -(-least.get(window.border, 1) // window.stride) * window.stride
    return Reduced(writer.graph, attention.op, attention.attrs, smallest, 1 if found.attention.x_last else 2)


def _write(write: AttentionWriter, found: Found, window: Window) -> None:
    """The block as a graph of its own, from x to its result."""
    weight, bias = window.qkv(gain=True)
    x = write.add("Transpose", "planes", write.x, perm=[0, 3, 1, 2]) if found.x_last else write.x
    same = np.array_equal(weight, np.eye(len(weight))) and not bias.any()
    qkv = x if same else write.conv("qkv", x, weight[:, :, None, None], bias)
    operands = [qkv, write.constant("position_weight", window.position_weight)]
    attributes: dict[str, Any] = {
        "num_heads": len(window.q[0]),
        "kernel_size": window.kernel_size,
        "scale": window.scale,
    }
    if window.border is None:
        y = write.operator(LOCAL, "attention", *operands, **attributes, stride=window.stride)
    else:
        operands.append(write.constant("bias", window.bias))
        attributes |= {"dilation": window.dilation, "border": int(window.border)}
        y = write.operator(NEIGHBORHOOD, "attention", *operands, **attributes)
    if "P" in window.layout:
        y = write.reshape("tokens", y, 0, 0, -1)
    if window.layout in ("BHWC", "BPC"):
        y = write.add("Transpose", "y", y, perm=[0, 2, 3, 1] if window.layout == "BHWC" else [0, 2, 1])
    write.graph.outputs = [y]


LOCAL_ATTENTION = Family(
    name="local_attention",
    anchors=("Softmax",),
    match=match,
    reduce=reduce,
    operators=(
        (LOCAL, local_body.function_body),
        (NEIGHBORHOOD, neighborhood_body.function_body),
    ),
    tolerances=LOCAL.tolerances,
)
