"""The detector that was trained on drawn shapes: a file as users have it, and a judge of every file made of it.

What a file finds is measured twice, by Ultralytics' validator as mAP50 and by `verify` as boxes matched one to one.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import onnx
import pytest
import torch

from acmix_deploy.checkpoint import load
from acmix_deploy.detection.images import find, placed_batches
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.forms import to_form
from acmix_deploy.runtime.onnxruntime import onnx_runner, precision_of
from acmix_deploy.targets import INT8_OPSET, TARGETS
from acmix_deploy.verify import Candidate, Scenes, Verification, verify
from acmix_deploy.verify.limits import FILE_TOLERANCES
from scripts import shapes
from scripts.train_shapes import CHECKPOINT, HELD_BACK, evaluate
from tests.pipeline.parts import deployed

pytest.importorskip("ultralytics", reason="ultralytics is not installed")

MAP50 = "metrics/mAP50(B)"
MAP50_CHANGE = {"float32": 0.0002, "float16": 0.002, "int8": 0.01}
"""How far the mAP50 of a file may be from that of the plain one, by the type that it computes in."""

OPSETS = sorted({min(INT8_OPSET, target.opset) for target in TARGETS.values()})


def test_the_checkpoint_is_one_of_ultralytics_and_tells_nothing_of_a_machine():
    loaded = load(CHECKPOINT)
    assert loaded.metadata.entries["names"] == str(dict(enumerate(shapes.NAMES)))
    assert loaded.metadata.entries["imgsz"] == str([shapes.SIZE] * 2)
    assert "weights converted from float16 to float32" in loaded.notes
    saved = torch.load(CHECKPOINT, weights_only=False)
    assert "AGPL-3.0" in saved["license"]
    settings = [*saved["train_args"].values(), *saved["model"].args.values()]
    assert not [value for value in settings if isinstance(value, str) and ("/" in value or "\\" in value)]


SQUARE = [(1, 3, shapes.SIZE, shapes.SIZE)]
_SIZES = [(160, 160), (128, 192), (192, 160), (160, 256)]
ALL_BATCHES = [(count, 3, *_SIZES[count % 4]) for count in range(1, 9)]
"""One to eight images, 36 together."""


def judge(files: dict[str, Path], folder: Path, shapes: list[tuple[int, ...]]) -> Verification:
    """Every file against the plain one, by what they find in the images of a folder, in batches of these shapes."""
    models = {role: onnx.load(path) for role, path in files.items()}
    metadata = ModelMetadata.of(models["plain"])
    batches = [*placed_batches(find(folder).paths, shapes, metadata.letterbox)]
    candidates = [Candidate(onnx_runner(model, role), precision_of(model)) for role, model in models.items()]
    return verify(
        candidates[0].runner,
        candidates[1:],
        Scenes("images", batches, metadata.names),
        metadata=metadata,
        tolerances=FILE_TOLERANCES,
    )


class Judged(NamedTuple):
    files: dict[str, Path]
    map50: dict[str, float]
    verification: Verification


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((36, ALL_BATCHES, {"dynamic": ["batch", "height", "width"]}), id="free axes"),
        *(pytest.param((500, SQUARE, {"opset": opset}), id=f"opset {opset}") for opset in OPSETS),
    ],
)
def judged(request, tmp_path_factory):
    """Every type in every form that ONNX Runtime runs, on held-back images."""
    count, batches, options = request.param
    folder = tmp_path_factory.mktemp("judged")
    calibration = shapes.write(folder / "calibration", seed=11, count=32)
    report = deployed(
        CHECKPOINT, folder, fp16=True, int8=True, calibration=calibration, expect=3, no_engine=True, **options
    )
    assert report.passed
    files = {role: file.artifact.path for role, file in report.files.items()}
    for role in ("fused", "fp16", "int8"):
        assert onnx.load(files[role]).functions, "it is of the form any"
        files[f"{role} plain"] = folder / f"{role}.plain.onnx"
        onnx.save(to_form(onnx.load(files[role]), "plain"), files[f"{role} plain"])
    images = shapes.write(folder / "held-back", HELD_BACK, count)
    map50 = {role: evaluate(path, count)[MAP50] for role, path in files.items()}
    map50["checkpoint"] = evaluate(CHECKPOINT, count)[MAP50]
    return Judged(files, map50, judge(files, images, batches))


@pytest.mark.soak
def test_every_file_reaches_the_map_of_the_checkpoint(judged):
    print(judged.map50)
    reference = judged.map50["checkpoint"]
    assert reference > 0.9
    for role, path in judged.files.items():
        assert judged.map50[role] == pytest.approx(reference, abs=MAP50_CHANGE[precision_of(onnx.load(path))]), role


@pytest.mark.soak
def test_every_file_finds_what_the_plain_one_finds(judged):
    found = {comparison.candidate: comparison for comparison in judged.verification.detections}
    assert set(found) == set(judged.files) - {"plain"}
    for role, comparison in found.items():
        print(role, comparison.lost, comparison.class_changes, comparison.added)
        assert comparison.expected > 5 * len(comparison.images)
        if comparison.precision == "float32":
            assert (comparison.lost, comparison.class_changes, comparison.added) == (0, 0, 0)
    assert {comparison.precision for comparison in found.values()} == set(MAP50_CHANGE)
    assert judged.verification.passed, judged.verification.losses


@pytest.mark.soak
def test_what_is_wrong_with_the_attention_alone_shows(judged, tmp_path):
    """Each pixel attends most to what is least like it. (That it attends to all alike costs 0.002 of mAP50 only.)"""
    model = onnx.load(judged.files["fp16"])
    for node in model.graph.node:
        for attribute in node.attribute:
            if (node.op_type, attribute.name) == ("AcmixLocalAttention", "scale"):
                attribute.f *= -1
    onnx.save(model, tmp_path / "inverted.onnx")
    images = judged.verification.detections[0].images
    map50 = evaluate(tmp_path / "inverted.onnx", len(images))[MAP50]
    assert abs(map50 - judged.map50["plain"]) > MAP50_CHANGE["float16"]
    files = {"plain": judged.files["plain"], "inverted": tmp_path / "inverted.onnx"}
    assert judge(files, images[0].image.parent, SQUARE).failures
