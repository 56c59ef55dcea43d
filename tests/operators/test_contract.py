"""What holds for every operator: its body computes what its oracle does, and its definition can be worked with."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acmix_deploy.operators.axes import Axis, quantities, shapes
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.neighborhood_attention import NEIGHBORHOOD_ATTENTION, Border
from acmix_deploy.operators.reassembly import REASSEMBLY
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.targets import OPSETS
from tests.operators.parts import (
    TYPES,
    attributes_of,
    every_operator,
    example_of,
    function_body,
    one_node_model,
    oracle,
    oracle_of,
)
from tests.operators.strategies import sizes

CHOICES = {
    "batch": [1, 2, 3],
    "num_heads": [1, 2, 3, 4],
    "head_dim": [1, 2, 3, 5, 8],
    "kernel_size": [3, 3, 5, 7, 9],
    "stride": [1, 1, 2, 3, 4],
    "groups": [1, 2, 3],
    "group_channels": [1, 2, 5],
    "upsampling": [1, 2, 3],
    "dilation": [1, 1, 2, 3],
    "border": [*Border],
}
BODIES = {
    operator.name: [partial(function_body(operator), tile=tile) for tile in (1, 3, 4, 8)]
    for operator in (LOCAL_ATTENTION, NEIGHBORHOOD_ATTENTION, REASSEMBLY)
}
"""Of the operators whose bodies have a setting."""


@every_operator
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_body_equals_oracle(operator, data):
    """With stride 4 and K = 3 some pixels are in no window of an outlook."""
    size = data.draw(sizes(operator, 16, CHOICES))
    dtype = data.draw(st.sampled_from([*TYPES]))
    opset = data.draw(st.sampled_from([OPSETS[0], 18, OPSETS[-1]]))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    attributes = attributes_of(operator, size)
    given_shapes = shapes(operator, size)[: len(operator.inputs)]
    inputs = [random.standard_normal(shape).astype(dtype) for shape in given_shapes]
    free = {"B", "H", "W"} if data.draw(st.booleans()) else set()
    declared = [
        [axis if free & Axis.parse(axis).powers.keys() else length for axis, length in zip(t.axes, shape, strict=True)]
        for t, shape in zip(operator.inputs, given_shapes, strict=True)
    ]
    made_by = data.draw(st.sampled_from(BODIES.get(operator.name, [function_body(operator)])))
    model = one_node_model(operator, dtype, declared, attributes, made_by, opset)
    names = [tensor.name for tensor in operator.inputs]
    (y,) = open_session(model).run(None, dict(zip(names, inputs, strict=True)))
    found = deviation(oracle(operator, inputs, attributes), y)
    # What is rounded in half precision before the result is rounded by an eager model too.
    assert not found.problem
    assert found.relative_l2 < operator.tolerances[dtype].limit(1e-3 if dtype == "float16" else 0)


@every_operator
def test_oracle_computes_where_its_inputs_are(operator):
    """Kernels on a GPU are compared with it there."""
    size = example_of(operator, height=6, width=8, kernel_size=3, stride=2, border=Border.SHIFTED)
    *inputs, y = (torch.empty(shape, device="meta") for shape in shapes(operator, size))
    computed = oracle_of(operator)(*inputs, **attributes_of(operator, size, scale=1.0))
    assert (computed.device, computed.dtype, computed.shape) == (y.device, torch.float64, y.shape)


@every_operator
def test_body_lists_the_definition(operator):
    function = function_body(operator)()
    assert list(function.attribute) == [attribute.name for attribute in operator.attributes]
    assert list(function.input) == [tensor.name for tensor in operator.inputs]
    assert "Col2Im" not in {node.op_type for node in function.node}, "TensorRT's parser lacks it"


@every_operator
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_sizes_follow_from_the_inputs(operator, data):
    """All of them, and from any of the tensors as much as it tells, never something else."""
    size = data.draw(sizes(operator, 12, CHOICES))
    attributes = attributes_of(operator, size, scale=1.0)
    inputs = shapes(operator, size)[: len(operator.inputs)]
    assert quantities(operator, attributes, inputs) == size
    known = [shape if data.draw(st.booleans()) else () for shape in inputs]
    assert quantities(operator, attributes, known).items() <= size.items()
    free = [tuple(length if data.draw(st.booleans()) else 0 for length in shape) for shape in inputs]
    assert quantities(operator, attributes, free).items() <= size.items()


@every_operator
def test_native_kernels_hold_the_definition(operator):
    """Each head_dim fits a compiled one, and where types are chosen later TensorRT asks for float32 NCHW."""
    assert max(operator.kernel_limits.get("head_dim", [0])) <= max(operator.head_dims)
    formats = [one for kernel in operator.kernels for one in kernel.formats]
    assert ("float32", "NCHW") in formats
    assert {dtype for dtype, _ in formats} == set(operator.dtypes)
    assert set(operator.kernel_limits) <= set(operator.axes.values())
    assert operator.attribute("plugin_version").default == str(operator.version)


@pytest.mark.parametrize("text", ["", "N+1", "ceil(H/s", "N*N", "H//s", "2.5*N", "2*K-", "2*K-N", "H-1/s"])
def test_what_is_no_length(text):
    with pytest.raises(ValueError, match="is no length"):
        Axis.parse(text)


def test_lengths():
    sizes = {"H": 9, "s": 2, "K": 3, "N": 5}
    lengths = {"7": 7, "3*N": 15, "N*K^4": 405, "H/s": 4, "ceil(H/s)": 5, "ceil(K/2)": 2, "2*H/3": 6}
    lengths |= {"2*K-1": 5, "ceil(H/s)-2": 3}
    assert {text: Axis.parse(text).length(sizes) for text in lengths} == lengths
    assert Axis.parse("3*N*d").solve(30, sizes) == {"d": 2}
    assert Axis.parse("3*N*d").solve(31, sizes) == {}
    assert Axis.parse("x*d").solve(30, sizes) == {}
    assert Axis.parse("y/s").solve(30, sizes) == {}
    assert Axis.parse("2*y-1").solve(5, sizes) == {}
