"""Examples of convolutions in two stages."""

import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.families.examples import Examples, NearMiss, with_part
from acmix_deploy.families.shift_conv.module import ShiftConv


class Reflected(ShiftConv):
    """The maps are reflected at the border, not cut off."""

    def forward(self, x: Tensor) -> Tensor:
        maps = F.pad(self.pointwise(x), (1, 1, 1, 1), mode="reflect")
        return F.conv2d(maps, self.shifts, self.bias, groups=self.out_channels)


def _rectified(channels: int) -> nn.Module:
    pointwise = nn.Sequential(nn.Conv2d(channels, 9 * channels, 1, bias=False), nn.ReLU())
    return with_part(ShiftConv(channels, channels), "pointwise", pointwise)


def _trained(channels: int) -> nn.Module:
    block = ShiftConv(channels, channels)
    return with_part(block, "shifts", block.shifts + 0.1)


EXAMPLES = (
    Examples(
        lambda c: ShiftConv(c, c),
        near_misses=[
            NearMiss(lambda c: Reflected(c, c), None, "something else"),
            NearMiss(_rectified, "neither a 1x1 convolution nor a shift", None),
            NearMiss(_trained, "add several maps at one place", None),
        ],
    ),
)
