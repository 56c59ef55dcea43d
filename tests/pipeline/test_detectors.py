"""Detectors with ACmix as they are written down and saved by those who train them, to files that ONNX Runtime runs."""

from __future__ import annotations

import ast
from pathlib import Path

import onnx
import pytest
import torch

from acmix_deploy import yolo
from tests.pipeline.parts import deployed
from tests.untrained import enlivened, make_checkpoint, settled

tasks = pytest.importorskip("ultralytics.nn.tasks", reason="ultralytics is not installed")


def distances(report):
    return {(c.candidate, c.output): c.relative_l2 for c in report.verification.comparisons}


def test_checkpoint_to_files(tmp_path):
    make_checkpoint(tmp_path / "model.pt")
    steps: list[str] = []
    options = {"image_size": 160, "opset": 17, "fp16": True}  # by the faster exporter; README's by the other, with soak
    report = deployed(tmp_path / "model.pt", tmp_path, expect=3, progress=steps.append, **options)
    assert report.passed
    assert [block.status for block in report.blocks] == ["canonical"] * 3
    assert report.files["fused"].nodes < report.files["plain"].nodes
    assert len(steps) > 6
    found = distances(report)
    assert found["model.fused.onnx", "boxes"] < 1e-5
    assert found["model.fp16.onnx", "boxes"] > 1e-5, "an output that half precision does not change shows nothing"

    for name in ("model.onnx", "model.fused.onnx"):
        metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / name).metadata_props}
        assert ast.literal_eval(metadata["names"])[0]
        assert metadata["stride"] == "32"
        assert (metadata["imgsz"], metadata["batch"]) == ("[160, 160]", "1"), "of the file, not of training"
        assert "padding_value" in metadata["letterbox"]


@pytest.mark.parametrize(
    ("variant", "scale", "shape"),
    [
        pytest.param("p3p4p5", "s", (1, 3, 128, 160), marks=pytest.mark.soak),
        ("p5", "n", (3, 3, 192, 128)),
        pytest.param("p5", "s", (1, 3, 128, 224), marks=pytest.mark.soak),
        pytest.param("p3p4p5", "m", (2, 3, 160, 128), marks=pytest.mark.soak),
        pytest.param("p5", "m", (1, 3, 128, 160), marks=pytest.mark.soak),
        pytest.param("p3p4p5", "l", (1, 3, 160, 128), marks=pytest.mark.soak),
        pytest.param("p3p4p5", "x", (2, 3, 128, 192), marks=pytest.mark.soak),
        pytest.param("p5", "l", (8, 3, 128, 160), marks=pytest.mark.soak),
        pytest.param("p5", "x", (1, 3, 192, 160), marks=pytest.mark.soak),
    ],
)
def test_every_scale_at_sizes_that_are_not_square(tmp_path, variant, scale, shape):
    """n with blocks at all three maps is above. The smaller opset has the faster exporter."""
    make_checkpoint(tmp_path / "model.pt", variant, scale)
    opset = 18 if scale in "lx" else 17
    blocks = {"p3p4p5": 3, "p5": 1}[variant]
    report = deployed(tmp_path / "model.pt", tmp_path, input_shape=shape, opset=opset, expect=blocks)
    assert report.passed
    assert [block.status for block in report.blocks] == ["canonical"] * blocks
    assert {tuple(c.input_shapes["images"]) for c in report.verification.comparisons} == {shape}
    assert distances(report)["model.fused.onnx", "boxes"] < 1e-5


GENERATIONS = {
    "v3": "v3/yolov3-tiny.yaml", "v5": "v5/yolov5n.yaml", "v5, P6": "v5/yolov5n-p6.yaml", "v6": "v6/yolov6n.yaml",
    "v8": "v8/yolov8n.yaml", "v8, P2": "v8/yolov8n-p2.yaml", "v9": "v9/yolov9t.yaml", "v10": "v10/yolov10n.yaml",
    "11": "11/yolo11n.yaml", "12": "12/yolo12n.yaml", "26": "26/yolo26n.yaml", "26, P2": "26/yolo26n-p2.yaml",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.soak] * (name != "26")) for name in GENERATIONS],
)
def test_generations_of_ultralytics(tmp_path: Path, name: str) -> None:
    """Each as the package describes it, with an ACmix behind its backbone."""
    yolo.register()
    layers = tasks.yaml_model_load(GENERATIONS[name])
    count = len(layers["backbone"])

    def moved(source: int) -> int:
        return source + (source >= count - 1)

    layers["head"] = [
        [[*map(moved, sources)] if isinstance(sources, list) else moved(sources), *layer]
        for sources, *layer in layers["head"]
    ]
    layers["backbone"].append([-1, 1, "ACmix", layers["backbone"][-1][3][:1]])
    torch.manual_seed(0)
    model = settled(tasks.DetectionModel(layers, verbose=False))  # whose scores are near 1e-5
    torch.save(
        {"ema": model.half(), "model": None, "train_args": {"imgsz": 640, "task": "detect"}}, tmp_path / "model.pt"
    )
    size = (256, 320) if "P6" in name else (128, 160)  # maps of 4x5, the smallest that a window of 7 takes
    options = {"input_shape": (1, 3, *size), "opset": 17, "expect": 1, "seconds": 0.1}
    assert deployed(tmp_path / "model.pt", tmp_path, **options).passed


@pytest.mark.parametrize("task", ["detect", pytest.param("segment", marks=pytest.mark.soak)])
def test_what_nobody_trained_passes_as_its_yaml_says_it(tmp_path, task):
    """With 80 classes, its scores begin at 1e-5."""
    layers = yolo.model_yaml("p5", "n")
    kind = {"detect": "Detection", "segment": "Segmentation"}[task]
    if task == "segment":
        sources, *_ = layers["head"][-1]
        layers["head"][-1] = [sources, 1, "Segment", ["nc", 32, 256]]
    yolo.register()
    torch.manual_seed(0)
    torch.save({"model": getattr(tasks, f"{kind}Model")(layers, verbose=False)}, tmp_path / "model.pt")
    report = deployed(tmp_path / "model.pt", tmp_path, image_size=128, opset=17, expect=1, no_profile=True)
    assert report.passed
    scores = next(found for found in report.verification.comparisons if found.output == "scores")
    assert scores.rms < 1e-4


def test_yolov5_as_ultralytics_builds_it(tmp_path):
    """The package's own YOLOv5, an ACmix behind the last stage of the backbone, as a YAML file has it."""
    yolo.register()
    utils = yolo.ultralytics("utils")
    model = utils.YAML.load(Path(utils.ROOT) / "cfg/models/v5/yolov5.yaml")
    model["backbone"].insert(9, [-1, 1, "ACmix", [1024, 7, 4]])

    def moved(source):
        return source + (source >= 9) if source >= 0 else source

    for layer in model["head"]:
        layer[0] = [moved(source) for source in layer[0]] if isinstance(layer[0], list) else moved(layer[0])
    file = tmp_path / "yolov5n-acmix.yaml"
    utils.YAML.save(file, model | {"nc": 3, "scale": "n"})
    detector = enlivened(tasks.DetectionModel(str(file), verbose=False))
    torch.save({"model": detector.half(), "train_args": {"imgsz": [128, 160]}}, tmp_path / "model.pt")
    report = deployed(tmp_path / "model.pt", tmp_path, opset=17, expect=1)
    assert report.passed
    assert {tuple(c.input_shapes["images"]) for c in report.verification.comparisons} == {(1, 3, 128, 160)}
