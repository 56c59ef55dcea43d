"""What a Swin ACmix block reduces to, in float64.

The scale of the logits goes into the queries' part of the projection, the rates into the weights of their branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from acmix_deploy.families.conv_branch import Convolution, fc_and_dep_conv, over_x

Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class SwinAcmixWeights:
    """The weights of one block, and the numbers that shape it."""

    qkv_weight: Array
    """[3C, C], rows ordered as [3, N, d]."""
    qkv_bias: Array
    """[3C]."""
    proj_weight: Array
    """[C, C]."""
    proj_bias: Array
    """[C]."""
    fc_weight: Array
    """[9, 3N]."""
    fc_bias: Array
    """[9]."""
    dep_conv_weight: Array
    """[C, 9, 3, 3], d groups."""
    dep_conv_bias: Array
    """[C]."""
    rate1: float
    rate2: float
    num_heads: int
    window_size: int
    scale: float
    added: Array
    """To the logits, position bias and mask: [windows, N, S, S], or [1, N, S, S] where all windows are alike."""

    @property
    def dim(self) -> int:
        """C."""
        return len(self.proj_weight)

    @property
    def head_dim(self) -> int:
        """d."""
        return self.dim // self.num_heads

    @property
    def masked(self) -> bool:
        """Whether windows differ in what is added to their logits."""
        return len(self.added) > 1


def scaled_qkv(weights: SwinAcmixWeights) -> tuple[Array, Array]:
    """Weight and bias of the projection, with the scale of the logits in the queries."""
    factor = np.where(np.arange(3 * weights.dim) < weights.dim, weights.scale, 1.0)
    return weights.qkv_weight * factor[:, None], weights.qkv_bias * factor


def grouped_conv(weights: SwinAcmixWeights) -> Convolution:
    """The convolution branch over qkv as :func:`scaled_qkv` makes it, rate2 included."""
    kernel = _kernel(weights)
    kernel[:, : weights.num_heads] /= weights.scale
    return Convolution(kernel, weights.rate2 * weights.dep_conv_bias, _border_of_fc(weights))


def dense_conv(weights: SwinAcmixWeights) -> Convolution:
    """The convolution branch over x, rate2 included."""
    weight, border = over_x(_kernel(weights), weights.qkv_weight, weights.qkv_bias)
    return Convolution(weight, weights.rate2 * weights.dep_conv_bias, border + _border_of_fc(weights))


def _kernel(weights: SwinAcmixWeights) -> Array:
    return weights.rate2 * fc_and_dep_conv(weights.fc_weight, weights.dep_conv_weight)


def _border_of_fc(weights: SwinAcmixWeights) -> Array:
    border: Array = np.einsum("otyx,t->oyx", weights.dep_conv_weight, weights.fc_bias)
    return weights.rate2 * border[:, None]
