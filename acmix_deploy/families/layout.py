"""Blocks of channels-last maps, [B, H, W, C], where maps are [B, C, H, W], and the other way round."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ChannelsFirst(nn.Module):
    """``block``, which takes and gives [B, H, W, C], for maps [B, C, H, W]. Other arguments are handed on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        y: Tensor = self.block(x.permute(0, 2, 3, 1), *others)
        return y.permute(0, 3, 1, 2)


class ChannelsLast(nn.Module):
    """``block``, which takes and gives [B, C, H, W], for maps [B, H, W, C]. Other arguments are handed on."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        y: Tensor = self.block(x.permute(0, 3, 1, 2).contiguous(), *others)
        return y.permute(0, 2, 3, 1)
