"""Ultralytics runs the files that are made here: what it reads in their metadata is what its own exporter writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from acmix_deploy import families, yolo
from acmix_deploy.checkpoint import load
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.export import export
from acmix_deploy.forms import to_form
from acmix_deploy.fusion import fuse
from acmix_deploy.precision import quantize, to_fp16
from acmix_deploy.processing import Processing, attach
from acmix_deploy.runtime.onnxruntime import precision_of
from scripts import shapes
from scripts.train_shapes import CHECKPOINT, evaluate
from tests.untrained import settled

pytest.importorskip("ultralytics", reason="ultralytics is not installed")

SHAPE = (1, 3, 128, 160)
"""Unlike that of training, which is 160x160."""


def exported(checkpoint: Path, folder: Path, blocks: int, shape: tuple[int, ...], **options: Any) -> dict[str, Path]:
    """The plain and the fused file of a checkpoint, by the faster exporter."""
    loaded = load(checkpoint)
    module = yolo.prepare_for_export(families.canonicalise(loaded.module)[0])
    files = {"plain": folder / "model.onnx", "fused": folder / "model.fused.onnx"}
    told = {"metadata": loaded.metadata, "divisor": loaded.metadata.stride}
    export(module, files["plain"], input_shape=shape, opset=17, **told, **options)
    fuse(files["plain"], files["fused"], expect=blocks)
    return files


def predicted(model: Path, images: list[Any], **options: Any) -> list[Any]:
    detector = yolo.ultralytics("models").YOLO(model)
    results: list[Any] = detector.predict(images, rect=False, verbose=False, **options)
    return results


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the trained detector, every kind."""
    folder = tmp_path_factory.mktemp("files")
    found = exported(CHECKPOINT, folder, 3, SHAPE)
    found |= {kind: folder / f"model.{kind}.onnx" for kind in ("fp16", "int8", "plain-form")}
    to_fp16(found["fused"], found["fp16"], float32=("decode", "softmax"))
    quantize(found["fused"], found["int8"], shapes.write(folder / "calibration", seed=11, count=4))
    onnx.save(to_form(onnx.load(found["fused"]), "plain"), found["plain-form"])
    suppressing = onnx.load(found["fused"])
    attach(suppressing, Processing(suppression=Suppression()))
    found["nms"] = folder / "model.nms.onnx"
    onnx.save(suppressing, found["nms"])
    return found


def test_every_kind_of_file_predicts_what_the_checkpoint_does(files: dict[str, Path]) -> None:
    images = [scene.image[:100] for scene in shapes.images(5, 2)]
    expected = predicted(CHECKPOINT, images, imgsz=SHAPE[2:])
    assert sum(len(result.boxes) for result in expected) > 5
    for kind, file in files.items():
        precision = precision_of(file)
        assert precision == {"fp16": "float16", "int8": "int8"}.get(kind, "float32")
        pixels, score = {"float32": (0.01, 1e-4), "float16": (0.1, 0.005), "int8": (2, 0.05)}[precision]
        for result, wanted in zip(predicted(file, images), expected, strict=True):
            assert result.names == wanted.names == dict(enumerate(shapes.NAMES))
            boxes, wanted_boxes = result.boxes.data.numpy(), wanted.boxes.data.numpy()
            assert precision == "int8" or len(boxes) == len(wanted_boxes), kind
            check_found(wanted_boxes, boxes, pixels, score)
            check_found(boxes, wanted_boxes, pixels, score)


def test_onnx_runtime_says_nothing_when_it_loads_one(files: dict[str, Path]) -> None:
    """At its default level it tells of what it cannot compute beforehand, such as a float16 Conv of constants."""
    code = "import onnxruntime, sys; [onnxruntime.InferenceSession(file) for file in sys.argv[1:]]"
    loaded = subprocess.run([sys.executable, "-c", code, *files.values()], check=False, capture_output=True, text=True)
    assert (loaded.returncode, loaded.stdout, loaded.stderr) == (0, "", "")


@pytest.mark.soak
def test_a_file_of_another_size_than_that_of_training_reaches_the_map_of_the_checkpoint(tmp_path: Path) -> None:
    expected = evaluate(CHECKPOINT, 100, imgsz=128)
    for kind, file in exported(CHECKPOINT, tmp_path, 3, (1, 3, 128, 128)).items():
        found = evaluate(file, 100)
        for name in ("metrics/mAP50(B)", "metrics/mAP50-95(B)"):
            assert found[name] == pytest.approx(expected[name], abs=0.0005), kind


def check_found(expected: Any, boxes: Any, pixels: float, score: float) -> None:
    """Each of the boxes that are surely there is among the others [N, 6]: corners, score and class."""
    for box in expected[expected[:, 4] > 0.5]:
        near = boxes[np.abs(boxes[:, :4] - box[:4]).max(1).argmin()]
        assert np.abs(near[:4] - box[:4]).max() < pixels
        assert abs(near[4] - box[4]) < score
        assert near[5] == box[5]


HEADS: dict[str, list[Any]] = {
    "segment": [[2, 3], 1, "Segment", ["nc", 8, 16]],
    "pose": [[2, 3], 1, "Pose", ["nc", "kpt_shape"]],
    "obb": [[2, 3], 1, "OBB", ["nc", 1]],
    "classify": [-1, 1, "Classify", ["nc"]],
}
MODELS = {"segment": "Segmentation", "obb": "OBB", "pose": "Pose", "classify": "Classification"}
READ = ("batch", "stride", "task", "names", "channels", "end2end", "imgsz", "kpt_shape", "dynamic")
"""What Ultralytics' AutoBackend takes from a file's metadata; of ``args`` it reads ``dynamic`` and ``nms``."""


@pytest.mark.parametrize("task", HEADS)
def test_a_file_of_every_task_is_read_as_their_own_export(task: str, tmp_path: Path) -> None:
    """Both at 64x96 pixels; that of one task with free axes."""
    yolo.register()
    backbone = [[-1, 1, "Conv", [8, 3, 4]], [-1, 1, "Conv", [8, 3, 2]], [-1, 1, "ACmix", [16]]]
    layers = {"backbone": backbone, "head": [[-1, 1, "Conv", [16, 3, 2]], HEADS[task]], "nc": 2, "kpt_shape": [4, 3]}
    model = getattr(yolo.ultralytics("nn.tasks"), f"{MODELS[task]}Model")(layers, ch=3, verbose=False)
    model.names, model.task, model.args = {0: "nut", 1: "bolt"}, task, {"imgsz": 256, "task": task}
    torch.save({"model": settled(model), "train_args": model.args}, checkpoint := tmp_path / "model.pt")
    dynamic = ("batch", "height", "width") if task == "segment" else ()
    own = yolo.ultralytics("models").YOLO(checkpoint)
    options = {"imgsz": (64, 96), "simplify": False, "opset": 17, "dynamic": bool(dynamic), "verbose": False}
    theirs = opened(Path(own.export(format="onnx", **options)).rename(tmp_path / "theirs.onnx"))
    image = torch.rand(2, 3, 64, 96)
    expected = run(theirs, image)
    for kind, file in exported(checkpoint, tmp_path, 1, (1, 3, 64, 96), dynamic=dynamic).items():
        ours = opened(file)
        read = {name: getattr(ours, name, None) for name in READ}
        assert read == {name: getattr(theirs, name, None) for name in READ}, kind
        assert (read["task"], read["imgsz"], read["batch"]) == (task, [64, 96], 1)
        assert ours.metadata["args"]["dynamic"] == theirs.metadata["args"]["dynamic"] == bool(dynamic)
        outputs = run(ours, image)
        assert len(outputs) >= len(expected)
        for output, wanted in zip(outputs, expected, strict=False):
            torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4, msg=kind)


def opened(file: Path) -> Any:
    return yolo.ultralytics("nn.autobackend").AutoBackend(str(file), device=torch.device("cpu"))


def run(backend: Any, image: torch.Tensor) -> list[torch.Tensor]:
    outputs = backend(image)
    return outputs if isinstance(outputs, list) else [outputs]
