"""Non-maximum suppression as a graph: what it finds, against a plain one in float64 and against the way without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acmix_deploy.detection.boxes import suppressed
from acmix_deploy.detection.heads import Head
from acmix_deploy.detection.metadata import Layout
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.graph import keep
from acmix_deploy.nms import CONSIDERED, graph_of
from acmix_deploy.onnx_file import unread
from acmix_deploy.targets import TARGETS

pytest.importorskip("cv2", reason="OpenCV is not installed")


def plainly(output: Any, how: Suppression) -> Any:
    """[B, N, 6] of predictions [B, 4 + classes, anchors], a box at a time, in float64."""
    found = np.zeros((len(output), how.most, 6))
    for image, rows in zip(output.astype(np.float64), found, strict=True):
        kept: list[Any] = []
        finite = [column for column in image.T if np.isfinite(column).all()]
        for x, y, width, height, *scores in sorted(finite, key=lambda column: -column[4:].max()):
            box = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
            score, kind = max(scores), scores.index(max(scores))
            if score > np.float32(how.confidence) and not any(
                (kind == other[5] or not how.by_class) and overlap(box, other) > how.iou for other in kept
            ):
                kept.append([*box, score, kind])
        for row, values in zip(rows, kept, strict=False):
            row[:] = values
    return found


def overlap(box: Any, other: Any) -> float:
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(one[2] - one[0]) * (one[3] - one[1]) for one in (box, other)]
    return float(shared / (sum(areas) - shared))


def predictions(seed: int, batch: int, classes: int, anchors: int) -> Any:
    """Boxes in clusters, so that most overlap."""
    rng = np.random.default_rng(seed)
    around = rng.uniform(-20, 660, (batch, 2, 1 + anchors // 8))
    centre = around[:, :, rng.integers(0, around.shape[2], anchors)] + rng.normal(0, 6, (batch, 2, anchors))
    scores = rng.uniform(0, 1, (batch, classes, anchors)) ** 2
    return np.concatenate((centre, rng.uniform(20, 60, (batch, 2, anchors)), scores), 1).astype(np.float32)


def run(output: Any, how: Suppression, layout: Layout = "anchors", *, free: bool = False) -> Any:
    classes = output.shape[1] - 4 if layout == "anchors" else output.shape[2] - 5
    head = Head("detect", layout, "predictions", classes)
    dims = [*output.shape]
    if free:
        dims[0], dims[1 if layout == "objectness" else 2] = "batch", "anchors"
    model = graph_of(how, head, tuple(dims), float16=output.dtype == np.float16)
    onnx.checker.check_model(model, full_check=True)
    (rows,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"predictions": output})
    assert (rows.dtype, rows.shape) == (np.float32, (len(output), how.most, 6))
    np.testing.assert_array_equal(rows, suppressed(head, {"predictions": output}, how))  # today's way, box by box
    return rows


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize(
    ("batch", "classes", "anchors", "confidence", "iou", "most"),
    [(3, 3, 200, 0.25, 0.7, 300), (1, 1, 90, 0.0, 0.5, 40), (2, 5, 4, 0.5, 0.3, 7), (1, 80, 300, 0.9, 0.45, 3)],
)
def test_boxes_are_those_of_a_plain_suppression(
    batch: int, classes: int, anchors: int, confidence: float, iou: float, most: int, by_class: bool, free: bool
) -> None:
    output = predictions(anchors, batch, classes, anchors)
    how = Suppression(confidence=confidence, iou=iou, most=most, by_class=by_class)
    rows, right = run(output, how, free=free), plainly(output, how)
    assert 0 < np.count_nonzero(right[..., 4]) < batch * anchors
    np.testing.assert_allclose(rows, right, atol=1e-4)


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.booleans(), st.booleans()
)
@settings(max_examples=15, deadline=None)
def test_boxes_are_those_of_today(
    seed: int, batch: int, classes: int, anchors: int, by_class: bool, free: bool
) -> None:
    run(predictions(seed, batch, classes, anchors), Suppression(by_class=by_class, most=10), free=free)


@pytest.mark.parametrize("by_class", [True, False])
@pytest.mark.parametrize("free", [False, True])
def test_what_is_not_finite_spoils_its_image_unless_it_would_not_count(by_class: bool, free: bool) -> None:
    """As of a detector without: rows of NaN are refused by whoever reads them, where none would look like nothing."""
    output = predictions(1, 8, 3, 40)
    output[:, 4:, 0] = 0.1
    output[0, 0, 0], output[1, 3, 0] = np.inf, np.nan
    output[2, 4, 7], output[3, 5, 7], output[4, 6, 7] = np.nan, np.inf, -np.inf
    output[5, 4:, 7] = np.nan
    output[6, 4, 7], output[6, 0, 7] = 0.99, -np.inf
    how = Suppression(by_class=by_class)
    rows = run(output, how, free=free)
    sound = [0, 1, 7]
    np.testing.assert_allclose(rows[sound], plainly(output[sound], how), atol=1e-4)
    assert rows[sound][..., 4].any(axis=1).all()
    assert np.isnan(rows[2:7]).all()


def test_of_equal_scores_the_first_anchor_comes_first() -> None:
    output = predictions(2, 1, 2, 60)
    output[0, 4:] = 0.1
    output[0, 4, ::2] = output[0, 5, 1::2] = 0.75
    how = Suppression(iou=0.2)
    np.testing.assert_allclose(run(output, how), plainly(output, how), atol=1e-4)


def test_nothing_gives_zeros() -> None:
    output = predictions(3, 2, 3, 50)
    output[:, 4:] *= 0.2
    assert not run(output, Suppression(), free=True).any()


@pytest.mark.parametrize("by_class", [True, False])
def test_more_boxes_than_are_looked_at(by_class: bool) -> None:
    output = predictions(4, 1, 2, 6000)
    output[0, :2] *= 20  # far more than 300 that do not overlap
    output[0, 4] = np.linspace(0.3, 0.9, 6000)
    assert (output[0, 4:].max(axis=0) > 0.25).sum() > 5000 > CONSIDERED
    rows = run(output, Suppression(by_class=by_class))
    assert rows[0, :, 4].all()
    assert (np.diff(rows[0, :, 4]) <= 0).all()


def test_half_precision_is_suppressed_in_float32() -> None:
    output = predictions(5, 2, 3, 100).astype(np.float16)
    assert run(output, Suppression())[..., 4].any()


@pytest.mark.parametrize("free", [False, True])
def test_objectness(free: bool) -> None:
    output = predictions(6, 2, 4, 100).transpose(0, 2, 1)
    output[..., 4] = output[..., 4] ** 0.5
    how = Suppression(confidence=0.2)
    scores = output[..., 5:] * output[..., 4:5]
    right = plainly(np.concatenate((output[..., :4], scores), axis=2).transpose(0, 2, 1), how)
    np.testing.assert_allclose(run(output, how, "objectness", free=free), right, atol=1e-4)


@pytest.mark.parametrize("layout", ["anchors", "objectness"])
@pytest.mark.parametrize("by_class", [True, False])
def test_every_tensorrt_reads_it(layout: Layout, by_class: bool) -> None:
    model = graph_of(Suppression(by_class=by_class), Head("detect", layout, "predictions", 3), [None] * 3, float16=True)
    assert [unread(model, target) for target in TARGETS.values() if unread(model, target)] == []
    shapes = [node for node in model.graph.node if node.op_type == "Shape"]
    assert shapes
    assert not [attribute for node in shapes for attribute in node.attribute], "TensorRT 8 passes over start and end"


def test_rtx_reads_it_and_builds_the_rest(rtx: Any, tmp_path: Path) -> None:
    """TensorRT-RTX has the operator's importer, and nothing that runs it. What is around it is built, with rows of
    something else in its place, whose number does not depend on the data."""
    free, fixed = Head("detect", "anchors", "predictions", 80), Head("detect", "objectness", "predictions", 79)
    models = [
        graph_of(Suppression(), free, ("batch", 84, "anchors"), float16=False),
        graph_of(Suppression(by_class=False), fixed, (2, 90, 84), float16=True),
    ]
    paths = [tmp_path / f"{index}.onnx" for index in range(2 * len(models))]
    for path, model in zip(paths, [*models, *map(without_nms, models)], strict=True):
        onnx.save(model, path)
    answers, _ = rtx("build", "-", *paths)
    for index, answer in enumerate(answers):
        assert answer["parsed"], answer
        assert answer["output"][1:] == [300, 6]
        if index < len(models):
            assert "no runners" in answer["errors"][0]
        else:
            assert answer["built"], answer


def without_nms(model: onnx.ModelProto) -> onnx.ModelProto:
    """With as many rows as there are candidates."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    (node,) = (node for node in changed.graph.node if node.op_type == "NonMaxSuppression")
    changed.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 3]), "by_three"))
    steps = [
        onnx.helper.make_node("Slice", [node.input[0], "zeroth", "three", "two"], ["numbers"]),
        onnx.helper.make_node("Cast", ["numbers"], ["indices_of_three"], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("Reshape", ["indices_of_three", "by_three"], [node.output[0]]),
    ]
    place = [*changed.graph.node].index(node)
    keep(changed.graph.node, [*changed.graph.node[:place], *steps, *changed.graph.node[place + 1 :]])
    onnx.checker.check_model(changed, full_check=True)
    return changed
