"""Mean average precision is COCO's, of the labels that lie beside the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from acmix_deploy.cli import main
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import UserError
from acmix_deploy.report.documents import VerifyDocument
from acmix_deploy.verify.accuracy import (
    Labels,
    Seen,
    Truth,
    average_precision,
    label_file,
    labelled,
    read_labels,
    read_truth,
)
from scripts import shapes
from tests.detection.test_boxes import found

pytest.importorskip("pycocotools", reason="pycocotools is not installed")

SIZE = (100, 200)


def labels(*rows: tuple[list[float], int]) -> Labels:
    boxes = np.array([box for box, _ in rows], np.float32).reshape(-1, 4) / (200, 100, 200, 100)
    return Labels(np.array([kind for _, kind in rows], np.int64), boxes.astype(np.float32))


A, B, C = [0.0, 0, 40, 40], [60.0, 0, 100, 40], [120.0, 0, 160, 40]


@pytest.mark.parametrize(
    ("truth", "detections", "map50", "map50_95"),
    [
        pytest.param([(A, 0), (B, 0)], [(A, 0.9, 0), (B, 0.8, 0)], 1, 1, id="all"),
        pytest.param([(A, 0), (B, 0)], [(A, 0.9, 0)], 51 / 101, 51 / 101, id="half of them"),
        pytest.param([(A, 0), (B, 1)], [(A, 0.9, 0), (B, 0.8, 0)], 0.5, 0.5, id="another class"),
        pytest.param([(A, 0)], [(C, 0.9, 0), (A, 0.8, 0)], 0.5, 0.5, id="a better one is wrong"),
        pytest.param([(A, 0)], [([0, 0, 40, 31], 0.9, 0)], 1, 0.6, id="an overlap of 0.775"),
        pytest.param([(A, 0)], [], 0, 0, id="nothing"),
        pytest.param([(A, 0)], [(A, 0.9, 0), (B, 0.1, 7)], 1, 1, id="a class that no label has"),
    ],
)
def test_average_precision(truth: list, detections: list, map50: float, map50_95: float) -> None:
    """The mean of the precision at 101 recalls."""
    values = average_precision([Seen(labels(*truth), found(*detections), SIZE)])
    assert values == pytest.approx((map50, map50_95), abs=1e-5)


def of(task: str, names: str = "{}") -> ModelMetadata:
    return ModelMetadata({"task": task, "names": names})


def test_labels_in_every_form(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.3 0.1 0.2 0.6\n")
    found = read_labels(file, of("segment"))
    assert found.classes.tolist() == [1, 0]
    np.testing.assert_allclose(found.boxes, [[0.4, 0.3, 0.6, 0.7], [0.1, 0.1, 0.3, 0.6]], rtol=1e-6)
    file.write_text("0 0.5 0.5 0.2 0.4 0.1 0.2 2 0.3 0.3 1\n")
    np.testing.assert_allclose(read_labels(file, of("pose")).boxes, [[0.4, 0.3, 0.6, 0.7]], rtol=1e-6)
    file.write_text("")
    assert read_labels(file, of("detect")).boxes.shape == (0, 4)
    wrong = (
        "0 0.5 0.5 0.2", "car 0.5 0.5 0.2 0.1", "nan 0.5 0.5 0.2 0.1", "0 0.1 0.1 0.3 0.1 0.2", "1.5 0.5 0.5 0.2 0.1",
        "0 320 240 64 64", "0 0.5 nan 0.2 0.1", "-1 0.5 0.5 0.2 0.1",
    )  # fmt: skip
    for line in wrong:
        file.write_text(f"{line}\n0 0.5 0.5 0.2 0.4\n")
        found = read_labels(file, of("detect"))
        assert [why.partition(" is ")[0] for why in found.unusable] == ["a.txt, line 1"], line
        assert found.classes.tolist() == [0]
    file.write_bytes(b"\xff\xfe0 0.5\n")
    assert len(read_labels(file, of("detect")).unusable) == 1


def test_labels_that_cannot_be_used(tmp_path: Path) -> None:
    """One in ten is left out and named; more are refused."""
    names = of("detect", "{0: 'a', 1: 'b'}")

    def truth(*lines: str) -> Truth:
        (tmp_path / "a.txt").write_text("\n".join(lines))
        return read_truth([tmp_path / "a.jpg"], names)

    good = ["1 0.5 0.5 0.2 0.4"] * 9
    found = truth(*good, "2 0.5 0.5 0.2 0.4")
    assert found.objects == 9
    assert found.notes == ("1 of 10 labels are left out: a.txt, line 10 is of the class 2, and the model has 2",)
    assert truth(*good).notes == ()
    with pytest.raises(UserError, match=r"2 of 11 labels cannot be used, and at most 10% may be so: a.txt, line 10"):
        truth(*good, "2 0.5 0.5 0.2 0.4", "0 0.5")
    assert truth().objects == 0, "a background"


def test_where_labels_are(tmp_path: Path) -> None:
    assert label_file(Path("/a/images/val/images/1.jpg")) == Path("/a/images/val/labels/1.txt")
    assert label_file(Path("/a/images/val/1.jpg")) == Path("/a/labels/val/1.txt")
    assert label_file(Path("/a/photos/1.jpg")) == Path("/a/photos/1.txt")
    (tmp_path / "1.txt").touch()
    assert labelled([tmp_path / "1.jpg", tmp_path / "2.jpg"]) == [tmp_path / "1.jpg"]


def test_the_trained_detector(shapes_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Near to Ultralytics' own figure on the same images; both files, and no word of it without labels."""
    folder = shapes.write(tmp_path / "val", 3, 12)
    (tmp_path / "val.yaml").write_text(f"path: {folder.parent}\nval: {folder.name}\nnames: [a]\n")
    other = tmp_path / "other.onnx"
    other.write_bytes(shapes_model.read_bytes())
    report = tmp_path / "verify.json"
    command = ["verify", str(shapes_model), str(other), "--input-shape", "4,3,160,160", "-o", str(report)]
    assert main([*command, "--images", str(tmp_path / "val.yaml")]) == 0
    assert "mAP50" in capsys.readouterr().out
    right, same = VerifyDocument.model_validate_json(report.read_text()).accuracy
    assert (right.name, right.images) == (shapes_model.name, 12)
    assert same == right.model_copy(update={"name": "other.onnx"})
    assert right.objects > 20
    assert 0.7 < right.map50_95 < right.map50 <= 1
    for path in folder.parent.glob("labels/*"):
        path.write_text("a photograph of shapes\n")
    assert main([*command, "--images", str(folder)]) == 0
    assert "mean average precision was not measured: 12 of 12 labels" in " ".join(capsys.readouterr().out.split())
    for path in folder.parent.glob("labels/*"):
        path.unlink()
    assert main([*command, "--images", str(folder)]) == 0
    assert VerifyDocument.model_validate_json(report.read_text()).accuracy == ()
