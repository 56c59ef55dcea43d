"""A model from a dictionary as YOLOv5, YOLOv7 and YOLOv9 write it in YAML, with heads that give what theirs do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models import common

_SCALED = common.Conv, common.C3, common.SPPF, common.RepConv, common.ACmix


class Detect(nn.Module):
    """[B, boxes, 5 + classes] of all maps, in pixels, and the maps themselves; in training the maps alone."""

    def __init__(self, nc: int, anchors: list[list[float]], channels: list[int]) -> None:
        super().__init__()
        self.nc, self.no = nc, nc + 5
        self.stride = torch.ones(len(anchors))
        self.grid = [torch.zeros(1)] * len(anchors)  # kept from one image to the next
        self.register_buffer("anchors", torch.tensor(anchors).view(len(anchors), -1, 2))
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * len(anchors[0]) // 2, 1) for c in channels)

    def raw(self, index: int, x: Tensor) -> Tensor:
        return self.m[index](x)

    def forward(self, x: list[Tensor]) -> Any:
        found = []
        for index in range(len(self.m)):
            y = self.raw(index, x[index])
            batch, _, height, width = y.shape
            x[index] = y.view(batch, -1, self.no, height, width).permute(0, 1, 3, 4, 2).contiguous()
            if self.training:
                continue
            if self.grid[index].shape[2:4] != x[index].shape[2:4]:
                rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
                self.grid[index] = torch.stack((columns, rows), 2).view(1, 1, height, width, 2).float()
            y = x[index].sigmoid()
            centres = (y[..., 0:2] * 2 - 0.5 + self.grid[index]) * self.stride[index]
            sizes = (y[..., 2:4] * 2) ** 2 * self.anchors[index].view(1, -1, 1, 1, 2)
            found.append(torch.cat((centres, sizes, y[..., 4:]), -1).view(batch, -1, self.no))
        return x if self.training else (torch.cat(found, 1), x)


class Implicit(nn.Module):
    def __init__(self, channels: int, mean: float) -> None:
        super().__init__()
        self.implicit = nn.Parameter(mean + 0.02 * torch.randn(1, channels, 1, 1))


class IDetect(Detect):
    """YOLOv7: learnt vectors are added before the last convolutions and multiplied after them."""

    def __init__(self, nc: int, anchors: list[list[float]], channels: list[int]) -> None:
        super().__init__(nc, anchors, channels)
        self.ia = nn.ModuleList(Implicit(c, 0.0) for c in channels)
        self.im = nn.ModuleList(Implicit(layer.out_channels, 1.0) for layer in self.m)

    def raw(self, index: int, x: Tensor) -> Tensor:
        return self.im[index].implicit * self.m[index](x + self.ia[index].implicit)


class Segment(Detect):
    """YOLOv5: each box weighs prototypes, too. Its export switch leaves out the maps."""

    export = False

    def __init__(self, nc: int, anchors: list[list[float]], nm: int, channels: list[int]) -> None:
        super().__init__(nc, anchors, channels)
        self.nm, self.no = nm, self.no + nm
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * len(anchors[0]) // 2, 1) for c in channels)
        self.proto = nn.Conv2d(channels[0], nm, 1)
        self.detect = Detect.forward  # a function on the module, as theirs has one

    def forward(self, x: list[Tensor]) -> Any:
        prototypes = self.proto(x[0])
        found = self.detect(self, x)
        return (found, prototypes) if self.training else (found[0], prototypes, found[1])


class DualDetect(nn.Module):
    """YOLOv9: [B, 4 + classes, boxes] of an auxiliary branch, then of the main one, and the maps of both. Distances to
    the sides of a box are the mean over ``reg_max`` steps."""

    dynamic = False
    shape: Any = None

    def __init__(self, nc: int, channels: list[int]) -> None:
        super().__init__()
        self.nc, self.nl, self.reg_max = nc, len(channels) // 2, 4
        self.no = nc + 4 * self.reg_max
        self.stride = torch.ones(self.nl)
        self.places, self.steps = torch.empty(0), torch.empty(0)
        self.m = nn.ModuleList(nn.Conv2d(c, self.no, 1) for c in channels)

    def forward(self, x: list[Tensor]) -> Any:
        maps = [layer(y) for layer, y in zip(self.m, x, strict=True)]
        branches = maps[: self.nl], maps[self.nl :]
        if self.training:
            return list(branches)
        if self.dynamic or self.shape != x[0].shape:
            self.shape = x[0].shape
            self.places, self.steps = self.anchors_of(branches[0])
        return [self.decode(branch) for branch in branches], list(branches)

    def anchors_of(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        places, steps = [], []
        for y, stride in zip(maps, self.stride, strict=True):
            rows, columns = torch.meshgrid(*(torch.arange(n) + 0.5 for n in y.shape[2:]), indexing="ij")
            places.append(torch.stack((columns, rows)).reshape(2, -1))
            steps.append(stride.expand(1, places[-1].shape[1]))
        return torch.cat(places, 1), torch.cat(steps, 1)

    def decode(self, maps: list[Tensor]) -> Tensor:
        values = torch.cat([y.flatten(2) for y in maps], 2)
        sides, scores = values.split((4 * self.reg_max, self.nc), 1)
        chances = sides.unflatten(1, (4, self.reg_max)).softmax(2)
        near, far = (chances * torch.arange(self.reg_max).view(1, 1, -1, 1)).sum(2).chunk(2, 1)
        first, last = self.places - near, self.places + far
        return torch.cat((torch.cat(((first + last) / 2, last - first), 1) * self.steps, scores.sigmoid()), 1)


class DualSegment(DualDetect):
    """YOLOv9: of both branches what weighs prototypes; given are those of the main one."""

    def __init__(self, nc: int, nm: int, channels: list[int]) -> None:
        super().__init__(nc, channels)
        self.nm = nm
        self.weights = nn.ModuleList(nn.Conv2d(c, nm, 1) for c in channels[self.nl :])
        self.proto = nn.Conv2d(channels[self.nl], nm, 1)

    def forward(self, x: list[Tensor]) -> Any:
        prototypes = self.proto(x[self.nl])
        weights = torch.cat([layer(y).flatten(2) for layer, y in zip(self.weights, x[self.nl :], strict=True)], 2)
        found = super().forward(x)
        if self.training:
            return found
        return torch.cat((found[0][1], weights), 1), (found[1][1], weights, prototypes)


class Panoptic(DualSegment):
    """YOLOv9: what every pixel is, too."""

    sem_nc = 6

    def forward(self, x: list[Tensor]) -> Any:
        pixels = x[self.nl][:, : self.sem_nc]
        found = super().forward(x)
        return found if self.training else (*found, pixels)


class Model(nn.Module):
    """Layers [from, number, module, arguments], read from first to last."""

    def __init__(self, cfg: dict[str, Any]) -> None:
        super().__init__()
        self.yaml = cfg
        self.names = [str(index) for index in range(cfg["nc"])]
        channels, layers = [3], []
        for index, (source, number, kind, stated) in enumerate(cfg["backbone"] + cfg["head"]):
            module = getattr(common, kind, None) or globals().get(kind) or getattr(nn, kind.removeprefix("nn."))
            sources = [s if s < 0 else s + 1 for s in ([source] if isinstance(source, int) else source)]
            given = [channels[s] for s in sources]
            arguments = [None if argument == "None" else argument for argument in stated]
            out = sum(given) if module is common.Concat else given[0]
            if module in _SCALED:
                out = int(arguments[0] * cfg["width_multiple"])
                arguments = [given[0], out, *arguments[1:]]
            elif issubclass(module, (Detect, DualDetect)):
                arguments = [cfg["anchors"] if a == "anchors" else cfg["nc"] if a == "nc" else a for a in arguments]
                arguments.append(given)
            repeated = [module(*arguments) for _ in range(max(1, round(number * cfg["depth_multiple"])))]
            layer: Any = nn.Sequential(*repeated) if len(repeated) > 1 else repeated[0]
            layer.i, layer.f, layer.type = index, source, str(module)
            layers.append(layer)
            channels.append(out)
        self.model = nn.Sequential(*layers)
        head: Any = layers[-1]
        maps = self.train()(torch.zeros(1, 3, 128, 128))
        while not isinstance(maps[0], Tensor):  # of the branch before, of the boxes before the prototypes
            maps = maps[0]
        head.stride = torch.tensor([128 / (y.shape[2] if y.dim() == 5 else y.shape[-2]) for y in maps])
        self.stride = head.stride

    def forward(self, x: Tensor) -> Any:
        maps: list[Any] = []
        for layer in self.model:
            if isinstance(layer.f, list):
                x = [x if source == -1 else maps[source] for source in layer.f]
            elif layer.f != -1:
                x = maps[layer.f]
            x = layer(x)
            maps.append(x)
        return x
