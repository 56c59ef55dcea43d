"""What an ACmix block reduces to: the algebra that turns its nine weights into three or four.

With P = conv_p.weight the position term is part of the attention operator (it subtracts P*l from every key and drops
out of softmax otherwise). All arithmetic is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from acmix_deploy.families.conv_branch import Convolution, fc_and_dep_conv, over_x

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


def grouped_conv(weights: AcmixWeights) -> Convolution:
    """The convolution branch over qkv, rate2 included."""
    kernel = weights.rate2 * fc_and_dep_conv(weights.fc, weights.dep_conv_weight)
    return Convolution(kernel, weights.rate2 * weights.dep_conv_bias, np.zeros((len(kernel), 1, 3, 3)))


def dense_conv(weights: AcmixWeights) -> Convolution:
    """The convolution branch over x, rate2 included."""
    grouped = grouped_conv(weights)
    weight, border = over_x(grouped.weight, weights.qkv_weight, weights.qkv_bias)
    return Convolution(weight, grouped.bias, border)


def qkv_conv(weights: AcmixWeights, *, fold_rate1: bool) -> tuple[Array, Array]:
    """Weight [3*N*d, Cin, 1, 1] and bias of q, k and v; with ``fold_rate1`` the values carry rate1."""
    factor = np.ones(len(weights.qkv_weight))
    if fold_rate1:
        factor[-len(weights.dep_conv_weight) :] = weights.rate1
    weight = weights.qkv_weight * factor[:, None]
    return weight[:, :, None, None], weights.qkv_bias * factor
