"""Local attention: the block itself, blocks as others write them in modules and in graphs, and what looks like one."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families import canonicalise
from acmix_deploy.families.local_attention.graph import LOCAL_ATTENTION
from acmix_deploy.families.local_attention.module import LocalAttention
from acmix_deploy.operators.neighborhood_attention import Border
from acmix_deploy.operators.spec import TOLERANCES
from acmix_deploy.runtime.inputs import AXES
from tests.families import parts as family_parts
from tests.families.parts import assert_left_alone_in_a_graph, export, randomised, relative_l2

FLOAT32 = TOLERANCES["float32"].floor
assert_fused = partial(family_parts.assert_fused, LOCAL_ATTENTION)


def along(place: int, size: int, block: LocalAttention) -> list[tuple[int | None, int]]:
    """The neighbours along an axis: pixel, None where there is none, and offset in steps."""
    k, dilation, reach = block.kernel_size, block.dilation, block.kernel_size // 2
    if block.border == Border.SHIFTED:
        members = [pixel for pixel in range(size) if pixel % dilation == place % dilation]
        own = members.index(place)
        first = min(max(own - reach, 0), len(members) - k)
        return [(members[at], at - own) for at in range(first, first + k)]
    found = []
    for step in range(-reach, reach + 1):
        pixel = place + step * dilation
        if block.border is None:
            pixel = -pixel if pixel < 0 else min(pixel, 2 * (size - 1) - pixel)
        found.append((pixel if 0 <= pixel < size else None, step))
    return found


def pixel_by_pixel(block: LocalAttention, x: Tensor) -> Tensor:
    """The definition in float64, one pixel and one head at a time."""
    weights = {name: value.detach().double().numpy() for name, value in block.state_dict().items()}
    maps = x.double().numpy()
    _, _, height, width = maps.shape
    d, heads, k = block.head_dim, block.num_heads, block.kernel_size
    qkv = np.einsum("oc,bchw->bohw", weights["qkv.weight"][:, :, 0, 0], maps) + weights["qkv.bias"][:, None, None]
    out = np.zeros((len(maps), heads * d, height, width))
    for b, n, i, j in np.ndindex(len(maps), heads, height, width):
        q, key, value = qkv[b].reshape(3, heads, d, height, width)[:, n]
        logits, values = [], []
        for row, dy in along(i, height, block):
            for column, dx in along(j, width, block):
                bias = weights["rpb"][n, dy + k - 1, dx + k - 1] if "rpb" in weights else 0.0
                if row is None or column is None:
                    if block.border == Border.ZEROS:
                        logits.append(bias)
                        values.append(np.zeros(d))
                    continue
                place = np.array([2 * column / (width - 1) - 1, 2 * row / (height - 1) - 1])
                moved = weights["position.weight"][:, :, 0, 0] @ place if "position.weight" in weights else 0.0
                logits.append(q[:, i, j] @ (key[:, row, column] - moved) / np.sqrt(d) + bias)
                values.append(value[:, row, column])
        share = np.exp(np.array(logits) - max(logits))
        out[b, n * d : (n + 1) * d, i, j] = share @ np.array(values) / share.sum()
    if "proj.weight" in weights:
        out = np.einsum("oc,bchw->bohw", weights["proj.weight"][:, :, 0, 0], out) + weights["proj.bias"][:, None, None]
    return torch.from_numpy(out)


@settings(max_examples=25, deadline=None)
@given(
    border=st.sampled_from([None, *Border]),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    kernel_size=st.sampled_from([3, 5]),
    dilation=st.integers(1, 3),
    more=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("position", "bias", "projection")}),
)
def test_is_the_definition(
    border: Border | None, heads: int, head_dim: int, kernel_size: int, dilation: int, more: tuple[int, int],
    options: dict[str, bool],
) -> None:  # fmt: skip
    if border is None:
        dilation, options = 1, {**options, "bias": False}
    least = kernel_size * dilation if border == Border.SHIFTED else kernel_size // 2 + 1
    arguments: dict[str, Any] = {"dilation": dilation, "border": border, **options}
    block = randomised(LocalAttention(3, heads * head_dim, kernel_size, heads, **arguments))
    x = torch.randn(2, 3, *(least + one for one in more))
    expected = pixel_by_pixel(block, x)
    assert relative_l2(copy.deepcopy(block).double()(x.double()), expected) < 1e-10
    assert relative_l2(block(x), expected) < FLOAT32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_heads": 3}, "num_heads=3"),
        ({"kernel_size": 4}, "kernel_size is 4"),
        ({"dilation": 0}, "dilation 0"),
        ({"border": None, "dilation": 2}, "dilation 1"),
        ({"border": None, "bias": True}, "without a bias"),
    ],
)
def test_the_constructor_refuses(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LocalAttention(8, **arguments)


@pytest.mark.parametrize(("border", "least"), [(None, 4), (Border.SHIFTED, 14)])
def test_maps_that_are_too_small(border: Border | None, least: int) -> None:
    block = LocalAttention(4, dilation=1 if border is None else 2, border=border)
    block(torch.randn(1, 4, least, least))
    with pytest.raises(UserError, match=f"need {least} pixels"):
        block(torch.randn(1, 4, least, least - 1))


def test_linear_layers_can_be_loaded() -> None:
    """As NATTEN's block has them."""
    block, linear = LocalAttention(8, bias=True), nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
    block.load_state_dict({**linear.state_dict(), "rpb": torch.randn(4, 13, 13)})
    assert torch.equal(block.qkv.weight[:, :, 0, 0], linear["qkv"].weight)


# Blocks as others write them.


class Port(nn.Module):
    """Local attention in the manner of others; each choice is a keyword."""

    def __init__(
        self,
        *,
        projections: str = "three",
        neighbours: str = "unfold",
        product: str = "sum",
        border: Border = Border.ZEROS,
        dilation: int = 1,
        kernel_size: int = 3,
        bias: str = "",
        scale: float | None = None,
        proj: bool = False,
        channels: int = 8,
        heads: int = 2,
    ) -> None:
        super().__init__()
        self.k, self.dilation, self.heads, self.d = kernel_size, dilation, heads, channels // heads
        self.neighbours, self.product, self.border = neighbours, product, border
        self.scale = self.d**-0.5 if scale is None else scale
        self.padded_first = projections == "of padding"
        self.layers = nn.ModuleList(
            [nn.Conv2d(channels, 3 * channels, 1 if projections == "one" else 3, padding="same")]
            if projections in ("one", "3x3")
            else [nn.Conv2d(channels, channels, 1, bias=False) for _ in range(3)]
        )
        side = {"": 0, "table": 2 * kernel_size - 1, "window": kernel_size}[bias]
        self.table = nn.Parameter(torch.randn(heads, side, side)) if side else None
        self.proj = nn.Conv2d(channels, channels, 1) if proj else nn.Identity()

    def windows(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, K * K, H * W], zeros outside the map."""
        batch, channels = x.shape[:2]
        height, width = self.size
        margin = self.k // 2 * self.dilation
        if self.neighbours == "unfold":
            return F.unfold(x, self.k, self.dilation, margin).reshape(batch, channels, self.k**2, height * width)
        padded = x if self.padded_first else F.pad(x, (margin,) * 4)
        if self.neighbours == "tensor unfold":
            taken = padded.unfold(2, self.k, 1).unfold(3, self.k, 1)
            return taken.permute(0, 1, 4, 5, 2, 3).reshape(batch, channels, self.k**2, height * width)
        parts = [
            padded[:, :, i * self.dilation :, j * self.dilation :][:, :, : self.size[0], : self.size[1]]
            for i in range(self.k)
            for j in range(self.k)
        ]
        return torch.stack(parts, 2).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        self.size = (height, width)
        if self.padded_first:  # which is the same where the layers have no biases
            padded = F.pad(x, (self.k // 2 * self.dilation,) * 4)
            maps = [self.layers[0](x), self.layers[1](padded), self.layers[2](padded)]
        else:
            maps = self.layers[0](x).chunk(3, 1) if len(self.layers) == 1 else [layer(x) for layer in self.layers]
        q = maps[0].reshape(batch, self.heads, self.d, height * width) * self.scale
        k, v = (self.windows(part).reshape(batch, self.heads, self.d, self.k**2, -1) for part in maps[1:])
        if self.product == "einsum":
            logits = torch.einsum("bndp,bndtp->bntp", q, k)
        elif self.product == "matmul":
            logits = (q.permute(0, 1, 3, 2).unsqueeze(3) @ k.permute(0, 1, 4, 2, 3)).squeeze(3).transpose(2, 3)
        else:
            logits = (q.unsqueeze(3) * k).sum(2)
        if self.table is not None:
            margin = (self.table.shape[1] - self.k) // 2
            end = margin + self.k
            logits = logits + self.table[:, margin:end, margin:end].flatten(1).unsqueeze(-1)
        if self.border == Border.MASKED:
            inside = self.windows(torch.ones_like(x[:1, :1])).reshape(1, 1, self.k**2, -1)
            logits = logits.masked_fill(inside == 0, float("-inf"))
        weights = logits.softmax(2)
        if self.product == "einsum":
            y = torch.einsum("bntp,bndtp->bndp", weights, v)
        elif self.product == "matmul":
            y = (weights.permute(0, 1, 3, 2).unsqueeze(3) @ v.permute(0, 1, 4, 3, 2)).squeeze(3).transpose(2, 3)
        else:
            y = (weights.unsqueeze(2) * v).sum(3)
        y: Tensor = self.proj(y.reshape(batch, channels, height, width))
        return y


class Inside(nn.Module):
    """Windows that stay inside the map, channels last, in the manner of neighbourhood attention without its extension:
    the windows of the pixels inside, repeated for those at the border, and a table of biases by offset."""

    def __init__(self, channels: int = 8, kernel_size: int = 5, heads: int = 2) -> None:
        super().__init__()
        self.k, self.num_heads, self.scale = kernel_size, heads, (channels // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.rpb = nn.Parameter(torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        heads = (self.num_heads, channels // self.num_heads)
        q, kv = self.qkv(x).split([channels, 2 * channels], -1)
        q = q.reshape(batch, height * width, *heads, 1).transpose(3, 4) * self.scale
        taken = F.unfold(kv.permute(0, 3, 1, 2), self.k)
        inner = taken.reshape(batch, -1, height - self.k + 1, width - self.k + 1)
        every = F.pad(inner, (self.k // 2,) * 4, "replicate").reshape(batch, 2, *heads, self.k**2, height * width)
        k, v = every.permute(1, 0, 5, 2, 4, 3).unbind(0)
        rows, columns = (self._offsets(size) for size in (height, width))
        bias = self.rpb[:, rows[:, None, :, None], columns[None, :, None, :]].reshape(len(self.rpb), -1, 1, self.k**2)
        weights = (q @ k.transpose(-2, -1) + bias.transpose(0, 1)).softmax(-1)
        y: Tensor = self.proj((weights @ v).reshape(batch, height, width, channels))
        return y

    def _offsets(self, size: int) -> Tensor:
        place = torch.arange(size)
        first = (place - self.k // 2).clamp(0, size - self.k)
        return (first - place)[:, None] + torch.arange(self.k) + self.k - 1


PORTS: dict[str, dict[str, Any]] = {
    "unfold": {},
    "one projection, matmul": {"projections": "one", "product": "matmul", "proj": True},
    "einsum, slices": {"product": "einsum", "neighbours": "slices"},
    "tensor unfold, no scale": {"neighbours": "tensor unfold", "scale": 1.0, "heads": 1},
    "masked": {"border": Border.MASKED, "projections": "one", "kernel_size": 5},
    "dilated": {"dilation": 2, "neighbours": "slices", "bias": "window"},
    "padding before the projections": {"projections": "of padding", "neighbours": "slices"},
    "biases, masked, dilated": {"border": Border.MASKED, "dilation": 2, "bias": "table", "proj": True},
}
every_port = pytest.mark.parametrize("options", PORTS.values(), ids=PORTS)


@every_port
def test_ports_in_modules(options: dict[str, Any]) -> None:
    port, x = randomised(Port(**options)), torch.randn(2, 8, 9, 12)
    expected = port(x)
    model, (report,) = canonicalise(nn.Sequential(port))
    assert (report.status, report.family) == ("replaced", "local_attention"), report.reason
    assert report.geometry is not None
    assert report.geometry["border"] == options.get("border", Border.ZEROS)
    assert relative_l2(model(x), expected) < FLOAT32


class Around(nn.Module):
    """A block between convolutions, which takes maps channels last or not."""

    def __init__(self, block: nn.Module, *, channels_last: bool = False) -> None:
        super().__init__()
        self.before, self.block, self.after = nn.Conv2d(3, 8, 1), block, nn.Conv2d(8, 4, 1)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).relu()
        y = self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.channels_last else self.block(x)
        return self.after(x + y)


BY_DYNAMO = "unfold", "padding before the projections"


@pytest.mark.parametrize(
    ("exporter", "options"),
    [
        pytest.param(exporter, options, id=f"{exporter}-{name}", marks=pytest.mark.soak if long else ())
        for exporter in ("torchscript", "dynamo")
        for name, options in PORTS.items()
        for long in [exporter == "dynamo" and name not in BY_DYNAMO]
    ],
)
def test_ports_in_graphs(options: dict[str, Any], exporter: str, tmp_path: Path) -> None:
    model, inputs = randomised(Around(Port(**options))), [torch.randn(b, 3, *size) for b, *size in SIZES]
    if exporter == "torchscript" and options.get("neighbours") == "tensor unfold":
        pytest.skip("PyTorch's TorchScript exporter does not know the sizes of what it unfolds")
    for dynamic in ((), AXES) if exporter == "torchscript" else (AXES,):
        source = export(model, inputs[0], tmp_path / "plain.onnx", exporter=exporter, dynamic=dynamic)
        block, *_ = assert_fused(model, source, *inputs[: None if dynamic else 1]).blocks
        assert block.settings["border"] == options.get("border", Border.ZEROS)
        assert block.settings["dilation"] == options.get("dilation", 1)


SIZES = [(2, 9, 12), (1, 12, 8), (3, 16, 16)]


def test_attention_over_the_channels_of_any_convolution(tmp_path: Path) -> None:
    """Without projections of its own there is no convolution to write."""
    model, x = randomised(Around(Port(projections="3x3"))), torch.randn(2, 3, 9, 12)
    assert_fused(model, export(model, x, tmp_path / "plain.onnx"), x)
    kinds = family_parts.operators(tmp_path / "fused.onnx")
    assert kinds.count("Conv") == 3
    assert kinds.count("AcmixNeighborhoodAttention") == 1


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_windows_that_stay_inside_in_graphs(exporter: str, tmp_path: Path) -> None:
    """Such code holds for one size, as it is exported."""
    model, x = randomised(Around(Inside(), channels_last=True)), torch.randn(2, 3, 9, 12)
    source = export(model, x, tmp_path / "plain.onnx", exporter=exporter)
    (block,) = assert_fused(model, source, x).blocks
    assert block.settings["border"] == Border.SHIFTED


@pytest.mark.parametrize("channels_last", [True, False])
def test_windows_that_stay_inside_in_modules(channels_last: bool) -> None:
    """Whether maps are channels last, or permuted by the module."""

    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Inside()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    block, x = randomised(Inside() if channels_last else Permuted()), torch.randn(2, 9, 12, 8)
    x = x if channels_last else x.permute(0, 3, 1, 2)
    expected = block(x)
    model, (report,) = canonicalise(nn.Sequential(block))
    assert (report.status, report.family) == ("replaced", "local_attention"), report.reason
    assert relative_l2(model(x), expected) < FLOAT32


@pytest.mark.parametrize("where", ["q", "v"])
def test_a_guard_against_overflow_is_no_block(where: str, tmp_path: Path) -> None:
    """On the numbers that a block is measured with it does not show."""

    class Guarded(LocalAttention):
        def forward(self, x: Tensor) -> Tensor:
            parts = dict(zip("qkv", self.qkv(x).chunk(3, 1), strict=True))
            parts[where] = parts[where].clamp(-5e4, 5e4)
            projection, self.qkv = self.qkv, nn.Identity()
            y: Tensor = super().forward(torch.cat([*parts.values()], 1))
            self.qkv = projection
            return y

    model, x = randomised(Around(Guarded(8, None, 3, 2))), torch.randn(1, 3, 9, 12)
    source = export(model, x, tmp_path / "plain.onnx")
    assert_left_alone_in_a_graph(LOCAL_ATTENTION, model, source, x, "not linear: Clip")


class Tempered(nn.Module):
    """The logits are sharper where the image is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.port = nn.Conv2d(3, 8, 1), Port()

    def forward(self, image: Tensor) -> Tensor:
        self.port.scale = image.mean() * 2
        return self.port(self.before(image))


def test_what_depends_on_the_image_is_no_constant(tmp_path: Path) -> None:
    """Though it does not come from what the attention reads, and the file holds for one size."""
    model, x = randomised(Tempered()), torch.randn(1, 3, 9, 12)
    source = export(model, x, tmp_path / "plain.onnx")
    assert_left_alone_in_a_graph(LOCAL_ATTENTION, model, source, x, "something else than its fused form")


def test_no_constant_where_free_axes_are_frozen(tmp_path: Path) -> None:
    """Axes are declared free, and the graph runs at one size all the same."""

    class Frozen(Tempered):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image.reshape(1, 3, 32, 32))

    model, x = randomised(Frozen()), torch.randn(1, 3, 32, 32)
    source = export(model, x, tmp_path / "plain.onnx", dynamic=AXES)
    assert_left_alone_in_a_graph(LOCAL_ATTENTION, model, source, x, "something else than its fused form")
