"""A convolution in two stages, and back: by definition, as people write it in modules and graphs, and what is none."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from acmix_deploy.errors import UserError
from acmix_deploy.families import canonicalise
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.shift_conv.graph import SHIFT_CONV
from acmix_deploy.families.shift_conv.module import ShiftConv
from acmix_deploy.fusion import fuse
from acmix_deploy.operators.spec import TOLERANCES
from acmix_deploy.profile.layers import blocks_of
from acmix_deploy.runtime.inputs import AXES
from tests.families.parts import (
    assert_left_alone_in_a_graph,
    assert_left_alone_in_a_module,
    export,
    operators,
    outputs,
    randomised,
    relative_l2,
)

LIMIT = TOLERANCES["float32"].limit()


def tap_by_tap(block: ShiftConv, x):
    """The block by definition: each tap's 1x1 convolution, read at the pixel that it is shifted from."""
    k, s = block.kernel_size, block.stride
    weight = block.pointwise.weight.detach().double().numpy()[:, :, 0, 0]
    biases = np.zeros(len(weight)) if block.pointwise.bias is None else block.pointwise.bias.detach().double().numpy()
    maps = np.einsum("mi,bihw->bmhw", weight, x.double().numpy()) + biases[:, None, None]
    batch, _, height, width = maps.shape
    y = np.zeros((batch, block.out_channels, -(-height // s), -(-width // s)))
    for out in range(block.out_channels):
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                for p in range(k):
                    for q in range(k):
                        row, column = s * i + p - k // 2, s * j + q - k // 2
                        if 0 <= row < height and 0 <= column < width:
                            y[:, out, i, j] += maps[:, out * k * k + p * k + q, row, column]
    return torch.from_numpy(y if block.bias is None else y + block.bias.detach().double().numpy()[:, None, None])


geometries = {
    "in_channels": st.integers(1, 4),
    "out_channels": st.integers(1, 4),
    "kernel_size": st.sampled_from([1, 3, 5]),
    "stride": st.integers(1, 3),
    "bias": st.booleans(),
}


@settings(max_examples=15, deadline=None)
@given(**geometries, size=st.tuples(st.integers(1, 6), st.integers(1, 6)), border=st.booleans())
def test_definition(size, border, **geometry):
    block = ShiftConv(**geometry)
    if border:
        block.pointwise.bias = nn.Parameter(torch.empty(len(block.pointwise.weight)))
    randomised(block)
    x = torch.randn(2, block.in_channels, *size)
    assert relative_l2(block(x), tap_by_tap(block, x)) < LIMIT


@settings(max_examples=15, deadline=None)
@given(**geometries, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_from_a_convolution_and_back(dtype, kernel_size, in_channels, out_channels, stride, bias):
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=bias, dtype=dtype).eval()
    block = ShiftConv.of(conv)
    x = torch.randn(2, in_channels, 7, 5, dtype=dtype)
    limit = {torch.float64: 1e-13, torch.float32: LIMIT, torch.bfloat16: 3e-2}[dtype]
    assert relative_l2(block(x), conv(x)) < limit
    again = block.convolution()
    assert torch.equal(again.weight, conv.weight)
    assert torch.equal(again(x), conv(x))
    assert (block.training, again.training) == (False, False)


def test_both_stages_have_the_convolution_s_gradients():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    block, x = ShiftConv.of(conv), torch.randn(2, 3, 5, 6)
    for module in (conv, block):
        module(x).pow(2).sum().backward()
    gradient = block.pointwise.weight.grad.view(4, 3, 3, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(gradient, conv.weight.grad)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"groups": 2, "padding": 1}, "groups of the convolution is 2; it must be 1"),
        ({"dilation": 2, "padding": 2}, r"padding of the convolution is \(2, 2\); it must be \(1, 1\)"),
        ({"dilation": 2, "padding": 1}, r"dilation of the convolution is \(2, 2\)"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode of the convolution is reflect"),
        ({}, r"padding of the convolution is \(0, 0\)"),
        ({"kernel_size": (3, 1), "padding": 1}, r"kernel_size of the convolution is \(3, 1\)"),
        ({"kernel_size": 4, "padding": 2}, "kernel_size=4"),
    ],
)
def test_convolutions_that_it_is_not(arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        ShiftConv.of(nn.Conv2d(4, 4, **{"kernel_size": 3, **arguments}))


def test_biases_of_the_maps_are_no_convolution_s():
    block = ShiftConv(2, 3)
    block.pointwise.bias = nn.Parameter(torch.ones(27))
    with pytest.raises(UserError, match="cut it off at the border"):
        block.convolution()
    nn.init.zeros_(block.pointwise.bias)
    x = torch.randn(1, 2, 4, 5)
    assert relative_l2(block.convolution()(x), block(x)) < LIMIT


# As people write it, each in another way.


def one_hot(channels, k=3, stride=1, multiplier=1):
    """A depthwise convolution whose filters have a single one, at every place of the window in turn."""
    conv = nn.Conv2d(channels, channels * multiplier, k, stride, k // 2, groups=channels, bias=False)
    conv.weight.requires_grad_(False).zero_()
    for index in range(channels * multiplier):
        tap = index % (k * k)
        conv.weight[index, 0, tap // k, tap % k] = 1
    return conv


class DepthwiseThenSum(nn.Module):
    """One 1x1 convolution to all maps, a depthwise shift, and the sum over a fifth axis."""

    def __init__(self, cin=3, cout=4, k=3, stride=1, bias=False):
        super().__init__()
        self.expand = nn.Conv2d(cin, cout * k * k, 1, bias=bias)
        self.move = one_hot(cout * k * k, k, stride)
        self.taps = k * k

    def forward(self, x):
        return self.move(self.expand(x)).unflatten(1, (-1, self.taps)).sum(2)


class OneByOne(nn.Module):
    """A list of 1x1 convolutions and a list of shifts, added one after the other."""

    def __init__(self, cin=3, cout=4, k=3, stride=1, bias=False):
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(cin, cout, 1, bias=bias) for _ in range(k * k))
        self.moves = nn.ModuleList()
        for tap in range(k * k):
            move = nn.Conv2d(cout, cout, k, stride, k // 2, groups=cout, bias=False)
            move.weight.requires_grad_(False).zero_()
            move.weight[:, :, tap // k, tap % k] = 1
            self.moves.append(move)

    def forward(self, x):
        return sum(move(project(x)) for move, project in zip(self.moves, self.projections, strict=True))


class PadAndSlice(nn.Module):
    """No shift kernels: the map is padded once and read at nine places."""

    def __init__(self, cin=3, cout=4, k=3, stride=1, bias=False):
        super().__init__()
        self.expand = nn.Conv2d(cin, cout * k * k, 1, bias=bias)
        self.bias = nn.Parameter(torch.zeros(1, cout, 1, 1))
        self.k, self.stride = k, stride

    def forward(self, x):
        k, s, (height, width) = self.k, self.stride, x.shape[2:]
        maps = F.pad(self.expand(x), [k // 2] * 4).chunk(k * k, 1)
        y = self.bias
        for tap, one in enumerate(maps):
            p, q = divmod(tap, k)
            y = y + one[:, :, p : p + height : s, q : q + width : s]
        return y


class Stacked(PadAndSlice):
    """Each map shifted on its own, then stacked and summed."""

    def forward(self, x):
        k, s, (height, width) = self.k, self.stride, x.shape[2:]
        moved = []
        for tap, one in enumerate(self.expand(x).chunk(k * k, 1)):
            p, q = tap // k - k // 2, tap % k - k // 2
            moved.append(F.pad(one, [-q, q, -p, p])[..., :height:s, :width:s])
        return torch.stack(moved).sum(0)


class ShiftedFirst(nn.Module):
    """Nine shifted copies of the input, then one 1x1 convolution."""

    def __init__(self, cin=3, cout=4, k=3, stride=1, bias=False):
        super().__init__()
        self.move = one_hot(cin, k, stride, multiplier=k * k)
        if bias:  # as of a BatchNorm that was folded in
            self.move.bias = nn.Parameter(torch.empty(cin * k * k))
        self.mix = nn.Conv2d(cin * k * k, cout, 1, bias=bias)

    def forward(self, x):
        return self.mix(self.move(x))


class SlicedFirst(nn.Module):
    def __init__(self, cin=3, cout=4, k=3, stride=1, bias=False):
        super().__init__()
        self.mix = nn.Conv2d(cin * k * k, cout, 1, bias=bias)
        self.k, self.stride = k, stride

    def forward(self, x):
        k, s, (height, width) = self.k, self.stride, x.shape[2:]
        spread = F.pad(x, [k // 2] * 4)
        return self.mix(
            torch.cat([spread[:, :, p : p + height : s, q : q + width : s] for p in range(k) for q in range(k)], 1)
        )


SPELLINGS = [DepthwiseThenSum, OneByOne, PadAndSlice, Stacked, ShiftedFirst, SlicedFirst]


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"bias": True}, {"k": 5, "cin": 2}], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_modules_are_replaced(spelling, options):
    original = randomised(spelling(**options))
    x = torch.randn(2, options.get("cin", 3), 7, 8)
    expected = original(x)
    block, (report,) = canonicalise(copy.deepcopy(original))
    assert type(block) is ShiftConv, report
    assert (report.family, report.status) == ("shift_conv", "replaced")
    assert report.geometry == {
        "in_channels": options.get("cin", 3),
        "out_channels": 4,
        "kernel_size": options.get("k", 3),
        "stride": options.get("stride", 1),
    }
    assert relative_l2(block(x), expected) < LIMIT


@pytest.mark.parametrize(
    ("exporter", "dynamic", "spelling"),
    [
        pytest.param(
            exporter,
            dynamic,
            spelling,
            id=f"{spelling.__name__}-{exporter}-{'dynamic' if dynamic else 'static'}",
            # Free axes take dynamo its time, and make its graphs others only where these are sliced.
            marks=[pytest.mark.soak] * (exporter == "dynamo" and bool(dynamic) and spelling is not SlicedFirst),
        )
        for exporter in ("dynamo", "torchscript")
        for dynamic in (AXES, ())
        for spelling in SPELLINGS
    ],
)
def test_graphs_are_fused(tmp_path, spelling, dynamic, exporter):
    """Between other layers, with a BatchNorm that exporters fold into the shifts."""
    block = spelling(6, 4, stride=2)
    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), block, nn.BatchNorm2d(4), nn.ReLU()))
    x = torch.randn(2, 3, 12, 14)
    source = export(model, x, tmp_path / "plain.onnx", exporter=exporter, dynamic=dynamic)
    report = fuse(source, tmp_path / "fused.onnx", expect=1).found
    kinds = operators(tmp_path / "fused.onnx")
    assert (kinds.count("Conv"), kinds.count("Relu")) == (2, 2)
    assert set(kinds) <= {"Conv", "Relu", "BatchNormalization"}
    (found,) = report.blocks
    assert (found.name, found.operator) == ("shift_conv_0", "Conv")
    assert found.settings == {"kernel_shape": [3, 3], "stride": 2, "maps": found.settings["maps"]}
    sizes = [(1, 3, 11, 9), (3, 3, 20, 7), (2, 3, 5, 5)] if dynamic else [x.shape]
    for size in sizes:
        x = torch.randn(size)
        assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < LIMIT


def test_biases_of_the_shifts_are_the_convolution_s(tmp_path):
    model, x = randomised(ShiftedFirst(bias=True)), torch.randn(2, 3, 7, 6)
    fuse(export(model, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx", expect=1)
    assert operators(tmp_path / "fused.onnx") == ["Conv"]
    assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < LIMIT


@pytest.mark.parametrize("dynamic", [(), AXES], ids=["static", "dynamic"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("spelling", [DepthwiseThenSum, Stacked])
def test_biases_of_the_maps_become_a_border_map(tmp_path, spelling, stride, dynamic):
    model, x = randomised(spelling(stride=stride, bias=True)), torch.randn(2, 3, 12, 14)
    source = export(model, x, tmp_path / "plain.onnx", dynamic=dynamic)
    fuse(source, tmp_path / "fused.onnx", expect=1)
    kinds = operators(tmp_path / "fused.onnx")
    extra = ["Concat", "Shape"] if dynamic else []
    assert sorted(kinds) == sorted(["Conv", "Conv", "ConstantOfShape", "Add", *extra])
    for size in [(1, 3, 3, 9), (3, 3, 13, 8)] if dynamic else [x.shape]:
        x = torch.randn(size)
        assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < LIMIT


def test_blocks_in_a_row_with_and_without_a_residual(tmp_path):
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = DepthwiseThenSum(3, 3), PadAndSlice(3, 3), ShiftConv(3, 3)

        def forward(self, x):
            x = torch.relu(x)
            y = self.second(self.first(x))
            return torch.relu(self.third(y) + x) + y

    model, x = randomised(Stage()), torch.randn(1, 3, 8, 9)
    fuse(export(model, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx", expect=3)
    assert operators(tmp_path / "fused.onnx").count("Conv") == 3
    assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < LIMIT


def test_beside_a_block_of_another_family(tmp_path):
    """ACmix, too, ends in one-hot kernels behind a 1x1 convolution as long as it is untrained."""
    model = nn.Sequential(ACmix(4, 4, 3, head=2), nn.ReLU(), ShiftConv(4, 4), nn.ReLU(), ACmix(4, 4, 3, head=2)).eval()
    x = torch.randn(1, 4, 8, 9)
    assert [block.family for block in canonicalise(model)[1]] == ["acmix", "acmix", "shift_conv"]
    source = export(model, x, tmp_path / "plain.onnx", dynamic=AXES)
    assert set(blocks_of(onnx.load(source)).values()) == {"acmix_0", "acmix_1", "shift_conv_0", None}
    report = fuse(source, tmp_path / "fused.onnx").found
    assert [(block.name, block.fused) for block in report.blocks] == [
        ("acmix_0", True),
        ("acmix_1", True),
        ("shift_conv_0", True),
    ]
    assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < LIMIT


# Near misses


class RolledAround(PadAndSlice):
    def forward(self, x):
        maps = self.expand(x).chunk(9, 1)
        return sum(one.roll((t // 3 - 1, t % 3 - 1), (2, 3)) for t, one in enumerate(maps))


class Greatest(DepthwiseThenSum):
    def forward(self, x):
        return self.move(self.expand(x)).unflatten(1, (-1, self.taps)).amax(2)


class PerChannel(nn.Module):
    """Each channel shifted in a direction of its own between two layers: nine times cheaper than a convolution."""

    def __init__(self):
        super().__init__()
        self.move = one_hot(9)
        self.mix = nn.Conv2d(9, 9, 1)

    def forward(self, x):
        return self.mix(self.move(x))


class AddedTwice(DepthwiseThenSum):
    """All maps of one output are moved to one place: a 1x1 convolution in disguise."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.move.weight.zero_()[:, :, 0, 1] = 1


class Leaking(DepthwiseThenSum):
    def forward(self, x):
        maps = self.expand(x)
        return self.move(maps).unflatten(1, (-1, self.taps)).sum(2), maps


class ReadElsewhere(DepthwiseThenSum):
    def forward(self, x):
        maps = self.expand(x)
        return self.move(maps).unflatten(1, (-1, self.taps)).sum(2) * maps.mean()


class Both(nn.Module):
    def __init__(self, maps):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, maps, 1), nn.Conv2d(3, maps, 1)

    def forward(self, x):
        return torch.cat([self.first(x), self.second(x.relu())], 1)


class OfTwoTensors(PadAndSlice):
    """Half of its maps are made of the input, half of what a ReLU leaves of it."""

    def __init__(self):
        super().__init__()
        self.expand = Both(18)


@pytest.mark.parametrize("dynamic", [(), AXES], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("near_miss", "reason"),
    [
        (RolledAround, None),
        (Greatest, "9.0 times the multiplications"),
        (PerChannel, "one 3x3 convolution would take 9.0 times the multiplications"),
        (AddedTwice, "do not move each of 36 maps once"),
        (Leaking, "is also an output of the graph"),
        (ReadElsewhere, "is also read by"),
        (OfTwoTensors, "that are not all 1x1 convolutions of"),
    ],
)
def test_near_misses_in_graphs(tmp_path, near_miss, reason, dynamic):
    model = randomised(near_miss())
    x = torch.randn(1, 9 if near_miss is PerChannel else 3, 8, 9)
    source = export(model, x, tmp_path / "plain.onnx", dynamic=dynamic)
    assert_left_alone_in_a_graph(SHIFT_CONV, model, source, x, reason)


def test_an_output_between_the_shifts_and_the_sum(tmp_path):
    """Ends the block there, which is then no longer worth a convolution."""
    source = export(randomised(DepthwiseThenSum()), torch.randn(1, 3, 8, 9), tmp_path / "plain.onnx")
    plain = onnx.load(source)
    moved = [node.output[0] for node in plain.graph.node if node.op_type == "Conv"][1]
    plain.graph.output.append(helper.make_tensor_value_info(moved, TensorProto.FLOAT, [1, 36, 8, 9]))
    onnx.save(plain, source)
    (left_alone,) = fuse(source, tmp_path / "fused.onnx", expect=0).found.blocks
    assert "9.0 times the multiplications" in left_alone.reason


@pytest.mark.parametrize(
    ("near_miss", "reason"),
    [
        (RolledAround, None),
        (Greatest, "differs from ShiftConv"),
        (PerChannel, "9.0 times the multiplications"),
        (AddedTwice, "do not move each of 36 maps once"),
        (Leaking, "its result is a tuple"),
        (ReadElsewhere, "its shifts"),
        (OfTwoTensors, None),
    ],
)
def test_near_misses_in_modules(near_miss, reason):
    assert_left_alone_in_a_module(SHIFT_CONV, near_miss(), reason)
