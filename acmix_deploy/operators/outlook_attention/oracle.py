"""AcmixOutlookAttention in PyTorch, written for clarity: what every other implementation is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from acmix_deploy.operators.outlook_attention import check_geometry


def outlook_attention(
    logits: Tensor, values: Tensor, *, num_heads: int, kernel_size: int, stride: int, scale: float
) -> Tensor:
    """Evaluate the operator's definition in float64, whatever the type of its inputs.

    Args:
        logits: [B, N*K^4, h, w], any floating type; channel (n*K^2 + to)*K^2 + from.
        values: [B, N*d, H, W].
        num_heads: N.
        kernel_size: K.
        stride: s.
        scale: factor of the logits.

    Returns:
        float64 [B, N*d, H, W].

    Raises:
        UserError: for a geometry outside the definition (see ``check_geometry``).
    """
    (batch, channels, height, width), (*_, h, w) = values.shape, logits.shape
    check_geometry(kernel_size, stride, (height, width), (h, w))
    window = {"kernel_size": kernel_size, "padding": kernel_size // 2, "stride": stride}
    places = kernel_size**2
    weights = (scale * logits.double()).reshape(batch, num_heads, places, places, h * w).softmax(3)
    seen = F.unfold(values.double(), **window).reshape(batch, num_heads, channels // num_heads, places, h * w)
    mixed = torch.einsum("bntfp,bndfp->bndtp", weights, seen)
    return F.fold(mixed.reshape(batch, channels * places, h * w), (height, width), **window)
