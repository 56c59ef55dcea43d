"""What an ACmix block reduces to: the algebra that turns its nine weights into three or four.

With P = conv_p.weight the position term is part of the attention operator (it subtracts P*l from every key and drops
out of softmax otherwise). fc and dep_conv are one grouped convolution of the channels permuted from [3N, d] to
[d, 3N]; and because q, k, v are linear in x, that is a dense 3x3 convolution of x plus the convolution of the biases.
All arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class AcmixWeights:
    """The weights of one block, as the paper's module names them, and the numbers that shape it."""

    qkv_weight: Array
    """conv1, conv2, conv3 one below the other: [3*N*d, Cin]."""
    qkv_bias: Array
    """[3*N*d]."""
    position_weight: Array
    """P, conv_p.weight: [d, 2]; conv_p.bias drops out of softmax."""
    fc: Array
    """[9, 3*N]."""
    dep_conv_weight: Array
    """[N*d, 9, 3, 3], d groups."""
    dep_conv_bias: Array
    """[N*d]."""
    rate1: float
    rate2: float
    num_heads: int
    kernel_size: int
    stride: int
    scale: float

    @property
    def head_dim(self) -> int:
        """d."""
        return len(self.dep_conv_weight) // self.num_heads


@dataclass(frozen=True)
class ConvWeights:
    """A convolution's weight [Cout, Cin / groups, kH, kW] and bias [Cout]."""

    weight: Array
    bias: Array


def grouped_kernel(weights: AcmixWeights) -> Array:
    """fc followed by dep_conv as one kernel: [N*d, 3N, 3, 3] with d groups, rate2 included."""
    kernel: Array = np.einsum("otyx,tm->omyx", weights.dep_conv_weight, weights.fc)
    return weights.rate2 * kernel


def grouped_conv(weights: AcmixWeights) -> ConvWeights:
    """The convolution branch over qkv with channels ordered by :func:`grouped_order`, d groups, rate2 included."""
    return ConvWeights(grouped_kernel(weights), weights.rate2 * weights.dep_conv_bias)


def grouped_order(weights: AcmixWeights) -> npt.NDArray[np.int64]:
    """Channels of qkv in the order that :func:`grouped_conv` reads them: from [3N, d] to [d, 3N]."""
    channels = np.arange(3 * weights.num_heads * weights.head_dim, dtype=np.int64)
    order: npt.NDArray[np.int64] = channels.reshape(-1, weights.head_dim).T.reshape(-1)
    return order


def dense_conv(weights: AcmixWeights) -> tuple[ConvWeights, Array]:
    """The convolution branch over x, rate2 included.

    Returns:
        A 3x3 convolution of x [N*d, Cin, 3, 3], and the kernel [N*d, 1, 3, 3] whose convolution of a map of ones is
        what the biases of q, k and v add (not a constant: the zero padding shows at the borders).
    """
    heads, head_dim = weights.num_heads, weights.head_dim
    kernel = grouped_kernel(weights).reshape(head_dim, heads, 3 * heads, 3, 3)
    project = weights.qkv_weight.reshape(3 * heads, head_dim, -1)
    bias = weights.qkv_bias.reshape(3 * heads, head_dim)
    dense = np.einsum("dnmyx,mdi->dniyx", kernel, project)
    border = np.einsum("dnmyx,md->dnyx", kernel, bias)
    channels = heads * head_dim
    conv = ConvWeights(dense.reshape(channels, -1, 3, 3), weights.rate2 * weights.dep_conv_bias)
    return conv, border.reshape(channels, 1, 3, 3)


def qkv_conv(weights: AcmixWeights, *, fold_rate1: bool) -> ConvWeights:
    """q, k and v as one 1x1 convolution [3*N*d, Cin, 1, 1]; with ``fold_rate1`` the values carry rate1."""
    factor = np.ones(len(weights.qkv_weight))
    if fold_rate1:
        factor[-len(weights.dep_conv_weight) :] = weights.rate1
    weight = weights.qkv_weight * factor[:, None]
    return ConvWeights(weight[:, :, None, None], weights.qkv_bias * factor)
