"""A wrong candidate never passes, limits follow the operator's tolerances, and findings can be judged again later."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.spec import Tolerance
from acmix_deploy.runtime.inputs import random_images
from acmix_deploy.runtime.torch import TorchRunner
from acmix_deploy.verify import Candidate, Verification, compare_files, verify

FLOAT32, FLOAT16 = (LOCAL_ATTENTION.tolerances[name] for name in ("float32", "float16"))


class Two(nn.Module):
    """Two outputs; ``spoil`` changes them on the way out."""

    def __init__(self, spoil=lambda doubled, summed: (doubled, summed)) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.spoil = spoil

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.spoil(x * self.factor, x.sum((2, 3)))


def runner(name: str, spoil=None) -> TorchRunner:
    return TorchRunner(Two(spoil) if spoil else Two(), name)


def feeds(*shapes: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    return [{"images": random_images(shape, seed)} for seed, shape in enumerate(shapes or [(1, 3, 8, 8), (2, 3, 6, 8)])]


def poisoned(value: float):
    def spoil(doubled: Tensor, summed: Tensor) -> tuple[Tensor, Tensor]:
        doubled = doubled.clone()
        doubled[..., -1, -1] = value
        return doubled, summed

    return spoil


def test_the_same_model_passes_on_every_output_of_every_input() -> None:
    result = verify(runner("torch"), [Candidate(runner("again"))], feeds())
    assert result.passed
    result.check()
    assert [(found.part, found.input_shapes["images"]) for found in result.comparisons] == [
        (part, shape) for shape in ((1, 3, 8, 8), (2, 3, 6, 8)) for part in ("output0", "output0 by channel", "output1")
    ]
    limits = {found.part: found.limit for found in result.comparisons}
    assert limits == {"output0": FLOAT32.floor, "output0 by channel": 2e-4, "output1": FLOAT32.floor}
    assert {found.max_abs for found in result.comparisons} == {0}


@pytest.mark.parametrize(
    ("spoil", "output", "why"),
    [
        (poisoned(float("nan")), "output0", "NaN or infinite"),
        (poisoned(float("inf")), "output0", "NaN or infinite"),
        (poisoned(7.0), "output0", "relative L2"),
        (lambda doubled, summed: (doubled + 1e-3, summed), "output0", "relative L2"),
        (lambda doubled, summed: (doubled, summed[:, :2]), "output1", "shape"),
        (lambda doubled, summed: (doubled,), "output1", "missing"),
        (lambda doubled, summed: (doubled, summed * 0), "output1", "all zeros in the candidate"),
    ],
)
def test_a_wrong_candidate_fails_in_its_wrong_output_alone(
    spoil, output: str, why: str, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    result = verify(runner("torch"), [Candidate(runner("right")), Candidate(runner("wrong", spoil))], feeds())
    assert not result.passed
    assert {(failure.candidate, failure.output) for failure in result.failures} == {("wrong", output)}
    assert [failure.channel for failure in result.failures].count(None) == 2
    with pytest.raises(CheckFailed, match=f"wrong, {output}.* on images .*{why}"):
        result.check()
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_nan_is_right_where_the_reference_has_it() -> None:
    result = verify(
        runner("torch", poisoned(float("nan"))), [Candidate(runner("same", poisoned(float("nan"))))], feeds()
    )
    assert result.passed


def test_a_failing_runner_and_no_input_are_errors() -> None:
    def fail(doubled: Tensor, summed: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("no kernel for this\nand a page of advice")

    with pytest.raises(CheckFailed, match=r"^broken fails on the inputs: no kernel for this$"):
        verify(runner("torch"), [Candidate(runner("broken", fail))], feeds())
    with pytest.raises(UserError, match="no input"):
        verify(runner("torch"), [Candidate(runner("again"))], [])
    with pytest.raises(ValueError, match="share a name"):
        verify(runner("torch"), [Candidate(runner("torch"))], feeds())
    assert not Verification(reference="torch", comparisons=()).passed
    with pytest.raises(CheckFailed, match="nothing was compared"):
        Verification(reference="torch", comparisons=()).check()


def test_float16_may_be_twice_as_far_as_the_eager_model() -> None:
    def rounded(doubled: Tensor, summed: Tensor) -> tuple[Tensor, Tensor]:
        return doubled * (1 + 2**-7), summed

    small, large = (1, 3, 4, 4), (1, 3, 8, 8)
    candidates = [Candidate(runner("typed", rounded), "float16"), Candidate(runner("plain"))]
    alone = verify(runner("torch"), candidates, feeds(large))
    whole = [found for found in alone.comparisons if found.channel is None]
    assert {found.limit for found in whole} == {FLOAT16.floor, FLOAT32.floor}
    assert [failure.candidate for failure in alone.failures] == ["typed"]

    off_by = {small[2]: 2**-8, large[2]: 2**-7}

    def eager(doubled: Tensor, summed: Tensor) -> tuple[Tensor, Tensor]:
        return doubled * (1 + off_by[doubled.shape[2]]), summed

    result = verify(runner("torch"), candidates, feeds(large, small), eager={"float16": lambda: runner("half", eager)})
    for found in (comparison for comparison in result.comparisons if comparison.channel is None):
        if found.candidate == "plain":
            assert found.eager_error is None
            continue
        size = found.input_shapes["images"][2]
        assert found.eager_error == pytest.approx(off_by[size] if found.output == "output0" else 0, rel=1e-3)
        assert found.limit == pytest.approx(2 * found.eager_error + FLOAT16.floor)
    assert result.passed


def test_a_real_half_precision_module_is_measured() -> None:
    def half() -> TorchRunner:
        return TorchRunner(Two().half(), "half")

    off = Candidate(runner("off", lambda doubled, summed: (doubled * 1.1, summed)), "float16")
    result = verify(runner("torch"), [off], feeds(), eager={"float16": half})
    assert 1e-5 < result.comparisons[0].eager_error < 1e-3


def test_the_eager_model_is_not_asked_where_all_is_within_the_limits() -> None:
    def never() -> TorchRunner:
        raise AssertionError("not needed")

    candidates = [Candidate(runner("typed"), "float16"), Candidate(runner("plain"))]
    assert verify(runner("torch"), candidates, feeds(), eager={"float16": never, "float32": never}).passed


@pytest.mark.parametrize("off", [1.0, 1.1])
def test_an_eager_model_that_fails_is_noted_once_a_candidate_is_beyond_its_limit(off: float) -> None:
    def fail(doubled: Tensor, summed: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("no float16 here")

    candidate = Candidate(runner("typed", lambda doubled, summed: (doubled * off, summed)), "float16")
    found = verify(runner("torch"), [candidate], feeds(), eager={"float16": lambda: runner("half", fail)})
    noted = "half fails on the inputs: no float16 here; without it the limit for float16 is the smallest"
    assert [note for note in found.notes if "float16 is the smallest" in note] == [noted] * (off > 1)
    assert found.passed is (off == 1)
    assert {one.eager_error for one in found.comparisons} == {None}
    assert {one.limit for one in found.comparisons if one.channel is None} == {FLOAT16.floor}


@pytest.mark.parametrize(("off", "passed"), [(0.0, True), (2e-4, False)])
def test_a_small_output_that_float32_hardly_holds_may_be_off_by_as_much(off: float, passed: bool) -> None:
    """Whatever the other outputs are: none of them is far off."""

    def cancelled(doubled: Tensor, summed: Tensor) -> tuple[Tensor, Tensor]:
        return doubled, (summed + 3e4) - 3e4

    def wide() -> TorchRunner:
        return TorchRunner(Two(cancelled).double(), "float64")

    candidate = Candidate(runner("exact", lambda doubled, summed: (doubled, summed * (1 + off))))
    assert not verify(runner("torch", cancelled), [candidate], feeds()).passed
    found = verify(runner("torch", cancelled), [candidate], feeds(), eager={"float32": wide})
    assert found.passed is passed
    assert [*{failure.output for failure in found.failures}] == ["output1"] * (not passed)
    assert all(one.limit <= FLOAT32.most for one in found.comparisons if one.channel is None)


@pytest.mark.parametrize(
    ("middle", "off", "passed"),
    [(0, 0, True), (-12, 0, True), (-12, 0.02, False), (-3, 0.001, False), (0, 1e-3, False)],
)
def test_small_scores_are_as_exact_as_onnx_runtime_computes_them(middle: float, off: float, passed: bool) -> None:
    """Its Sigmoid is exact to 5e-8 at most anywhere, which is 1% of a score of 6e-6."""
    logits = helper.make_node("Add", ["images", "shift"], ["logits"])
    nodes = [
        logits,
        helper.make_node("Sigmoid", ["logits"], ["maps"]),
        helper.make_node("Flatten", ["maps"], ["output0"]),
    ]
    graph = helper.make_graph(
        nodes,
        "scores",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, ["batch", "classes"])],
        [helper.make_tensor("shift", TensorProto.FLOAT, [], [middle + off])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x + middle).flatten(1)

    metadata = ModelMetadata({"task": "classify"})
    found = verify(TorchRunner(Scores(), "torch"), [Candidate.of(model, "file")], feeds(), metadata=metadata)
    assert {one.output for one in found.comparisons} == {"scores"}
    assert found.passed is passed


def test_findings_are_kept_and_judged_again() -> None:
    def off(doubled: Tensor, summed: Tensor) -> tuple[Tensor, Tensor]:
        return doubled * 1.001, summed

    found = verify(runner("torch"), [Candidate(runner("off", off))], feeds())
    assert not found.passed
    text = found.model_dump_json()
    restored = Verification.model_validate_json(text)
    assert restored == found
    looser = restored.judged_by({"float32": Tolerance(floor=0.01)})
    assert looser.passed
    assert {comparison.limit for comparison in looser.comparisons} == {0.01}
    assert not looser.judged_by({"float32": FLOAT32}).passed
    document = json.loads(text)
    assert document["passed"] is False
    assert {comparison["passed"] for comparison in document["comparisons"]} == {True, False}


def test_the_worst_of_each_output_is_told() -> None:
    def off_by_batch(doubled: Tensor, summed: Tensor) -> tuple[Tensor, Tensor]:
        return doubled * (1 + 0.01 * len(doubled)), summed

    result = verify(
        runner("torch"), [Candidate(runner("off", off_by_batch))], feeds((1, 3, 4, 4), (3, 3, 4, 4), (2, 3, 4, 4))
    )
    worst = result.worst("off")
    assert [found.part for found in worst] == ["output0", "output0 by channel", "output1"]
    assert worst[0].input_shapes == {"images": (3, 3, 4, 4)}
    assert result.worst("unknown") == []
    wide = result.comparisons[3].model_copy(update={"limit": 1.0})
    narrow = result.comparisons[0]
    assert wide.relative_l2 > narrow.relative_l2
    assert result.model_copy(update={"comparisons": (wide, narrow)}).worst("off") == [narrow], "what failed comes first"


def scaled(path: Path, factor: float, *dims: int | str, name: str = "images", half: bool = False) -> Path:
    """Write ``output0 = images * factor``, computed in float16 between casts if asked."""
    kind = np.float16 if half else np.float32
    image = helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)
    cast = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", [name], ["typed"], to=cast),
        helper.make_node("Mul", ["typed", "factor"], ["product"]),
        helper.make_node("Cast", ["product"], ["output0"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "scaled",
        [image],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, dims)],
        [onnx.numpy_helper.from_array(np.array(factor, kind), "factor")],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


FREE = ("batch", 3, "height", "width")


def test_files_are_compared_at_every_size_that_both_leave_free(tmp_path: Path) -> None:
    one, same = scaled(tmp_path / "one.onnx", 2, *FREE), scaled(tmp_path / "same.onnx", 2, *FREE)
    result = compare_files(one, same, random=1, input_shape=(1, 3, 64, 64))
    assert result.passed
    assert result.reference == "one.onnx"
    shapes = {found.input_shapes["images"] for found in result.comparisons}
    assert shapes == {(1, 3, 64, 64), (2, 3, 96, 128), (1, 3, 128, 96)}
    static = scaled(tmp_path / "static.onnx", 2, 1, 3, 32, 48)
    result = compare_files(one, static, random=2)
    assert [found.input_shapes["images"] for found in result.comparisons[::2]] == [(1, 3, 32, 48)] * 2
    assert not compare_files(one, scaled(tmp_path / "off.onnx", 2.001, *FREE), input_shape=(1, 3, 32, 32)).passed


def test_a_float16_file_is_held_to_float16(tmp_path: Path) -> None:
    one = scaled(tmp_path / "one.onnx", 1.7, *FREE)
    typed = scaled(tmp_path / "typed.onnx", 1.7, *FREE, half=True)
    result = compare_files(one, typed, input_shape=(1, 3, 32, 32))
    assert {found.precision for found in result.comparisons} == {"float16"}
    assert result.passed
    assert not result.judged_by({"float16": FLOAT32}).passed


def test_files_are_compared_on_images(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.png"), np.full((20, 30, 3), 40 * index + 9, np.uint8))
    (folder / "torn.png").write_bytes(b"")
    one, other = scaled(tmp_path / "one.onnx", 2, 1, 3, 16, 16), scaled(tmp_path / "other.onnx", 2, 1, 3, 16, 16)
    result = compare_files(one, other, images=folder)
    assert result.passed
    assert [found.part for found in result.comparisons] == ["output0", "output0 by channel"] * 3
    assert result.notes == (
        "torn.png could not be read: not a picture in one of JPEG, PNG, WEBP, BMP, TIFF",
        "detections were not compared: one.onnx gives output0 [1, 3, 16, 16], and its task is not told",
    )


@pytest.mark.parametrize(
    ("dims", "name", "why"),
    [
        ((1, 3, 32, 64), "images", r"one.onnx images \[1, 3, 32, 32\] float32, two.onnx images \[1, 3, 32, 64\]"),
        ((1, 3, 32, 32), "x", r"one.onnx images \[1, 3, 32, 32\] float32, two.onnx x"),
        ((1, 3, 32), "images", "take different inputs"),
    ],
)
def test_files_with_different_inputs_are_refused(tmp_path: Path, dims: tuple[int, ...], name: str, why: str) -> None:
    one, two = scaled(tmp_path / "one.onnx", 2, 1, 3, 32, 32), scaled(tmp_path / "two.onnx", 2, *dims, name=name)
    with pytest.raises(UserError, match=why):
        compare_files(one, two)


def test_files_of_one_name_are_told_apart_and_vectors_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    one, other = scaled(tmp_path / "m.onnx", 2, 1, 3, 8, 8), scaled(tmp_path / "a" / "m.onnx", 2, 1, 3, 8, 8)
    assert compare_files(one, other).comparisons[0].candidate == str(other)
    vectors = [scaled(tmp_path / f"{name}.onnx", 2, 1, 3) for name in ("vector", "again")]
    with pytest.raises(UserError, match=r"one image input .* is expected"):
        compare_files(*vectors)
    with pytest.raises(UserError, match=r"m\.onnx is compared with itself"):
        compare_files(one, one)
    with pytest.raises(UserError, match="does not exist"):
        compare_files(one, tmp_path / "absent.onnx")
