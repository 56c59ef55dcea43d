"""Examples of CAFM blocks."""

import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.families.cafm.module import CAFM
from acmix_deploy.families.examples import Examples, NearMiss, softmax_over


class WithDepth(CAFM):
    """The layers are Conv3d, of maps with a depth of 1."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        for name, conv in [*self.named_children()]:
            assert isinstance(conv, nn.Conv2d)
            size = (conv.in_channels, conv.out_channels, conv.kernel_size[0])
            deep = nn.Conv3d(*size, padding=size[2] // 2, groups=conv.groups, bias=conv.bias is not None)
            setattr(self, name, deep)

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        qkv = self.qkv_dwconv(self.qkv(x.unsqueeze(2))).squeeze(2)
        rows = qkv.reshape(batch, height * width, 3 * self.num_heads, -1).permute(0, 2, 1, 3)
        mixed = self.fc(rows.unsqueeze(2)).squeeze(2).permute(0, 3, 1, 2)
        convolved = self.dep_conv(mixed.reshape(batch, 9 * dim // self.num_heads, height, width).unsqueeze(2))
        q, k, v = (part.reshape(batch, self.num_heads, -1, height * width) for part in qkv.chunk(3, 1))
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        attended = (logits.softmax(-1) @ v).reshape(batch, dim, height, width).unsqueeze(2)
        y: Tensor = self.project_out(attended).squeeze(2) + convolved.squeeze(2)
        return y


class Turned(CAFM):
    """What ``fc`` mixes is read with height and width in each other's place."""

    def _convolve(self, qkv: Tensor) -> Tensor:
        return super()._convolve(qkv.transpose(2, 3).reshape(qkv.shape))


class OfAnyLength(CAFM):
    """Rows of queries and keys are not brought to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv_dwconv(self.qkv(x))
        batch, _, height, width = x.shape
        q, k, v = qkv.reshape(batch, 3, self.num_heads, self.dim // self.num_heads, height * width).unbind(1)
        logits = q @ k.transpose(-2, -1) * self.temperature
        attended: Tensor = self.project_out((logits.softmax(-1) @ v).reshape(x.shape))
        return attended + self._convolve(qkv)


def _block(channels: int) -> CAFM:
    return CAFM(channels, 2)


DIFFERS = "differs from CAFM"

EXAMPLES = (
    Examples(
        _block,
        as_others_have_it=lambda c: WithDepth(c, 2),
        near_misses=[
            NearMiss(lambda c: Turned(c, 2), DIFFERS, "neither the maps of one pixel nor neighbours in memory"),
            NearMiss(lambda c: OfAnyLength(c, 2), DIFFERS, "not temperature times q.k of rows of length 1"),
            NearMiss(lambda c: softmax_over(_block(c), -2), DIFFERS, "not one map of channels"),
        ],
    ),
)
