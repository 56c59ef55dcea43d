"""Gated ACmix: the mix of "On the Integration of Self-Attention and Convolution" (arXiv 2111.14556) as it circulates
with ``nn.MultiheadAttention`` and a gate: the branches share no weights, and the gate weighs them image by image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.errors import UserError


class GatedACmix(nn.Module):
    """Convolution, BatchNorm and ReLU, and multi-head attention, each times a weight of its own.

    With ``f = relu(bn(conv(x)))`` and ``g = sigmoid(W_2 relu(W_1 mean(x) + b_1) + b_2)`` [B, 2], the mean over the
    pixels of each channel:

        in parallel:  y = g_1 * f + g_2 * attention(x)
        in series:    y = g_1 * f + g_2 * attention(f)

    from [B, channels, H, W] to [B, out_channels, H, W], in any floating-point type. The attention has a projection of
    its result. It takes the H*W pixels of an image for its tokens and needs heads * (H*W)**2 logits, or the pixels of
    each window of ``window_size`` x ``window_size`` and needs heads * H*W * window_size**2.

    The code in circulation hands [B, H*W, channels] to an ``nn.MultiheadAttention`` that was not told
    ``batch_first=True``. There the first axis is the sequence: each pixel attends to the pixels at its place in all
    images of the batch (of windows: in all windows of all images), not to its own image, and what an image gives
    depends on the batch that it comes in. A model that was trained so needs ``sequence_first=True``. Alone in a batch a
    pixel has nothing but itself to attend to: then the attention is two linear layers, one 1x1 convolution.

    Args:
        channels: of x.
        num_heads: attention heads.
        kernel_size: side of the convolution's kernel; odd.
        hidden: features between the two linear layers of the gate; by default a quarter of the channels.
        sequence_first: attend along the batch, as models do that were trained with the code in circulation.
        in_series: attend to the result of the convolution.
        out_channels: a multiple of ``num_heads``; by default ``channels``, and nothing else in parallel.
        window_size: side of a window, which divides H and W; by default the attention is over the whole map.

    Raises:
        UserError: for sizes that do not fit each other, when called for a map that the windows do not divide.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 4,
        kernel_size: int = 3,
        hidden: int | None = None,
        *,
        sequence_first: bool = False,
        in_series: bool = False,
        out_channels: int | None = None,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        self.hidden = max(channels // 4, 1) if hidden is None else hidden
        self.out_channels = channels if out_channels is None else out_channels
        sizes = (channels, self.out_channels, num_heads, self.hidden, 1 if window_size is None else window_size)
        if min(sizes) < 1 or self.out_channels % num_heads:
            raise UserError(
                f"GatedACmix got channels={channels}, out_channels={self.out_channels}, num_heads={num_heads}, "
                f"hidden={self.hidden}, window_size={window_size}; all are at least 1 and out_channels is a multiple "
                "of num_heads"
            )
        if self.out_channels != channels and not in_series:
            raise UserError(
                f"GatedACmix got channels={channels} and out_channels={self.out_channels}; in parallel the attention "
                "gives as many channels as it takes",
                "Give in_series=True, or the same width.",
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"kernel_size is {kernel_size}; only an odd one keeps the map size")
        self.channels = channels
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.sequence_first = sequence_first
        self.in_series = in_series
        self.window_size = window_size

        conv = nn.Conv2d(channels, self.out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.conv = nn.Sequential(conv, nn.BatchNorm2d(self.out_channels), nn.ReLU())
        self.attention = nn.MultiheadAttention(self.out_channels, num_heads, batch_first=not sequence_first)
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
        convolved = self.conv(x)
        y: Tensor = gate[:, :1] * convolved + gate[:, 1:] * self._attend(convolved if self.in_series else x)
        return y

    def _attend(self, x: Tensor) -> Tensor:
        """Not by the forward of nn.MultiheadAttention, whose fast path no exporter knows, and else freezes sizes."""
        batch, channels, height, width = x.shape
        window = self.window_size
        if window is None:
            images = x.flatten(2).transpose(1, 2)
        else:
            if height % window or width % window:
                raise UserError(f"windows of {window}x{window} pixels do not divide a map of {height}x{width}")
            grid = x.reshape(batch, channels, height // window, window, width // window, window)
            images = grid.permute(0, 2, 4, 3, 5, 1).reshape(-1, window * window, channels)
        tokens = images.transpose(0, 1) if self.sequence_first else images
        qkv = F.linear(tokens, self.attention.in_proj_weight, self.attention.in_proj_bias)
        heads = (*tokens.shape[:2], 3, self.num_heads, channels // self.num_heads)
        q, k, v = qkv.reshape(heads).permute(2, 0, 3, 1, 4).unbind(0)
        logits = (q * (channels // self.num_heads) ** -0.5) @ k.transpose(2, 3)
        attended = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
        projected: Tensor = self.attention.out_proj(attended)
        images = projected.transpose(0, 1) if self.sequence_first else projected
        if window is None:
            return images.transpose(1, 2).reshape(x.shape)
        grid = images.reshape(batch, height // window, width // window, window, window, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
