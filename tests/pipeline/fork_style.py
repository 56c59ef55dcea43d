"""What a changed copy of Ultralytics has in its nn/modules/block.py: its own wrappers around ACmix, written for tests
under the names that such copies give them. The text of this file is put at the end of that one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.families.test_recognise_module import Port


class ACmix(Port):
    def __init__(self, c: int) -> None:
        super().__init__(c, c, 2)


class C2f_ACmix(nn.Module):
    """The input twice, each half as wide; every block reads what the one before it wrote, and all are joined."""

    def __init__(self, c1: int, c2: int, n: int = 1) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1 = nn.Conv2d(c1, 2 * self.c, 1)
        self.m = nn.ModuleList(self.block() for _ in range(n))
        self.cv2 = nn.Conv2d((2 + n) * self.c, c2, 1)

    def block(self) -> nn.Module:
        return ACmix(self.c)

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            maps.append(block(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


class C3k2_ACmix(C2f_ACmix):
    """Between two convolutions, and beside them."""

    def block(self) -> nn.Module:
        return Bottleneck_ACmix(self.c)


class Bottleneck_ACmix(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.att, self.cv2 = nn.Conv2d(c, c, 3, 1, 1), ACmix(c), nn.Conv2d(c, c, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.att(self.cv1(x)))


class C2PSA_ACmix(nn.Module):
    """One half passes by; the other goes through attention and a network of two layers, each with its sum."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.c = c1 // 2
        self.cv1, self.cv2 = nn.Conv2d(c1, 2 * self.c, 1), nn.Conv2d(2 * self.c, c2, 1)
        self.attn = ACmix(self.c)
        self.ffn = nn.Sequential(nn.Conv2d(self.c, 2 * self.c, 1), nn.SiLU(), nn.Conv2d(2 * self.c, self.c, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cv1(x).split((self.c, self.c), 1)
        b = b + self.attn(b)
        return self.cv2(torch.cat((a, b + self.ffn(b)), 1))
