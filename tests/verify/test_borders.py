"""`verify --pad`: what a border of another grey costs."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest

from acmix_deploy import cli
from acmix_deploy.detection.images import Letterbox, read
from acmix_deploy.detection.suppression import CONFIDENCE, Suppression
from acmix_deploy.errors import UserError
from acmix_deploy.processing import Processing, attach
from acmix_deploy.serving.detector import Detector
from acmix_deploy.verify import compare_borders
from scripts import shapes
from tests.serving.parts import tiny

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled scenes that are wider than high, so that they have a border, and one that is square."""
    folder = shapes.write(tmp_path_factory.mktemp("photos"), 5, 6)
    for path in sorted(folder.glob("*.png"))[1:]:
        image = cv2.imread(str(path))
        cv2.imwrite(str(path), cv2.resize(image, (240, 160)))
    return folder


def with_border(model: Path, target: Path, grey: int) -> Path:
    """The same file, whose metadata tell another border."""
    changed = onnx.load(model)
    kept = [entry for entry in changed.metadata_props if entry.key != "letterbox"]
    del changed.metadata_props[:]
    changed.metadata_props.extend(kept)
    letterbox = Letterbox(padding_value=grey).model_dump_json()
    changed.metadata_props.append(onnx.StringStringEntryProto(key="letterbox", value=letterbox))
    onnx.save(changed, target)
    return target


@pytest.mark.parametrize("grey", [0, pytest.param(255, marks=pytest.mark.soak)])
def test_detections_are_those_of_a_file_with_that_border(
    grey: int, shapes_model: Path, photos: Path, tmp_path: Path
) -> None:
    found = compare_borders(shapes_model, shapes_model, photos, grey)
    other = with_border(shapes_model, tmp_path / "other.onnx", grey)
    ((detections),) = found.detections
    assert len(detections.images) == 6
    expected = {"reference": shapes_model, "candidate": other}
    for side, path in expected.items():
        with Detector.load(path) as detector:
            for image in detections.images:
                ours = [getattr(pair, side) for pair in image.pairs]
                scores = sorted(one.score for one in ours if one and one.score > CONFIDENCE)
                (right,) = detector([read(image.image)])
                np.testing.assert_allclose(scores, sorted(right.scores), atol=1e-4)
    square = min(detections.images, key=lambda image: image.image.name)
    assert all(pair.score_change == 0 and pair.outcome == "matched" for pair in square.pairs)
    assert detections.mean_score_change != 0
    with_other = compare_borders(other, other, photos, 114)
    assert [one.map50_95 for one in found.accuracy] == [one.map50_95 for one in reversed(with_other.accuracy)]
    assert found.accuracy[0].map50 > 0.8
    assert found.comparisons == ()
    assert any(f"a border of {grey}" in note for note in found.notes)


def test_what_is_lost_fails(shapes_model: Path, photos: Path) -> None:
    found = compare_borders(shapes_model, shapes_model, photos, 0)
    assert found.judged_by(lost=1.0, score_change=1.0, iou=0.0).passed is True
    assert found.judged_by(score_change=0.0).passed is False
    nothing = compare_borders(shapes_model, shapes_model, photos, 0, confidence=1.0)
    assert nothing.passed is None


def test_images_without_a_border_are_told(shapes_model: Path, photos: Path, tmp_path: Path) -> None:
    found = compare_borders(shapes_model, shapes_model, photos, 0)
    assert any("5 of 6 have one" in note for note in found.notes)
    square = min(photos.glob("*.png"))
    (tmp_path / square.name).write_bytes(square.read_bytes())
    with pytest.raises(UserError, match=r"no image of .* has a border at 160x160"):
        compare_borders(shapes_model, shapes_model, tmp_path, 0)


def test_boxes_are_counted_of_the_images_that_are_compared(shapes_model: Path, photos: Path, tmp_path: Path) -> None:
    model = onnx.load(shapes_model)
    attach(model, Processing(suppression=Suppression()))
    onnx.save(model, tmp_path / "model.onnx")
    found = compare_borders(tmp_path / "model.onnx", tmp_path / "model.onnx", photos, 0)
    assert found.accuracy
    ((detections),) = found.detections
    assert [note for note in found.notes if f"its boxes, {detections.expected} in all inputs" in note]


def test_command_line(shapes_model: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["verify", str(shapes_model), "--images", str(photos), "--pad", "0", "--max-lost", "1"]
    code = cli.main([*command, "--max-score-change", "1", "--min-iou", "0", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (code, document["passed"], document["comparisons"]) == (0, True, [])
    assert document["detections"][0]["candidate"] == "shapes.fused.onnx on a border of 0"
    assert cli.main([*command, "--max-score-change", "0"]) == 1
    assert "on a border of 0" in capsys.readouterr().out


def test_where_there_is_no_such_border(
    shapes_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="114 is the border"):
        compare_borders(shapes_model, shapes_model, photos, 114)
    stretched = tiny(tmp_path / "tiny.onnx")
    model = onnx.load(stretched)
    model.metadata_props.append(onnx.StringStringEntryProto(key="head", value="RTDETRDecoder"))
    onnx.save(model, stretched)
    with pytest.raises(UserError, match="without a border"):
        compare_borders(stretched, stretched, photos, 0)
    for words, why in (
        (["--pad", "0"], "--images"),
        (["--pad", "256", "--images", str(photos)], "a grey, 0 to 255"),
        (["--pad", "-1", "--images", str(photos)], "a grey, 0 to 255"),
        (["--pad", "0", "--images", str(photos), "--layers"], "--layers"),
    ):
        with suppress(SystemExit):
            assert cli.main(["verify", str(shapes_model), *words]) == 2
        assert why in capsys.readouterr().err
