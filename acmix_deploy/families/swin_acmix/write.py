"""A Swin ACmix block in its reduced form, as nodes.

    x -- MatMul -- 8-axis Transpose -- q, k, v -- MatMul / Add / Softmax / MatMul -- Transpose -- MatMul --+
    x -- Transpose -- Conv 3x3 -- Transpose ------------------------------------------------------------- (+) -- y

One Transpose takes qkv to windows and heads, and one takes the result back. Where windows are masked they stand beside
the heads, so that what is added to the logits has a batch axis of 1: [B, windows * N, S, d].
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.attention import AttentionWriter, Size
from acmix_deploy.families.conv_branch import ConvBranch, by_head_dim
from acmix_deploy.families.reduction import Request
from acmix_deploy.families.swin_acmix.algebra import SwinAcmixWeights, dense_conv, grouped_conv, scaled_qkv
from acmix_deploy.graph import Array


class Mask(NamedTuple):
    """What is added to the logits of free image sizes, in parts."""

    mask: gs.Variable
    """[windows, S, S], in whatever shape, as the graph computes it."""
    bias: Array
    """[1, N, S, S]."""


def write(
    x: gs.Variable,
    weights: SwinAcmixWeights,
    mask: Mask | None,
    dtype: np.dtype[np.generic],
    request: Request,
    conv_branch: ConvBranch,
) -> gs.Graph:
    """The block from x [B, H, W, C] to one output of that shape.

    Args:
        x: input of the block.
        weights: what it computes.
        mask: where windows are masked and the image size is free.
        dtype: element type.
        request: how it is to be written.
        conv_branch: form of the convolution branch.
    """
    out = AttentionWriter(x, request.name, request.opset, dtype)
    dim, heads, head_dim, side = weights.dim, weights.num_heads, weights.head_dim, weights.window_size
    batch: Size = -1
    height: Size
    width: Size
    _, height, width, _ = request.values[x.name].shape
    map_size = (height, width) if request.fixed_size else None
    if not request.fixed_size:
        batch, height, width = (out.size(axis, place, place + 1) for place, axis in enumerate("BHW"))
    rows, columns = out.arithmetic("Div", "rows", height, side), out.arithmetic("Div", "columns", width, side)

    def transpose(label: str, tensor: gs.Tensor, *order: int) -> gs.Variable:
        return out.add("Transpose", label, tensor, perm=list(order))

    qkv = out.linear("qkv", x, *scaled_qkv(weights))
    if conv_branch == "dense":
        conv, source, group = dense_conv(weights), transpose("channels_first", x, 0, 3, 1, 2), 1
    else:
        order = out.constant("by_head_dim.order", by_head_dim(3 * dim, head_dim))
        source = out.add("Gather", "by_head_dim", transpose("channels_first", qkv, 0, 3, 1, 2), order, axis=1)
        conv, group = grouped_conv(weights), head_dim
    convolved = out.conv("convolution", source, conv.weight, conv.bias, pads=[1] * 4, group=group)
    if conv.border.any():
        biases = out.conv("biases", out.ones(map_size, height_axis=1), conv.border, pads=[1] * 4)
        convolved = out.add("Add", "convolution_with_biases", convolved, biases)

    cut = out.reshape("cut", qkv, batch, rows, side, columns, side, 3, heads, head_dim)
    by_window = transpose("by_window", cut, 5, 0, 1, 3, 6, 2, 4, 7)
    several = (len(weights.added) * heads if request.fixed_size else -1) if weights.masked else heads
    parts = out.reshape("parts", by_window, 3, batch if weights.masked else -1, several, side**2, head_dim)
    q, k, v = (
        out.add("Gather", name, parts, out.constant(f"{name}.index", np.array(index)), axis=0)
        for index, name in enumerate("qkv")
    )
    if mask is None:
        added: gs.Tensor = out.constant("added", weights.added.reshape(1, -1, side**2, side**2))
    else:
        each = out.reshape("mask", mask.mask, -1, 1, side**2, side**2)
        every = out.add("Add", "mask_and_bias", each, out.constant("bias", mask.bias))
        added = out.reshape("added", every, 1, -1, side**2, side**2)
    logits = out.add("Add", "logits", out.add("MatMul", "products", q, transpose("keys", k, 0, 1, 3, 2)), added)
    attended = out.add("MatMul", "attended", out.add("Softmax", "softmax", logits, axis=-1), v)
    apart = out.reshape("apart", attended, batch, rows, columns, heads, side, side, head_dim)
    joined = out.reshape("joined", transpose("by_row", apart, 0, 1, 4, 2, 5, 3, 6), batch, height, width, dim)
    projected = out.linear("proj", joined, weights.rate1 * weights.proj_weight, weights.rate1 * weights.proj_bias)
    out.graph.outputs = [out.add("Add", "y", projected, transpose("channels_last", convolved, 0, 2, 3, 1))]
    return out.graph
