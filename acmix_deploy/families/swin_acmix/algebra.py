"""What a Swin ACmix block reduces to, in float64.

fc and dep_conv are one grouped convolution of qkv, and because qkv is linear in x a dense one of x. What the biases add
to it is no constant, since zero padding shows at the borders: it is the convolution of a map of ones. The scale of the
logits goes into the queries' part of the projection, the rates into the weights of their branches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

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


class Convolution(NamedTuple):
    """The convolution branch, rate2 included."""

    weight: Array
    """[C, C, 3, 3] over x, or [C, 3N, 3, 3] with d groups over qkv ordered by :func:`by_head_dim`."""
    bias: Array
    """[C]."""
    border: Array
    """[C, 1, 3, 3]: its convolution of a map of ones is what the biases before it add."""


def scaled_qkv(weights: SwinAcmixWeights) -> tuple[Array, Array]:
    """Weight and bias of the projection, with the scale of the logits in the queries."""
    factor = np.where(np.arange(3 * weights.dim) < weights.dim, weights.scale, 1.0)
    return weights.qkv_weight * factor[:, None], weights.qkv_bias * factor


def by_head_dim(weights: SwinAcmixWeights) -> npt.NDArray[np.int64]:
    """Channels of qkv in the order that a grouped convolution reads them: from [3N, d] to [d, 3N]."""
    channels = np.arange(3 * weights.dim, dtype=np.int64)
    order: npt.NDArray[np.int64] = channels.reshape(-1, weights.head_dim).T.reshape(-1)
    return order


def grouped_conv(weights: SwinAcmixWeights) -> Convolution:
    """The convolution branch over qkv as :func:`scaled_qkv` makes it."""
    kernel = _kernel(weights)
    kernel[:, : weights.num_heads] /= weights.scale
    return Convolution(kernel, weights.rate2 * weights.dep_conv_bias, _border_of_fc(weights))


def dense_conv(weights: SwinAcmixWeights) -> Convolution:
    """The convolution branch over x."""
    heads, head_dim = weights.num_heads, weights.head_dim
    kernel = _kernel(weights).reshape(head_dim, heads, 3 * heads, 3, 3)
    project = weights.qkv_weight.reshape(3 * heads, head_dim, -1)
    dense = np.einsum("dnmyx,mdi->dniyx", kernel, project, optimize=True)
    border = np.einsum("dnmyx,md->dnyx", kernel, weights.qkv_bias.reshape(3 * heads, head_dim))
    return Convolution(
        dense.reshape(weights.dim, -1, 3, 3),
        weights.rate2 * weights.dep_conv_bias,
        border.reshape(weights.dim, 1, 3, 3) + _border_of_fc(weights),
    )


def _kernel(weights: SwinAcmixWeights) -> Array:
    """fc followed by dep_conv: [C, 3N, 3, 3] with d groups."""
    kernel: Array = np.einsum("otyx,tm->omyx", weights.dep_conv_weight, weights.fc_weight)
    return weights.rate2 * kernel


def _border_of_fc(weights: SwinAcmixWeights) -> Array:
    border: Array = np.einsum("otyx,t->oyx", weights.dep_conv_weight, weights.fc_bias)
    return weights.rate2 * border[:, None]
