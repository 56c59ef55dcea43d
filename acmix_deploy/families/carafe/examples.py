"""Examples of CARAFE."""

import torch
import torch.nn.functional as F
from torch import Tensor

from acmix_deploy.families.carafe.module import Carafe
from acmix_deploy.families.examples import Examples, NearMiss


class Smooth(Carafe):
    """Neighbours between those of two pixels."""

    def _reassemble(self, x: Tensor, w: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        neighbours = F.unfold(x, self.k_up, padding=self.k_up // 2).reshape(batch, -1, height, width)
        between = F.interpolate(neighbours, scale_factor=float(self.scale), mode="bilinear")
        return (w[:, None] * between.reshape(batch, channels, -1, *w.shape[2:])).sum(2)


def nearest_first(x: Tensor, w: Tensor, scale: int = 2, k_up: int = 3) -> Tensor:
    """Weighted sums as the other spelling has them: unfolded with dilation, after upsampling."""
    batch, channels = x.shape[:2]
    larger = F.interpolate(x, scale_factor=float(scale), mode="nearest")
    neighbours = F.unfold(larger, k_up, dilation=scale, padding=k_up // 2 * scale)
    return torch.einsum("bkhw,bckhw->bchw", w, neighbours.reshape(batch, channels, -1, *w.shape[2:]))


def _block(channels: int) -> Carafe:
    return Carafe(channels, 8, k_up=3)


def _nearest_first(channels: int) -> Carafe:
    block = _block(channels)
    block._reassemble = nearest_first  # type: ignore[method-assign]
    return block


DIFFERS = "differs from Carafe"

EXAMPLES = (
    Examples(
        _block,
        near_misses=[
            NearMiss(lambda c: Smooth(c, 8, k_up=3), DIFFERS, "no sum over 3x3 neighbours, row by row"),
        ],
        resizes=True,
    ),
    Examples(_nearest_first, resizes=True, variant="nearest first"),
)
