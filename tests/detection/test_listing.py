"""Images by a folder, a text file or the YAML of a data set: the same as Ultralytics finds."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from acmix_deploy.cli import main
from acmix_deploy.detection.images import find
from acmix_deploy.detection.listing import listed
from acmix_deploy.errors import MissingComponent, UserError


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train and val with folders in them, a list, and a YAML file beside."""
    root = tmp_path / "pets"
    for name in ("images/train/a.png", "images/val/b.png", "images/val/night/c.jpg", "images/val/notes.txt"):
        (file := root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.zeros((8, 8, 3), np.uint8)) if file.suffix != ".txt" else file.write_text("x")
    (root / "some.txt").write_text(
        "\ufeff./images/train/a.png\n\n" + str(root / "images/val/b.png") + "\nno image.txt\n"
    )
    monkeypatch.chdir(tmp_path)
    return root


def described(root: Path, **entries: object) -> Path:
    path = root / "data.yaml"
    path.write_text(json.dumps({"names": {0: "cat"}, **entries}))  # JSON is YAML
    return path


SPLITS = {
    "folder with folders": ({"train": "images/train", "val": "images/val"}, ["b.png", "c.jpg"]),
    "path beside the file": ({"path": ".", "train": "images/train", "val": "images/val"}, ["b.png", "c.jpg"]),
    "path from here": ({"path": "pets", "train": "images/train", "val": "images/val"}, ["b.png", "c.jpg"]),
    "above": ({"train": "../images/train", "val": "../images/val"}, ["b.png", "c.jpg"]),
    "list": ({"train": "images/train", "val": ["images/train", "images/val/night"]}, ["a.png", "c.jpg"]),
    "text": ({"train": "images/train", "val": "some.txt"}, ["a.png", "b.png"]),
}


@pytest.mark.parametrize("case", SPLITS)
def test_the_images_of_a_data_set_are_those_of_ultralytics(case: str, data_set: Path) -> None:
    entries, names = SPLITS[case]
    file = described(data_set, **entries)
    assert [path.name for path in listed(file)] == names
    assert [path.name for path in find(file).paths] == names
    utils = pytest.importorskip("ultralytics.data.utils", reason="ultralytics is not installed")
    utils.check_font = lambda font: None
    if case == "path beside the file":
        return  # Ultralytics looks for it in its own folder of data sets
    theirs = utils.check_det_dataset(str(file), autodownload=False)["val"]
    dataset = pytest.importorskip("ultralytics.data.base").BaseDataset
    found = dataset.get_img_files(type("", (), {"prefix": "", "fraction": 1.0})(), theirs)
    assert sorted(Path(path).resolve() for path in found) == sorted(path.resolve() for path in listed(file))


def test_other_things_that_hold_images(data_set: Path) -> None:
    assert [path.name for path in listed(data_set / "some.txt")] == ["a.png", "b.png"]
    assert [path.name for path in listed(data_set / "images")] == ["a.png", "b.png", "c.jpg"]
    assert [path.name for path in listed(data_set / "images/val")] == ["b.png"], "what lies below may be anything"
    assert [path.name for path in listed(described(data_set, train="images/train"))] == ["a.png"]


def test_what_is_wrong_with_a_data_set_is_told(data_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data_set / "bad.yaml").write_text("val: [")
    refused = {
        described(data_set, path="pets", val="images/test"): "val: images/test, which is not there",
        data_set / "bad.yaml": "cannot be read as YAML",
        data_set / "images/val/b.png": "is not a folder, nor a data set's .yaml",
        data_set / "nowhere.yaml": "is not a folder",
    }
    for path, said in refused.items():
        with pytest.raises(UserError, match=said):
            listed(path)
    with pytest.raises(UserError, match="names no images: it has neither val nor validation nor train"):
        listed(described(data_set, val=None))
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(MissingComponent, match="needs PyYAML"):
        listed(described(data_set, val="images/val"))


def test_every_verb_takes_a_data_set(data_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.serving.parts import tiny

    model = str(tiny(data_set / "a.onnx"))
    file = str(described(data_set, val="images/val"))
    assert main(["verify", model, str(tiny(data_set / "b.onnx")), "--data", file, "--json"]) in (0, 1)
    found = json.loads(capsys.readouterr().out)
    assert len(found["detections"][0]["images"]) == 2
    assert main(["export", str(data_set / "m.pt"), "--int8", "--data", str(described(data_set, val="x"))]) == 2
    assert "val: x, which is not there" in capsys.readouterr().err
