"""Examples of windowed ACmix blocks."""

from torch import Tensor

from acmix_deploy.families.examples import Examples, NearMiss, softmax_over
from acmix_deploy.families.windowed_acmix.module import WindowedACmix


class PaddingAttended(WindowedACmix):
    """Pixels outside of the map are attended to."""

    def _mask(self, x: Tensor, rows: int, columns: int) -> Tensor:
        return super()._mask(x, rows, columns).relu()


def _block(channels: int) -> WindowedACmix:
    return WindowedACmix(channels, 7, 2)


DIFFERS = "differs from WindowedACmix"

EXAMPLES = (
    Examples(
        _block,
        near_misses=[
            NearMiss(lambda c: PaddingAttended(c, 7, 2), DIFFERS, "only pad the map are attended"),
            NearMiss(lambda c: softmax_over(_block(c), -2), DIFFERS, "does not run over the keys"),
        ],
        channels_last=True,
        without_gradient={"qkv.bias": slice(8, 16)},
    ),
)
