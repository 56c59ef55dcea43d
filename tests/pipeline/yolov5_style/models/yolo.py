"""A model from a dictionary as YOLOv5 and YOLOv7 write it in YAML, with their heads on anchors."""

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
        self.no = nc + 5
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
            elif issubclass(module, Detect):
                arguments = [cfg["nc"], cfg["anchors"], given]
            repeated = [module(*arguments) for _ in range(max(1, round(number * cfg["depth_multiple"])))]
            layer: Any = nn.Sequential(*repeated) if len(repeated) > 1 else repeated[0]
            layer.i, layer.f, layer.type = index, source, str(module)
            layers.append(layer)
            channels.append(out)
        self.model = nn.Sequential(*layers)
        head: Any = layers[-1]
        head.stride = torch.tensor([128 / y.shape[-2] for y in self.train()(torch.zeros(1, 3, 128, 128))])
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
