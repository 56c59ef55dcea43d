"""`export --input uint8`: files that take bytes, through every stage and comparison, against those that take floats."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from acmix_deploy.artifacts import read_artifact
from acmix_deploy.cli import main
from acmix_deploy.detection.images import batches, find, tensor
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.doctor.graphs import examine_onnx
from acmix_deploy.engine.build import build
from acmix_deploy.errors import AcmixDeployError, UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.forms import write_for
from acmix_deploy.fusion import fuse
from acmix_deploy.plan import Plan
from acmix_deploy.processing import Processing, attach, detach
from acmix_deploy.profile import profile
from acmix_deploy.profile.subjects import RunSettings, open_subject
from acmix_deploy.report.model import ExportReport
from acmix_deploy.report.target import target_steps
from acmix_deploy.runtime.inputs import as_pixels, random_images
from acmix_deploy.runtime.models import open_model
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.runtime.tensorrt import EngineRunner
from acmix_deploy.serving.detector import Detector
from acmix_deploy.targets import TARGETS
from acmix_deploy.verify.judges import ByDetections, ByLabels
from acmix_deploy.verify.run import compare_files
from scripts import shapes
from tests.engine.parts import make_engine, make_plan
from tests.fusion.test_fuse import randomised
from tests.plugin.parts import rtx_libraries

ROLES = ("plain", "fused", "fp16", "int8")
SHAPES = ((1, 3, 32, 32), (1, 3, 32, 48), (2, 3, 64, 64))
LAST = ((1, 32, 32, 3), (1, 32, 48, 3), (2, 64, 64, 3))
Reports = dict[str, ExportReport]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write(tmp_path_factory.mktemp("photos"), seed=3, count=2)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Reports:
    """One block with free axes, in every type, of floats and of bytes in BGR."""
    folder = tmp_path_factory.mktemp("pixels")
    torch.manual_seed(0)
    block = randomised(ACmix(16, 16, head=2))
    torch.save(nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), block, nn.Conv2d(16, 8, 1)).eval(), folder / "model.pt")
    options = ["--dynamic", "--fp16-io", "--int8", "--calibration", str(photos), "--opset", "17", "--no-engine"]
    options += ["--input-shape", "1,3,32,32", "--no-profile"]
    found = {}
    for taken in ("float32", "uint8-bgr"):
        out = folder / taken
        assert main(["export", str(folder / "model.pt"), "--out", str(out), "--input", taken, *options]) == 0
        found[taken] = ExportReport.model_validate_json((out / "report.json").read_text())
    return found


def file(reports: Reports, taken: str, role: str = "fused") -> Path:
    return reports[taken].files[role].artifact.path


def test_options_name_orders() -> None:
    plans = [Plan(checkpoint=Path("model.pt"), no_engine=True, input=taken) for taken in ("uint8", "uint8-bgr")]
    assert [plan.pixels for plan in plans] == ["rgb", "bgr"]
    assert Plan(checkpoint=Path("model.pt"), no_engine=True).pixels is None


@pytest.fixture(scope="module")
def rgb(reports: Reports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain file as ``--input uint8`` writes it, in a folder of its own."""
    model = onnx.load(file(reports, "float32", "plain"))
    attach(model, Processing("rgb"))
    path = tmp_path_factory.mktemp("rgb") / "model.onnx"
    onnx.save(model, path)
    return path


def run(path: Path, images: np.ndarray) -> np.ndarray:
    return np.asarray(open_session(path).run(None, {"images": images})[0])


@pytest.mark.parametrize("role", ROLES)
def test_stages_see_the_network_alone(reports: Reports, role: str) -> None:
    """Same weights, scales and types: without what is in front it is the float file to the byte."""
    model, plain = onnx.load(file(reports, "uint8-bgr", role)), onnx.load(file(reports, "float32", role))
    assert plain.graph.input[0].type.tensor_type.elem_type == (
        TensorProto.FLOAT16 if role == "fp16" else TensorProto.FLOAT
    )
    assert detach(model) == Processing("bgr")
    assert model.SerializeToString(deterministic=True) == plain.SerializeToString(deterministic=True)


@pytest.mark.parametrize("role", ["plain", "fused", "int8"])
def test_bytes_give_what_floats_give_bit_by_bit(reports: Reports, role: str) -> None:
    for size in ((1, 32, 32), (2, 48, 64)):
        bgr = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        floats = np.stack([tensor(image) for image in bgr])
        expected = run(file(reports, "float32", role), floats)
        np.testing.assert_array_equal(run(file(reports, "uint8-bgr", role), bgr), expected)
        assert not np.array_equal(run(file(reports, "uint8-bgr", role), bgr[..., ::-1].copy()), expected)


def test_report_and_sidecar_say_what_the_file_takes(reports: Reports) -> None:
    report = reports["uint8-bgr"]
    (image,) = report.export.inputs
    assert (image.name, image.dtype, image.shape) == ("images", "uint8", ("batch", "height", "width", 3))
    assert report.export.checked_shapes == reports["float32"].export.checked_shapes
    assert report.passed
    assert {one.candidate for one in report.verification.comparisons} == {
        file(reports, "uint8-bgr", role).name for role in ROLES
    }
    assert read_artifact(file(reports, "uint8-bgr", "plain")).settings["pixels"] == "bgr"
    assert read_artifact(file(reports, "float32", "plain")).settings["pixels"] is None
    assert report.export.shapes_to_build == reports["float32"].export.shapes_to_build


def exact(reference: Path, candidate: Path, images: Path | None = None) -> bool:
    found = compare_files(reference, candidate, images=images, input_shape=(1, 3, 32, 32))
    assert len({str(one.input_shapes) for one in found.comparisons}) > 1
    return found.passed is True and max(one.max_abs or 0.0 for one in found.comparisons) == 0


def test_files_of_both_kinds_are_compared(reports: Reports, rgb: Path, photos: Path, tmp_path: Path) -> None:
    floats, bgr = (file(reports, taken, "plain") for taken in ("float32", "uint8-bgr"))
    assert exact(floats, bgr, photos)
    assert exact(bgr, floats)
    assert exact(bgr, rgb)
    other = onnx.load(rgb)
    helper.set_model_props(other, ModelMetadata.of(other).updated(pixels="bgr").entries)
    onnx.save(other, tmp_path / "other.onnx")
    found = compare_files(floats, tmp_path / "other.onnx", input_shape=(1, 3, 32, 32))
    assert found.passed is False, "metadata that tell another order than the file has"


def test_float16_is_looked_into(reports: Reports) -> None:
    floats, pixels = (
        compare_files(file(reports, taken), file(reports, taken, "fp16"), input_shape=(1, 3, 32, 32), layers=True)
        for taken in ("float32", "uint8-bgr")
    )
    assert pixels.passed
    assert pixels.half == floats.half
    assert pixels.layers == floats.layers
    assert pixels.comparisons == floats.comparisons
    assert pixels.rounded == floats.rounded != ()


def test_times_are_those_of_bytes(reports: Reports, photos: Path) -> None:
    path = file(reports, "uint8-bgr")
    setup = RunSettings(input_shape=(2, 3, 32, 48), images=photos)
    (image,) = open_subject(path, setup).feed.values()
    letterbox = ModelMetadata().letterbox
    expected = next(batches(find(photos).paths, [(2, 3, 32, 48)], letterbox))
    np.testing.assert_array_equal(image, as_pixels(expected, "bgr"))
    (found,) = profile([path], input_shape=(1, 3, 32, 32), samples=2, seconds=0.1, layers=True)
    assert found.input_shapes == {"images": (1, 32, 32, 3)}


def test_nothing_is_wrong_with_it(rgb: Path) -> None:
    found = examine_onnx(rgb, lambda step: None)
    assert found.findings == found.notes == ()
    assert found.contents["input images"] == "uint8 ['batch', 'height', 'width', 3]"
    assert [block.fused for block in found.graph_blocks] == [True]


def test_judges_of_int8_see_the_same(shapes_files: Path, photos: Path, tmp_path: Path) -> None:
    plain = shapes_files / "plain.onnx"
    network = onnx.load(plain)
    of_pixels = onnx.load(plain)
    attach(of_pixels, Processing("bgr"))
    onnx.save(of_pixels, tmp_path / "pixels.onnx")
    shape = (2, 3, 160, 160)
    for judge in (ByLabels, ByDetections):
        floats, pixels = (judge(path, shape, photos, 0.5) for path in (plain, tmp_path / "pixels.onnx"))
        assert pixels.reference == floats.reference
        assert {"map_drop": 0, "lost": 0}.items() & pixels(network).items()


def test_engines(gpu: None, reports: Reports, tmp_path: Path) -> None:
    path = file(reports, "uint8-bgr")
    model = onnx.load(path)
    engine = make_engine(tmp_path / "model.engine", model, {"images": LAST}, metadata=ModelMetadata.of(model))
    opened = open_model(engine)
    assert (opened.inputs[0].dims, opened.profiles) == ((None, 3, None, None), {"images": SHAPES})
    assert compare_files(file(reports, "float32"), engine).passed
    images = random_images(SHAPES[1])
    with EngineRunner(engine) as runner:
        (from_floats,), (from_bytes,) = (
            runner.infer({"images": given}).values() for given in (images, as_pixels(images, "bgr"))
        )
        np.testing.assert_array_equal(from_floats, from_bytes)
        with pytest.raises(UserError, match=r"built for \[1, 32, 32, 3\] to \[2, 64, 64, 3\], and is given \[4, 32"):
            runner.infer({"images": random_images((4, 3, 32, 32))})
        with pytest.raises(UserError, match="no levels"):
            runner.infer({"images": images + np.float32(1e-3)})
    (timed,) = profile([engine], samples=2)
    assert timed.input_shapes == {"images": LAST[1]}


def test_a_detector_gives_an_engine_bytes(gpu: None, shapes_model: Path, tmp_path: Path) -> None:
    model = onnx.load(shapes_model)
    attach(model, Processing("bgr"))
    sizes = {"images": ((1, 160, 160, 3), (2, 160, 160, 3), (2, 160, 160, 3))}
    engine = make_engine(tmp_path / "model.engine", model, sizes, metadata=ModelMetadata.of(model))
    images = [scene.image for scene in shapes.images(4, 3)]
    with Detector.load(engine) as detector, Detector.load(shapes_model) as floats:
        assert (detector.input_shape, detector.inputs[0].dtype) == ((2, 3, 160, 160), np.uint8)
        for found, expected in zip(detector(images), floats(images), strict=True):
            assert len(expected.scores) > 0
            np.testing.assert_allclose(found.boxes, expected.boxes, rtol=1e-5)


def test_an_adopted_engine_takes_what_its_file_takes(gpu: None, rgb: Path, tmp_path: Path) -> None:
    engine = make_plan(tmp_path / "model.engine", onnx.load(rgb), {"images": LAST})
    assert main(["adopt", str(engine), "--metadata", str(rgb)]) == 0
    opened = open_model(engine)
    assert (opened.metadata.pixels, opened.inputs[0].dims) == ("rgb", (None, 3, None, None))
    assert opened.profiles == {"images": SHAPES}


def test_sizes_are_those_of_images(gpu: None, rgb: Path, tmp_path: Path) -> None:
    """On the command line [B, C, H, W]; TensorRT is told the file's own axes."""
    model = onnx.load(rgb)
    helper.set_model_props(model, ModelMetadata.of(model).updated(stride=8, min_size=[16, 24]).entries)
    onnx.save(model, tmp_path / "model.onnx")
    sizes = [f"--{name}={','.join(map(str, shape))}" for name, shape in zip(("min", "opt", "max"), SHAPES, strict=True)]
    assert main(["build", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "e.engine"), *sizes]) == 0
    assert open_model(tmp_path / "e.engine").profiles == {"images": SHAPES}
    assert json.loads((tmp_path / "e.engine.json").read_text())["settings"]["profiles"] == {
        "images": [[*shape] for shape in LAST]
    }
    for first, words in (
        ((1, 3, 16, 16), r"16x16 pixels are smaller than 16x24"),
        ((1, 3, 36, 32), r"no multiple of 8"),
        ((1, 1, 32, 32), r"does not fit input images \['batch', 3, 'height', 'width'\]"),
    ):
        with pytest.raises(UserError, match=words):
            build(tmp_path / "model.onnx", tmp_path / "other", shapes=(first, *SHAPES[1:]))
    with pytest.raises(UserError, match="Ultralytics feeds floats"):
        build(tmp_path / "model.onnx", tmp_path / "other", shapes=SHAPES, ultralytics=True)


def test_tensorrt_rtx_takes_the_front(reports: Reports, tmp_path: Path) -> None:
    rtx_libraries()
    source = file(reports, "uint8-bgr", "fp16")
    made = build(source, tmp_path / "model.engine", shapes=SHAPES, backend="tensorrt_rtx")
    (image,) = made.found.manifest.inputs
    assert (image.dtype, image.shape) == ("UINT8", (-1, -1, -1, 3))
    assert made.found.manifest.profiles == {"images": LAST}
    model = onnx.load(source)
    cast, transpose = model.graph.node[:2]
    cast.op_type, transpose.op_type = "Transpose", "Cast"
    attributes = [onnx.AttributeProto.FromString(node.attribute[0].SerializeToString()) for node in (transpose, cast)]
    for node, attribute in zip((cast, transpose), attributes, strict=True):
        node.attribute[0].CopyFrom(attribute)
    onnx.save(model, tmp_path / "transposed.onnx")
    with pytest.raises(AcmixDeployError, match="UInt8"):
        build(tmp_path / "transposed.onnx", tmp_path / "other", shapes=SHAPES, backend="tensorrt_rtx")


@pytest.mark.parametrize("name", ["jetpack-5.1", "jetpack-6.2", "tensorrt-11"])
def test_every_tensorrt_reads_it(reports: Reports, tmp_path: Path, name: str) -> None:
    source = tmp_path / "model.fused.onnx"
    source.write_bytes(file(reports, "uint8-bgr").read_bytes())
    made = write_for(TARGETS[name], source).found
    assert made.unread == {}
    assert ModelMetadata.of(onnx.load(tmp_path / made.file)).pixels == "bgr"
    steps = "\n".join(target_steps(made, "r.onnx", "float32", SHAPES, "images", pixels=True, detector=False))
    assert "--minShapes=images:1x32x32x3 --optShapes=images:1x32x48x3 --maxShapes=images:2x64x64x3" in steps
    assert ("--min 1,3,32,32 --opt 1,3,32,48" in steps) == TARGETS[name].package


def foreign(path: Path, dims: list[object]) -> Path:
    """Bytes that nobody told of, which a Cast reads."""
    nodes = [helper.make_node("Cast", ["images"], ["x"], "cast", to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("Sigmoid", ["x"], ["y"], "sigmoid"))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, dims)
    graph = helper.make_graph(nodes, "g", [images], [helper.make_tensor_value_info("y", TensorProto.FLOAT, dims)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("dims", [["b", 3, 16, 24], [1, 16, 24, 3]])
def test_bytes_that_nobody_told_of_stay_what_they_are(tmp_path: Path, dims: list[object]) -> None:
    source = foreign(tmp_path / "a.onnx", dims)
    opened = open_model(source)
    assert (opened.inputs[0].dims, opened.inputs[0].dtype) == (tuple(dims), np.uint8)
    fuse(source, tmp_path / "b.onnx")
    assert onnx.load(tmp_path / "b.onnx").graph.input == onnx.load(source).graph.input
    shape = tuple(1 if dim == "b" else dim for dim in dims)
    assert compare_files(source, tmp_path / "b.onnx", input_shape=shape).passed
    (found,) = profile([source], input_shape=shape, samples=2, seconds=0.1)
    assert found.input_shapes == {"images": shape}


def test_bytes_that_nobody_told_of_are_not_compared_with_floats(rgb: Path, reports: Reports, tmp_path: Path) -> None:
    model = onnx.load(rgb)
    kept = [entry for entry in model.metadata_props if entry.key != "pixels"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "untold.onnx")
    for pair in ((file(reports, "float32"), tmp_path / "untold.onnx"), (tmp_path / "untold.onnx", rgb)):
        with pytest.raises(UserError, match=r"different inputs: .* uint8") as caught:
            compare_files(*pair)
        assert "the order of its pixels" in caught.value.hint


def test_images_have_three_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Conv2d(1, 4, 3).eval(), tmp_path / "grey.pt")
    command = ["export", str(tmp_path / "grey.pt"), "--out", str(tmp_path / "out"), "--input-shape", "1,1,32,32"]
    assert main([*command, "--input", "uint8", "--opset", "17"]) == 2
    assert "images in uint8 have three channels" in capsys.readouterr().err
    assert not (tmp_path / "out/grey.onnx").exists()


def test_a_wrong_front_fails_the_export(
    reports: Reports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are compared with the checkpoint as they are written, what is in front included."""
    checkpoint = file(reports, "float32").parents[1] / "model.pt"

    def darker(model: onnx.ModelProto, processing: Processing) -> None:
        attach(model, processing)
        (white,) = (tensor for tensor in model.graph.initializer if tensor.name == "acmix_input/Div/operand")
        white.CopyFrom(numpy_helper.from_array(np.float32(256), white.name))

    monkeypatch.setattr(sys.modules["acmix_deploy.export"], "attach", darker)
    command = ["export", str(checkpoint), "--out", str(tmp_path), "--input", "uint8", "--input-shape", "1,3,32,32"]
    assert main([*command, "--no-profile", "--no-engine", "--opset", "17"]) == 1
    printed = capsys.readouterr()
    assert "model.onnx" in printed.out, printed
    assert "fault of acmix-deploy" not in printed.err, printed
