"""Examples of outlook attention."""

import torch
from torch import nn

from acmix_deploy.families.examples import Examples, NearMiss, softmax_over, with_part
from acmix_deploy.families.outlook.module import OutlookAttention


def _block(channels: int) -> OutlookAttention:
    return OutlookAttention(channels, 2, stride=2, qkv_bias=True)


DIFFERS = "differs from OutlookAttention"

EXAMPLES = (
    Examples(
        _block,
        near_misses=[
            NearMiss(
                lambda c: with_part(_block(c), "pool", nn.MaxPool2d(2, ceil_mode=True)), DIFFERS, "from one tensor"
            ),
            NearMiss(
                lambda c: with_part(_block(c), "places", torch.eye(9).flip(1).view(9, 1, 3, 3)),
                DIFFERS,
                "something else",
            ),
            NearMiss(lambda c: softmax_over(_block(c), 3), DIFFERS, "something else"),
        ],
        channels_last=True,
    ),
)
