"""What an exporter left in a file is parsed once, entry by entry, and stays as it was written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from acmix_deploy import yolo
from acmix_deploy.cli import main
from acmix_deploy.detection.images import Letterbox
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import UserError
from tests.serving.parts import small, tiny

torch = pytest.importorskip("torch")

TOLD = {
    "task": "pose",
    "names": "{0: 'person', 1: 'bus'}",
    "stride": "32",
    "channels": "1",
    "imgsz": "[480, 640]",
    "min_size": "[64, 32]",
    "kpt_shape": "(17, 3)",
    "end2end": "True",
    "args": "{'batch': 1, 'nms': True}",
    "letterbox": '{"fit": "pad", "center": false, "scaleup": true, "padding_value": 0}',
    "author": "somebody",
}


def read(metadata: ModelMetadata) -> dict[str, Any]:
    return {name: getattr(metadata, name) for name in (*TOLD, "nms") if hasattr(ModelMetadata, name)}


def test_what_the_entries_mean() -> None:
    assert read(ModelMetadata(TOLD)) == {
        "task": "pose", "names": {0: "person", 1: "bus"}, "stride": 32, "channels": 1, "imgsz": (480, 640),
        "min_size": (64, 32), "kpt_shape": (17, 3), "end2end": True, "nms": True,
        "letterbox": Letterbox(center=False, padding_value=0),
    }  # fmt: skip
    assert read(ModelMetadata()) == {
        "task": None, "names": {}, "stride": 1, "channels": 3, "imgsz": (640, 640), "min_size": (1, 1),
        "kpt_shape": None, "end2end": False, "nms": False, "letterbox": Letterbox(),
    }  # fmt: skip
    assert ModelMetadata(TOLD).usual_shape == (1, 1, 480, 640)
    assert not ModelMetadata(TOLD | {"args": "{'batch': 1, 'nms': None}"}).nms


def test_values_are_spelt_as_they_are_read() -> None:
    values = read(ModelMetadata(TOLD))
    del values["nms"]
    spelt = ModelMetadata({"author": "somebody"}).updated(args={"batch": 1, "nms": True}, **values)
    assert read(spelt) == read(ModelMetadata(TOLD))
    assert spelt.entries["author"] == "somebody"
    assert spelt.entries["letterbox"] == TOLD["letterbox"]
    assert ModelMetadata(TOLD).updated(min_size=[96, 96]).entries == TOLD | {"min_size": "[96, 96]"}


def test_what_is_told_of_a_file_is_spelt_as_ultralytics_spells_it() -> None:
    told = ModelMetadata(TOLD).for_file((2, 3, 96, 128), ("batch", "height", "width"))
    size = {"imgsz": "[96, 128]", "batch": "2", "args": "{'batch': 2, 'dynamic': True, 'nms': True}"}
    assert told.entries == TOLD | size
    for axes in ((), ("batch",), ("height", "width")):
        args = f"{{'batch': 1, 'dynamic': {'batch' in axes}, 'nms': False}}"
        assert ModelMetadata().for_file((1, 3, 64, 64), axes).entries["args"] == args


def test_entries_stay_as_they_are() -> None:
    model = onnx.ModelProto()
    helper.set_model_props(model, odd := TOLD | {"names": "{ 0:'a' }", "self": "unknown", "imgsz": "junk"})
    metadata = ModelMetadata.of(model)
    assert metadata.updated(**ModelMetadata().entries).entries == metadata.model_dump() == odd
    assert ModelMetadata.model_validate_json(metadata.model_dump_json()) == metadata
    assert metadata.names == {0: "a"}, "one wrong entry spoils no other"


SIZES = ("x", "640", "[640]", "[1, 2, 3]", "['a', 'b']", "None", "[", "[0, 640]", "[640, -1]", "-" * 5000)


@pytest.mark.parametrize(
    ("entry", "told", "expected"),
    [
        *(("imgsz", told, "a height and a width, such as [640, 640]") for told in SIZES),
        *(("min_size", told, "a height and a width, such as [1, 1]") for told in SIZES),
        *(("names", told, "names by class, such as {0: 'person'}") for told in ("{0: o", "['a']", "f()", "{[]: 1}")),
        *(("stride", told, "a number of pixels, such as 32") for told in ("", "large", "0", "-8", "[32]")),
        ("channels", "three", "a number, such as 3"),
        *(("kpt_shape", told, "keypoints and values of each, such as [17, 3]") for told in ("17", "(17, 4)", "junk")),
        ("end2end", "perhaps", "True or False"),
        *(("args", told, "settings by name, such as {'nms': False}") for told in ("nms", "[1]")),
        *(("letterbox", told, "fit, center, scaleup, padding_value as JSON") for told in ("{bad", '{"center": 7}')),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_what_is_expected(entry: str, told: str, expected: str) -> None:
    wrong = re.escape(f"the metadata tell the {entry} {told!r:.60}, and expected are {expected}")
    with pytest.raises(UserError, match=f"^{wrong}\n"):
        getattr(ModelMetadata({entry: told}), entry if entry != "args" else "nms")


def test_images_of_less_than_the_smallest_size_are_refused() -> None:
    told = ModelMetadata({"min_size": "[128, 96]"})
    for metadata, shape in (
        (ModelMetadata(), (1, 3, 1, 1)),
        (told, (1, 3, 128, 96)),
        (told, (1, 128, 96, 3)),
        (told, (7, 5)),
    ):
        metadata.check_size("model", shape)
    for shape in ((1, 3, 127, 96), (4, 3, 200, 95), (1, 127, 96, 3), (4, 200, 95, 1)):
        with pytest.raises(UserError, match=r"model: images of .* are smaller than 128x96") as refusal:
            told.check_size("model", shape)
        assert "at least 128x96" in refusal.value.hint


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    cv2.imwrite(str(tmp_path / "photo.png"), np.zeros((32, 48, 3), np.uint8))
    return tmp_path


def test_a_wrong_size_ends_every_verb_alike(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the size is needed; what does not need the entry does not look at it."""
    file, out = str(small(photos / "a.onnx", imgsz="x")), ["-o", str(photos / "out")]
    model: Any = yolo.build("p5", num_classes=2)
    model.args = {"imgsz": [160]}
    torch.save({"model": model}, photos / "a.pt")
    needing = {
        "profile": [file],
        "verify": [str(tiny(photos / "b.onnx")), file],
        "detect": [file, str(photos / "photo.png")],
        "quantize": [file, "--calib", str(photos), *out],
        "package": ["triton", file, *out],
        "export": [str(photos / "a.pt"), "--out", out[1]],
    }
    for verb, arguments in needing.items():
        code = main([verb, *arguments])
        told = "[160]" if verb == "export" else "x"
        assert f"the metadata tell the imgsz {told!r}, and expected are a height and a width" in capsys.readouterr().err
        assert code == 2, verb
    assert main(["inspect", file]) == 0
    assert main(["profile", str(small(photos / "c.onnx", names="junk")), "--samples", "1"]) == 0
