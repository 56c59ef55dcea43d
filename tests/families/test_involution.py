"""Involution: the module by definition, blocks as others write them in modules and graphs, and what is none."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acmix_deploy.errors import UserError
from acmix_deploy.families import canonicalise
from acmix_deploy.families.involution.graph import INVOLUTION
from acmix_deploy.families.involution.module import Involution
from acmix_deploy.fusion import fuse
from acmix_deploy.operators.reassembly import REASSEMBLY
from tests.families.parts import (
    assert_left_alone_in_a_graph,
    assert_left_alone_in_a_module,
    export,
    exports_of,
    operators,
    outputs,
    randomised,
    relative_l2,
)

FLOAT32 = REASSEMBLY.tolerances["float32"].floor


def conv(before: int, after: int, act: nn.Module | None, *, norm: bool = True) -> nn.Module:
    layers = [nn.Conv2d(before, after, 1, bias=not norm), nn.BatchNorm2d(after) if norm else None, act]
    return nn.Sequential(*filter(None, layers))


class Written(nn.Module):
    """Involution in the words of those who paste it: ``sums`` is how they weigh, the others what else they vary."""

    def __init__(
        self,
        channels: int = 8,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 2,
        *,
        sums: str = "mul",
        act: nn.Module | None = None,
        last: nn.Module | None = None,
        functional: bool = False,
        declare: bool = True,
    ) -> None:
        super().__init__()
        self.k, self.s, self.g, self.sums, self.functional = kernel, stride, groups, sums, functional
        self.reduce = conv(channels, channels // 2, None if functional else act or nn.ReLU())
        self.span = conv(channels // 2, groups * kernel**2, last, norm=last is not None)
        self.pool = nn.AvgPool2d(stride, stride)
        if declare:
            self.window = nn.Unfold(kernel, padding=kernel // 2, stride=stride)

    def weights(self, x: Tensor) -> Tensor:
        reduced = self.reduce(self.pool(x) if self.s > 1 else x)
        return self.span(reduced.relu() if self.functional else reduced)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights(x)
        b, _, h, wide = w.shape
        k, g, margin = self.k, self.g, self.k // 2
        if self.sums == "windows":
            padded = F.pad(x, [margin] * 4)
            seen = padded.unfold(2, k, self.s).unfold(3, k, self.s)
            seen = seen.reshape(b, g, -1, h, wide, k * k)
            return torch.einsum("bgkhw,bgchwk->bgchw", w.view(b, g, k * k, h, wide), seen).reshape(b, -1, h, wide)
        seen = F.unfold(x, k, padding=margin, stride=self.s).view(b, g, -1, k * k, h, wide)
        w = w.view(b, g, k * k, h, wide)
        if self.sums == "einsum":
            return torch.einsum("bgckhw,bgkhw->bgchw", seen, w).reshape(b, -1, h, wide)
        if self.sums == "matmul":
            by_pixel = seen.permute(0, 1, 4, 5, 2, 3) @ w.permute(0, 1, 3, 4, 2).unsqueeze(-1)
            return by_pixel.squeeze(-1).permute(0, 1, 4, 2, 3).reshape(b, -1, h, wide)
        return (w.unsqueeze(2) * seen).sum(dim=3).view(b, -1, h, wide)


def test_module_by_definition() -> None:
    """Loops over pixels, with weights from the module's own convolutions."""
    block = randomised(Involution(8, 3, 2, 4, 2, dilation=2)).double()
    x = torch.randn(2, 8, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        w, y = block.conv2(block.conv1(F.avg_pool2d(x, 2))), block(x)
    assert y.shape == (2, 8, 3, 4)
    for b, c, row, column in itertools.product(range(2), range(8), range(3), range(4)):
        total = 0.0
        for place, (down, right) in enumerate(itertools.product((-2, 0, 2), repeat=2)):
            at = 2 * row + down, 2 * column + right
            if 0 <= at[0] < 6 and 0 <= at[1] < 8:
                total += float(w[b, c // 4 * 9 + place, row, column] * x[b, c, at[0], at[1]])
        assert abs(total - float(y[b, c, row, column])) < 1e-12


def test_published_state_dict() -> None:
    """Names and shapes of the authors' module, whose layers are of mmcv."""
    names = {
        "conv1.conv.weight": (16, 64, 1, 1),
        **dict.fromkeys(("conv1.bn.weight", "conv1.bn.bias", "conv1.bn.running_mean", "conv1.bn.running_var"), (16,)),
        "conv1.bn.num_batches_tracked": (),
        "conv2.conv.weight": (196, 16, 1, 1),
        "conv2.conv.bias": (196,),
    }
    assert {name: tuple(value.shape) for name, value in Involution(64).state_dict().items()} == names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((8, 3, 1, 3), "channels=8, group_channels=3"), ((8, 4, 1, 4), "kernel_size=4"), ((8, 3, 0, 4), "stride=0")],
)
def test_arguments_refused(arguments: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Involution(*arguments)


def test_map_refused() -> None:
    with pytest.raises(UserError, match="a 7x8 map is not divisible by stride 2"):
        Involution(8, 3, 2, 4)(torch.randn(1, 8, 7, 8))


WRITTEN = {
    "plain": Written(),
    "window not declared": Written(kernel=5, declare=False),
    "strided": Written(stride=2),
    "einsum": Written(sums="einsum"),
    "matmul": Written(sums="matmul", kernel=5),
    "windows of tensors": Written(sums="windows", declare=False),
    "relu in forward": Written(functional=True),
    "silu behind both": Written(act=nn.SiLU(), last=nn.SiLU()),
    "one group": Written(groups=1),
}

BY_DYNAMO = ("plain", "einsum", "windows of tensors")
"""With free axes, which take that exporter its time."""

every_way = pytest.mark.parametrize("name", WRITTEN)


@every_way
def test_in_modules(name: str) -> None:
    block, x = randomised(WRITTEN[name]), torch.randn(2, 8, 8, 12)
    expected = block(x)
    model, (report,) = canonicalise(nn.Sequential(nn.Identity(), block))
    assert (report.status, report.family, report.name) == ("replaced", "involution", "1")
    assert report.geometry == {"kernel_size": block.k, "stride": block.s, "group_channels": 8 // block.g, "dilation": 1}
    assert relative_l2(model[1](x), expected) < FLOAT32


@pytest.mark.parametrize(
    ("name", "exporter", "dynamic"),
    exports_of(WRITTEN, BY_DYNAMO),
)
def test_in_graphs(name: str, exporter: str, dynamic: tuple[str, ...], tmp_path: Path) -> None:
    if (name, exporter) == ("windows of tensors", "torchscript"):
        pytest.skip("this exporter of PyTorch does not write Tensor.unfold of an unfolded tensor")
    block, x = randomised(WRITTEN[name]), torch.randn(2, 8, 8, 12)
    source = export(block, x, tmp_path / "plain.onnx", exporter=exporter, dynamic=dynamic, divisor=block.s)
    report = fuse(source, tmp_path / "fused.onnx", expect=1).found
    assert [one.family for one in report.blocks] == ["involution"]
    kinds = operators(tmp_path / "fused.onnx")
    assert kinds.count(REASSEMBLY.op_type) == 1
    assert not {"Pad", "Gather", "ReduceSum", "Einsum", "MatMul"} & {*kinds}
    for size in [(2, 8, 12), (1, 16, 10)][: 1 + bool(dynamic)]:
        x = torch.randn(size[0], 8, *size[1:])
        assert relative_l2(outputs(tmp_path / "fused.onnx", x), block(x)) < FLOAT32


class Around(nn.Module):
    """What stands around a block in a detector."""

    def __init__(self, block: nn.Module, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.block, self.after = before, block, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.block(self.before(x)))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(8, 4, 1)),
        (nn.ZeroPad2d(1), nn.BatchNorm2d(8)),
        (nn.Identity(), nn.Sequential(nn.Flatten(2), nn.Linear(96, 4))),
        (nn.Identity(), nn.PixelShuffle(2)),
        (nn.Identity(), nn.Identity()),
    ],
    ids=["upsampled map", "padded map", "flat result", "shuffled result", "alone"],
)
def test_what_stands_around(before: nn.Module, after: nn.Module, tmp_path: Path) -> None:
    """None of it is taken for a part of the block."""
    model, x = randomised(Around(Involution(8, 3, 1, 4), before, after)), torch.randn(1, 8, 8, 12)
    source = export(model, x, tmp_path / "plain.onnx")
    (block,) = fuse(source, tmp_path / "fused.onnx", expect=1).found.blocks
    assert block.family == "involution"
    assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < FLOAT32


class Changed(Written):
    """An involution that differs in one respect."""

    def __init__(self, change: str) -> None:
        super().__init__(kernel=4 if change == "even" else 3, groups=2)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights(x)
        b, _, h, wide = w.shape
        places = self.k**2
        if self.change == "wide":
            seen = F.unfold(x, 3, padding=2, dilation=(2, 2))
        elif self.change == "rows apart":
            seen = F.unfold(x, 3, padding=(2, 1), dilation=(2, 1))
        elif self.change == "shifted":
            seen = F.unfold(F.pad(x, (2, 0, 1, 1)), 3)
        elif self.change == "ones outside":
            seen = F.unfold(F.pad(x, (1, 1, 1, 1), value=1.0), 3)
        elif self.change == "even":
            seen = F.unfold(F.pad(x, (2, 1, 2, 1)), 4)
        else:
            seen = F.unfold(x, 3, padding=1)
        seen = seen.view(b, 2, -1, places, h, wide)
        w = w.view(b, 2, 1, places, h, wide)
        if self.change == "interleaved groups":
            return (w.transpose(1, 2) * seen.reshape(b, -1, 2, places, h, wide)).sum(3).reshape(b, -1, h, wide)
        if self.change == "largest":
            return (w * seen).amax(3).reshape(b, -1, h, wide)
        if self.change == "squares":
            return (w * seen).square().sum(3).reshape(b, -1, h, wide)
        if self.change == "backwards":
            seen = seen.flip(3)
        return (w * seen).sum(3).reshape(b, -1, h, wide)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("rows apart", "first weight is not that of the first of 3x3 pixels"),
        ("shifted", "first weight is not that of the first of 3x3 pixels"),
        ("ones outside", "not surrounded by zeros"),
        ("even", "not K\\*K"),
        ("interleaved groups", "row by row"),
        ("backwards", "first weight is not that of"),
        ("largest", None),
        ("squares", None),
    ],
)
def test_near_misses_in_graphs(change: str, reason: str | None, tmp_path: Path) -> None:
    model, x = randomised(Changed(change)), torch.randn(2, 8, 8, 12)
    source = export(model, x, tmp_path / "plain.onnx")
    reason = reason.replace("\\", "") if reason else None
    assert_left_alone_in_a_graph(INVOLUTION, model, source, x, reason)


@pytest.mark.parametrize("change", ["shifted", "ones outside", "backwards", "largest", "interleaved groups"])
def test_near_misses_in_modules(change: str) -> None:
    assert_left_alone_in_a_module(INVOLUTION, Changed(change), "differs from Involution")


def test_a_dilated_window_fuses(tmp_path: Path) -> None:
    model, x = randomised(Changed("wide")), torch.randn(2, 8, 8, 12)
    source = export(model, x, tmp_path / "plain.onnx")
    (block,) = fuse(source, tmp_path / "fused.onnx", expect=1).found.blocks
    assert block.settings["dilation"] == 2
    assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < FLOAT32


class Attends(nn.Module):
    """Attention over zero-padded windows: its weights are products, its logits sums over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(8, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, 1)
        b, c, h, w = q.shape
        keys, values = (F.unfold(maps, 3, padding=1).view(b, c, 9, h, w) for maps in (k, v))
        weights = (q.unsqueeze(2) * keys).sum(1).softmax(1)
        return (weights.unsqueeze(1) * values).sum(2)


def test_attention_is_another_matter(tmp_path: Path) -> None:
    model, x = randomised(Attends()), torch.randn(2, 8, 8, 12)
    report = fuse(export(model, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx").found
    assert "involution" not in {block.family for block in report.blocks}


def test_weights_that_are_constant_where_it_was_measured(tmp_path: Path) -> None:
    """Weights that the file's own values cannot tell apart: the order of neighbours is measured with others."""
    model, x = randomised(Changed("backwards")), torch.randn(2, 8, 8, 12)
    with torch.no_grad():
        model.span[0].weight.zero_()
        model.span[0].bias.fill_(0.5)
    source = export(model, x, tmp_path / "plain.onnx")
    assert_left_alone_in_a_graph(INVOLUTION, model, source, x, "first weight")


def test_layers_are_kept() -> None:
    """The replacement holds the original's own layers, no copies."""
    block = randomised(Written())
    parameters = {*block.parameters()}
    model, _ = canonicalise(nn.Sequential(block))
    assert {*model.parameters()} == parameters
    assert isinstance(model[0], Involution)


def test_of_weights_by_name() -> None:
    """Layers under other names give the same as the published names do."""
    block = randomised(Written(groups=2))
    model, _ = canonicalise(nn.Sequential(OrderedDict(block=block)))
    fresh = Involution(8, 3, 1, 4, 2)
    fresh.load_state_dict(model.block.state_dict())
    x = torch.randn(1, 8, 5, 6)
    np.testing.assert_allclose(fresh.eval()(x).detach(), model.block(x).detach(), rtol=1e-5, atol=1e-6)
