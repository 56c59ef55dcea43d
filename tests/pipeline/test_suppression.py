"""`export --nms`: files that suppress boxes, through every stage and comparison, against those that do not."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from acmix_deploy.artifacts import read_artifact
from acmix_deploy.cli import main
from acmix_deploy.detection.images import find, read
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.doctor.graphs import examine_onnx
from acmix_deploy.engine.build import build
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.forms import write_for
from acmix_deploy.fusion import fuse
from acmix_deploy.network import check_suppression
from acmix_deploy.precision import quantize, to_fp16
from acmix_deploy.processing import Processing, attach, detach
from acmix_deploy.profile import profile
from acmix_deploy.report.model import ExportReport
from acmix_deploy.runtime.models import open_model
from acmix_deploy.runtime.onnxruntime import onnx_runner
from acmix_deploy.serving.detector import Detector
from acmix_deploy.targets import TARGETS
from acmix_deploy.verify import Candidate, Scenes, verify
from acmix_deploy.verify.run import compare_files
from scripts import shapes
from scripts.train_shapes import CHECKPOINT
from tests.engine.parts import make_engine
from tests.plugin.parts import rtx_libraries
from tests.serving.parts import serving

SQUARE = (3, 3, 160, 160)
AROUND = Processing("bgr", Suppression(confidence=0.3, iou=0.6, most=50))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.write(tmp_path_factory.mktemp("photos"), seed=5, count=4)


@pytest.fixture(scope="module")
def attached(shapes_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the trained detector, with pixels in front and suppression behind: plain.onnx and fused.onnx."""
    folder = tmp_path_factory.mktemp("attached")
    model = onnx.load(shapes_files / "plain.onnx")
    attach(model, AROUND)
    onnx.save(model, folder / "plain.onnx")
    fuse(folder / "plain.onnx", folder / "fused.onnx", expect=3)
    return folder


def assert_same_network(path: Path, other: Path) -> None:
    model, plain = onnx.load(path), onnx.load(other)
    assert detach(model) == AROUND
    assert model.SerializeToString(deterministic=True) == plain.SerializeToString(deterministic=True)


def test_stages_see_the_network_alone(attached: Path, shapes_files: Path, photos: Path, tmp_path: Path) -> None:
    plain, fused = shapes_files / "shapes.fused.onnx", attached / "fused.onnx"
    assert_same_network(fused, plain)
    for source, name in ((plain, "plain"), (fused, "attached")):
        to_fp16(source, tmp_path / f"{name}.fp16.onnx", fp16_io=True)
        quantize(source, tmp_path / f"{name}.int8.onnx", photos)
    assert_same_network(tmp_path / "attached.fp16.onnx", tmp_path / "plain.fp16.onnx")
    assert_same_network(tmp_path / "attached.int8.onnx", tmp_path / "plain.int8.onnx")
    found = compare_files(plain, tmp_path / "attached.int8.onnx", images=photos)
    assert found.passed, found
    assert [one.expected > 5 for one in found.detections] == [True]


def test_boxes_are_those_of_the_file_without_box_by_box(
    shapes_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [read(path) for path in find(photos).paths]
    model = onnx.load(shapes_model)
    attach(model, AROUND)
    onnx.save(model, tmp_path / "inside.onnx")
    with (
        Detector.load(tmp_path / "inside.onnx", confidence=0.3) as inside,
        Detector.load(shapes_model, confidence=0.3, iou=0.6) as outside,
    ):
        assert (inside.head.layout, outside.head.layout) == ("rows", "anchors")
        assert inside.outputs[0].dims == ("batch", 50, 6)
        for found, right in zip(inside(images), outside(images), strict=True):
            assert len(right.scores) > 1
            for name in ("boxes", "scores", "classes"):
                np.testing.assert_allclose(getattr(found, name), getattr(right, name), rtol=1e-5, atol=1e-3)
    for confidence, notes in (("0.1", 1), ("0.3", 0)):
        assert main(["detect", str(tmp_path / "inside.onnx"), str(photos), "--confidence", confidence]) == 0
        assert capsys.readouterr().err.count("gives none of a score up to 0.3") == notes


def test_files_are_compared_by_their_networks(attached: Path, shapes_files: Path, photos: Path) -> None:
    plain = shapes_files / "plain.onnx"
    for reference, candidate, more in (
        (plain, attached / "plain.onnx", photos),
        (attached / "fused.onnx", plain, None),
    ):
        found = compare_files(reference, candidate, images=more)
        assert found.passed
        assert {one.output for one in found.comparisons} == {"boxes", "scores"}
        assert len(found.detections) == (more is not None)
        assert any("suppresses boxes: the network in it was compared" in note for note in found.notes)
        assert {one.max_abs for one in found.comparisons} == {0.0} or candidate == plain


@pytest.mark.parametrize(("name", "value"), [("iou", 0.1), ("confidence", 0.6), ("lowest", 0), ("half", 0.4)])
def test_a_file_that_keeps_other_boxes_fails(
    attached: Path, shapes_files: Path, photos: Path, tmp_path: Path, name: str, value: float
) -> None:
    model = onnx.load(attached / "plain.onnx")
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == f"acmix_nms/{name}")
    changed = np.full_like(numpy_helper.to_array(tensor), value)
    check_suppression(model, "as it was")
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    with pytest.raises(CheckFailed, match=r"of drawn ones"):
        check_suppression(model, "changed")
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(CheckFailed, match=r"changed\.onnx keeps other boxes than suppression outside the file"):
        compare_files(shapes_files / "plain.onnx", tmp_path / "changed.onnx", images=photos)


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_nodes_that_are_not_as_they_were_are_told_without_a_traceback(
    attached: Path, shapes_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(attached / "plain.onnx")
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "changed.onnx")
    assert main(["verify", str(shapes_files / "plain.onnx"), str(tmp_path / "changed.onnx")]) == 2
    assert "are not as they were" in capsys.readouterr().err
    gc.collect()


def test_that_nothing_was_kept_is_said(attached: Path, shapes_files: Path) -> None:
    found = compare_files(shapes_files / "plain.onnx", attached / "plain.onnx")
    assert [note for note in found.notes if "it kept none in these inputs" in note]


def test_other_settings_are_told(attached: Path, shapes_files: Path, photos: Path, tmp_path: Path) -> None:
    model = onnx.load(shapes_files / "plain.onnx")
    attach(model, Processing(suppression=Suppression(confidence=0.6)))
    onnx.save(model, tmp_path / "other.onnx")
    for candidate, told in ((tmp_path / "other.onnx", 1), (attached / "fused.onnx", 0)):
        notes = compare_files(attached / "plain.onnx", candidate, images=photos).notes
        assert len([note for note in notes if "by other settings than plain.onnx" in note]) == told


def engine(path: Path, how: Suppression | None) -> Candidate:
    """As an engine is run, of which the rows alone are seen."""
    return Candidate(onnx_runner(path, path.name), suppression=how)


def test_rows_alone_are_compared_with_what_is_kept_of_the_reference(
    attached: Path, shapes_files: Path, photos: Path
) -> None:
    plain = open_model(shapes_files / "plain.onnx")
    scenes = Scenes.read("images", photos, [SQUARE], plain.metadata, limit=4)
    how = AROUND.suppression
    assert how
    found = verify(plain.runner, [engine(attached / "fused.onnx", how)], scenes, metadata=plain.metadata)
    (detections,) = found.detections
    assert found.passed
    assert detections.matched > 5
    assert detections.confidence > how.confidence
    assert any("its rows were compared" in note for note in found.notes)
    rows = verify(plain.runner, [engine(attached / "fused.onnx", how)], scenes.feeds, metadata=plain.metadata)
    assert rows.passed
    assert {one.output for one in rows.comparisons} == {"boxes", "scores", "classes"}
    other = how.model_copy(update={"confidence": 0.8})
    wrong = verify(plain.runner, [engine(attached / "fused.onnx", other)], scenes.feeds, metadata=plain.metadata)
    assert not wrong.passed


def test_engines(gpu: None, attached: Path, shapes_files: Path, photos: Path, tmp_path: Path) -> None:
    model = onnx.load(attached / "plain.onnx")
    last = (1, 160, 160, 3), (3, 160, 160, 3), (4, 160, 160, 3)
    path = make_engine(tmp_path / "model.engine", model, {"images": last}, metadata=ModelMetadata.of(model))
    assert compare_files(shapes_files / "plain.onnx", path, images=photos).passed
    assert compare_files(attached / "plain.onnx", path).passed
    with pytest.raises(UserError, match="Name the ONNX file as the reference"):
        compare_files(path, shapes_files / "plain.onnx")


def test_tensorrt_rtx_reads_it_and_cannot_build_it(attached: Path, tmp_path: Path) -> None:
    found = examine_onnx(attached / "plain.onnx", lambda step: None)
    assert found.findings == ()
    assert [note for note in found.notes if "NonMaxSuppression, which TensorRT-RTX reads and cannot build" in note]
    rtx_libraries()
    sizes = (1, 3, 160, 160), (1, 3, 160, 160), (2, 3, 160, 160)
    with pytest.raises(UserError, match="NonMaxSuppression, which TensorRT-RTX reads and cannot build"):
        build(attached / "plain.onnx", tmp_path / "model.engine", shapes=sizes, backend="tensorrt_rtx")


@pytest.mark.parametrize("name", ["jetpack-5.1", "jetpack-6.2", "tensorrt-11"])
def test_every_tensorrt_reads_it(attached: Path, tmp_path: Path, name: str) -> None:
    source = tmp_path / "model.fused.onnx"
    source.write_bytes((attached / "fused.onnx").read_bytes())
    made = write_for(TARGETS[name], source).found
    assert made.unread == {}
    assert ModelMetadata.of(onnx.load(tmp_path / made.file)).suppression == AROUND.suppression


def test_times_are_measured(attached: Path) -> None:
    (found,) = profile([attached / "plain.onnx"], input_shape=(1, 3, 160, 160), samples=2, seconds=0.1)
    assert found.input_shapes == {"images": (1, 160, 160, 3)}


def test_options_are_settings_by_their_usual_names(capsys: pytest.CaptureFixture[str]) -> None:
    from acmix_deploy.cli import parser

    def settings(*options: str) -> Suppression | None:
        found: Suppression | None = parser().parse_args(["export", "model.pt", *options]).nms
        return found

    assert settings() is None
    assert settings("--nms") == Suppression()
    assert settings("--nms", "agnostic") == Suppression(by_class=False)
    told = Suppression(confidence=0.4, iou=0.5, most=100, by_class=False)
    assert settings("--nms", "conf=0.4,iou=0.5,max_det=100,agnostic") == told
    for wrong in ("conf=2", "max_det=0", "max_det=1.5", "conf", "iou=x", "soft", "conf=0.1,conf=0.2", "by_class=1", ""):
        with pytest.raises(SystemExit):
            settings("--nms", wrong)
        assert "is not settings by commas: conf from 0 to below 1" in capsys.readouterr().err


def test_export(tmp_path: Path) -> None:
    command = ["export", str(CHECKPOINT), "--out", str(tmp_path), "--nms", "conf=0.3,max_det=20", "--opset", "17"]
    command += ["--batch", "2", "--no-profile", "--no-engine"]
    assert main(command) == 0
    report = ExportReport.model_validate_json((tmp_path / "report.json").read_text())
    assert report.passed
    assert report.export.outputs[0].shape == (2, 20, 6)
    assert report.export.suppression == Suppression(confidence=0.3, most=20)
    assert len([note for note in report.verification.notes if "suppresses boxes" in note]) == 2
    for role in ("plain", "fused"):
        path = report.files[role].artifact.path
        metadata = ModelMetadata.of(onnx.load(path))
        assert metadata.suppression == Suppression(confidence=0.3, most=20)
        assert metadata.nms
    assert read_artifact(report.files["plain"].artifact.path).settings["suppression"]["most"] == 20


def test_the_server_answers_with_what_the_file_without_finds(
    attached: Path, shapes_files: Path, photos: Path, tmp_path: Path
) -> None:
    """Pixels in and boxes out; what it cannot find is said."""
    with Detector.load(shapes_files / "shapes.fused.onnx", confidence=0.3, iou=0.6) as detector:
        expected = detector([read(path) for path in find(photos).paths])
    with serving(attached / "fused.onnx", tmp_path, "--confidence", "0.1") as server:
        assert server.client.get("/v1/model").json()["confidence"] == 0.3
        for path, right in zip(find(photos).paths, expected, strict=True):
            (found,) = server.detect(path.read_bytes()).json()["images"]
            assert [one["score"] for one in found["detections"]] == pytest.approx(right.scores.tolist(), abs=1e-5)
            boxes = [one["box"] for one in found["detections"]]
            np.testing.assert_allclose(np.array(boxes).reshape(-1, 4), right.boxes, atol=0.01)
        (image,) = server.client.get("/v2/models/fused").json()["inputs"]
        assert (image["datatype"], image["shape"][3]) == ("UINT8", 3)
        (note,) = [line["message"] for line in server.log if line["level"] == "warning"]
        assert "gives none of a score up to 0.3, so those from 0.1 on are missing" in note
