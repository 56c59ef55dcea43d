"""Where the pixels of a map are, as ACmix's position term takes it."""

from __future__ import annotations

import torch
from torch import Tensor


def coordinates(like: Tensor) -> Tensor:
    """x and y of each pixel of a map, from -1 to 1, in its type and on its device.

    Not by ``torch.linspace``: exporters freeze its length, or make it float64. Computed in float32 at least, since
    twice a pixel's index is no exact float16 number on a wide map.

    Args:
        like: the map, [B, C, H, W].

    Returns:
        [1, 2, H, W].
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    height, width = like.shape[2:]
    column, row = (torch.arange(n, device=like.device).to(dtype) for n in (width, height))
    x, y = column * 2 / column[-1:] - 1, row * 2 / row[-1:] - 1
    return torch.stack([x.expand(height, width), y.unsqueeze(1).expand(height, width)]).unsqueeze(0).to(like.dtype)
