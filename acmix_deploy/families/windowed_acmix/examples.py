"""Examples of windowed ACmix blocks."""

from acmix_deploy.families.examples import Examples
from acmix_deploy.families.windowed_acmix.module import WindowedACmix

EXAMPLES = Examples(lambda c: WindowedACmix(c, 7, 2), channels_last=True, without_gradient={"qkv.bias": slice(8, 16)})
