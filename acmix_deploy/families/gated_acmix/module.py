"""Gated ACmix: the mix of "On the Integration of Self-Attention and Convolution" (arXiv 2111.14556) as it circulates
with ``nn.MultiheadAttention`` and a gate: the branches share nothing, and the gate weighs them image by image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.errors import UserError


class GatedACmix(nn.Module):
    """Convolution, BatchNorm and ReLU beside multi-head attention over all pixels, each times a weight of its own.

    ``y = g_1 * relu(bn(conv(x))) + g_2 * attention(x)`` with ``g = sigmoid(W_2 relu(W_1 mean(x) + b_1) + b_2)`` [B, 2],
    the mean over the pixels of each channel; from [B, channels, H, W] to the same shape, in any floating-point type.
    The attention takes the H*W pixels of an image for its tokens, has a projection of its result, and needs
    heads * (H*W)**2 logits.

    The code in circulation hands [B, H*W, channels] to an ``nn.MultiheadAttention`` that was not told
    ``batch_first=True``. There the first axis is the sequence: each pixel attends to the pixels at its place in all
    images of the batch, not to its own image, and what an image gives depends on the batch that it comes in. A model
    that was trained so needs ``sequence_first=True``. Alone in a batch a pixel has nothing but itself to attend to:
    then the attention is two linear layers, one 1x1 convolution.

    Args:
        channels: a multiple of ``num_heads``.
        num_heads: attention heads.
        kernel_size: side of the convolution's kernel; odd.
        hidden: features between the two linear layers of the gate; by default a quarter of the channels.
        sequence_first: attend along the batch, as models do that were trained with the code in circulation.

    Raises:
        UserError: for sizes that do not fit each other.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 4,
        kernel_size: int = 3,
        hidden: int | None = None,
        *,
        sequence_first: bool = False,
    ) -> None:
        super().__init__()
        self.hidden = max(channels // 4, 1) if hidden is None else hidden
        if min(channels, num_heads, self.hidden) < 1 or channels % num_heads:
            raise UserError(
                f"GatedACmix got channels={channels}, num_heads={num_heads}, hidden={self.hidden}; "
                "all are at least 1 and channels is a multiple of num_heads"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"kernel_size is {kernel_size}; only an odd one keeps the map size")
        self.channels = channels
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.sequence_first = sequence_first

        conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.conv = nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=not sequence_first)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, 2),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)[:, :, None, None]
        y: Tensor = gate[:, :1] * self.conv(x) + gate[:, 1:] * self._attend(x)
        return y

    def _attend(self, x: Tensor) -> Tensor:
        """Not by the forward of nn.MultiheadAttention, whose fast path no exporter knows, and else freezes sizes."""
        images = x.flatten(2).transpose(1, 2)
        tokens = images.transpose(0, 1) if self.sequence_first else images
        qkv = F.linear(tokens, self.attention.in_proj_weight, self.attention.in_proj_bias)
        heads = (*tokens.shape[:2], 3, self.num_heads, self.channels // self.num_heads)
        q, k, v = qkv.reshape(heads).permute(2, 0, 3, 1, 4).unbind(0)
        logits = (q * (self.channels // self.num_heads) ** -0.5) @ k.transpose(2, 3)
        attended = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        projected: Tensor = self.attention.out_proj(attended)
        images = projected.transpose(0, 1) if self.sequence_first else projected
        return images.transpose(1, 2).reshape(x.shape)
