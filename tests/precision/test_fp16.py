"""Half precision: what the file's types are, what stays in float32, and how exact it is."""

from __future__ import annotations

import argparse

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.local_attention.body import function_body
from acmix_deploy.operators.local_attention.oracle import local_attention
from acmix_deploy.options import FLOAT32, add_options
from acmix_deploy.plan import Plan
from acmix_deploy.precision import fp16, to_fp16
from acmix_deploy.precision.fp16 import halve_softmax, out_of_range, tail
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session
from tests.families.parts import export, outputs
from tests.fusion.test_fuse import Detector, randomised


@pytest.fixture
def fused(tmp_path):
    model = Detector().eval()
    x = torch.randn(1, 3, 16, 12)
    fuse(export(model, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx", expect=2)
    return model, x, tmp_path / "fused.onnx"


@pytest.mark.parametrize("fp16_io", [False, True])
def test_types_and_error(fused, fp16_io):
    model, x, source = fused
    target = source.with_name("fp16.onnx")
    report = to_fp16(source, target, fp16_io=fp16_io).found
    typed = onnx.load(target)
    element = TensorProto.FLOAT16 if fp16_io else TensorProto.FLOAT
    assert {value.type.tensor_type.elem_type for value in (*typed.graph.input, *typed.graph.output)} == {element}
    learnt = {tensor.name: tensor.data_type for tensor in typed.graph.initializer if len(tensor.dims) > 1}
    borders = [f"acmix_{index}.biases" for index in range(2)]
    half = {TensorProto.FLOAT16: set(learnt) - {f"{name}.weight" for name in borders}}
    assert {kind: {name for name in learnt if learnt[name] == kind} for kind in half} == half
    assert [function.name for function in typed.functions] == [LOCAL_ATTENTION.op_type]
    assert typed.ir_version == onnx.load(source).ir_version
    constant = dict.fromkeys(borders, "constant")
    assert report.float32_nodes == constant | {"/Softmax": "decode", "AcmixLocalAttention/Softmax": "softmax"}
    assert report.out_of_range == {}
    assert report.float32_io is not fp16_io
    casts = [node.input[0] for node in typed.graph.node if node.op_type == "Cast"]
    assert len([name for name in casts if not name.startswith("acmix_")]) == 2, (
        "around the Softmax if inputs and outputs are float16, else at the input and before it"
    )

    with torch.no_grad():
        exact = model(x).numpy()
        eager = model.half()(x.half()).float().numpy()
    found = deviation(exact, outputs(target, x.half() if fp16_io else x).astype(np.float32))
    assert 1e-6 < found.relative_l2 < LOCAL_ATTENTION.tolerances["float16"].limit(deviation(exact, eager).relative_l2)


def test_decode_behind_the_last_layer_stays_in_float32(tmp_path):
    """Coordinates up to 640 pixels: float16 would round them to half a pixel."""
    anchors = np.arange(640, dtype=np.float32) + 0.25
    conv = numpy_helper.from_array(np.random.default_rng(0).standard_normal((640, 3, 1, 1)).astype(np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], name="pool"),
        helper.make_node("Reshape", ["p", "shape"], ["r"], name="reshape"),
        helper.make_node("Sigmoid", ["r"], ["s"], name="sigmoid"),
        helper.make_node("Add", ["s", "anchors"], ["y"], name="decode"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", 1, [1, 640])],
        [conv, numpy_helper.from_array(anchors, "anchors"), numpy_helper.from_array(np.array([1, 640]), "shape")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert tail(model) == ["pool", "reshape", "sigmoid", "decode"]
    onnx.save(model, tmp_path / "float32.onnx")
    to_fp16(tmp_path / "float32.onnx", tmp_path / "fp16.onnx")
    x = torch.rand(1, 3, 4, 4)
    error = np.abs(outputs(tmp_path / "float32.onnx", x) - outputs(tmp_path / "fp16.onnx", x)).max()
    assert 0 < error < 2e-3


def test_tensor_read_by_several_float32_nodes(tmp_path):
    """Each would get a cast of the same name."""
    block, x = randomised(ACmix(4, 8, head=2)), torch.randn(1, 4, 9, 8)
    source = export(block, x, tmp_path / "plain.onnx")
    fuse(source, tmp_path / "fused.onnx")
    model = onnx.load(tmp_path / "fused.onnx")
    y = model.graph.output[0].name
    model.graph.node.append(helper.make_node("Sigmoid", [y], ["gate"], name="gate"))
    model.graph.node.append(helper.make_node("Tanh", [y], ["signal"], name="signal"))
    model.graph.node.append(helper.make_node("Mul", ["gate", "signal"], ["out"], name="product"))
    model.graph.output[0].name = "out"
    onnx.save(model, tmp_path / "fused.onnx")
    report = to_fp16(tmp_path / "fused.onnx", tmp_path / "fp16.onnx").found
    assert [name for name, why in report.float32_nodes.items() if why == "decode"] == ["gate", "signal", "product"]
    assert outputs(tmp_path / "fp16.onnx", x).dtype == np.float32


@pytest.fixture
def sensitive(tmp_path):
    """Two learnt layers around a square that float16 cannot hold, and a rounding to integers that must survive."""
    random = np.random.default_rng(0)
    arrays = {
        "first": random.standard_normal((8, 3, 1, 1)) * 300,
        "last": random.standard_normal((8, 8, 3, 3)) * 1e-3,
        "epsilon": np.array(1e-12),
    }
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["c"], name="conv"),
        helper.make_node("Mul", ["c", "c"], ["square"], name="square"),
        helper.make_node("Add", ["square", "epsilon"], ["above_zero"], name="add"),
        helper.make_node("Div", ["square", "above_zero"], ["one"], name="ratio"),
        helper.make_node("Sqrt", ["above_zero"], ["root"], name="root"),
        helper.make_node("Cast", ["root"], ["integer"], name="floor", to=TensorProto.INT64),
        helper.make_node("Cast", ["integer"], ["whole"], name="back", to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["whole"], ["share"], name="softmax", axis=1),
        helper.make_node("Mul", ["share", "one"], ["product"], name="product"),
        helper.make_node("Conv", ["product", "last"], ["y"], name="output"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["b", 3, 6, 6])],
        [
            helper.make_tensor_value_info("y", 1, ["b", 8, 4, 4]),
            helper.make_tensor_value_info("square", 1, ["b", 8, 6, 6]),
        ],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "float32.onnx")
    return tmp_path / "float32.onnx", {"x": random.random((2, 3, 6, 6), dtype=np.float32)}


def test_what_float16_cannot_hold_stays_in_float32(sensitive):
    """Squares of hundreds, which would be infinite, and an epsilon, which would be a hundred thousand times larger."""
    source, feed = sensitive
    target = source.with_name("fp16.onnx")
    report = to_fp16(source, target, samples=[{"x": feed["x"] * 1e-3}, feed]).found
    beyond = ("square", "add", "ratio", "root")
    reasons = {"softmax": "softmax"} | dict.fromkeys(beyond, "range")
    assert report.float32_nodes == reasons
    exact, square = ReferenceEvaluator(onnx.load(source)).run(None, feed)
    assert square.max() > 65504
    assert report.out_of_range == pytest.approx(dict.fromkeys(beyond, square.max()), rel=1e-6)
    # Not ONNX Runtime, which on a CPU computes in float32 whatever the file says.
    found, kept = ReferenceEvaluator(onnx.load(target)).run(None, feed)
    assert deviation(exact, found).relative_l2 < 2e-3
    assert deviation(square, kept).relative_l2 < 2e-3
    assert np.isfinite(open_session(target).run(None, feed)[0]).all()
    typed = onnx.load(target)
    made = {name: node for node in typed.graph.node for name in node.output}
    casts = {node.output[0]: node for node in typed.graph.node if node.op_type == "Cast"}
    cascades = [casts[node.input[0]].name for node in casts.values() if node.input[0] in casts]
    assert cascades == ["floor"], "no cast to float16 and back between nodes in float32"
    assert next(tensor for tensor in typed.graph.initializer if tensor.name == "epsilon").data_type == TensorProto.FLOAT
    assert made[made["integer"].input[0]].op_type == "Sqrt", "not rounded before the floor"
    assert [tensor.data_type for tensor in typed.graph.initializer if tensor.name == "last"] == [TensorProto.FLOAT16]

    assert report.clipped == {}
    model = onnx.load(source)
    next(tensor for tensor in model.graph.initializer if tensor.name == "last").CopyFrom(
        numpy_helper.from_array(np.full((8, 8, 3, 3), -1e5, np.float32), "last")
    )
    onnx.save(model, source.with_name("large.onnx"))
    assert to_fp16(source.with_name("large.onnx"), target, float32=()).found.clipped == {"last": 1e5}
    assert to_fp16(source.with_name("large.onnx"), target).found.clipped == {}

    broken = source.with_name("broken.onnx")
    assert to_fp16(source, broken).found.float32_nodes == {"add": "range", "softmax": "softmax"}, (
        "weights alone are seen"
    )
    with np.errstate(all="ignore"):
        assert np.isinf(ReferenceEvaluator(onnx.load(broken)).run(None, feed)[1]).any()


@pytest.mark.parametrize("position", [0, 1])
def test_range_of_what_is_inside_the_body(fused, position):
    """Logits that overflow between tensors that do not; an attention on small values stays in float16."""
    _, x, source = fused
    model = onnx.load(source)
    attention = [node for node in model.graph.node if node.op_type == LOCAL_ATTENTION.op_type][position]
    feed = {model.graph.input[0].name: x.numpy()}
    assert out_of_range(model, [feed]) == {}
    scale = next(attribute for attribute in attention.attribute if attribute.name == "scale")
    scale.f = 6e4
    assert out_of_range(model) == {}
    found = out_of_range(model, [feed])
    assert list(found) == [attention.name]
    onnx.save(model, source)
    report = to_fp16(source, source.with_name("fp16.onnx"), samples=[feed]).found
    assert report.float32_nodes[attention.name] == "range"
    assert report.out_of_range == found


def test_the_list_is_overridable(sensitive, fused):
    source, feed = sensitive
    target = source.with_name("fp16.onnx")

    def kept(source=source, **options):
        return to_fp16(source, target, **options).found.float32_nodes

    assert kept(float32=()) == {}
    assert kept(float32=("decode",)) == {}
    assert kept(float32=("la[rs]t", "conv", "softmax")) == {"output": "la[rs]t", "conv": "conv", "softmax": "softmax"}
    assert kept(float32=("*", "softmax"), samples=[feed])["softmax"] == "*", "the first one that fits is named"
    for wrong in ("decod", "x", "model.22.*"):
        with pytest.raises(UserError, match="fits the name of no node"):
            kept(float32=("range", wrong), samples=(pytest.fail("it was run before") for _ in range(1)))

    # The softmax in the function body is one of the operator's own, not of the file's nodes.
    _, x, source = fused
    operators = {}
    for choice in ((), ("softmax",)):
        kept(source, float32=choice)
        (function,) = onnx.load(target).functions
        operators[choice] = [node.op_type for node in function.node]
        assert np.isfinite(outputs(target, x)).all()
    assert operators[()].count("Cast") == operators[("softmax",)].count("Cast") - 1


def test_softmax_inside_the_body_is_float32():
    """In a runtime that takes float16 at its word; ONNX Runtime on a CPU computes every softmax in float32 anyway."""
    heads, head_dim, size = 2, 4, 12
    random = np.random.default_rng(0)
    qkv = random.standard_normal((1, 3 * heads * head_dim, size, size)).astype(np.float16)
    position_weight = random.standard_normal((head_dim, 2)).astype(np.float16)
    attributes = {"num_heads": heads, "kernel_size": 7, "stride": 1, "scale": 0.5}
    exact = local_attention(torch.tensor(qkv).double(), torch.tensor(position_weight).double(), **attributes).numpy()
    errors = []
    for halve in (False, True):
        body = function_body()
        if halve:
            halve_softmax(body)
        node = helper.make_node(
            body.name, ["qkv", "p"], ["y"], domain=body.domain, plugin_version="1", plugin_namespace="", **attributes
        )
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in ("qkv", "p")]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
        model = helper.make_model(
            helper.make_graph([node], "g", inputs, [output]),
            functions=[body],
            opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(body.domain, 1)],
        )
        (found,) = ReferenceEvaluator(model).run(None, {"qkv": qkv, "p": position_weight})
        assert found.dtype == np.float16
        errors.append(deviation(exact, found).relative_l2)
    assert 1e-4 < errors[0] < 0.95 * errors[1], errors


def saved(path, *nodes):
    """A file of these nodes, from x [2] to the results that none of them reads."""
    read = {name for node in nodes for name in node.input}
    results = [name for node in nodes for name in node.output if name not in read]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", *results)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("casts", [1, 2, 3])
@pytest.mark.parametrize("fp16_io", [False, True])
def test_casts_to_the_type_that_a_tensor_has(tmp_path, casts, fp16_io):
    """As `.float()` at the end of a model leaves them: outputs keep their names, whatever is renamed."""
    ends = [helper.make_node("Cast", ["y"], [f"out{index}"], to=TensorProto.FLOAT) for index in range(casts)]
    source = saved(tmp_path / "plain.onnx", helper.make_node("Relu", ["x"], ["y"]), *ends)
    to_fp16(source, tmp_path / "half.onnx", fp16_io=fp16_io)
    session = open_session(tmp_path / "half.onnx")
    assert [value.name for value in session.get_outputs()] == [f"out{index}" for index in range(casts)]
    x = np.array([-1, 2], np.float16 if fp16_io else np.float32)
    assert all(np.array_equal(found, [0, 2]) for found in session.run(None, {"x": x}))


def test_a_cast_that_a_branch_reads_stays():
    branch = helper.make_graph([helper.make_node("Relu", ["z"], ["w"])], "then", [], [])
    nodes = [
        helper.make_node("Cast", ["x"], ["z"], to=TensorProto.FLOAT),
        helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y])
    fp16._join_casts(graph)
    assert [node.op_type for node in graph.node] == ["Cast", "If"]


def test_a_file_that_does_not_load_is_not_written(tmp_path, monkeypatch):
    """Where its source does."""
    source = saved(tmp_path / "plain.onnx", helper.make_node("Relu", ["x"], ["y"]))
    original = fp16.halved

    def broken(model, **options):
        typed, report = original(model, **options)
        typed.graph.node[0].op_type = "Unheard"
        return typed, report

    monkeypatch.setattr(fp16, "halved", broken)
    with pytest.raises(CheckFailed, match=r"in half precision cannot be used: .*Unheard"):
        to_fp16(source, tmp_path / "half.onnx")
    assert [*tmp_path.iterdir()] == [source]


def test_argument():
    parser = argparse.ArgumentParser()
    add_options(parser, Plan, "float32")
    assert parser.parse_args([]).float32 == FLOAT32
    assert parser.parse_args(["--float32", "none"]).float32 == ()
    assert parser.parse_args(["--float32", "decode,model.22.*"]).float32 == ("decode", "model.22.*")
    for wrong in ("none,decode", "decode,,range", ""):
        with pytest.raises(SystemExit):
            parser.parse_args(["--float32", wrong])
