"""Outlook attention of "VOLO: Vision Outlooker for Visual Recognition" (arXiv 2106.13112, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.errors import UserError


class OutlookAttention(nn.Module):
    """Every pixel predicts how the values in the window around it mix; overlapping windows are added.

    ``y = proj(fold(softmax(scale * attn(pool(x))) unfold(v(x))))``, from [B, H, W, dim] to [B, H, W, dim], in any
    floating-point type. With windows of K x K pixels at every ``stride``-th pixel, ``attn`` gives for each of them one
    K^2 x K^2 matrix a head, [to, from], whose rows the softmax normalises. Places outside the map hold zeros and take
    their share of the softmax. Parameters have the names and shapes of the authors' ``models/volo.py``, without its
    dropout.

    Fold is a transposed convolution with one-hot kernels, so that no exporter writes Col2Im, which TensorRT cannot
    read and the TorchScript exporter cannot write.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: N.
        kernel_size: K.
        padding: pixels of zeros around the map, less than half of K. Only K // 2 for odd K gives windows around pixels,
            which is what fuses.
        stride: distance of neighbouring windows, and side of the squares that the input of ``attn`` is averaged over.
        qkv_bias: whether ``v`` has a bias.
        qk_scale: factor of the logits, by default ``(dim // num_heads) ** -0.5``.

    Raises:
        UserError: for numbers that the authors' code cannot compute either, here or at the call, where there is not one
            window for each averaged square.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 3,
        padding: int = 1,
        stride: int = 1,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
    ) -> None:
        super().__init__()
        if min(dim, num_heads) < 1 or dim % num_heads:
            raise UserError(
                f"OutlookAttention got dim={dim}, num_heads={num_heads}; both are at least 1 and dim is a multiple of "
                "num_heads"
            )
        if min(kernel_size, stride) < 1 or not 0 <= 2 * padding < kernel_size:
            raise UserError(
                f"OutlookAttention got kernel_size={kernel_size}, padding={padding}, stride={stride}; kernel_size and "
                "stride are at least 1 and padding is less than half of kernel_size"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.padding = padding
        self.stride = stride
        self.scale = qk_scale or (dim // num_heads) ** -0.5

        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn = nn.Linear(dim, num_heads * kernel_size**4)
        self.proj = nn.Linear(dim, dim)
        self.pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        places = torch.eye(kernel_size**2).view(-1, 1, kernel_size, kernel_size)
        self.places: Tensor
        self.register_buffer("places", places, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        places = self.kernel_size**2
        pooled = self.pool(x.permute(0, 3, 1, 2)) if self.stride > 1 else x.permute(0, 3, 1, 2)
        h, w = pooled.shape[2:]
        if not torch.compiler.is_compiling() and isinstance(height, int):  # else sizes are symbols: a graph is made
            self._check_windows((height, width), (h, w))

        logits = self.attn(pooled.permute(0, 2, 3, 1)) * self.scale
        weights = logits.reshape(batch, h * w, self.num_heads, places, places).softmax(4)
        values = F.unfold(
            self.v(x).permute(0, 3, 1, 2), self.kernel_size, padding=self.padding, stride=self.stride
        )  # [B, dim * K^2, h * w]
        by_window = values.reshape(batch, self.num_heads, -1, places, h * w).permute(0, 4, 1, 3, 2)
        mixed = (weights @ by_window).permute(0, 2, 4, 3, 1)  # [B, N, d, K^2, h * w]
        folded = F.conv_transpose2d(
            mixed.reshape(-1, places, h, w),
            self.places,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.stride - 1,
        )
        y = folded.reshape(batch, self.dim, *folded.shape[2:])[:, :, :height, :width]
        projected: Tensor = self.proj(y.permute(0, 2, 3, 1))
        return projected

    def _check_windows(self, size: tuple[int, int], squares: tuple[int, int]) -> None:
        windows = tuple((pixels + 2 * self.padding - self.kernel_size) // self.stride + 1 for pixels in size)
        if windows != squares:
            raise UserError(
                f"a map of {size[0]}x{size[1]} has {windows[0]}x{windows[1]} windows of {self.kernel_size} pixels with "
                f"padding {self.padding} and stride {self.stride}; {squares[0]}x{squares[1]} matrices are predicted"
            )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, padding={self.padding}, "
            f"stride={self.stride}"
        )
