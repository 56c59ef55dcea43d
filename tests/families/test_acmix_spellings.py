"""ACmix in the spellings of others: what computes its numbers is one, in modules and in graphs, however written."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.families import canonicalise
from acmix_deploy.families.acmix.graph import ACMIX as FAMILY
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.forms import refused
from acmix_deploy.runtime.inputs import AXES
from tests.families.parts import (
    assert_fused,
    assert_left_alone_in_a_graph,
    assert_left_alone_in_a_module,
    export,
    randomised,
    relative_l2,
)


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
        shared_fc: bool = False,
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
            self.fc2 = self.fc if shared_fc else nn.Conv2d(3 * head, 9, 1, bias=False)
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
        if fault == "over x":
            self.beside = nn.Conv2d(planes, planes, 3, padding=1)
        if fault == "norm on logits":
            self.norm = nn.BatchNorm2d(head * window**2)

    def project(self, x: Tensor) -> list[Tensor]:
        if self.fault == "curved keys":
            return [self.conv1(x), self.conv2(x.relu()), self.conv3(x)]
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
            k, v = (torch.stack(self.slices(t), -1).view(b, n, d, h, w, area) for t in (k, v))
            logits = torch.einsum("bndhw,bndhwt->bnhwt", q.view(b, n, d, h, w), k)
            return torch.einsum("bnhwt,bndhwt->bndhw", logits.softmax(-1), v).reshape(b, n * d, h, w)
        if self.attention == "Tensor.unfold":
            k, v = (self.padded(t).view(b, n * d, h * s + self.window - 1, w * s + self.window - 1) for t in (k, v))
            k, v = (t.unfold(2, self.window, s).unfold(3, self.window, s) for t in (k, v))
            k, v = (t.reshape(b, n, d, h, w, area).permute(0, 1, 3, 4, 5, 2) for t in (k, v))  # as einops would
            weights = (k * q.view(b, n, d, h, w).permute(0, 1, 3, 4, 2).unsqueeze(4)).sum(-1).softmax(-1)
            y = (weights.unsqueeze(-1) * v).sum(4)
            return y.permute(0, 1, 4, 2, 3).reshape(b, n * d, h, w)
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
        if self.fault == "over x":
            convolved = convolved + self.beside(x)
        if len(self.norms):
            attended, convolved = self.norms[0](attended), self.norms[1](convolved)
        if self.rates != "none":
            rate1, rate2 = self.factors(x)
            attended, convolved = rate1 * attended, rate2 * convolved
        if self.residual == "before":
            y = x + attended
            y = (y.tanh() if self.fault == "within the sum" else y) + convolved
        elif self.residual == "queries":
            y = attended + convolved + q[:, :, :: self.stride, :: self.stride]
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
    "two convolutions of one fc averaged": {"second": 3, "shared_fc": True, "fc_bias": True},
    "einsum": {"attention": "einsum"},
    "Tensor.unfold": {"attention": "Tensor.unfold"},
    "matmul": {"attention": "matmul"},
    "split sums": {"attention": "split"},
    "strided": {"stride": 2, "norms": True, "fc_bias": True, "projections": "chunk"},
    "head_dim 3": {"planes": 9, "head": 3},
    "head_dim 8": {"head": 1, "window": 5},
    "head_dim 1": {"head": 8},
}
SOAK = ("queries added", "rates by softmax", "one projection reshaped", "no rates", "head_dim 8", "head_dim 1")
QUICK = [
    *((name, "torchscript", True) for name in SPELLINGS if name not in SOAK),
    *((name, "torchscript", False) for name in ("Tensor.unfold", "linear", "strided")),
    *((name, "dynamo", True) for name in ("matmul",)),
]
"""What is tried at each run, name, exporter and whether axes are free; `make soak` tries the others."""
EXPORTS = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.soak)
    for case in itertools.product(SPELLINGS, ("torchscript", "dynamo"), (False, True))
    if case != ("Tensor.unfold", "torchscript", True)  # which this exporter does not take
]


def x_of(options: dict[str, Any], *size: int) -> Tensor:
    return torch.randn(size[0], options.get("planes", 8), *size[1:], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "exporter", "free"), EXPORTS)
def test_spellings_fuse(name, exporter, free, tmp_path):
    options = SPELLINGS[name]
    model, x = spelled(**options), x_of(options, 2, 8, 12)
    axes: Any = AXES if free else ()
    divisor = options.get("stride", 1)
    source = export(model, x, tmp_path / "plain.onnx", exporter=exporter, dynamic=axes, divisor=divisor)
    assert_fused(FAMILY, model, source, x, *([x_of(options, 1, 6, 10)] if free else []))


@pytest.mark.parametrize(
    ("options", "branch"),
    [({"fc_bias": True, "rates": "per channel"}, "grouped"), ({"residual": "before"}, "grouped"),
     ({"residual": "queries", "stride": 2, "projections": "chunk"}, "dense"), ({"fault": "over x"}, "dense")],
    ids=str,
)  # fmt: skip
def test_the_form_of_the_convolution_is_told_as_it_is(options, branch, tmp_path):
    """Over q, k and v wherever all of it is, group by group, x itself apart."""
    model, x = spelled(**options), x_of(options, 2, 8, 12)
    source = export(model, x, tmp_path / "plain.onnx", dynamic=AXES)
    (block,) = assert_fused(FAMILY, model, source, x, x_of(options, 1, 6, 10), conv_branch="grouped").blocks
    assert block.settings["conv_branch"] == branch
    assert ("by_head_dim" in " ".join(n.name for n in onnx.load(tmp_path / "fused.onnx").graph.node)) == (
        branch == "grouped"
    )


@pytest.mark.parametrize(("planes", "head", "refusal"), [(9, 3, "head_dim 3"), (10, 2, "head_dim 5"), (16, 2, "")])
def test_any_head_dim_fuses_and_what_the_plugin_refuses_is_named(planes, head, refusal, tmp_path):
    options = {"planes": planes, "head": head}
    model, x = spelled(**options), x_of(options, 2, 8, 12)
    assert_fused(FAMILY, model, export(model, x, tmp_path / "plain.onnx", dynamic=AXES), x)
    found = refused(onnx.load(tmp_path / "fused.onnx"))
    assert found == ({"acmix_0.attention": refusal} if refusal else {})


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "rates made of x": ({"fault": "gate"}, "not linear: Sigmoid"),
    "norm on the logits": ({"fault": "norm on logits"}, "those of equal keys differ"),
    "softmax over rows": ({"fault": "another axis", "projections": "chunk"}, "Softmax runs over"),
    "ReLU between fc and dep_conv": ({"fault": "between", "fc_bias": True}, "not linear: Relu"),
    "5x5 beside 3x3": ({"second": 5}, "no 3x3 convolution"),
    "convolution of a reflected map": ({"fault": "reflected convolution", "norms": True}, "no 3x3 convolution"),
    "tanh within the sum": ({"fault": "within the sum", "residual": "before"}, "not linear: Tanh"),
    "ReLU before the projection of keys": ({"fault": "curved keys"}, "not from 1x1 convolutions of x"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_in_graphs(name, tmp_path):
    options, reason = NEAR_MISSES[name]
    model, x = spelled(**options), x_of(options, 2, 8, 12)
    source = export(model, x, tmp_path / "plain.onnx", dynamic=AXES)
    assert_left_alone_in_a_graph(FAMILY, model, source, x, reason)


# Modules.

ONLY_IN_GRAPHS = {"queries added": "differs from ACmix", "two convolutions averaged": "not three 1x1 convolutions"}
"""What the block's module cannot hold: queries beside its result, and maps of two fc."""


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name not in ONLY_IN_GRAPHS])
def test_spellings_are_replaced(name):
    options = SPELLINGS[name]
    model, x = spelled(**options), x_of(options, 2, 8, 12)
    block, (report,) = canonicalise(model)
    assert type(block) is ACmix, report
    assert (report.status, report.family) == ("replaced", "acmix")
    assert report.geometry == {
        "in_planes": model.planes, "out_planes": model.planes, "kernel_att": model.window, "head": model.head,
        "stride": model.stride,
    }  # fmt: skip
    assert relative_l2(block(x), model(x)) < FAMILY.tolerances["float32"].floor


@pytest.mark.parametrize("name", ONLY_IN_GRAPHS)
def test_what_modules_cannot_hold_is_named(name):
    assert_left_alone_in_a_module(FAMILY, Spelled(**SPELLINGS[name]), ONLY_IN_GRAPHS[name])


@pytest.mark.parametrize("name", [name for name in NEAR_MISSES if name != "5x5 beside 3x3"])
def test_near_misses_in_modules(name):
    assert_left_alone_in_a_module(FAMILY, Spelled(**NEAR_MISSES[name][0]), "")


def test_what_a_block_is_made_of_is_kept_or_computed():
    """Layers behind, rates that are parameters, and weights that are used as they are, are the original's own."""
    model = spelled(residual="before", tail=True, rates="per channel", fc_bias=True)
    block, _ = canonicalise(model)
    assert block.behind is model.tail
    assert (block.rate1 is model.rate1, block.rate2 is model.rate2) == (True, True)
    assert (block.conv2.weight is model.conv2.weight, block.fc.bias is model.fc.bias) == (True, True)
    assert block.kept.tolist() == pytest.approx([1])
    model = spelled(norms=True, projections="chunk")
    block, _ = canonicalise(model)
    assert block.dep_conv.weight is model.dep_conv.weight
    assert block.rate1.shape == (1, 8, 1, 1)
    assert block.behind is None
    assert sum(parameter.numel() for parameter in block.parameters()) > 0


def test_a_block_with_all_there_is_survives_the_whole_way(tmp_path):
    model, x = spelled(residual="before", tail=True, norms=True, fc_bias=True, projections="chunk"), x_of({}, 2, 8, 12)
    block, _ = canonicalise(model)
    copied = copy.deepcopy(block)
    copied.load_state_dict(block.state_dict())
    assert torch.equal(copied(x), block(x))
    assert relative_l2(copy.deepcopy(block).half()(x.half()), model(x)) < 1e-2
    source = export(block, x, tmp_path / "plain.onnx", dynamic=AXES)
    assert_fused(FAMILY, model, source, x, x_of({}, 1, 6, 10))
