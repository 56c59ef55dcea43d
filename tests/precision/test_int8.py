"""INT8: where Q/DQ stands and where it does not, how exact the file is, and whether the report finds the bad layer."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from torch import nn

from acmix_deploy.artifacts import StageResult, read_artifact
from acmix_deploy.cli import main
from acmix_deploy.detection.images import batches, find
from acmix_deploy.errors import UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.half import runnable
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.precision import quantize
from acmix_deploy.precision.fp16 import to_fp16
from acmix_deploy.precision.int8 import choose_layers, head
from acmix_deploy.precision.ranges import calibrate
from acmix_deploy.report.documents import QuantizeDocument
from acmix_deploy.report.show_stages import show_int8
from acmix_deploy.runtime.inputs import AXES
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import ir_version, open_session
from acmix_deploy.verify import compare_files
from scripts import shapes
from tests import ROOT
from tests.families.parts import export
from tests.fusion.test_fuse import randomised

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
SIZE = (128, 160)


@pytest.fixture(scope="session")
def photographs():
    """The folder of the two photographs that the Ultralytics package carries, and one file that is none."""
    ultralytics = pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    return Path(ultralytics.__file__).parent / "assets"


@pytest.fixture(scope="session")
def detectors(photographs, tmp_path_factory):
    """Fused YOLOv8n-ACmix with free axes, its normalisation that of the photographs, by opset."""
    from acmix_deploy import families, yolo
    from acmix_deploy.export import export as export_detector

    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    model = yolo.build("p3p4p5")
    (images,) = batches(find(photographs).paths, [(2, 3, *SIZE)])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.cat([torch.from_numpy(images), torch.rand(2, 3, *SIZE)]))
    module = yolo.prepare_for_export(families.canonicalise(model.eval())[0])
    options = {"dynamic": ("batch", "height", "width"), "opset": 17, "divisor": 32}
    metadata = yolo.detection_metadata(model)
    export_detector(module, folder / "plain.onnx", input_shape=(1, 3, *SIZE), metadata=metadata, **options)
    fuse(folder / "plain.onnx", folder / "17.onnx", expect=3)
    return {17: folder / "17.onnx", 19: at_opset_19(folder / "17.onnx", folder / "19.onnx")}


def at_opset_19(source, target):
    """The same detector in the opset that scales in float16 need, where all its operators mean what they did."""
    model = onnx.load(source)
    model.ir_version = ir_version(19)
    for imports in (model.opset_import, model.functions[0].opset_import):
        next(entry for entry in imports if not entry.domain).version = 19
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, target)
    return target


@pytest.fixture(scope="session")
def quantized(detectors, photographs, tmp_path_factory):
    """INT8 files of the detectors with their reports, by opset; and "half", of opset 19 with float16 for the rest.

    Each is made when it is asked for.
    """
    folder = tmp_path_factory.mktemp("quantized")

    class Made(dict):
        def __missing__(self, name):
            source, path = detectors[17 if name == 17 else 19], folder / f"{name}.onnx"
            options = {"method": "minmax", "image_size": SIZE, "fp16": name == "half"}
            report = quantize(source, path, photographs, **options).found
            self[name] = SimpleNamespace(source=source, path=path, report=report, model=onnx.load(path))
            return self[name]

    return Made()


# Opset 17 differs in nothing that is looked at here; tests/pipeline/test_deploy.py makes a file of it.
every_rest = pytest.mark.parametrize("name", [pytest.param(17, marks=pytest.mark.soak), 19, "half"])


def producers(model):
    return {name: node for node in model.graph.node for name in node.output}


def readers(model, name):
    return [node for node in model.graph.node if name in node.input]


@every_rest
def test_pairs_stand_where_they_are_promised_and_nowhere_else(quantized, name):
    found = quantized[name]
    model, before = found.model, onnx.load(found.source)
    onnx.checker.check_model(model, full_check=name != "half")
    layers = {layer.name for layer in found.report.layers}
    made, weights = producers(model), {tensor.name: tensor for tensor in model.graph.initializer}
    assert len(layers) == 51
    pairs = 0
    for node in model.graph.node:
        if node.name in layers:
            for operand in node.input[:2]:
                assert made[operand].op_type == "DequantizeLinear", node.name
            pairs += 2
        else:
            operators = {made[name].op_type for name in node.input if name in made}
            assert node.op_type == "QuantizeLinear" or "QuantizeLinear" not in operators or node.op_type[0] == "D"
            assert "DequantizeLinear" not in operators, node.name
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = numpy_helper.to_array(weights[node.input[2]])
            scale = numpy_helper.to_array(weights[node.input[1]])
            assert zero.dtype == np.int8
            assert not zero.any(), "TensorRT knows symmetric ranges alone"
            assert (scale > 0).all()
            assert scale.dtype == (np.float16 if name == "half" else np.float32)
            following = readers(model, node.output[0])
            if node.op_type == "QuantizeLinear":
                assert {reader.op_type for reader in following} == {"DequantizeLinear"}
            else:
                assert [reader.name in layers for reader in following] == [True]
    assert sum(node.op_type == "DequantizeLinear" for node in model.graph.node) == pairs

    for layer in (node for node in model.graph.node if node.name in layers):
        dequantize = made[layer.input[1]]
        original = next(node for node in before.graph.node if node.name == layer.name).input[1]
        values = numpy_helper.to_array(next(tensor for tensor in before.graph.initializer if tensor.name == original))
        scales = numpy_helper.to_array(weights[dequantize.input[1]]).astype(np.float32)
        channels = np.abs(values.reshape(len(values), -1)).max(axis=1)
        np.testing.assert_allclose(scales * 127, channels, rtol=2e-3, err_msg="a scale for each output channel")
        stored = dequantize.input[0] in weights
        assert stored == (name != 17), "TensorRT 8, which reads opset 17 at most, wants a pair at weights too"
        if stored:
            assert weights[dequantize.input[0]].data_type == TensorProto.INT8


@every_rest
def test_operator_body_inputs_and_metadata_stay(quantized, name):
    found = quantized[name]
    before, after = onnx.load(found.source), found.model
    assert [f.SerializeToString() for f in after.functions] == [f.SerializeToString() for f in before.functions]
    assert sum(node.op_type == LOCAL_ATTENTION.op_type for node in after.graph.node) == 3
    assert (after.ir_version, after.opset_import) == (before.ir_version, before.opset_import)
    assert after.metadata_props == before.metadata_props
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)
    made = producers(after)
    for node in after.graph.node:
        if node.op_type == LOCAL_ATTENTION.op_type:
            assert made[node.input[0]].op_type == "Conv"
            assert all(reader.op_type == "Add" for reader in readers(after, node.output[0]))


def test_attention_in_float32_is_told(quantized):
    """From TensorRT 10 on that is what an engine computes it in."""

    def shown(name):
        found = quantized[name]
        made = StageResult(read_artifact(found.path), found.report)
        console = Console(width=400, record=True, file=io.StringIO())
        show_int8(QuantizeDocument.of(made), console)
        return console.export_text()

    names = {f"acmix_{block}.attention" for block in range(3)}
    assert quantized[19].report.attention == dict.fromkeys(names, "float32")
    assert quantized["half"].report.attention == dict.fromkeys(names, "float16")
    assert "acmix_2.attention) computes in float32" in shown(19)
    assert "computes in float32" not in shown("half")


@every_rest
def test_error_of_the_file(quantized, photographs, name):
    """The report tells what a run of both files shows, and it is small."""
    found = quantized[name]
    inputs = list(batches(find(photographs).paths, [(1, 3, *SIZE)]))
    sessions = open_session(found.source), open_session(runnable(found.path))
    expected, actual = (np.concatenate([s.run(None, {"images": x})[0] for x in inputs]) for s in sessions)
    whole = found.report.outputs["output0"]
    assert deviation(expected, actual).relative_l2 == pytest.approx(whole.relative_l2, rel=1e-3)
    errors = np.array([layer.relative_l2 for layer in found.report.layers])
    assert errors.min() > 0.003
    assert errors.max() < 0.08
    print(whole, found.report.outputs["scores"])
    assert 1e-4 < whole.relative_l2 < 0.02
    assert found.report.outputs["boxes"].relative_l2 == pytest.approx(whole.relative_l2, rel=0.02)
    assert found.report.outputs["scores"].relative_l2 < 1
    if name != 17:
        assert found.report.bytes_after < 0.5 * found.report.bytes_before


@pytest.fixture(scope="module")
def trained(shapes_model, tmp_path_factory):
    """The fused file of the detector that was trained on shapes, and folders of scenes that it has not seen."""
    folder = tmp_path_factory.mktemp("trained")
    path = at_opset_19(shapes_model, folder / "fused.onnx")
    scenes = (("calibration", 11, 12), ("unseen", 12, 20), ("few", 12, 6))
    folders = {name: shapes.write(folder / name, seed, count) for name, seed, count in scenes}
    return SimpleNamespace(path=path, **folders)


def detections(trained, path):
    result = compare_files(trained.path, path, images=trained.unseen)
    (found,) = result.detections
    assert found.expected > 100
    return found


def detections_in_few(trained, path):
    return compare_files(trained.path, path, images=trained.few).detections[0]


def test_a_trained_detector_finds_the_same_in_float16(trained, tmp_path):
    samples = [{"images": batch} for batch in batches(find(trained.calibration, 4).paths, [(1, 3, 160, 160)])]
    report = to_fp16(trained.path, tmp_path / "half.onnx", samples=samples).found
    assert set(report.float32_nodes.values()) == {"constant", "decode", "softmax"}
    found = detections(trained, tmp_path / "half.onnx")
    assert (found.lost, found.class_changes, found.added) == (0, 0, 0)
    assert found.max_score_change < 0.005


@pytest.mark.parametrize("method", ["percentile", pytest.param("minmax", marks=pytest.mark.soak)])
def test_a_trained_detector_finds_the_same_in_int8(trained, tmp_path, method):
    """Within the limit that `verify` sets; with one range of one layer far too small it does not."""
    path = tmp_path / "int8.onnx"
    report = quantize(trained.path, path, trained.calibration, method=method, fp16=True).found
    assert report.outputs["scores"].relative_l2 < 0.1
    found = detections(trained, path)
    assert found.passed, found
    assert found.min_iou > 0.7

    model = onnx.load(path)
    layer = next(node for node in model.graph.node if node.name == report.layers[0].name)
    made = producers(model)
    scale_name = made[layer.input[0]].input[1]
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == scale_name)
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / np.float16(16), scale.name))
    onnx.save(model, tmp_path / "clipped.onnx")
    assert not detections_in_few(trained, tmp_path / "clipped.onnx").passed


@pytest.mark.parametrize("fp16", [pytest.param(False, marks=pytest.mark.soak), True])
def test_photographs_that_it_was_not_calibrated_on(trained, photographs, fp16, tmp_path):
    """Calibrated on the two photographs of Ultralytics, compared on five others."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed")
    files = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    inputs = list(batches([Path(data.__file__).parent / file for file in files], [(1, 3, shapes.SIZE, shapes.SIZE)]))
    quantize(trained.path, tmp_path / "int8.onnx", photographs, fp16=fp16)
    sessions = open_session(trained.path), open_session(tmp_path / "int8.onnx")
    expected, actual = (np.concatenate([s.run(None, {"images": x})[0] for x in inputs]) for s in sessions)
    assert 1e-3 < deviation(expected[:, :4], actual[:, :4]).relative_l2 < 0.03, "boxes"
    assert 1e-2 < deviation(expected[:, 4:], actual[:, 4:]).relative_l2 < 0.2, "scores"


def test_error_of_a_layer_is_that_of_a_file_where_it_alone_is_int8(detectors, quantized, photographs, tmp_path):
    """Oracle: exclude all others, and read the layer's output from both files."""
    report = quantized[19].report
    layer = report.layers[0]
    others = [other.name for other in report.layers[1:]]
    path = tmp_path / "one.onnx"
    alone = quantize(detectors[19], path, photographs, method="minmax", exclude=others, image_size=SIZE).found
    assert [found.name for found in alone.layers] == [layer.name]
    arrays = []
    for file in (detectors[19], path):
        model = onnx.load(file)
        node = next(node for node in model.graph.node if node.name == layer.name)
        model.graph.output.append(onnx.ValueInfoProto(name=node.output[0]))
        session = open_session(model)
        inputs = batches(find(photographs).paths, [(1, 3, *SIZE)])
        arrays.append(np.concatenate([session.run([node.output[0]], {"images": x})[0] for x in inputs]))
    found = deviation(*arrays).relative_l2
    assert found == pytest.approx(layer.relative_l2, rel=1e-3)
    assert found == pytest.approx(alone.layers[0].relative_l2, rel=1e-3)


def test_a_layer_made_bad_on_purpose_comes_first(detectors, photographs, tmp_path):
    model = onnx.load(detectors[19])
    bad = next(tensor for tensor in model.graph.initializer if tensor.name == "model.12.cv1.conv.weight")
    values = numpy_helper.to_array(bad).copy()
    values[:, 0] *= 3000  # one input channel, which is dark from now on, takes the range of all others
    bad.CopyFrom(numpy_helper.from_array(values, bad.name))
    reader = next(node for node in model.graph.node if bad.name in node.input)
    mask = np.ones((1, values.shape[1], 1, 1), np.float32)
    mask[0, 0] = 0
    model.graph.initializer.append(numpy_helper.from_array(mask, "mask"))
    index = list(model.graph.node).index(reader)
    model.graph.node.insert(index, helper.make_node("Mul", [reader.input[0], "mask"], ["masked"], name="mask"))
    model.graph.node[index + 1].input[0] = "masked"
    onnx.save(model, tmp_path / "bad.onnx")
    report = quantize(tmp_path / "bad.onnx", tmp_path / "int8.onnx", photographs, image_size=SIZE).found
    errors = [layer.relative_l2 for layer in report.layers]
    assert errors == sorted(errors, reverse=True)
    assert report.layers[0].weight == bad.name
    assert errors[0] > 3 * errors[1]


def test_the_head_and_what_decodes_stay(quantized):
    """Box and class branches of the three maps, as Ultralytics names them, and no layer before."""
    kept = {layer.weight: layer.reason for layer in quantized[19].report.float_layers}
    branches = {f"model.25.cv{b}.{m}.{c}.weight" for b in "23" for m in "012" for c in ("0.conv", "1.conv", "2")}
    assert {weight for weight, why in kept.items() if why == "detection head"} == branches
    assert "behind the last learnt layer" in kept["model.25.dfl.conv.weight"]
    biases = {weight for weight, why in kept.items() if why == "it does not see the image"}
    assert biases == {f"acmix_{block}.biases.weight" for block in range(3)}
    assert len(kept) == len(branches) + len(biases) + 1


def test_the_head_is_overridable(detectors):
    model = onnx.load(detectors[19])
    everything = choose_layers(model, quantize_head=True)
    assert len(everything.quantized) == 51 + 18
    fewer = choose_layers(model, ["model.25.cv2.*", "acmix_?.qkv"], quantize_head=True)
    assert len(fewer.quantized) == 51 + 18 - 9 - 3
    assert {layer.reason for layer in fewer.kept} > {"excluded by acmix_?.qkv", "excluded by model.25.cv2.*"}


def graph_of(*nodes, inputs=("x",), outputs=("y",), shapes=()):
    """A model of named nodes; a weight "w:8,3,1,1" is made where it is read."""
    weights = {name for node in nodes for name in node.input if ":" in name}
    random = np.random.default_rng(0)
    arrays = [
        numpy_helper.from_array(random.standard_normal(json.loads(f"[{w.partition(':')[2]}]")).astype(np.float32), w)
        for w in sorted(weights)
    ]
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(name, 1, ["b", 3, "h", "w"]) for name in inputs],
        [helper.make_tensor_value_info(name, 1, None) for name in outputs],
        [*arrays, *shapes],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def conv(name, source, weight):
    return helper.make_node("Conv", [source, weight], [name], name=name)


def test_heads_of_other_models():
    """A chain has one last layer; branches end where a map is read by several; a join is no branch."""
    first, second = conv("a", "x", "a:8,3,3,3"), conv("b", "a", "b:8,8,3,3")
    assert head(graph_of(first, second, conv("c", "b", "c:8,8,1,1"), outputs=("c",))) == {"c"}
    branches = [conv(name, "b", f"{name}:8,8,1,1") for name in "cd"]
    ends = [conv("e", "c", "e:8,8,1,1"), conv("f", "d", "f:8,8,1,1")]
    assert head(graph_of(first, second, *branches, *ends, outputs=("e", "f"))) == set("cdef")
    join = helper.make_node("Add", ["c", "d"], ["j"], name="j")
    ends = [conv("e", "j", "e:8,8,1,1"), conv("f", "b", "f:8,8,1,1")]
    assert head(graph_of(first, second, *branches, join, *ends, outputs=("e", "f"))) == set("ef")


def test_near_misses():
    """Products of two activations, weights that are computed, and convolutions of sizes alone."""
    model = graph_of(
        conv("a", "x", "a:8,3,3,3"),
        helper.make_node("Shape", ["a"], ["size"], name="size"),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"], name="zeros"),
        conv("border", "zeros", "e:8,8,3,3"),
        helper.make_node("Transpose", ["a"], ["t"], name="t", perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["a", "t"], ["attention"], name="attention"),
        helper.make_node("Neg", ["b:8,8,3,3"], ["computed"], name="neg"),
        conv("by_computed", "a", "computed"),
        helper.make_node("ConvTranspose", ["a", "d:8,8,3,3"], ["up"], name="up"),
        conv("last", "a", "c:8,8,1,1"),
        outputs=("border", "attention", "by_computed", "up", "last"),
    )
    chosen = choose_layers(model, quantize_head=True)
    assert [node.name for node in chosen.quantized] == ["a", "last"]
    reasons = {layer.name: layer.reason for layer in chosen.kept}
    assert reasons.keys() == {"border", "attention", "by_computed", "up"}
    assert "second operand is computed" in reasons["attention"]
    assert "second operand is computed" in reasons["by_computed"]
    assert "does not see the image" in reasons["border"]
    assert "ConvTranspose" in reasons["up"]


@pytest.fixture
def plain(tmp_path):
    """A classifier without ACmix, its axes free, its weights in Constant nodes, one convolution right after another."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10),
    ).eval()  # fmt: skip
    path = export(model, torch.rand(1, 3, 32, 32), tmp_path / "plain.onnx", dynamic=AXES)
    file = onnx.load(path)
    for tensor in list(file.graph.initializer):
        if len(tensor.dims) > 1:
            file.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
            file.graph.initializer.remove(tensor)
    onnx.save(file, path)
    return path


def test_a_model_without_the_operator(plain, photographs, tmp_path):
    report = quantize(plain, tmp_path / "int8.onnx", photographs, image_size=(64, 48)).found
    assert report.input_shape == (1, 3, 64, 48)
    assert sorted(onnx_types(tmp_path / "int8.onnx", report)) == ["Conv", "Conv", "Gemm"]
    assert [layer.reason for layer in report.float_layers] == ["detection head"]
    (error,) = report.outputs.values()
    assert 1e-4 < error.relative_l2 < 0.1
    assert report.bytes_after < 60_000


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"task": "detect", "end2end": "True"}, "which is not one output"),
        ({"task": "detect", "names": "{0: 'a'}"}, "for 1 classes"),
        ({"task": "detect"}, "with scores from .* which are 0 to 1"),
    ],
)
def test_what_is_no_detector_and_says_so(photographs, tmp_path, metadata, said):
    model = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.Flatten(2)).eval()
    path = export(model, torch.rand(1, 3, 32, 32), tmp_path / "plain.onnx")
    file = onnx.load(path)
    helper.set_model_props(file, metadata)
    onnx.save(file, path)
    with pytest.raises(UserError, match=rf"plain\.onnx is not a detector: it gives .* {said}"):
        quantize(path, tmp_path / "int8.onnx", photographs, limit=2)
    assert not (tmp_path / "int8.onnx").exists()


def onnx_types(path, report):
    layers = {layer.name for layer in report.layers}
    return [node.op_type for node in onnx.load(path).graph.node if node.name in layers]


def ranges_of(method, *samples):
    """The range chosen for a convolution's input, which is a tensor of the graph and one that is computed."""
    model = graph_of(helper.make_node("Neg", ["x"], ["n"], name="n"), conv("y", "n", "w:8,3,1,1"))
    feeds = [{"x": np.resize(sample, (1, 3, 1, -(-sample.size // 3))).astype(np.float32)} for sample in samples]
    found = calibrate(model, ["x", "n"], lambda: iter(feeds), method)
    assert found["x"] == pytest.approx(found["n"], rel=0.02)
    return found["x"]


@pytest.mark.parametrize(
    ("method", "low", "high"), [("minmax", 50, 50), ("percentile", 3.5, 4.2), ("entropy", 2.5, 16)]
)
def test_methods_choose_sensible_ranges(method, low, high):
    """A normal distribution with a few outliers, after a nearly black image; the unit is the standard deviation."""
    random = np.random.default_rng(0)
    normal = [random.standard_normal(99_999) * scale for scale in (1e-6, 1, 1)]
    normal[2][:2] = 30, -50
    assert low <= ranges_of(method, *normal) <= high
    assert low <= ranges_of(method, *reversed(normal)) <= high


def test_entropy_does_not_cut_off_what_is_common():
    random = np.random.default_rng(0)
    common = np.concatenate([random.standard_normal(90_000), 40 + random.standard_normal(10_000)])
    assert ranges_of("entropy", random.permutation(common)) > 39


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_ranges_of_nothing_and_of_constants(method, capsys):
    assert ranges_of(method, np.zeros(6)) == 0
    assert ranges_of(method, np.full(6, 2)) == pytest.approx(2, rel=1e-3)
    assert capsys.readouterr().out == "", "standard output is for results"


def test_command_line(plain, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for photograph in photographs.glob("*.jpg"):
        (tmp_path / "photos" / photograph.name).write_bytes(photograph.read_bytes())
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no picture")
    command = ["quantize", "plain.onnx", "--calibration", "photos", "-o", "int8.onnx", "--image-size", "32"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "1 images could not be read: broken.jpg: not a picture in one of JPEG, " in printed.out
    assert "3 layers in INT8, calibrated on 2 images" in printed.out
    assert "calibrating" in printed.err
    assert read_artifact(tmp_path / "int8.onnx").kind == "int8"
    assert main([*command, "--json", "--exclude", "0.*", "--method", "entropy"]) == 0
    document = QuantizeDocument.model_validate_json(capsys.readouterr().out)
    assert (document.images, document.method) == (2, "entropy")
    assert [name.partition(":")[0] for name in document.skipped] == ["broken.jpg"]
    assert [layer.reason for layer in document.float_layers] == ["excluded by 0.*", "detection head"]

    (tmp_path / "empty").mkdir()
    onnx.save(graph_of(helper.make_node("Relu", ["x"], ["y"], name="r")), "relu.onnx")
    old = onnx.load("plain.onnx")
    old.opset_import[0].version = 12
    onnx.save(old, "old.onnx")
    before = sorted(tmp_path.iterdir())
    for change, words in {
        ("plain.onnx", "int8.onnx"): "quantised already",
        ("plain.onnx", "relu.onnx"): "no layer is left",
        ("plain.onnx", "old.onnx"): "opset 12, at least 13",
        ("plain.onnx", "absent.onnx"): "does not exist",
        ("int8.onnx", "plain.onnx"): "would be overwritten",
        ("photos", "empty"): "holds no readable image",
        ("photos", "absent"): "not a folder",
    }.items():
        changed = [change[1] if argument == change[0] else argument for argument in command]
        if change[1] == "int8.onnx":
            changed[changed.index("-o") + 1] = "again.onnx"
        assert main(changed) == 2, change
        assert words in capsys.readouterr().err
    for options, words in ((["--exclude", "nothing*"], "fits the name of no layer"), (["--fp16"], "at least 19")):
        assert main([*command, *options]) == 2
        assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before, "nothing may be left behind"


def test_patterns_that_fit_nothing_are_told_before_the_work(trained, tmp_path):
    steps = []
    with pytest.raises(UserError, match="fits the name of no node"):
        quantize(
            trained.path, tmp_path / "x.onnx", trained.calibration, fp16=True, float32=("nothing*",),
            progress=steps.append,
        )  # fmt: skip
    assert steps == []


def test_files_of_one_size_and_of_several_inputs(photographs, tmp_path):
    block = randomised(ACmix(3, 8, head=2))
    path = export(nn.Sequential(block, nn.Conv2d(8, 8, 1)), torch.randn(1, 3, 10, 12), tmp_path / "plain.onnx")
    fuse(path, tmp_path / "fused.onnx", expect=1)
    report = quantize(tmp_path / "fused.onnx", tmp_path / "int8.onnx", photographs).found
    assert report.input_shape == (1, 3, 10, 12)
    assert {layer.name for layer in report.layers} == {"acmix_0.qkv", "acmix_0.convolution"}
    with pytest.raises(UserError, match="10x12 alone, not of 16x16"):
        quantize(tmp_path / "fused.onnx", tmp_path / "x.onnx", photographs, image_size=(16, 16))
    add = helper.make_node("Add", ["x", "z"], ["s"], name="s")
    onnx.save(graph_of(add, conv("y", "s", "w:8,3,3,3"), inputs=("x", "z")), tmp_path / "two.onnx")
    with pytest.raises(UserError, match=r"one image input .* takes x .*, z"):
        quantize(tmp_path / "two.onnx", tmp_path / "x.onnx", photographs, quantize_head=True)
    to_fp16(tmp_path / "fused.onnx", tmp_path / "half.onnx")
    with pytest.raises(UserError, match="is in float16, float32 is expected"):
        quantize(tmp_path / "half.onnx", tmp_path / "x.onnx", photographs)
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("name", [pytest.param(19, marks=pytest.mark.soak), "half"])
def test_rtx_builds_int8(quantized, name, tmp_path_factory):
    """TensorRT-RTX's parser and builder take the files, with the function bodies."""
    folder = os.environ.get("ACMIX_TENSORRT_RTX")
    spec = PathFinder.find_spec("tensorrt_rtx_libs", [folder] if folder else sys.path)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no TensorRT-RTX: pip install tensorrt-rtx-cu13, or name its folder in ACMIX_TENSORRT_RTX")
    libraries = Path(spec.submodule_search_locations[0])
    links = tmp_path_factory.mktemp("rtx")
    (links / "libtensorrt_rtx.so").symlink_to(libraries / "libtensorrt_rtx.so.1")
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{links}:{libraries}", "PYTHONPATH": folder or ""}
    script = ROOT / "tests/plugin/tensorrt_rtx_plugin.py"
    command = [sys.executable, script, "build", "-", quantized[name].path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment)
    for answer in json.loads(done.stdout.splitlines()[-1]):
        assert answer["parsed"], answer
        assert answer["built"], answer
        assert answer["errors"] == []
