"""Examples of gated ACmix blocks."""

from torch import Tensor, nn

from acmix_deploy.families.examples import Examples, NearMiss, softmax_over, with_part
from acmix_deploy.families.gated_acmix.module import GatedACmix


class GateOfTheConvolution(GatedACmix):
    """The gate reads the result of the convolution."""

    def forward(self, x: Tensor) -> Tensor:
        convolved = self.conv(x)
        gate = self.gate(convolved)[:, :, None, None]
        y: Tensor = gate[:, :1] * convolved + gate[:, 1:] * self._attend(convolved)
        return y


class BeforeTheReLU(GatedACmix):
    """The attention reads what the ReLU gets."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)[:, :, None, None]
        convolved = self.conv[:2](x)
        y: Tensor = gate[:, :1] * convolved.relu() + gate[:, 1:] * self._attend(convolved)
        return y


class Shifted(GatedACmix):
    """The windows begin one pixel further, and go around."""

    def _attend(self, x: Tensor) -> Tensor:
        return super()._attend(x.roll((1, 1), (2, 3))).roll((-1, -1), (2, 3))


def _block(channels: int) -> GatedACmix:
    return GatedACmix(channels, 2, hidden=8)


def _in_series(channels: int) -> GatedACmix:
    return GatedACmix(channels, 2, hidden=8, in_series=True)


def _in_windows(channels: int) -> GatedACmix:
    return GatedACmix(channels, 2, hidden=8, in_series=True, window_size=4)


DIFFERS = "differs from GatedACmix"
BLIND = {"attention.in_proj_bias": slice(8, 16)}

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
        without_gradient=BLIND,
    ),
    Examples(
        _in_series,
        near_misses=[
            NearMiss(lambda c: GateOfTheConvolution(c, 2, in_series=True), DIFFERS, "do not read one tensor"),
            NearMiss(lambda c: BeforeTheReLU(c, 2, in_series=True), DIFFERS, "do not read one tensor"),
            NearMiss(
                lambda c: with_part(_in_series(c), "conv.2", nn.Identity()),
                DIFFERS,
                "does not weigh the ReLU of a convolution",
            ),
            NearMiss(
                lambda c: with_part(_in_series(c), "gate.5", nn.Softmax(1)),
                DIFFERS,
                "weighed by Softmax, not by the Sigmoid",
            ),
        ],
        without_gradient=BLIND,
        variant="in series",
    ),
    Examples(
        _in_windows,
        near_misses=[
            NearMiss(lambda c: Shifted(c, 2, window_size=4), DIFFERS, None),
        ],
        divisor=4,
        without_gradient=BLIND,
        variant="in series, windows",
    ),
)
