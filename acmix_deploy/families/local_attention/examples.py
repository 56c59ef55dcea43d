"""Examples of local attention."""

import torch
from torch import Tensor, nn

from acmix_deploy.families.examples import Examples, NearMiss, softmax_over
from acmix_deploy.families.local_attention.module import LocalAttention
from acmix_deploy.operators.neighborhood_attention import Border


class RelativeKeys(LocalAttention):
    """Queries meet an embedding of the offset too, as in stand-alone self-attention (arXiv 1906.05909)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, None, 3, 2, border=Border.ZEROS)
        self.relative = nn.Parameter(torch.randn(self.head_dim, 1, 1, 9))

    def _logits(self, q: Tensor, keys: Tensor) -> Tensor:
        return super()._logits(q, keys + self.relative)


class Squashed(LocalAttention):
    """Its logits are not linear in the keys."""

    def _logits(self, q: Tensor, keys: Tensor) -> Tensor:
        return super()._logits(q, keys).tanh()


def _shifted(channels: int) -> LocalAttention:
    return LocalAttention(channels, None, 3, 2, dilation=2, bias=True)


def _zeros(channels: int) -> LocalAttention:
    return LocalAttention(channels, None, 5, 2, border=Border.ZEROS, position=True, projection=False)


def _masked(channels: int) -> LocalAttention:
    return LocalAttention(channels, None, 5, 2, border=Border.MASKED, bias=True)


DIFFERS = "differs from LocalAttention"

EXAMPLES = (
    Examples(
        _shifted,
        near_misses=[
            NearMiss(lambda c: Squashed(c, None, 3, 2), DIFFERS, "not linear: Tanh"),
            NearMiss(lambda c: softmax_over(_shifted(c), 1), DIFFERS, "Softmax runs over 2 values"),
        ],
        variant="shifted",
        without_gradient={"qkv.bias": slice(8, 16)},
    ),
    Examples(
        _zeros,
        near_misses=[NearMiss(RelativeKeys, DIFFERS, "relative residual")],
        variant="zeros",
    ),
    Examples(_masked, variant="masked", without_gradient={"qkv.bias": slice(8, 16)}),
)
