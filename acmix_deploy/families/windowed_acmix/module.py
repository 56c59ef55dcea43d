"""Windowed ACmix: the mix of "On the Integration of Self-Attention and Convolution" (arXiv 2111.14556) as it is often
written beside window attention (Swin, arXiv 2103.14030): the convolution is depthwise and shares nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families.attention import MASKED


class WindowedACmix(nn.Module):
    """Multi-head attention within windows plus a depthwise convolution, normalised and projected.

    ``y = proj(norm(attention(x) + conv(x)))``, from [B, H, W, dim] to [B, H, W, dim], in any floating-point type.
    The map is cut into windows of ``window_size`` x ``window_size`` pixels from its top left corner, and a pixel
    attends to those of its window: ``softmax_n(q_i . k_n / sqrt(d) + bias[i - n]) v_n``. Windows that stick out at the
    bottom and at the right are padded, and nothing attends to the padding.

    Args:
        dim: channels, a multiple of ``num_heads``.
        window_size: side of a window in pixels.
        num_heads: attention heads.
        kernel_size: side of the depthwise kernel; odd.
        qkv_bias: of the projection to q, k and v.
        position_bias: learn ``relative_position_bias_table`` [(2*window_size - 1)**2, num_heads], one bias per head and
            offset, rows ordered by (y_i - y_n, x_i - x_n), both from 1 - window_size up, as Swin orders them.
        norm: LayerNorm over the channels of the sum.

    Raises:
        UserError: for sizes that do not fit each other.
    """

    def __init__(
        self,
        dim: int,
        window_size: int = 7,
        num_heads: int = 4,
        kernel_size: int = 3,
        *,
        qkv_bias: bool = True,
        position_bias: bool = True,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if min(dim, num_heads, window_size) < 1 or dim % num_heads:
            raise UserError(
                f"WindowedACmix got dim={dim}, num_heads={num_heads}, window_size={window_size}; "
                "all are at least 1 and dim is a multiple of num_heads"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"kernel_size is {kernel_size}; only an odd one keeps the map size")
        self.dim = dim
        self.window_size = window_size
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.position_bias = position_bias

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm: nn.Module = nn.LayerNorm(dim) if norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table: nn.Parameter | None = None
        if position_bias:
            table = nn.init.trunc_normal_(torch.empty((2 * window_size - 1) ** 2, num_heads), std=0.02)
            self.relative_position_bias_table = nn.Parameter(table)

    def forward(self, x: Tensor) -> Tensor:
        convolved = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y: Tensor = self.proj(self.norm(self._attend(x) + convolved))
        return y

    def _attend(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        window, area = self.window_size, self.window_size**2
        rows, columns = (height + window - 1) // window, (width + window - 1) // window
        padded = F.pad(x, (0, 0, 0, columns * window - width, 0, rows * window - height))
        tokens = _windows(padded, rows, columns, window).reshape(-1, area, dim)
        heads = (-1, area, 3, self.num_heads, self.dim // self.num_heads)
        q, k, v = self.qkv(tokens).reshape(heads).permute(2, 0, 3, 1, 4).unbind(0)
        logits = (q * (self.dim // self.num_heads) ** -0.5) @ k.transpose(-2, -1)
        if self.relative_position_bias_table is not None:
            logits = logits + self._bias()
        # Where sizes are symbols a graph is made, which has to hold for those that the window does not divide.
        if not (isinstance(height, int) and isinstance(width, int) and height % window == width % window == 0):
            logits = logits + self._mask(x, rows, columns).repeat(batch, 1, 1, 1)
        attended = (logits.softmax(-1) @ v).transpose(1, 2)
        maps = attended.reshape(batch, rows, columns, window, window, dim).transpose(2, 3)
        attended_map: Tensor = maps.reshape(batch, rows * window, columns * window, dim)
        return attended_map[:, :height, :width]

    def _bias(self) -> Tensor:
        """[num_heads, N, N] for N pixels of a window: of query, key."""
        assert self.relative_position_bias_table is not None
        index = relative_position(self.window_size).to(self.relative_position_bias_table.device)
        area = self.window_size**2
        return self.relative_position_bias_table[index.flatten()].reshape(area, area, -1).permute(2, 0, 1)

    def _mask(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """[windows, 1, 1, N]: MASKED for pixels outside of the map, else 0."""
        window, (height, width) = self.window_size, x.shape[1:3]
        inside_y = torch.arange(rows * window, device=x.device) < height
        inside_x = torch.arange(columns * window, device=x.device) < width
        inside = (inside_y[:, None] & inside_x).reshape(1, rows * window, columns * window, 1)
        keys = _windows(inside, rows, columns, window).reshape(-1, 1, 1, window * window)
        return torch.where(keys, 0.0, MASKED).to(x.dtype)

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, num_heads={self.num_heads}"


def relative_position(window_size: int) -> Tensor:
    """[N, N]: row of ``relative_position_bias_table`` for each query and key of a window of N pixels."""
    side = torch.arange(window_size)
    offset = side[:, None] - side + window_size - 1
    rows = offset[:, None, :, None] * (2 * window_size - 1)
    return (rows + offset[None, :, None, :]).reshape(window_size**2, window_size**2)


def _windows(x: Tensor, rows: int, columns: int, window: int) -> Tensor:
    """[B, rows * window, columns * window, C] -> [B, rows, columns, window, window, C]"""
    return x.reshape(x.shape[0], rows, window, columns, window, x.shape[3]).transpose(2, 3)
