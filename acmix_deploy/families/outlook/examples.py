"""Examples of outlook attention."""

from acmix_deploy.families.examples import Examples
from acmix_deploy.families.outlook.module import OutlookAttention

EXAMPLES = Examples(lambda c: OutlookAttention(c, 2, stride=2, qkv_bias=True), channels_last=True)
