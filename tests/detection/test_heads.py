"""What tasks have beside boxes: rotated boxes, masks, keypoints, classes of an image; and rows compared as sets."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from acmix_deploy.detection import rotated
from acmix_deploy.detection.boxes import decode, named, spoilt
from acmix_deploy.detection.heads import Head
from acmix_deploy.detection.images import Batch, Letterbox, Placement
from acmix_deploy.detection.masks import Mask
from acmix_deploy.detection.rows import paired
from acmix_deploy.detection.suppression import MOST
from acmix_deploy.serving.triton.repository import outputs_of
from acmix_deploy.verify.detections import DetectionComparison, Scenes, compare_detections
from acmix_deploy.verify.limits import DETECTION_LIMITS

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
SIZE = 64
HEADS = {
    "segment": Head("segment", "anchors", "output0", 2, prototypes="output1"),
    "pose": Head("pose", "anchors", "output0", 2, keypoints=(3, 3)),
    "obb": Head("obb", "anchors", "output0", 2),
    "classify": Head("classify", "classes", "output0", 20),
}


def outputs_for(head: Head) -> dict[str, np.ndarray]:
    """Of one image: twelve boxes in a grid that do not overlap, one of another class beside the best of each."""
    random = np.random.default_rng(0)
    if head.layout == "classes":
        scores = random.random((1, 20)).astype(np.float32)
        return {"output0": scores / scores.sum()}
    x, y = np.meshgrid(np.arange(4) * 16 + 8, np.arange(3) * 16 + 8)
    boxes = np.stack((x.ravel(), y.ravel(), np.full(12, 12), np.full(12, 9)))
    scores = np.stack((random.uniform(0.5, 0.9, 12), random.uniform(0, 0.2, 12)))
    behind = {
        "segment": random.standard_normal((4, 12)) + 1,
        "pose": np.concatenate([np.stack((x.ravel() + d, y.ravel() - d, np.full(12, 0.4 * d))) for d in (1, 2, 3)]),
        "obb": random.uniform(-0.5, 1.5, (1, 12)),
    }
    found = {"output0": np.concatenate((boxes, scores, behind[head.task]))[None].astype(np.float32)}
    if head.prototypes:
        found["output1"] = (random.standard_normal((1, 4, 16, 16)) + 0.3).astype(np.float32)
    return found


def compared(head: Head, change: Callable[[dict[str, np.ndarray]], object], precision: str) -> DetectionComparison:
    right, other = outputs_for(head), outputs_for(head)
    change(other)
    placement = Letterbox().place((SIZE, SIZE), SIZE, SIZE)
    batch = Batch(np.zeros((1, 3, SIZE, SIZE), np.float32), [Path("a.png")], [placement])
    limits = DETECTION_LIMITS[precision]
    return DetectionComparison(
        candidate="c",
        precision=precision,
        confidence=0.0 if head.layout == "classes" else 0.25,
        images=compare_detections(Scenes("images", [batch], {}), head, [(right, other)], limits.near),
        limits=limits,
    )


def moved(name: str, index: Any, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def run(outputs: dict[str, np.ndarray]) -> None:
        outputs[name][index] = change(outputs[name][index])

    return run


@pytest.mark.parametrize("precision", DETECTION_LIMITS)
@pytest.mark.parametrize(
    ("task", "change", "fault"),
    [
        ("segment", moved("output0", np.s_[:, 6:8], np.negative), "masks overlap by"),
        ("segment", moved("output1", np.s_[:], lambda maps: np.roll(maps, 3, axis=3)), "masks overlap by"),
        ("pose", moved("output0", np.s_[:, 9:11], lambda points: points + 2), "keypoints are"),
        ("obb", moved("output0", np.s_[:, 6:], lambda angles: angles + 0.3), "boxes overlap by"),
        ("classify", moved("output0", np.s_[:], lambda scores: np.roll(scores, 1, axis=1)), "five best classes"),
    ],
)
def test_what_is_wrong_beside_the_boxes_fails(task: str, change: Any, fault: str, precision: str) -> None:
    assert compared(HEADS[task], lambda outputs: None, precision).passed
    found = compared(HEADS[task], change, precision)
    assert found.passed is False
    assert fault in "; ".join(found.faults)


def test_a_point_that_the_reference_does_not_see_does_not_count() -> None:
    seen = outputs_for(HEADS["pose"])["output0"][0, [8, 11]]
    assert seen[0].max() < 0.5 < seen[1].min()
    for points, passed in ((np.s_[:, 6:8], True), (np.s_[:, 9:11], False)):
        assert compared(HEADS["pose"], moved("output0", points, lambda values: values + 5), "float32").passed is passed


def test_classes_that_are_as_good_are_excused() -> None:
    head = HEADS["classify"]
    scores = outputs_for(head)["output0"]
    order = np.argsort(-scores[0])

    def swap(outputs: dict[str, np.ndarray]) -> None:
        outputs["output0"][0, order[4]], outputs["output0"][0, order[5]] = scores[0, order[5]], scores[0, order[4]]

    found = compared(head, swap, "float16")
    assert found.passed
    assert found.mean_top5 == 1


def test_rotated_overlaps_are_those_of_drawn_boxes() -> None:
    random = np.random.default_rng(0)
    boxes = np.column_stack(
        (random.uniform(60, 90, (12, 2)), random.uniform(10, 60, (12, 2)), random.uniform(0, 3, 12))
    )
    corners = rotated.corners(boxes)
    found = rotated.overlaps(corners, corners)
    np.testing.assert_allclose(np.diag(found), 1, atol=1e-12)
    drawn = []
    for points in corners:  # in a picture that is 16 times as large
        picture = np.zeros((2400, 2400), np.uint8)
        drawn.append(cv2.fillPoly(picture, [np.round(points * 16).astype(np.int32)], 1).astype(bool))
    expected = [[(one & other).sum() / (one | other).sum() for other in drawn] for one in drawn]
    np.testing.assert_allclose(found, expected, atol=0.01)
    assert rotated.overlaps(corners[:1], corners[:1] + 500).tolist() == [[0]]
    assert rotated.overlaps(corners[:0], corners).shape == (0, 12)
    above = rotated.overlaps(corners, corners, 0.3)
    np.testing.assert_array_equal(above[found >= 0.3], found[found >= 0.3])
    assert 12 < (found >= 0.3).sum() <= (above > 0).sum() < (found > 0).sum()


def test_similar_rotated_boxes_are_left_out_as_in_ultralytics() -> None:
    torch = pytest.importorskip("torch")
    nms = pytest.importorskip("ultralytics.utils.nms", reason="ultralytics is not installed")
    metrics = pytest.importorskip("ultralytics.utils.metrics")
    random = np.random.default_rng(1)
    boxes = np.column_stack(
        (random.uniform(0, 60, (300, 2)), random.uniform(5, 40, (300, 2)), random.uniform(0, 3, 300))
    )
    scores = random.random(300)
    theirs = metrics.batch_probiou(torch.from_numpy(boxes), torch.from_numpy(boxes)).numpy()
    np.testing.assert_allclose(rotated.similarities(boxes, boxes), theirs, atol=1e-6)
    expected = nms.TorchNMS.fast_nms(
        torch.from_numpy(boxes), torch.from_numpy(scores), 0.5, iou_func=metrics.batch_probiou
    )
    assert 5 < len(expected) < 200
    assert rotated.kept(boxes, scores, np.zeros(300, int), 0.5).tolist() == expected.tolist()
    apart = rotated.kept(boxes, scores, np.arange(300), 0.5)
    assert len(apart) == 300, "boxes of different classes do not leave each other out"


def test_masks_overlap() -> None:
    square = Mask(2, 3, np.ones((4, 4), bool))
    assert square.overlap(square) == 1
    assert square.overlap(Mask(4, 3, np.ones((4, 4), bool))) == pytest.approx(8 / 24)
    assert square.overlap(Mask(10, 10, np.ones((4, 4), bool))) == 0
    assert square.polygons() == [[(3, 2), (3, 5), (6, 5), (6, 2)]]
    assert Mask(0, 0, np.zeros((2, 2), bool)).overlap(Mask(9, 9, np.zeros((1, 1), bool))) == 1


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_what_triton_is_told_fits_what_is_found(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    model = import_module("acmix_deploy.serving.triton.model")
    head = HEADS[task]
    found = decode(head, outputs_for(head), [Letterbox().place((SIZE, SIZE), SIZE, SIZE)])
    answer = model.filled(found, MOST)
    told = outputs_of(head, MOST)
    assert {name: array.shape[1:] for name, array in answer.items()} == {node.name: node.dims for node in told}
    assert {name: array.dtype for name, array in answer.items()} == {node.name: node.dtype for node in told}
    count = int(answer["num_detections"][0, 0])
    assert count > 5
    last = answer[told[-1].name][0]
    if task == "segment":
        assert [json.loads(text) for text in last[:count]] == [
            [[[x, y] for x, y in polygon] for polygon in mask.polygons()] for mask in found[0].masks or []
        ]
        assert set(last[count:]) == {b"[]"}
    else:
        np.testing.assert_array_equal(last[:count], found[0].keypoints if task == "pose" else found[0].corners)
        assert not last[count:].any()


ROWS = Head("detect", "rows", "output0", 5)


def rows(count: int = 40) -> np.ndarray:
    random = np.random.default_rng(0)
    scores = np.sort(random.uniform(0.2, 0.9, (1, count)))[:, ::-1, None]
    return np.concatenate((random.uniform(0, 600, (1, count, 4)), scores, random.integers(0, 5, (1, count, 1))), 2)


def test_the_order_of_rows_that_tie_is_no_difference() -> None:
    right = rows()
    right[0, 10:20, 4] = 0.5
    other = right.copy()
    other[0, 10:20] = right[0, [*range(19, 9, -1)]]
    one, two = paired(ROWS, {"output0": right}, {"output0": other}, 1e-3)
    np.testing.assert_array_equal(one["output0"], two["output0"])
    assert one["output0"].shape == right.shape


def test_rows_that_tie_at_the_end_may_be_others_and_no_more() -> None:
    right = rows()
    right[0, -3:, 4] = right[0, :, 4].min()
    other = right.copy()
    other[0, -1, :4] += 300
    one, two = paired(ROWS, {"output0": right}, {"output0": other}, 1e-3)
    assert one["output0"].shape[1] == 39
    np.testing.assert_array_equal(one["output0"], two["output0"])
    for place, change in ((5, np.s_[:4]), (5, 4), (5, 5)):
        wrong = right.copy()
        wrong[0, place, change] += 1
        one, two = paired(ROWS, {"output0": right}, {"output0": wrong}, 1e-3)
        assert one["output0"].shape == right.shape
        assert (one["output0"] != two["output0"]).any(), "a row that is wrong stays"
    tied = right.copy()
    tied[0, :, 4] = 0.5
    others = tied.copy()
    others[0, ::8, :4] += 300
    for near in (2e-3, 0.15):
        one, two = paired(ROWS, {"output0": tied}, {"output0": others}, near)
        assert one["output0"] is tied, "nine of ten rows have to be there"
    small = right.copy()
    small[0, :, 4] *= 1e-3
    wrong = small.copy()
    wrong[0, 3, :4] += 300
    one, two = paired(ROWS, {"output0": small}, {"output0": wrong}, 0.15)
    assert (one["output0"] != two["output0"]).any(), "small scores are not near each other"
    nothing = {"output0": np.zeros((1, 0, 6))}
    assert paired(ROWS, nothing, nothing, 0.1)[0]["output0"].shape == (1, 0, 6)


def test_other_heads_are_not_paired() -> None:
    right, other = {"output0": rows()}, {"output0": rows()[:, ::-1]}
    for head in (None, HEADS["pose"]):
        one, two = paired(head, right, other, 1e-3)
        assert one["output0"] is right["output0"]
        assert two["output0"] is other["output0"]


def test_objectness_multiplies_scores_and_queries_are_shares() -> None:
    output = np.zeros((1, 3, 7), np.float32)
    output[0, 0] = 20, 20, 10, 10, 0.5, 0.9, 0.1
    output[0, 1] = 50, 50, 10, 10, 0.9, 0.2, 0.9
    whole = Placement((64, 64), (64, 64), 0, 0, (64, 64))
    (found,) = decode(Head("detect", "objectness", "o", 2), {"o": output}, [whole])
    assert [(one.name, one.score, one.box) for one in named(found, {0: "a"})] == [
        ("1", pytest.approx(0.81), (45, 45, 55, 55)),
        ("a", pytest.approx(0.45), (15, 15, 25, 25)),
    ]
    shares = np.array([[[0.5, 0.5, 0.25, 0.5, 0.1, 0.8], [0.5, 0.5, 0.25, 0.5, 0.1, 0.7]]], np.float32)
    (found,) = decode(Head("detect", "queries", "o", 2), {"o": shares}, [whole])
    assert found.boxes.tolist() == [[24, 16, 40, 48]] * 2, "queries do not leave each other out"
    assert found.classes.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("task", "name", "place"),
    [
        ("segment", "output0", np.s_[0, 7, 3]),
        ("segment", "output1", np.s_[0, 1, 2, 2]),
        ("pose", "output0", np.s_[0, 9, 3]),
        ("obb", "output0", np.s_[0, 6, 3]),
    ],
)
def test_what_is_not_finite_beside_a_box_spoils_an_output(task: str, name: str, place: Any) -> None:
    head, outputs = HEADS[task], outputs_for(HEADS[task])
    assert spoilt(head, outputs, 0.25) == ""
    outputs[name][place] = np.nan
    assert "not finite" in spoilt(head, outputs, 0.25)
    assert spoilt(head, outputs, 0.95) == "", "no box counts"


@pytest.mark.parametrize("kind", [np.nan, 1.5, -1, 5])
def test_rows_have_a_class(kind: float) -> None:
    output = rows().astype(np.float32)
    assert spoilt(ROWS, {"output0": output}, 0.25) == ""
    output[0, 2, 5] = kind
    assert spoilt(ROWS, {"output0": output}, 0.25)


def test_a_crop_is_that_of_ultralytics() -> None:
    transforms = pytest.importorskip("ultralytics.data.augment", reason="ultralytics is not installed")
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    random = np.random.default_rng(0)
    for (height, width), size in product(((70, 128), (300, 200), (40, 50), (1000, 613)), (64, (64, 96))):
        image = cv2.resize(random.integers(0, 256, (height // 8, width // 8, 3)).astype(np.uint8), (width, height))
        theirs = transforms.classify_transforms(size)(image_module.fromarray(image)).numpy() * 255
        ours = Letterbox(fit="crop")(image, *theirs.shape[1:]).transpose(2, 0, 1)
        assert np.abs(ours - theirs).max() <= 2.01
        placed = Letterbox(fit="crop").place(image.shape, 64, 64)
        corners = placed.undo(np.array([[0, 0, 64, 64]], np.float32))[0]
        assert corners[2] - corners[0] == pytest.approx(min(height, width), rel=0.02)
