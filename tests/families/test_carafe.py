"""CARAFE: the module by definition, blocks as others write them in modules and graphs, and what is none."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from acmix_deploy.errors import UserError
from acmix_deploy.families import canonicalise
from acmix_deploy.families.carafe.graph import CARAFE
from acmix_deploy.families.carafe.module import Carafe
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


class Written(nn.Module):
    """CARAFE in the words of those who paste it.

    Args:
        sums: how it reassembles: "dilated" unfolds the upsampled map, "repeated" upsamples the unfolded one,
            "products" multiplies matrices for each small pixel and shuffles the result.
        norm: BatchNorm behind both convolutions and an activation behind the first.
        out: a 1x1 convolution of the result.
    """

    def __init__(
        self,
        channels: int = 8,
        scale: int = 2,
        k: int = 3,
        *,
        sums: str = "dilated",
        norm: bool = True,
        act: nn.Module | None = None,
        out: bool = False,
    ) -> None:
        super().__init__()
        self.u, self.k, self.sums = scale, k, sums
        between = [nn.BatchNorm2d(4), act or nn.ReLU()] if norm else []
        last = [nn.BatchNorm2d((scale * k) ** 2)] if norm else []
        self.squeeze = nn.Sequential(nn.Conv2d(channels, 4, 1, bias=not norm), *between)
        self.predict = nn.Sequential(nn.Conv2d(4, (scale * k) ** 2, 3, padding=1), *last)
        self.shuffle = nn.PixelShuffle(scale)
        self.out = nn.Conv2d(channels, channels, 1) if out else nn.Identity()

    def weights(self, x: Tensor) -> Tensor:
        return F.softmax(self.shuffle(self.predict(self.squeeze(x))), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(getattr(self, self.sums)(x, self.weights(x)))

    def dilated(self, x: Tensor, w: Tensor) -> Tensor:
        b, c, h, wide = x.size()
        large = F.interpolate(x, scale_factor=self.u, mode="nearest")
        seen = F.unfold(large, self.k, dilation=self.u, padding=self.k // 2 * self.u)
        seen = seen.view(b, c, self.k**2, h * self.u, wide * self.u)
        return torch.einsum("bkhw,bckhw->bchw", [w, seen])

    def repeated(self, x: Tensor, w: Tensor) -> Tensor:
        b, c, h, wide = x.size()
        seen = F.unfold(x, self.k, padding=self.k // 2).view(b, c * self.k**2, h, wide)
        seen = F.interpolate(seen, scale_factor=self.u, mode="nearest")
        return (seen.view(b, c, -1, h * self.u, wide * self.u) * w.unsqueeze(1)).sum(2)

    def products(self, x: Tensor, w: Tensor) -> Tensor:
        b, c, h, wide = x.size()
        seen = F.unfold(x, self.k, padding=self.k // 2).view(b, c, self.k**2, h, wide).permute(0, 3, 4, 1, 2)
        by_pixel = w.view(b, self.k**2, h, self.u, wide, self.u).permute(0, 2, 4, 1, 3, 5)
        y = seen @ by_pixel.reshape(b, h, wide, self.k**2, self.u**2)
        return F.pixel_shuffle(y.reshape(b, h, wide, -1).permute(0, 3, 1, 2), self.u)


def test_module_by_definition() -> None:
    """Loops over pixels, with weights from the module's own convolutions."""
    block = randomised(Carafe(2, 3, scale=3, k_up=3)).double()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        w, y = F.pixel_shuffle(block.enc(block.comp(x)), 3).softmax(1), block(x)
    assert y.shape == (2, 2, 9, 12)
    for b, c, row, column in itertools.product(range(2), range(2), range(9), range(12)):
        total = 0.0
        for place, (down, right) in enumerate(itertools.product((-1, 0, 1), repeat=2)):
            at = row // 3 + down, column // 3 + right
            if 0 <= at[0] < 3 and 0 <= at[1] < 4:
                total += float(w[b, place, row, column] * x[b, c, at[0], at[1]])
        assert abs(total - float(y[b, c, row, column])) < 1e-12


def test_published_state_dict() -> None:
    """Names and shapes of the usual PyTorch version."""
    statistics = ("weight", "bias", "running_mean", "running_var")
    names = {"comp.conv.weight": (64, 32, 1, 1), "enc.conv.weight": (100, 64, 3, 3)}
    names |= {f"{part}.bn.{name}": (size,) for part, size in (("comp", 64), ("enc", 100)) for name in statistics}
    names |= {f"{part}.bn.num_batches_tracked": () for part in ("comp", "enc")}
    assert {name: tuple(value.shape) for name, value in Carafe(32).state_dict().items()} == names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0, 8), "channels=0"), ((8, 8, 1), "scale=1"), ((8, 8, 2, 4), "k_up=4"), ((8, 8, 2, 5, 2), "k_enc=2")],
)
def test_arguments_refused(arguments: tuple[int, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Carafe(*arguments)


WRITTEN = {
    "unfolded when large": Written(),
    "unfolded when small": Written(sums="repeated", k=5),
    "products": Written(sums="products", norm=False, out=True),
    "three times": Written(scale=3, norm=False),
    "four times, silu": Written(scale=4, act=nn.SiLU(), sums="repeated"),
}
BY_DYNAMO = ("unfolded when large", "products")
"""With free axes, which take that exporter its time."""

every_way = pytest.mark.parametrize("name", WRITTEN)


@every_way
def test_in_modules(name: str) -> None:
    block, x = randomised(WRITTEN[name]), torch.randn(2, 8, 5, 6)
    expected = block(x)
    model, (report,) = canonicalise(nn.Sequential(nn.Identity(), block))
    assert (report.status, report.family, report.name) == ("replaced", "carafe", "1")
    assert report.geometry == {"scale": block.u, "k_up": block.k}
    assert relative_l2(model[1](x), expected) < FLOAT32
    assert {*model.parameters()} == {*block.parameters()}


@pytest.mark.parametrize(
    ("name", "exporter", "dynamic"),
    exports_of(WRITTEN, BY_DYNAMO),
)
def test_in_graphs(name: str, exporter: str, dynamic: tuple[str, ...], tmp_path: Path) -> None:
    block, x = randomised(WRITTEN[name]), torch.randn(2, 8, 8, 12)
    source = export(block, x, tmp_path / "plain.onnx", exporter=exporter, dynamic=dynamic)
    report = fuse(source, tmp_path / "fused.onnx", expect=1).found
    assert [(one.family, one.settings["upsampling"], one.settings["dilation"]) for one in report.blocks] == [
        ("carafe", block.u, 1)
    ]
    kinds = operators(tmp_path / "fused.onnx")
    assert kinds.count(REASSEMBLY.op_type) == 1
    assert not {"Pad", "Gather", "ReduceSum", "Einsum", "MatMul", "Resize"} & {*kinds}
    for size in [(2, 8, 12), (1, 16, 10)][: 1 + bool(dynamic)]:
        x = torch.randn(size[0], 8, *size[1:])
        assert relative_l2(outputs(tmp_path / "fused.onnx", x), block(x)) < FLOAT32


class Changed(Written):
    """CARAFE that differs in one respect."""

    def __init__(self, change: str) -> None:
        super().__init__(sums=change)

    def neighbours_by_columns(self, x: Tensor, w: Tensor) -> Tensor:
        b, c, h, wide = x.size()
        seen = F.unfold(x, 3, padding=1).view(b, c, 3, 3, h, wide).transpose(2, 3).reshape(b, -1, h, wide)
        seen = F.interpolate(seen, scale_factor=2, mode="nearest")
        return (seen.view(b, c, -1, h * 2, wide * 2) * w.unsqueeze(1)).sum(2)

    def between(self, x: Tensor, w: Tensor) -> Tensor:
        b, c, h, wide = x.size()
        seen = F.unfold(x, 3, padding=1).view(b, c * 9, h, wide)
        seen = F.interpolate(seen, scale_factor=2, mode="bilinear")
        return (seen.view(b, c, -1, h * 2, wide * 2) * w.unsqueeze(1)).sum(2)

    def bounded(self, x: Tensor, w: Tensor) -> Tensor:
        b, c, h, wide = x.size()
        seen = F.unfold(x, 3, padding=1).view(b, c * 9, h, wide).relu()
        seen = F.interpolate(seen, scale_factor=2, mode="nearest")
        return (seen.view(b, c, -1, h * 2, wide * 2) * w.unsqueeze(1)).sum(2)

    def reflected(self, x: Tensor, w: Tensor) -> Tensor:
        b, c, h, wide = x.size()
        seen = F.unfold(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3).view(b, c * 9, h, wide)
        seen = F.interpolate(seen, scale_factor=2, mode="nearest")
        return (seen.view(b, c, -1, h * 2, wide * 2) * w.unsqueeze(1)).sum(2)

    def undilated(self, x: Tensor, w: Tensor) -> Tensor:
        b, c, h, wide = x.size()
        large = F.interpolate(x, scale_factor=2, mode="nearest")
        seen = F.unfold(large, 3, padding=1).view(b, c, 9, h * 2, wide * 2)
        return torch.einsum("bkhw,bckhw->bchw", w, seen)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("neighbours_by_columns", "no sum over 3x3 neighbours, row by row"),
        ("between", "no sum over 3x3 neighbours, row by row"),
        ("reflected", "not surrounded by zeros"),
        ("bounded", None),
    ],
)
def test_near_misses_in_graphs(change: str, reason: str | None, tmp_path: Path) -> None:
    model, x = randomised(Changed(change)), torch.randn(2, 8, 8, 12)
    source = export(model, x, tmp_path / "plain.onnx")
    assert_left_alone_in_a_graph(CARAFE, model, source, x, reason)


@pytest.mark.parametrize("change", ["neighbours_by_columns", "between", "reflected", "bounded", "undilated"])
def test_near_misses_in_modules(change: str) -> None:
    assert_left_alone_in_a_module(CARAFE, Changed(change), "differs from Carafe")


def test_an_undilated_window_of_the_larger_map_is_an_involution(tmp_path: Path) -> None:
    """Some copies forget the dilation: windows of the upsampled map, with weights as CARAFE's."""
    model, x = randomised(Changed("undilated")), torch.randn(2, 8, 8, 12)
    source = export(model, x, tmp_path / "plain.onnx")
    (block,) = fuse(source, tmp_path / "fused.onnx", expect=1).found.blocks
    assert (block.family, block.settings["upsampling"]) == ("involution", 1)
    assert "Resize" in operators(tmp_path / "fused.onnx")
    assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < FLOAT32


def test_another_softmax_fuses(tmp_path: Path) -> None:
    """Weights are taken as they come: normalised otherwise, or not at all."""
    model, x = randomised(Written(sums="repeated")), torch.randn(2, 8, 8, 12)
    model.weights = lambda x: model.shuffle(model.predict(model.squeeze(x))).sigmoid()
    assert_left_alone_in_a_module(CARAFE, model, "differs from Carafe")
    source = export(model, x, tmp_path / "plain.onnx")
    (block,) = fuse(source, tmp_path / "fused.onnx", expect=1).found.blocks
    assert block.family == "carafe"
    assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < FLOAT32


def test_weights_of_small_pixels_are_left_alone(tmp_path: Path) -> None:
    """Sums over neighbours before the shuffle: no map of weights is as large as the result."""

    class Early(Written):
        def forward(self, x: Tensor) -> Tensor:
            b, c, h, wide = x.size()
            w = self.predict(self.squeeze(x)).view(b, 4, 9, h, wide).softmax(2)
            y = torch.einsum("bskhw,bckhw->bschw", w, F.unfold(x, 3, padding=1).view(b, c, 9, h, wide))
            return y.view(b, 2, 2, c, h, wide).permute(0, 3, 4, 1, 5, 2).reshape(b, c, 2 * h, 2 * wide)

    model, x = randomised(Early()), torch.randn(2, 8, 8, 12)
    source = export(model, x, tmp_path / "plain.onnx")
    assert_left_alone_in_a_graph(CARAFE, model, source, x, None)
