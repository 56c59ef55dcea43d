"""Examples of gated ACmix blocks."""

from torch import nn

from acmix_deploy.families.examples import Examples, NearMiss, softmax_over, with_part
from acmix_deploy.families.gated_acmix.module import GatedACmix


def _block(channels: int) -> GatedACmix:
    return GatedACmix(channels, 2, hidden=8)


DIFFERS = "differs from GatedACmix"

EXAMPLES = (
    Examples(
        _block,
        near_misses=[
            NearMiss(
                lambda c: with_part(_block(c), "gate.5", nn.Softmax(1)),
                DIFFERS,
                "weighed by Softmax, not by the Sigmoid",
            ),
            NearMiss(
                lambda c: with_part(_block(c), "gate.0", nn.AdaptiveMaxPool2d(1)),
                DIFFERS,
                "with a ReLU between them of a mean",
            ),
            NearMiss(lambda c: softmax_over(_block(c), -2), DIFFERS, "does not run over the keys"),
        ],
        without_gradient={"attention.in_proj_bias": slice(8, 16)},
    ),
)
