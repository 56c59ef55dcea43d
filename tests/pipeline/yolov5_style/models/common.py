"""Layers under the names that YOLOv5 and YOLOv7 give them, written for tests in their forms, but smaller."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.families.test_recognise_module import Port


class Conv(nn.Module):
    """Convolution, batch normalisation, SiLU."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class C3(nn.Module):
    """YOLOv5: a residual path beside a direct one."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2, self.cv3 = Conv(c1, c2 // 2), Conv(c1, c2 // 2), Conv(c2, c2)
        self.m = nn.Sequential(Conv(c2 // 2, c2 // 2), Conv(c2 // 2, c2 // 2, 3))
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        y = y + self.m(y) if self.add else self.m(y)
        return self.cv3(torch.cat((y, self.cv2(x)), 1))


class SPPF(nn.Module):
    """YOLOv5: what is pooled once, twice and three times."""

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c1 // 2), Conv(2 * c1, c2)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.m(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


class MP(nn.MaxPool2d):
    """YOLOv7: half the height and width."""

    def __init__(self, k: int = 2) -> None:
        super().__init__(k, k)


class RepConv(nn.Module):
    """YOLOv7: a 3x3 and a 1x1 branch, and where the sizes agree the input itself."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(c1) if c1 == c2 else None
        self.rbr_dense = nn.Sequential(nn.Conv2d(c1, c2, 3, 1, 1, bias=False), nn.BatchNorm2d(c2))
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(c1, c2, 1, bias=False), nn.BatchNorm2d(c2))
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return self.act(y if self.rbr_identity is None else y + self.rbr_identity(x))


class Concat(nn.Module):
    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        self.d = dimension

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, self.d)


class ACmix(Port):
    """Somebody's own, with the arguments that a YAML file gives it."""

    def __init__(self, c1: int, c2: int, kernel_att: int = 7, head: int = 4) -> None:
        super().__init__(c1, c2, head, kernel_att)
