"""The CUDA kernels themselves, compiled for the CPU over an emulated device, against the PyTorch oracles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acmix_deploy.half import rounded
from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.axes import shapes
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.neighborhood_attention import NEIGHBORHOOD_ATTENTION, Border
from acmix_deploy.operators.outlook_attention import OUTLOOK_ATTENTION
from acmix_deploy.operators.spec import Operator
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session
from tests.operators.parts import attributes_of, every_operator, example_of, one_node_model, oracle
from tests.operators.strategies import sizes
from tests.plugin import kernels
from tests.plugin.kernels import Array, Kernels, Refused, windows_of

MISSING = kernels.missing_compiler()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture(scope="session")
def library() -> Kernels:
    return Kernels(kernels.library())


def test_emulator(tmp_path):
    """The device that all else here stands on: missing barriers and waits show, faults have names, mma multiplies."""
    program = kernels.build([kernels.EMULATOR / "self_test.cpp"], tmp_path / "self_test")
    kernels.run([program])


def normal(random: np.random.Generator, dtype: str, *shape: int) -> Array:
    return random.standard_normal(shape).astype(dtype)


def limit(operator: Operator, dtype: str) -> float:
    """The operator's tolerance; what eager code loses at least is the rounding of the result."""
    return operator.tolerances[dtype].limit(2**-11 if dtype == "float16" else 0.0)


def check(
    library: Kernels, operator: Operator, inputs: list[Array | None], launch: dict[str, Any], **attributes: Any
) -> None:
    """One launch against the oracle, None being zeros; ``launch`` holds what changes no result."""
    y = library.launch(operator, *inputs, **attributes, **launch)
    if inputs[1] is None:
        inputs = [inputs[0], np.zeros((inputs[0].shape[1] // 3 // attributes["num_heads"], 2))]
    found = deviation(oracle(operator, inputs, attributes), y)
    assert not found.problem
    assert found.relative_l2 <= limit(operator, y.dtype.name)


def ways_of(operator: Operator) -> list[tuple[str, str, str]]:
    """Element type, layout and kernel of what is compiled."""
    return [(dtype, layout, kernel.name) for kernel in operator.kernels for dtype, layout in kernel.formats]


UNLIMITED = {
    "batch": [1, 2],
    "num_heads": [1, 2, 3],
    "groups": [1, 2, 3],
    "group_channels": [1, 4, 8, 12, 16, 40],
    "dilation": [1, 1, 2, 3],
}
"""Sizes of which kernels take all."""

every_way = pytest.mark.parametrize(("dtype", "layout", "kernel"), ways_of(LOCAL_ATTENTION))


@pytest.mark.parametrize("examples", [12, pytest.param(60, marks=pytest.mark.soak)])
@every_operator
def test_equals_oracle(library, operator, examples):
    settings(max_examples=examples, deadline=None)(given(data=st.data())(equals_oracle))(library, operator)


def equals_oracle(library, operator, data):
    dtype, layout, kernel = data.draw(st.sampled_from(ways_of(operator)))
    seeds = st.integers(0, 999)
    launch = {"layout": layout, "kernel": kernel, "sm": data.draw(st.sampled_from([75, 90])), "seed": data.draw(seeds)}
    choices = {**operator.kernel_limits, **UNLIMITED}
    size = data.draw(sizes(operator, 16, choices))
    scale = data.draw(st.sampled_from([1.0, -1.0, 0.0])) * size.get("head_dim", 1) ** -0.5
    attributes = attributes_of(operator, size, scale=scale)
    random = np.random.default_rng(data.draw(seeds))
    inputs = [normal(random, dtype, *shape) for shape in shapes(operator, size)[: len(operator.inputs)]]
    if operator is LOCAL_ATTENTION and data.draw(st.booleans()):
        inputs[1] = None
    check(library, operator, inputs, launch, **attributes)


@every_operator
def test_a_file_in_half_precision_is_run_as_the_kernels_compute_it(library, operator):
    """By :func:`acmix_deploy.half.rounded`, but for ties; kernels on tensor cores round probabilities as well."""
    random = np.random.default_rng(0)
    size = example_of(operator, height=9, width=11, kernel_size=3)
    attributes = attributes_of(operator, size)
    inputs = [normal(random, "float16", *shape) for shape in shapes(operator, size)[: len(operator.inputs)]]
    file = rounded(one_node_model(operator, "float16", [array.shape for array in inputs], attributes))
    session = open_session(file)
    feeds = {node.name: array.astype(np.float32) for node, array in zip(session.get_inputs(), inputs, strict=True)}
    (found,) = session.run(None, feeds)
    np.testing.assert_array_equal(found, found.astype(np.float16))
    for kernel in operator.kernels:
        for dtype, layout in kernel.formats:
            if dtype == "float16":
                y = library.launch(operator, *inputs, **attributes, layout=layout, kernel=kernel.name)
                assert (deviation(y, found).relative_l2 or 0) < (2**-11 if kernel.name == "mma" else 2**-15)


def of_entry(
    library: Kernels,
    operator: Operator,
    entry: dict[str, Any],
    padding: int,
    window: Mapping[str, int],
    **launch: Any,
) -> None:
    """Check a row of the table, with rows of pixels that NCHW copies in words."""
    random = np.random.default_rng(0)
    heads = {"num_heads": 1, "groups": 1, "head_dim": entry["head_dim"] - padding}
    size = example_of(operator, **heads, height=10, width=12, **window)
    inputs = [normal(random, entry["dtype"], *shape) for shape in shapes(operator, size)[: len(operator.inputs)]]
    way = {**launch, "layout": entry["layout"], "kernel": entry["kernel"]}
    check(library, operator, inputs, way, **attributes_of(operator, size))


def compiled_apart(operator: Operator, kernel: str, turn: int) -> list[dict[str, int]]:
    """Windows for which a kernel is another function: by kernel size, and by stride where tensor cores see it.

    What else a window has is an argument of the kernel, and goes through its values from ``turn`` to ``turn``.
    """
    windows = windows_of(operator)
    if (operator, kernel) == (LOCAL_ATTENTION, "mma") or operator.head_dims == (0,):  # or few and quick
        return windows
    by_size = [[w for w in windows if w["kernel_size"] == size] for size in operator.kernel_limits["kernel_size"]]
    return [alike[(turn + index) % len(alike)] for index, alike in enumerate(by_size)]


@every_operator
@pytest.mark.parametrize("windows", ["in turn", pytest.param("all", marks=pytest.mark.soak)])
def test_every_entry(library, operator, windows):
    """All the functions behind a row of the table; heads are full or padded."""
    rows = library.entries(operator)
    expected = [(*way, head_dim) for way in ways_of(operator) for head_dim in operator.head_dims]
    assert [(row["dtype"], row["layout"], row["kernel"], row["head_dim"]) for row in rows] == expected
    for turn, row in enumerate(rows):
        tried = windows_of(operator) if windows == "all" else compiled_apart(operator, row["kernel"], turn)
        for index, window in enumerate(tried):
            of_entry(library, operator, row, 8 * ((turn // 2 + index) % 2), window)


@every_operator
@pytest.mark.parametrize("offsets", [(1, 0), (0, 1)], ids=["input", "output"])
def test_misaligned_tensors(library, operator, offsets):
    """NCHW takes any address; NHWC refuses what its 16-byte words cannot be read from."""
    window = next(window for window in windows_of(operator) if window["kernel_size"] == 5)
    for row, padding in itertools.product(library.entries(operator), (0, 8)):
        run = partial(of_entry, library, operator, row, padding, window, offsets=offsets)
        if row["layout"] == "NCHW":
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
    before = library.launch(LOCAL_ATTENTION, qkv, weight, **launch).reshape(3, 3, 8, 4, 5)
    parts = qkv.reshape(3, 3, 3, 8, 4, 5)  # image, part, head, ...
    parts[:, :, [0, 2]] = parts[[0, 2]] = np.nan
    after = library.launch(LOCAL_ATTENTION, qkv, weight, **launch).reshape(3, 3, 8, 4, 5)
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
    check(library, LOCAL_ATTENTION, [qkv, None], {"layout": layout, "kernel": kernel}, **attributes)


@every_way
def test_large_halves(library, dtype, layout, kernel):
    """Logits whose product with the scale is rounded by more than a float of the exponential holds."""
    qkv = normal(np.random.default_rng(0), dtype, 1, 3 * 64, 4, 9) * np.asarray(1e4, dtype)
    attributes = {"num_heads": 1, "kernel_size": 7, "stride": 1, "scale": 0.125}
    check(library, LOCAL_ATTENTION, [qkv, None], {"layout": layout, "kernel": kernel}, **attributes)


@pytest.mark.parametrize("layout", kernels.LAYOUTS)
def test_what_is_not_finite_stays_near(library, layout):
    """It spoils at most 10 outputs beyond those whose windows see it, as acmix/launch.h says."""
    limits, farthest = LOCAL_ATTENTION.kernel_limits, 0
    for kernel_size, stride, x in itertools.product(limits["kernel_size"], limits["stride"], range(24, 32)):
        qkv = np.zeros((1, 24, 6, 56), np.float16)
        qkv[:, 16:, 3, x] = np.nan
        attributes = {"num_heads": 1, "kernel_size": kernel_size, "stride": stride, "scale": 1.0}
        y = library.launch(LOCAL_ATTENTION, qkv, None, **attributes, layout=layout, kernel="mma")
        spoilt = np.flatnonzero(np.isnan(y).any((0, 1, 2)))
        farthest = max(farthest, *(np.abs(spoilt * stride - x) - kernel_size // 2) / stride)
    assert farthest == 10


@pytest.mark.parametrize(("dtype", "layout", "kernel"), ways_of(OUTLOOK_ATTENTION))
@pytest.mark.parametrize("step", [100.0, -100.0])
def test_outlook_logits_that_rise_or_fall(library, dtype, layout, kernel, step):
    logits = np.broadcast_to(np.tile(np.arange(9), 9)[:, None, None], (1, 81, 4, 5)).astype(dtype)
    values = normal(np.random.default_rng(0), dtype, 1, 8, 4, 5)
    attributes = {"num_heads": 1, "kernel_size": 3, "stride": 1, "scale": step}
    check(library, OUTLOOK_ATTENTION, [logits, values], {"layout": layout, "kernel": kernel}, **attributes)


def window_along(pixel: int, size: int, kernel_size: int, dilation: int, border: Border) -> list[int]:
    """The pixels on the map that one sees along an axis."""
    alike = [*range(pixel % dilation, size, dilation)]
    first = alike.index(pixel) - kernel_size // 2
    if border == Border.SHIFTED:
        first = min(max(first, 0), len(alike) - kernel_size)
    return alike[max(first, 0) : first + kernel_size]


every_neighborhood_way = pytest.mark.parametrize(
    ("dtype", "layout", "kernel", "border"),
    [
        pytest.param(*way, border, id="-".join((*way, border.name.lower())))
        for way, border in itertools.product(ways_of(NEIGHBORHOOD_ATTENTION), Border)
    ],
)


def neighborhood(border: Border, dtype: str, heads: int, head_dim: int, *size: int, **others: Any) -> Any:
    """Inputs on a map of ``size``, [B, H, W], and attributes: K = 3, dilation 2 unless others are given."""
    batch, height, width = size
    attributes = {"num_heads": heads, "kernel_size": 3, "dilation": 2, "border": border, "scale": 1.0, **others}
    sizes = {"batch": batch, "head_dim": head_dim, "height": height, "width": width, **attributes}
    random = np.random.default_rng(0)
    return [normal(random, dtype, *shape) for shape in shapes(NEIGHBORHOOD_ATTENTION, sizes)[:3]], attributes


@every_neighborhood_way
def test_a_neighborhood_is_all_that_is_read(library, dtype, layout, kernel, border):
    """What lies outside a pixel's window reaches it as little as other heads, images and their biases do.

    Tensor cores weigh the neighbours of a whole tile, some with 0: what is there is finite.
    """
    poison = np.nan if kernel == "simt" else 100
    (qkv, weight, bias), attributes = neighborhood(border, dtype, 3, 8, 3, 7, 9)
    way = {**attributes, "layout": layout, "kernel": kernel}
    before = library.launch(NEIGHBORHOOD_ATTENTION, qkv, weight, bias, **way).reshape(3, 3, 8, 7, 9)
    bias[[0, 2]] = np.nan
    if border != Border.SHIFTED:
        bias[:, [0, -1]] = bias[:, :, [0, -1]] = np.nan
    for row, column in ((0, 0), (0, 4), (3, 8), (6, 1), (6, 8), (3, 4)):
        hidden = np.ones((7, 9), bool)
        rows, columns = (window_along(*axis, 3, 2, border) for axis in ((row, 7), (column, 9)))
        hidden[np.ix_(rows, columns)] = False
        poisoned = qkv.reshape(3, 3, 3, 8, 7, 9).copy()  # image, part, head, ...
        poisoned[..., hidden] = poison
        poisoned[[0, 2]] = poisoned[:, :, [0, 2]] = np.nan
        after = library.launch(NEIGHBORHOOD_ATTENTION, poisoned.reshape(qkv.shape), weight, bias, **way)
        assert np.array_equal(after.reshape(before.shape)[1, 1, :, row, column], before[1, 1, :, row, column])


@pytest.mark.parametrize("layout", kernels.LAYOUTS)
@pytest.mark.parametrize("border", Border, ids=lambda border: border.name.lower())
def test_what_is_not_finite_stays_near_in_a_neighborhood(library, border, layout):
    """It spoils at most 10 outputs beyond those whose windows see it, as acmix/launch.h says, also at the ends."""
    farthest = 0
    for kernel_size, width in ((3, 32), (3, 25), (9, 25)):
        for x in range(0, width, 3):
            (qkv, weight, bias), attributes = neighborhood(
                border, "float16", 1, 8, 1, 9, width, kernel_size=kernel_size, dilation=1
            )
            qkv[:, 16:, 4, x] = np.nan
            y = library.launch(NEIGHBORHOOD_ATTENTION, qkv, weight, bias, **attributes, layout=layout, kernel="mma")
            seeing = [i for i in range(width) if x in window_along(i, width, kernel_size, 1, border)]
            spoilt = np.flatnonzero(np.isnan(y).any((0, 1, 2)))
            assert {*seeing} <= {*spoilt}
            farthest = max(farthest, seeing[0] - spoilt[0], spoilt[-1] - seeing[-1])
    assert farthest <= 10


@every_neighborhood_way
@pytest.mark.parametrize("step", [1000.0, -1000.0])
def test_neighborhood_logits_that_rise_or_fall(library, dtype, layout, kernel, border, step):
    (qkv, weight, bias), attributes = neighborhood(border, dtype, 1, 16, 1, 7, 9, scale=step / 16)
    qkv[:, :16], qkv[:, 16:32] = 1, np.arange(63).reshape(7, 9)
    check(library, NEIGHBORHOOD_ATTENTION, [qkv, 0 * weight, bias], {"layout": layout, "kernel": kernel}, **attributes)


@every_neighborhood_way
def test_bias_decides(library, dtype, layout, kernel, border):
    """Large biases, and logits that without them say another thing."""
    (qkv, weight, bias), attributes = neighborhood(border, dtype, 2, 8, 1, 11, 10, kernel_size=5)
    inputs = [qkv, weight, bias * np.asarray(1000, dtype)]
    check(library, NEIGHBORHOOD_ATTENTION, inputs, {"layout": layout, "kernel": kernel}, **attributes)


@every_neighborhood_way
def test_smallest_maps(library, dtype, layout, kernel, border):
    """A single pixel, and where windows just fit; a dilation beyond the map leaves each pixel alone."""
    least = 6 if border == Border.SHIFTED else 1
    for height, width in ((least, least), (least, least + 3), (least + 1, least)):
        inputs, attributes = neighborhood(border, dtype, 1, 8, 1, height, width)
        check(library, NEIGHBORHOOD_ATTENTION, inputs, {"layout": layout, "kernel": kernel}, **attributes)
    if border == Border.MASKED:
        inputs, attributes = neighborhood(border, dtype, 1, 8, 1, 4, 5, dilation=65535)
        y = library.launch(NEIGHBORHOOD_ATTENTION, *inputs, **attributes, layout=layout, kernel=kernel)
        assert np.array_equal(y, inputs[0][:, 16:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kernel_size": 7, "dilation": 1}, "got height 6, supported at least 7"),
        ({"dilation": 3}, "got height 6, supported at least 9"),
        ({"dilation": 65536}, "got height 6, supported at least 196608"),
        ({"dilation": 65536, "border": Border.ZEROS}, "got dilation 65536, supported at most 65535"),
        ({"kernel_size": 7, "dilation": 1, "border": Border.MASKED}, None),
        ({"dilation": 0}, "got a size that is not positive"),
    ],
)
def test_sizes_of_a_neighborhood(library, change, reason):
    """The window of the shifted border alone wants a map as large as it is."""
    border = change.pop("border", Border.SHIFTED)
    inputs, attributes = neighborhood(border, "float32", 1, 8, 1, 6, 7, **change)
    if reason is None:
        return check(library, NEIGHBORHOOD_ATTENTION, inputs, {}, **attributes)
    with pytest.raises(Refused) as refused:
        library.launch(NEIGHBORHOOD_ATTENTION, *inputs, **attributes)
    assert str(refused.value).startswith(f"unsupported: {reason}")


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
    y = library.launch(
        LOCAL_ATTENTION,
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
    simt, mma = (library.launch(LOCAL_ATTENTION, qkv, None, **attributes, kernel=kernel) for kernel in kernels.KERNELS)
    assert not np.array_equal(simt, mma)
    assert np.array_equal(library.launch(LOCAL_ATTENTION, qkv, None, **attributes, sm=75), mma)
    assert np.array_equal(library.launch(LOCAL_ATTENTION, qkv, None, **attributes, sm=72), simt)


UNSUPPORTED = {"kernel_size": (1, 4, 11), "stride": (3,), "border": (4,), "head_dim": (12, 136), "upsampling": (5,)}


@pytest.mark.parametrize(
    ("operator", "name", "value"),
    [
        pytest.param(operator, name, value, id=f"{operator.name}-{name}-{value}")
        for operator in OPERATORS
        for name in operator.kernel_limits
        for value in UNSUPPORTED[name]
    ],
)
def test_unsupported_value(library, operator, name, value):
    size = example_of(operator, height=12, width=12, **{"kernel_size": 3, name: value})
    inputs = [np.zeros(shape, np.float16) for shape in shapes(operator, size)[: len(operator.inputs)]]
    with pytest.raises(Refused) as refused:
        library.launch(operator, *inputs, **attributes_of(operator, size))
    supported = ", ".join(map(str, operator.kernel_limits[name]))
    assert str(refused.value) == f"unsupported: got {name} {value}, supported {supported}"


@pytest.mark.parametrize(
    ("change", "got", "supported"),
    [
        ({"shape": (1, 24, 3, 8), "kernel_size": 7}, "height 3", "at least 4"),
        ({"shape": (1, 24, 8, 9), "stride": 2}, "width / stride = 9 / 2", "whole numbers"),
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
        library.launch(LOCAL_ATTENTION, qkv, None, **wanted)
    assert str(refused.value).startswith(f"unsupported: got {got}")
    assert supported in str(refused.value).split(", supported ")[1]


def test_empty_batch(library):
    attributes = {"num_heads": 1, "kernel_size": 3, "stride": 1, "scale": 1.0}
    qkv, logits, values = (np.zeros((0, channels, 8, 8), np.float16) for channels in (24, 81, 8))
    assert library.launch(LOCAL_ATTENTION, qkv, None, **attributes).shape == (0, 8, 8, 8)
    assert library.launch(OUTLOOK_ATTENTION, logits, values, **attributes).shape == (0, 8, 8, 8)
    inputs, attributes = neighborhood(Border.ZEROS, "float16", 1, 8, 0, 8, 8)
    assert library.launch(NEIGHBORHOOD_ATTENTION, *inputs, **attributes).shape == (0, 8, 8, 8)
