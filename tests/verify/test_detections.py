"""Detectors are judged by what they detect: what a distance of outputs does not show fails here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from acmix_deploy.cli import main
from acmix_deploy.detection.boxes import Detection, Detections, decode
from acmix_deploy.detection.images import Batch, Letterbox, find, placed_batches
from acmix_deploy.detection.matching import Match, match
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.export import export
from acmix_deploy.report.documents import VerifyDocument
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.models import open_model
from acmix_deploy.runtime.torch import TorchRunner
from acmix_deploy.verify import (
    Candidate,
    DetectionComparison,
    Scenes,
    Verification,
    compare_files,
    read_verification,
    run,
    verify,
)
from acmix_deploy.verify import detections as stage
from acmix_deploy.verify.detections import DetectionPair, ImageComparison
from acmix_deploy.verify.limits import DETECTION_LIMITS, FILE_TOLERANCES, TOLERANCES, relative_at_most
from acmix_deploy.verify.picture import draw
from tests.engine.parts import make_engine
from tests.serving.parts import selected

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")

NAMES = {0: "red", 1: "green", 2: "blue"}
METADATA = ModelMetadata().updated(task="detect", names=NAMES, stride=16, letterbox='{"padding_value": 0}')
STRIDE = 16


class Detector(nn.Module):
    """Finds the cells of 16x16 pixels that are red, green or blue; every cell has a box somewhat larger than itself."""

    def __init__(self, spoil: Callable[[Tensor], Tensor] = lambda output: output) -> None:
        super().__init__()
        self.colour = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.colour.weight.copy_(16 * torch.eye(3)[:, :, None, None] - 6)
            self.colour.bias.fill_(-1)
        self.spoil = spoil

    def forward(self, x: Tensor) -> Tensor:
        cells = nn.functional.avg_pool2d(x, STRIDE)
        height, width = cells.shape[2:]
        columns, rows = torch.arange(width) * 1.0, torch.arange(height) * 1.0
        centres = torch.stack(torch.broadcast_tensors(columns[None], rows[:, None])) * STRIDE + STRIDE / 2
        sizes = (1 + cells.mean(1, keepdim=True).expand(-1, 2, -1, -1) / 2) * STRIDE
        boxes = torch.cat((centres[None] + 0 * sizes, sizes), 1)
        return self.spoil(torch.cat((boxes, self.colour(cells).sigmoid()), 1).flatten(2))


def changed(change: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def spoil(output: Tensor) -> Tensor:
        output = output.clone()
        change(output)
        return output

    return spoil


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of coloured squares, of different sizes; blue is only in c.png."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, (height, width), colours in (("a", (96, 128), 2), ("b", (160, 90), 2), ("c", (64, 64), 3)):
        image = np.full((height, width, 3), 40, np.uint8)
        for index in range(9):
            y, x = random.integers(0, height - 24), random.integers(0, width - 24)
            image[y : y + 24, x : x + 24] = 30
            image[y : y + 24, x : x + 24, 2 - index % colours] = 230  # BGR
        cv2.imwrite(str(folder / f"{name}.png"), image)
    return folder


@pytest.fixture(scope="module")
def scenes(folder: Path) -> Scenes:
    return Scenes("images", list(placed_batches(find(folder).paths, [(2, 3, 128, 128)])), NAMES)


def compared(scenes: Scenes, change: Callable[[Tensor], object], precision: str = "float16") -> Verification:
    candidate = Candidate(TorchRunner(Detector(changed(change)), "candidate"), precision)
    return verify(TorchRunner(Detector(), "right"), [candidate], scenes, metadata=METADATA)


def test_a_detector_detects_what_it_detects(scenes: Scenes) -> None:
    result = compared(scenes, lambda output: None, "float32")
    (found,) = result.detections
    assert result.passed
    assert found.expected == found.matched > 20
    assert (found.lost, found.added, found.class_changes, found.max_score_change, found.min_iou) == (0, 0, 0, 0, 1)
    assert sorted(image.image.name for image in found.images) == ["a.png", "b.png", "c.png"], "not that which fills up"
    assert {comparison.output for comparison in result.comparisons} == {"boxes", "scores"}
    names = {pair.reference.name for image in found.images for pair in image.pairs if pair.reference}
    assert names == set(NAMES.values())
    heights = {image.image.name: max(p.reference.box[3] for p in image.pairs) for image in found.images}
    assert heights["a.png"] <= 96
    assert 96 < heights["b.png"] <= 160


def test_a_class_that_is_gone_fails_though_the_output_hardly_changes(scenes: Scenes) -> None:
    """Poison: the blue squares are lost. They are few, and coordinates make up nearly all of the output's norm."""

    def no_blue(output: Tensor) -> None:
        output[:, 6] = 0

    output, spoilt = (
        Detector(spoil)(torch.from_numpy(scenes.batches[-1].images)) for spoil in (lambda x: x, changed(no_blue))
    )
    whole = deviation(output.detach().numpy(), spoilt.detach().numpy()).relative_l2
    assert whole is not None
    assert 0 < whole < 0.02 < TOLERANCES["int8"].limit()
    result = compared(scenes, no_blue, "int8").judged_by(relative_at_most(10))
    assert not result.failures
    (found,) = result.detections
    assert found.passed is False
    assert found.lost == sum(image.image.name == "c.png" for image in found.images for _ in image.having("lost")) > 0
    assert found.images[0].image.name == "c.png"
    with pytest.raises(
        CheckFailed, match=r"candidate: of \d+ detections \d+ are lost.*worst in c.png: blue [01]\.\d\d at"
    ):
        result.check()


def near(output: Tensor) -> None:
    output[:, 4:] += 1e-3
    output[:, :4] += 0.2


def swap(output: Tensor) -> None:
    output[:, 4:] = output[:, [5, 4, 6]]


def shift(output: Tensor) -> None:
    output[:, 0] += STRIDE


def more(output: Tensor) -> None:
    for image in output:
        empty = (image[4:] < 0.24).all(0).nonzero()[:9, 0]
        image[4, empty] = 0.9


def nan(output: Tensor) -> None:
    output[:, 4] = torch.nan


@pytest.mark.parametrize(
    ("change", "outcomes", "passed"),
    [
        (near, {"matched"}, True),
        (swap, {"matched", "class changed"}, False),
        (shift, {"matched", "class changed", "lost", "added"}, False),
        (more, {"matched", "added"}, False),
        (nan, {"lost"}, False),
    ],
)
def test_what_becomes_of_detections(
    scenes: Scenes, change: Callable[[Tensor], None], outcomes: set[str], passed: bool
) -> None:
    (found,) = compared(scenes, change).detections
    assert {pair.outcome for image in found.images for pair in image.pairs} <= outcomes
    assert found.passed is passed
    assert found.expected == found.matched + found.lost + found.class_changes
    assert found.lost_share == pytest.approx((found.lost + found.class_changes) / found.expected)
    mismatches = [len(image.having("lost", "added", "class changed")) for image in found.images]
    assert mismatches == sorted(mismatches, reverse=True)
    if change is near:
        assert found.max_score_change == pytest.approx(1e-3, rel=0.02)
        assert 0.9 < found.min_iou < 1
    if change is more:
        assert found.added
        assert found.lost_share <= found.limits.lost, "failed for what is added"
    if change is swap:
        assert found.class_changes


def test_a_score_that_crosses_the_threshold_is_no_loss(scenes: Scenes) -> None:
    (found,) = compared(scenes, lambda output: None).detections
    scores = sorted(pair.reference.score for image in found.images for pair in image.pairs)
    above = scenes._replace(confidence=scores[len(scores) // 2] - 0.01)
    (found,) = compared(above, lambda output: output[:, 4:].sub_(0.019)).detections
    assert found.expected >= len(scores) // 2
    assert min(pair.candidate.score for image in found.images for pair in image.pairs) < above.confidence
    assert (found.lost, found.added, found.class_changes) == (0, 0, 0)
    (raised,) = compared(above, lambda output: output[:, 4:].add_(0.019)).detections
    assert (raised.expected, raised.matched, raised.added) == (found.expected, found.expected, 0)
    assert sum(len(image.pairs) for image in raised.images) > raised.expected, "matches of what is below the threshold"
    (found,) = compared(above, lambda output: output[:, 4:].mul_(0.6)).detections
    assert found.lost > found.expected / 2


@pytest.mark.parametrize(("confidence", "near"), [(0.25, 0.125), (0.02, 0.01), (0.9, 0.15)])
def test_a_low_threshold_is_crossed_by_half_of_itself_at_most(
    confidence: float, near: float, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []

    def spied_decode(*arguments: Any, **options: Any) -> list[Detections]:
        used.append(confidence - options["confidence"])
        return decode(*arguments, **options)

    def spied_match(*arguments: Any) -> list[Match]:
        used.append(arguments[3])
        return match(*arguments)

    monkeypatch.setattr(stage, "decode", spied_decode)
    monkeypatch.setattr(stage, "match", spied_match)
    compared(scenes._replace(confidence=confidence), lambda output: None, "int8")
    assert used == pytest.approx([near] * len(used))
    assert used


def test_a_tie_that_rounding_decides_the_other_way_is_a_match(scenes: Scenes) -> None:
    """The best class of a third of the detections changes, and hardly a score."""

    def tie(by: float) -> Callable[[Tensor], object]:
        def change(output: Tensor) -> None:
            best = output[:, 4:].max(1).values
            output[:, 4], output[:, 5] = best + by, best
            output[:, 6] = 0

        return change

    right = TorchRunner(Detector(changed(tie(0.003))), "right")

    def judged(change: Callable[[Tensor], object]) -> DetectionComparison:
        candidate = Candidate(TorchRunner(Detector(changed(change)), "candidate"), "float16")
        return verify(right, [candidate], scenes, metadata=METADATA).detections[0]

    def apart(output: Tensor) -> None:
        tie(0.003)(output)
        output[:, 4] -= 0.1

    found = judged(tie(-0.003))
    assert found.passed
    assert found.matched == found.expected > 20
    assert (found.lost, found.added, found.class_changes) == (0, 0, 0)
    assert found.max_score_change == pytest.approx(0.006, abs=1e-4)
    assert {p.candidate.name for image in found.images for p in image.pairs if p.candidate and p.reference} == {"red"}
    assert judged(apart).class_changes == found.expected


def test_scores_have_a_limit_of_their_own_and_one_for_all_is_one_for_all(scenes: Scenes) -> None:
    eager = {"float16": lambda: TorchRunner(Detector(changed(near)), "eager")}
    candidate = Candidate(TorchRunner(Detector(changed(lambda output: output.mul_(0.9))), "off"), "float16")
    result = verify(TorchRunner(Detector(), "right"), [candidate], scenes, metadata=METADATA, eager=eager)
    boxes, scores = result.comparisons[:2]
    for found, name in ((boxes, "float16"), (scores, "float16 scores")):
        assert found.eager_error
        assert found.limit == pytest.approx(2 * found.eager_error + TOLERANCES[name].floor)
    assert {found.limit for found in result.judged_by(relative_at_most(0.5)).comparisons} == {0.5}
    assert result.judged_by(TOLERANCES) == result


def test_limits_follow_the_type_and_may_be_changed_later(scenes: Scenes, tmp_path: Path) -> None:
    def two(output: Tensor) -> None:
        output[0, 4:, output[0, 4].topk(2).indices] = 0

    for name, limits in DETECTION_LIMITS.items():
        assert compared(scenes, two, name).detections[0].limits == limits
    result = compared(scenes, two).judged_by(relative_at_most(1))
    (found,) = result.detections
    share = found.lost_share
    assert 0.01 < share < 0.2
    assert not result.passed
    assert result.judged_by(lost=share).passed
    assert not result.judged_by(lost=share - 1e-6).passed
    assert result.judged_by(lost=share).judged_by(relative_at_most(1e-9)).failures
    path = tmp_path / "report.json"
    document = VerifyDocument(**result.model_dump()).model_dump_json(by_alias=True)
    for text in (document, json.dumps({"document": "export", "verification": json.loads(document)})):
        path.write_text(text)
        assert read_verification(path) == result
    broken = '{"document": "export"}', '{"document": "verify"}', '{"document": "export", "verification": 3}'
    for text in ("{}", "[]", *broken):
        path.write_text(text)
        with pytest.raises(UserError, match=r"what `verify` or `export` writes is needed|does not hold what it should"):
            read_verification(path)
    with pytest.raises(UserError, match=r"cannot read .*absent\.json"):
        read_verification(tmp_path / "absent.json")


def test_where_nothing_is_detected_nothing_is_shown(scenes: Scenes) -> None:
    blind = TorchRunner(Detector(changed(lambda output: output[:, 4:].mul_(0.1))), "blind")
    same = Candidate(TorchRunner(Detector(changed(lambda output: output[:, 4:].mul_(0.1))), "same"))
    result = verify(blind, [same], scenes, metadata=METADATA)
    assert result.detections[0].passed is None
    assert result.passed
    assert result.notes == (
        "too little was detected in the images, so that detections show nothing; an untrained model?",
    )
    seeing = verify(blind, [Candidate(TorchRunner(Detector(), "seeing"))], scenes, metadata=METADATA)
    assert seeing.detections[0].passed is False, "what is added to nothing is too much"


@pytest.mark.parametrize(
    ("metadata", "parts"),
    [
        (ModelMetadata(), ["output0", "output0 by channel"]),
        (METADATA.updated(task="depth"), ["output0", "output0 by channel"]),
    ],
)
def test_what_is_no_detector_is_compared_by_its_outputs(
    scenes: Scenes, metadata: dict[str, str], parts: list[str]
) -> None:
    runners = [TorchRunner(Detector(), name) for name in ("right", "same")]
    result = verify(runners[0], [Candidate(runners[1])], scenes, metadata=metadata)
    assert result.detections == ()
    assert [found.part for found in result.comparisons] == parts * 2


def test_boxes_that_are_selected_already_are_not_decoded(
    scenes: Scenes, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In images that is an error; elsewhere the output is compared as it is, which a note says."""
    runners = [TorchRunner(Detector(lambda output: output.transpose(1, 2)), name) for name in ("right", "same")]
    told = METADATA.updated(end2end=True)
    with pytest.raises(UserError, match=r"right is not a detector: it gives output0 \[2, 64, 7\], which is not one"):
        verify(runners[0], [Candidate(runners[1])], scenes, metadata=told)
    with pytest.raises(UserError, match="for 3 classes"):
        verify(runners[0], [Candidate(runners[1])], scenes, metadata=METADATA)
    feeds = [{"images": batch.images} for batch in scenes.batches]
    result = verify(runners[0], [Candidate(runners[1])], feeds, metadata=told)
    assert {found.output for found in result.comparisons} == {"output0"}
    assert "boxes and scores are not told apart: right gives output0 [2, 64, 7], which is" in result.notes[0]
    files = [selected(tmp_path / f"{name}.onnx") for name in "ab"]
    assert main(["verify", *map(str, files), "--images", str(folder)]) == 2
    assert "a.onnx is not a detector: it gives output0 " in capsys.readouterr().err


def test_another_number_of_anchors_is_a_problem_of_the_output(scenes: Scenes) -> None:
    fewer = Candidate(TorchRunner(Detector(lambda output: output[..., 1:]), "fewer"))
    result = verify(TorchRunner(Detector(), "right"), [fewer], scenes, metadata=METADATA)
    assert result.detections == ()
    assert {found.output: found.problem.partition(" ")[0] for found in result.failures} == {"output0": "shape"}


def test_the_worst_image_side_by_side(scenes: Scenes, tmp_path: Path) -> None:
    def no_blue(output: Tensor) -> None:
        output[:, 6] = 0

    result = compared(scenes, no_blue)
    worst = result.worst_image
    assert worst is not None
    draw(worst, tmp_path / "made" / "worst.png")
    picture = cv2.imread(str(tmp_path / "made" / "worst.png"))
    assert picture.shape == (640, 1280, 3), "an image of 64x64 is enlarged"
    (lost, *_) = worst.having("lost")
    left, _, _, bottom = (round(edge * 10) for edge in lost.reference.box)
    vermilion = np.array([0x00, 0x5E, 0xD5])
    near_corner = np.s_[bottom - 2 : bottom + 1, left : left + 9]
    assert (picture[:, :640][near_corner] == vermilion).all(axis=-1).any()
    assert not (picture[:, 640:] == vermilion).all(axis=-1).any()
    with pytest.raises(UserError, match="does not end like a picture"):
        draw(worst, tmp_path / "worst.txt")
    with pytest.raises(UserError, match="cannot be read to draw"):
        draw(worst.model_copy(update={"image": tmp_path / "gone.png"}), tmp_path / "worst.png")


def blind_to_green(source: Path, target: Path) -> Path:
    model = onnx.load(source)
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("colour.bias"))
    bias.CopyFrom(numpy_helper.from_array(np.array([-1, -30, -1], np.float32), bias.name))
    onnx.save(model, target)
    return target


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The detector as an ONNX file with free axes, and one that sees no green."""
    folder = tmp_path_factory.mktemp("files")
    axes = ("batch", "height", "width")
    right = folder / "right.onnx"
    export(Detector().eval(), right, input_shape=(1, 3, 64, 96), dynamic=axes, divisor=STRIDE, metadata=METADATA)
    return {"right": right, "wrong": blind_to_green(right, folder / "wrong.onnx")}


def test_files_are_compared_on_images_as_training_fits_them(
    files: dict[str, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Batch] = []

    def spy(*arguments: Any, **options: Any) -> Verification:
        seen.extend(arguments[2].batches)
        return verify(*arguments, **options)

    monkeypatch.setattr(run, "verify", spy)
    same = tmp_path / "same.onnx"
    same.write_bytes(files["right"].read_bytes())
    result = compare_files(files["right"], same, images=folder, input_shape=(1, 3, 64, 96))
    assert result.passed
    assert {found.input_shapes["images"] for found in result.comparisons} == {
        (1, 3, 64, 96),
        (2, 3, 96, 160),
        (1, 3, 128, 128),
    }
    assert [len(batch.paths) for batch in seen] == [1, 2, 1]
    border = Letterbox(padding_value=0)
    for batch in seen:
        images = [border(cv2.imread(str(path)), *batch.images.shape[2:]) for path in batch.paths]
        np.testing.assert_allclose(batch.images.transpose(0, 2, 3, 1)[..., ::-1] * 255, images, atol=1e-3)


def test_the_command(files: dict[str, Path], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, picture = tmp_path / "verify.json", tmp_path / "worst.jpg"
    pair = [str(files["right"]), str(files["wrong"])]
    common = ["--images", str(folder), "--input-shape", "1,3,128,128"]
    assert main(["verify", *pair, *common, "-o", str(report), "--worst", str(picture)]) == 1
    printed = capsys.readouterr()
    assert re.search(
        r"Worst image of wrong.onnx: [abc].png at \d+x\d+\n  green [01]\.\d\d at .* (lost|became red)", printed.out
    )
    assert printed.err.endswith("lost\n") or printed.err.endswith("...\n")
    assert "wrong.onnx: of" in printed.err
    assert cv2.imread(str(picture)).shape[1] >= 1280
    document = VerifyDocument.model_validate_json(report.read_text())
    assert not document.passed
    assert document.detections[0].lost > 3

    judge = ["verify", "--from", str(report), "--max-relative", "2"]
    assert main([*judge, "--max-lost", "1", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["passed"] is True
    assert {found["limit"] for found in again["comparisons"]} == {2}
    assert again["detections"][0]["limits"] == DETECTION_LIMITS["float32"].model_dump() | {"lost": 1}
    assert main([*judge, "--max-lost", "1", "--min-iou", "1", "--max-score-change", "0"]) == 0, "what is left is equal"
    assert main([*judge, "--max-lost", "0.01"]) == 1
    assert main([*judge]) == 1
    capsys.readouterr()
    assert main(["verify", *pair, *common, "--confidence", "1"]) == 1, "the scores differ, whatever is detected"
    assert "too few detections" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_scores_of_nothing_fail_where_the_task_is_unknown(
    files: dict[str, Path], folder: Path, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "open_model", lambda path, name, **_: open_model(path, name)._replace(precision=precision))
    right, same, nothing = (tmp_path / f"{name}.onnx" for name in ("right", "same", "nothing"))
    for path, factor in ((right, 1), (same, 1), (nothing, 0)):
        model = onnx.load(files["right"])
        next(entry for entry in model.metadata_props if entry.key == "task").value = "depth"
        (last,) = (node for node in model.graph.node if node.op_type == "Sigmoid")
        made, last.output[0] = last.output[0], "unscaled"
        model.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        place = list(model.graph.node).index(last) + 1
        model.graph.node.insert(place, onnx.helper.make_node("Mul", ["unscaled", "factor"], [made]))
        onnx.save(model, path)
    common = ["--images", str(folder), "--input-shape", "1,3,128,128"]
    assert main(["verify", str(right), str(same), *common]) == 0
    assert main(["verify", str(right), str(nothing), *common]) == 1


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "two files are compared"),
        (["a.onnx"], "two files are compared"),
        (["a.onnx", "b.onnx", "--from", "c.json"], "is given too"),
        (["--from", "c.json"], "cannot read c.json"),
        (
            ["--from", "c.json", "--confidence", "0.3", "--provider", "cpu", "--plugin", "p.so"],
            "--from runs nothing, so that --confidence, --provider, --plugin would change nothing",
        ),
        (["--from", "c.json", "--input-shape", "1,3,64,64"], "--input-shape would change nothing"),
        (["a.onnx", "b.onnx", "--worst", "w.txt"], "does not end like a picture"),
    ],
)
def test_commands_that_cannot_be_run(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--max-relative", "-0.1", "'-0.1' is not a number of at least 0"),
        ("--max-relative", "nan", "'nan' is not a number of at least 0"),
        ("--max-lost", "1.5", "'1.5' is not a number from 0 to 1"),
        ("--min-iou", "much", "'much' is not a number"),
    ],
)
def test_limits_out_of_range_are_refused_with_the_range(
    option: str, value: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["verify", "--from", "c.json", f"{option}={value}"])
    assert refused.value.code == 2
    assert why in capsys.readouterr().err


def test_no_worst_image_without_detections(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.json"
    command = ["verify", str(files["right"]), str(files["wrong"]), "--input-shape", "1,3,32,32", "-o", str(report)]
    assert main([*command, "--worst", str(tmp_path / "w.png")]) == 2
    assert "Add --images" in capsys.readouterr().err
    assert not report.exists(), "nothing was run"
    main(command)
    assert main(["verify", "--from", str(report), "--worst", str(tmp_path / "w.png")]) == 2
    assert "no worst image" in capsys.readouterr().err


def test_a_side_that_is_no_multiple_of_the_stride_is_refused(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(files["right"]), str(files["wrong"])]
    assert main(["verify", *pair, "--input-shape", "1,3,64,100"]) == 2
    assert "a side of 100, and sides are multiples of the stride 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("profiles", "expected"),
    [
        (
            [((1, 3, 32, 32), (1, 3, 64, 64), (4, 3, 128, 128))],
            [(1, 3, 64, 64), (1, 3, 32, 32), (4, 3, 128, 128), (2, 3, 96, 96)],
        ),
        ([((1, 3, 64, 64), (1, 3, 64, 64), (1, 3, 64, 64))], [(1, 3, 64, 64)]),
        (
            [((1, 3, 32, 32), (1, 3, 64, 64), (2, 3, 64, 64)), ((1, 3, 48, 48), (2, 3, 96, 96), (2, 3, 96, 96))],
            [(1, 3, 64, 64), (2, 3, 64, 64), (1, 3, 48, 48)],
        ),
    ],
)
def test_an_engine_is_run_within_its_profile(
    profiles: list, expected: list, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ranges = iter([{"images": profile} for profile in profiles])
    opened: list[dict[str, Any]] = []

    def open_with_profile(path: Path, name: str, **options: Any) -> Any:
        opened.append(options)
        return open_model(files["right"], name)._replace(profiles=next(ranges, {}))

    monkeypatch.setattr(run, "open_model", open_with_profile)
    monkeypatch.setattr(run, "trial_shapes", lambda *_: [(1, 3, 320, 320), (2, 3, 96, 96)])
    files_as_engines = tmp_path / "a.engine", tmp_path / "b.engine"
    library = Path("libacmix_plugin.so")
    result = compare_files(*files_as_engines, random=1, provider="tensorrt", plugin=library)
    assert list(dict.fromkeys(found.input_shapes["images"] for found in result.comparisons)) == expected
    assert opened == [{"provider": "cpu", "plugin": library}, {"provider": "tensorrt", "plugin": library}]
    assert {found.candidate for found in result.comparisons} == {"b.engine on tensorrt"}


def test_axes_that_are_fixed_in_the_other_file_stay(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An engine for one to four images, compared with a file for one."""
    found = open_model(files["right"])
    one = found.inputs[0]._replace(dims=(1, 3, "height", "width"))
    ranges = iter([{}, {"images": ((1, 3, 32, 32), (2, 3, 64, 64), (4, 3, 64, 64))}])
    monkeypatch.setattr(
        run,
        "open_model",
        lambda path, name, **_: open_model(files["right"], name)._replace(inputs=(one,), profiles=next(ranges)),
    )
    result = compare_files(tmp_path / "a.onnx", tmp_path / "b.engine", input_shape=(1, 3, 64, 32))
    shapes = {found.input_shapes["images"] for found in result.comparisons}
    assert shapes == {(1, 3, 32, 32), (1, 3, 64, 32)}


def test_noise_says_little_of_int8(files: dict[str, Path], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_model", lambda path, name, **_: open_model(path, name)._replace(precision="int8"))
    pair, shape = (files["right"], files["wrong"]), (1, 3, 32, 32)
    (note,) = compare_files(*pair, input_shape=shape).notes
    assert note.startswith("an INT8 file is calibrated on images")
    on_images = compare_files(*pair, images=folder, input_shape=shape)
    assert on_images.notes == ()
    assert on_images.losses


def test_engines_that_share_no_size_are_refused(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ranges = iter([((1, 3, n, n),) * 3 for n in (32, 64)])
    monkeypatch.setattr(
        run,
        "open_model",
        lambda path, name, **_: open_model(files["right"], name)._replace(profiles={"images": next(ranges)}),
    )
    with pytest.raises(UserError, match=r"no shape that both files take; engines take \[1, 3, 32, 32\] to"):
        compare_files(tmp_path / "a.engine", tmp_path / "b.engine")


def test_engines_are_judged_like_files(
    gpu: Any,
    files: dict[str, Path],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On stand-ins for CUDA and TensorRT, whose engines compute what the ONNX file computes."""
    static = tmp_path / "right.onnx"
    export(Detector().eval(), static, input_shape=(1, 3, 128, 128))
    for source, code in ((static, 0), (blind_to_green(static, tmp_path / "wrong.onnx"), 1)):
        settings = {"precision": "float16", "metadata": METADATA.entries}
        engine = make_engine(source.with_suffix(".engine"), onnx.load(source), **settings)
        command = ["verify", str(files["right"]), str(engine), "--images", str(folder), "--json"]
        assert main(command) == code
        printed = capsys.readouterr()
        found = VerifyDocument.model_validate_json(printed.out)
        assert {comparison.input_shapes["images"] for comparison in found.comparisons} == {(1, 3, 128, 128)}
        assert (found.detections[0].precision, found.detections[0].passed) == ("float16", code == 0)
    assert "wrong.engine: of" in printed.err
    engine.write_bytes(b"other bytes")
    assert main(command) == 2
    assert "wrong.engine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("precision", "change", "fault"),
    [
        ("int8", lambda output: output[:, 4:].mul_(0.97), None),
        ("int8", lambda output: output[:, 4:].mul_(0.8), "scores differ by"),
        ("int8", lambda output: output[:, 2:4].mul_(1.25), "boxes overlap by"),
        ("float16", lambda output: output[:, 4:].mul_(0.998), None),
        ("float16", lambda output: output[:, 4:].mul_(0.97), "scores differ by"),
        ("float16", lambda output: output[:, 2:4].mul_(1.06), "boxes overlap by"),
        ("float32", lambda output: output[:, 4:].mul_(0.99), "scores differ by"),
    ],
)
def test_matches_that_are_all_off_by_a_little_fail(
    scenes: Scenes, precision: str, change: Callable[[Tensor], object], fault: str | None
) -> None:
    (found,) = compared(scenes, change, precision).detections
    found = found.model_copy(update={"limits": found.limits.model_copy(update={"lost": 1})})
    assert [text[: len(fault or "")] for text in found.faults] == ([fault] if fault else [])
    assert found.passed is (fault is None)
    if fault:
        limit = {"score_change": 1} if "scores" in fault else {"iou": 0}
        assert compared(scenes, change, precision).judged_by(relative_at_most(2), lost=1, **limit).passed


def pairs(*scores: tuple[float | None, float | None], precision: str = "int8") -> DetectionComparison:
    """Detections of these scores, of the reference and of the candidate."""

    def detection(score: float | None) -> Detection | None:
        return None if score is None else Detection(name="red", score=score, box=(0, 0, 9, 9))

    made = [
        DetectionPair(reference=detection(a), candidate=detection(b), iou=a is not None and b is not None)
        for a, b in scores
    ]
    image = ImageComparison(image=Path("a.png"), size=(64, 64), pairs=tuple(made))
    limits = DETECTION_LIMITS[precision]
    return DetectionComparison(candidate="c", precision=precision, confidence=0.25, images=(image,), limits=limits)


def test_the_worst_image_without_mismatches_has_the_largest_change() -> None:
    def off(iou: float, score: float) -> ImageComparison:
        (image,) = pairs((0.9, score)).images
        return image.model_copy(update={"pairs": (image.pairs[0].model_copy(update={"iou": iou}),)})

    assert off(0.6, 0.9).badness > off(1, 0.7).badness > off(0.9, 0.85).badness
    assert pairs((0.9, None)).images[0].badness > off(0.5, 0.3).badness


SAME = (0.9, 0.9)


@pytest.mark.parametrize(
    ("scores", "precision", "passed"),
    [
        pytest.param([SAME] * 11 + [(0.34, None)], "int8", True, id="one near the threshold"),
        pytest.param([SAME] * 11 + [(0.34, None), (None, 0.3)], "int8", True, id="one lost and one added"),
        pytest.param([SAME] * 11 + [(0.34, None)] * 2, "int8", False, id="two near the threshold"),
        pytest.param([SAME] * 11 + [(None, 0.34)] * 2, "int8", False, id="two added"),
        pytest.param([SAME] * 11 + [(0.6, None)], "int8", False, id="one of a high score"),
        pytest.param([SAME] * 11 + [(None, 0.6)], "int8", False, id="one of a high score added"),
        pytest.param([SAME] * 38 + [(0.34, None), (0.9, None)], "int8", True, id="one beside the share"),
        pytest.param([SAME] * 36 + [(0.34, None), (0.9, None), (0.9, None)], "int8", False, id="more than the share"),
        pytest.param([SAME] * 11 + [(0.28, None)], "float16", True, id="one nearer for float16"),
        pytest.param([SAME] * 11 + [(0.34, None)], "float16", False, id="not near enough for float16"),
        pytest.param([(0.3, None)], "int8", None, id="nothing to match"),
        pytest.param([(0.9, None)], "int8", False, id="nothing left"),
    ],
)
def test_one_detection_near_the_threshold_is_excused(scores: list, precision: str, passed: bool | None) -> None:
    assert pairs(*scores, precision=precision).passed is passed


def test_scores_of_files_are_limited_without_detections_too(
    files: dict[str, Path], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An INT8 file by half where something is detected and not at all elsewhere, a float16 file by a tenth."""

    def judged(factor: float, precision: str, **options: Any) -> bool | None:
        model = onnx.load(files["right"])
        (last,) = (node for node in model.graph.node if node.op_type == "Sigmoid")
        scaled = last.output[0] + "_scaled"
        for node in model.graph.node:
            node.input[:] = [scaled if name == last.output[0] else name for name in node.input]
        model.graph.initializer.append(numpy_helper.from_array(np.array(factor, np.float32), "factor"))
        place = list(model.graph.node).index(last) + 1
        model.graph.node.insert(place, onnx.helper.make_node("Mul", [last.output[0], "factor"], [scaled]))
        onnx.save(model, tmp_path / "scaled.onnx")
        monkeypatch.setattr(
            run, "open_model", lambda path, name, **_: open_model(path, name)._replace(precision=precision)
        )
        result = compare_files(files["right"], tmp_path / "scaled.onnx", input_shape=(1, 3, 32, 32), **options)
        assert result.judged_by(FILE_TOLERANCES) == result
        failed = {found.output for found in result.failures}
        assert failed <= {"scores"}
        assert {found.empty for found in result.comparisons} == {factor != 12 and not options}
        verdicts = {found.passed for found in result.comparisons if found.output == "scores"}
        passed = False if failed else True if verdicts == {True} else None
        assert result.model_copy(update={"detections": ()}).passed is passed
        assert result.unjudged == ["scaled.onnx"] * (verdicts == {None})
        if passed is None:
            result.check()
            assert result.judged_by(relative_at_most(0.6)).passed is True
            assert result.judged_by(relative_at_most(0.5)).passed is False
        return passed

    assert judged(0.85, "float16") is False
    assert judged(0.95, "float16") is True
    assert judged(0.45, "int8", images=folder) is False
    assert judged(0.6, "int8", images=folder) is True
    assert judged(0.45, "int8") is None
    assert judged(0, "int8") is False, "nothing is no score"
    assert judged(12, "int8") is False, "there the candidate detects"
