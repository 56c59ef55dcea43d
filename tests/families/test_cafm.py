"""CAFM: the block itself, blocks that others wrote in modules and in graphs, and what only looks like one."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families.cafm import graph
from acmix_deploy.families.cafm.examples import WithDepth
from acmix_deploy.families.cafm.module import CAFM
from acmix_deploy.operators.spec import TOLERANCES
from acmix_deploy.runtime.inputs import AXES
from tests.families import parts as family_parts
from tests.families.parts import (
    Model,
    assert_left_alone_in_a_graph,
    assert_left_alone_in_a_module,
    export,
    operators,
    randomised,
    relative_l2,
)

FLOAT32 = TOLERANCES["float32"].floor
VARIANT = family_parts.variants_of(graph.CAFM)[0]
assert_fused = partial(family_parts.assert_fused, graph.CAFM)


def by_loops(block: CAFM, x: Tensor) -> np.ndarray:
    """The definition in float64, a channel or a pixel at a time."""
    weights = {name: value.detach().double().numpy() for name, value in block.state_dict().items()}
    heads, dim = block.num_heads, block.dim
    d, (height, width) = dim // heads, x.shape[2:]
    pixels = [(i, j) for i in range(height) for j in range(width)]

    def around(maps: np.ndarray, i: int, j: int) -> np.ndarray:
        return np.pad(maps, ((0, 0), (1, 1), (1, 1)))[:, i : i + 3, j : j + 3]

    def bias(name: str) -> Any:
        return weights.get(f"{name}.bias", 0.0)

    images = []
    for image in x.double().numpy():
        pointwise = np.einsum("oi,ihw->ohw", weights["qkv.weight"][:, :, 0, 0], image)
        pointwise += np.reshape(bias("qkv"), (-1, 1, 1))
        qkv = np.zeros(pointwise.shape)
        for i, j in pixels:
            qkv[:, i, j] = (weights["qkv_dwconv.weight"][:, 0] * around(pointwise, i, j)).sum((1, 2))
        qkv += np.reshape(bias("qkv_dwconv"), (-1, 1, 1))
        attended = np.zeros((dim, height, width))
        for n in range(heads):
            q, k, v = (qkv[part * dim + n * d : part * dim + (n + 1) * d].reshape(d, -1) for part in range(3))
            for c in range(d):
                logits = [q[c] @ k[e] / np.linalg.norm(q[c]) / np.linalg.norm(k[e]) for e in range(d)]
                shares = np.exp(weights["temperature"][n, 0, 0] * np.array(logits))
                attended[n * d + c] = (shares / shares.sum() @ v).reshape(height, width)
        attended = np.einsum("oi,ihw->ohw", weights["project_out.weight"][:, :, 0, 0], attended)
        attended += np.reshape(bias("project_out"), (-1, 1, 1))
        memory = (qkv.transpose(1, 2, 0) if block.in_order else qkv).ravel()
        mixed = np.zeros((d, 9, height, width))
        for place, (i, j) in enumerate(pixels):
            for c in range(d):
                read = memory[place * 3 * dim + c :: d][: 3 * heads]
                mixed[c, :, i, j] = weights["fc.weight"][:, :, 0, 0] @ read + weights["fc.bias"]
        for o in range(dim):
            for i, j in pixels:
                kernel = weights["dep_conv.weight"][o]
                attended[o, i, j] += (kernel * around(mixed[o // heads], i, j)).sum() + weights["dep_conv.bias"][o]
        images.append(attended)
    return np.stack(images)


@settings(max_examples=10, deadline=None)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 3),
    bias=st.booleans(),
    in_order=st.booleans(),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_is_the_definition(heads: int, head_dim: int, bias: bool, in_order: bool, size: tuple[int, int]) -> None:
    block = randomised(CAFM(heads * head_dim, heads, bias, in_order=in_order))
    x = torch.randn(2, heads * head_dim, *size)
    expected = by_loops(block, x)
    assert relative_l2(copy.deepcopy(block).double()(x.double()), expected) < 1e-12


def test_takes_the_weights_of_layers_with_depth() -> None:
    published, block = randomised(WithDepth(8, 2)), CAFM(8, 2)
    model = nn.Sequential(nn.Identity(), block)
    model.load_state_dict({f"1.{name}": value for name, value in published.state_dict().items()})
    x = torch.randn(2, 8, 5, 6)
    assert relative_l2(block(x), published(x)) < FLOAT32


@pytest.mark.parametrize(("dim", "heads"), [(10, 4), (0, 1), (8, 0)])
def test_the_constructor_refuses_with_the_numbers(dim: int, heads: int) -> None:
    with pytest.raises(UserError, match=f"dim is {dim}, num_heads {heads}"):
        CAFM(dim, heads)


class Port(nn.Module):
    """The block as others write it; each choice is a keyword."""

    def __init__(
        self,
        dim: int = 8,
        heads: int = 2,
        *,
        bias: bool = False,
        depth: bool = True,
        rows: str = "pixels",
        memory: str = "as it is",
        lengths: str = "normalize",
        order: str = "qkv",
        inverse: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.depth, self.rows, self.memory = heads, depth, rows, memory
        self.lengths, self.order, self.inverse = lengths, order, inverse
        kind: Any = nn.Conv3d if depth else nn.Conv2d
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.to_qkv = kind(dim, 3 * dim, 1, bias=bias)
        self.local = kind(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=bias)
        self.out = kind(dim, dim, 1, bias=bias)
        self.fc = kind(3 * heads, 9, 1)
        self.mix = kind(9 * dim // heads, dim, 3, padding=1, groups=dim // heads)

    def layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x.unsqueeze(2)).squeeze(2) if self.depth else layer(x)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.layer(self.local, self.layer(self.to_qkv, x))
        read = {"as it is": qkv, "pixels first": qkv.permute(0, 2, 3, 1), "columns first": qkv.transpose(2, 3)}[
            self.memory
        ]
        if self.rows == "pixels":
            rows = read.reshape(b, h * w, 3 * self.heads, -1).permute(0, 2, 1, 3)
        else:
            rows = read.reshape(b, 3 * self.heads, h * w, -1)
        mixed = self.layer(self.fc, rows).permute(0, 3, 1, 2)
        convolved = self.layer(self.mix, mixed.reshape(b, -1, h, w))
        q, k, v = (qkv.chunk(3, 1)["qkv".index(part)].reshape(b, self.heads, -1, h * w) for part in self.order)
        if self.lengths == "normalize":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        elif self.lengths == "written out":
            q, k = (part / part.pow(2).sum(-1, keepdim=True).sqrt() for part in (q, k))
        logits = q @ k.transpose(-2, -1)
        logits = logits / self.temperature if self.inverse else logits * self.temperature
        attended = self.layer(self.out, (logits.softmax(-1) @ v).reshape(b, c, h, w))
        return convolved + attended


SPELLINGS: list[dict[str, Any]] = [
    {},
    {"bias": True, "heads": 4},
    {"depth": False, "lengths": "written out"},
    {"memory": "pixels first"},
]


@pytest.mark.parametrize("options", SPELLINGS, ids=str)
def test_a_port_is_replaced_by_an_equal_block(options: dict[str, Any]) -> None:
    original = randomised(Port(**options))
    model, (report,) = graph.CAFM.recogniser.canonicalise(nn.Sequential(nn.Identity(), original))
    assert type(model[1]) is CAFM, report
    assert report.geometry == {"dim": 8, "num_heads": options.get("heads", 2), "in_order": "memory" in options}
    x = torch.randn(2, 8, 7, 5)
    assert relative_l2(model[1](x), original(x)) < FLOAT32
    assert model[1].fc.bias is original.fc.bias


# Other temperatures, and fc over the neighbours in each head's memory.
MEASURED: list[dict[str, Any]] = [{"inverse": True}, {"rows": "heads"}]
NEAR_MISSES: list[tuple[dict[str, Any], str, str | None]] = [
    ({"memory": "columns first"}, "differs from CAFM", "neither the maps of one pixel nor neighbours in memory"),
    ({"order": "vkq"}, "differs from CAFM", "not temperature times q.k"),
    ({"lengths": "any"}, "differs from CAFM", "not temperature times q.k"),
]


@pytest.mark.parametrize(
    ("options", "reason"),
    [*(miss[:2] for miss in NEAR_MISSES), *((other, "differs from CAFM") for other in MEASURED)],
    ids=str,
)
def test_an_impostor_is_left_alone_and_named(options: dict[str, Any], reason: str) -> None:
    assert_left_alone_in_a_module(graph.CAFM, Port(**options), reason)


IN_GRAPHS = [*SPELLINGS, *MEASURED]


@pytest.mark.parametrize(
    ("exporter", "dynamic", "options"),
    [
        *(("torchscript", dynamic, options) for dynamic in ((), AXES) for options in IN_GRAPHS),
        *(("dynamo", dynamic, SPELLINGS[0]) for dynamic in ((), AXES)),
    ],
    ids=str,
)
def test_a_port_fuses(tmp_path: Path, exporter: str, dynamic: Any, options: dict[str, Any]) -> None:
    model, x = Model(VARIANT, Port(**options)), torch.randn(2, 3, 5, 7)
    source = export(model, x, tmp_path / "plain.onnx", exporter=exporter, dynamic=dynamic)
    (found,) = assert_fused(model, source, x, *([torch.randn(1, 3, 9, 4)] if dynamic else [])).blocks
    reads = "head" if "rows" in options else "pixel" if "memory" in options else "memory"
    assert found.settings == {"num_heads": options.get("heads", 2), "reads": reads}
    weights = {tensor.name: tensor.dims for tensor in onnx.load(tmp_path / "fused.onnx").graph.initializer}
    assert not [name for name, dims in weights.items() if len(dims) == 5], "a convolution has kept its depth"
    if options.get("depth", True):
        assert found_in(tmp_path / "fused.onnx") < found_in(source)


def found_in(path: Path) -> int:
    """Nodes of a file that compute."""
    return sum(kind != "Constant" for kind in operators(path))


@pytest.mark.parametrize(("options", "_", "reason"), NEAR_MISSES, ids=str)
def test_near_misses_do_not_fuse(tmp_path: Path, options: dict[str, Any], _: str, reason: str) -> None:
    model, x = Model(VARIANT, Port(**options)), torch.randn(2, 3, 5, 7)
    assert_left_alone_in_a_graph(graph.CAFM, model, export(model, x, tmp_path / "plain.onnx"), x, reason)
