"""The convolution branch of ACmix and of its Swin form: fc and dep_conv over the q, k and v of the attention.

Both are one grouped convolution of the channels permuted from [3N, d] to [d, 3N]; and because q, k and v are linear in
x, that is a dense convolution of x plus the convolution of the biases. No PyTorch here.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from acmix_deploy.graph import conv_weight, scalar_factor, way_down

Array = npt.NDArray[np.floating[Any]]

ConvBranch = Literal["dense", "grouped"]
"""Form of the branch: one convolution of x, or one of q, k and v."""

_LONGEST_TAIL = 24  # nodes from the Softmax to the block's last Add; exporters need 6 to 14


class Meeting(NamedTuple):
    """Where attention and convolution are added."""

    last: gs.Node
    """The Add."""
    path: list[tuple[gs.Variable, gs.Node]]
    """From the Softmax to it: operand and node in turn."""
    rate1: float
    rate2: float
    dep_conv: gs.Node


def meeting(graph: gs.Graph, softmax: gs.Node) -> Meeting | None:
    """The first Add downstream of a Softmax whose other operand is a convolution, if there is one."""
    path: list[tuple[gs.Variable, gs.Node]] = []
    for tensor, node in islice(way_down(graph, softmax.outputs[0]), _LONGEST_TAIL):
        if node.op == "Add":
            rate2, conv = scalar_factor(node.inputs[node.inputs[0] is tensor])
            if conv is not None and conv.op == "Conv":
                return Meeting(node, path, scalar_factor(tensor)[0], rate2, conv)
        path.append((tensor, node))
    return None


def is_dep_conv(conv: gs.Node) -> bool:
    """Whether a Conv has the shape of dep_conv: 3x3 with padding 1 of nine maps a group. Raises NoMatch."""
    return conv_weight(conv).shape[1:] == (9, 3, 3) and bool(conv.attrs.get("pads") == [1] * 4)


class Convolution(NamedTuple):
    """The branch as one 3x3 convolution with zero padding of 1."""

    weight: Array
    """[C, Cin, 3, 3] over x, or [C, 3N, 3, 3] with d groups over qkv ordered by :func:`by_head_dim`."""
    bias: Array
    """[C]."""
    border: Array
    """[C, 1, 3, 3]: its convolution of a map of ones is what the biases before it add (not a constant: the padding
    shows at the borders)."""


def fc_and_dep_conv(fc: Array, dep_conv: Array) -> Array:
    """``fc`` [9, 3N] followed by ``dep_conv`` [C, 9, 3, 3], d groups, as one kernel [C, 3N, 3, 3] with d groups."""
    kernel: Array = np.einsum("otyx,tm->omyx", dep_conv, fc)
    return kernel


def over_x(kernel: Array, qkv_weight: Array, qkv_bias: Array) -> tuple[Array, Array]:
    """A grouped kernel [C, 3N, 3, 3] over qkv [3C, Cin] and its bias [3C]: weight and border of the dense one."""
    channels, parts = kernel.shape[:2]
    heads = parts // 3
    by_group = kernel.reshape(-1, heads, parts, 3, 3)
    weight = np.einsum("dnmyx,mdi->dniyx", by_group, qkv_weight.reshape(parts, channels // heads, -1), optimize=True)
    border = np.einsum("dnmyx,md->dnyx", by_group, qkv_bias.reshape(parts, -1))
    return weight.reshape(channels, -1, 3, 3), border.reshape(channels, 1, 3, 3)


def by_head_dim(channels: int, head_dim: int) -> npt.NDArray[np.int64]:
    """``channels`` of qkv in the order that a grouped convolution reads them: from [3N, d] to [d, 3N]."""
    order: npt.NDArray[np.int64] = np.arange(channels, dtype=np.int64).reshape(-1, head_dim).T.reshape(-1)
    return order
