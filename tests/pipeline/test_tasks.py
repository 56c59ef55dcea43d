"""Models of every task and head, from a checkpoint to what `predict` of Ultralytics finds with the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from torch import nn

from acmix_deploy import yolo
from acmix_deploy.checkpoint.source import load_source
from acmix_deploy.cli import main
from acmix_deploy.detection.metadata import Task
from acmix_deploy.export import export
from acmix_deploy.fusion import fuse
from acmix_deploy.report.documents import VerifyDocument
from acmix_deploy.serving.detector import Detector

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
ultralytics = pytest.importorskip("ultralytics", reason="ultralytics is not installed")

from tests.untrained import settled  # noqa: E402, it imports Ultralytics

BACKBONE = [
    [-1, 1, "Conv", [16, 3, 2]],
    [-1, 1, "Conv", [32, 3, 2]],
    [-1, 1, "Conv", [32, 3, 2]],
    [-1, 1, "ACmix", [32]],
    [-1, 1, "Conv", [64, 3, 2]],
]
CLASSES, CONFIDENCE = 3, 0.3
HEADS: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "detect": ("Detect", ["nc"], {}),
    "end-to-end": ("Detect", ["nc"], {"end2end": True, "reg_max": 1}),
    "segment": ("Segment", ["nc", 8, 16], {}),
    "segment end-to-end": ("Segment26", ["nc", 8, 16], {"end2end": True, "reg_max": 1}),
    "pose": ("Pose", ["nc", [4, 3]], {"kpt_shape": [4, 3]}),
    "pose end-to-end": ("Pose26", ["nc", [4, 3]], {"kpt_shape": [4, 3], "end2end": True, "reg_max": 1}),
    "obb": ("OBB", ["nc", 1], {}),
    "obb end-to-end": ("OBB26", ["nc", 1], {"end2end": True, "reg_max": 1}),
    "classify": ("Classify", ["nc"], {}),
    "RT-DETR": ("RTDETRDecoder", ["nc", 64, 20, 4, 4, 2], {}),
}
KINDS = {"segment": "Segmentation", "pose": "Pose", "obb": "OBB", "classify": "Classification", "RT-DETR": "RTDETR"}
ROTATED = "obb", "obb end-to-end"


class Made(NamedTuple):
    name: str
    checkpoint: Path
    photos: Path
    shape: tuple[int, int, int, int]

    @property
    def fused(self) -> Path:
        return self.checkpoint.with_name("fused.onnx")


def model_of(name: str) -> Any:
    head, arguments, more = HEADS[name]
    sources = -1 if head == "Classify" else [3, 4]
    layers = {"backbone": BACKBONE, "head": [[sources, 1, head, arguments]], "nc": CLASSES, **more}
    kind = "RTDETRDetection" if name == "RT-DETR" else KINDS.get(name.split(" ")[0], "Detection")
    yolo.register()
    torch.manual_seed(0)
    model = getattr(yolo.ultralytics("nn.tasks"), f"{kind}Model")(layers, verbose=False)
    with torch.no_grad():
        for path, module in model.model[-1].named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and path.endswith((".2", "score_head", "linear")):
                module.weight *= 4
        for branch in ("cv3", "one2one_cv3"):
            for layers in getattr(model.model[-1], branch, None) or []:
                layers[-1].bias.fill_(-1)
    if "end-to-end" in name:
        model.model[-1].end2end = True
    return model


@pytest.fixture(scope="module", params=HEADS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint as a trainer saves it, exported and fused, and photographs."""
    folder = tmp_path_factory.mktemp("tasks")
    model = model_of(request.param)
    model = model.eval() if request.param == "RT-DETR" else settled(model)
    task = request.param.split(" ")[0]
    told = {"imgsz": 128, "task": task if task in get_args(Task) else "detect"}
    checkpoint = folder / "model.pt"
    torch.save({"model": None, "ema": model.half(), "train_args": told, "version": ultralytics.__version__}, checkpoint)
    photos = folder / "photos"
    photos.mkdir()
    random = np.random.default_rng(0)
    for index, (height, width) in enumerate([(70, 128), (96, 100)]):
        coarse = random.integers(0, 256, (height // 10, width // 10, 3)).astype(np.uint8)
        cv2.imwrite(str(photos / f"{index}.png"), cv2.resize(coarse, (width, height)))
    made = Made(request.param, checkpoint, photos, (2, 3, 96, 96 if request.param == "classify" else 128))
    source = load_source(checkpoint, input_shape=made.shape, dynamic=["batch"])
    options = {"opset": 17, "dynamic": ["batch"], "metadata": source.metadata, "reference": source.reference}
    export(source.module, folder / "plain.onnx", input_shape=made.shape, divisor=16, **options)
    fuse(folder / "plain.onnx", made.fused, expect=1)
    return made


def test_detections_are_those_of_predict(made: Made) -> None:
    image = cv2.imread(str(made.photos / "0.png"))
    with Detector.load(made.fused, confidence=CONFIDENCE) as detector:
        (found,) = detector([image])
        size = detector.input_shape[2:]
    nms = {"nms": False} if "end-to-end" in made.name else {}
    kind = ultralytics.RTDETR if made.name == "RT-DETR" else ultralytics.YOLO
    predictor = kind(made.checkpoint)
    (right,) = predictor.predict(
        image, imgsz=size, conf=CONFIDENCE, iou=0.7, retina_masks=True, verbose=False, device="cpu", **nms
    )
    if made.name == "classify":
        assert found.classes.tolist() == right.probs.top5
        np.testing.assert_allclose(found.scores, right.probs.top5conf.numpy(), atol=2e-3)
        return
    boxes = right.obb if made.name in ROTATED else right.boxes
    assert len(found.scores) == len(boxes) > 3
    np.testing.assert_allclose(np.sort(found.scores), np.sort(boxes.conf.numpy()), atol=1e-4)
    corners = boxes.xyxy.numpy().clip(0, (128, 70) * 2)
    apart = np.abs(found.boxes[:, None] - corners).sum(axis=2) + 1e3 * np.abs(
        found.scores[:, None] - boxes.conf.numpy()
    )
    place = (apart + 1e3 * (found.classes[:, None] != boxes.cls.numpy())).argmin(axis=1)
    assert sorted(place.tolist()) == [*range(len(place))]
    np.testing.assert_allclose(found.boxes, corners[place], atol=0.02)
    if found.corners is not None:
        ours, theirs = (np.sort(c, axis=1) for c in (found.corners, boxes.xyxyxyxy.numpy()[place]))
        np.testing.assert_allclose(ours, theirs, atol=0.05)
    if found.keypoints is not None:
        np.testing.assert_allclose(found.keypoints, right.keypoints.data.numpy()[place], atol=0.05)
    if found.masks is not None:
        for mask, theirs in zip(found.masks, right.masks.data.numpy()[place], strict=True):
            whole = np.zeros(theirs.shape, bool)
            rows, columns = mask.pixels.shape
            whole[mask.top : mask.top + rows, mask.left : mask.left + columns] = mask.pixels
            assert (whole != (theirs > 0)).mean() < 2e-3


def test_files_are_verified_by_what_they_find(made: Made, tmp_path: Path) -> None:
    report, files = tmp_path / "verify.json", (made.fused.with_name("plain.onnx"), made.fused)
    shape = ",".join(map(str, made.shape))
    options = ["--images", str(made.photos), "--input-shape", shape, "--confidence", str(CONFIDENCE)]
    assert main(["verify", *map(str, files), *options, "-o", str(report)]) == 0
    (found,) = VerifyDocument.model_validate_json(report.read_text()).detections
    assert found.passed
    assert found.matched == found.expected > 1
    task = made.name.split(" ")[0]
    assert (found.mean_mask_iou is not None) == (task == "segment")
    assert (found.mean_keypoint_distance is not None) == (task == "pose")
    assert (found.mean_top5 is not None) == (task == "classify")


def test_what_is_found_is_told_and_drawn(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--json", "--confidence", str(CONFIDENCE), "-o", str(tmp_path)]
    assert main(["detect", str(made.fused), str(made.photos), *options]) == 0
    documents = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [document["source"] for document in documents] == ["0.png", "1.png"]
    task = made.name.split(" ")[0]
    extra = {"segment": {"mask"}, "pose": {"keypoints"}, "obb": {"corners"}}.get(task, set())
    for document in documents:
        assert document["detections"]
        assert {*document["detections"][0]} == {"name", "score", "box"} | extra
        drawn, photo = (cv2.imread(str(folder / document["source"])) for folder in (tmp_path, made.photos))
        assert (drawn != photo).any()


@pytest.mark.soak
def test_the_whole_road(made: Made, tmp_path: Path) -> None:
    """In INT8 untrained models may find something else; what matters is that it is compared and said. In float16 one
    box may come or go, since those of such a model overlap by as much as non-maximum suppression accepts."""
    shape = ",".join(map(str, made.shape))
    options = ["--input-shape", shape, "--dynamic", "batch", "--expect", "1", "--seconds", "0.1", "--no-engine"]
    typed = ["--fp16", "--int8", "--calibration", str(made.photos)]
    assert main(["export", str(made.checkpoint), "--out", str(tmp_path), *options, *typed]) in (0, 1)
    report = json.loads((tmp_path / "report.json").read_text())
    assert {found["candidate"] for found in report["verification"]["detections"]} == {
        f"model.{role}onnx" for role in ("", "fused.", "fp16.", "int8.")
    }
    judged = {found["candidate"]: found for found in report["verification"]["detections"]}
    assert judged["model.fused.onnx"]["passed"] is not False
    half = judged["model.fp16.onnx"]
    assert half["passed"] is not False or (half["lost"] + half["added"] == 1 and not half["class_changes"])
    assert not [
        one for one in report["verification"]["comparisons"] if "fp16" in one["candidate"] and one["passed"] is False
    ]
