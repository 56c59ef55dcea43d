"""Swin's ACmix: the block by its formula, found in modules and graphs as they are written elsewhere, and reduced."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families import BlockReport, canonicalise
from acmix_deploy.families.swin_acmix.graph import SWIN_ACMIX
from acmix_deploy.families.swin_acmix.module import SwinACmix
from acmix_deploy.operators.spec import TOLERANCES
from acmix_deploy.runtime.inputs import AXES
from tests.families import parts as family_parts
from tests.families.parts import (
    assert_left_alone_in_a_graph,
    assert_left_alone_in_a_module,
    export,
    outputs,
    randomised,
    relative_l2,
)

FLOAT32 = TOLERANCES["float32"].limit()
assert_fused = partial(family_parts.assert_fused, SWIN_ACMIX)


# The block as it is written elsewhere, in the many spellings found, each chosen by a keyword.


class WindowMix(nn.Module):
    """Window attention and convolution of a map that the caller has rolled, with the mask that goes with it."""

    def __init__(
        self,
        channels: int = 12,
        side: int = 4,
        heads: int = 3,
        *,
        reverse: str = "int",
        qkv_bias: bool = True,
        conv_bias: bool = False,
        scale: float | None = None,
        temperature: float = 1.0,
        index: str = "usual",
        rates: int = 1,
        swap_rates: bool = False,
        project_sum: bool = False,
        masks: str = "added",
        out: int | None = None,
        maps: int = 9,
        order: str = "qkv",
        leak: bool = False,
    ) -> None:
        super().__init__()
        d = channels // heads
        self.side, self.heads, self.d = side, heads, d
        self.reverse, self.order, self.masks, self.leak = reverse, order, masks, leak
        self.swap_rates, self.project_sum = swap_rates, project_sum
        self.scale = (d**-0.5 if scale is None else scale) * temperature
        self.table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        y, x = np.divmod(np.arange(side * side), side)
        steps = (y[:, None] - y + side - 1) * (2 * side - 1) + (x[:, None] - x + side - 1)
        self.register_buffer("steps", torch.from_numpy(steps.T.copy() if index == "transposed" else steps))
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, out or channels)
        self.softmax = nn.Softmax(dim=-1)
        self.fc = nn.Conv2d(3 * heads, maps, 1)
        self.dep_conv = nn.Conv2d(maps * d, channels, 3, padding=1, groups=d, bias=conv_bias)
        self.rate1 = nn.Parameter(torch.empty(rates))
        self.rate2 = nn.Parameter(torch.empty(rates))

    def cut(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = x.view(batch, height // self.side, self.side, width // self.side, self.side, channels)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.side**2, channels)

    def join(self, windows: Tensor, batch: Any, height: int, width: int) -> Tensor:
        if self.reverse == "int":  # under a tracer this number is a constant
            batch = int(windows.shape[0] / (height * width / self.side / self.side))
        x = windows.view(batch, height // self.side, width // self.side, self.side, self.side, -1)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, height, width, -1)

    def bias(self) -> Tensor:
        pixels = self.side**2
        return self.table[self.steps.view(-1)].view(pixels, pixels, -1).permute(2, 0, 1).contiguous()

    def forward(self, x: Tensor, H: int, W: int, mask: Tensor | None = None) -> Any:
        batch, pixels = x.shape[0], self.side**2
        qkv = self.qkv(x)
        maps = self.fc(qkv.reshape(batch, H * W, 3 * self.heads, -1).permute(0, 2, 1, 3))
        maps = maps.permute(0, 3, 1, 2).reshape(batch, -1, H, W)
        convolved = self.dep_conv(maps).permute(0, 2, 3, 1)
        windows = self.cut(qkv)
        parts = windows.reshape(-1, pixels, 3, self.heads, self.d).permute(2, 0, 3, 1, 4)
        q, k, v = (parts["qkv".index(letter)] for letter in self.order)
        logits = q * self.scale @ k.transpose(-2, -1) + self.bias().unsqueeze(0)
        if mask is not None and self.masks == "added":
            logits = logits.view(-1, mask.shape[0], self.heads, pixels, pixels) + mask.unsqueeze(1).unsqueeze(0)
            logits = logits.view(-1, self.heads, pixels, pixels)
        attended = (self.softmax(logits) @ v).transpose(1, 2).reshape(-1, pixels, self.heads * self.d)
        if self.project_sum:
            joined = self.join(attended, batch, H, W)
            return self.proj(self.rate1 * joined + self.rate2 * convolved)
        joined = self.join(self.proj(attended), batch, H, W)
        rates = (self.rate2, self.rate1) if self.swap_rates else (self.rate1, self.rate2)
        y = rates[0] * joined + rates[1] * convolved
        return (y, joined) if self.leak else y


class Published(nn.Module):
    """A Swin block around it, over tokens [B, H * W, C] of one resolution."""

    def __init__(self, mix: nn.Module, height: int, width: int, side: int, shift: int) -> None:
        super().__init__()
        channels = mix.proj.out_features
        self.mix, self.height, self.width, self.shift = mix, height, width, shift
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))
        self.register_buffer("mask", shift_mask(height, width, side, shift) if shift else None)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, _, channels = tokens.shape
        x = self.norm1(tokens).view(batch, self.height, self.width, channels)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = self.mix(x, self.height, self.width, mask=self.mask)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        tokens = tokens + x.view(batch, -1, channels)
        return tokens + self.mlp(self.norm2(tokens))


def shift_mask(height: int, width: int, side: int, shift: int) -> Tensor:
    """[windows, S, S], by asking for every pixel of the rolled map where it came from."""
    wrapped_y = np.add.outer(np.arange(height) >= height - shift, np.zeros(width, bool))
    wrapped_x = np.add.outer(np.zeros(height, bool), np.arange(width) >= width - shift)
    mask = np.zeros((height * width // side**2, side**2, side**2), np.float32)
    corners = [(top, left) for top in range(0, height, side) for left in range(0, width, side)]
    for window, (top, left) in enumerate(corners):
        inside = [(top + y, left + x) for y in range(side) for x in range(side)]
        for i, a in enumerate(inside):
            for j, b in enumerate(inside):
                if wrapped_y[a] != wrapped_y[b] or wrapped_x[a] != wrapped_x[b]:
                    mask[window, i, j] = -100.0
    return torch.from_numpy(mask)


class Small(nn.Module):
    """Images to tokens, a block as it is and a shifted one, and a head."""

    def __init__(self, height: int = 8, width: int = 12, side: int = 4, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 2, stride=2)
        self.blocks = nn.Sequential(
            *(Published(WindowMix(side=side, **options), height, width, side, shift) for shift in (0, side // 2))
        )
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images).flatten(2).transpose(1, 2)).mean(1))


# The block itself.


def pixel_by_pixel(block: SwinACmix, x: Tensor) -> np.ndarray:
    """The block by definition: loops over images, pixels and heads in float64, nothing shared with the module."""
    w = {name: value.detach().double().numpy() for name, value in block.state_dict().items()}
    heads, d, side, shift = block.num_heads, block.head_dim, block.window_size, block.shift_size
    _, height, width, dim = x.shape
    out = np.zeros(x.shape)
    for image, result in zip(x.double().numpy(), out, strict=True):
        # Where the pixel of the rolled map comes from.
        source = [[((i + shift) % height, (j + shift) % width) for j in range(width)] for i in range(height)]
        qkv = image @ w["qkv.weight"].T + w.get("qkv.bias", 0.0)
        maps = np.zeros((height + 2, width + 2, d, 9))  # with a border of zeros
        for i in range(height):
            for j in range(width):
                maps[i + 1, j + 1] = (
                    w["fc.weight"][:, :, 0, 0] @ qkv[source[i][j]].reshape(3 * heads, d) + w["fc.bias"][:, None]
                ).T
        for i in range(height):
            for j in range(width):
                window = [(i - i % side + a, j - j % side + b) for a in range(side) for b in range(side)]
                attended = np.zeros(dim)
                for n in range(heads):
                    own = slice(n * d, (n + 1) * d)
                    query = qkv[source[i][j]][:dim][own]
                    logits = []
                    for a, b in window:
                        row = (i - a + side - 1) * (2 * side - 1) + (j - b + side - 1)
                        wrapped = ((i >= height - shift) != (a >= height - shift)) or (
                            (j >= width - shift) != (b >= width - shift)
                        )
                        key = qkv[source[a][b]][dim : 2 * dim][own]
                        bias = w["relative_position_bias_table"][row, n] - 100.0 * wrapped
                        logits.append(block.scale * query @ key + bias)
                    weights = np.exp(np.array(logits) - max(logits))
                    values = np.stack([qkv[source[a][b]][2 * dim :][own] for a, b in window])
                    attended[own] = weights @ values / weights.sum()
                projected = w["proj.weight"] @ attended + w["proj.bias"]
                patch = maps[i : i + 3, j : j + 3]
                convolved = [
                    (w["dep_conv.weight"][o] * patch[:, :, o // heads].transpose(2, 0, 1)).sum() for o in range(dim)
                ]
                convolved = np.array(convolved) + w.get("dep_conv.bias", 0.0)
                result[source[i][j]] = w["rate1"] * projected + w["rate2"] * convolved
    return out


@settings(max_examples=12, deadline=None)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 3),
    side=st.integers(1, 3),
    windows=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    shift=st.integers(0, 2),
    qkv_bias=st.booleans(),
    qk_scale=st.sampled_from([None, 0.3]),
)
def test_is_the_published_block(
    heads: int, head_dim: int, side: int, windows: tuple[int, int], shift: int, qkv_bias: bool, qk_scale: float | None
) -> None:
    dim = heads * head_dim
    block = SwinACmix(dim, side, heads, shift_size=min(shift, side - 1), qkv_bias=qkv_bias, qk_scale=qk_scale)
    x = torch.randn(2, windows[0] * side, windows[1] * side, dim)
    assert relative_l2(randomised(block.double())(x.double()), pixel_by_pixel(block, x)) < 1e-12


def test_published_names_and_shapes() -> None:
    shapes = {name: tuple(value.shape) for name, value in SwinACmix(96, 7, 3).state_dict().items()}
    assert shapes == {
        "relative_position_bias_table": (169, 3),
        "relative_position_index": (49, 49),
        "rate1": (1,),
        "rate2": (1,),
        "qkv.weight": (288, 96),
        "qkv.bias": (288,),
        "proj.weight": (96, 96),
        "proj.bias": (96,),
        "fc.weight": (9, 9, 1, 1),
        "fc.bias": (9,),
        "dep_conv.weight": (96, 9, 3, 3),
    }


def test_a_convolution_bias_of_a_state_dict_is_taken_over() -> None:
    source, target = randomised(SwinACmix(8, 2, 2)), SwinACmix(8, 2, 2)
    target.load_state_dict(source.state_dict() | {"dep_conv.bias": torch.arange(8.0)})
    assert target.dep_conv.bias.tolist() == [*range(8)]
    target.load_state_dict(source.state_dict())
    assert target.dep_conv.bias is None
    with pytest.raises(RuntimeError, match=r"dep_conv\.bias"):
        target.load_state_dict(source.state_dict() | {"dep_conv.bias": torch.zeros(3)})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 4, 3), "dim is 8, num_heads 3"),
        ((8, 4, 0), "num_heads 0"),
        ((8, 4, 2, 4), "shift_size is 4, window_size 4"),
        ((8, 0, 2), "window_size 0"),
    ],
)
def test_the_constructor_refuses_with_the_number(arguments: tuple[int, ...], words: str) -> None:
    dim, side, heads, *shift = arguments
    with pytest.raises(UserError, match=words):
        SwinACmix(dim, side, heads, shift_size=shift[0] if shift else 0)


def test_a_map_that_windows_do_not_divide_is_refused_with_its_size() -> None:
    with pytest.raises(UserError, match="8x10 map is not divisible into windows of 4"):
        SwinACmix(8, 4, 2)(torch.zeros(1, 8, 10, 8))


# In modules.


def only(reports: list[BlockReport]) -> BlockReport:
    (report,) = reports
    return report


def called(mix: nn.Module, x: Tensor) -> list[Tensor]:
    height, width = x.shape[1:3]
    return [mix(x, height, width), mix(x, height, width, mask=shift_mask(height, width, mix.window_size, 1))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv_bias": False},
        {"conv_bias": True},
        {"scale": 0.3},
        {"channels": 9, "side": 3, "heads": 1},
        {"channels": 8, "side": 2, "heads": 8},
        {"reverse": "sizes"},
    ],
    ids=str,
)
def test_a_port_is_replaced_by_an_equal_block(options: dict[str, Any]) -> None:
    original = randomised(WindowMix(**options))
    original.window_size = original.side
    state = torch.random.get_rng_state()
    (block,), reports = canonicalise(nn.Sequential(original))
    assert torch.equal(torch.random.get_rng_state(), state), "recognition draws random numbers"
    report = only(reports)
    assert type(block) is SwinACmix, report
    channels, side, heads = options.get("channels", 12), original.side, original.heads
    assert report.geometry == {"dim": channels, "window_size": side, "num_heads": heads, "shift_size": 0}
    assert set(report.repaired) == {
        *(["no-bias"] if "conv_bias" not in options else []),
        *(["traced-batch"] if "reverse" not in options else []),
    }
    assert block.qkv.weight is original.qkv.weight
    assert not block.training
    x = torch.randn(3, 4 * side, 3 * side, channels)
    for actual, expected in zip(called(block, x), called(original, x), strict=True):
        assert relative_l2(actual, expected) < FLOAT32


class OwnRoll(WindowMix):
    """Takes the mask alone: its caller calls it otherwise."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, x.shape[1], x.shape[2], mask)


class Broken(WindowMix):
    def forward(self, x: Tensor, H: int, W: int, mask: Tensor | None = None) -> Tensor:
        raise RuntimeError("only for training")


@pytest.mark.parametrize(
    ("impostor", "reason"),
    [
        (lambda: WindowMix(maps=8), "no 3x3 convolution of 9 * head_dim channels"),
        (lambda: WindowMix(rates=2), "0 parameters of shape (1,)"),
        (lambda: WindowMix(index="transposed"), "differs from SwinACmix(dim=12, window_size=4, num_heads=3"),
        (lambda: WindowMix(swap_rates=True), "differs from"),
        (lambda: WindowMix(project_sum=True), "differs from"),
        (lambda: WindowMix(masks="ignored"), "differs from"),
        (lambda: WindowMix(order="kqv"), "differs from"),
        (lambda: WindowMix(leak=True), "it returns a tuple"),
        (lambda: WindowMix(out=24), "no linear layer from 12 to 12"),
        (OwnRoll, "its forward takes (x, mask), not (x, H, W, mask)"),
        (Broken, "its own forward fails: RuntimeError: only for training"),
    ],
)
def test_an_impostor_is_left_alone_and_named(impostor: Any, reason: str) -> None:
    assert_left_alone_in_a_module(SWIN_ACMIX, impostor(), reason)


# In graphs.


class Own(nn.Module):
    """The project's own blocks, as they are and shifted, in a model of images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.plain, self.shifted = SwinACmix(8, 4, 2), SwinACmix(8, 4, 2, shift_size=1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        return self.head((x + self.shifted(torch.relu(self.plain(x)))).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("exporter", "dynamic"),
    [
        pytest.param("torchscript", False, id="static-torchscript"),
        pytest.param("torchscript", True, id="dynamic-torchscript"),
        pytest.param("dynamo", False, id="static-dynamo"),
        # tests/families/test_contract.py has free axes by that exporter.
        pytest.param("dynamo", True, id="dynamic-dynamo", marks=pytest.mark.soak),
    ],
)
def test_published_code_as_it_is(tmp_path: Path, exporter: str, dynamic: bool) -> None:
    """A free batch is fixed by ``int`` under the tracer: that file fails at any other, and fusing repairs it."""
    model, x = randomised(Small()), torch.randn(2, 3, 16, 24)
    source = export(model, x, tmp_path / "plain.onnx", exporter=exporter, dynamic=["batch"] if dynamic else ())
    batches = [torch.randn(batch, 3, 16, 24) for batch in (1, 2, 3)] if dynamic else [x]
    if dynamic and exporter == "torchscript":
        with pytest.raises(Exception, match="Add"):
            outputs(source, batches[2])
    assert_fused(model, source, *batches, count=2)


def test_own_blocks_at_any_size(tmp_path: Path) -> None:
    model = randomised(Own())
    export(model, torch.randn(2, 3, 8, 12), tmp_path / "plain.onnx", dynamic=AXES)
    shapes = [(1, 3, 8, 12), (2, 3, 12, 8), (3, 3, 8, 8)]
    for branch in ("dense", "grouped"):
        inputs = [torch.randn(shape) for shape in shapes]
        assert_fused(model, tmp_path / "plain.onnx", *inputs, count=2, conv_branch=branch)


@pytest.mark.parametrize("shift", [0, 2])
def test_the_form_is_multi_head_attention(tmp_path: Path, shift: int) -> None:
    """MatMul, Add, Softmax, MatMul on [batch, heads, S, d] and nothing between; one Transpose there and one back."""
    side, heads, windows = 4, 3, 6
    model = randomised(Published(WindowMix(), 8, 12, side, shift))
    x = torch.randn(2, 96, 12)
    source = export(model, x, tmp_path / "plain.onnx", dynamic=["batch"])
    assert_fused(model, source, x)
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "fused.onnx"), data_prop=True).graph
    nodes = [node for node in graph.node if node.name.startswith("swin_acmix_0.")]
    makes = {node.output[0]: node for node in nodes}
    reads = {name: [node for node in nodes if name in node.input] for node in nodes for name in node.output}

    chain = [next(node for node in nodes if node.op_type == "Softmax")]
    while (before := [makes[name] for name in chain[0].input if name in makes]) and chain[0].op_type != "MatMul":
        chain[:0] = before[:1]
    while chain[-1].op_type != "MatMul" or len(chain) == 1:
        (after,) = reads[chain[-1].output[0]]
        chain.append(after)
    assert [node.op_type for node in chain] == ["MatMul", "Add", "Softmax", "MatMul"]
    q, k, v = (makes[name] for name in (*chain[0].input, chain[-1].input[1]))
    assert (q.op_type, v.op_type) == ("Gather", "Gather")
    assert (k.op_type, list(k.attribute[0].ints)) == ("Transpose", [0, 1, 3, 2])
    beside = windows * heads if shift else heads
    stored = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert stored[chain[1].input[1]] == [1, beside, side**2, side**2]
    sizes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.value_info}
    assert sizes[q.output[0]][1:] == [beside, side**2, 4]
    counts = {op: sum(node.op_type == op for node in nodes) for op in ("Transpose", "Reshape", "Mul", "Shape", "Conv")}
    assert counts == {"Transpose": 5, "Reshape": 4, "Mul": 0, "Shape": 0, "Conv": 2}


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 4]),
    side=st.integers(2, 4),
    windows=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    shifted=st.booleans(),
    batch=st.integers(1, 2),
    free=st.booleans(),
    fold=st.booleans(),
    qkv_bias=st.booleans(),
    conv_bias=st.booleans(),
    scale=st.sampled_from([None, 0.7]),
    branch=st.sampled_from(["dense", "grouped"]),
)
def test_any_geometry(
    tmp_path: Path, heads: int, head_dim: int, side: int, windows: tuple[int, int], shifted: bool, batch: int,
    free: bool, fold: bool, qkv_bias: bool, conv_bias: bool, scale: float | None, branch: str,
) -> None:  # fmt: skip
    height, width, channels = windows[0] * side, windows[1] * side, heads * head_dim
    # Of one channel, what int() fixed at two images broadcasts over one instead of failing.
    reverse = "int" if head_dim > 1 else "sizes"
    mix = WindowMix(channels, side, heads, reverse=reverse, qkv_bias=qkv_bias, conv_bias=conv_bias, scale=scale)
    model = randomised(Published(mix, height, width, side, side // 2 if shifted else 0))
    x = torch.randn(batch, height * width, channels)
    source = export(model, x, tmp_path / "plain.onnx", dynamic=["batch"] if free else (), fold=fold)
    others = [torch.randn(3, height * width, channels)] if free else []
    assert_fused(model, source, x, *others, conv_branch=branch)


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "another order": ({"order": "kqv"}, "its logits are not scale"),
    "values of queries": ({"order": "qkq"}, "something else"),
    "projected sum": ({"project_sum": True}, "are 1 matrix products"),
    "one rate a channel": ({"rates": 12}, "not added"),
    "leaks": ({"leak": True}, "not added"),
}


class Sized(WindowMix):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x, 8, 12)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_do_not_fuse(tmp_path: Path, name: str) -> None:
    options, reason = NEAR_MISSES[name]
    model, x = randomised(Sized(**options)), torch.randn(2, 8, 12, 12)
    assert_left_alone_in_a_graph(SWIN_ACMIX, model, export(model, x, tmp_path / "plain.onnx"), x, reason)
