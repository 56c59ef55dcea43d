"""The CUDA kernels themselves, compiled for the CPU over an emulated device, against the PyTorch oracles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.local_attention.oracle import local_attention
from acmix_deploy.operators.outlook_attention import OUTLOOK_ATTENTION
from acmix_deploy.operators.outlook_attention.oracle import outlook_attention
from acmix_deploy.operators.spec import Operator
from acmix_deploy.runtime.metrics import deviation
from tests.plugin import kernels
from tests.plugin.kernels import Array, Kernels, Refused

MISSING = kernels.missing_compiler()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

WAYS = [("float32", "NCHW", "simt"), *itertools.product(["float16"], kernels.LAYOUTS, kernels.KERNELS)]
SCALAR_WAYS = [way for way in WAYS if way[2] == "simt"]
every_way = pytest.mark.parametrize(("dtype", "layout", "kernel"), WAYS)
operators = pytest.mark.parametrize(
    "operator", [LOCAL_ATTENTION, OUTLOOK_ATTENTION], ids=lambda operator: operator.op_type
)


@pytest.fixture(scope="session")
def library() -> Kernels:
    return Kernels(kernels.library())


def test_emulator(tmp_path):
    """The device that all else here stands on: missing barriers and waits show, faults have names, mma multiplies."""
    program = kernels.build([kernels.EMULATOR / "self_test.cpp"], tmp_path / "self_test")
    kernels.run([program])


def normal(random: np.random.Generator, dtype: str, *shape: int) -> Array:
    return random.standard_normal(shape).astype(dtype)


def check(operator: Operator, expected: torch.Tensor, y: Array) -> None:
    """Within the operator's tolerance; what eager code loses at least is the rounding of the result."""
    found = deviation(expected.numpy(), y)
    rounding = float(np.finfo(y.dtype).eps) / 2 if y.dtype == np.float16 else 0.0
    assert not found.problem
    assert found.relative_l2 <= operator.tolerances[y.dtype.name].limit(rounding)


def check_local(library: Kernels, qkv: Array, weight: Array | None, launch: dict[str, Any], **attributes: Any) -> None:
    """One launch against the oracle; ``launch`` holds those arguments of ``Kernels.launch`` that change no result."""
    y = library.local_attention(qkv, weight, **attributes, **launch)
    if weight is None:
        weight = np.zeros((qkv.shape[1] // 3 // attributes["num_heads"], 2))
    check(LOCAL_ATTENTION, local_attention(torch.from_numpy(qkv), torch.from_numpy(weight), **attributes), y)


def check_outlook(library: Kernels, logits: Array, values: Array, launch: dict[str, Any], **attributes: Any) -> None:
    y = library.outlook_attention(logits, values, **attributes, **launch)
    check(OUTLOOK_ATTENTION, outlook_attention(torch.from_numpy(logits), torch.from_numpy(values), **attributes), y)


@st.composite
def launches(draw, operator: Operator, ways: list[tuple[str, str, str]]):
    """Element type, how to launch, attributes, head_dim, batch and a source of numbers."""
    dtype, layout, kernel = draw(st.sampled_from(ways))
    limits = {name: draw(st.sampled_from(values)) for name, values in operator.kernel_limits.items()}
    head_dim = limits.pop("head_dim")
    scale = draw(st.sampled_from([1.0, -1.0, 0.0])) * head_dim**-0.5
    attributes = {**limits, "num_heads": draw(st.integers(1, 3)), "scale": scale}
    seeds = st.integers(0, 999)
    launch = {"layout": layout, "kernel": kernel, "sm": draw(st.sampled_from([75, 90])), "seed": draw(seeds)}
    return dtype, launch, attributes, head_dim, draw(st.integers(1, 2)), np.random.default_rng(draw(seeds))


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_local_attention(library, data):
    dtype, launch, attributes, head_dim, batch, random = data.draw(launches(LOCAL_ATTENTION, WAYS))
    stride = attributes["stride"]
    least = math.ceil((attributes["kernel_size"] // 2 + 1) / stride)
    height, width = (stride * data.draw(st.integers(least, 20 // stride)) for _ in range(2))
    qkv = normal(random, dtype, batch, 3 * attributes["num_heads"] * head_dim, height, width)
    weight = normal(random, dtype, head_dim, 2) if data.draw(st.booleans()) else None
    check_local(library, qkv, weight, launch, **attributes)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_outlook_attention(library, data):
    dtype, launch, attributes, head_dim, batch, random = data.draw(launches(OUTLOOK_ATTENTION, SCALAR_WAYS))
    height, width = (data.draw(st.integers(1, 12)) for _ in range(2))
    windows = (math.ceil(size / attributes["stride"]) for size in (height, width))
    logits = normal(random, dtype, batch, attributes["num_heads"] * attributes["kernel_size"] ** 4, *windows)
    values = normal(random, dtype, batch, attributes["num_heads"] * head_dim, height, width)
    check_outlook(library, logits, values, launch, **attributes)


def of_every_entry(library: Kernels, operator: Operator, **launch: Any) -> Iterator[partial[None]]:
    """A check of each row of the dispatch table, full and padded, on rows of pixels that NCHW can copy in words."""
    random = np.random.default_rng(0)
    for entry, padding in itertools.product(library.entries(operator.op_type), (0, 8)):
        dtype, head_dim = entry["dtype"], entry["head_dim"] - padding
        launch = {**launch, "layout": entry["layout"], "kernel": entry["kernel"]}
        attributes = {"num_heads": 1, "kernel_size": 5, "stride": 1, "scale": head_dim**-0.5}
        if operator is LOCAL_ATTENTION:
            inputs = normal(random, dtype, 1, 3 * head_dim, 5, 12), normal(random, dtype, head_dim, 2)
            yield partial(check_local, library, *inputs, launch, **attributes)
        else:
            inputs = normal(random, dtype, 1, 5**4, 3, 4), normal(random, dtype, 1, head_dim, 3, 4)
            yield partial(check_outlook, library, *inputs, launch, **attributes)


@operators
def test_every_entry(library, operator):
    rows = library.entries(operator.op_type)
    ways = WAYS if operator is LOCAL_ATTENTION else SCALAR_WAYS
    assert {(row["dtype"], row["layout"], row["kernel"]) for row in rows} == set(ways)
    assert len(rows) == 4 * len(ways)
    for run in of_every_entry(library, operator):
        run()


@operators
@pytest.mark.parametrize("offsets", [(1, 0), (0, 1)], ids=["input", "output"])
def test_misaligned_tensors(library, operator, offsets):
    """NCHW takes any address; NHWC refuses what its 16-byte words cannot be read from."""
    for run in of_every_entry(library, operator, offsets=offsets):
        if run.args[3]["layout"] == "NCHW":
            run()
        else:
            with pytest.raises(Refused, match="misaligned address"):
                run()


@every_way
def test_heads_and_images_are_strangers(library, dtype, layout, kernel):
    """What one head of one image holds reaches no other, although padding lets their channels lie side by side."""
    launch = {"num_heads": 3, "kernel_size": 3, "stride": 1, "scale": 1.0, "layout": layout, "kernel": kernel}
    qkv = normal(np.random.default_rng(0), dtype, 3, 72, 4, 5)
    weight = normal(np.random.default_rng(1), dtype, 8, 2)
    before = library.local_attention(qkv, weight, **launch).reshape(3, 3, 8, 4, 5)
    parts = qkv.reshape(3, 3, 3, 8, 4, 5)  # image, part, head, ...
    parts[:, :, [0, 2]] = parts[[0, 2]] = np.nan
    after = library.local_attention(qkv, weight, **launch).reshape(3, 3, 8, 4, 5)
    assert np.array_equal(after[1, 1], before[1, 1])


@every_way
@pytest.mark.parametrize(
    ("step", "size"), [(1000.0, 8), (-1000.0, 8), (1.0, 8), (-1.0, 8), (2.0, 1 / 64), (-2.0, 1 / 64), (8.0, 1 / 64)]
)
def test_logits_that_rise_or_fall(library, dtype, layout, kernel, step, size):
    """Every logit exceeds the one before by ``step``: in floats, exp of the largest and of the smallest overflow.

    Queries of a ``size`` above and below 1 have scales below and above 1 for the same steps.
    """
    height, width, head_dim = 9, 10, 32
    query, key, value = np.zeros((3, head_dim, height, width))
    query[:] = size
    key[:] = np.arange(height * width).reshape(height, width)
    value[:] = np.random.default_rng(0).standard_normal(value.shape)
    qkv = np.concatenate([query, key, value])[None].astype(dtype)
    attributes = {"num_heads": 1, "kernel_size": 7, "stride": 1, "scale": step / (size * head_dim)}
    check_local(library, qkv, None, {"layout": layout, "kernel": kernel}, **attributes)


@pytest.mark.parametrize(("dtype", "layout", "kernel"), SCALAR_WAYS)
@pytest.mark.parametrize("step", [100.0, -100.0])
def test_outlook_logits_that_rise_or_fall(library, dtype, layout, kernel, step):
    logits = np.broadcast_to(np.tile(np.arange(9), 9)[:, None, None], (1, 81, 4, 5)).astype(dtype)
    values = normal(np.random.default_rng(0), dtype, 1, 8, 4, 5)
    attributes = {"num_heads": 1, "kernel_size": 3, "stride": 1, "scale": step}
    check_outlook(library, logits, values, {"layout": layout, "kernel": kernel}, **attributes)


@every_way
@pytest.mark.parametrize("kernel_size", LOCAL_ATTENTION.kernel_limits["kernel_size"])
@pytest.mark.parametrize("larger", [0, 7])
def test_mean_of_the_corners(library, dtype, layout, kernel, kernel_size, larger):
    """Queries of 0 see the mean of their window, which in a corner is counted by hand."""
    margin = kernel_size // 2
    height, width = margin + 1 + larger, margin + 2 + larger
    qkv = normal(np.random.default_rng(0), dtype, 1, 24, height, width)
    qkv[:, :8] = 0
    value = qkv[0, 16:].astype(np.float64)
    y = library.local_attention(
        *(qkv, np.ones((8, 2), dtype)),
        **{"num_heads": 1, "kernel_size": kernel_size, "stride": 1, "scale": 1.0, "layout": layout, "kernel": kernel},
    )
    away = [*range(margin, 0, -1), *range(margin + 1)]  # pixels from the border, e.g. 2 1 0 1 2
    for row, column in itertools.product((0, -1), (0, -1)):
        rows = away if row == 0 else [height - 1 - i for i in away]
        columns = away if column == 0 else [width - 1 - i for i in away]
        mean = value[:, rows][:, :, columns].mean((1, 2))
        np.testing.assert_allclose(y[0, :, row, column], mean, atol=1e-3 if dtype == "float16" else 1e-6)


def test_fastest_kernel_that_the_device_runs(library):
    qkv = normal(np.random.default_rng(0), "float16", 1, 48, 9, 9)
    attributes = {"num_heads": 1, "kernel_size": 3, "stride": 1, "scale": 0.25}
    simt, mma = (library.local_attention(qkv, None, **attributes, kernel=kernel) for kernel in kernels.KERNELS)
    assert not np.array_equal(simt, mma)
    assert np.array_equal(library.local_attention(qkv, None, **attributes, sm=75), mma)
    assert np.array_equal(library.local_attention(qkv, None, **attributes, sm=72), simt)


@operators
@pytest.mark.parametrize(
    ("name", "value"),
    [("kernel_size", 1), ("kernel_size", 4), ("kernel_size", 11), ("stride", 3), ("head_dim", 12), ("head_dim", 136)],
)
def test_unsupported_value(library, operator, name, value):
    wanted = {"kernel_size": 3, "stride": 1, "head_dim": 8, name: value}
    head_dim = wanted.pop("head_dim")
    call = library.local_attention if operator is LOCAL_ATTENTION else library.outlook_attention
    channels = (3 * head_dim, head_dim) if operator is LOCAL_ATTENTION else (wanted["kernel_size"] ** 4, head_dim)
    inputs = [np.zeros((1, count, 12, 12), np.float16) for count in channels]
    with pytest.raises(Refused) as refused:
        call(*inputs, **wanted, num_heads=1, scale=1.0)
    supported = ", ".join(map(str, operator.kernel_limits[name]))
    assert str(refused.value) == f"unsupported: got {name} {value}, supported {supported}"


@pytest.mark.parametrize(
    ("change", "got", "supported"),
    [
        ({"shape": (1, 24, 3, 8), "kernel_size": 7}, "a 3x8 map", "more than 3 pixels each way for kernel_size 7"),
        ({"shape": (1, 24, 8, 9), "stride": 2}, "a 8x9 map", "multiples of stride 2"),
        ({"dtype": "float32", "layout": "NHWC"}, "float32 NHWC", "float16 NCHW mma"),
        ({"dtype": "float32", "kernel": "mma"}, "float32 NCHW mma", "float16 NCHW mma from sm_75"),
        ({"kernel_size": 0}, "a size that is not positive", "sizes of at least 1"),
        ({"stride": 0}, "a size that is not positive", "sizes of at least 1"),
        ({"scale": math.nan}, "scale nan", "finite"),
        ({"shape": (65536, 24, 2, 2)}, "batch 65536", "at most 65535"),
        ({"shape": (1, 24, 65536, 2)}, "height 65536", "at most 65535"),
        ({"shape": (1, 3 * 8 * 65536, 2, 2), "num_heads": 65536}, "num_heads 65536", "at most 65535"),
        ({"kernel": "mma", "sm": 72}, "float16 NCHW mma on sm_72", "float16 NCHW mma from sm_75"),
    ],
)
def test_unsupported_combination(library, change, got, supported):
    wanted = {"shape": (1, 24, 8, 8), "dtype": "float16", "num_heads": 1, "kernel_size": 3, "stride": 1}
    wanted |= {"scale": 1.0, **change}
    qkv = np.zeros(wanted.pop("shape"), wanted.pop("dtype"))
    with pytest.raises(Refused) as refused:
        library.local_attention(qkv, None, **wanted)
    assert str(refused.value).startswith(f"unsupported: got {got}")
    assert supported in str(refused.value).split(", supported ")[1]


def test_empty_batch(library):
    attributes = {"num_heads": 1, "kernel_size": 3, "stride": 1, "scale": 1.0}
    qkv, logits, values = (np.zeros((0, channels, 8, 8), np.float16) for channels in (24, 81, 8))
    assert library.local_attention(qkv, None, **attributes).shape == (0, 8, 8, 8)
    assert library.outlook_attention(logits, values, **attributes).shape == (0, 8, 8, 8)
