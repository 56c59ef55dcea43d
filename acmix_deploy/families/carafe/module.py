"""CARAFE of "CARAFE: Content-Aware ReAssembly of FEatures" (arXiv 1905.02188)."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.errors import UserError


class Carafe(nn.Module):
    """Upsampling in which every pixel of the result predicts with which weights the K x K pixels around its own in x
    are summed.

    ``y = sum_n w_n x_n`` with ``w = softmax(pixel_shuffle(enc(comp(x))))`` and zeros around the map, from [B, C, H, W]
    to [B, C, u*H, u*W], in any floating-point type. Parameters have the names and shapes of the usual PyTorch version
    (https://github.com/XiaLiPKU/CARAFE).

    Args:
        channels: C.
        c_mid: channels between the two convolutions.
        scale: u, at least 2.
        k_up: K, odd.
        k_enc: side of the kernel of ``enc``, odd.
        out_channels: of a 1x1 convolution ``out`` behind it, which many copies have; None for none.

    Raises:
        UserError: for other numbers.
    """

    def __init__(
        self,
        channels: int,
        c_mid: int = 64,
        scale: int = 2,
        k_up: int = 5,
        k_enc: int = 3,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        if min(channels, c_mid) < 1 or scale < 2 or k_up < 3 or k_enc < 1 or k_up % 2 == 0 or k_enc % 2 == 0:
            raise UserError(
                f"Carafe got channels={channels}, c_mid={c_mid}, scale={scale}, k_up={k_up}, k_enc={k_enc}; channels "
                "and c_mid are at least 1, scale at least 2, k_up is odd and at least 3, k_enc odd"
            )
        self.channels = channels
        self.scale = scale
        self.k_up = k_up

        weights = (scale * k_up) ** 2
        self.comp = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(channels, c_mid, 1, bias=False), bn=nn.BatchNorm2d(c_mid), act=nn.ReLU())
        )
        self.enc = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(c_mid, weights, k_enc, padding=k_enc // 2, bias=False), bn=nn.BatchNorm2d(weights)
            )
        )
        self.pix_shf = nn.PixelShuffle(scale)
        self.out: nn.Module = nn.Conv2d(channels, out_channels, 1) if out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        w = self.pix_shf(self.enc(self.comp(x))).softmax(1)
        y: Tensor = self.out(self._reassemble(x, w))
        return y

    def _reassemble(self, x: Tensor, w: Tensor) -> Tensor:
        """The weighted sums [B, C, u*H, u*W] for weights [B, K*K, u*H, u*W]."""
        batch, channels, height, width = x.shape
        neighbours = F.unfold(x, self.k_up, padding=self.k_up // 2).reshape(batch, -1, height, width)
        nearest = F.interpolate(neighbours, scale_factor=float(self.scale), mode="nearest")
        summed = w[:, None] * nearest.reshape(batch, channels, -1, *w.shape[2:])
        return summed.sum(2)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, scale={self.scale}, k_up={self.k_up}"
