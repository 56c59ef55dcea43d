"""Swin's ACmix blocks in an ONNX graph: find them, and write them in their reduced form.

A block is looked for from its Softmax outwards. The window, the scale of the logits and what is added to them, position
bias and mask together, are measured on the graph, so that it does not matter how they were spelt or folded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from acmix_deploy.families.attention import MASKED, Linear, check_residual, fitted, linear
from acmix_deploy.families.conv_branch import ConvBranch, is_dep_conv, meeting
from acmix_deploy.families.family import Family
from acmix_deploy.families.reduction import Reduced, Request
from acmix_deploy.families.swin_acmix.algebra import SwinAcmixWeights
from acmix_deploy.families.swin_acmix.write import Mask, write
from acmix_deploy.graph import (
    RESHAPING,
    Array,
    NoMatch,
    Reached,
    Region,
    constant_value,
    conv_bias,
    conv_weight,
    nearest,
    producer,
    region_between,
)
from acmix_deploy.operators.spec import TOLERANCES

_HIDDEN = 50.0  # below the largest number added for a query: what is lost in float32 after exp


@dataclass(frozen=True)
class Match:
    """The parts of one block in a graph."""

    region: Region
    softmax: gs.Node
    qkv: Linear
    proj: Linear
    fc: gs.Node
    dep_conv: gs.Node
    rate1: float
    rate2: float


def match(graph: gs.Graph, softmax: gs.Node) -> Match:
    """The block around a Softmax node, by structure alone.

    Raises:
        NoMatch: saying what is missing.
    """
    met = meeting(graph, softmax)
    if met is None:
        reached = Reached.PARTS if _feeds_a_convolution(softmax) else Reached.NOTHING
        raise NoMatch("its result is not added to that of a convolution", reached)
    last, path, rate1, rate2, dep_conv = met
    fcs = nearest(dep_conv.inputs[0], "Conv", "MatMul")
    if len(fcs) != 1 or fcs[0].op != "Conv" or conv_weight(fcs[0]).shape[2:] != (1, 1):
        raise NoMatch("no 1x1 convolution is before the one that is added to it", Reached.NOTHING)
    (fc,) = fcs
    qkv = _linear_above(fc.inputs[0])
    if qkv is None:
        raise NoMatch(f"{fc.name} does not read a linear layer", Reached.NOTHING)

    if not is_dep_conv(dep_conv) or set(dep_conv.attrs.get("strides", [1])) > {1}:
        raise NoMatch(f"{dep_conv.name} is not a 3x3 convolution of 9 maps per group with padding 1")
    matmuls = [node for _, node in path if node.op == "MatMul"]
    if len(matmuls) != 2:
        raise NoMatch(
            f"between {softmax.name} and {last.name} are {len(matmuls)} matrix products, not those with v and of proj"
        )
    proj = linear(matmuls[1])
    if proj is None:
        raise NoMatch(f"the weight of {matmuls[1].name} is computed, not stored")
    region = region_between(graph, qkv.source, last.outputs[0])
    return Match(region, softmax, qkv, proj, fc, dep_conv, rate1, rate2)


def reduce(found: Match, request: Request, conv_branch: ConvBranch = "dense") -> Reduced:
    """The block in its reduced form. Raises NoMatch where it computes something else than Swin's ACmix."""
    weights = _recover(found, request)
    mask = _mask(found, weights, request) if weights.masked and not request.fixed_size else None
    graph = write(found.region.x, weights, mask, conv_weight(found.dep_conv).dtype, request, conv_branch)
    settings = {
        "num_heads": weights.num_heads,
        "window_size": weights.window_size,
        "scale": weights.scale,
        "masked": weights.masked,
        "conv_branch": conv_branch,
    }
    return Reduced(graph, "MatMul / Softmax / MatMul", settings, weights.window_size, height_axis=1)


def _feeds_a_convolution(softmax: gs.Node) -> bool:
    """Whether the linear layer that the logits come from is read by a convolution too."""
    products = nearest(softmax.inputs[0], "MatMul")
    layers = [layer for product in products for operand in product.inputs for layer in nearest(operand, "MatMul")]
    ways = [tensor for layer in layers for tensor in layer.outputs]
    while ways:
        for user in ways.pop().outputs:
            if user.op == "Conv":
                return True
            if user.op in RESHAPING or user.op == "Add":
                ways += user.outputs
    return False


def _linear_above(tensor: gs.Tensor) -> Linear | None:
    """The linear layer that a tensor was reshaped from."""
    while (node := producer(tensor)) is not None and node.op in RESHAPING:
        tensor = node.inputs[0]
    layers = [linear(matmul) for matmul in nearest(tensor, "MatMul")]
    return next((layer for layer in layers if layer is not None and layer.result is tensor), None)


def _recover(found: Match, request: Request) -> SwinAcmixWeights:
    """The weights of a matched block. Raises NoMatch where its shapes or its logits are not those of one."""
    dep_conv, fc = (conv_weight(conv).astype(np.float64) for conv in (found.dep_conv, found.fc))
    dim, head_dim = len(dep_conv), int(found.dep_conv.attrs.get("group", 1))
    heads = dim // head_dim
    qkv, proj = (layer.weight.astype(np.float64) for layer in (found.qkv, found.proj))
    if (len(qkv), fc.shape[:2], proj.shape) != (3 * dim, (9, 3 * heads), (dim, dim)):
        raise NoMatch(
            f"qkv {list(qkv.shape)}, fc {list(fc.shape)} and proj {list(proj.shape)} do not fit {heads} heads of "
            f"{head_dim} channels"
        )
    scale, window_size, added = _measure(found, request, heads, head_dim)
    return SwinAcmixWeights(
        qkv_weight=qkv,
        qkv_bias=found.qkv.bias.astype(np.float64),
        proj_weight=proj,
        proj_bias=found.proj.bias.astype(np.float64),
        fc_weight=fc[:, :, 0, 0],
        fc_bias=conv_bias(found.fc),
        dep_conv_weight=dep_conv,
        dep_conv_bias=conv_bias(found.dep_conv),
        rate1=found.rate1,
        rate2=found.rate2,
        num_heads=heads,
        window_size=window_size,
        scale=scale,
        added=added,
    )


def _measure(found: Match, request: Request, heads: int, head_dim: int) -> tuple[float, int, Array]:
    """Scale, side of the window and what is added to the logits, evaluated for random and for zero q, k and v."""
    shape = request.values[found.region.x.name].shape
    if len(shape) != 4:
        raise NoMatch(f"{found.region.x.name} has shape {list(shape)}, not [B, H, W, C]")
    batch, height, width, _ = shape
    random = np.random.default_rng(0)
    qkv = random.standard_normal((batch, height, width, 3, heads, head_dim)).astype(np.float32)

    def logits(qkv: Array) -> Array:
        feeds = {**request.values, found.qkv.result.name: qkv.reshape(batch, height, width, -1)}
        (raw,) = request.compute([found.softmax.inputs[0]], feeds)
        return raw.astype(np.float64)

    zero = logits(np.zeros_like(qkv))
    pixels = zero.shape[-1]
    side = math.isqrt(pixels)
    if found.softmax.attrs.get("axis", -1) not in (-1, zero.ndim - 1):
        raise NoMatch("its Softmax does not run over the keys")
    if side**2 != pixels or zero.shape[-2] != pixels or height % side or width % side:
        raise NoMatch(f"its logits have shape {list(zero.shape)}: no square windows of a {height}x{width} map")
    rows, columns = height // side, width // side
    every = (batch, rows * columns, heads, pixels, pixels)
    if zero.size != math.prod(every):
        raise NoMatch(f"its logits have shape {list(zero.shape)}: not one window of {heads} heads after the other")
    windows = qkv.reshape(batch, rows, side, columns, side, 3, heads, head_dim).transpose(5, 0, 1, 3, 6, 2, 4, 7)
    q, k = windows.reshape(3, *every[:-1], head_dim)[:2].astype(np.float64)
    products, from_keys = q @ k.swapaxes(-1, -2), (logits(qkv) - zero).reshape(every)
    scale, residual = fitted(from_keys, products, head_dim)
    check_residual(residual if scale else math.inf, f"scale * q k^T in windows of {side}x{side}")
    added = zero.reshape(every)
    if not np.array_equal(added, np.broadcast_to(added[:1], every)):
        raise NoMatch("what it adds to the logits depends on the image")
    added = added[0]
    top = added.max(-1, keepdims=True)
    added = np.where(added < top - _HIDDEN, top + MASKED, added)
    return scale, side, added[:1] if np.array_equal(added, np.broadcast_to(added[:1], added.shape)) else added


def _mask(found: Match, weights: SwinAcmixWeights, request: Request) -> Mask:
    """What is added to the logits, as the graph computes it for any image size. Raises NoMatch where it does not."""
    windows, _, pixels, _ = weights.added.shape
    ways: list[gs.Tensor] = [found.softmax.inputs[0]]
    while ways:
        node = producer(ways.pop())
        if node is None or node.op not in (*RESHAPING, "Add"):
            continue
        for tensor in node.inputs[: 2 if node.op == "Add" else 1]:
            if nearest(tensor, "MatMul"):
                ways.append(tensor)
            elif isinstance(tensor, gs.Variable) and constant_value(tensor) is None:
                (mask,) = request.compute([tensor], request.values)
                if mask.size == windows * pixels**2:
                    seen = np.broadcast_to(mask.reshape(windows, 1, pixels, pixels) == 0, weights.added.shape)
                    bias = np.where(seen, weights.added, -np.inf).max(0, keepdims=True)
                    if np.allclose(weights.added[seen], np.broadcast_to(bias, seen.shape)[seen], atol=1e-4):
                        return Mask(tensor, np.where(np.isinf(bias), 0.0, bias))  # inf: no window shows them together
    raise NoMatch("its mask is for one image size, and the size is free")


SWIN_ACMIX = Family(
    name="swin_acmix",
    anchors=("Softmax",),
    match=match,
    reduce=reduce,
    reduce_grouped=partial(reduce, conv_branch="grouped"),
    tolerances=TOLERANCES,
)
