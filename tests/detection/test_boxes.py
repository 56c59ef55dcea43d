"""Detections are those of Ultralytics on the same output, in the pixels of the image, and are matched one to one."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acmix_deploy.detection import boxes
from acmix_deploy.detection.boxes import Detections, unlike_detector
from acmix_deploy.detection.heads import Head, unlike_told
from acmix_deploy.detection.images import Letterbox, Placement
from acmix_deploy.detection.matching import match, overlaps
from acmix_deploy.detection.metadata import ModelMetadata

pytest.importorskip("cv2", reason="OpenCV is not installed")

WHOLE = Placement((4096, 4096), (4096, 4096), 0, 0, (4096, 4096))
"""An image that needs no letterbox and cuts nothing off."""


def head_of(output: np.ndarray) -> Head:
    return Head("detect", "anchors", "output0", output.shape[1] - 4)


def decode(output: np.ndarray, placements: list[Placement], **options: Any) -> list[Detections]:
    return boxes.decode(head_of(output), {"output0": output}, placements, **options)


def spoilt(output: np.ndarray, confidence: float) -> str:
    return boxes.spoilt(head_of(output), output, confidence)


def raw(anchors: int, classes: int, seed: int = 0, size: float = 400, levels: int | None = None) -> np.ndarray:
    """An output [1, 4 + classes, anchors]; ``levels`` makes many scores equal.

    Coordinates are multiples of 1/8, so that shifting boxes by 7680 for each class, as Ultralytics does in float32 to
    keep classes apart, rounds nothing.
    """
    random = np.random.default_rng(seed)
    boxes = np.vstack((600 + random.random((2, anchors)) * size, 8 + random.random((2, anchors)) * 120))
    scores = random.random((classes, anchors))
    if levels:
        scores = np.round(scores * levels) / levels
    return np.vstack((np.round(boxes * 8) / 8, scores)).astype(np.float32)[None]


def oracle(output: np.ndarray, **options: float) -> np.ndarray:
    """Ultralytics' detections of the first image, [N, 6]."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision.ops", reason="torchvision is not installed")  # whose NMS it takes if it is there
    nms = pytest.importorskip("ultralytics.utils.nms", reason="ultralytics is not installed")
    settings = {"conf_thres": 0.25, "iou_thres": 0.7, "max_det": 300, "nc": output.shape[1] - 4} | options
    return nms.non_max_suppression(torch.from_numpy(output.copy()), **settings)[0].numpy()


@pytest.mark.parametrize(
    ("output", "options"),
    [
        pytest.param(raw(300, 5), {}, id="overlapping classes"),
        pytest.param(raw(300, 5, size=4), {}, id="one heap"),
        pytest.param(raw(300, 1), {}, id="one class"),
        pytest.param(raw(500, 3, levels=4), {}, id="ties"),
        pytest.param(raw(4000, 80, size=3000), {}, id="more than fit"),
        pytest.param(raw(300, 5), {"conf_thres": 0.9}, id="few"),
        pytest.param(raw(300, 5), {"conf_thres": 1.0}, id="none"),
        pytest.param(raw(300, 5), {"iou_thres": 0.2}, id="less overlap"),
        pytest.param(raw(2, 2), {}, id="fewer anchors than channels"),
    ],
)
def test_detections_are_those_of_ultralytics(output: np.ndarray, options: dict[str, float]) -> None:
    expected = oracle(output, **options)
    names = {"conf_thres": "confidence", "iou_thres": "iou"}
    (found,) = decode(output, [WHOLE], **{names[name]: value for name, value in options.items()})
    assert len(found.scores) == len(expected)
    np.testing.assert_array_equal(found.boxes, expected[:, :4])
    np.testing.assert_array_equal(found.scores, expected[:, 4])
    np.testing.assert_array_equal(found.classes, expected[:, 5])
    assert [array.dtype for array in found[:3]] == [np.float32, np.float32, np.int64]


def test_boxes_beyond_the_edge_do_not_meet_another_class() -> None:
    """Shifted by the largest coordinate alone, the second box would lie upon the first."""
    output = np.array([[[50, 50, 100, 100, 0.9, 0], [-50.5, -50.5, 100, 100, 0, 0.8]]], np.float32).transpose(0, 2, 1)
    (found,) = decode(output, [WHOLE])
    assert found.classes.tolist() == [0, 1]
    assert found.boxes[1].tolist() == [0, 0, 0, 0]


def test_every_image_of_a_batch_by_its_own_placement() -> None:
    output = np.concatenate([raw(50, 3, seed=1), raw(50, 3, seed=2), np.zeros((1, 7, 50), np.float32)])
    placements = [WHOLE, Placement((500, 400), (1000, 800), 10, 20, (1020, 840)), WHOLE]
    batch = decode(output.astype(np.float64), placements)
    assert [len(found.scores) for found in batch][2] == 0
    assert batch[2].boxes.shape == (0, 4)
    for index in (0, 1):
        (alone,) = decode(output[index : index + 1], [placements[index]])
        for array, same in zip(batch[index][:3], alone[:3], strict=True):
            np.testing.assert_array_equal(array, same)
    assert batch[1].boxes.max() <= 500
    assert decode(raw(900, 4, size=3000), [WHOLE], most=None)[0].scores.size > 300


def test_what_is_not_finite_is_no_detection() -> None:
    output = raw(40, 3)
    (before,) = decode(output, [WHOLE])
    spoilt = np.concatenate((output, output[:, :, :3]), axis=2)
    spoilt[0, 4:, 40:] = 1
    spoilt[0, [2, 0, 5], [40, 41, 42]] = np.nan, np.inf, np.nan
    (after,) = decode(spoilt, [WHOLE])
    np.testing.assert_array_equal(before.boxes, after.boxes)


@pytest.mark.parametrize("shape", [(480, 640), (1080, 810), (37, 53), (1, 900), (511, 1023)])
@pytest.mark.parametrize("size", [(640, 640), (160, 224), (33, 97)])
def test_the_letterbox_is_undone_as_ultralytics_does(shape: tuple[int, int], size: tuple[int, int]) -> None:
    ops = pytest.importorskip("ultralytics.utils.ops", reason="ultralytics is not installed")
    boxes = (np.random.default_rng(0).random((50, 4)) * [*size[::-1], *size[::-1]] * 1.1).astype(np.float32)
    boxes = np.hstack((np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])))
    expected = ops.scale_boxes(size, boxes.copy(), shape)
    np.testing.assert_allclose(Letterbox().place(shape, *size).undo(boxes), expected, rtol=1e-4, atol=2e-3)


def test_a_border_at_the_right_and_no_enlarging() -> None:
    placed = Letterbox(center=False, scaleup=False).place((20, 40, 3), 64, 64)
    assert placed == Placement((20, 40), (20, 40), 0, 0, (64, 64))
    np.testing.assert_array_equal(placed.undo(np.array([[4, 5, 50, 60]], np.float32)), [[4, 5, 40, 20]])


def test_what_a_detector_is() -> None:
    detect = ModelMetadata({"task": "detect", "names": "{0: 'person', 1: 'bus'}"})
    output = raw(6, 2)
    assert not unlike_detector(detect, {"output0": output})
    for other, said in ((ModelMetadata(), "not told"), (ModelMetadata({"task": "depth"}), "depth")):
        assert not other.detects
        assert unlike_told(other, {"output0": (1, 6, 6)}) == f"gives output0 [1, 6, 6], and its task is {said}"
    assert unlike_detector(detect, {"output0": output, "output1": output})
    assert unlike_detector(detect, {"output0": output[:, :4]})
    assert unlike_detector(detect, {"output0": output[0]})


def rows(count: int, found: int, classes: int = 80) -> np.ndarray:
    """[1, count, 6]: corners, score and class of what was found, then zeros, as with Ultralytics' ``nms=True``."""
    random = np.random.default_rng(0)
    output = np.zeros((1, count, 6), np.float32)
    output[0, :found, :4] = random.random((found, 4)) * 600
    output[0, :found, 4] = np.sort(random.random(found))[::-1]
    output[0, :found, 5] = random.integers(0, classes, found)
    return output


@pytest.mark.parametrize(
    ("metadata", "output", "said"),
    [
        ({"end2end": "True"}, raw(6, 296), "whose rows are no box, score and class"),
        ({"end2end": "True"}, raw(7, 296), r"gives output0 \[1, 300, 7\], which is not one output"),
        ({"names": "{0: 'a'}"}, rows(300, 4), "whose rows are a box, a score and a class"),
        ({"names": str(dict(enumerate("ab")))}, rows(300, 4), "for 2 classes"),
        ({"names": str(dict(enumerate("ab")))}, raw(300, 3), "for 2 classes"),
        ({"names": str(dict(enumerate("ab")))}, raw(80, 2).transpose(0, 2, 1), "for 2 classes"),
        ({}, rows(300, 300), "whose rows are a box, a score and a class"),
        ({}, rows(300, 0), "whose rows are a box"),
        ({}, rows(300, 3), "whose rows are a box"),
        ({"names": str(dict.fromkeys(range(296), "x"))}, rows(300, 9), "whose rows are a box"),
        ({"names": str(dict(enumerate("ab")))}, rows(6, 2), "whose rows are a box"),
        ({"head": "RTDETRDecoder", "names": "{0: 'a'}"}, raw(300, 2), "for 1 classes"),
        ({}, raw(80, 20).transpose(0, 2, 1), r"scores from 0\.\d+ to \d{3}, which are 0 to 1"),
        ({}, raw(80, 20) - np.float32(0.1), r"scores from -0\.\d+ to 0\.\d+, which are 0 to 1"),
    ],
)
def test_outputs_that_are_something_else(metadata: dict[str, str], output: np.ndarray, said: str) -> None:
    found = unlike_detector(ModelMetadata({"task": "detect", **metadata}), {"output0": output})
    assert re.search(said, found), found


@pytest.mark.parametrize(
    ("metadata", "output"),
    [
        ({}, raw(8400, 80)),
        ({"end2end": "False", "args": "{'batch': 1, 'nms': None}", "names": "{0: 'a', 1: 'b'}"}, raw(300, 2)),
        ({"args": "{'nms': False}"}, raw(300, 2)),
        ({"args": "{'batch': 1, 'nms': True}"}, rows(300, 4)),
        ({"end2end": "True"}, rows(300, 300)),
        ({"head": "RTDETRDecoder", "names": "{0: 'a'}"}, raw(300, 1).swapaxes(1, 2)),
        ({"head": "RTDETRDecoder", "names": "{0: 'a'}"}, rows(300, 9)),
        ({"names": "{0: 'a'}"}, raw(300, 2).swapaxes(1, 2)),
        ({}, raw(8400, 296)),
        ({}, raw(6, 296)),
        ({}, raw(6, 2)),
        ({}, np.concatenate((raw(6, 2)[:, :4], np.zeros((1, 2, 6), np.float32)), axis=1)),
        ({}, np.concatenate((raw(6, 2)[:, :4], np.ones((1, 2, 6), np.float32)), axis=1)),
        ({}, raw(50, 2).astype(np.float16)),
        ({}, np.concatenate((raw(50, 2)[:, :4], np.full((1, 2, 50), 1.0005, np.float32)), axis=1)),
    ],
)
def test_outputs_of_detectors_are_not_taken_for_something_else(metadata: dict[str, str], output: np.ndarray) -> None:
    assert unlike_detector(ModelMetadata({"task": "detect", **metadata}), {"output0": output}) == ""


@pytest.mark.parametrize(("entry", "told"), [("args", "[1]"), ("names", "['a']"), ("end2end", "perhaps")])
def test_metadata_of_any_other_form_are_told(entry: str, told: str) -> None:
    found = unlike_detector(ModelMetadata({"task": "detect", entry: told}), {"output0": raw(50, 2)})
    assert found.startswith(f"cannot be decoded: the metadata tell the {entry} {told!r}, and expected are ")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_and_would_count_spoils_an_output(value: float) -> None:
    output = raw(40, 3)
    output[0, 4:, 0], output[0, 4:, 1] = 0.1, 0.9
    assert spoilt(output, 0.25) == ""
    for row, anchor, expected in (
        (2, 0, ""),  # its scores are below the threshold
        (2, 1, "boxes or scores that are not finite"),
        (np.s_[4:], 0, "boxes or scores that are not finite"),
    ):
        changed = output.copy()
        changed[0, row, anchor] = value
        assert spoilt(changed, 0.25) == expected
    assert spoilt(np.full_like(output, value), 0.25)


def test_scores_that_are_none_spoil_an_output() -> None:
    output = raw(40, 3)
    output[0, 5, 7] = 207.8
    assert re.fullmatch(r"scores from 0\.\d+ to 208, which are 0 to 1", spoilt(output, 0.25))


def test_neither_torch_nor_onnx_is_needed() -> None:
    code = (
        "import sys; import acmix_deploy.detection.boxes, acmix_deploy.detection.matching;"
        "print({'torch', 'onnx', 'onnxruntime', 'ultralytics'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def found(*detections: tuple[list[float], float, int]) -> Detections:
    boxes, scores, classes = zip(*detections, strict=True) if detections else ((), (), ())
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(classes, np.int64)
    )


A, NEAR_A, FAR = [0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]  # A and NEAR_A overlap by 0.9


def test_overlaps_are_those_of_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    torch = pytest.importorskip("torch")
    corners = np.sort(np.random.default_rng(0).random((2, 30, 2, 2)) * 100, axis=2).reshape(2, 30, 4)
    expected = ops.box_iou(*map(torch.from_numpy, corners)).numpy()
    np.testing.assert_allclose(overlaps(*corners), expected, atol=1e-12)
    assert overlaps(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)) == 0
    assert overlaps(np.zeros((0, 4), np.float32), np.zeros((3, 4), np.float32)).shape == (0, 3)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        pytest.param([(A, 0.9, 0)], [(NEAR_A, 0.8, 0)], [(0, 0, 0.9)], id="moved a little"),
        pytest.param([(A, 0.9, 0)], [([0, 0, 10, 5], 0.9, 0)], [(0, 0, 0.5)], id="just near enough"),
        pytest.param([(A, 0.9, 0)], [([0, 0, 10, 4.9], 0.9, 0)], [(0, None), (None, 0)], id="just too far"),
        pytest.param([(A, 0.9, 0)], [(A, 0.9, 1)], [(0, 0, 1)], id="of another class"),
        pytest.param([(A, 0.9, 0)], [(FAR, 0.9, 1)], [(0, None), (None, 0)], id="elsewhere"),
        pytest.param([(A, 0.9, 0)], [], [(0, None)], id="lost"),
        pytest.param([], [(A, 0.9, 0)], [(None, 0)], id="added"),
        pytest.param([], [], [], id="nothing"),
        pytest.param([([0, 5, 0, 9], 0.9, 0)], [([0, 6, 0, 9], 0.9, 0)], [], id="beyond the edge"),
        pytest.param([(A, 0.3, 0)], [(A, 0.22, 0)], [(0, 0, 1)], id="below the threshold by a little"),
        pytest.param([(A, 0.3, 0)], [(A, 0.21, 0)], [(0, 0, 1)], id="lower by less than 0.1"),
        pytest.param([(A, 0.3, 0)], [(A, 0.19, 0)], [(0, None)], id="lower by more than 0.1"),
        pytest.param([(A, 0.19, 0)], [(A, 0.3, 0)], [(None, 0)], id="higher by more than 0.1"),
        pytest.param([(A, 0.9, 0)], [(A, 0.26, 0)], [(0, 0, 1)], id="lower by much but a detection"),
        pytest.param([(A, 0.9, 0)], [(A, 0.24, 0)], [(0, None)], id="from high to none"),
        pytest.param([(A, 0.22, 0)], [(A, 0.3, 0)], [(0, 0, 1)], id="above the threshold by a little"),
        pytest.param([(A, 0.2, 0)], [(A, 0.2, 0)], [], id="no detection on either side"),
        pytest.param([(A, 0.9, 0)], [(A, 0.2, 1)], [(0, None)], id="another class, and not even a detection"),
        pytest.param([(A, 0.9, 0)], [(A, 0.7, 1), (NEAR_A, 0.6, 0)], [(0, 1, 0.9), (None, 0)], id="own class first"),
        pytest.param([(A, 0.9, 0)], [(NEAR_A, 0.9, 0), (A, 0.5, 0)], [(0, 1, 1), (None, 0)], id="nearest first"),
        pytest.param(
            [(A, 0.3, 0)], [(NEAR_A, 0.3, 0), (A, 0.22, 0)], [(0, 0, 0.9)], id="a detection before what is none"
        ),
        pytest.param(
            [(A, 0.9, 0), (NEAR_A, 0.8, 0)], [(A, 0.9, 0)], [(0, 0, 1), (1, None)], id="one cannot stand for two"
        ),
    ],
)
def test_matches(reference: list, candidate: list, expected: list) -> None:
    matches = match(found(*reference), found(*candidate), confidence=0.25, near=0.1)
    assert [(m.reference, m.candidate) for m in matches] == [case[:2] for case in expected]
    assert [m.iou for m in matches] == pytest.approx([case[2] if len(case) == 3 else 0 for case in expected])


def scored(*boxes: tuple[list[float], float, float]) -> Detections:
    """Boxes by their scores as a ring and as a circle."""
    rows = [(box, max(ring, circle), int(circle > ring)) for box, ring, circle in boxes]
    every = np.array([box[1:] for box in boxes], np.float32).reshape(-1, 2)
    return found(*rows)._replace(by_class=every)


@pytest.mark.parametrize(
    ("reference", "candidate", "expected"),
    [
        pytest.param([(A, 0.56, 0.555)], [(A, 0.555, 0.56)], [(0, 0, True)], id="a tie"),
        pytest.param([(A, 0.60, 0.595)], [(A, 0.40, 0.60)], [(0, 0, False)], id="the ring is gone"),
        pytest.param([(A, 0.60, 0.30)], [(A, 0.595, 0.60)], [(0, 0, True), (None, 0, False)], id="the circle is new"),
        pytest.param([(A, 0.60, 0.1)], [(FAR, 0.59, 0.60)], [(0, None, False), (None, 0, False)], id="elsewhere"),
        pytest.param(
            [(A, 0.56, 0.555), (NEAR_A, 0.1, 0.55)],
            [(A, 0.555, 0.56)],
            [(1, 0, False), (0, 0, True)],
            id="one box for two, as it suppresses the other of its class",
        ),
        pytest.param(
            [(A, 0.555, 0.56)],
            [(A, 0.56, 0.555), (NEAR_A, 0.1, 0.55)],
            [(0, 1, False)],
            id="the same the other way round",
        ),
        pytest.param([(A, 0.26, 0.255)], [(A, 0.24, 0.245)], [(0, 0, True)], id="both below the threshold by a little"),
        pytest.param([(A, 0.24, 0.245)], [(A, 0.26, 0.255)], [], id="nothing is added"),
        pytest.param([(A, 0.24, 0.245)], [(A, 0.29, 0.255)], [(None, 0, False)], id="added"),
    ],
)
def test_boxes_with_two_classes_that_are_equally_good(reference: list, candidate: list, expected: list) -> None:
    matches = match(scored(*reference), scored(*candidate), confidence=0.25, near=0.02)
    assert [(m.reference, m.candidate, m.tie) for m in matches] == expected
    without = (scored(*side)._replace(by_class=None) for side in (reference, candidate))
    assert not any(m.tie for m in match(*without, confidence=0.25, near=0.02))


def test_scores_of_every_class_are_those_of_the_box() -> None:
    output = raw(200, 4, seed=3)
    (plain,), (found,) = decode(output, [WHOLE]), decode(output, [WHOLE], by_class=True)
    assert plain.by_class is None
    assert found.by_class is not None
    assert found.by_class.shape == (len(found.scores), 4)
    np.testing.assert_array_equal(found.by_class.argmax(axis=1), found.classes)
    np.testing.assert_array_equal(found.by_class.max(axis=1), found.scores)


detections = st.lists(
    st.tuples(
        st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 3)] * 2).map(
            lambda b: [10 * b[0], 10 * b[1], 10 * (b[0] + b[2]), 10 * (b[1] + b[3])]
        ),
        st.sampled_from([0.13, 0.2, 0.26, 0.3, 0.6, 0.9]),
        st.integers(0, 2),
    ),
    max_size=8,
).map(lambda rows: found(*rows))


@settings(max_examples=60, deadline=None)
@given(detections, detections)
def test_every_detection_is_in_one_match(reference: Detections, candidate: Detections) -> None:
    matches = match(reference, candidate, confidence=0.25, near=0.1)
    for side, arrays in ((0, reference), (1, candidate)):
        taken = [m[side] for m in matches if m[side] is not None]
        assert len(set(taken)) == len(taken)
        assert set(np.flatnonzero(arrays.scores > 0.25)) <= set(taken)
    for m in matches:
        if m.reference is not None and m.candidate is not None:
            right, other = reference.scores[m.reference], candidate.scores[m.candidate]
            assert m.iou >= 0.5
            assert max(right, other) > 0.25
            assert min(right, other) > 0.25 or abs(right - other) <= 0.1
    same = match(reference, reference, confidence=0.25, near=0.1)
    assert all(m.iou == 1 or m.reference != m.candidate for m in same)


@settings(max_examples=30, deadline=None)
@given(detections)
def test_nothing_is_lost_against_itself(same: Detections) -> None:
    count = int((same.scores > 0.25).sum())
    matches = match(same, same, confidence=0.25, near=0.1)
    assert sum(m.reference is not None and m.candidate is not None for m in matches) >= count
    assert {m.iou for m in matches} <= {1.0}
