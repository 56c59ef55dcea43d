"""Examples of Swin's ACmix blocks."""

from torch import nn

from acmix_deploy.families.examples import Examples, NearMiss, softmax_over, with_part
from acmix_deploy.families.swin_acmix.module import SwinACmix


def _block(channels: int) -> SwinACmix:
    """As others have it: the caller rolls the map."""
    return SwinACmix(channels, 4, 2)


def _reflected(channels: int) -> nn.Module:
    conv = nn.Conv2d(9 * channels // 2, channels, 3, 1, 1, groups=channels // 2, bias=False, padding_mode="reflect")
    return with_part(_block(channels), "dep_conv", conv)


DIFFERS = "differs from SwinACmix"

EXAMPLES = (
    Examples(
        lambda c: SwinACmix(c, 4, 2, shift_size=2),
        as_others_have_it=_block,
        near_misses=[
            NearMiss(_reflected, DIFFERS, "with padding 1"),
            NearMiss(lambda c: softmax_over(_block(c), -2), DIFFERS, "does not run over the keys"),
        ],
        channels_last=True,
        divisor=4,
    ),
)
