"""Graphs that differ from a family's block in one respect, made by chance: whatever `fuse` does, they compute the same.

The definition is not asked here, only the graph itself: a change that leaves a block of the family, such as other
weights, may fuse, and any other must be left alone.
"""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.export import export
from acmix_deploy.fusion import fuse
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session
from tests.families.parts import VARIANTS, example

SAME = 1e-4  # relative L2; a block that is fused wrongly is off by much more
OPERATORS = {
    "Add": ("Sub", "Mul"), "Sub": ("Add",), "Mul": ("Add",), "Div": ("Mul",), "Softmax": ("LogSoftmax", "Hardmax"),
    "Relu": ("Sigmoid",), "Sigmoid": ("Tanh",), "ReduceMean": ("ReduceMax",), "ReduceSum": ("ReduceMean",),
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def block(request, tmp_path_factory):
    """A block as it is exported, its parameters all random, and the shape of its input."""
    module, x = example(request.param)
    path = tmp_path_factory.mktemp("blocks") / "block.onnx"
    export(module, path, input_shape=(1, *x.shape[1:]), opset=17)
    return onnx.load(path), (1, *x.shape[1:])


@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.soak)])
def test_what_is_fused_computes_the_same(block, count, tmp_path):
    """With 100 for each of sixteen variants there are 1,600, or a few more until a change left no block."""
    model, shape = block
    random = np.random.default_rng(0)
    x = random.standard_normal(shape).astype(np.float32)
    (original,) = run(model, x)
    tried = fused = 0
    while tried < count or (fused == tried and tried < 100):
        changed = near_miss(model, random)
        try:
            (expected, *_) = run(changed, x)
        except UserError:  # no graph any more
            continue
        distance = deviation(original, expected).relative_l2
        if not np.isfinite(expected).all() or (distance is not None and distance < SAME):
            continue
        tried += 1
        onnx.save(changed, tmp_path / "changed.onnx")
        try:
            report = fuse(tmp_path / "changed.onnx", tmp_path / "fused.onnx").found
        except CheckFailed as error:
            raise AssertionError(f"{changed.doc_string}: {error}") from error
        fused += report.fused
        (found, *_) = run(onnx.load(tmp_path / "fused.onnx"), x)
        error = deviation(expected, found)
        assert error.relative_l2 is not None, (changed.doc_string, error.problem)
        assert error.relative_l2 < SAME, (changed.doc_string, error, [b for b in report.blocks if b.fused])
    assert fused < tried, "no change was one that leaves no block"


def run(model, x):
    try:
        return open_session(model).run(None, {model.graph.input[0].name: x})
    except UserError:
        raise
    except Exception as error:  # ONNX Runtime's errors share no base
        raise UserError(str(error)) from error


def near_miss(model, random):
    """The model with one change, told in its doc_string."""
    changed = copy.deepcopy(model)
    graph = changed.graph
    kind = random.choice(["weight", "attribute", "operator", "output", "swap", "insert"])
    node = graph.node[random.integers(len(graph.node))]
    if kind == "weight" and graph.initializer:
        change_weight(graph.initializer[random.integers(len(graph.initializer))], random)
    elif kind == "attribute":
        change_attribute(node, random)
    elif kind == "operator" and node.op_type in OPERATORS:
        node.op_type = str(random.choice(OPERATORS[node.op_type]))
    elif kind == "output":
        graph.output.append(helper.make_empty_tensor_value_info(node.output[0]))
    elif kind == "swap" and len(node.input) > 1:
        node.input[0], node.input[1] = node.input[1], node.input[0]
    else:
        kind = "insert"
        insert(graph, node, str(random.choice(["Relu", "Abs", "Tanh", "Sigmoid"])))
    changed.doc_string = f"{kind} at {node.name} ({node.op_type})"
    return changed


def change_weight(tensor, random):
    if tensor.data_type != TensorProto.FLOAT:
        return
    array = numpy_helper.to_array(tensor).copy()
    how = random.integers(4)
    if how == 0:
        array.flat[random.integers(array.size)] += 1
    elif how == 1:
        array *= -1
    elif how == 2:
        array = np.roll(array, 1, axis=int(random.integers(array.ndim)) if array.ndim else None)
    else:
        array[...] = random.standard_normal(array.shape)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def change_attribute(node, random):
    """Another axis, padding, step, group or order."""
    if not node.attribute:
        return
    attribute = node.attribute[random.integers(len(node.attribute))]
    if attribute.type == onnx.AttributeProto.INT:
        attribute.i += int(random.choice([-1, 1]))
    elif attribute.type == onnx.AttributeProto.INTS:
        values = list(attribute.ints)
        if attribute.name == "perm":
            a, b = random.integers(len(values), size=2)
            values[a], values[b] = values[b], values[a]
        else:
            values[random.integers(len(values))] += 1
        attribute.ints[:] = values
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f *= 1.5
    elif attribute.type == onnx.AttributeProto.STRING and attribute.s == b"reflect":
        attribute.s = bytes(random.choice([b"edge", b"constant"]))
    elif attribute.type == onnx.AttributeProto.TENSOR:
        change_weight(attribute.t, random)


def insert(graph, node, op_type):
    """An operator behind a node's output."""
    name = node.output[0]
    inner = f"{name}/before"
    node.output[0] = inner
    position = next(index for index, other in enumerate(graph.node) if other is node or other.output[:1] == [inner])
    graph.node.insert(position + 1, helper.make_node(op_type, [inner], [name], name=f"inserted_{op_type}"))
