"""Examples of involution."""

import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.families.examples import Examples, NearMiss, with_part
from acmix_deploy.families.involution.module import Involution


class Reflected(nn.Unfold):
    """The map's reflection around it instead of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return F.unfold(F.pad(x, [1, 1, 1, 1], mode="reflect"), 3)


class ByColumns(nn.Unfold):
    """Neighbours column by column, whose weights are row by row."""

    def forward(self, x: Tensor) -> Tensor:
        neighbours = super().forward(x)
        by_row = neighbours.reshape(len(x), -1, 3, 3, neighbours.shape[2])
        return by_row.transpose(2, 3).reshape(neighbours.shape)


class Bounded(nn.Unfold):
    """Neighbours below 0 left out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def _block(channels: int) -> Involution:
    return Involution(channels, 3, group_channels=4)


def _near_miss(unfold: type[nn.Unfold], reason: str | None) -> NearMiss:
    return NearMiss(
        lambda channels: with_part(_block(channels), "unfold", unfold(3, padding=1)),
        "differs from Involution",
        reason,
    )


EXAMPLES = (
    Examples(
        _block,
        near_misses=[
            _near_miss(Reflected, "not surrounded by zeros"),
            _near_miss(ByColumns, "no sum over 3x3 neighbours, row by row"),
            _near_miss(Bounded, None),
        ],
    ),
    Examples(lambda channels: Involution(channels, 5, 2, group_channels=8), divisor=2, resizes=True, variant="strided"),
)
