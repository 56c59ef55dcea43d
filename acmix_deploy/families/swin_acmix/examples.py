"""Examples of Swin's ACmix blocks."""

from acmix_deploy.families.examples import Examples
from acmix_deploy.families.swin_acmix.module import SwinACmix

EXAMPLES = Examples(
    lambda c: SwinACmix(c, 4, 2, shift_size=2),
    as_others_have_it=lambda c: SwinACmix(c, 4, 2),  # there the caller rolls the map
    channels_last=True,
    divisor=4,
)
