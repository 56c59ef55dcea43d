"""What a release of TensorRT does not read of a file, by the name of an operator or its attributes, and the way out."""

from __future__ import annotations

import argparse
import re

import numpy as np
import onnx
import onnxruntime.quantization as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import nn
from torch.nn import functional

from acmix_deploy.cli import main, parser
from acmix_deploy.export import export
from acmix_deploy.forms import write_for
from acmix_deploy.onnx_file import read_since, unread, unread_note
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.targets import LIMITS, READ_SINCE, WAYS_OUT, target_named, target_of

SHAPE = (1, 3, 8, 12)
AXES = ("batch", "height", "width")
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
    """Named after its outputs, since names have to differ."""
    return helper.make_node(operator, inputs.split(" "), outputs.split(" "), f"/{outputs}", **attributes)


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


def of_bytes(first, second):
    how = {"Cast": {"to": TensorProto.FLOAT}, "Transpose": {"perm": [0, 3, 1, 2]}}
    return model(node(first, "x", "f", **how[first]), node(second, "f", **how[second]), types=("UINT8", "FLOAT"))


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
    "Cast with the type INT16": (cast("INT16"), EVERY),
    "Cast with the type UINT8 elsewhere than at an output": (cast("UINT8"), EVERY),
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
    "QuantizeLinear with a zero point other than 0": (quantised(np.int8(3)), EVERY),
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
    "Transpose with data of UINT8": (of_bytes("Transpose", "Cast"), EVERY),
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
    "bytes that a Cast reads": of_bytes("Cast", "Transpose"),
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
    """By release, with the node, and not where the operator itself is not read."""
    file, releases = LIMITED[told]
    lacking = [name for name in RELEASES if told in unread(file, target_named(f"tensorrt-{name}"))]
    assert lacking == releases.split()
    nodes = unread(file, target_named(f"tensorrt-{lacking[-1]}"))[told]
    first = {"8.5 8.6": "10.0", "8.5": "8.6", "8.5 8.6 10.0 10.11": "10.12"}.get(releases)
    release = f"TensorRT before {first}" if first else "TensorRT"
    expected = f"{told} ({nodes[0]}), which {release} does not read: a model without it is needed there"
    assert unread_note(told, nodes).startswith(expected)
    operator = READ_SINCE.get(told.partition(" with ")[0]) or (8, 5)
    assert read_since(file) == max(operator, tuple(map(int, (first or "8.5").split("."))))
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


class Of(nn.Module):
    """A function of an image, with its module."""

    def __init__(self, compute, *modules):
        super().__init__()
        self.compute, self.modules_of = compute, nn.ModuleList(modules)

    def forward(self, x):
        return self.compute(x, *self.modules_of)


def folded(x):
    return functional.fold(functional.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1)


def transposed(x):
    kernels = torch.eye(9).view(9, 1, 3, 3).repeat(x.shape[1], 1, 1, 1)
    windows = functional.unfold(x, 3, padding=1).view(x.shape[0], -1, *x.shape[2:])
    return functional.conv_transpose2d(windows, kernels, padding=1, groups=x.shape[1])


def added(name):
    """Channels 0 and 2 in one place, by index_add or scatter_add."""
    place = torch.tensor([0, 1, 0])

    def compute(x):
        index = place if name == "index_add" else place.view(1, 3, 1, 1).expand_as(x)
        return getattr(torch.zeros_like(x), name)(1, index, x)

    return compute


def warped(x):
    theta = torch.tensor([[[1.0, 0.1, 0.0], [0.0, 1.0, 0.2]]]).expand(x.shape[0], 2, 3)
    return functional.grid_sample(x, functional.affine_grid(theta, x.shape, align_corners=True), align_corners=True)


def shifted(x):
    return ((x * 8).int() >> 1).float()


def best(x):
    scores = x.flatten(1)
    return scores.topk(min(300, scores.shape[1]))[0]


def products(*equations):
    def compute(x):
        y = x
        for equation in equations:
            y = torch.einsum(equation, y, *[x] * equation.count(","))
        return y

    return compute


def infinite(test):
    return lambda x: torch.where(test(x), torch.zeros_like(x), x)


WAYS = {
    "Col2Im": ("11.1", (folded, 18, ()), (transposed, 17, ())),
    "BitShift, BitwiseOr": ("11.1", (shifted, 18, ()), (shifted, 17, ())),
    "AffineGrid": ("11.1", (warped, 20, AXES), (warped, 20, ())),
    "IsInf": ("8.5", (infinite(torch.isinf), 17, ()), (infinite(lambda x: x.abs() == float("inf")), 17, ())),
    "ScatterND with reduction add": ("10.0", (added("index_add"), 18, ()), (added("scatter_add"), 17, ())),
    "Einsum with 3 operands": (
        *("8.6", (products("bchw,bcxw,bdhw->bhxd"), 17, ())),
        (products("bchw,bcxw->bhxw", "bhxw,bdhw->bhxd"), 17, ()),
    ),
    "Einsum with an ellipsis": ("8.6", (products("...hw,...xw->...hx"), 17, ()), (products("bchw,bcxw->bchx"), 17, ())),
    "TopK with a K that nodes compute": ("8.5", (best, 17, AXES), (best, 17, ())),
}


@pytest.mark.parametrize("what", WAYS)
def test_the_way_out_is_one(tmp_path, what):
    """Told of the file as it was, with the way; not of the file that follows it, which computes the same."""
    release, *ways = WAYS[what]
    target, image = target_named(f"tensorrt-{release}"), torch.rand(SHAPE)
    before, after = (Of(compute).eval() for compute, _, _ in ways)
    assert torch.allclose(before(image), after(image), atol=1e-5)
    told = []
    for module, (_, opset, dynamic) in zip((before, after), ways, strict=True):
        file = tmp_path / "model.onnx"
        export(module, file, input_shape=SHAPE, opset=opset, dynamic=dynamic)
        told.append(unread(onnx.load(file), target))
    for one in what.split(", "):
        assert re.search(r" is needed there.*; \w", unread_note(one, told[0][one]))
    assert not told[1]


def test_opset_17_has_no_newer_activations(tmp_path):
    """TensorRT 8 reads no Gelu and no Mish, and no file of the opsets that have them."""
    module = Of(lambda x: functional.mish(functional.gelu(x)) + functional.gelu(x, approximate="tanh"))
    for opset, expected in ((17, set()), (20, {"Gelu", "Mish"})):
        export(module, tmp_path / "model.onnx", input_shape=SHAPE, opset=opset)
        assert {*unread(onnx.load(tmp_path / "model.onnx"), target_of((8, 6)))} == expected


@pytest.mark.parametrize("dynamic", [(), AXES])
def test_layer_normalisation_is_spelled_out_for_the_oldest_release(tmp_path, dynamic):
    """Over one axis and over two, with a bias and without; it computes the same. TensorRT 8.6 reads it as it is."""

    def compute(x, conv, *norms):
        x = conv(x).permute(0, 2, 3, 1)
        return norms[0](x), norms[1](x), norms[2](x.flatten(2).unflatten(2, (12, 4)) if not dynamic else x)

    norms = [nn.LayerNorm(4), nn.LayerNorm(4, 1e-2, bias=False), nn.LayerNorm(4 if dynamic else (12, 4))]
    for norm in norms:
        nn.init.normal_(norm.weight)
    path = tmp_path / "model.onnx"
    export(Of(compute, nn.Conv2d(3, 4, 1), *norms), path, input_shape=SHAPE, opset=17, dynamic=dynamic)
    found = write_for(target_named("jetpack-5.1"), path).found
    assert not found.unread
    onnx.checker.check_model(onnx.load(tmp_path / found.file), full_check=True)
    image = {"images": 5 * np.random.default_rng(0).random((2, 3, 16, 20) if dynamic else SHAPE, np.float32)}
    pairs = zip(*(open_session(tmp_path / name).run(None, image) for name in ("model.onnx", found.file)), strict=True)
    assert all(np.allclose(wanted, y, atol=1e-5) for wanted, y in pairs)
    other = onnx.load(tmp_path / write_for(target_named("jetpack-6.0"), path).found.file)
    assert [node.op_type for node in other.graph.node].count("LayerNormalization") == 3


def test_a_layer_normalisation_that_stays(tmp_path):
    """One with more outputs is told, and one of an export by PyTorch at opset 16 is none."""
    file = normalised("y mean")
    file.opset_import[0].version = 17
    onnx.save(file, tmp_path / "model.onnx")
    found = write_for(target_named("jetpack-5.1"), tmp_path / "model.onnx").found
    assert [*found.unread] == ["LayerNormalization"]
    assert "opset_version=16" in unread_note("LayerNormalization", found.unread["LayerNormalization"])
    module = Of(lambda x, norm: norm(x), nn.LayerNorm(12)).eval()
    torch.onnx.export(module, (torch.rand(SHAPE),), tmp_path / "model.onnx", dynamo=False, opset_version=16)
    assert main(["fuse", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "f.onnx"), "--for", "jetpack-5.1"]) == 0
    assert not unread(onnx.load(tmp_path / "f.jetpack-5.1.onnx"), target_of((8, 5)))


def test_quantised_files_of_others(tmp_path, monkeypatch):
    """ONNX Runtime's own forms are told, and what quantize makes of the float file is read."""
    monkeypatch.chdir(tmp_path)
    export(nn.Conv2d(3, 4, 3).eval(), tmp_path / "model.onnx", input_shape=(1, 3, 32, 32), opset=17)

    class Images(ort.CalibrationDataReader):
        def __init__(self):
            self.left = [{"images": np.random.default_rng(0).random((1, 3, 32, 32), np.float32)}]

        def get_next(self):
            return self.left.pop() if self.left else None

    told = {}
    for form in (ort.QuantFormat.QOperator, ort.QuantFormat.QDQ):
        ort.quantize_static("model.onnx", "theirs.onnx", Images(), form)
        told[form.name] = {*unread(onnx.load("theirs.onnx"), target_of((10, 3)))}
    ort.quantize_dynamic("model.onnx", "theirs.onnx")
    told["dynamic"] = {*unread(onnx.load("theirs.onnx"), target_of((10, 3)))}
    assert "QLinearConv" in told["QOperator"]
    assert "DequantizeLinear with x of INT32" in told["QDQ"]
    assert {"ConvInteger", "DynamicQuantizeLinear"} <= told["dynamic"]
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32), (90, 120, 30)).save("photos/one.png")
    command = ["quantize", "model.onnx", "--calibration", "photos", "-o", "int8.onnx", "--image-size", "32"]
    assert main([*command, "--quantize-head"]) == 0
    ours = onnx.load("int8.onnx")
    assert "DequantizeLinear" in {node.op_type for node in ours.graph.node}
    assert not unread(ours, target_of((8, 5)))


def test_a_stated_default_is_left_out_for_tensorrt(tmp_path):
    """Of ScatterND, whose attribute TensorRT 10.0 refuses whatever it says; the file computes the same."""

    def written(x):
        y = x.clone()
        y[:, :, ::2, 1:] = x.mean((2, 3), keepdim=True)
        return y

    export(Of(written), tmp_path / "model.onnx", input_shape=SHAPE, opset=18)
    reductions = []
    for name in ("model.onnx", write_for(target_named("jetpack-6.2"), tmp_path / "model.onnx").found.file):
        nodes = [node for node in onnx.load(tmp_path / name).graph.node if node.op_type == "ScatterND"]
        reductions.append([attribute.s for node in nodes for attribute in node.attribute])
        image = np.random.default_rng(0).random(SHAPE, np.float32)
        (y,) = open_session(tmp_path / name).run(None, {"images": image})
        assert np.allclose(y, written(torch.from_numpy(image)).numpy(), atol=1e-6)
    assert reductions == [[b"none", b"none"], []]


def test_a_number_that_the_file_stores_somehow_is_not_computed() -> None:
    """K of a TopK through Constant value_ints, and through what only moves a stored one."""
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])
    outputs = [helper.make_tensor_value_info("v", TensorProto.FLOAT, None)]
    stored = [helper.make_tensor("k", TensorProto.INT64, [], [2])]
    for nodes, computed in (
        ([helper.make_node("Constant", [], ["K"], value_ints=[2])], False),
        (
            [helper.make_node("Constant", [], ["a"], value_ints=[0]), helper.make_node("Unsqueeze", ["k", "a"], ["K"])],
            False,
        ),
        ([helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Gather", ["s", "k"], ["K"])], True),
    ):
        top = helper.make_node("TopK", ["x", "K"], ["v", "i"], "top")
        graph = helper.make_graph([*nodes, top], "g", [image], outputs, stored)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        assert bool(unread(model, target_of((8, 5)))) is computed
