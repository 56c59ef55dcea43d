"""The limits of detections tell right files of a trained detector from broken ones, on few images as on many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from acmix_deploy.detection.heads import Head
from acmix_deploy.detection.images import find, placed_batches
from acmix_deploy.precision.fp16 import to_fp16
from acmix_deploy.precision.int8 import quantize
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.verify import DetectionComparison, Scenes
from acmix_deploy.verify.detections import compare_detections
from acmix_deploy.verify.limits import DETECTION_LIMITS
from scripts import shapes

pytest.importorskip("cv2", reason="OpenCV is not installed")
pytest.importorskip("ultralytics", reason="ultralytics is not installed")

SHAPE = (1, 3, shapes.SIZE, shapes.SIZE)


class Outputs(NamedTuple):
    scenes: Scenes
    of: dict[str, list[Array]]
    """Of each batch, by the type that the file computes in."""


@pytest.fixture(scope="module")
def outputs(shapes_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    folder = tmp_path_factory.mktemp("limits")
    plain, fused = shapes_files / "plain.onnx", shapes_files / "shapes.fused.onnx"
    to_fp16(fused, folder / "float16.onnx")
    calibration, unseen = (shapes.write(folder / str(seed), seed, count) for seed, count in ((11, 16), (2, 48)))
    quantize(fused, folder / "int8.onnx", calibration=calibration)
    scenes = Scenes("images", list(placed_batches(find(unseen).paths, [SHAPE])), {})
    files = {"plain": plain, "float32": fused, **{name: folder / f"{name}.onnx" for name in ("float16", "int8")}}
    sessions = {name: open_session(file) for name, file in files.items()}
    run = {
        name: [session.run(None, {"images": batch.images})[0] for batch in scenes.batches]
        for name, session in sessions.items()
    }
    return Outputs(scenes, run)


def passed(outputs: Outputs, precision: str, change: Callable[[Array], None], count: int) -> float:
    """Share of 200 draws of ``count`` images on which a candidate passes."""
    spoilt = [output.copy() for output in outputs.of[precision]]
    for output in spoilt:
        change(output)
    limits = DETECTION_LIMITS[precision]
    both = [({"output0": right}, {"output0": other}) for right, other in zip(outputs.of["plain"], spoilt, strict=True)]
    images = compare_detections(outputs.scenes, Head("detect", "anchors", "output0", 6), both, limits.near)
    random = np.random.default_rng(0)
    draws = (random.choice(len(images), count, replace=False) for _ in range(200))
    judged = [
        DetectionComparison(
            candidate="c",
            precision=precision,
            confidence=outputs.scenes.confidence,
            images=tuple(images[index] for index in draw),
            limits=limits,
        ).passed
        for draw in draws
    ]
    return float(np.mean([verdict is True for verdict in judged]))


def scores(factor: float) -> Callable[[Array], None]:
    def change(output: Array) -> None:
        output[:, 4:] *= factor

    return change


def boxes(factor: float) -> Callable[[Array], None]:
    def change(output: Array) -> None:
        output[:, 2:4] *= factor

    return change


def boxes_and_scores(output: Array) -> None:
    boxes(1.25)(output)
    scores(0.6)(output)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_right_files_pass_on_any_images(outputs: Outputs, count: int) -> None:
    least = {precision: passed(outputs, precision, scores(1), count) for precision in DETECTION_LIMITS}
    assert least["float32"] == least["float16"] == 1
    assert least["int8"] >= (0.97 if count == 2 else 0.99)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
@pytest.mark.parametrize(
    ("precision", "change"),
    [
        pytest.param("int8", scores(0.55), id="int8, scores 0.55"),
        pytest.param("int8", boxes_and_scores, id="int8, scores 0.6 and boxes 1.25"),
        pytest.param("int8", scores(0.85), id="int8, scores 0.85"),
        pytest.param("int8", boxes(1.1), id="int8, boxes 1.1"),
        pytest.param("float16", scores(0.91), id="float16, scores 0.91"),
        pytest.param("float16", boxes(1.05), id="float16, boxes 1.05"),
        pytest.param("float32", scores(0.99), id="float32, scores 0.99"),
    ],
)
def test_broken_files_fail_on_any_images(
    outputs: Outputs, precision: str, change: Callable[[Array], None], count: int
) -> None:
    assert passed(outputs, precision, change, count) <= 0.01
