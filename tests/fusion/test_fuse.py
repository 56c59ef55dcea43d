"""Plain to fused ONNX: every exporter's spelling of a block fuses and computes the same; near misses do not fuse."""

from __future__ import annotations

import importlib
import io
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from acmix_deploy.cli import main
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.families import FAMILIES
from acmix_deploy.families.acmix.examples import ZeroPadded
from acmix_deploy.families.acmix.graph import ACMIX
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.local_attention.graph import LOCAL_ATTENTION as LOCAL
from acmix_deploy.fusion import fuse
from acmix_deploy.graph import NoMatch, Reached
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.runtime.inputs import AXES
from acmix_deploy.runtime.onnxruntime import open_session
from tests.families import parts as family_parts
from tests.families.parts import assert_left_alone_in_a_graph, export, operators, outputs, relative_l2

FLOAT32 = LOCAL_ATTENTION.tolerances["float32"].floor
assert_fused = partial(family_parts.assert_fused, ACMIX)


def randomised(block: ACmix, *, conv_bias: bool = True) -> ACmix:
    """The block with every weight random, a bias of ``dep_conv`` among them."""
    if conv_bias:
        block.dep_conv.bias = nn.Parameter(torch.empty(block.out_planes))
    return family_parts.randomised(block)


@pytest.mark.parametrize(("conv_branch", "convolutions"), [("dense", 3), ("grouped", 2)])
def test_both_forms_of_the_convolution(tmp_path, conv_branch, convolutions):
    block, x = randomised(ACmix(6, 8, head=2, stride=2)), torch.randn(1, 6, 10, 12)
    source = export(block, x, tmp_path / "plain.onnx", dynamic=AXES)
    others = [torch.randn(3, 6, 18, 8), torch.randn(2, 6, 8, 22)]
    report = assert_fused(block, source, x, *others, conv_branch=conv_branch)
    (found,) = report.blocks
    assert found.settings["num_heads"] == 2
    assert found.settings["stride"] == 2
    assert found.settings["scale"] == pytest.approx(0.5)
    nodes = operators(tmp_path / "fused.onnx")
    assert report.nodes_after == len(nodes) <= 9 < report.nodes_before
    assert nodes.count("Conv") == convolutions


@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 8]),
    in_planes=st.integers(1, 7),
    kernel=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 1, 2]),
    batch=st.integers(1, 2),
    more=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    dynamic=st.sampled_from([(), AXES]),
    fold=st.booleans(),
    opset=st.sampled_from([11, 12, 13, 16, 17]),
    conv_bias=st.booleans(),
    conv_branch=st.sampled_from(["dense", "grouped"]),
)
@example(  # four pixels: fewer queries than position_weight has rows
    heads=1, head_dim=8, in_planes=1, kernel=3, stride=1, batch=1, more=(0, 0), dynamic=(), fold=False, opset=17,
    conv_bias=False, conv_branch="dense",
)  # fmt: skip
def test_any_geometry(
    tmp_path, heads, head_dim, in_planes, kernel, stride, batch, more, dynamic, fold, opset, conv_bias, conv_branch
):
    least = math.ceil((kernel // 2 + 1) / stride)
    height, width = ((least + extra) * stride for extra in more)
    block = randomised(ACmix(in_planes, heads * head_dim, kernel, heads, stride=stride), conv_bias=conv_bias)
    x = torch.randn(batch, in_planes, height, width)
    source = export(block, x, tmp_path / "plain.onnx", dynamic=dynamic, fold=fold, opset=opset)
    assert_fused(block, source, x, conv_branch=conv_branch)


@pytest.mark.parametrize("opset", [18, 21, 22, 23, 24])
def test_newer_opsets(tmp_path, opset):
    """Above 21 lowered to it. A file format that nobody reads yet is lowered too, where nothing uses it."""
    block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, 9, 8)
    source = export(block, x, tmp_path / "plain.onnx")
    converted = onnx.version_converter.convert_version(onnx.load(source), opset)
    converted.ir_version = 8 if opset == 18 else 10
    onnx.save(converted, source)
    assert_fused(block, source, x)
    converted.ir_version = 99
    onnx.save(converted, source)
    assert fuse(source, tmp_path / "fused.onnx", expect=1).found.opset == min(opset, 21)
    fused = onnx.load(tmp_path / "fused.onnx")
    assert {entry.version for entry in fused.opset_import if entry.domain == ""} == {min(opset, 21)}
    assert fused.ir_version <= 10


def newer(nodes, folder, opset, shape=("batch", 3, "height", "width")):
    """A file of standard operators from x to y."""
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy")
    graph = helper.make_graph([helper.make_node(*node) for node in nodes], "graph", [x], [y])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10), folder / "a.onnx"
    )
    return folder / "a.onnx"


@pytest.mark.parametrize(
    ("operator", "opset", "why"),
    [("Swish", 24, "Swish"), ("RMSNormalization", 23, "RMSNormalization"), ("Relu", 99, "")],
)
def test_what_cannot_be_lowered_is_told_with_what_reads_it(tmp_path, operator, opset, why):
    inputs = ["x", "x"] if operator == "RMSNormalization" else ["x"]
    with pytest.raises(UserError, match=f"has opset {opset} and cannot be converted to 21: .*{why}") as refusal:
        fuse(newer([(operator, inputs, ["y"])], tmp_path, opset), tmp_path / "fused.onnx")
    reads = "ONNX Runtime refuses" if opset == 99 else "ONNX Runtime .* runs it, without fused blocks"
    assert re.search(f"Export it with --opset 21 or below. As it is, {reads}", refusal.value.hint)


def test_what_is_lowered_is_compared_with_what_it_was(tmp_path, monkeypatch):
    source = newer([("Softplus", ["x"], ["z"]), ("Neg", ["z"], ["y"])], tmp_path, 22)
    fuse(source, tmp_path / "fused.onnx", expect=0)
    right = onnx.version_converter.convert_version

    def wrong(model, opset):
        converted = right(model, opset)
        converted.graph.node[1].op_type = "Abs"
        return converted

    monkeypatch.setattr(onnx.version_converter, "convert_version", wrong)
    with pytest.raises(UserError, match="has opset 22 and cannot be converted to 21: y differs: relative L2 2"):
        fuse(source, tmp_path / "fused.onnx")


def test_what_is_fused_already_is_said(tmp_path, capsys):
    block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, 9, 8)
    fuse(export(block, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx", expect=1)
    assert main(["fuse", str(tmp_path / "fused.onnx"), "-o", str(tmp_path / "again.onnx")]) == 0
    assert "the file was fused before: it has 1 AcmixLocalAttention already" in capsys.readouterr().out
    with pytest.raises(CheckFailed, match="It is fused already: it has 1 AcmixLocalAttention"):
        fuse(tmp_path / "fused.onnx", tmp_path / "again.onnx", expect=1)
    assert fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx").found.already == {}


def test_constants_folded_into_the_position_term(tmp_path):
    """Graphsurgeon folds the whole position chain, down to the unfolded tensor."""
    block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, 9, 8)
    source = export(block, x, tmp_path / "plain.onnx")
    graph = gs.import_onnx(onnx.load(source))
    graph.fold_constants().cleanup()
    assert sum(node.op == "Conv" for node in graph.nodes) == 5, "conv_p should be folded away"
    onnx.save(gs.export_onnx(graph), source)
    assert_fused(block, source, x)


class Frozen(nn.Module):
    """Stands for conv_p where an exporter stored its result: a map [1, d, H, W]."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        return self.value


def position_map(block: ACmix, height: int, width: int) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return block.conv_p(torch.stack([x, y])[None]).detach()


def test_stored_position_map(tmp_path):
    block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, 9, 8)
    block.conv_p = Frozen(position_map(block, 9, 8))
    assert_fused(block, export(block, x, tmp_path / "plain.onnx"), x)


class Published(ACmix):
    """The block with coordinates made as the authors' code makes them: by linspace, for the size at hand."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv_p = OnLinspace(self.conv_p)


class OnLinspace(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        height, width = coordinates.shape[2:]
        x = torch.linspace(-1.0, 1.0, width).unsqueeze(0).repeat(height, 1)
        y = torch.linspace(-1.0, 1.0, height).unsqueeze(1).repeat(1, width)
        return self.conv(torch.cat([x.unsqueeze(0), y.unsqueeze(0)], 0).unsqueeze(0))


@pytest.mark.parametrize("dynamic", [(), AXES], ids=["static", "dynamic"])
@pytest.mark.parametrize("fold", [False, True], ids=["unfolded", "folded"])
@pytest.mark.parametrize("opset", [12, 13, 17])
def test_published_code_as_it_is(tmp_path, dynamic, fold, opset):
    """In front of a convolution: what the exporter makes float64 spreads to all that follows, weights and output too.

    ONNX Runtime refuses such a file; fusing repairs it.
    """
    model = nn.Sequential(randomised(Published(4, 8, head=2, stride=2)), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
    x = torch.randn(1, 4, 10, 8)
    source = export(model, x, tmp_path / "plain.onnx", dynamic=dynamic, fold=fold, opset=opset)
    if TensorProto.DOUBLE in {tensor.data_type for tensor in onnx.load(source).graph.initializer}:
        with pytest.raises(UserError, match="ONNX Runtime refuses") as refusal:
            open_session(source)
        assert "acmix-deploy fuse" in refusal.value.hint
    else:
        assert dynamic or not fold, "this exporter folded the position term in float32"
    assert_fused(model, source, x)


def test_size_frozen_by_the_exporter(tmp_path):
    """The signature is dynamic and the graph holds for one size alone; the fused block takes any."""
    block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, 64, 64)
    block.conv_p = Frozen(position_map(block, 64, 64))
    source = export(block, x, tmp_path / "plain.onnx", dynamic=AXES)
    assert_fused(block, source, x)
    block.conv_p = Frozen(position_map(randomised(ACmix(4, 8, head=2)), 7, 9))
    assert outputs(tmp_path / "fused.onnx", torch.randn(1, 4, 7, 9)).shape == (1, 8, 7, 9)


@pytest.mark.parametrize("side", [20, 40])
def test_half_precision_with_a_stored_position_map(tmp_path, side):
    """The map is rounded to half precision, by more than neighbours differ where the map is large."""
    torch.manual_seed(0)
    block, x = ACmix(16, 32, head=4).eval(), torch.randn(1, 16, side, side)
    exact = block(x).detach().numpy()
    block.conv_p = Frozen(position_map(block, side, side))
    source = export(block.half(), x.half(), tmp_path / "plain.onnx")
    fuse(source, tmp_path / "fused.onnx", expect=1)
    with torch.no_grad():
        eager = block(x.half()).float().numpy()
    limit = LOCAL_ATTENTION.tolerances["float16"].limit(relative_l2(eager, exact))
    assert relative_l2(outputs(tmp_path / "fused.onnx", x.half()), exact) < limit


def test_file_that_is_fused_in_part(tmp_path):
    """Fusing again leaves what is fused and adds no second body."""
    model, x = Detector().eval(), torch.randn(1, 3, 16, 12)
    source = export(model, x, tmp_path / "plain.onnx")
    plain = onnx.load(source)
    leaked = next(node.output[0] for node in plain.graph.node if node.op_type == "Softmax")
    plain.graph.output.append(helper.make_tensor_value_info(leaked, 1, [None] * 4))
    onnx.save(plain, source)
    assert fuse(source, tmp_path / "once.onnx").found.fused == 1
    once = onnx.load(tmp_path / "once.onnx")
    once.graph.output.pop()
    onnx.save(once, tmp_path / "once.onnx")
    again = fuse(tmp_path / "once.onnx", tmp_path / "twice.onnx", expect=1).found
    twice = onnx.load(tmp_path / "twice.onnx")
    assert [block.name for block in again.blocks] == ["acmix_1"]
    assert len(twice.functions) == 1
    assert len({node.name for node in twice.graph.node}) == len(twice.graph.node)
    assert relative_l2(outputs(tmp_path / "twice.onnx", x), model(x)) < FLOAT32


def test_source_is_not_overwritten(tmp_path):
    block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, 9, 8)
    source = export(block, x, tmp_path / "plain.onnx")
    with pytest.raises(UserError, match="would be overwritten"):
        fuse(source, tmp_path / "." / "plain.onnx")


class Detector(nn.Module):
    """Two blocks in a row, with what usually surrounds them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.SiLU())
        self.first = randomised(ACmix(8, 8, head=2))
        self.second = randomised(ACmix(8, 12, 5, head=3, stride=2))
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.second(torch.relu(self.first(x)) + x)).softmax(1)


def test_several_blocks_and_metadata(tmp_path):
    model, x = Detector().eval(), torch.randn(1, 3, 16, 12)
    source = export(model, x, tmp_path / "plain.onnx")
    plain = onnx.load(source)
    plain.metadata_props.add(key="names", value="{0: 'cat'}")
    onnx.save(plain, source)
    report = fuse(source, tmp_path / "fused.onnx", expect=2).found
    assert [block.name for block in report.blocks] == ["acmix_0", "acmix_1"]
    assert all(block.relative_l2 < FLOAT32 for block in report.blocks)
    fused = onnx.load(tmp_path / "fused.onnx")
    assert {entry.key: entry.value for entry in fused.metadata_props}["names"] == "{0: 'cat'}"
    assert len(fused.functions) == 1
    assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < FLOAT32


def test_size_of_file_does_not_depend_on_the_image(tmp_path):
    sizes = []
    for height in (16, 64):
        block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, height, height)
        fuse(export(block, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx", expect=1)
        sizes.append((tmp_path / "fused.onnx").stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 64, "the digits of a shape may differ, nothing else"


def test_no_bias_means_no_border_map(tmp_path):
    block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, 9, 8)
    for conv in (block.conv1, block.conv2, block.conv3):
        nn.init.zeros_(conv.bias)
    assert_fused(block, export(block, x, tmp_path / "plain.onnx"), x)
    assert sorted(operators(tmp_path / "fused.onnx")) == ["AcmixLocalAttention", "Add", "Conv", "Conv"]


# Near misses: each computes something else, so none may fuse.


class Dilated(ACmix):
    """A window with holes: as many taps, elsewhere."""

    def _neighbours(self, x):
        padded = nn.functional.pad(x, (self.kernel_att - 1,) * 4, mode="reflect")
        return nn.functional.unfold(padded, self.kernel_att, dilation=2, stride=self.stride)


class EvenWindow(ACmix):
    """A 4 x 4 window, which has no middle."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kernel_att = 4

    def forward(self, x):
        q, k, v = self.conv1(x), self.conv2(x), self.conv3(x)
        return self.rate1 * self._attend(q, k, v) + self.rate2 * self._convolve(q, k, v)

    def _neighbours(self, x):
        return nn.functional.unfold(nn.functional.pad(x, (1, 2, 1, 2), mode="reflect"), 4, stride=self.stride)


class UnevenScale(ACmix):
    def _attend(self, q, k, v):
        return super()._attend(q * torch.linspace(0.9, 1.1, q.shape[1]).view(1, -1, 1, 1), k, v)


class ValuesOfAnother(ACmix):
    """Attends to the keys instead of the values."""

    def _attend(self, q, k, v):
        return super()._attend(q, k, k + 0.001 * v)


class LeakedAttention(ACmix):
    """Also returns the attended values before they are weighted."""

    def forward(self, x):
        attended = self._attend(self.conv1(x), self.conv2(x), self.conv3(x))
        convolved = self._convolve(self.conv1(x), self.conv2(x), self.conv3(x))
        return self.rate1 * attended + self.rate2 * convolved, attended


NEAR_MISSES = {
    Dilated: "border that is reflected, dilation 2, without biases",
    EvenWindow: "Softmax runs over 16 values",
    UnevenScale: "with one scale for all heads",
    ValuesOfAnother: "no 3x3 convolution of x with zero padding: relative residual",
}


@pytest.mark.parametrize("kind", NEAR_MISSES, ids=lambda kind: kind.__name__)
def test_near_misses_do_not_fuse(tmp_path, kind):
    block, x = family_parts.randomised(kind(4, 8, 5, head=2)), torch.randn(1, 4, 12, 11)
    source = export(block, x, tmp_path / "plain.onnx")
    assert_left_alone_in_a_graph(ACMIX, block, source, x, NEAR_MISSES[kind])


def test_an_attention_that_is_also_an_output_is_left_alone(tmp_path):
    """As ACmix, and as attention alone: its projections are read by the convolution, too."""
    block, x = family_parts.randomised(LeakedAttention(4, 8, 5, head=2)), torch.randn(1, 4, 12, 11)
    source = export(block, x, tmp_path / "plain.onnx")
    assert_left_alone_in_a_graph(LOCAL, block, source, x, "is also read by")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"", "is empty"), (b"not protobuf at all", "is a text file")],
)
def test_unusable_files(tmp_path, content, words):
    source = tmp_path / "broken.onnx"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(UserError, match=words):
        fuse(source, tmp_path / "fused.onnx")
    assert not (tmp_path / "fused.onnx").exists()


def test_truncated_file(tmp_path):
    block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, 9, 8)
    source = export(block, x, tmp_path / "plain.onnx")
    source.write_bytes(source.read_bytes()[:2000])
    with pytest.raises(UserError, match="ends too early"):
        fuse(source, tmp_path / "fused.onnx")


def test_graph_without_attention(tmp_path):
    module, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    source = export(module, x, tmp_path / "plain.onnx")
    assert fuse(source, tmp_path / "fused.onnx").found.blocks == []
    with pytest.raises(CheckFailed, match=r"0 blocks fused.*expected 3"):
        fuse(source, tmp_path / "never.onnx", expect=3)
    assert not (tmp_path / "never.onnx").exists()


def test_recovered_weights_are_exact():
    """What is measured is as exact as float32 allows."""
    from acmix_deploy.families.acmix import graph as acmix_graph
    from acmix_deploy.families.local_window import measure
    from acmix_deploy.graph import evaluate

    block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, 9, 8)
    buffer = io.BytesIO()
    export(block, x, buffer)
    graph = gs.import_onnx(onnx.load_from_string(buffer.getvalue()))
    softmax = next(node for node in graph.nodes if node.op == "Softmax")
    found = acmix_graph.match(graph, softmax)
    values = {found.region.x.name: x.numpy()}
    window = measure(found.attention, found.region.y, values, lambda tensors, feeds: evaluate(graph, tensors, feeds))
    position = block.conv_p.weight.detach()[:, :, 0, 0]
    np.testing.assert_allclose(window.position_weight, position, rtol=2e-6, atol=1e-6)
    assert (window.channels.shape, window.kernel_size, window.stride) == ((3, 2, 4), 7, 1)
    np.testing.assert_allclose(window.gain, block.rate1.item(), rtol=1e-6)
    for (weight, bias), conv in zip(
        (window.q, window.k, window.v), (block.conv1, block.conv2, block.conv3), strict=True
    ):
        assert np.array_equal(weight.reshape(8, 4), conv.weight.detach()[:, :, 0, 0])
        assert np.array_equal(bias.reshape(8), conv.bias.detach())


# Reasons: one for an anchor, that of the family which came closest.


class OneProjection(nn.Module):
    """Local attention whose queries, keys and values come from one convolution, and a projection behind it."""

    def __init__(self, channels: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1), heads

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).chunk(3, 1)
        windows = [
            nn.functional.unfold(nn.functional.pad(part, (1,) * 4, mode="reflect"), 3).reshape(
                -1, c // self.heads, 9, h, w
            )
            for part in (k, v)
        ]
        weights = (q.reshape(-1, c // self.heads, 1, h, w) * windows[0]).sum(1).softmax(1)
        return self.proj((weights[:, None] * windows[1]).sum(2).reshape(b, c, h, w))


class PixelAttention(nn.Module):
    """Attention over all pixels beside a depthwise convolution, as in YOLO11: no variant of ACmix."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.pe = nn.Conv2d(8, 24, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).view(b, 2, 12, h * w).split([4, 4, 4], 2)
        attended = v @ (q.transpose(-2, -1) @ k / 2).softmax(-1).transpose(-2, -1)
        return self.proj(attended.reshape(b, c, h, w) + self.pe(v.reshape(b, c, h, w)))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize(
    ("module", "expected"),
    [(OneProjection(), [("local_attention", True)]), (PixelAttention(), [])],
    ids=["local", "of all pixels"],
)  # fmt: skip
def test_attention_alone(tmp_path, module, expected, exporter):
    source = export(
        family_parts.randomised(module), torch.randn(1, 8, 9, 7), tmp_path / "plain.onnx", exporter=exporter
    )
    blocks = fuse(source, tmp_path / "fused.onnx").found.blocks
    assert [(block.family, block.fused) for block in blocks] == expected


def test_an_anchor_has_one_reason(tmp_path, monkeypatch):
    """That of the family which came furthest; and none where another family fused it."""
    stage = importlib.import_module("acmix_deploy.fusion.fuse")

    def refuse(**reasons):
        """With families that refuse every anchor with these words, and how close it came."""

        def refusing(family):
            def match(graph, anchor):
                raise NoMatch(*reasons[family.name])

            return replace(family, match=match) if family.name in reasons else family

        monkeypatch.setattr(stage, "FAMILIES", [*map(refusing, FAMILIES)])

    refuse(swin_acmix=("closest", Reached.WHOLE), outlook=("further away", Reached.PARTS))
    near = ZeroPadded(4, 8, 5, head=2)
    source = export(randomised(near), torch.randn(1, 4, 12, 11), tmp_path / "plain.onnx")
    (block,) = fuse(source, tmp_path / "fused.onnx").found.blocks
    assert "linear in the coordinates" in block.reason, "what acmix measured tells as much, and acmix comes first"
    refuse(swin_acmix=("closest", Reached.REDUCED))
    (block,) = fuse(source, tmp_path / "fused.onnx").found.blocks
    assert (block.family, block.reason) == ("swin_acmix", "closest")
    source = export(randomised(ACmix(4, 8, 5, head=2)), torch.randn(1, 4, 12, 11), tmp_path / "plain.onnx")
    assert [block.fused for block in fuse(source, tmp_path / "fused.onnx").found.blocks] == [True]


@pytest.mark.parametrize("opset", [11, 12])
@pytest.mark.parametrize("size", [(9, 9), (9, 12)])
def test_softmax_between_transposes(tmp_path, opset, size):
    """Below opset 13 exporters move the axis of a Softmax to the end, which turns the map."""
    block, x = randomised(ACmix(4, 8, 5, head=2, stride=3)), torch.randn(1, 4, *size)
    assert_fused(block, export(block, x, tmp_path / "plain.onnx", opset=opset), x)
