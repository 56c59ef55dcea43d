"""AcmixLocalAttention in PyTorch, written for clarity: what every other implementation is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from acmix_deploy.operators.local_attention import check_geometry


def pixel_coordinates(height: int, width: int) -> Tensor:
    """Coordinates l of a map: float64 [2, H, W], x then y, from -1 at the first pixel to 1 at the last."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, dtype=torch.float64),
        torch.linspace(-1, 1, width, dtype=torch.float64),
        indexing="ij",
    )
    return torch.stack([x, y])


def neighbours(maps: Tensor, kernel_size: int, stride: int) -> Tensor:
    """The K x K reflected neighbourhood of every ``stride``-th pixel: [B, C, H, W] -> [B, C, K*K, H/s, W/s]."""
    batch, channels, height, width = maps.shape
    padded = F.pad(maps, [kernel_size // 2] * 4, mode="reflect")
    windows = padded.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride)
    return windows.permute(0, 1, 4, 5, 2, 3).reshape(batch, channels, -1, height // stride, width // stride)


def local_attention(
    qkv: Tensor, position_weight: Tensor, *, num_heads: int, kernel_size: int, stride: int, scale: float
) -> Tensor:
    """Evaluate the operator's definition in float64, whatever the type of its inputs.

    Args:
        qkv: [B, 3*N*d, H, W], any floating type.
        position_weight: P, [d, 2].
        num_heads: N.
        kernel_size: K.
        stride: s.
        scale: factor of the logits.

    Returns:
        float64 [B, N*d, H/s, W/s].

    Raises:
        UserError: for a geometry outside the definition (see ``check_geometry``).
    """
    batch, _, height, width = qkv.shape
    check_geometry(kernel_size, stride, height, width)
    query, key, value = qkv.double().reshape(batch, 3, -1, height, width).unbind(1)
    head_dim = query.shape[1] // num_heads
    coordinates = pixel_coordinates(height, width).to(qkv.device)
    position = torch.einsum("da,ahw->dhw", position_weight.double(), coordinates)
    key = key - position.repeat(num_heads, 1, 1)

    def by_head(maps: Tensor) -> Tensor:
        return maps.reshape(batch, num_heads, head_dim, *maps.shape[2:])

    query = by_head(query[:, :, ::stride, ::stride])
    key, value = (by_head(neighbours(maps, kernel_size, stride)) for maps in (key, value))
    logits = scale * torch.einsum("bndhw,bndkhw->bnkhw", query, key)
    return torch.einsum("bnkhw,bndkhw->bndhw", logits.softmax(2), value).flatten(1, 2)
