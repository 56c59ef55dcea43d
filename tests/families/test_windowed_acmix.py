"""Windowed ACmix: the block itself, blocks that others wrote in modules and in graphs, and what only looks like one."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families.windowed_acmix.graph import WINDOWED_ACMIX
from acmix_deploy.families.windowed_acmix.module import WindowedACmix
from acmix_deploy.operators.spec import TOLERANCES
from acmix_deploy.runtime.inputs import AXES
from tests.families import parts as family_parts
from tests.families.parts import (
    Model,
    assert_left_alone_in_a_graph,
    assert_left_alone_in_a_module,
    export,
    operators,
    outputs,
    randomised,
    relative_l2,
)

FLOAT32 = TOLERANCES["float32"].floor
VARIANT = family_parts.variants_of(WINDOWED_ACMIX)[0]
assert_fused = partial(family_parts.assert_fused, WINDOWED_ACMIX)


def pixel_by_pixel(block: WindowedACmix, x: Tensor) -> Tensor:
    """The definition in float64, one pixel at a time: no padding, a window is whatever of it lies on the map."""
    weights = {name: value.detach().double().numpy() for name, value in block.state_dict().items()}
    images = []
    w, heads = block.window_size, block.num_heads
    d, reach = block.dim // heads, block.kernel_size // 2
    for image in x.double().numpy():
        height, width = image.shape[:2]
        q, k, v = np.split(image @ weights["qkv.weight"].T + weights.get("qkv.bias", 0), 3, axis=-1)
        out = np.zeros(image.shape)
        for i in range(height):
            for j in range(width):
                top, left = i // w * w, j // w * w
                members = [(a, b) for a in range(top, min(top + w, height)) for b in range(left, min(left + w, width))]
                for n in range(heads):
                    own = slice(n * d, (n + 1) * d)
                    logits = np.array([q[i, j, own] @ k[a, b, own] for a, b in members]) / np.sqrt(d)
                    if block.position_bias:
                        rows = [(i - a + w - 1) * (2 * w - 1) + j - b + w - 1 for a, b in members]
                        logits += weights["relative_position_bias_table"][rows, n]
                    share = np.exp(logits - logits.max())
                    values = np.array([v[a, b, own] for a, b in members])
                    out[i, j, own] = share @ values / share.sum()
                for a in range(max(i - reach, 0), min(i + reach + 1, height)):
                    for b in range(max(j - reach, 0), min(j + reach + 1, width)):
                        out[i, j] += weights["conv.weight"][:, 0, a - i + reach, b - j + reach] * image[a, b]
        out += weights["conv.bias"]
        if "norm.weight" in weights:
            centred = out - out.mean(-1, keepdims=True)
            out = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
            out = out * weights["norm.weight"] + weights["norm.bias"]
        images.append(torch.from_numpy(out @ weights["proj.weight"].T + weights["proj.bias"]))
    return torch.stack(images)


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(2, 4),
    window=st.integers(1, 5),
    kernel=st.sampled_from([1, 3, 5]),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    batch=st.integers(1, 2),
    options=st.fixed_dictionaries({name: st.booleans() for name in ("qkv_bias", "position_bias", "norm")}),
)
def test_is_the_definition(
    heads: int, head_dim: int, window: int, kernel: int, size: tuple[int, int], batch: int, options: dict[str, bool]
) -> None:
    block = randomised(WindowedACmix(heads * head_dim, window, heads, kernel, **options))
    x = torch.randn(batch, *size, heads * head_dim)
    expected = pixel_by_pixel(block, x)
    assert relative_l2(copy.deepcopy(block).double()(x.double()), expected) < 1e-10
    assert relative_l2(block(x), expected) < FLOAT32


@pytest.mark.parametrize("window", [7, 14])
def test_usual_windows(window: int) -> None:
    block, x = randomised(WindowedACmix(8, window, 2)), torch.randn(1, 15, 16, 8)
    assert relative_l2(block(x), pixel_by_pixel(block, x)) < FLOAT32


@pytest.mark.parametrize(
    ("arguments", "number"),
    [({"dim": 10}, "dim=10"), ({"num_heads": 0}, "num_heads=0"), ({"kernel_size": 4}, "4"), ({"window_size": 0}, "=0")],
)
def test_the_constructor_refuses_with_the_number(arguments: dict[str, int], number: str) -> None:
    with pytest.raises(UserError, match=number):
        WindowedACmix(**{"dim": 8, **arguments})


class Port(nn.Module):
    """The block as others write it, window by window, with their faults; each choice is a keyword."""

    def __init__(
        self,
        dim: int = 8,
        window: int = 7,
        heads: int = 2,
        *,
        kernel: int = 3,
        packed: bool = True,
        table: bool = True,
        norm: bool = True,
        bias: bool = True,
        pad: str = "none",
        freeze: bool = False,
        fused: bool = False,
        shift: int = 0,
        scale: float | None = None,
        own: bool = False,
        residual: bool = False,
        gate: bool = False,
        groups: int | None = None,
        batch_norm: bool = False,
        grid: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.window, self.heads = dim, window, heads
        self.pad, self.freeze, self.fused, self.shift = pad, freeze, fused, shift
        self.residual, self.grid = residual, grid
        self.scale = (dim // heads) ** -0.5 if scale is None else scale
        if packed:
            self.to_qkv = nn.Linear(dim, 3 * dim, bias=bias)
        else:
            self.q, self.k, self.v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        if table:
            self.table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
            at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
            apart = at[:, :, None] - at[:, None] + window - 1
            self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])
        self.own = nn.Linear(dim, dim) if own else nn.Identity()
        self.dw = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=groups or dim)
        self.bn = nn.BatchNorm2d(dim) if batch_norm else nn.Identity()
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.out = nn.Linear(dim, dim)
        self.rate = nn.Parameter(torch.ones(1)) if gate else None

    def attend(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        def by_head(t: Tensor) -> Tensor:
            return t.reshape(t.shape[0], t.shape[1], self.heads, -1).transpose(1, 2)

        parts = (
            self.to_qkv(tokens).chunk(3, -1)
            if hasattr(self, "to_qkv")
            else [f(tokens) for f in (self.q, self.k, self.v)]
        )
        q, k, v = map(by_head, parts)
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        logits = torch.matmul(q, k.transpose(2, 3)) * self.scale
        if hasattr(self, "table"):
            n = self.window**2
            logits = logits + self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).unsqueeze(0)
        if mask is not None:
            count = len(mask)
            logits = logits.view(-1, count, self.heads, *logits.shape[2:]) + mask[None, :, None]
            logits = logits.flatten(0, 1)
        return torch.matmul(logits.softmax(-1), v).transpose(1, 2).flatten(2)

    def partition(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        n = self.window
        if self.grid:  # windows with holes: every n-th pixel of the whole map
            return x.view(b, n, h // n, n, w // n, c).permute(0, 2, 4, 1, 3, 5).reshape(-1, n * n, c)
        return x.view(b, h // n, n, w // n, n, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, n * n, c)

    def reverse(self, tokens: Tensor, h: int, w: int) -> Tensor:
        n = self.window
        b = int(tokens.shape[0] / (h * w / n / n)) if self.freeze else -1
        if self.grid:
            return tokens.view(b, h // n, w // n, n, n, self.dim).permute(0, 3, 1, 4, 2, 5).reshape(b, h, w, self.dim)
        return tokens.view(b, h // n, w // n, n, n, self.dim).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, self.dim)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        convolved = self.bn(self.dw(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        padded, mask = x, None
        if self.pad != "none":
            below, right = (
                (self.window - height % self.window) % self.window,
                (self.window - width % self.window) % self.window,
            )
            padded = F.pad(x, (0, 0, 0, right, 0, below))
            if self.pad == "masked":
                outside = F.pad(torch.zeros(1, height, width, 1), (0, 0, 0, right, 0, below), value=-100.0)
                mask = self.partition(outside).transpose(1, 2)
        if self.shift:
            padded = torch.roll(padded, (-self.shift, -self.shift), (1, 2))
        attended = self.reverse(self.own(self.attend(self.partition(padded), mask)), *padded.shape[1:3])
        if self.shift:
            attended = torch.roll(attended, (self.shift, self.shift), (1, 2))
        if self.rate is not None:
            attended = attended * self.rate
        y = self.out(self.norm(attended[:, :height, :width] + convolved))
        return y + x if self.residual else y


SPELLINGS: list[dict[str, Any]] = [
    {},
    {"packed": False, "norm": False},
    {"table": False, "window": 14, "heads": 4},
    {"table": False, "norm": False, "bias": False, "window": 4, "pad": "masked"},
    {"pad": "masked", "kernel": 5, "heads": 1},
    {"table": False, "fused": True},
    {"freeze": True, "packed": False},
]


@pytest.mark.parametrize("options", SPELLINGS, ids=str)
def test_a_port_is_replaced_by_an_equal_block(options: dict[str, Any]) -> None:
    original = randomised(Port(**options))
    if not options.get("table", True) and "window" in options:
        original.window_size = original.window
    model, (report,) = WINDOWED_ACMIX.recogniser.canonicalise(nn.Sequential(nn.Identity(), original))
    assert type(model[1]) is WindowedACmix, report
    assert (report.name, report.status, report.class_name) == ("1", "replaced", "Port")
    assert report.geometry == {
        "dim": 8,
        "window_size": options.get("window", 7),
        "num_heads": options.get("heads", 2),
        "kernel_size": options.get("kernel", 3),
        "position_bias": options.get("table", True),
    }
    assert not model[1].training
    window = original.window
    x = torch.randn(2, 2 * window, window, 8)
    torch.testing.assert_close(model[1](x), original(x), rtol=1e-4, atol=1e-5)
    assert model[1].conv.weight is original.dw.weight


NEAR_MISSES: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({"shift": 3}, "differs from WindowedACmix", None),
    ({"grid": True}, "differs from WindowedACmix", "not the pixels of 7x7 windows"),
    ({"own": True}, "has not Linear layers", "projection of its own"),
    ({"gate": True}, "beside its layers it has parameters", None),
    ({"groups": 4}, None, None),
]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        *(miss[:2] for miss in NEAR_MISSES),
        ({"residual": True}, "differs from WindowedACmix"),
        ({"scale": 1.0}, "differs from WindowedACmix"),
        ({"batch_norm": True}, "beside its layers it has parameters"),
    ],
    ids=str,
)
def test_an_impostor_is_left_alone(options: dict[str, Any], reason: str | None) -> None:
    assert_left_alone_in_a_module(WINDOWED_ACMIX, Port(**options, packed=False), reason)


# What is measured, or lies behind the block, may be anything.
IN_GRAPHS = [*SPELLINGS, {"scale": 1.0}, {"residual": True}]


@pytest.mark.parametrize(
    ("exporter", "dynamic", "options"),
    [
        *(("torchscript", dynamic, options) for dynamic in ((), ("batch",)) for options in IN_GRAPHS),
        ("dynamo", (), SPELLINGS[1]),
        ("dynamo", ("batch",), SPELLINGS[4]),
        pytest.param("dynamo", (), SPELLINGS[2], marks=pytest.mark.soak),
        pytest.param("dynamo", ("batch",), SPELLINGS[0], marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_a_port_fuses(tmp_path: Any, exporter: str, dynamic: tuple[str, ...], options: dict[str, Any]) -> None:
    port = Port(**options)
    size = (13, 9) if options.get("pad") == "masked" else (2 * port.window, port.window)
    model = Model(VARIANT, port)
    source = export(
        model, torch.randn(2 if dynamic else 1, 3, *size), tmp_path / "plain.onnx", exporter=exporter, dynamic=dynamic
    )
    if dynamic and options.get("freeze"):
        with pytest.raises(Exception, match=r"Reshape|reshape|broadcast"):
            outputs(source, torch.randn(3, 3, *size))
    (found,) = assert_fused(model, source, *(torch.randn(n, 3, *size) for n in ((1, 2, 3) if dynamic else (1,)))).blocks
    assert found.settings == {
        "num_heads": port.heads,
        "window_size": port.window,
        "kernel_size": options.get("kernel", 3),
        "position_bias": options.get("table", True),
        "norm": options.get("norm", True),
    }


def test_every_axis_free_with_attention_alone(tmp_path: Any) -> None:
    model = Model(VARIANT, WindowedACmix(8, 3, 2, norm=False, position_bias=False))
    source = export(model, torch.randn(2, 3, 9, 16), tmp_path / "plain.onnx", dynamic=AXES)
    sizes = [(1, 9, 16), (3, 14, 21), (2, 5, 4), (1, 8, 6)]
    assert_fused(model, source, *(torch.randn(n, 3, h, w) for n, h, w in sizes))


def test_a_block_on_its_own(tmp_path: Any) -> None:
    """Channels-last input of the file itself."""
    block, x = randomised(WindowedACmix(8, 3, 2)), torch.randn(1, 5, 7, 8)
    assert_fused(block, export(block, x, tmp_path / "plain.onnx"), x)


@pytest.mark.parametrize("size", [(14, 7), (9, 8)], ids=["whole", "padded"])
@pytest.mark.parametrize("table", [True, False])
def test_attention_has_the_form_that_runtimes_fuse(tmp_path: Any, size: tuple[int, int], table: bool) -> None:
    """q [B, heads, N, d] x k^T, at most one Add, Softmax over the last axis, x v, and back to [B, N, C]."""
    model = Model(VARIANT, WindowedACmix(8, 7, 2, position_bias=table))
    source = export(model, torch.randn(1, 3, *size), tmp_path / "plain.onnx")
    assert_fused(model, source)
    graph = gs.import_onnx(onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "fused.onnx")))
    (softmax,) = (node for node in graph.nodes if node.op == "Softmax")
    logits, attended = softmax.i(), softmax.o()
    adds = table or size == (9, 8)
    product = logits.i(0) if adds else logits
    assert [product.op, logits.op, attended.op] == ["MatMul", "Add" if adds else "MatMul", "MatMul"]
    assert attended.inputs[0] is softmax.outputs[0]
    query, keys, values = (*product.inputs, attended.inputs[1])
    assert [node.op for node in (query.inputs[0], keys.inputs[0], values.inputs[0])] == ["Transpose"] * 3
    assert [t.inputs[0].attrs["perm"] for t in (query, keys, values)] == [[0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]]
    for tensor in (query, keys, values):
        assert [tensor.inputs[0].i().op, tensor.inputs[0].i().i().op] == ["Reshape", "Add"]
    assert [attended.o().op, attended.o().o().op] == ["Transpose", "Reshape"]
    assert query.shape[1:] == [2, 49, 4]


@pytest.mark.parametrize(("options", "_", "reason"), NEAR_MISSES, ids=str)
def test_near_misses_do_not_fuse(tmp_path: Any, options: dict[str, Any], _: str | None, reason: str | None) -> None:
    model = Model(VARIANT, Port(**options))
    x = torch.randn(1, 3, 14, 21)
    assert_left_alone_in_a_graph(WINDOWED_ACMIX, model, export(model, x, tmp_path / "plain.onnx"), x, reason)


class SpeltNorm(nn.Module):
    """LayerNorm as files below opset 17 have it."""

    def __init__(self, axis: int = -1, learns: bool = True) -> None:
        super().__init__()
        self.axis = axis
        self.weight, self.bias = (nn.Parameter(torch.zeros(8)) if learns else None for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        apart = x - x.mean(self.axis, keepdim=True)
        normal = apart / torch.sqrt(apart.pow(2).mean(self.axis, keepdim=True) + 1e-2)
        return normal if self.weight is None or self.bias is None else normal * self.weight + self.bias


def test_a_norm_in_its_parts(tmp_path: Any) -> None:
    x = torch.randn(1, 3, 14, 21)
    for learns in (True, False):
        port = Port()
        port.norm = SpeltNorm(learns=learns)
        model = Model(VARIANT, port)
        assert_fused(model, export(model, x, tmp_path / "plain.onnx"), x)
        assert operators(tmp_path / "fused.onnx").count("LayerNormalization") == 1


@pytest.mark.parametrize("axis", [1, 2])
def test_a_norm_over_rows_or_columns_is_left_alone(tmp_path: Any, axis: int) -> None:
    port, x = Port(), torch.randn(1, 3, 14, 21)
    port.norm = SpeltNorm(axis)
    model = Model(VARIANT, port)
    source = export(model, x, tmp_path / "plain.onnx")
    assert_left_alone_in_a_graph(WINDOWED_ACMIX, model, source, x, "computes something else")


def test_a_norm_with_a_scale_for_each_column_is_left_alone(tmp_path: Any) -> None:
    port, x = Port(), torch.randn(1, 3, 14, 21)
    port.norm = SpeltNorm()
    port.norm.weight = nn.Parameter(torch.zeros(21, 1))
    model = Model(VARIANT, port)
    source = export(model, x, tmp_path / "plain.onnx")
    assert_left_alone_in_a_graph(WINDOWED_ACMIX, model, source, x, "not one number a channel")
