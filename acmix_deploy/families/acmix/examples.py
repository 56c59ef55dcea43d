"""Examples of ACmix blocks."""

import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.examples import Examples, NearMiss, softmax_over, with_part


class ZeroPadded(ACmix):
    """Zeros around the map instead of its reflection."""

    def _neighbours(self, x: Tensor) -> Tensor:
        return F.unfold(x, self.kernel_att, stride=self.stride, padding=self.kernel_att // 2)


def _block(channels: int) -> ACmix:
    return ACmix(channels, channels, 5, head=2)


def _curved(channels: int) -> nn.Module:
    return with_part(_block(channels), "conv_p", nn.Sequential(nn.Conv2d(2, channels // 2, 1), nn.Tanh()))


DIFFERS = "differs from ACmix"

EXAMPLES = (
    Examples(
        _block,
        near_misses=[
            NearMiss(lambda c: ZeroPadded(c, c, 5, head=2), DIFFERS, "relative residual"),
            NearMiss(_curved, "no 1x1 convolution from 2", "linear in the coordinates"),
            NearMiss(lambda c: softmax_over(_block(c), 3), DIFFERS, "Softmax runs over 12 values"),
        ],
        without_gradient={"conv_p.bias": slice(0, 4)},
    ),
)
