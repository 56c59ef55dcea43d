"""ACmix in the spellings of others: what computes a block's numbers is one, in modules and in graphs, however written."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.families.acmix.graph import ACMIX as FAMILY
from acmix_deploy.runtime.inputs import AXES
from tests.families.parts import assert_fused, assert_left_alone_in_a_graph, export, operators, randomised


class Spelled(nn.Module):
    """A block whose parts are written as keywords say; the attention is independent of the package's module."""

    def __init__(
        self,
        planes: int = 8,
        head: int = 2,
        window: int = 3,
        stride: int = 1,
        *,
        projections: str = "three",
        attention: str = "unfold",
        rates: str = "scalar",
        norms: bool = False,
        residual: str = "",
        fc_bias: bool = False,
        second: int = 0,
        tail: bool = False,
        fault: str = "",
    ) -> None:
        super().__init__()
        d = planes // head
        self.planes, self.head, self.d, self.window, self.stride = planes, head, d, window, stride
        self.projections, self.attention, self.rates, self.residual, self.fault = (
            projections, attention, rates, residual, fault,
        )  # fmt: skip
        if projections == "three":
            self.conv1, self.conv2, self.conv3 = (nn.Conv2d(planes, planes, 1) for _ in range(3))
        elif projections == "linear":
            self.qkv = nn.Linear(planes, 3 * planes)
        else:
            self.qkv = nn.Conv2d(planes, 3 * planes, 1)
        self.conv_p = nn.Conv2d(2, d, 1)
        self.fc = nn.Conv2d(3 * head, 9, 1, bias=fc_bias)
        mode = "reflect" if fault == "reflected convolution" else "zeros"
        self.dep_conv = nn.Conv2d(9 * d, planes, 3, stride, 1, groups=d, bias=False, padding_mode=mode)
        if second:
            self.fc2 = nn.Conv2d(3 * head, 9, 1, bias=False)
            self.dep_conv2 = nn.Conv2d(9 * d, planes, second, stride, second // 2, groups=d)
        shape = {"scalar": (1,), "sigmoid": (1,), "per channel": (1, planes, 1, 1)}.get(rates)
        if shape:
            self.rate1, self.rate2 = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
        elif rates == "softmax":
            self.rates_of = nn.Parameter(torch.ones(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(planes) for _ in range(2 * norms))
        self.tail = (
            nn.Sequential(nn.Conv2d(planes, planes, 1, bias=False), nn.BatchNorm2d(planes), nn.SiLU()) if tail else None
        )
        if fault == "norm on logits":
            self.norm = nn.BatchNorm2d(head * window**2)

    def project(self, x: Tensor) -> list[Tensor]:
        if self.projections == "three":
            return [self.conv1(x), self.conv2(x), self.conv3(x)]
        if self.projections == "linear":
            return [part.permute(0, 3, 1, 2) for part in self.qkv(x.permute(0, 2, 3, 1)).chunk(3, -1)]
        qkv = self.qkv(x)
        if self.projections == "chunk":
            return [*qkv.chunk(3, 1)]
        if self.projections == "values first":
            v, q, k = torch.split(qkv, self.planes, 1)
            return [q, k, v]
        b, _, h, w = qkv.shape
        if self.projections == "by head":
            parts = qkv.view(b, self.head, 3, self.d, h, w).permute(2, 0, 1, 3, 4, 5)
        else:  # reshape
            parts = qkv.reshape(b, 3, self.planes, h, w).transpose(0, 1)
        return [part.reshape(b, self.planes, h, w) for part in (parts[0], parts[1], parts[2])]

    def position(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        row, column = (torch.arange(n, device=x.device).to(x.dtype) for n in (h, w))
        y, x = row * 2 / row[-1:] - 1, column * 2 / column[-1:] - 1
        place: Tensor = self.conv_p(torch.stack([x.expand(h, w), y.unsqueeze(1).expand(h, w)])[None])
        return place

    def padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (self.window // 2,) * 4, mode="reflect")

    def slices(self, x: Tensor) -> list[Tensor]:
        x, s = self.padded(x), self.stride
        h, w = (n - self.window + 1 for n in x.shape[2:])
        return [x[:, :, i : i + h : s, j : j + w : s] for i in range(self.window) for j in range(self.window)]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, h, w = q.shape
        n, d, s, area = self.head, self.d, self.stride, self.window**2
        p = self.position(q)
        k = (k - p.repeat(1, n, 1, 1)).view(b, n * d, *q.shape[2:])  # what q adds by its own position drops out
        h, w = h // s, w // s
        q = q[:, :, ::s, ::s] * d**-0.5
        if self.attention == "split":
            logits = torch.stack([(q * near).view(b, n, d, h, w).sum(2) for near in self.slices(k)], 2)
            weights = logits.softmax(2).unbind(2)
            total: Any = 0
            for weight, near in zip(weights, self.slices(v), strict=True):
                total = total + weight.unsqueeze(2) * near.view(b, n, d, h, w)
            return total.reshape(b, n * d, h, w)
        if self.attention == "einsum":
            size = self.window
            k, v = (self.padded(t).unfold(2, size, s).unfold(3, size, s).reshape(b, n, d, h, w, area) for t in (k, v))
            logits = torch.einsum("bndhw,bndhwt->bnhwt", q.view(b, n, d, h, w), k)
            return torch.einsum("bnhwt,bndhwt->bndhw", logits.softmax(-1), v).reshape(b, n * d, h, w)
        k, v = (F.unfold(self.padded(t), self.window, stride=s) for t in (k, v))
        if self.attention == "matmul":
            k, v = (t.view(b, n, d, area, h * w).permute(0, 4, 1, 2, 3) for t in (k, v))
            q = q.view(b, n, d, h * w).permute(0, 3, 1, 2).unsqueeze(3)
            y = (q @ k).softmax(-1) @ v.transpose(-2, -1)
            return y.reshape(b, h, w, n * d).permute(0, 3, 1, 2)
        k, v = (t.view(b, n, d, area, h, w) for t in (k, v))
        logits = (q.view(b, n, d, 1, h, w) * k).sum(2)
        if self.fault == "norm on logits":
            logits = self.norm(logits.reshape(b, -1, h, w)).view_as(logits)
        weights = logits.softmax(3 if self.fault == "another axis" else 2)
        return (weights.unsqueeze(2) * v).sum(3).reshape(b, n * d, h, w)

    def convolve(self, q: Tensor, k: Tensor, v: Tensor, fc: nn.Module, dep_conv: nn.Module) -> Tensor:
        b, _, h, w = q.shape
        maps = fc(torch.cat([part.view(b, self.head, self.d, h * w) for part in (q, k, v)], 1))
        if self.fault == "between":
            maps = maps.relu()
        shifted: Tensor = dep_conv(maps.permute(0, 2, 1, 3).reshape(b, -1, h, w))
        return shifted

    def factors(self, x: Tensor) -> list[Any]:
        if self.fault == "gate":
            return [x.mean((2, 3), keepdim=True).sigmoid(), 1 - x.mean((2, 3), keepdim=True).sigmoid()]
        if self.rates == "none":
            return [1, 1]
        if self.rates == "softmax":
            rates = self.rates_of.softmax(0)
            return [rates[0], rates[1]]
        rates = [self.rate1, self.rate2]
        return [rate.sigmoid() for rate in rates] if self.rates == "sigmoid" else rates

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        attended, convolved = self.attend(q, k, v), self.convolve(q, k, v, self.fc, self.dep_conv)
        if hasattr(self, "fc2"):
            convolved = (convolved + self.convolve(q, k, v, self.fc2, self.dep_conv2)) / 2
        if len(self.norms):
            attended, convolved = self.norms[0](attended), self.norms[1](convolved)
        if self.rates != "none":
            rate1, rate2 = self.factors(x)
            attended, convolved = rate1 * attended, rate2 * convolved
        if self.residual == "before":
            y = x + attended
            y = (y.tanh() if self.fault == "within the sum" else y) + convolved
        elif self.residual == "queries":
            y = attended + convolved + q
        else:
            y = attended + convolved
        return self.tail(y) if self.tail else y


def spelled(**options: Any) -> Spelled:
    return randomised(Spelled(**options))


SPELLINGS: dict[str, dict[str, Any]] = {
    "x + attention + convolution": {"residual": "before"},
    "queries added": {"residual": "queries"},
    "norm on each branch": {"norms": True},
    "layers behind": {"tail": True},
    "chunked": {"projections": "chunk"},
    "split, values first": {"projections": "values first"},
    "one projection by head": {"projections": "by head"},
    "one projection reshaped": {"projections": "reshape"},
    "linear": {"projections": "linear"},
    "rates per channel": {"rates": "per channel"},
    "rates by sigmoid": {"rates": "sigmoid"},
    "rates by softmax": {"rates": "softmax"},
    "no rates": {"rates": "none"},
    "bias of fc": {"fc_bias": True},
    "two convolutions averaged": {"second": 3},
    "Tensor.unfold and einsum": {"attention": "einsum"},
    "matmul": {"attention": "matmul"},
    "split sums": {"attention": "split"},
    "strided": {"stride": 2, "norms": True, "fc_bias": True, "projections": "chunk"},
    "head_dim 3": {"planes": 9, "head": 3},
    "head_dim 8": {"head": 1, "window": 5},
    "head_dim 1": {"head": 8},
}
BY_DYNAMO = ("split, values first", "layers behind", "matmul")
"""Of dynamo's graphs with free axes these are tried at each run, the others by `make soak`."""


def x_of(options: dict[str, Any], *size: int) -> Tensor:
    return torch.randn(size[0], options.get("planes", 8), *size[1:], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dynamic", [(), AXES], ids=["static", "dynamic"])
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_fuse(name, exporter, dynamic, tmp_path, request):
    if exporter == "dynamo" and not (dynamic and name in BY_DYNAMO) and not request.config.getoption("--soak", False):
        pytest.skip("dynamo")
    options = SPELLINGS[name]
    model, x = spelled(**options), x_of(options, 2, 8, 12)
    source = export(
        model, x, tmp_path / "plain.onnx", exporter=exporter, dynamic=dynamic, divisor=options.get("stride", 1)
    )
    others = [x_of(options, 1, 6, 10)] if dynamic else []
    assert_fused(FAMILY, model, source, x, *others)
