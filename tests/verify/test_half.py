"""What float16 cannot hold fails, though ONNX Runtime computes it in float32; infinities in their place do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from acmix_deploy.cli import main
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.report.model import ExportReport
from acmix_deploy.runtime.magnitudes import Magnitude, largest_magnitudes, magnitudes
from acmix_deploy.runtime.onnxruntime import onnx_runner
from acmix_deploy.runtime.torch import TorchRunner
from acmix_deploy.verify import Candidate, Verification, compare_files, verify
from acmix_deploy.verify.half import half_range

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
IMAGE = {"images": np.linspace(0.5, 1, 12, dtype=np.float32).reshape(1, 3, 2, 2)}


def half_file(path: Path, *nodes: onnx.NodeProto, dims: Sequence[int | str] = (1, 3, 2, 2), **stored: object) -> Path:
    """From ``images``, cast to ``x`` in float16, to ``y`` in float16, cast to ``output0``; ``stored`` is float16."""
    cast = helper.make_node("Cast", ["images"], ["x"], name="in", to=HALF)
    back = helper.make_node("Cast", ["y"], ["output0"], name="out", to=FLOAT)
    graph = helper.make_graph(
        [cast, *nodes, back],
        "g",
        [helper.make_tensor_value_info("images", FLOAT, dims)],
        [helper.make_tensor_value_info("output0", FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value, np.float16), name) for name, value in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def node(op_type: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=f"the {output}", **attributes)


BACK = node("Mul", "large small", "y")
"""Beyond the overflow all is as small as before."""


@pytest.mark.parametrize(
    ("nodes", "stored", "beyond"),
    [
        pytest.param([node("Mul", "x one", "y")], {"one": 1}, {}, id="all small"),
        pytest.param(
            [node("Mul", "x big", "large"), BACK], {"big": 65504, "small": 1e-4}, {}, id="the largest there is"
        ),
        pytest.param(
            [node("Mul", "x big", "once"), node("Mul", "once two", "large"), BACK],
            {"big": 6e4, "two": 2, "small": 1e-4},
            {"the large": 120000},
            id="a product",
        ),
        pytest.param(
            [node("Mul", "x big", "m"), node("Add", "m m", "large"), node("Add", "large large", "l"),
             node("Mul", "l small", "y")],
            {"big": 6e4, "small": 1e-4},
            {"the large": 120000, "the l": 240000},
            id="each node on the way",
        ),
        pytest.param(
            [node("Mul", "x hundred", "h"), node("Exp", "h", "e"), node("Reciprocal", "e", "y")],
            {"hundred": 200},
            {"the e": None},
            id="what float32 cannot hold either",
        ),
        pytest.param(
            [node("Where", "mask x out", "masked"), node("Softmax", "masked", "y", axis=3)],
            {"out": -np.inf},
            {},
            id="a mask",
        ),
        pytest.param(
            [node("Mul", "x big", "b"), node("Add", "b b", "large"), node("Where", "mask large out", "masked"),
             node("Softmax", "masked", "y", axis=3)],
            {"big": 6e4, "out": -np.inf},
            {"the large": 120000, "the masked": 120000},
            id="large beside a mask",
        ),
        pytest.param(
            [node("Sub", "x x", "zero"), node("Log", "zero", "pole"), node("Exp", "pole", "y")], {}, {}, id="a pole"
        ),
        pytest.param(
            [node("Shape", "x", "shape"), node("ConstantOfShape", "shape", "out",
                value=numpy_helper.from_array(np.array([-np.inf], np.float16))), node("Where", "mask x out", "masked"),
             node("Softmax", "masked", "y", axis=3)],
            {},
            {},
            id="a mask of the size of the input",
        ),
    ],
)  # fmt: skip
def test_nodes_beyond_float16(nodes: list, stored: dict, beyond: dict, tmp_path: Path) -> None:
    path = half_file(tmp_path / "half.onnx", *nodes, **stored)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([[True, False], [True, True]]), "mask"))
    found = half_range("half", model, [IMAGE])
    assert found is not None
    assert found.passed is not bool(beyond)
    sizes = {overflow.node: overflow.magnitude or np.inf for overflow in found.overflows}
    assert sizes == pytest.approx({name: size or np.inf for name, size in beyond.items()}, rel=1e-3)
    assert found.tensors == len(nodes) + 1 - any(node.op_type == "Shape" for node in nodes)
    same = TorchRunner(nn.Identity(), "right")
    result = verify(same, [Candidate(onnx_runner(model, "half"), "float16", model)], [IMAGE])
    assert result.half == (found,)
    assert (result.passed is False) or not beyond


def test_the_file_fails_with_the_node_and_the_input_and_so_it_does_later(tmp_path, capsys):
    """The second input alone is too large, and so is the output of this one alone, though it would be small again."""
    plain, half = tmp_path / "plain.onnx", tmp_path / "half.onnx"
    dims = ("batch", 3, "height", "width")
    half_file(half, node("ReduceSum", "x", "s"), node("Mul", "s big", "large"), BACK, dims=dims, big=16, small=1 / 16)
    model = onnx.load(half)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for cast in (model.graph.node[0], model.graph.node[-1]):
        cast.attribute[0].i = FLOAT
    onnx.save(model, plain)
    assert compare_files(plain, half, input_shape=(1, 3, 32, 32), random=1).half[0].largest > 3e4
    command = ["verify", str(plain), str(half), "--input-shape", "1,3,32,32", "-o", str(tmp_path / "found.json")]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "the large" in printed.out
    assert "half.onnx computes in float16 what is beyond its 65504" in printed.err
    found = Verification.model_validate_json((tmp_path / "found.json").read_text())
    assert {"images": (2, 3, 64, 96)} in [failed.input_shapes for failed in found.failures if failed.problem]
    assert found.rounded == ("half.onnx",)
    (overflow,) = found.half[0].overflows
    assert overflow.node == "the large"
    assert overflow.input_shapes == {"images": (2, 3, 64, 96)}
    assert main(["verify", "--from", str(tmp_path / "found.json"), "--max-relative", "1"]) == 1
    assert "the large reaches" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "the large" in page
    assert "beyond a limit" in page


def test_magnitudes_of_what_is_partly_infinite():
    """Infinities are left out, not all that is beside them; a tensor that is infinite on a later sample only, too."""
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["masked"]),
        helper.make_node("Exp", ["x"], ["grown"]),
        helper.make_node("Sub", ["masked", "masked"], ["nothing"]),
    ]
    mask = numpy_helper.from_array(np.array([0, -np.inf, 0], np.float32), "mask")
    values = [helper.make_tensor_value_info(name, FLOAT, [3]) for name in ("x", "masked", "grown", "nothing")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [mask])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    samples = [{"x": np.array(x, np.float32)} for x in ([1, 2, -70000], [3, 90, 1], [0, 0, 0])]
    names = ["x", "masked", "grown", "nothing"]
    found = list(magnitudes(model, names, samples))
    e = np.exp(np.float32([2, 3, 0]))
    assert [one["x"] for one in found] == [
        *(Magnitude(70000, False, -70000, 2), Magnitude(90, False, 1, 90), Magnitude(0, False, 0, 0)),
    ]
    assert [one["masked"] for one in found] == [
        *(Magnitude(70000, True, -70000, 1), Magnitude(3, True, -3, 3), Magnitude(0, True, 0, 0)),
    ]
    assert [one["grown"].infinite for one in found] == [False, True, False]
    assert [one["grown"].finite for one in found] == pytest.approx(e, rel=1e-5)
    assert [one["nothing"].finite for one in found] == [0, 0, 0]
    assert largest_magnitudes(model, names, samples)["masked"] == 70000
    assert largest_magnitudes(model, names, []) == {}


def test_engines_cannot_be_looked_into():
    right = TorchRunner(nn.Identity(), "right")
    candidates = [Candidate(TorchRunner(nn.Identity(), name), name) for name in ("float32", "float16", "int8")]
    found = verify(right, candidates, [IMAGE])
    assert found.half == ()
    assert [note.partition(" is no ONNX file")[0] for note in found.notes] == ["float16", "int8"]


def test_half_between_quantised_layers(tmp_path):
    """A file whose scales are float16: what is dequantised is."""
    path = tmp_path / "int8.onnx"
    quantised = [
        node("QuantizeLinear", "x scale", "q"),
        node("DequantizeLinear", "q scale", "d"),
        node("Mul", "d big", "large"),
        BACK,
    ]
    half_file(path, *quantised, scale=1 / 128, big=65504, small=1e-4)
    model = onnx.load(path)
    model.opset_import[0].version = 19
    assert half_range("int8", model, [IMAGE]).passed
    assert not half_range("int8", model, [{"images": IMAGE["images"] * 2}]).passed


@pytest.fixture
def overflowing(tmp_path, monkeypatch):
    """A checkpoint with an ACmix whose logits are about 1e6 large."""
    torch.manual_seed(0)
    block = ACmix(16, 16, head=2)
    with torch.no_grad():
        block.conv1.weight *= 1500
        block.conv2.weight *= 1500
    model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1), block, nn.Conv2d(16, 8, 1)).eval()
    torch.save(model, tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kept", [pytest.param("none", marks=pytest.mark.soak), "softmax", "decode,softmax,range"])
def test_an_attention_that_overflows(overflowing, kept, capsys):
    """Unless it is kept in float32, which is the default."""
    command = [
        "export",
        "model.pt",
        "--fp16",
        "--float32",
        kept,
        "--input-shape",
        "1,3,32,48",
        "--no-engine",
        "--seconds",
        "0.1",
    ]
    right = "range" in kept
    assert main(command) == (0 if right else 1)
    printed = capsys.readouterr()
    report = ExportReport.model_validate(json.loads(Path("model-deploy/report.json").read_text()))
    assert not report.verification.failures, "the outputs do not show it"
    (half,) = report.verification.half
    assert report.passed is right
    assert half.tensors > 3
    if right:
        assert half.largest < 65504
        return
    assert {overflow.node for overflow in half.overflows} == {"acmix_0.attention"}
    assert "acmix_0.attention reaches" in printed.err
    assert "acmix_0.attention" in printed.out
    mend = "acmix_0.attention" if kept == "none" else f"{kept},acmix_0.attention"
    assert printed.err.endswith(f"keep it in floating point: --float32 {mend}\n")
    if kept == "softmax":
        mended = ["model-deploy/model.fused.onnx", "mended.onnx"]
        assert main(["fp16", mended[0], "-o", mended[1], "--float32", mend]) == 0
        assert main(["verify", *mended, "--layers"]) == 0
        capsys.readouterr()
    pair = ["model-deploy/model.onnx", "model-deploy/model.fp16.onnx"]
    assert main(["verify", *pair]) == 1
    assert "acmix_0.attention reaches" in capsys.readouterr().err


def test_what_rounds_to_the_smallest_is_no_zero(tmp_path: Path) -> None:
    """5e-8 becomes 6e-8, and 2e-8 becomes zero."""
    for factor, zeros in ((5e-4, 0), (2e-4, 1)):
        nodes = [node("Mul", "x factor", "m"), node("Mul", "m tiny", "s"), node("Mul", "s big", "y")]
        made = half_file(tmp_path / "half.onnx", *nodes, factor=factor, tiny=1e-4, big=6e4)
        found = half_range("half", made, [IMAGE])
        assert found
        assert len(found.vanished) == zeros


def test_a_reference_that_cannot_be_rounded_is_told_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (half_file(tmp_path / name, node("Mul", "x two", "y"), two=2) for name in ("a.onnx", "b.onnx"))

    def fails(model: Path) -> Path:
        raise ValueError("no")

    monkeypatch.setattr("acmix_deploy.half.rounded", fails)
    told = [note for note in compare_files(one, two).notes if "without rounding" in note]
    assert [note.split()[0] for note in told] == ["b.onnx", "a.onnx"]
