"""The convolution and attention fusion module of "Hybrid Convolutional and Attention Network for Hyperspectral Image
Denoising" (arXiv 2403.10067): channel attention beside the two convolutions of ACmix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.errors import UserError


class CAFM(nn.Module):
    """Channels attend to channels, and ACmix's convolutions read the same queries, keys and values.

    ``y = project_out(softmax(temperature * q k^T) v) + dep_conv(fc(q, k, v))`` from [B, dim, H, W] to the same, in any
    floating-point type, with ``q, k, v = qkv_dwconv(qkv(x))``, a depthwise 3x3 convolution after a 1x1 one. For the
    attention each is [head_dim, H*W] a head, rows of q and k of length 1, so that the weights are [head_dim, head_dim].

    For ``fc``, as the authors have it, the memory of q, k, v [B, 3 * dim, H, W] is read as [B, H*W, 3 * num_heads,
    head_dim], without channels and pixels changing places: what it mixes are neighbours in memory rather than the maps
    of one pixel. What a model has learnt depends on it. With ``in_order`` they are those maps, as in ACmix.
    ``dep_conv`` is a 3x3 convolution with one group for each of the head_dim columns.

    The authors' layers are Conv3d over a depth of 1. These here are Conv2d, of the same names; the state dict of a
    Conv3d is taken, of whose kernels only the middle meets more than padding.

    Args:
        dim: channels, a multiple of ``num_heads``.
        num_heads: attention heads.
        bias: of the convolutions to q, k, v and of the projection; those of ACmix always have one.
        in_order: let ``fc`` mix the maps of one pixel.

    Raises:
        UserError: for sizes that do not fit each other.
    """

    def __init__(self, dim: int, num_heads: int = 8, bias: bool = False, *, in_order: bool = False) -> None:
        super().__init__()
        if min(dim, num_heads) < 1 or dim % num_heads:
            raise UserError(f"dim is {dim}, num_heads {num_heads}; dim must be a positive multiple of num_heads")
        self.dim = dim
        self.num_heads = num_heads
        self.in_order = in_order
        head_dim = dim // num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)
        self.fc = nn.Conv2d(3 * num_heads, 9, 1)
        self.dep_conv = nn.Conv2d(9 * head_dim, dim, 3, padding=1, groups=head_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        qkv = self.qkv_dwconv(self.qkv(x))
        q, k, v = qkv.reshape(batch, 3, self.num_heads, self.dim // self.num_heads, height * width).unbind(1)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        attended: Tensor = self.project_out((logits.softmax(-1) @ v).reshape(x.shape))
        return attended + self._convolve(qkv)

    def _convolve(self, qkv: Tensor) -> Tensor:
        batch, _, height, width = qkv.shape
        memory = qkv.permute(0, 2, 3, 1) if self.in_order else qkv
        rows = memory.reshape(batch, height * width, 3 * self.num_heads, self.dim // self.num_heads)
        mixed = self.fc(rows.transpose(1, 2)).permute(0, 3, 1, 2)
        convolved: Tensor = self.dep_conv(mixed.reshape(batch, -1, height, width))
        return convolved

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, value in state_dict.items():
            if name.startswith(prefix) and value.dim() == 5:
                state_dict[name] = flat(value)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


def flat(weight: Tensor) -> Tensor:
    """The kernels of a Conv3d [Cout, Cin, K, H, W] that meet a depth of 1 with K // 2 padding: [Cout, Cin, H, W]."""
    return weight[:, :, weight.shape[2] // 2] if weight.dim() == 5 else weight
