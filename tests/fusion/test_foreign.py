"""What is not ours in a file that is fused: it stays, and what ONNX Runtime does not know costs no block its fusion."""

from __future__ import annotations

import copy
import importlib

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from acmix_deploy.cli import main
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import CheckFailed
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.options import AXES
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.verify import inputs_for
from tests.families.parts import export, operators, outputs, randomised

FLOAT32 = LOCAL_ATTENTION.tolerances["float32"].floor
SHAPE = (1, 4, 9, 8)
LEAST = 2  # rows and columns of a map that Net takes


class Net(nn.Module):
    """A block with a convolution on either side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(4, 4, 1), ACmix(4, 8, 3, head=2), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.head(self.block(torch.relu(self.stem(x))).sigmoid())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    model = randomised(Net())
    return {
        opset: onnx.load(export(model, torch.randn(SHAPE), folder / f"{opset}.onnx", opset=opset)) for opset in (13, 17)
    }


@pytest.fixture
def x():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def as_function(model, name, nodes, *, opset=None):
    """The model with ``nodes`` of its graph, by index, in one local function; stored tensors are handed to it."""
    model = copy.deepcopy(model)
    graph = model.graph
    inside = [copy.deepcopy(graph.node[index]) for index in nodes]
    made = {output for node in inside for output in node.output}
    inputs = list(dict.fromkeys(name for node in inside for name in node.input if name and name not in made))
    rest = [node for index, node in enumerate(graph.node) if index not in nodes]
    read = {name for node in rest for name in node.input} | {value.name for value in graph.output}
    results = [name for node in inside for name in node.output if name in read]
    standard = helper.make_opsetid("", opset or model.opset_import[0].version)
    model.functions.append(helper.make_function("local", name, inputs, results, inside, [standard]))
    call = helper.make_node(name, inputs, results, name=name, domain="local")
    place = min(nodes)
    kept = [copy.deepcopy(node) for node in rest]
    del graph.node[:]
    graph.node.extend([*kept[:place], call, *kept[place:]])
    if all(entry.domain != "local" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("local", 1))
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model


def assert_same(source, target, x):
    found = deviation(outputs(source, x), outputs(target, x))
    assert found.relative_l2 is not None, found.problem
    assert found.relative_l2 < FLOAT32


@pytest.mark.parametrize("opset", [13, 17])
def test_a_net_that_is_one_local_function_fuses(exported, x, opset, tmp_path):
    model = exported[opset]
    onnx.save(as_function(model, "net", range(len(model.graph.node))), tmp_path / "plain.onnx")
    report = fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=1).found
    assert report.inlined == ["local::net"]
    assert report.unproven == ""
    assert operators(tmp_path / "fused.onnx").count(LOCAL_ATTENTION.op_type) == 1
    assert_same(tmp_path / "plain.onnx", tmp_path / "fused.onnx", x)


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_function_beside_the_block_does_not_cost_its_fusion(exported, x, opset, place, tmp_path):
    model = exported[opset]
    last = len(model.graph.node) - 1
    nodes = [0, 1] if place == "before" else [last - 1, last]
    onnx.save(as_function(model, "part", nodes), tmp_path / "plain.onnx")
    assert fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=1).found.inlined == ["local::part"]
    assert_same(tmp_path / "plain.onnx", tmp_path / "fused.onnx", x)


def test_functions_that_call_others_with_attributes(exported, x, tmp_path):
    """Twice the same function, once with its default attribute."""
    model = copy.deepcopy(exported[17])
    standard, local = helper.make_opsetid("", 17), helper.make_opsetid("local", 1)
    leaky = helper.make_node("LeakyRelu", ["a"], ["b"], name="leaky")
    leaky.attribute.append(onnx.AttributeProto(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope"))
    model.functions.extend(
        [
            helper.make_function("local", "inner", ["a"], ["b"], [leaky], [standard], attributes=[],
                                 attribute_protos=[helper.make_attribute("slope", 0.3)]),
            helper.make_function("local", "outer", ["a"], ["c"], [
                helper.make_node("inner", ["a"], ["b"], domain="local"),
                helper.make_node("inner", ["b"], ["c"], domain="local", slope=0.7),
            ], [standard, local]),
        ]
    )  # fmt: skip
    model.opset_import.append(local)
    name = model.graph.output[0].name
    model.graph.node[-1].output[0] = "inside"
    model.graph.node.extend(
        [helper.make_node("outer", ["inside"], ["more"], domain="local"),
         helper.make_node("outer", ["more"], [name], domain="local")]
    )  # fmt: skip
    onnx.save(model, tmp_path / "plain.onnx")
    report = fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=1).found
    assert sorted(report.inlined) == ["local::inner", "local::outer"]
    assert_same(tmp_path / "plain.onnx", tmp_path / "fused.onnx", x)


@pytest.mark.parametrize("opset", [13, 18])
def test_a_function_of_another_opset_than_the_model(exported, x, opset, tmp_path):
    model = exported[17]
    last = len(model.graph.node) - 1
    onnx.save(as_function(model, "part", [last - 1, last], opset=opset), tmp_path / "plain.onnx")
    report = fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=1).found
    assert report.inlined in ([], ["local::part"])
    assert_same(tmp_path / "plain.onnx", tmp_path / "fused.onnx", x)


def annotated(model):
    """The model with something in every field that a graph library may drop."""
    model = copy.deepcopy(model)
    graph = model.graph
    model.doc_string, model.domain, model.model_version = "of the model", "org.example", 7
    model.producer_name, model.producer_version = "somebody", "1.2"
    graph.name, graph.doc_string = "a name", "of the graph"
    for holder, key in ((model, "of model"), (graph, "of graph"), (graph.node[0], "of node"), (graph.input[0], "of x")):
        holder.metadata_props.add(key=key, value="kept")
    graph.node[0].doc_string, graph.input[0].doc_string = "of the node", "of the input"
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    graph.input[0].type.denotation = "IMAGE"
    graph.output[0].doc_string = "of the output"
    relu = graph.node[1].output[0]
    del graph.value_info[:]
    graph.value_info.append(helper.make_tensor_value_info(relu, TensorProto.FLOAT, ["batch", 4, "height", "width"]))
    graph.quantization_annotation.add(tensor_name=relu).quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    model.training_info.add(algorithm=helper.make_graph([], "training", [], []))

    # Behind the block: a sparse stored tensor, and an If whose branches read tensors from outside.
    values = numpy_helper.from_array(np.array([2.0, -1.0], np.float32), "sparse")
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 2])), [3]))
    graph.initializer.extend([
        numpy_helper.from_array(np.array(0.5, np.float32), "half"),
        numpy_helper.from_array(np.array([1, 3, 1, 1]), "as"),
        numpy_helper.from_array(np.array(True), "yes"),
    ])  # fmt: skip
    name, inside = graph.output[0].name, "inside"
    graph.node[-1].output[0] = inside
    then = helper.make_graph(
        [helper.make_node("Mul", [inside, "half"], ["then.y"], doc_string="in a branch")],
        "then", [], [helper.make_empty_tensor_value_info("then.y")], doc_string="a branch",
    )  # fmt: skip
    other = helper.make_graph(
        [helper.make_node("Neg", [inside], ["else.y"])], "else", [], [helper.make_empty_tensor_value_info("else.y")]
    )
    graph.node.extend(
        [
            helper.make_node("If", ["yes"], ["chosen"], name="choose", then_branch=then, else_branch=other),
            helper.make_node("Reshape", ["sparse", "as"], ["dense"]),
            helper.make_node("Add", ["chosen", "dense"], [name]),
        ]
    )
    return model


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("fuses", [True, False])
def test_nothing_but_nodes_changes(exported, x, opset, fuses, tmp_path):
    plain = annotated(exported[opset])
    if not fuses:
        weights = next(node.output[0] for node in plain.graph.node if node.op_type == "Softmax")
        plain.graph.output.append(helper.make_tensor_value_info(weights, TensorProto.FLOAT, [None] * 4))
    onnx.save(plain, tmp_path / "plain.onnx")
    report = fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=int(fuses)).found
    assert report.unproven == ""
    fused = onnx.load(tmp_path / "fused.onnx")
    for field in ("doc_string", "domain", "model_version", "producer_name", "producer_version", "metadata_props",
                  "training_info"):  # fmt: skip
        assert getattr(fused, field) == getattr(plain, field), field
    for field in ("name", "doc_string", "metadata_props", "input", "output", "sparse_initializer",
                  "quantization_annotation"):  # fmt: skip
        assert getattr(fused.graph, field) == getattr(plain.graph, field), field
    assert plain.graph.value_info[0] in fused.graph.value_info
    told = {node.output[0]: node for node in plain.graph.node}
    stayed = [node for node in fused.graph.node if node.output[0] in told and node.op_type != "Reshape"]
    assert {"If", "Conv", "Relu"} <= {node.op_type for node in stayed}
    first, choose = (
        next(n for n in fused.graph.node if n.output[0] == name) for name in (plain.graph.node[0].output[0], "chosen")
    )
    assert first.metadata_props == plain.graph.node[0].metadata_props
    assert first.doc_string == "of the node"
    branch = next(attribute.g for attribute in choose.attribute if attribute.name == "then_branch")
    assert branch.node[0].doc_string == "in a branch"
    read = {name for node in fused.graph.node for name in node.input} | {"half"}
    assert {tensor.name for tensor in fused.graph.initializer} <= read | {t.name for t in plain.graph.initializer}
    assert_same(tmp_path / "plain.onnx", tmp_path / "fused.onnx", x)


def test_weights_of_a_block_leave_with_it(exported, tmp_path):
    onnx.save(exported[17], tmp_path / "plain.onnx")
    fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=1)
    graph = onnx.load(tmp_path / "fused.onnx").graph
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read
    known = read | {name for node in graph.node for name in node.output}
    assert {value.name for value in graph.value_info} <= known


def test_a_block_that_an_if_is_before(exported, x, tmp_path):
    """A branch reads what was computed outside: to evaluate the block that has to be computed too."""
    plain = copy.deepcopy(exported[17])
    graph = plain.graph
    relu = graph.node[1].output[0]
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == relu:
                node.input[index] = "chosen"
    graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, [relu], [f"{name}.y"])], name, [], [helper.make_empty_tensor_value_info(f"{name}.y")]
        )
        for name, op in (("then", "Sigmoid"), ("else", "Neg"))
    }
    graph.node.insert(2, helper.make_node("If", ["yes"], ["chosen"], name="choose", **branches))
    onnx.save(plain, tmp_path / "plain.onnx")
    fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=1)
    assert_same(tmp_path / "plain.onnx", tmp_path / "fused.onnx", x)


def with_custom(model, place, *, shape=None):
    """The model with an operator that nothing here knows, behind its first or before its last node."""
    model = copy.deepcopy(model)
    graph = model.graph
    index = 1 if place == "before" else len(graph.node) - 1
    read = graph.node[index].input[0]
    graph.node[index].input[0] = "deformed"
    weights = numpy_helper.from_array(np.ones((1, 1), np.float32), "deform.weight")
    graph.initializer.append(weights)
    graph.node.insert(
        index,
        helper.make_node(
            "MMCVModulatedDeformConv2d", [read, weights.name], ["deformed"], name="dcn", domain="mmdeploy"
        ),
    )
    if shape:
        graph.value_info.append(helper.make_tensor_value_info("deformed", TensorProto.FLOAT, shape))
    model.opset_import.append(helper.make_opsetid("mmdeploy", 1))
    return model


def without_custom(path, target):
    """A file with the unknown operator taken for an identity, so that it runs."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.domain == "mmdeploy":
            node.op_type, node.domain = "Identity", ""
            del node.input[1:]
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize(("place", "shape"), [("behind", None), ("before", SHAPE), ("before", ["n", 4, "h", "w"])])
def test_an_unknown_operator_does_not_cost_the_fusion(exported, x, opset, place, shape, tmp_path, capsys):
    source = tmp_path / "plain.onnx"
    onnx.save(with_custom(exported[opset], place, shape=shape), source)
    report = fuse(source, tmp_path / "fused.onnx", expect=1).found
    operator = "mmdeploy::MMCVModulatedDeformConv2d"
    assert report.unknown == {operator: ["dcn"]}
    assert "MMCVModulatedDeformConv2d" in report.unproven
    assert_same(
        without_custom(source, tmp_path / "a.onnx"), without_custom(tmp_path / "fused.onnx", tmp_path / "b.onnx"), x
    )
    assert main(["fuse", str(source), "-o", str(tmp_path / "again.onnx")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert operator in printed
    assert "not proven" in printed
    assert ".again.onnx" not in printed


def test_an_unknown_operator_of_unknown_sizes_costs_only_what_is_behind_it(exported, tmp_path):
    plain = with_custom(exported[17], "before")
    source = tmp_path / "plain.onnx"
    relu = plain.graph.node[1]
    assert relu.op_type == "MMCVModulatedDeformConv2d"
    onnx.save(plain, source)
    report = fuse(source, tmp_path / "fused.onnx").found
    assert report.fused == 0
    (block,) = report.blocks
    assert "deformed, whose sizes the file does not tell: it comes from mmdeploy::MMCV" in block.reason


def test_a_convolution_behind_an_unknown_operator_tells_the_sizes(exported, x, tmp_path):
    """Its height and width stay free then: nothing of one size is stored."""
    plain = copy.deepcopy(exported[17])
    relu = plain.graph.node[1]
    assert relu.op_type == "Relu"
    relu.op_type, relu.domain, relu.name = "Deform", "mmdeploy", "dcn"
    del plain.graph.value_info[:]
    plain.opset_import.append(helper.make_opsetid("mmdeploy", 1))
    onnx.save(plain, tmp_path / "plain.onnx")
    assert fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=1).found.unknown == {
        "mmdeploy::Deform": ["dcn"]
    }
    assert_same(
        without_custom(tmp_path / "plain.onnx", tmp_path / "a.onnx"),
        without_custom(tmp_path / "fused.onnx", tmp_path / "b.onnx"),
        x,
    )


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_result_that_does_not_load_is_not_written(exported, blocks, tmp_path, monkeypatch):
    """Fused or not; the message names no temporary file."""
    stage = importlib.import_module("acmix_deploy.fusion.fuse")
    whole = stage._written

    def broken(*arguments):
        model = whole(*arguments)
        model.graph.node[-1].op_type = "Nonsense"
        return model

    monkeypatch.setattr(stage, "_written", broken)
    plain = (
        exported[17] if blocks else onnx.load(export(nn.Conv2d(4, 3, 1), torch.randn(SHAPE), tmp_path / "conv.onnx"))
    )
    onnx.save(plain, tmp_path / "plain.onnx")
    with pytest.raises(CheckFailed, match="cannot be used") as failure:
        fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx")
    assert ".fused.onnx" not in str(failure.value)
    assert not (tmp_path / "fused.onnx").exists()


def test_an_unknown_operator_hides_no_fault(exported, tmp_path, monkeypatch):
    """What is left without the unknown operator loads, and has to load when it is fused."""
    stage = importlib.import_module("acmix_deploy.fusion.fuse")
    whole = stage._written

    def broken(*arguments):
        model = whole(*arguments)
        model.graph.node[0].op_type = "Nonsense"
        return model

    monkeypatch.setattr(stage, "_written", broken)
    onnx.save(with_custom(exported[17], "behind"), tmp_path / "plain.onnx")
    with pytest.raises(CheckFailed, match="cannot be used"):
        fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx")
    assert not (tmp_path / "fused.onnx").exists()


@pytest.mark.parametrize(
    ("channels", "fixed"), [(1, {}), (3, {}), (1, {"height": 64}), (3, {"batch": 1, "height": 64})]
)
def test_pixels_of_which_nothing_is_told(channels, fixed, tmp_path, capsys):
    """Images in uint8, channels first or last, of any size: fused, and refused by what has to know the channels."""
    path = export(randomised(Net()), torch.randn(SHAPE), tmp_path / "net.onnx", dynamic=("batch", "height", "width"))
    model = onnx.load(path)
    (image,) = model.graph.input
    dims = [dim.dim_param or dim.dim_value for dim in image.type.tensor_type.shape.dim]
    assert [type(dim) for dim in dims] == [str, int, str, str]
    for axis, size in fixed.items():
        dims[AXES[axis]] = size
    dims.insert(channels, dims.pop(1))
    order = [0, 1, 2, 3] if channels == 1 else [0, 3, 1, 2]
    before = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], [image.name], perm=order),
    ]
    nodes = [*before, *copy.deepcopy([*model.graph.node])]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.UINT8, dims))
    plain, fused = tmp_path / "plain.onnx", tmp_path / "fused.onnx"
    onnx.save(model, plain)
    fuse(plain, fused, expect=1)
    smallest = ModelMetadata.of(onnx.load(fused)).min_size
    assert smallest == tuple(fixed.get(side, LEAST) for side in ("height", "width"))
    shape = fixed.get("batch", 2), SHAPE[1], fixed.get("height", 12), fixed.get("width", 20)
    x = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert_same(plain, fused, torch.from_numpy(x.transpose(0, 2, 3, 1) if channels == 3 else x))
    size = ",".join(map(str, (shape[0], 64, 96, SHAPE[1]) if channels == 3 else (shape[0], SHAPE[1], 64, 96)))
    small = ["--input-shape", size] if fixed else []
    (first, *_) = (feed["pixels"] for feed in inputs_for(fused, input_shape=[*map(int, size.split(","))]))
    assert (first.dtype, first.max()) == (np.uint8, 255)
    if not fixed:
        usual = (1, 640, 640, SHAPE[1]) if channels == 3 else (1, SHAPE[1], 640, 640)
        assert inputs_for(fused)[0]["pixels"].shape == usual
    assert main(["verify", str(plain), str(fused), *small]) == 0
    assert main(["profile", str(fused), "--samples", "1", *small]) == 0
    for command in (["fp16", str(fused), "-o", str(tmp_path / "h.onnx")], ["doctor", str(plain)]):
        assert main(command) == (2 if command[0] == "fp16" else 0)
    said = " ".join("".join(capsys.readouterr()).split())
    assert said.count(f"takes pixels [{', '.join(map(str, dims))}] in uint8, and its metadata do not tell what") == 2
    assert said.count("acmix-deploy export --input uint8") == 2
