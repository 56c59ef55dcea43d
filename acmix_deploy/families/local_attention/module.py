"""Attention of each pixel to its K x K neighbours, as models have it beside ACmix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families.coordinates import coordinates
from acmix_deploy.operators.neighborhood_attention import Border


class LocalAttention(nn.Module):
    """Attention of each pixel to its K x K neighbours, from [B, in_channels, H, W] to [B, out_channels, H, W].

    ``y_i = proj(softmax_n(d**-0.5 * q_i . (k_n - P l_n) + bias[n - i]) v_n)`` in any floating-point type, with q, k and
    v from one 1x1 convolution. Neighbours are ``dilation`` pixels apart. What becomes of those outside the map is
    ``border``:

    * None: the map is reflected there, as in ACmix (arXiv 2111.14556);
    * ``ZEROS``: they have keys and values of zeros, as ``nn.Unfold`` pads, and take part in the softmax; their logit is
      the bias alone;
    * ``MASKED``: they take no part;
    * ``SHIFTED``: there are none, since the window stays inside the map (Neighborhood Attention, arXiv 2204.07143; with
      a dilation, arXiv 2209.15001, the map is that of the pixels with an equal remainder).

    State dicts of NATTEN's ``NeighborhoodAttention2D`` can be loaded: its Linear layers are these 1x1 convolutions.

    Args:
        in_channels: channels of x.
        out_channels: of q, k, v and of the result; a multiple of ``num_heads``; by default ``in_channels``.
        kernel_size: K, side of the window in pixels; odd, at least 3.
        num_heads: attention heads.
        dilation: of the window; 1 where the map is reflected.
        border: what becomes of neighbours outside the map.
        position: whether keys have a term P l that is linear in the coordinates l in [-1, 1]**2, ACmix's position.
        bias: whether logits have a bias for each head and relative offset; not where the map is
            reflected.
        projection: whether a 1x1 convolution follows.

    Raises:
        UserError: for arguments that do not fit each other, here, or (map sizes) at the call.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: int = 7,
        num_heads: int = 4,
        *,
        dilation: int = 1,
        border: Border | None = Border.SHIFTED,
        position: bool = False,
        bias: bool = False,
        projection: bool = True,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        if min(in_channels, out_channels, num_heads) < 1 or out_channels % num_heads:
            raise UserError(
                f"LocalAttention got in_channels={in_channels}, out_channels={out_channels}, num_heads={num_heads}; "
                "all are at least 1 and out_channels is a multiple of num_heads"
            )
        if kernel_size < 3 or kernel_size % 2 == 0 or dilation < 1:
            raise UserError(
                f"kernel_size is {kernel_size} and dilation {dilation}; the first is odd and at least 3, the second at "
                "least 1"
            )
        if border is None and (dilation > 1 or bias):
            raise UserError("a reflected border is defined for dilation 1 and without a bias")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.num_heads = num_heads
        self.head_dim = out_channels // num_heads
        self.dilation = dilation
        self.border = border
        self.scale = self.head_dim**-0.5

        self.qkv = nn.Conv2d(in_channels, 3 * out_channels, 1)
        self.position = nn.Conv2d(2, self.head_dim, 1, bias=False) if position else None
        side = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.randn(num_heads, side, side) * 0.02) if bias else None
        self.proj = nn.Conv2d(out_channels, out_channels, 1) if projection else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if not torch.compiler.is_compiling() and isinstance(height, int):  # else sizes are symbols: a graph is made
            self._check(height, width)
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, self.head_dim)).unbind(1)
        if self.position is not None:
            k = k - self.position(coordinates(x)).unsqueeze(1)
        rows, columns = (self._neighbours(size, x.device) for size in (height, width))
        inside = (rows.inside[:, None, :, None] & columns.inside[None, :, None, :]).flatten(2)  # [H, W, K * K]
        keys, values = (_windows(part, rows.pixel, columns.pixel) for part in (k, v))
        if self.border == Border.ZEROS:
            keys, values = keys * inside, values * inside
        logits = self._logits(q, keys)
        if self.rpb is not None:
            logits = logits + _windows(self.rpb, rows.offset, columns.offset)
        if self.border == Border.MASKED:
            logits = logits.masked_fill(~inside, -torch.inf)
        attended = (logits.softmax(-1).unsqueeze(2) * values).sum(-1)
        y: Tensor = self.proj(attended.flatten(1, 2))
        return y

    def _logits(self, q: Tensor, keys: Tensor) -> Tensor:
        """Products of q [B, N, d, H, W] and keys [B, N, d, H, W, K * K], scaled."""
        logits: Tensor = (self.scale * q.unsqueeze(-1) * keys).sum(2)
        return logits

    @property
    def _border(self) -> str:
        return "a reflected border" if self.border is None else f"border {self.border.name}"

    def _check(self, height: int, width: int) -> None:
        """Refuse a map on which a window is not defined. Raises UserError."""
        least = {None: self.kernel_size // 2 + 1, Border.SHIFTED: self.kernel_size * self.dilation}.get(self.border, 1)
        if min(height, width) < least:
            raise UserError(
                f"a {height}x{width} map is too small: windows of {self.kernel_size}x{self.kernel_size}, dilation "
                f"{self.dilation}, with {self._border} need {least} pixels each way",
                "Use a larger image or a smaller kernel_size.",
            )

    def _neighbours(self, size: int, device: torch.device) -> _Neighbours:
        """The neighbours along an axis of so many pixels."""
        pixel = torch.arange(size, device=device).unsqueeze(1)
        tap = torch.arange(self.kernel_size, device=device)
        reach = self.kernel_size // 2
        if self.border == Border.SHIFTED:
            remainder, place = pixel % self.dilation, pixel // self.dilation
            count = (size - 1 - remainder) // self.dilation + 1
            first = torch.minimum((place - reach).clamp(min=0), count - self.kernel_size)
            index = remainder + self.dilation * (first + tap)
            return _Neighbours(index, index >= 0, first + tap - place + self.kernel_size - 1)
        index = pixel + self.dilation * (tap - reach)
        inside = (index >= 0) & (index < size)
        index = size - 1 - (size - 1 - index.abs()).abs() if self.border is None else index.clamp(0, size - 1)
        return _Neighbours(index, inside, (tap + reach).expand_as(index))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("qkv.weight", "proj.weight"):
            if (weight := state_dict.get(f"{prefix}{name}")) is not None and weight.dim() == 2:
                state_dict[f"{prefix}{name}"] = weight[:, :, None, None]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, num_heads={self.num_heads}, dilation={self.dilation}, {self._border}"


class _Neighbours(NamedTuple):
    """Of each pixel along an axis, its K neighbours: [size, K] each."""

    pixel: Tensor
    """Its place; where there is none, another's."""
    inside: Tensor
    """Whether it is on the map."""
    offset: Tensor
    """How many steps of the dilation it is away, plus K - 1."""


def _windows(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Of maps [..., H, W] the rows [h, K] and columns [w, K]: [..., h, w, K * K]."""
    taken = maps.index_select(-2, rows.flatten()).index_select(-1, columns.flatten())
    # Not by reshape, in which the TorchScript exporter freezes sizes.
    windows: Tensor = taken.unflatten(-1, columns.shape).unflatten(-3, rows.shape)  # type: ignore[no-untyped-call]
    return windows.transpose(-3, -2).flatten(-2)
