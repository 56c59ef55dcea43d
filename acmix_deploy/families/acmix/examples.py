"""Examples of ACmix blocks."""

from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.examples import Examples

EXAMPLES = Examples(lambda c: ACmix(c, c, 5, head=2), without_gradient={"conv_p.bias": slice(0, 4)})
