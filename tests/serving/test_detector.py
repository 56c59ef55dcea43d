"""The detector as one object: boxes are those of Ultralytics, in batches of any kind, from ONNX files and engines."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from acmix_deploy.detection.boxes import Detections, named
from acmix_deploy.detection.matching import overlaps
from acmix_deploy.detection.metadata import Pixels
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.processing import Processing, attach
from acmix_deploy.runtime.inputs import as_pixels, random_images
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.serving import detector as detector_module
from acmix_deploy.serving.detector import Detector
from scripts import shapes
from scripts.train_shapes import CHECKPOINT
from tests.engine.parts import make_engine
from tests.serving.parts import constant, selected, small, tiny

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


@pytest.fixture(scope="module")
def drawn() -> list[np.ndarray]:
    return [scene.image for scene in shapes.images(2, 12)]


def odd_images(drawn: list[np.ndarray]) -> list[np.ndarray]:
    """Larger and smaller than the model's input, wide and high, and of a single row, column or pixel."""

    def tiled(first: int, rows: int, columns: int) -> np.ndarray:
        lines = (drawn[first + row * columns :][:columns] for row in range(rows))
        return np.vstack([np.hstack(line) for line in lines])

    return [
        drawn[0],
        tiled(0, 1, 2),
        tiled(3, 2, 1),
        tiled(2, 2, 3),
        drawn[5][:90],
        drawn[6][:, 20:120],
        cv2.resize(drawn[7], (640, 640)),
        cv2.resize(drawn[8], (333, 517)),
        cv2.resize(drawn[10], (80, 80)),
        drawn[9][80:81],
        drawn[9][:, 80:81],
        drawn[11][:1, :1],
    ]


def assert_same(found: Detections, right: Detections, iou: float, score: float) -> None:
    """Matched one to one, each with the box of its class that it overlaps most."""
    shared = np.where(right.classes[:, None] == found.classes[None], overlaps(right.boxes, found.boxes), -1)
    partner = shared.argmax(axis=1) if shared.size else np.zeros(0, int)
    assert sorted(partner) == list(range(len(found.boxes))), "boxes are missing, or more than expected"
    assert (shared.max(axis=1, initial=0) > iou).all()
    np.testing.assert_allclose(found.scores[partner], right.scores, atol=score)


def test_boxes_are_those_of_ultralytics(shapes_model: Path, drawn: list[np.ndarray]) -> None:
    yolo = pytest.importorskip("acmix_deploy.yolo")
    yolo.register()
    images = [np.ascontiguousarray(image) for image in odd_images(drawn)]
    model = yolo.ultralytics("models").YOLO(CHECKPOINT)
    results = model.predict(images, rect=False, imgsz=shapes.SIZE, verbose=False)
    boxes = [result.boxes.cpu().numpy() for result in results]
    expected = [Detections(box.xyxy, box.conf, box.cls.astype(np.int64)) for box in boxes]
    assert sum(len(box) for box in boxes) > 40
    assert sum(map(bool, boxes)) >= 9
    with Detector.load(shapes_model) as detector:
        for found, right in zip(detector(images), expected, strict=True):
            assert_same(found, right, iou=0.99, score=1e-3)


def fixed(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for value in (*changed.graph.input, *changed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    return changed


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def test_batches_are_split_and_filled_up(shapes_model: Path, drawn: list[np.ndarray], tmp_path: Path) -> None:
    with Detector.load(shapes_model) as detector:
        assert (detector.max_batch, detector.input_shape) == (None, (1, 3, 160, 160))
        assert (detector.name, detector.names) == ("shapes.fused", dict(enumerate(shapes.NAMES)))
        assert detector([]) == []
        right = [found for image in drawn for found in detector([image])]
        together = detector(drawn)
    onnx.save(fixed(onnx.load(shapes_model), 5), tmp_path / "five.onnx")
    with Detector.load(tmp_path / "five.onnx") as detector:
        assert (detector.max_batch, detector.input_shape) == (5, (5, 3, 160, 160))
        in_fives = detector(drawn)
        assert [found.scores.tolist() for found in detector(drawn[:5])] == [f.scores.tolist() for f in in_fives[:5]]
    for detections in (together, in_fives):
        for found, expected in zip(detections, right, strict=True):
            assert_same(found, expected, iou=0.999, score=1e-5)


def test_an_engine_detects_the_same(gpu, shapes_model: Path, drawn: list[np.ndarray], tmp_path: Path) -> None:
    """Within its profile, here of two to four images."""
    model = onnx.load(shapes_model)
    profile = tuple((count, 3, 160, 160) for count in (2, 3, 4))
    path = make_engine(tmp_path / "shapes.engine", model, {"images": profile}, metadata=metadata_of(model))
    with Detector.load(shapes_model) as detector:
        right = detector(drawn[:5])
    with Detector.load(path) as detector:
        assert (detector.max_batch, detector.input_shape) == (4, (3, 3, 160, 160))
        assert [(node.name, node.dtype) for node in detector.outputs] == [("output0", np.float32)]
        for found, expected in zip(detector(drawn[:5]), right, strict=True):  # four, and one that is filled up
            assert_same(found, expected, iou=0.999, score=1e-5)
        assert gpu.live
    assert not gpu.live
    detector.close()


@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_colours_and_sizes_come_from_the_metadata(tmp_path: Path, element: int) -> None:
    image = np.zeros((64, 96, 3), np.uint8)
    image[:, :, 2] = 204  # red
    with Detector.load(small(tmp_path / "a.onnx", element, names="{0: 'red', 1: 'blue'}")) as detector:
        assert detector.input_shape == (1, 3, 32, 48)
        (found,) = detector([image])
        (other,) = detector([image[:, :, ::-1]])
    (red,) = named(found, detector.names)
    assert (red.name, red.score) == ("red", pytest.approx(0.8, abs=1e-3))
    assert red.box == pytest.approx((24, 24, 40, 40), abs=0.05), "twice the 12 to 20 pixels in the model's input"
    assert named(other, detector.names)[0].name == "blue"
    with Detector.load(tmp_path / "a.onnx", confidence=0.81) as strict:
        assert strict([image])[0].scores.size == 0


def test_what_is_no_detector_is_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"task": "depth"}, r"gives output0 \[1, 6, 24\], and its task is depth"),
        ({"task": "segment"}, r"gives output0 \[1, 6, 24\], which is not an output .* and prototypes"),
        ({"outputs": 4}, r"gives output0 \[1, 4, 24\]"),
    ):
        with pytest.raises(UserError, match=f"a is not a detector: it {said}"):
            Detector.load(small(tmp_path / "a.onnx", **options))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [output])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "b.onnx")
    with pytest.raises(UserError, match=r"b is not a detector: it takes x \[1, 4\] float32"):
        Detector.load(tmp_path / "b.onnx")


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"names": "{0: 'a'}"}, r"gives output0 \[1, 300, 6\], whose rows are a box, a score and a class"),
        ({"names": "{0: 'a', 1: 'b'}"}, r"gives output0 \[1, 300, 6\], which is not one .* do not tell end2end or nms"),
        ({}, r"gives output0 \[1, 300, 6\], whose rows are a box, a score and a class"),
    ],
)
def test_rows_that_are_not_told_are_not_decoded(tmp_path: Path, metadata: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=f"rows is not a detector: it {said}; expected are"):
        Detector.load(selected(tmp_path / "rows.onnx", **metadata))


@pytest.mark.parametrize("metadata", [{"end2end": "True"}, {"args": "{'nms': True}"}])
def test_boxes_that_are_selected_are_taken_as_they_are(tmp_path: Path, metadata: dict[str, str]) -> None:
    with Detector.load(selected(tmp_path / "rows.onnx", **metadata)) as detector:
        (found,) = detector([np.zeros((64, 64, 3), np.uint8)])
    assert [(one.name, one.box) for one in named(found, {0: "a", 1: "b"})] == [
        ("b", (16, 16, 48, 48)),
        ("a", (4, 4, 60, 60)),
    ]


def test_a_file_that_suppresses_boxes_gives_as_many_as_it_was_told(tmp_path: Path) -> None:
    rows = np.zeros((1, 400, 6), np.float32)
    rows[0, :, :4] = 8, 8, 24, 24
    rows[0, :, 4] = np.linspace(0.9, 0.3, 400)
    told = Suppression(most=400).model_dump_json()
    model = constant(tmp_path / "rows.onnx", rows, task="detect", names="{0: 'a'}", suppression=told)
    with Detector.load(model) as detector:
        (found,) = detector([np.zeros((64, 64, 3), np.uint8)])
    assert len(found.scores) == 400


def test_what_is_not_finite_fails(tmp_path: Path) -> None:
    """On noise as a server has it, and on an image: to say that there is nothing would be wrong."""
    with pytest.raises(CheckFailed, match=r"a gives output0 with .* not finite, on noise \[1, 3, 32, 32\]"):
        Detector.load(tiny(tmp_path / "a.onnx", bias=float("nan")))
    image = np.full((64, 96, 3), 255, np.uint8)
    with Detector.load(small(tmp_path / "b.onnx")) as detector:
        assert detector([image // 2])[0].scores.size
        detector._run = lambda feed: {"output0": np.where(np.arange(6)[:, None] < 4, [[8.0]], [[np.nan]])[None]}
        with pytest.raises(CheckFailed, match="b gives output0 with boxes or scores that are not finite"):
            detector([image])
        detector._run = lambda feed: {"output0": np.where(np.arange(6)[:, None] < 4, [[8.0]], [[207.8]])[None]}
        with pytest.raises(CheckFailed, match="b gives output0 with scores from 208 to 208, which are 0 to 1"):
            detector([image])


@pytest.mark.parametrize(("entry", "told"), [("names", "['a']"), ("args", "nms"), ("letterbox", "{"), ("imgsz", "x")])
def test_metadata_of_other_kinds_are_told(tmp_path: Path, entry: str, told: str) -> None:
    with pytest.raises(UserError, match=f"the metadata tell the {entry} {re.escape(repr(told))}, and expected"):
        Detector.load(small(tmp_path / "a.onnx", **{entry: told}))


def test_raw_tensors(tmp_path: Path, shapes_model: Path) -> None:
    noise = np.random.default_rng(0).random((2, 3, 160, 160), np.float32)
    with Detector.load(shapes_model) as detector:
        (output,) = detector.infer({"images": noise}).values()
        assert (detector.inputs[0].name, detector.outputs[0].name) == ("images", "output0")
    np.testing.assert_array_equal(output, open_session(shapes_model).run(None, {"images": noise})[0])
    with Detector.load(small(tmp_path / "a.onnx")) as detector:
        for feed, said in (
            ({"image": noise}, r"a takes images \[batch, 3, height, width\] float32, and is given image"),
            ({}, "and is given nothing"),
            ({"images": noise.astype(np.float64)}, r"and is given \[2, 3, 160, 160\] float64"),
            ({"images": noise[:, :1]}, r"and is given \[2, 1, 160, 160\] float32"),
            ({"images": noise[0]}, r"and is given \[3, 160, 160\] float32"),
        ):
            with pytest.raises(UserError, match=said):
                detector.infer(feed)
        with pytest.raises(CheckFailed, match=r"a fails on images \[2, 3, 4, 4\]: "):
            detector.infer({"images": noise[:, :, :4, :4]})
        for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)):
            with pytest.raises(UserError, match=r"an image is \[h, w, 3\] uint8"):
                detector([image])
        detector([np.zeros((4, 4, 3), np.uint8)])
    with pytest.raises(CheckFailed, match="the detector is closed"):
        detector([np.zeros((4, 4, 3), np.uint8)])


def test_neither_torch_nor_onnx_is_needed(shapes_model: Path, drawn: list[np.ndarray], tmp_path: Path) -> None:
    """Nor what comes with them; the verb works without them too, and what it finds is the same."""
    cv2.imwrite(str(tmp_path / "a.png"), drawn[0])
    blocked = ("torch", "onnx", "ultralytics", "onnx_graphsurgeon", "onnxscript", "onnx_ir")
    script = f"""
import sys
for name in {blocked}:
    sys.modules[name] = None
import acmix_deploy.runtime.models, acmix_deploy.runtime.onnxruntime, acmix_deploy.runtime.tensorrt
from acmix_deploy.cli import main
sys.exit(main(["detect", {str(shapes_model)!r}, {str(tmp_path / "a.png")!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    with Detector.load(shapes_model) as detector:
        (found,) = detector(drawn[:1])
    assert done.stdout == f"a.png: {'; '.join(map(str, named(found, detector.names)))}\n"


def test_a_detector_does_not_import_torch(shapes_model: Path) -> None:
    """It takes a second and hundreds of megabytes, and polygraphy's own runner does where it is installed."""
    script = f"""
import sys
from pathlib import Path
import numpy as np
from acmix_deploy.serving.detector import Detector
with Detector.load(Path({str(shapes_model)!r})) as detector:
    detector([np.zeros((9, 9, 3), np.uint8)])
print(*{{"torch", "onnx", "ultralytics"}} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("element", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_file_that_takes_pixels_finds_the_same(
    order: Pixels, element: int, drawn: list[np.ndarray], tmp_path: Path
) -> None:
    floats = small(tmp_path / "floats.onnx", element)
    model = onnx.load(floats)
    attach(model, Processing(order))
    onnx.save(model, tmp_path / "pixels.onnx")
    images, near = odd_images(drawn), 0 if element == TensorProto.FLOAT else 1e-3
    with Detector.load(floats) as plain, Detector.load(tmp_path / "pixels.onnx") as detector:
        assert detector.input_shape == plain.input_shape == (1, 3, 32, 48)
        assert detector.inputs[0].dtype == np.uint8
        for one, right in zip(detector(images), plain(images), strict=True):
            for found, expected in zip(one[:3], right[:3], strict=True):
                np.testing.assert_allclose(found, expected, rtol=near)
        noise = random_images((2, 3, 32, 48))
        (given,) = detector.infer({"images": as_pixels(noise, order)}).values()
        dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
        np.testing.assert_allclose(given, plain.infer({"images": noise.astype(dtype)})["output0"], rtol=near)
        with pytest.raises(UserError, match=r"takes images \[batch, height, width, 3\] uint8, and is given"):
            detector.infer({"images": noise})


@pytest.mark.parametrize("told", [None, "rgb"])
def test_pixels_that_are_not_told_or_not_taken(told: str | None, tmp_path: Path) -> None:
    model = onnx.load(small(tmp_path / "a.onnx"))
    if told:
        onnx.helper.set_model_props(model, {"task": "detect", "pixels": told})
    else:
        attach(model, Processing("rgb"))
        onnx.helper.set_model_props(model, {"task": "detect"})
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(UserError, match=f"and its metadata tell of {told or 'no'} pixels; expected are"):
        Detector.load(tmp_path / "a.onnx")


def test_threads_of_a_model_leave_the_cores_to_those_that_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = []

    def opened(*given: Any, **options: Any) -> Any:
        sessions.append(open_session(*given, **options))
        return sessions[-1]

    monkeypatch.setattr(detector_module, "open_session", opened)
    Detector.load(tiny(tmp_path / "a.onnx")).close()
    entry = "session.intra_op.allow_spinning"
    assert sessions[0].get_session_options().get_session_config_entry(entry) == "0"


def test_steps_are_a_call_and_their_memory_is_used_again(drawn: list[np.ndarray], tmp_path: Path) -> None:
    with Detector.load(small(tmp_path / "a.onnx")) as detector:
        images = drawn[:3]
        whole = detector(images)
        first = detector.fit(images)
        second = detector.fit(images[1:])
        assert not np.shares_memory(first.batch, second.batch), "one is fitted while the other runs"
        outputs = detector.run(first)
        assert detector.fit(images[:1]).memory is first.memory
        for found, right in zip(detector.boxes(outputs, first.placements), whole, strict=True):
            np.testing.assert_array_equal(found.scores, right.scores)
        (last,) = detector.boxes(detector.run(second), second.placements)[1:]
        np.testing.assert_array_equal(last.scores, whole[2].scores)


def test_a_batch_that_is_not_full_is_filled_with_zeros(drawn: list[np.ndarray], tmp_path: Path) -> None:
    with Detector.load(tiny(tmp_path / "a.onnx", batch=4)) as detector:
        detector(drawn[:4])
        fitted = detector.fit(drawn[:1])
        assert (fitted.batch.shape, fitted.batch[0].any(), fitted.batch[1:].any()) == ((4, 3, 32, 32), True, False)
        assert len(detector.boxes(detector.run(fitted), fitted.placements)) == 1
