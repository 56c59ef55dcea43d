"""Gated ACmix: the block itself, blocks that others wrote in modules and in graphs, and what only looks like one."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families.gated_acmix.graph import GATED_ACMIX
from acmix_deploy.families.gated_acmix.module import GatedACmix
from acmix_deploy.fusion import fuse
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
VARIANT = family_parts.variants_of(GATED_ACMIX)[0]
assert_fused = partial(family_parts.assert_fused, GATED_ACMIX)


def pixel_by_pixel(block: GatedACmix, x: Tensor) -> Tensor:
    """The definition in float64, one pixel and one head at a time."""
    weights = {name: value.detach().double().numpy() for name, value in block.state_dict().items()}
    maps = x.double().numpy()
    batch, _, height, width = maps.shape
    d, reach = block.out_channels // block.num_heads, block.kernel_size // 2
    pixels = [(b, i, j) for b in range(batch) for i in range(height) for j in range(width)]
    convolved = np.zeros((batch, block.out_channels, height, width))
    for b, i, j in pixels:
        for a in range(max(i - reach, 0), min(i + reach + 1, height)):
            for c in range(max(j - reach, 0), min(j + reach + 1, width)):
                kernel = weights["conv.0.weight"][:, :, a - i + reach, c - j + reach]
                convolved[b, :, i, j] += kernel @ maps[b, :, a, c]
    mean, variance, scale, shift = (
        weights[f"conv.1.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
    )
    convolved = np.maximum((convolved - mean) / np.sqrt(variance + 1e-5) * scale + shift, 0)

    rows, columns = (size // (block.window_size or size) for size in (height, width))
    where = {(b, i, j): (b, i * rows // height, j * columns // width) for b, i, j in pixels}
    if block.sequence_first:
        where = {(b, i, j): (i % (height // rows), j % (width // columns)) for b, i, j in pixels}
    sequences = [[place for place in pixels if where[place] == one] for one in sorted({*where.values()})]
    read = convolved if block.in_series else maps
    attended = np.zeros(convolved.shape)
    for sequence in sequences:
        tokens = np.array([read[b, :, i, j] for b, i, j in sequence])
        q, k, v = np.split(tokens @ weights["attention.in_proj_weight"].T + weights["attention.in_proj_bias"], 3, 1)
        heads = []
        for n in range(block.num_heads):
            own = slice(n * d, (n + 1) * d)
            logits = q[:, own] @ k[:, own].T / np.sqrt(d)
            share = np.exp(logits - logits.max(1, keepdims=True))
            heads.append(share / share.sum(1, keepdims=True) @ v[:, own])
        result = np.concatenate(heads, 1) @ weights["attention.out_proj.weight"].T + weights["attention.out_proj.bias"]
        for (b, i, j), token in zip(sequence, result, strict=True):
            attended[b, :, i, j] = token
    hidden = np.maximum(maps.mean((2, 3)) @ weights["gate.2.weight"].T + weights["gate.2.bias"], 0)
    gate = 1 / (1 + np.exp(-(hidden @ weights["gate.4.weight"].T + weights["gate.4.bias"])))
    first, second = (gate[:, index, None, None, None] for index in (0, 1))
    return torch.from_numpy(first * convolved + second * attended)


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    kernel=st.sampled_from([1, 3, 5]),
    hidden=st.integers(1, 5),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    batch=st.integers(1, 3),
    sequence_first=st.booleans(),
    in_series=st.booleans(),
    wider=st.integers(0, 3),
    window=st.sampled_from([None, 1, 2, 3]),
)
def test_is_the_definition(
    heads: int,
    head_dim: int,
    kernel: int,
    hidden: int,
    size: tuple[int, int],
    batch: int,
    sequence_first: bool,
    in_series: bool,
    wider: int,
    window: int | None,
) -> None:
    channels = heads * head_dim + (wider if in_series else 0)
    block = GatedACmix(
        channels, heads, kernel, hidden, sequence_first=sequence_first, in_series=in_series,
        out_channels=heads * head_dim, window_size=window,
    )  # fmt: skip
    randomised(block)
    x = torch.randn(batch, channels, *(side * (window or 1) for side in size))
    expected = pixel_by_pixel(block, x)
    assert relative_l2(copy.deepcopy(block).double()(x.double()), expected) < 1e-12
    assert relative_l2(block(x), expected) < FLOAT32


def test_tokens_attend_to_their_own_image_alone() -> None:
    x = torch.randn(3, 8, 4, 5)
    right, faulty = (randomised(GatedACmix(8, 2, sequence_first=fault)) for fault in (False, True))
    torch.testing.assert_close(right(x)[1:2], right(x[1:2]))
    assert relative_l2(faulty(x)[1:2], faulty(x[1:2])) > 0.01


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ({"channels": 10}, "channels=10"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"kernel_size": 2}, "2"),
        ({"hidden": 0}, "=0"),
        ({"window_size": 0}, "window_size=0"),
        ({"out_channels": 12}, "out_channels=12"),
        ({"out_channels": 10, "in_series": True}, "out_channels=10"),
    ],
)
def test_the_constructor_refuses_with_the_number(arguments: dict[str, int], number: str) -> None:
    with pytest.raises(UserError, match=number):
        GatedACmix(**{"channels": 8, **arguments})


def test_a_map_that_the_windows_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="4x4 pixels do not divide a map of 8x6"):
        GatedACmix(8, 2, window_size=4)(torch.randn(1, 8, 8, 6))


class Port(nn.Module):
    """The block as others write it, with its fault; each choice is a keyword."""

    def __init__(
        self,
        dim: int = 8,
        heads: int = 2,
        kernel: int = 3,
        *,
        tokens: str = "batch first, not told",
        norm: bool = True,
        swapped: bool = False,
        between: type[nn.Module] = nn.ReLU,
        activation: type[nn.Module] = nn.ReLU,
        of: str = "x",
        position: bool = False,
        shared: bool = False,
        own_qkv: bool = False,
        in_series: bool = False,
        channels: int = 8,
        window: int | None = None,
        gate: str = "linear",
    ) -> None:
        super().__init__()
        self.tokens, self.swapped, self.of, self.shared, self.heads = tokens, swapped, of, shared, heads
        self.in_series, self.ws = in_series, window
        norms = [nn.BatchNorm2d(dim)] if norm else []
        self.local = nn.Sequential(nn.Conv2d(channels, dim, kernel, padding=kernel // 2), *norms, activation())
        if own_qkv:
            self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        else:
            self.attn = nn.MultiheadAttention(dim, heads, batch_first=tokens == "batch first")
        first, last = nn.Linear(channels, 5), nn.Linear(5, 2)
        if gate == "1x1":
            first, last = nn.Conv2d(channels, 5, 1), nn.Conv2d(5, 2, 1)
        self.weights = nn.Sequential(first, between(), last, nn.Sigmoid())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten() if gate == "linear" else nn.Identity())
        self.position = nn.Parameter(torch.zeros(1, dim, 1, 1)) if position else None

    def attend(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if hasattr(self, "query"):
            tokens = x.reshape(b, c, h * w).transpose(1, 2)
            q, k, v = (
                layer(tokens).view(b, h * w, self.heads, -1).transpose(1, 2)
                for layer in (self.query, self.key, self.value)
            )
            joined = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(joined).transpose(1, 2).reshape(b, c, h, w)
        if self.ws:
            n = self.ws  # columns before rows, which changes nothing
            tokens = x.view(b, c, h // n, n, w // n, n).permute(0, 4, 2, 5, 3, 1).reshape(-1, n * n, c)
            windows = self.attn(tokens, tokens, tokens)[0].reshape(b, w // n, h // n, n, n, c)
            return windows.permute(0, 5, 2, 4, 1, 3).reshape(b, c, h, w)
        if self.tokens == "rows":
            tokens = x.permute(3, 0, 2, 1).reshape(w, b * h, c)
            return self.attn(tokens, tokens, tokens)[0].reshape(w, b, h, c).permute(1, 3, 2, 0)
        if self.tokens == "sequence first":
            tokens = x.reshape(b, c, h * w).permute(2, 0, 1)
            return self.attn(tokens, tokens, tokens)[0].permute(1, 2, 0).reshape(b, c, h, w)
        tokens = x.reshape(b, c, h * w).permute(0, 2, 1)
        return self.attn(tokens, tokens, tokens)[0].permute(0, 2, 1).reshape(b, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        convolved = self.local(x)
        read = convolved if self.in_series else x
        attended = self.attend(read if self.position is None else read + self.position)
        weights = self.weights(self.pool(x if self.of == "x" else convolved))
        first, second = (weights[:, index].view(-1, 1, 1, 1) for index in (0, 1))
        if self.shared:
            second = 1 - first
        if self.swapped:
            first, second = second, first
        return first * convolved + second * attended


SPELLINGS: list[dict[str, Any]] = [
    {},
    {"tokens": "batch first"},
    {"tokens": "sequence first", "swapped": True, "kernel": 1},
    {"tokens": "batch first", "norm": False, "heads": 1, "kernel": 5},
    {"tokens": "batch first", "in_series": True, "channels": 6, "swapped": True},
    {"in_series": True, "channels": 6},
    {"tokens": "batch first", "in_series": True, "window": 8, "gate": "1x1"},
    {"window": 4},
]


BY_DYNAMO = [SPELLINGS[0], SPELLINGS[4], *SPELLINGS[6:]]
"""What the slower exporter writes at each run; `make soak` tries the others. All have a free batch."""


def model_of(port: Port) -> Model:
    channels = port.local[0].in_channels
    return Model(VARIANT, port if channels == 8 else nn.Sequential(nn.Conv2d(8, channels, 1), port))


@pytest.mark.parametrize("options", SPELLINGS, ids=str)
def test_a_port_is_replaced_by_an_equal_block(options: dict[str, Any]) -> None:
    original = randomised(Port(**options))
    model, (report,) = GATED_ACMIX.recogniser.canonicalise(nn.Sequential(nn.Identity(), original))
    assert type(model[1]) is GatedACmix, report
    assert (report.name, report.status, report.class_name) == ("1", "replaced", "Port")
    channels, window = options.get("channels", 8), options.get("window")
    assert report.geometry == {
        "channels": channels,
        "out_channels": 8,
        "num_heads": options.get("heads", 2),
        "kernel_size": options.get("kernel", 3),
        "hidden": 5,
        "sequence_first": "tokens" not in options,
        "in_series": options.get("in_series", False),
        **({"window_size": window} if window else {}),
    }
    assert not model[1].training
    x = torch.randn(2, channels, *((16, 24) if window else (7, 5)))
    torch.testing.assert_close(model[1](x), original(x), rtol=1e-4, atol=1e-5)
    assert model[1].attention.in_proj_weight is original.attn.in_proj_weight


NEAR_MISSES: list[tuple[dict[str, Any], str, str]] = [
    ({"between": nn.Tanh}, "differs from GatedACmix", "not that of two linear layers with a ReLU"),
    ({"of": "convolved"}, "differs from GatedACmix", "do not read one tensor"),
    ({"activation": nn.SiLU}, "differs from GatedACmix", "does not weigh the ReLU of a convolution"),
    ({"shared": True}, "differs from GatedACmix", "weighed by Sub, not by the Sigmoid of a gate"),
    ({"position": True}, "it has parameters beside those", "do not read one tensor"),
    ({"tokens": "rows"}, "differs from GatedACmix", "not the pixels of an image or of a square window"),
    ({"in_series": True, "of": "convolved"}, "differs from GatedACmix", "do not read one tensor"),
    ({"in_series": True, "activation": nn.Identity}, "differs from GatedACmix", "does not weigh the ReLU"),
    ({"in_series": True, "position": True}, "it has parameters beside those", "do not read one tensor"),
    ({"in_series": True, "tokens": "rows"}, "differs from GatedACmix", "not the pixels of an image"),
]


@pytest.mark.parametrize(("options", "reason"), [miss[:2] for miss in NEAR_MISSES], ids=str)
def test_an_impostor_is_left_alone_and_named(options: dict[str, Any], reason: str) -> None:
    assert_left_alone_in_a_module(GATED_ACMIX, Port(**options), reason)


@pytest.mark.parametrize(
    ("exporter", "dynamic", "options"),
    [
        *(
            ("torchscript", dynamic, options)
            for dynamic in ((), ("batch",))
            for options in [*SPELLINGS, {"own_qkv": True}]
        ),
        *(pytest.param("dynamo", (), options, marks=pytest.mark.soak) for options in SPELLINGS[:2]),
        *(
            pytest.param("dynamo", ("batch",), options, marks=() if options in BY_DYNAMO else pytest.mark.soak)
            for options in [*SPELLINGS[:2], *SPELLINGS[4:]]
        ),
    ],
    ids=str,
)
def test_a_port_fuses(tmp_path: Path, exporter: str, dynamic: tuple[str, ...], options: dict[str, Any]) -> None:
    model, size = model_of(Port(**options)), (8, 16) if "window" in options else (5, 7)
    x = torch.randn(2 if dynamic else 1, 3, *size)
    source = export(model, x, tmp_path / "plain.onnx", exporter=exporter, dynamic=dynamic)
    # nn.MultiheadAttention freezes the batch in TorchScript; fusing frees it.
    (found,) = assert_fused(model, source, *(torch.randn(n, 3, *size) for n in ((1, 2, 3) if dynamic else (1,)))).blocks
    expected = {
        "num_heads": options.get("heads", 2),
        "kernel_size": options.get("kernel", 3),
        "in_series": options.get("in_series", False),
        "window_size": options.get("window"),
    }
    assert {name: found.settings[name] for name in expected} == expected
    if dynamic:
        assert found.settings["sequence_first"] == ("tokens" not in options and "own_qkv" not in options)


def test_a_batch_norm_that_the_exporter_left(tmp_path: Path) -> None:
    model, x = Model(VARIANT, Port(tokens="batch first")), torch.randn(1, 3, 5, 7)
    program = torch.onnx.export(model, (x,), dynamo=True, opset_version=18, optimize=False, verbose=False)
    program.save(tmp_path / "plain.onnx")
    assert "BatchNormalization" in {node.op_type for node in program.model_proto.graph.node}
    assert_fused(model, tmp_path / "plain.onnx", x)


def test_every_axis_free_and_sequence_first(tmp_path: Path) -> None:
    model = Model(VARIANT, GatedACmix(8, 2, sequence_first=True))
    source = export(model, torch.randn(2, 3, 6, 5), tmp_path / "plain.onnx", dynamic=AXES)
    assert_fused(model, source, *(torch.randn(size) for size in ((1, 3, 6, 5), (3, 3, 4, 7), (2, 3, 1, 2))))


@pytest.mark.parametrize("sequence_first", [False, True])
def test_attention_has_the_form_that_runtimes_fuse(tmp_path: Path, sequence_first: bool) -> None:
    """q [B, heads, N, d] x k^T, Softmax over the last axis, x v, and back to [B, N, C]."""
    model = Model(VARIANT, GatedACmix(8, 2, sequence_first=sequence_first))
    x = torch.randn(2, 3, 6, 5)
    assert_fused(model, export(model, x, tmp_path / "plain.onnx"), x)
    graph = gs.import_onnx(onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "fused.onnx")))
    (softmax,) = (node for node in graph.nodes if node.op == "Softmax")
    logits, attended = softmax.i(), softmax.o()
    assert [logits.op, attended.op, attended.o().op, attended.o().o().op] == [
        "MatMul",
        "MatMul",
        "Transpose",
        "Reshape",
    ]
    assert (softmax.attrs["axis"], attended.inputs[0] is softmax.outputs[0]) == (-1, True)
    operands = (*logits.inputs, attended.inputs[1])
    for tensor, perm in zip(operands, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True):
        transpose = tensor.inputs[0]
        assert (transpose.op, transpose.attrs["perm"]) == ("Transpose", perm)
        assert [transpose.i().op, transpose.i().i().op, transpose.i().i().i().op] == ["Reshape", "Add", "MatMul"]
    assert operands[0].shape == ([30, 2, 2, 4] if sequence_first else [2, 2, 30, 4])
    assert "BatchNormalization" not in {node.op for node in graph.nodes}


def test_onnxruntime_makes_one_multi_head_attention_of_it(tmp_path: Path) -> None:
    """Its optimizer for transformers wants the scale as a Mul, which the file has in the queries."""
    from onnxruntime.transformers.fusion_mha_dit import FusionMultiHeadAttentionDiT
    from onnxruntime.transformers.onnx_model import OnnxModel

    model, x = Model(VARIANT, GatedACmix(8, 2)), torch.randn(1, 3, 6, 5)
    assert_fused(model, export(model, x, tmp_path / "plain.onnx"), x)
    fused = onnx.load(tmp_path / "fused.onnx")
    softmax = next(node for node in fused.graph.node if node.op_type == "Softmax")
    fused.graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
    index = list(fused.graph.node).index(softmax)
    fused.graph.node.insert(index, helper.make_node("Mul", [softmax.input[0], "one"], ["scaled"], "scale"))
    fused.graph.node[index + 1].input[0] = "scaled"
    editor = OnnxModel(fused)
    FusionMultiHeadAttentionDiT(editor).apply()
    editor.prune_graph()
    editor.topological_sort()
    assert [n.op_type for n in fused.graph.node if n.op_type in ("Softmax", "MultiHeadAttention")] == [
        "MultiHeadAttention"
    ]
    fused.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(fused, tmp_path / "mha.onnx")
    assert relative_l2(outputs(tmp_path / "mha.onnx", x), model(x)) < FLOAT32


def test_alone_in_a_batch_sequence_first_is_one_convolution(tmp_path: Path) -> None:
    model, x = Model(VARIANT, Port()), torch.randn(1, 3, 6, 5)
    assert_fused(model, export(model, x, tmp_path / "plain.onnx"), x)
    kinds = operators(tmp_path / "fused.onnx")
    assert (kinds.count("Softmax"), kinds.count("Conv")) == (0, 4)
    assert len(kinds) < 22


@pytest.mark.parametrize(("options", "_", "reason"), NEAR_MISSES, ids=str)
def test_near_misses_do_not_fuse(tmp_path: Path, options: dict[str, Any], _: str, reason: str) -> None:
    model, x = Model(VARIANT, Port(**{"tokens": "batch first", **options})), torch.randn(2, 3, 5, 7)
    assert_left_alone_in_a_graph(GATED_ACMIX, model, export(model, x, tmp_path / "plain.onnx"), x, reason)


def test_values_of_another_width(tmp_path: Path) -> None:
    port, x = Port(own_qkv=True), torch.randn(2, 3, 5, 7)
    port.value, port.out = nn.Linear(8, 16), nn.Linear(16, 8)
    model = Model(VARIANT, port)
    (block,) = fuse(export(model, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx").found.blocks
    assert block.reason == "its values are of another width than its queries and keys"
