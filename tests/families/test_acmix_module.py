"""The ACmix block against the paper's formulas, pixel by pixel, and in every type, size and compiler it promises."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from tests.families.parts import randomised, relative_l2

FLOAT32_LIMIT = LOCAL_ATTENTION.tolerances["float32"].limit()


def pixel_by_pixel(block: ACmix, x: Tensor) -> Tensor:
    """The block by definition: loops over images, heads and pixels in numpy, nothing shared with the module."""
    weights = {name: value.detach().double().numpy() for name, value in block.state_dict().items()}

    def project(name: str, maps: np.ndarray) -> np.ndarray:
        bias = weights.get(f"{name}.bias", np.zeros(1))
        return np.einsum("oi,ihw->ohw", weights[f"{name}.weight"][:, :, 0, 0], maps) + bias[:, None, None]

    heads, d, reach, s = block.head, block.head_dim, block.kernel_att // 2, block.stride
    images = []
    for image in x.double().numpy():
        height, width = image.shape[1:]
        q, k, v = (project(name, image) for name in ("conv1", "conv2", "conv3"))
        ys, xs = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        p = project("conv_p", np.stack([xs, ys]))

        def inside(index: int, length: int) -> int:
            index = abs(index)
            return index if index < length else 2 * (length - 1) - index

        # Nine maps of each channel of a head, out of that channel of all heads' queries, keys and values.
        split = [part.reshape(heads, d, height, width) for part in (q, k, v)]
        maps = np.einsum("tj,jchw->cthw", weights["fc.weight"][:, :, 0, 0], np.concatenate(split))
        padded = np.pad(maps, ((0, 0), (0, 0), (1, 1), (1, 1)))
        out = np.zeros((block.out_planes, height // s, width // s))
        for row in range(height // s):
            for column in range(width // s):
                i, j = row * s, column * s
                window = [
                    (inside(i + a, height), inside(j + b, width))
                    for a in range(-reach, reach + 1)
                    for b in range(-reach, reach + 1)
                ]
                for n in range(heads):
                    own = slice(n * d, (n + 1) * d)
                    logits = np.array([q[own, i, j] @ (k[own, a, b] + p[:, i, j] - p[:, a, b]) for a, b in window])
                    exp = np.exp((logits - logits.max()) / math.sqrt(d))
                    attended = sum(e * v[own, a, b] for e, (a, b) in zip(exp, window, strict=True)) / exp.sum()
                    out[own, row, column] += weights["rate1"][0] * attended
                for o in range(block.out_planes):
                    kernel = weights["dep_conv.weight"][o]
                    patch = padded[o // heads, :, i : i + 3, j : j + 3]
                    shifted = (kernel * patch).sum() + weights.get("dep_conv.bias", np.zeros(block.out_planes))[o]
                    out[o, row, column] += weights["rate2"][0] * shifted
        images.append(torch.from_numpy(out))
    return torch.stack(images)


@settings(max_examples=15, deadline=None)
@given(
    head=st.integers(1, 3),
    head_dim=st.integers(1, 4),
    in_planes=st.integers(1, 5),
    kernel_att=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    rows=st.integers(4, 6),
    columns=st.integers(4, 7),
    batch=st.integers(1, 2),
)
def test_is_the_papers_block(
    head: int, head_dim: int, in_planes: int, kernel_att: int, stride: int, rows: int, columns: int, batch: int
) -> None:
    block = randomised(ACmix(in_planes, head * head_dim, kernel_att, head, stride=stride))
    x = torch.randn(batch, in_planes, rows // stride * stride, columns // stride * stride)
    assert relative_l2(block.double()(x.double()), pixel_by_pixel(block, x)) < 1e-12


def test_shift_initialisation_sums_the_nine_shifted_maps() -> None:
    block = ACmix(3, 8, head=2)
    assert block.rate1.tolist() == block.rate2.tolist() == [0.5]
    maps = torch.randn(1, 9 * 4, 5, 6)
    padded = nn.functional.pad(maps, (1, 1, 1, 1)).view(4, 9, 7, 8)
    shifts = sum(padded[:, t, t // 3 : t // 3 + 5, t % 3 : t % 3 + 6] for t in range(9))
    torch.testing.assert_close(block.dep_conv(maps)[0], shifts.repeat_interleave(2, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close_on_a_wide_map(dtype: torch.dtype) -> None:
    """Index 2 * 2499 is no float16 number and 256 no longer the end of exact bfloat16 integers."""
    block = randomised(ACmix(4, 8, 3, 2))
    x = torch.randn(1, 4, 4, 2500)
    assert relative_l2(copy.deepcopy(block).to(dtype)(x.to(dtype)), block(x)) < 16 * torch.finfo(dtype).eps


def test_positions_are_exact_before_they_are_rounded() -> None:
    block = ACmix(1, 1, 3, 1).half()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    seen: list[Tensor] = []
    block.conv_p.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(torch.zeros(1, 1, 4, 2500, dtype=torch.float16))
    half_a_step_at_one = torch.finfo(torch.float16).eps / 4
    torch.testing.assert_close(
        seen[0][0, 0, 0].double(), torch.linspace(-1, 1, 2500).double(), rtol=0, atol=1.01 * half_a_step_at_one
    )


def test_channels_last_input() -> None:
    block, x = randomised(ACmix(4, 8)), torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), block(x))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bias_before", [False, True])
def test_state_dicts_with_and_without_dep_conv_bias(shape: tuple[int, ...], bias: bool, bias_before: bool) -> None:
    source, target = randomised(ACmix(4, 8)), nn.Sequential(ACmix(4, 8).half())
    if bias_before:
        target[0].dep_conv.bias = nn.Parameter(torch.ones(8))
    state = {f"0.{name}": value for name, value in source.state_dict().items()}
    state |= {f"0.{rate}": state[f"0.{rate}"].reshape(shape) for rate in ("rate1", "rate2")}
    if bias:
        state["0.dep_conv.bias"] = torch.arange(8.0)
    kept = dict(state)
    target.load_state_dict(state)
    assert all(state[name] is kept[name] for name in kept), "the caller's state dict was changed"
    assert target[0].rate1.shape == (1,)
    assert target[0].rate1.half() == source.rate1.half()
    if bias:
        assert target[0].dep_conv.bias.tolist() == list(range(8))
        assert target[0].dep_conv.bias.dtype == torch.float16
    else:
        assert target[0].dep_conv.bias is None


def test_published_names_and_shapes() -> None:
    shapes = {name: tuple(value.shape) for name, value in ACmix(32, 64, head=4).state_dict().items()}
    assert shapes == {
        "rate1": (1,),
        "rate2": (1,),
        **{f"conv{i}.weight": (64, 32, 1, 1) for i in (1, 2, 3)},
        **{f"conv{i}.bias": (64,) for i in (1, 2, 3)},
        "conv_p.weight": (16, 2, 1, 1),
        "conv_p.bias": (16,),
        "fc.weight": (9, 12, 1, 1),
        "dep_conv.weight": (64, 9, 3, 3),
    }


def test_wrong_shapes_are_still_refused() -> None:
    state = ACmix(4, 8).state_dict()
    with pytest.raises(RuntimeError, match=r"dep_conv\.bias"):
        ACmix(4, 8).load_state_dict(state | {"dep_conv.bias": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="rate1"):
        ACmix(4, 8).load_state_dict(state | {"rate1": torch.zeros(2)})


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ({"head": 3}, "head=3"),
        ({"head": 0}, "head=0"),
        ({"kernel_conv": 5}, "kernel_conv is 5"),
        ({"dilation": 2}, "dilation is 2"),
        ({"kernel_att": 512}, "512"),
        ({"kernel_att": 1}, "1"),
        ({"stride": 0}, "stride is 0"),
    ],
)
def test_the_constructor_refuses_with_the_number(arguments: dict[str, int], number: str) -> None:
    with pytest.raises(UserError, match=number):
        ACmix(4, 8, **arguments)


@pytest.mark.parametrize(("size", "stride"), [((5, 4), 2), ((4, 5), 2), ((3, 8), 1), ((8, 2), 2)])
def test_a_map_that_does_not_fit_is_refused_with_its_size(size: tuple[int, int], stride: int) -> None:
    with pytest.raises(UserError, match=f"{size[0]}x{size[1]}"):
        ACmix(4, 8, stride=stride)(torch.zeros(1, 4, *size))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.soak)])
def test_torch_compile_makes_one_graph_of_any_size(backend: str) -> None:
    """The second traces what is called in the graph too, and its gradients."""
    block = randomised(ACmix(4, 8, 5, 2, stride=2))
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for shape in ((2, 4, 6, 8), (1, 4, 10, 4)):
        x = torch.randn(*shape)
        torch.testing.assert_close(compiled(x), block(x))
