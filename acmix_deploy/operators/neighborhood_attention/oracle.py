"""AcmixNeighborhoodAttention in PyTorch, written for clarity: what every other implementation is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from acmix_deploy.operators.neighborhood_attention import Border, check_geometry


def window_along(size: int, kernel_size: int, dilation: int, border: int) -> tuple[Tensor, Tensor]:
    """What the pixels of an axis see along it.

    A window moves among the pixels that are a multiple of the dilation apart: the residue class of its own pixel.

    Returns:
        Neighbours, int64 [size, K]: pixels, of which those below 0 and from ``size`` on are beyond the map.
        Offsets, int64 [size, K]: their distance from the pixel in steps of the dilation, plus K - 1.
    """
    pixel = torch.arange(size)[:, None]
    residue, place = pixel % dilation, pixel // dilation
    first = place - kernel_size // 2
    if border == Border.SHIFTED:
        members = (size - residue + dilation - 1) // dilation
        first = torch.minimum(first.clamp(min=0), members - kernel_size)
    seen = first + torch.arange(kernel_size)
    return residue + seen * dilation, seen - place + kernel_size - 1


def neighborhood_attention(
    qkv: Tensor,
    position_weight: Tensor,
    bias: Tensor,
    *,
    num_heads: int,
    kernel_size: int,
    dilation: int,
    border: int,
    scale: float,
) -> Tensor:
    """Evaluate the operator's definition in float64, whatever the type of its inputs.

    Args:
        qkv: [B, 3*N*d, H, W], any floating type.
        position_weight: P, [d, 2].
        bias: [N, 2*K-1, 2*K-1], by relative offset.
        num_heads: N.
        kernel_size: K.
        dilation: D.
        border: a :class:`Border`.
        scale: factor of the logits.

    Returns:
        float64 [B, N*d, H, W].

    Raises:
        UserError: for a geometry outside the definition (see ``check_geometry``).
    """
    batch, _, height, width = qkv.shape
    check_geometry(kernel_size, dilation, border, height, width)
    query, key, value = qkv.double().reshape(batch, 3, num_heads, -1, height, width).unbind(1)
    x, y = (torch.linspace(-1, 1, size, dtype=torch.float64) for size in (width, height))
    coordinates = torch.stack([x.expand(height, width), y[:, None].expand(height, width)]).to(qkv.device)
    key = key - torch.einsum("da,ahw->dhw", position_weight.double(), coordinates)

    rows, row_offsets = window_along(height, kernel_size, dilation, border)
    columns, column_offsets = window_along(width, kernel_size, dilation, border)

    def pairs(of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor, Tensor]:
        """[H, 1, K, 1] and [1, W, 1, K]: for every pixel all rows of its window with all columns."""
        return of_rows[:, None, :, None].to(qkv.device), of_columns[None, :, None, :].to(qkv.device)

    row, column = pairs(rows, columns)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)

    def neighbours(maps: Tensor) -> Tensor:
        """[B, N, d, H, W, K, K], zeros beyond the map."""
        return maps[..., row.clamp(0, height - 1), column.clamp(0, width - 1)].where(inside, 0.0)

    logits = scale * torch.einsum("bndhw,bndhwij->bnhwij", query, neighbours(key))
    row_offset, column_offset = pairs(row_offsets, column_offsets)
    logits = logits + bias.double()[:, row_offset, column_offset]
    if border == Border.MASKED:
        logits = logits.masked_fill(~inside, -torch.inf)
    weights = logits.flatten(-2).softmax(-1)
    return torch.einsum("bnhwk,bndhwk->bndhw", weights, neighbours(value).flatten(-2)).flatten(1, 2)
