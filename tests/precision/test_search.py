"""INT8 with a target: what is left in float and why, what ends the search, and what cannot be judged."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from acmix_deploy.artifacts import read_artifact
from acmix_deploy.cli import main
from acmix_deploy.half import runnable
from acmix_deploy.precision import SearchReport, int8, quantize
from acmix_deploy.precision.cost import multiply_adds
from acmix_deploy.precision.search import Goal, search
from acmix_deploy.report.documents import QuantizeDocument
from acmix_deploy.verify import judges
from acmix_deploy.verify.judges import ByDetections, ByLabels
from tests.precision import blobs

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
pytest.importorskip("pycocotools", reason="pycocotools is not installed")


def searched(
    losses: Mapping[str, float], limit: float = 1, stop: Callable[[int], None] = lambda step: None, **more: float
) -> tuple[SearchReport, list[set[str]]]:
    """A search among layers that lose so much each, the most sensitive first, and the sets in INT8 that were tried."""
    tried: list[set[str]] = []

    def lost(excluded: frozenset[str]) -> dict[str, float]:
        stop(len(tried))
        tried.append(set(losses) - excluded)
        return {"lost": sum(losses[name] for name in tried[-1])}

    class Judge(SimpleNamespace):
        __call__ = staticmethod(lost)

    judge = Judge(reference={"detections": 9.0}, images=[Path("a.png")], notes=[])
    goal = Goal({"lost": limit}, lambda source, shape: judge, **more)
    report = search(dict.fromkeys(losses, 10), 20 * len(losses), lambda excluded: excluded, judge, goal, str)  # type: ignore[arg-type, return-value]
    return report, tried


def layers(count: int, **bad: float) -> dict[str, float]:
    return {f"l{index}": bad.get(f"l{index}", 0.0) for index in range(count)}


@pytest.mark.parametrize(
    ("losses", "left"),
    [
        pytest.param(layers(50), set(), id="nothing is lost"),
        pytest.param(layers(50, l0=5), {"l0"}, id="the worst one"),
        pytest.param(layers(50, l30=5), {"l30"}, id="one that looks harmless"),
        pytest.param(layers(50, l0=0.4, l1=0.4, l2=0.4), {"l0"}, id="one of three that are too much together"),
        pytest.param(layers(50, l3=5, l17=5, l18=5, l40=5), {"l3", "l17", "l18", "l40"}, id="several"),
        pytest.param(layers(2, l0=5), {"l0"}, id="of two"),
    ],
)
def test_the_smallest_set_is_found(losses: dict[str, float], left: set[str]) -> None:
    """Where losses add up it is smallest; no set is tried twice, and far fewer than all."""
    report, tried = searched(losses)
    assert report.met
    if left != {"l0"} or losses["l0"] > 1:
        assert set(report.excluded) == left
    assert len(report.excluded) == len(left)
    assert report.best.layers == len(losses) - len(left)
    assert report.best.multiply_adds == pytest.approx((len(losses) - len(left)) / len(losses) / 2)
    assert len(tried) == len(report.steps) == len({frozenset(one) for one in tried})
    assert len(tried) <= 14 + 8 * len(left)
    assert all(tried), "a file without any layer in INT8 is none"


def test_a_target_that_no_set_meets() -> None:
    """The best one is kept, one that loses least."""
    report, tried = searched(layers(8) | {"l7": 3}, limit=-1)
    assert not report.met
    assert report.best.figures["lost"] == min(step.figures["lost"] for step in report.steps) == 3
    assert min(map(len, tried)) == 1
    assert report.best.layers == 8, "leaving layers in float bought nothing"


def test_a_search_that_is_ended() -> None:
    """By a time limit after the first set, by Ctrl-C with what there is; before the first set there is nothing."""
    losses = layers(8, l0=5, l5=5)
    report, tried = searched(losses, seconds=0)
    assert (len(tried), report.stopped, report.met, report.excluded) == (1, "time limit", False, [])

    def interrupt(step: int) -> None:
        if step == at:
            raise KeyboardInterrupt

    at = 5
    report, tried = searched(losses, stop=interrupt)
    assert (len(report.steps), report.stopped, report.met) == (5, "interrupted", True)
    assert {"l0", "l5"} <= {*report.excluded}
    at = 0
    with pytest.raises(KeyboardInterrupt):
        searched(losses, stop=interrupt)


def test_multiply_adds() -> None:
    """By hand, of every kind of layer."""
    arrays = {
        "conv": np.zeros((6, 2, 3, 3)), "up": np.zeros((6, 5, 2, 2)), "product": np.zeros((7, 11)),
        "gemm": np.zeros((3, 7)), "flat": np.array([4, 7]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["a"], name="conv", group=2, pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("ConvTranspose", ["a", "up"], ["b"], name="up", strides=[2, 2]),
        helper.make_node("Reshape", ["z", "flat"], ["c"], name="flat"),
        helper.make_node("MatMul", ["c", "product"], ["d"], name="product"),
        helper.make_node("Gemm", ["c", "gemm"], ["e"], name="gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["b", 4, 8, 12]), helper.make_tensor_value_info("z", 1, [1, 28])],
        [helper.make_tensor_value_info(name, 1, None) for name in "bde"],
        [
            numpy_helper.from_array(array.astype(np.int64 if name == "flat" else np.float32), name)
            for name, array in arrays.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    sample = {"x": np.zeros((3, 4, 8, 12), np.float32), "z": np.zeros((1, 28), np.float32)}
    assert multiply_adds(model, [nodes[index] for index in (0, 1, 3, 4)], sample) == {
        "conv": 3 * 6 * 4 * 6 * 2 * 9, "up": 3 * 6 * 4 * 6 * 5 * 4, "product": 4 * 11 * 7, "gemm": 4 * 3 * 7,
    }  # fmt: skip


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A detector one of whose layers INT8 spoils, and labelled images."""
    folder = tmp_path_factory.mktemp("search")
    return SimpleNamespace(
        model=blobs.detector(folder / "blobs.onnx", spoilt=3000),
        calibration=blobs.images(folder / "calibration", 32, seed=1),
        validation=blobs.images(folder / "validation", 16, seed=2),
    )


@pytest.fixture
def command(there: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Quantise it, in a folder of its own, with more options."""
    monkeypatch.chdir(tmp_path)

    def run(*options: object, **instead: Path) -> int:
        paths = {**vars(there), **instead}
        given = [paths["model"], "--calibration", paths["calibration"], "-o", "int8.onnx"]
        validation = paths["validation"]
        given += ["--validation", validation] if validation else []
        return main(["quantize", *map(str, (*given, *options))])

    return run


DROP = ("--max-map-drop", 0.5)


@pytest.mark.parametrize("options", [DROP, ("--max-lost", 0.01), ("--max-score-change", 0.01)])
def test_the_layer_that_spoils_it_is_left_in_float(
    command: Callable[..., int],
    options: tuple[object, ...],
    there: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By labels and without; ranges are found once, and the file is what --exclude of that layer makes."""
    calls = []
    monkeypatch.setattr(int8, "calibrate", lambda *given: calls.append(given) or calibrate(*given))
    assert command(*options, "--json") == 0
    document = QuantizeDocument.model_validate_json(capsys.readouterr().out)
    found = document.search
    assert found is not None
    assert found.excluded == ["spoilt"]
    assert [step.met for step in found.steps] == [False, True]
    assert [step.layers for step in found.steps] == [3, 2]
    assert {layer.name: layer.reason for layer in document.float_layers} == {
        "spoilt": "left by the search for the target",
        "score": "detection head",
    }
    cost = {layer.name: layer.multiply_adds for layer in (*document.layers, *document.float_layers)}
    assert cost == {"mean": 64 * 40 * 192, "spoilt": 64 * 1600, "same": 64 * 1600, "score": 64 * 40}
    assert document.int8_share == pytest.approx(found.best.multiply_adds, abs=1e-5)
    assert len(calls) == 1, "calibrated once"
    Path("found").mkdir()
    Path("found/quantize.json").write_text(document.model_dump_json(by_alias=True))
    assert main(["report", "found"]) == 0
    page = Path("found/report.html").read_text(encoding="utf-8")
    assert "Search for the INT8 target" in page
    assert page.count('<use x="') >= 2 * 3, "two sets and a ring, for a wide and for a narrow page"
    capsys.readouterr()
    assert command("--exclude", "spoilt", validation=None) == 0  # type: ignore[arg-type]
    assert read_artifact(Path("int8.onnx")).sha256 == document.artifact.sha256


calibrate = int8.calibrate


def test_what_is_in_float16_is_rounded(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge runs a file with --fp16 as it says: ONNX Runtime on a CPU would keep float32 between the layers."""
    run: list[object] = []
    monkeypatch.setattr(judges, "runnable", lambda model: run.append(runnable(model)) or run[-1])
    assert command(*DROP, "--fp16", "--json") == 0
    assert QuantizeDocument.model_validate_json(capsys.readouterr().out).rest == "float16"
    _, *trials = run
    assert len(trials) == 2
    for trial in trials:
        assert isinstance(trial, onnx.ModelProto)
        assert [node for node in trial.graph.node if node.op_type == "Cast" and node.name.startswith("half ")]


def test_what_is_told(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*DROP) == 0
    told = capsys.readouterr()
    assert "step 2, 2 of 3 layers in INT8; so far map_drop 9" in told.err
    assert "where the float file has mAP50 1, mAP50-95 1: drop, points 0 (0.5 is accepted)" in told.out
    assert "left in floating point: spoilt" in told.out
    assert "judged on 16 images with" in told.out
    assert "85.0% of the multiply-adds of all layers are in INT8" in told.out


def test_no_set_meets_it(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 1, and what there is lies beside the name that was asked for."""
    assert command(*DROP, "--exclude", "mean", "--exclude", "same") == 1
    told = capsys.readouterr()
    assert "error: no set of layers of 1 meets the target: the best has map_drop 9" in told.err
    assert "int8.best.onnx" in told.err
    assert read_artifact(Path("int8.best.onnx")).kind == "int8"
    assert not Path("int8.onnx").exists()


def test_the_time_is_over(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*DROP, "--time-limit", 1e-9) == 1
    told = capsys.readouterr()
    assert "no set of layers in the time meets the target" in told.err
    assert "stopped (time limit)" in told.out
    assert Path("int8.best.onnx").is_file()


@pytest.mark.parametrize(("step", "name"), [(1, "int8.best.onnx"), (2, None), (0, None)])
def test_interrupted(
    command: Callable[..., int],
    step: int,
    name: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With Ctrl-C in a step what was found before is kept and said; a file that meets the target keeps its name."""
    judged = ByLabels.__call__
    steps: list[object] = []

    def interrupted(self: ByLabels, model: onnx.ModelProto) -> dict[str, float]:
        if len(steps) == step:
            raise KeyboardInterrupt
        steps.append(model)
        return judged(self, model)

    monkeypatch.setattr(ByLabels, "__call__", interrupted)
    done = command(*DROP)
    told = capsys.readouterr()
    if step == 2:
        assert done == 0, "the search had ended"
        return
    assert done == 130
    assert ("the best file so far is int8.best.onnx" in told.err) == (name is not None)
    assert [path.name for path in Path.cwd().glob("*.onnx")] == ([name] if name else [])
    assert not [*Path.cwd().glob(".*")]


def refused(command: Callable[..., int], capsys: pytest.CaptureFixture[str], *options: object, **paths: Path) -> str:
    """What is said where nothing can be done; nothing is left behind."""
    assert command(*options, **paths) == 2
    assert not [path for path in Path.cwd().iterdir() if "int8" in path.name]
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_options_that_do_not_fit(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    nothing: Path = None  # type: ignore[assignment]
    assert "there are none" in refused(command, capsys, *DROP, validation=nothing)
    assert "there are none" in refused(command, capsys, "--time-limit", 5, validation=nothing)
    assert "neither is asked for" in refused(command, capsys)
    assert "both are asked for" in refused(command, capsys, *DROP, "--max-lost", 0.1)


def test_labels_that_judge_nothing(
    command: Callable[..., int], there: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(there.validation, bad)
    labels = sorted(bad.glob("*.txt"))
    labels[0].write_text("".join(f"7{line[1:]}\n" for line in labels[0].read_text().splitlines()))
    assert command(*DROP, validation=bad) == 0
    assert "labels are left out: 000.txt, line 1 is of the class 7, and the model has 1" in capsys.readouterr().out
    Path("int8.onnx").unlink()
    Path("int8.onnx.json").unlink()
    for label in labels[:4]:
        label.write_text("0 12 13 40\n" * 4)
    assert "cannot be used, and at most 10% may be so" in refused(command, capsys, *DROP, validation=bad)
    for label in labels:
        label.write_text("")
    assert "label files of the 16 images" in refused(command, capsys, *DROP, validation=bad)
    for label in labels:
        label.write_text("0 0.99 0.01 0.01 0.01\n")
    assert "finds nothing of what the labels" in refused(command, capsys, *DROP, validation=bad)
    for label in labels:
        label.unlink()
    said = refused(command, capsys, *DROP, validation=bad)
    assert "none of the 16 images" in said
    assert "--max-lost" in said


def test_one_image(
    command: Callable[..., int], there: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = blobs.images(tmp_path / "alone", 1, seed=3)
    assert command(*DROP, validation=alone) == 0
    assert "judged on 1 image with" in capsys.readouterr().out
    assert command("--max-lost", 0.01, validation=there.calibration) == 0
    assert "32 images were calibrated on and judged on" in capsys.readouterr().out


def test_files_that_are_no_detectors(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = blobs.detector(tmp_path / "other.onnx", task="depth")
    assert "task of" in refused(command, capsys, *DROP, model=other)
    assert "is not a detector" in refused(command, capsys, "--max-lost", 0.1, model=other)
    dark = tmp_path / "dark"
    dark.mkdir()
    cv2.imwrite(str(dark / "a.png"), np.zeros((64, 64, 3), np.uint8))
    assert "detects nothing in the 1 images" in refused(command, capsys, "--max-lost", 0.1, validation=dark)


def test_a_full_disk(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(int8.onnx, "save", full)
    said = refused(command, capsys, *DROP)
    assert "cannot write int8.onnx: No space left" in said
    assert "made again, without a search, by --exclude spoilt" in said


def test_calibration_that_cannot_be_right(there: SimpleNamespace, tmp_path: Path) -> None:
    def notes(calibration: Path, model: Path = there.model) -> str:
        return "\n".join(quantize(model, tmp_path / "int8.onnx", calibration).found.notes)

    assert notes(there.calibration) == ""
    dark, same, empty = tmp_path / "dark", tmp_path / "same", tmp_path / "empty"
    for folder in (dark, same, empty):
        folder.mkdir()
    random = np.random.default_rng(0)
    scene = next(there.calibration.glob("*.png")).read_bytes()
    for index in range(32):
        cv2.imwrite(str(dark / f"{index}.png"), np.full((32, 64, 3), index, np.uint8))  # it gets a border
        cv2.imwrite(str(empty / f"{index}.png"), random.integers(0, 60, (64, 64, 3), dtype=np.uint8))
        (same / f"{index}.png").write_bytes(scene)
    assert notes(dark).startswith("every calibration image is of one colour")
    assert notes(empty).startswith("the float model detects nothing above 0.25 in any")
    assert notes(same) == "the calibration images are all alike: ranges are those of one scene"
    (same / "0.png").rename(tmp_path / "0.png")
    assert "calibrated on 31 images: below 32" in notes(same)
    sized = blobs.detector(tmp_path / "sized.onnx", imgsz="[640, 640]")
    assert notes(there.calibration, sized) == (
        "calibrated at 64x64, and its metadata tell that it is used at 640x640: ranges depend on the size of objects"
    )


def test_judges_agree_with_verify(there: SimpleNamespace, tmp_path: Path) -> None:
    """The file itself loses nothing, and one in INT8 what `verify` says."""
    from acmix_deploy.verify import compare_files

    model = onnx.load(there.model)
    shape = (1, 3, blobs.SIZE, blobs.SIZE)
    by_labels = ByLabels(there.model, shape, there.validation, 0.5)
    by_detections = ByDetections(there.model, shape, there.validation, 0.01)
    assert by_labels(model) == {"map50": 1.0, "map50_95": 1.0, "map_drop": 0.0, "map_drop_error": 0.0}
    assert by_detections(model) == {"lost": 0.0, "score_change": 0.0}
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "score.bias")
    weights.CopyFrom(numpy_helper.from_array(np.array([-9.4], np.float32), weights.name))
    boxes = next(tensor for tensor in model.graph.initializer if tensor.name == "boxes")
    moved = numpy_helper.to_array(boxes).copy()
    moved[:, 0, :32] += 1.5
    boxes.CopyFrom(numpy_helper.from_array(moved, boxes.name))
    onnx.save(model, tmp_path / "other.onnx")
    found = compare_files(there.model, tmp_path / "other.onnx", images=there.validation)
    (detections,) = found.detections
    assert 0 < detections.lost < detections.expected
    lost = by_detections(model)
    assert lost["lost"] == pytest.approx(detections.lost_share, abs=0.15)  # another `near` counts as crossing
    lost = by_labels(model)
    assert lost["map50_95"] == found.accuracy[1].map50_95
    parts = [by_labels_of(there, images, model) for images in range(5)]
    assert lost["map_drop_error"] == pytest.approx(np.std(parts, ddof=1) / 5**0.5, abs=1e-3)
    assert any("cannot be told from chance" in note for note in by_labels.notes)


def by_labels_of(there: SimpleNamespace, fold: int, model: onnx.ModelProto) -> float:
    """The drop in every fifth image, which lie in a folder of their own."""
    folder = there.validation.with_name(f"fold-{fold}")
    folder.mkdir()
    for image in sorted(there.validation.glob("*.png"))[fold::5]:
        for file in (image, image.with_suffix(".txt")):
            shutil.copy(file, folder)
    return ByLabels(there.model, (1, 3, blobs.SIZE, blobs.SIZE), folder, 0.5)(model)["map_drop"]
