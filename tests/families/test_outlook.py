"""Outlook attention: the module by definition, blocks as VOLO writes them in modules and graphs, and what is none."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from acmix_deploy.errors import UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.outlook.graph import OUTLOOK
from acmix_deploy.families.outlook.module import OutlookAttention
from acmix_deploy.forms import refused, to_form, write_for
from acmix_deploy.fusion import fuse
from acmix_deploy.onnx_file import describe
from acmix_deploy.operators.outlook_attention import OUTLOOK_ATTENTION
from acmix_deploy.precision import quantize, to_fp16
from acmix_deploy.runtime.inputs import AXES
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.targets import target_of
from tests.families import parts as family_parts
from tests.families.parts import (
    assert_left_alone_in_a_graph,
    assert_left_alone_in_a_module,
    export,
    operators,
    outputs,
    randomised,
    relative_l2,
)
from tests.pipeline.parts import deployed

FLOAT32 = OUTLOOK_ATTENTION.tolerances["float32"].floor
assert_fused = partial(family_parts.assert_fused, OUTLOOK)
OPERATOR = OUTLOOK_ATTENTION.op_type


class Published(nn.Module):
    """The block in VOLO's arrangement: unfold and fold over windows, sizes in whole numbers, logits scaled last.

    Keywords change one respect each.
    """

    def __init__(
        self,
        dim: int = 16,
        heads: int = 2,
        kernel: int = 3,
        padding: int = 1,
        stride: int = 1,
        *,
        bias: bool = False,
        scale: float | None = None,
        names: tuple[str, str, str] = ("v", "attn", "proj"),
        declare: bool = True,
        transposed: bool = False,
        residual: bool = False,
        dilation: int = 1,
        spread: bool = False,
        integers: bool = False,
    ) -> None:
        super().__init__()
        self.geometry = (heads, kernel, padding, stride)
        self.scale = scale or (dim // heads) ** -0.5
        self.names, self.transposed, self.residual = names, transposed, residual
        self.dilation, self.spread, self.integers = dilation, spread, integers
        setattr(self, names[0], nn.Linear(dim, dim, bias=bias))
        setattr(self, names[1], nn.Linear(dim, heads * kernel**4))
        setattr(self, names[2], nn.Linear(dim, dim))
        self.drop = nn.Dropout(0.1)
        self.reduce = nn.AvgPool2d(stride, stride, ceil_mode=True)
        if declare:
            self.spreading = nn.Unfold(kernel, padding=padding, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        v, attn, proj = (getattr(self, name) for name in self.names)
        heads, kernel, padding, stride = self.geometry
        batch, height, width, dim = x.shape
        if self.integers:
            height, width = int(height), int(width)
        h, w, places = math.ceil(height / stride), math.ceil(width / stride), kernel * kernel
        windows = {"padding": padding * self.dilation, "stride": stride, "dilation": self.dilation}
        seen = F.unfold(v(x).permute(0, 3, 1, 2), kernel, **windows)
        seen = seen.reshape(batch, heads, dim // heads, places, h * w).permute(0, 1, 4, 3, 2)
        logits = attn(self.reduce(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        logits = logits.reshape(batch, h * w, heads, places, places).permute(0, 2, 1, 3, 4)
        if self.transposed:
            logits = logits.transpose(3, 4)
        if self.spread:
            logits = logits * torch.linspace(0.9, 1.1, places)
        weights = self.drop((logits * self.scale).softmax(-1))
        mixed = (weights @ seen).permute(0, 1, 4, 3, 2).reshape(batch, dim * places, h * w)
        y = F.fold(mixed, (height, width), kernel, **windows)
        if self.residual:
            y = y + v(x).permute(0, 3, 1, 2)
        return self.drop(proj(y.permute(0, 2, 3, 1)))


def one_window_at_a_time(block: OutlookAttention, x: np.ndarray) -> np.ndarray:
    """The block by definition: loops over windows in numpy, nothing shared with the module; float64."""
    weights = {name: value.detach().double().numpy() for name, value in block.state_dict().items()}

    def layer(name: str, pixel: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"] @ pixel + weights.get(f"{name}.bias", 0)

    k, s, p, heads = block.kernel_size, block.stride, block.padding, block.num_heads
    batch, height, width, dim = x.shape
    d = dim // heads
    y = np.zeros(x.shape)
    for b, r, c in itertools.product(range(batch), range(-(-height // s)), range(-(-width // s))):
        square = x[b, r * s : (r + 1) * s, c * s : (c + 1) * s].reshape(-1, dim).mean(0)
        logits = layer("attn", square).reshape(heads, k * k, k * k) * block.scale
        shares = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
        pixels = [(r * s + i - p, c * s + j - p) for i, j in itertools.product(range(k), range(k))]
        for (to, target), (origin, source) in itertools.product(enumerate(pixels), enumerate(pixels)):
            if all(0 <= i < height and 0 <= j < width for i, j in (target, source)):
                share = shares[:, to, origin].repeat(d)
                y[(b, *target)] += share * layer("v", x[(b, *source)])
    return np.stack([layer("proj", pixel) for pixel in y.reshape(-1, dim)]).reshape(x.shape)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 3),
    window=st.sampled_from([(3, 1, 1), (3, 1, 2), (3, 1, 4), (5, 2, 3), (1, 0, 1)]),
    height=st.integers(1, 5),
    width=st.integers(1, 6),
    bias=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
)
def test_is_the_papers_block(heads, head_dim, window, height, width, bias, scale):
    block = randomised(OutlookAttention(heads * head_dim, heads, *window, qkv_bias=bias, qk_scale=scale)).double()
    x = torch.randn(2, height, width, heads * head_dim, dtype=torch.float64)
    assert relative_l2(block(x), one_window_at_a_time(block, x.numpy())) < 1e-12


@pytest.mark.parametrize("window", [(4, 1, 2), (3, 0, 3)])
def test_windows_that_are_not_around_pixels(window):
    block = randomised(OutlookAttention(4, 2, *window)).double()
    x = torch.randn(1, 6, 12, 4, dtype=torch.float64)
    assert relative_l2(block(x), one_window_at_a_time(block, x.numpy())) < 1e-12
    with pytest.raises(UserError, match="7x12"):
        block(torch.randn(1, 7, 12, 4, dtype=torch.float64))


def test_published_names_and_shapes():
    block = OutlookAttention(16, 2, stride=2, qkv_bias=True)
    theirs = Published(stride=2, bias=True).state_dict()
    assert {name: value.shape for name, value in block.state_dict().items()} == {
        name: value.shape for name, value in theirs.items()
    }


def test_torch_compile_makes_one_graph_of_any_size():
    block = randomised(OutlookAttention(8, 2, stride=2))
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((2, 6, 8, 8), (1, 9, 5, 8)):
        x = torch.randn(*shape)
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_heads": 3}, "dim=16, num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"kernel_size": 0}, "kernel_size=0"),
        ({"stride": 0}, "stride=0"),
        ({"padding": 2}, "kernel_size=3, padding=2"),
        ({"padding": -1}, "padding=-1"),
    ],
)
def test_the_constructor_refuses_with_the_numbers(arguments, words):
    with pytest.raises(UserError, match=words):
        OutlookAttention(**{"dim": 16, "num_heads": 2, **arguments})


# Blocks in modules.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": 1, "bias": True},
        {"stride": 2},
        {"kernel": 5, "padding": 2, "stride": 3, "dim": 4, "declare": False, "names": ("a", "b", "c")},
        {"stride": 2, "declare": False, "names": ("proj", "v", "attn")},
        {"kernel": 4, "stride": 2},
        {"kernel": 3, "padding": 0, "stride": 3},
        {"scale": 0.2},
        {"heads": 1, "dim": 81},  # all three layers have one shape
    ],
    ids=str,
)
def test_a_block_of_others_is_replaced(options):
    original = randomised(Published(**options))
    if options.get("declare") is False and options["stride"] == 3:
        original.stride, original.padding = 3, 2
    model, (report,) = OUTLOOK.recogniser.canonicalise(nn.Sequential(nn.Identity(), original))
    assert report.status == "replaced", report.reason
    assert report.repaired == ["col2im"]
    heads, kernel, padding, stride = original.geometry
    assert report.geometry == {"num_heads": heads, "kernel_size": kernel, "padding": padding, "stride": stride}
    assert model[1].v.weight is getattr(original, original.names[0]).weight
    x = torch.randn(2, 2 * stride * kernel, stride * kernel, options.get("dim", 16))
    torch.testing.assert_close(model[1](x), original(x))
    assert OUTLOOK.recogniser.canonicalise(model)[1][0].status == "canonical"


class Outlookatt(nn.Module):
    """Named like a block, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.v(x)


class WithTable(Published):
    """Has one parameter more."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(9))


IMPOSTORS = {
    "name alone": (Outlookatt, "not those of three Linear layers"),
    "one parameter more": (WithTable, "not those of three Linear layers"),
    "logits transposed": (lambda: Published(transposed=True), "differs from OutlookAttention"),
    "residual inside": (lambda: Published(residual=True), "differs from OutlookAttention"),
    "holes in the window": (lambda: Published(dilation=2), "differs from OutlookAttention"),
    "uneven scale": (lambda: Published(spread=True), "differs from OutlookAttention"),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
def test_an_impostor_is_left_alone_and_named(kind):
    make, reason = IMPOSTORS[kind]
    assert_left_alone_in_a_module(OUTLOOK, make(), reason)


def test_a_block_without_its_code_is_known_by_its_parts():
    original = randomised(Published(stride=2))
    original.spreading, original.num_heads, original.kernel_size = nn.Unfold(3, padding=1, stride=2), 2, 3
    original.padding, original.stride = 1, 2
    block = OUTLOOK.recogniser.by_parts(original)
    x = torch.randn(1, 5, 6, 16)
    torch.testing.assert_close(block(x), original(x))
    original.num_heads = 4
    assert OUTLOOK.recogniser.by_parts(original) is None


# Blocks in graphs.


class Net(nn.Module):
    """A block between a convolution and a pointwise sum, maps in and out."""

    def __init__(self, block: nn.Module, dim: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 2, 2)
        self.block = block
        self.of_maps = isinstance(block, OfMaps)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.stem(x)
        if self.of_maps:
            return maps + self.block(maps)
        tokens = maps.permute(0, 2, 3, 1)
        return (tokens + self.block(tokens)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_module_fuses_to_few_nodes(tmp_path, stride):
    model, x = randomised(Net(OutlookAttention(16, 2, stride=stride, qkv_bias=True))), torch.randn(2, 3, 14, 18)
    source = export(model, x, tmp_path / "plain.onnx", dynamic=AXES)
    (found,) = assert_fused(model, source, x, torch.randn(1, 3, 10, 8), torch.randn(3, 3, 18, 24)).blocks
    assert {name: found.settings[name] for name in ("num_heads", "kernel_size", "stride")} == {
        "num_heads": 2,
        "kernel_size": 3,
        "stride": stride,
    }
    assert found.settings["scale"] == pytest.approx(8**-0.5)
    nodes = [op for op in operators(tmp_path / "fused.onnx") if op not in ("Add", "Transpose")]
    assert nodes == ["Conv", *["AveragePool"] * (stride > 1), "Conv", "Conv", OPERATOR, "MatMul"]


@pytest.mark.parametrize(("dynamic", "stride"), [(False, 1), (True, 2)])
def test_the_published_code_fuses(tmp_path, dynamic, stride):
    """The dynamo exporter writes Col2Im, which TensorRT cannot read; fusing takes it away."""
    model, x = randomised(Net(Published(stride=stride))), torch.randn(2, 3, 14, 18)
    source = export(model, x, tmp_path / "plain.onnx", exporter="dynamo", dynamic=AXES if dynamic else ())
    assert "Col2Im" in operators(source)
    assert_fused(model, source, x, *[torch.randn(1, 3, 10, 8), torch.randn(3, 3, 18, 24)] * dynamic)


def test_the_published_code_with_whole_numbers_fuses(tmp_path):
    """The TorchScript exporter stops at a fold of traced sizes, and from opset 18 takes one of fixed numbers."""
    model, x = randomised(Net(Published(stride=2))), torch.randn(2, 3, 14, 18)
    with pytest.raises(Exception), warnings.catch_warnings():  # noqa: B017, PT011  the exporter's own, whatever it is
        export(model, x, tmp_path / "plain.onnx", opset=18)
    model.block.integers = True
    source = export(model, x, tmp_path / "plain.onnx", opset=18)
    assert "Col2Im" in operators(source)
    assert_fused(model, source, x)


class ChannelsFirst(nn.Module):
    """The block on maps, with 1x1 convolutions, and fold by a transposed convolution for each channel."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.v, self.proj, self.attn = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, heads * 81, 1)
        self.register_buffer("kernel", torch.eye(9).view(9, 1, 3, 3).repeat(dim, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, dim, height, width = x.shape
        weights = self.attn(x).view(batch, self.heads, 9, 9, height * width).permute(0, 1, 4, 2, 3).softmax(-1)
        seen = F.unfold(self.v(x), 3, padding=1).view(batch, self.heads, -1, 9, height * width).permute(0, 1, 4, 3, 2)
        mixed = (weights @ seen).permute(0, 1, 4, 3, 2).reshape(batch, dim * 9, height, width)
        return self.proj(F.conv_transpose2d(mixed, self.kernel, padding=1, groups=dim))


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_other_layouts_and_folds_fuse(tmp_path, exporter):
    model, x = randomised(nn.Sequential(nn.Conv2d(3, 16, 1), ChannelsFirst())), torch.randn(2, 3, 6, 8)
    source = export(model, x, tmp_path / "plain.onnx", exporter=exporter)
    (found,) = assert_fused(model, source, x).blocks
    assert found.settings["scale"] == 1
    assert operators(tmp_path / "fused.onnx") == ["Conv", "Conv", "Conv", OPERATOR, "Conv"]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([1, 3, 8]),
    kernel=st.sampled_from([3, 5]),
    stride=st.sampled_from([1, 2, 3]),
    size=st.tuples(st.integers(2, 7), st.integers(2, 7)),
    dynamic=st.sampled_from([(), AXES]),
    fold=st.booleans(),
    opset=st.sampled_from([13, 17]),
    bias=st.booleans(),
)
def test_any_geometry(tmp_path, heads, head_dim, kernel, stride, size, dynamic, fold, opset, bias):
    dim = heads * head_dim
    block = OutlookAttention(dim, heads, kernel, kernel // 2, stride, qkv_bias=bias)
    model, x = randomised(Net(block, dim)), torch.randn(1, 3, *(2 * side for side in size))
    source = export(model, x, tmp_path / "plain.onnx", dynamic=dynamic, fold=fold, opset=opset)
    assert_fused(model, source, x)


class Leaky(Published):
    """Adds to the result the mean of the mixed values, before fold."""

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        fold = F.fold
        F.fold = lambda mixed, *args, **kwargs: kept.append(mixed) or fold(mixed, *args, **kwargs)
        try:
            y = super().forward(x)
            return y + kept[0].mean()
        finally:
            F.fold = fold


NEAR_MISSES = {
    "logits transposed": (lambda: Published(transposed=True), "something else"),
    "residual inside": (lambda: Published(residual=True), "something else"),
    "holes in the window": (lambda: Published(dilation=2), "something else"),
    "uneven scale": (lambda: Published(spread=True), "something else"),
    "windows of four": (lambda: Published(kernel=4, stride=2), "runs over 16 values"),
    "windows beside each other": (lambda: Published(padding=0, stride=3), "something else"),
    "mixed values also read": (Leaky, "not read by one linear layer"),
}


@pytest.mark.parametrize("kind", NEAR_MISSES)
def test_near_misses_do_not_fuse(tmp_path, kind):
    make, reason = NEAR_MISSES[kind]
    model, x = randomised(Net(make())), torch.randn(2, 3, 24, 36)
    model.block.integers = True
    source = export(model, x, tmp_path / "plain.onnx", opset=18)
    assert_left_alone_in_a_graph(OUTLOOK, model, source, x, reason)


# Files for targets.


class Two(nn.Module):
    """A block that the plugin takes, with stride 2, and behind it one that it refuses for its head_dim of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.taken, self.refused = OutlookAttention(16, 2, stride=2), OutlookAttention(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.refused(self.taken(self.stem(x).permute(0, 2, 3, 1)).relu()).permute(0, 3, 1, 2)


SHAPES = [(1, 3, 12, 16), (3, 3, 18, 20)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Fused files of Two by (element type, whether the axes are free)."""
    folder = tmp_path_factory.mktemp("outlook")
    found = {}
    for dynamic in (False, True):
        plain, fused, half = (folder / f"{dynamic}{suffix}.onnx" for suffix in ("", ".fused", ".fp16"))
        export(randomised(Two()), torch.rand(SHAPES[0]), plain, dynamic=AXES if dynamic else ())
        fuse(plain, fused, expect=2)
        to_fp16(fused, half)
        found |= {("float32", dynamic): fused, ("float16", dynamic): half}
    return found


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", ["plain", "any"])
def test_forms_compute_the_same(files, dtype, dynamic, form):
    model = onnx.load(files[dtype, dynamic])
    formed = to_form(model, form)
    kinds = [node.op_type for node in formed.graph.node]
    assert kinds.count(OPERATOR) == (form == "any")
    assert not {"CastLike", "Col2Im"} & {*kinds}
    assert any(node.name.startswith("outlook_1.attention/MatMul_") for node in formed.graph.node)
    if form == "plain":
        assert not formed.functions
        assert {entry.domain for entry in formed.opset_import} == {""}
        if not dynamic:
            assert not {"Shape", "Range", "Mod", "Where", "And"} & {*kinds}, "index arithmetic is computed beforehand"
    for shape in SHAPES if dynamic else SHAPES[:1]:
        feed = {"x": np.random.default_rng(0).random(shape, np.float32)}
        first, second = (open_session(one).run(None, feed)[0] for one in (model, formed))
        assert relative_l2(second, first) <= OUTLOOK_ATTENTION.tolerances[dtype].floor


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_limits_of_the_plugin(files, dynamic):
    model = onnx.load(files["float16", dynamic])
    assert refused(model) == {"outlook_1.attention": "head_dim 4"}
    for node in model.graph.node:
        if node.op_type == OPERATOR:
            next(attribute for attribute in node.attribute if attribute.name == "stride").i = 3
    assert refused(model)["outlook_0.attention"] == "stride 3"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_plugin_form(files, tmp_path, dynamic):
    """What is left takes part in a build of its own: its shapes are known without the definition."""
    made = write_for(target_of((10, 3)), files["float32", dynamic])
    assert made.found.inlined == {"outlook_1.attention": "head_dim 4"}
    model = onnx.load(made.artifact.path)
    assert [node.op_type for node in model.graph.node if node.domain] == [OPERATOR]
    assert not model.functions
    assert refused(model) == {}
    described = describe(model)
    assert (described.form, [node.operator for node in described.fused]) == ("plugin", [f"acmix.{OPERATOR}"])


def test_both_operators_in_one_file(tmp_path):
    """An ACmix block and an outlook block in a row: both fuse, are known, and are written without definitions."""
    model = nn.Sequential(ACmix(3, 16, head=2), Net(OutlookAttention(16, 2), 16))
    model[1].stem = nn.Identity()
    randomised(model)
    x = torch.rand(1, 3, 10, 12)
    fuse(export(model, x, tmp_path / "plain.onnx", dynamic=AXES), tmp_path / "fused.onnx", expect=2)
    fused = onnx.load(tmp_path / "fused.onnx")
    assert sorted(function.name for function in fused.functions) == ["AcmixLocalAttention", OPERATOR]
    assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < FLOAT32
    assert refused(fused) == refused(to_form(fused, "plugin")) == {}
    assert {node.op_type for node in to_form(fused, "plain").graph.node if node.domain} == set()


def test_rtx_builds_any_and_plain(rtx, files, tmp_path):
    """A parser and builder of TensorRT takes both without the plugin, of each type, with axes free and fixed."""
    paths = []
    for (dtype, dynamic), source in files.items():
        form = "any" if dynamic == (dtype == "float32") else "plain"
        paths.append(tmp_path / f"{dtype}{dynamic}.{form}.onnx")
        onnx.save(to_form(onnx.load(source), form), paths[-1])
    answers, _ = rtx("build", "-", *paths)
    for path, answer in zip(paths, answers, strict=True):
        assert (answer.get("built"), answer["errors"]) == (True, []), (path.name, answer)


def test_rtx_takes_the_plugin_for_the_nodes_that_it_takes(rtx, libraries, files, tmp_path):
    paths = []
    for form, dtype, dynamic in (("any", "float32", True), ("plugin", "float16", False)):
        paths.append(tmp_path / f"{form}.onnx")
        onnx.save(to_form(onnx.load(files[dtype, dynamic]), form), paths[-1])
    answers, _ = rtx("build", libraries(11), *paths)
    for path, answer in zip(paths, answers, strict=True):
        assert (answer.get("built"), answer["errors"]) == (True, []), (path.name, answer)
        assert answer["plugins"] == ["outlook_0.attention"]


# The whole way.


class OfMaps(Published):
    """Takes and gives [B, C, H, W], and permutes within."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", [Published, OfMaps])
def test_a_checkpoint_for_a_target_without_the_plugin(tmp_path, kind):
    """Every file without Col2Im and right at batches of 1, 2 and 3."""
    model = randomised(Net(kind(stride=2)))
    torch.save(model, tmp_path / "model.pt")
    report = deployed(
        tmp_path / "model.pt", tmp_path / "deploy", fp16=True, input_shape=(1, 3, 14, 18), dynamic=["batch"], expect=1,
        opset=17, target=target_of((8, 6)), form="plain", trust=True,
    )  # fmt: skip
    assert report.passed
    assert [(block.family, block.status) for block in report.blocks] == [("outlook", "replaced")]
    files = [*(tmp_path / "deploy").glob("*.onnx")]
    assert len(files) == 4
    for file in files:
        assert not {"Col2Im", "CastLike"} & {*operators(file)}
        for batch in (1, 2, 3):
            x = torch.rand(batch, 3, 14, 18)
            assert relative_l2(outputs(file, x), model(x)) < (5e-3 if "fp16" in file.name else FLOAT32)


def test_int8(tmp_path):
    """The block's projections become INT8, the operator between them stays."""
    cv2 = pytest.importorskip("cv2")
    (tmp_path / "images").mkdir()
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"{seed}.png"), pixels)
    model = nn.Sequential(randomised(Net(OutlookAttention(16, 2, stride=2))), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    source = export(model, torch.rand(1, 3, 24, 24), tmp_path / "plain.onnx", opset=18)
    fuse(source, tmp_path / "fused.onnx", expect=1)
    report = quantize(tmp_path / "fused.onnx", tmp_path / "int8.onnx", tmp_path / "images", image_size=(24, 24)).found
    assert {"outlook_0.logits", "outlook_0.values"} <= {layer.name for layer in report.layers}
    typed = onnx.load(tmp_path / "int8.onnx")
    assert refused(typed) == {}
    plain = to_form(typed, "plain")
    x = {"x": np.random.default_rng(0).random((1, 3, 24, 24), np.float32)}
    assert relative_l2(*(open_session(one).run(None, x)[0] for one in (plain, typed))) < FLOAT32
