"""What a release of TensorRT does not read of a file: operators by name and by what it asks of them, with the way out."""

from __future__ import annotations

import argparse
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

from acmix_deploy.cli import main, parser
from acmix_deploy.export import export
from acmix_deploy.forms import write_for
from acmix_deploy.onnx_file import read_since, unread, unread_note
from acmix_deploy.targets import LIMITS, NEWEST, READ_SINCE, WAYS_OUT, target_named, target_of

SHAPE = (1, 3, 8, 12)
RELEASES = ("8.5", "8.6", "10.0", "10.11", "10.12", "11.1")


def model(*nodes, x=(1, 3, 8, 8), opset=18, types=("FLOAT", "FLOAT"), **constants):
    """A file of these nodes, from x and constants to y."""
    first, last = (getattr(TensorProto, name) for name in types)
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", first, x)],
        [helper.make_tensor_value_info("y", last, None)],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8 if opset < 19 else 10)


def node(operator, inputs="x", outputs="y", **attributes):
    return helper.make_node(operator, inputs.split(" "), outputs.split(" "), "it", **attributes)


def pool(operator, opset, **attributes):
    return model(node(operator, kernel_shape=[2, 2], **attributes), opset=opset)


def resize(**attributes):
    return model(node("Resize", "x  scales", **attributes), opset=19, scales=np.float32([1, 1, 0.5, 0.5]))


def quantised(zero, kind=np.int8):
    through = [node("QuantizeLinear", "x scale zero", "q"), node("DequantizeLinear", "q scale zero", "d")]
    stored = node("DequantizeLinear", "weight scale none", "w")
    weight, none = np.ones((1, 3, 8, 8), kind), np.zeros((), kind)
    return model(*through, stored, node("Add", "d w"), scale=np.float32(0.1), zero=zero, weight=weight, none=none)


def einsum(equation):
    operands = equation.count(",") + 1
    return model(node("Einsum", " ".join(["x"] * operands), equation=equation))


def sample(*sizes):
    grid = np.zeros((1, *sizes[2:], len(sizes) - 2), np.float32)
    return model(node("GridSample", "x grid"), x=sizes, opset=20, grid=grid)


def scatter(operator, index, reduction):
    update = np.zeros((1, 3, 8, 8) if operator == "ScatterND" else (1, 1, 1, 1), np.float32)
    return model(node(operator, "x index update", reduction=reduction), index=index, update=update)


def top(k):
    return model(node("TopK", "x k", "y places"), x=(1, 9000), k=np.array([k]))


def top_computed():
    size = [node("Shape", "x", "shape"), node("Slice", "shape one two", "k")]
    return model(*size, node("TopK", "x k", "y places"), x=(1, 90), one=np.array([1]), two=np.array([2]))


def cast(kind, *, within=True):
    if not within:
        return model(node("Cast", to=getattr(TensorProto, kind)), types=("FLOAT", kind))
    there = node("Cast", "x", "c", to=getattr(TensorProto, kind))
    return model(there, node("Cast", "c", to=TensorProto.FLOAT))


def deformed(*pads):
    weight, offset = np.ones((4, 3, 3, 3), np.float32), np.zeros((1, 18, 8, 8), np.float32)
    return model(node("DeformConv", "x weight offset", pads=pads), opset=19, weight=weight, offset=offset)


def normalised(outputs):
    return model(node("LayerNormalization", "x scale", outputs), scale=np.ones(8, np.float32))


def trained(mode):
    inputs, outputs = "x a b c d", "y mean variance" if mode else "y"
    held = {name: np.ones(3, np.float32) for name in "abcd"}
    return model(node("BatchNormalization", inputs, outputs, training_mode=mode), **held)


EVERY = " ".join(RELEASES)
LIMITED = {
    "AveragePool with dilations 2, 2": (pool("AveragePool", 19, dilations=[2, 2]), EVERY),
    "BatchNormalization with training_mode 1": (trained(1), EVERY),
    "Cast with to INT16": (cast("INT16"), EVERY),
    "Cast with to UINT8 elsewhere than at an output": (cast("UINT8"), EVERY),
    "DeformConv with pads 0, 0, 1 and 1 more": (deformed(0, 0, 1, 1), "10.11 10.12 11.1"),
    "DequantizeLinear with x of INT32": (quantised(np.int8(0), np.int32), EVERY),
    "Einsum with a diagonal": (einsum("bchh->bch"), "8.5 8.6 10.0 10.11"),
    "Einsum with an ellipsis": (einsum("...hw,...xw->...hx"), "8.5 8.6"),
    "Einsum with 3 operands": (einsum("bchw,bcxw,bdhw->bhxd"), "8.5 8.6"),
    "Einsum with capital letters": (einsum("bchw,bcXw->bhX"), EVERY),
    "GridSample with 5 axes": (sample(1, 3, 4, 8, 8), EVERY),
    "LayerNormalization with 2 outputs": (normalised("y mean"), "8.6 10.0 10.11 10.12 11.1"),
    "LpPool with dilations 2, 2": (pool("LpPool", 18, dilations=[2, 2]), EVERY),
    "MaxPool with 2 outputs": (model(node("MaxPool", "x", "y places", kernel_shape=[2, 2])), EVERY),
    "MaxPool with dilations 2, 2": (pool("MaxPool", 18, dilations=[2, 2]), EVERY),
    "QuantizeLinear with y_zero_point of INT16": (quantised(np.int16(0)), EVERY),
    "QuantizeLinear with y_zero_point of UINT8": (quantised(np.uint8(0)), EVERY),
    "QuantizeLinear with y_zero_point 3": (quantised(np.int8(3)), EVERY),
    "Resize with antialias 1": (resize(mode="linear", antialias=1), EVERY),
    "Resize with the mapping half_pixel_symmetric": (
        *(resize(mode="linear", coordinate_transformation_mode="half_pixel_symmetric"), EVERY),
    ),
    "Resize with the policy not_larger": (resize(mode="linear", keep_aspect_ratio_policy="not_larger"), EVERY),
    "ScatterElements with reduction add": (
        scatter("ScatterElements", np.zeros((1, 1, 1, 1), np.int64), "add"),
        "8.5 8.6",
    ),
    "ScatterND with reduction add": (scatter("ScatterND", np.array([[0]]), "add"), EVERY),
    "TopK with K 4000": (top(4000), EVERY),
    "TopK with a K that nodes compute": (top_computed(), "8.5"),
}
"""What is told, the file, and the releases that do not read it."""
LET_PASS = {"GridSample with 5 axes", "TopK with K 4000", "QuantizeLinear with y_zero_point of UINT8"}
"""Of the limits of every release, those that TensorRT-RTX's parser lets pass: only TopK is refused later."""
NEAR = {
    "dilations of 1": pool("MaxPool", 18, dilations=[1, 1]),
    "default dilations": pool("AveragePool", 18),
    "an evaluated normalisation": trained(0),
    "casts of usual types": cast("INT32"),
    "a UINT8 output": cast("UINT8", within=False),
    "symmetric INT8": quantised(np.int8(0)),
    "two operands": einsum("bchw,bcxw->bhx"),
    "one letter in two operands": einsum("bchw,bchw->b"),
    "four axes": sample(1, 3, 8, 8),
    "cubic": resize(mode="cubic"),
    "nearest": resize(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    "the default stated": scatter("ScatterND", np.array([[0]]), "none"),
    "no reduction": scatter("ScatterElements", np.zeros((1, 1, 1, 1), np.int64), "none"),
    "a K in the file": top(3840),
}


@pytest.mark.parametrize("told", LIMITED)
def test_limits_of_operators_that_are_read(told):
    """By release, with the node; whatever follows from nothing but the name of the operator is not told twice."""
    file, releases = LIMITED[told]
    lacking = [name for name in RELEASES if told in unread(file, target_named(f"tensorrt-{name}"))]
    assert lacking == releases.split()
    if told in (found := unread(file, target_named(f"tensorrt-{lacking[-1]}"))):
        note = unread_note(told, found[told])
        first = {"8.5 8.6": "10.0", "8.5": "8.6", "8.5 8.6 10.0 10.11": "10.12"}.get(releases)
        release = f"TensorRT before {first}" if first else "TensorRT"
        assert note.startswith(f"{told} (it), which {release} does not read: a model without it is needed there")
        assert read_since(file) == tuple(map(int, (first or "8.5").split("."))) or "Conv" in told or "Layer" in told
    assert not unread(file, target_named("onnxruntime"))


@pytest.mark.parametrize("name", NEAR)
def test_what_is_within_the_limits_is_not_told(name):
    assert not unread(NEAR[name], target_of((8, 5)))
    assert read_since(NEAR[name]) == (8, 5)


def test_the_newest_parser_has_these_limits(rtx, tmp_path):
    """TensorRT-RTX: it refuses what every release refuses, and reads what is near to it."""
    files = {}
    refused = [told for told, (_, releases) in LIMITED.items() if releases.endswith("11.1") and told not in LET_PASS]
    for index, (name, file) in enumerate([(told, LIMITED[told][0]) for told in refused] + [*NEAR.items()]):
        files[name] = tmp_path / f"{index}.onnx"
        onnx.save(file, files[name])
    answers, _ = rtx("build", "-", *files.values())
    found = dict(zip(files, answers, strict=True))
    assert not [told for told in refused if found[told]["parsed"]]
    assert not [name for name in NEAR if not found[name]["parsed"]]


def test_tables_name_what_there_is():
    """Every operator, fact, option and verb that the tables name exists."""
    schemas = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        schemas.setdefault(schema.name, []).append(schema)
    assert {*READ_SINCE, *WAYS_OUT} < {*schemas}
    assert {*WAYS_OUT} <= {*READ_SINCE}
    for limit in LIMITS:
        assert limit.told.count("{}") <= 1
        for operator in limit.operators.split():
            attributes = {name for schema in schemas[operator] for name in schema.attributes}
            inputs = {parameter.name for schema in schemas[operator] for parameter in schema.inputs}
            name, _, which = limit.fact.partition(".")
            assert name in attributes | {"operands", "outputs"} if which in ("", "within") else name in inputs
            assert any(told.startswith(f"{operator} with ") for told in LIMITED)
    (verbs,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    for way in [*WAYS_OUT.values(), *(limit.way for limit in LIMITS)]:
        assert set(re.findall(r"acmix-deploy (\w+)", way)) <= {*verbs.choices}
        assert all(option in verbs.choices["export"].format_help() for option in re.findall(r"--[a-z-]+", way))
