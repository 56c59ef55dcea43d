"""Files that are not valid ONNX, or whose custom nodes are none: verbs end in one sentence that names the fault."""

from __future__ import annotations

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from acmix_deploy.cli import main
from acmix_deploy.doctor.files import examine
from acmix_deploy.errors import UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.forms import refused, to_form
from acmix_deploy.fusion import fuse
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.outlook_attention import OUTLOOK_ATTENTION
from tests.families.parts import export, randomised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A valid file, its fused one, and images to calibrate on."""
    folder = tmp_path_factory.mktemp("broken")
    export(randomised(ACmix(4, 4, 3, head=1)), torch.randn(1, 4, 8, 8), folder / "valid.onnx")
    fuse(folder / "valid.onnx", folder / "fused.onnx", expect=1)
    (folder / "photos").mkdir()
    cv2.imwrite(str(folder / "photos" / "0.png"), np.zeros((8, 8, 3), np.uint8))
    return folder


def a(model, operator):
    return next(node for node in model.graph.node if node.op_type == operator)


def unsorted(model):
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))


def strides_of(model, value):
    node = a(model, "Conv")
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("strides", value))


def sequence(model):
    model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8]))


BROKEN = {
    "nobody makes an input": (lambda m: a(m, "Softmax").input.__setitem__(0, "nowhere"), "input 'nowhere' of node"),
    "two make one tensor": (
        lambda m: a(m, "Softmax").output.__setitem__(0, a(m, "Conv").output[0]), "single static assignment"
    ),
    "not sorted": (unsorted, "must be topologically sorted"),
    "attribute of another type": (lambda m: strides_of(m, 1.5), "Expected: 'INTS', actual: 'FLOAT'"),
    "no inputs": (lambda m: a(m, "Softmax").ClearField("input"), "input size 0 not in range"),
    "no outputs": (lambda m: a(m, "Softmax").ClearField("output"), "output size 0 not in range"),
    "unknown operator": (lambda m: setattr(a(m, "Softmax"), "op_type", "Softmaxx"), "No Op registered for Softmaxx"),
    "domain that is not imported": (lambda m: setattr(a(m, "Softmax"), "domain", "x"), "No opset import for domain"),
    "weights cut off": (lambda m: m.graph.initializer[0].ClearField("raw_data"), "contain one and only one value"),
    "weights of an unknown type": (
        lambda m: setattr(m.graph.initializer[0], "data_type", 99), "not a tensor of an element type that is known"
    ),
    "input of an unknown type": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 99), "x: not a tensor of an element type"
    ),
    "input that is no tensor": (sequence, "x: not a tensor of an element type"),
    "input without a shape": (
        lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"), "Field 'shape' of 'type' is required"
    ),
    "output that nobody makes": (
        lambda m: setattr(m.graph.output[0], "name", "nowhere"), "Graph output 'nowhere' is not an output"
    ),
}  # fmt: skip
VERBS = {
    "fuse": ["fuse", "FILE", "-o", "out.onnx"],
    "fuse --for": ["fuse", "FILE", "-o", "out.onnx", "--for", "jetpack-6.2"],
    "verify": ["verify", "valid.onnx", "FILE", "--random", "1"],
    "profile": ["profile", "FILE", "--layers"],
    "quantize": ["quantize", "FILE", "-o", "out.onnx", "--calibration", "photos"],
    "build": ["build", "FILE", "-o", "out.engine"],
}
RUN_ALL_THE_SAME = {
    "verify": {"not sorted"},
    "profile": {"not sorted"},
    "build": {"not sorted"},
}
"""ONNX Runtime and TensorRT-RTX are less strict than ONNX, and nodes are sorted where a file is put into a form."""


def answer(verb, model, folder, monkeypatch, capsys):
    """The exit code of a verb for a file, and what it says on stderr."""
    onnx.save(model, folder / "broken.onnx")
    monkeypatch.chdir(folder)
    code = main([word.replace("FILE", "broken.onnx") for word in verb])
    made = [*folder.glob("out*")]
    assert bool(made) <= (code == 0), made
    for file in made:
        file.unlink()
    return code, capsys.readouterr().err


@pytest.mark.parametrize("fault", BROKEN)
def test_fuse_names_what_is_not_valid(folder, monkeypatch, capsys, fault):
    damage, said = BROKEN[fault]
    model = onnx.load(folder / "valid.onnx")
    damage(model)
    code, text = answer(VERBS["fuse"], model, folder, monkeypatch, capsys)
    assert code == 2
    assert said in text
    assert "error: broken.onnx" in text


@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_fails_on_what_is_not_valid(folder, monkeypatch, capsys, verb):
    if verb == "build":
        pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX: pip install tensorrt-rtx-cu13")
    for fault, (damage, _) in BROKEN.items():
        model = onnx.load(folder / "valid.onnx")
        damage(model)
        code, text = answer(VERBS[verb], model, folder, monkeypatch, capsys)
        ran = fault in RUN_ALL_THE_SAME.get(verb, ())
        assert (fault, code, "error: " in text) == (fault, 0 if ran else 2, not ran), text


@pytest.mark.parametrize("fault", BROKEN)
def test_inspect_shows_and_doctor_refuses_what_is_not_valid(folder, monkeypatch, capsys, fault):
    damage, said = BROKEN[fault]
    model = onnx.load(folder / "valid.onnx")
    damage(model)
    assert answer(["inspect", "FILE"], model, folder, monkeypatch, capsys)[0] == 0
    (finding,) = examine(folder / "broken.onnx", progress=lambda step: None).findings
    assert finding.fault == "refused-file"
    assert said in finding.found


def custom(model):
    return next(node for node in model.graph.node if node.domain == LOCAL_ATTENTION.domain)


def attribute(node, name):
    return next(found for found in node.attribute if found.name == name)


@pytest.mark.parametrize("form", ["plugin", "plain", "any"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda node: node.input.pop(), "it has 1 inputs"),
        (lambda node: node.input.append(node.input[0]), "it has 3 inputs"),
        (lambda node: attribute(node, "num_heads").CopyFrom(helper.make_attribute("num_heads", "1")), "num_heads 1"),
        (lambda node: attribute(node, "num_heads").CopyFrom(helper.make_attribute("num_heads", 0)), "num_heads 0"),
        (lambda node: attribute(node, "scale").CopyFrom(helper.make_attribute("scale", [1.0])), r"scale \[1.0\]"),
    ],
)
def test_custom_nodes_that_are_none_are_named(folder, damage, said, form):
    model = onnx.load(folder / "fused.onnx")
    damage(custom(model))
    with pytest.raises(UserError, match=f"acmix_0.attention is no AcmixLocalAttention: it has .*{said}|{said}"):
        to_form(model, form)
    with pytest.raises(UserError, match=said):
        refused(model)


def test_attributes_left_out_have_their_defaults(folder):
    model = onnx.load(folder / "fused.onnx")
    node = custom(model)
    expected = to_form(model, "plain")
    assert attribute(node, "num_heads").i == LOCAL_ATTENTION.attribute("num_heads").default
    node.attribute.remove(attribute(node, "num_heads"))
    assert to_form(model, "plain").graph == expected.graph


def test_sizes_that_the_file_does_not_tell_are_none_for_the_plugin():
    """Such as those of a file in plugin form whose types were taken out."""
    operator = OUTLOOK_ATTENTION
    node = helper.make_node(operator.op_type, ["logits", "values"], ["y"], "attention", domain=operator.domain)
    end = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 4, 4])
    made = [helper.make_node("Foreign", ["x"], ["logits", "values"], domain="acmix")]
    start = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("acmix", 1)]
    model = helper.make_model(helper.make_graph([*made, node], "g", [start], [end]), opset_imports=imports)
    assert refused(model) == {"attention": "head_dim unknown"}
    with pytest.raises(UserError, match="without its definition"):
        to_form(model, "plugin")


def test_a_position_weight_alone_tells_the_head_dim(folder):
    model = onnx.load(folder / "fused.onnx")
    plugin = to_form(model, "plugin")
    node = custom(model)
    for known in (model.graph.value_info, plugin.graph.value_info):
        del known[:]
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    assert numpy_helper.to_array(weight).shape == (4, 2)
    node.input[0] = "from elsewhere"
    assert refused(model) == {"acmix_0.attention": "head_dim 4"}
