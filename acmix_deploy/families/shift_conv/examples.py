"""Examples of convolutions in two stages."""

from acmix_deploy.families.examples import Examples
from acmix_deploy.families.shift_conv.module import ShiftConv

EXAMPLES = Examples(lambda c: ShiftConv(c, c))
