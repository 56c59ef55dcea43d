"""INT8 for ONNX Runtime on a CPU: what its integer kernels need, that they are used, and that nothing else reads it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from acmix_deploy.artifacts import read_artifact
from acmix_deploy.cli import main
from acmix_deploy.detection.images import batches, find
from acmix_deploy.engine.build import build
from acmix_deploy.errors import UserError
from acmix_deploy.export import export
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.precision import quantize
from acmix_deploy.precision.int8 import compute_nodes
from acmix_deploy.precision.pairs import between, ends, insert
from acmix_deploy.precision.ranges import bounds
from acmix_deploy.report.documents import QuantizeDocument
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session
from tests.precision import blobs

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


class Net(torch.nn.Module):
    """A residual sum, an ACmix block, layers that follow each other at once, and one that another reader shares."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 16, 3, 2, 1)
        self.block = ACmix(16, 16, head=2)
        self.same = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.next = torch.nn.Conv2d(16, 16, 1, bias=False)
        self.classes = torch.nn.Linear(16, 12)
        self.last = torch.nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.silu(self.first(x))
        x = x + self.next(self.same(x))
        x = torch.nn.functional.silu(x + self.block(x))
        return self.last(self.classes(x.mean(dim=(2, 3))))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A fused net of 32x32, its uint8 file, and the images."""
    folder = tmp_path_factory.mktemp("uint8")
    torch.manual_seed(0)
    photos = blobs.images(folder / "photos", 4)
    export(Net().eval(), folder / "plain.onnx", input_shape=(1, 3, 32, 32), opset=17)
    fuse(folder / "plain.onnx", folder / "fused.onnx", expect=1)
    path = folder / "int8.onnx"
    report = quantize(folder / "fused.onnx", path, photos, image_size=(32, 32), scheme="uint8").found
    return SimpleNamespace(source=folder / "fused.onnx", path=path, photos=photos, report=report)


def optimised(path: Path, folder: Path) -> list[str]:
    """Types of the nodes that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


def test_what_stands_in_the_file(made: SimpleNamespace) -> None:
    """Activations in uint8 with zero points, weights of 7 bits for each channel, biases in int32, no float16."""
    model, before = onnx.load(made.path), onnx.load(made.source)
    onnx.checker.check_model(model, full_check=True)
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert np.float16 not in {array.dtype.type for array in held.values()}
    producers = {name: node for node in model.graph.node for name in node.output}
    layers = {layer.name for layer in made.report.layers}
    assert len(layers) == 6
    zeros = set()
    for node in (node for node in model.graph.node if node.name in layers):
        image, weight, *bias = (producers[name] for name in node.input)
        (after,) = (reader for reader in model.graph.node if node.output[0] in reader.input)
        assert after.op_type == producers[image.input[0]].op_type == "QuantizeLinear"
        for quantize_node in (after, producers[image.input[0]]):
            assert held[quantize_node.input[2]].dtype == np.uint8
            zeros.add(int(held[quantize_node.input[2]]))
        assert held[weight.input[0]].dtype == np.int8
        assert np.abs(held[weight.input[0]]).max() == 64
        assert held[weight.input[1]].size == (held[weight.input[0]].shape[0] if node.op_type != "MatMul" else 1)
        assert [held[one.input[0]].dtype for one in bias] == [np.int32] * len(bias)
    assert len(zeros) > 3
    between = {"Sigmoid": 1, "Mul": 1, "Add": 1}  # what the block's output goes through stays in float
    for operator, count in between.items():
        nodes = [node for node in model.graph.node if node.op_type == operator]
        quantised = [node for node in nodes if all(producers[one].op_type[0] == "D" for one in node.input)]
        assert len(quantised) == count, operator
        assert len(nodes) > count
    custom = [node for node in model.graph.node if node.domain == "acmix"]
    assert custom == [node for node in before.graph.node if node.domain == "acmix"]
    assert model.functions == before.functions
    assert [node.op_type for node in model.graph.node].count("Add") == [n.op_type for n in before.graph.node].count(
        "Add"
    )


def test_its_integer_kernels_run(made: SimpleNamespace, tmp_path: Path) -> None:
    found = optimised(made.path, tmp_path)
    model = onnx.load(made.path)
    layers = {layer.name for layer in made.report.layers}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and node.name in layers]
    assert found.count("QLinearConv") == len(convolutions) == 5
    assert [found.count(f"QLinear{operator}") for operator in ("Sigmoid", "Mul", "Add")] == [1, 1, 1]
    assert found.count("QGemm") == 1
    assert {operator for operator in found if "Conv" in operator} <= {"QLinearConv", "Conv", "FusedConv"}


def test_outputs_are_near_the_float_ones(made: SimpleNamespace) -> None:
    (images,) = batches(find(made.photos).paths, [(4, 3, 32, 32)])
    sessions = [open_session(path) for path in (made.source, made.path)]
    expected, actual = (
        np.concatenate([session.run(None, {"images": image[None]})[0] for image in images]) for session in sessions
    )
    assert 1e-4 < deviation(expected, actual).relative_l2 < 0.03
    assert all(1e-4 < layer.relative_l2 < 0.05 for layer in made.report.layers)


def test_a_bound_is_what_occurs_within_what_the_method_takes() -> None:
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    samples = [{"x": np.array(x, np.float32)} for x in ([-1, 9], [2, 3])]
    assert bounds(model, {"x": 5, "y": 10}, samples) == {"x": (-1, 5), "y": (-9, 1)}


def test_what_lies_between() -> None:
    """Between layers in INT8, whatever moves or sums; not where a float tensor comes in, nor where none reads it."""
    chain = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="a"),
        helper.make_node("MaxPool", ["a"], ["p"], name="pool", kernel_shape=[1, 1]),
        helper.make_node("Split", ["p", "sizes"], ["s", "t"], name="split", axis=1),
        helper.make_node("Concat", ["s", "t"], ["c"], name="concat", axis=1),
        helper.make_node("Resize", ["c", "", "scales"], ["r"], name="resize", mode="nearest"),
        helper.make_node("Add", ["r", "x"], ["f"], name="of a float tensor"),
        helper.make_node("Mul", ["r", "scales"], ["m"], name="of a stored tensor"),
        helper.make_node("Conv", ["r", "w"], ["b"], name="b"),
        helper.make_node("Conv", ["f", "w"], ["g"], name="g"),
        helper.make_node("Conv", ["m", "w"], ["h"], name="h"),
        helper.make_node("Sigmoid", ["b"], ["y"], name="read by none"),
    ]
    held = {"w": np.ones((4, 4, 1, 1), np.float32), "sizes": np.array([2, 2]), "scales": np.ones(4, np.float32)}
    values = [helper.make_tensor_value_info(name, 1, [1, 4, 8, 8]) for name in "xygh"]
    stored = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph(chain, "g", values[:1], values[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    chain = [*model.graph.node]
    layers = [node for node in chain if node.op_type == "Conv"]
    assert [node.name for node in between(model, layers)] == ["pool", "split", "concat", "resize"]
    assert not between(model, layers[:1])
    assert [*ends(chain[1:3], "uint8")] == ["a", "p", "p", "s", "t"]
    nodes = [*layers, *between(model, layers)]
    typed = insert(model, nodes, dict.fromkeys(ends(nodes, "uint8"), (0, 9)), "uint8")
    producers = {name: node for node in typed.graph.node for name in node.output}
    for node in (node for node in typed.graph.node if node.name in {node.name for node in nodes}):
        assert producers[node.input[0]].op_type == "DequantizeLinear", node.name
        readers = [reader for name in node.output for reader in typed.graph.node if name in reader.input]
        assert {reader.op_type for reader in readers} == {"QuantizeLinear"}, node.name


def test_layers_of_nothing_and_a_shared_bias(tmp_path: Path) -> None:
    """A channel that is always 0, and a bias that two layers share, each with a scale of its own."""
    random = np.random.default_rng(0)
    held = {
        "w": random.standard_normal((4, 3, 1, 1)).astype(np.float32),
        "v": random.standard_normal((4, 4, 1, 1)).astype(np.float32),
        "zero": np.zeros((4, 3, 1, 1), np.float32),
        "bias": random.standard_normal(4).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "bias"], ["a"], name="a"),
        helper.make_node("Conv", ["a", "v", "bias"], ["b"], name="b"),
        helper.make_node("Conv", ["x", "zero"], ["c"], name="c"),
        helper.make_node("Add", ["b", "c"], ["y"], name="y"),
    ]
    values = [helper.make_tensor_value_info(n, 1, [1, s, 8, 8]) for n, s in (("x", 3), ("y", 4), ("a", 4))]
    graph = helper.make_graph(
        nodes, "g", values[:1], values[1:], [numpy_helper.from_array(array, name) for name, array in held.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feed = {"x": random.random((1, 3, 8, 8), dtype=np.float32)}
    layers = compute_nodes(model)
    ranges = bounds(model, dict.fromkeys(ends(layers, "uint8"), 9.0), [feed])
    onnx.save(insert(model, layers, ranges, "uint8"), tmp_path / "int8.onnx")
    assert optimised(tmp_path / "int8.onnx", tmp_path).count("QLinearConv") == 3
    for one, other in zip(*(open_session(m).run(None, feed) for m in (model, tmp_path / "int8.onnx")), strict=True):
        assert deviation(one, other).relative_l2 < 0.02


def test_no_tensorrt_reads_it(
    made: SimpleNamespace, fake: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"zero points other than 0 \(.* more\), .* TensorRT reads none"):
        build(made.path, tmp_path / "e")
    assert not [*tmp_path.iterdir()]
    assert main(["fuse", str(made.path), "-o", str(tmp_path / "f.onnx"), "--for", "jetpack-6.2"]) == 0
    assert "QuantizeLinear with a zero point other than 0" in capsys.readouterr().out


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The file says what it is for, a target is searched for as ever, and there is no float16 in it."""
    monkeypatch.chdir(tmp_path)
    blobs.detector(Path("model.onnx"), spoilt=30000)
    blobs.images(Path("photos"), 8)
    blobs.images(Path("labelled"), 16, seed=1)
    command = ["quantize", "model.onnx", "--calibration", "photos", "--for", "onnxruntime", "-o", "int8.onnx"]
    assert main([*command, "--fp16"]) == 2
    assert "keeps in float32 what is not INT8" in capsys.readouterr().err
    assert not Path("int8.onnx").exists()
    assert main(command) == 0
    assert "it is for ONNX Runtime on a CPU alone" in capsys.readouterr().out
    assert read_artifact(Path("int8.onnx")).settings["scheme"] == "uint8"
    assert main([*command, "--validation", "labelled", "--max-lost", "0.01", "--json"]) == 0
    document = QuantizeDocument.model_validate_json(capsys.readouterr().out)
    assert (document.scheme, document.rest) == ("uint8", "float32")
    assert document.search is not None
    assert document.search.excluded == ["spoilt"]
    assert optimised(Path("int8.onnx"), tmp_path).count("QLinearConv") == 2
    assert main([*command[:4], "-o", "symmetric.onnx", "--json"]) == 0
    assert QuantizeDocument.model_validate_json(capsys.readouterr().out).scheme == "symmetric"
