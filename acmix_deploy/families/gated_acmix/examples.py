"""Examples of gated ACmix blocks."""

from acmix_deploy.families.examples import Examples
from acmix_deploy.families.gated_acmix.module import GatedACmix

EXAMPLES = Examples(lambda c: GatedACmix(c, 2, hidden=8), without_gradient={"attention.in_proj_bias": slice(8, 16)})
