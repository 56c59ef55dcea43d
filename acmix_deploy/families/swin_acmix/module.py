"""The Swin variant of the ACmix block of "On the Integration of Self-Attention and Convolution" (arXiv 2111.14556)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families.attention import MASKED


class SwinACmix(nn.Module):
    """Self-attention in windows and a 3x3 convolution over one shared linear projection.

    ``y = rate1 * proj(softmax(scale * q k^T + b + m) v) + rate2 * dep_conv(fc(q, k, v))`` with ``q, k, v = qkv(x)``,
    from [B, H, W, dim] to the same, in any floating-point type. Attention stays inside windows of ``window_size`` x
    ``window_size`` pixels; b is the relative position bias. With a shift, both branches work on the map rolled up and
    to the left by it, m keeps apart what was not neighbouring before, and the result is rolled back. Parameters have
    the names and shapes of ``WindowAttention_acmix`` in the authors' Swin-Transformer/models/swin_transformer_acmix.py.
    As there, ``dep_conv`` has no bias; one that a state dict brings is taken over. Dropout, which the published
    settings leave at 0, is left out.

    Args:
        dim: channels, a multiple of ``num_heads``.
        window_size: side of a window in pixels; divides H and W.
        num_heads: attention heads.
        shift_size: of the windows in pixels, below ``window_size``. 0 where the caller rolls the map.
        qkv_bias: whether the projection has one.
        qk_scale: of the logits; by default ``head_dim ** -0.5``.

    Raises:
        UserError: for numbers that do not fit, here or (map sizes) at the call.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int,
        num_heads: int,
        *,
        shift_size: int = 0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
    ) -> None:
        super().__init__()
        if min(dim, num_heads) < 1 or dim % num_heads:
            raise UserError(f"dim is {dim}, num_heads {num_heads}; dim must be a positive multiple of num_heads")
        if not 0 <= shift_size < window_size:
            raise UserError(f"shift_size is {shift_size}, window_size {window_size}; it must be at least 0 and smaller")
        self.dim = dim
        self.window_size = window_size
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.shift_size = shift_size
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale

        side = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.empty(side * side, num_heads))
        self.register_buffer("relative_position_index", relative_positions(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.fc = nn.Conv2d(3 * num_heads, 9, 1)
        self.dep_conv = nn.Conv2d(9 * self.head_dim, dim, 3, padding=1, groups=self.head_dim, bias=False)
        self.rate1 = nn.Parameter(torch.empty(1))
        self.rate2 = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the position bias, set both rates to 0.5 and ``dep_conv`` to the sum of the paper's nine shifts."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        nn.init.constant_(self.rate1, 0.5)
        nn.init.constant_(self.rate2, 0.5)
        with torch.no_grad():
            self.dep_conv.weight.copy_(torch.eye(9).view(9, 3, 3).expand_as(self.dep_conv.weight))

    def forward(self, x: Tensor, H: int | None = None, W: int | None = None, mask: Tensor | None = None) -> Tensor:
        """Args: x, [B, H, W, dim]; H and W, as the authors' caller passes them, not used; mask, [windows, S, S] with
        S = window_size ** 2, added to the logits of each window, where the caller has rolled the map itself."""
        height, width = x.shape[1:3]
        if not torch.compiler.is_compiling() and isinstance(height, int):  # else sizes are symbols: a graph is made
            self._check(height, width)
        if self.shift_size:
            x = _rolled(x, self.shift_size)
            mask = self._mask(x)
        qkv = self.qkv(x)
        y = self.rate1 * self._attend(qkv, mask) + self.rate2 * self._convolve(qkv)
        return _rolled(y, -self.shift_size) if self.shift_size else y

    def _check(self, height: int, width: int) -> None:
        if height % self.window_size or width % self.window_size:
            raise UserError(
                f"a {height}x{width} map is not divisible into windows of {self.window_size}",
                "Choose an image size whose feature map at this block is a multiple of the window.",
            )

    def _attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """The projected attention of every window, [B, H, W, dim]."""
        batch, height, width, _ = qkv.shape
        side, heads = self.window_size, (self.num_heads, self.head_dim)
        rows, columns = height // side, width // side
        # [B, rows, side, columns, side, 3, N, d] -> 3 of [B, windows, N, S, d]
        parts = qkv.reshape(batch, rows, side, columns, side, 3, *heads).permute(5, 0, 1, 3, 6, 2, 4, 7)
        q, k, v = parts.reshape(3, batch, rows * columns, heads[0], side * side, heads[1])
        logits = self.scale * q @ k.transpose(-2, -1) + self._position_bias()
        if mask is not None:
            logits = logits + mask.unsqueeze(1)
        attended = (logits.softmax(-1) @ v).transpose(2, 3)
        attended = self.proj(attended.reshape(batch, rows, columns, side, side, self.dim))
        result: Tensor = attended.transpose(2, 3).reshape(batch, height, width, self.dim)
        return result

    def _position_bias(self) -> Tensor:
        """[N, S, S]."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def _convolve(self, qkv: Tensor) -> Tensor:
        """The nine maps of each of the head_dim channels, then shifted and summed by ``dep_conv``, [B, H, W, dim]."""
        batch, height, width, _ = qkv.shape
        by_head = qkv.reshape(batch, height * width, 3 * self.num_heads, self.head_dim).transpose(1, 2)
        maps = self.fc(by_head).permute(0, 3, 1, 2).reshape(batch, 9 * self.head_dim, height, width)
        shifted: Tensor = self.dep_conv(maps).permute(0, 2, 3, 1)
        return shifted

    def _mask(self, x: Tensor) -> Tensor:
        """[windows, S, S]: 0 where two pixels of a rolled map were neighbours before, else MASKED."""
        side = self.window_size
        height, width = x.shape[1:3]

        def region(length: int) -> Tensor:
            place = torch.arange(length, device=x.device)
            return (place >= length - side).long() + (place >= length - self.shift_size).long()

        regions = 3 * region(height).unsqueeze(1) + region(width)
        windows = regions.reshape(height // side, side, width // side, side).transpose(1, 2).reshape(-1, side * side)
        apart = windows.unsqueeze(1) != windows.unsqueeze(2)
        return MASKED * apart.to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}dep_conv.weight" in state_dict:
            weight, has_bias = self.dep_conv.weight, f"{prefix}dep_conv.bias" in state_dict
            self.dep_conv.bias = nn.Parameter(weight.new_zeros(self.dim)) if has_bias else None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, num_heads={self.num_heads}, shift_size={self.shift_size}"


def relative_positions(side: int) -> Tensor:
    """[S, S]: for two pixels of a window the row of the bias table that belongs to the way between them."""
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    down, right = (place.unsqueeze(1) - place + side - 1 for place in (row, column))
    return down * (2 * side - 1) + right


def _rolled(x: Tensor, shift: int) -> Tensor:
    """[B, H, W, C] rolled up and to the left: slices and Concat, which every exporter writes."""
    x = torch.cat([x[:, shift:], x[:, :shift]], 1)
    return torch.cat([x[:, :, shift:], x[:, :, :shift]], 2)
