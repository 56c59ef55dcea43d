"""What every stage runs models with: shapes, images, sessions, runners and the distance between arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from torch import nn

from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.runtime.inputs import random_images, trial_shapes
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import PROVIDERS, inputs_of, ir_version, onnx_runner, open_session, precision_of
from acmix_deploy.runtime.reason import reason
from acmix_deploy.runtime.torch import TorchRunner


def model_of(op_type: str, *, elements: int = TensorProto.FLOAT, weight: np.ndarray | None = None) -> onnx.ModelProto:
    """One node on an image of 1 to any number of batches, with an optional initializer as second input."""
    stored = [] if weight is None else [onnx.numpy_helper.from_array(weight, "weight")]
    node = helper.make_node(op_type, ["images", *(["weight"] if stored else [])], ["output0"])
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("images", elements, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("output0", elements, None)],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@given(
    free=st.sets(st.sampled_from([0, 2, 3])),
    batch=st.integers(1, 3),
    tiles=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    divisor=st.sampled_from([1, 2, 7, 32, 64]),
)
@settings(deadline=None, max_examples=60)
def test_trial_shapes_leave_the_example_on_every_free_axis(
    free: set[int], batch: int, tiles: tuple[int, int], divisor: int
) -> None:
    example = (batch, 3, tiles[0] * divisor, tiles[1] * divisor)
    shapes = trial_shapes([None if axis in free else size for axis, size in enumerate(example)], example, divisor)
    assert shapes[0] == example
    assert len(set(shapes)) == len(shapes)
    for shape in shapes:
        assert all(shape[axis] == example[axis] for axis in range(4) if axis not in free)
        assert all(size % divisor == 0 for size in shape[2:])
        assert min(shape[2:]) >= min(256, *example[2:])
    for axis in free:
        assert any(shape[axis] != example[axis] for shape in shapes), axis
    if {2, 3} <= free:
        assert len({shape[2:] for shape in shapes}) == 3
        assert all(height != width for _, _, height, width in shapes[1:]) or tiles[0] != tiles[1]


def test_random_images_repeat_with_the_seed() -> None:
    first = random_images((1, 3, 4, 4), 5)
    assert first.dtype == np.float32
    assert 0 <= first.min() < first.max() < 1
    np.testing.assert_array_equal(first, random_images((1, 3, 4, 4), 5))
    assert not np.array_equal(first, random_images((1, 3, 4, 4), 6))


numbers = hnp.arrays(np.float64, hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(-1e3, 1e3, width=32))


@given(data=st.data(), expected=numbers)
@settings(deadline=None, max_examples=60)
def test_deviation_is_what_the_definitions_say(data: st.DataObject, expected: np.ndarray) -> None:
    actual = data.draw(hnp.arrays(np.float64, expected.shape, elements=st.floats(-1e3, 1e3, width=32)))
    found = deviation(expected, actual)
    pairs = list(zip(expected.ravel().tolist(), actual.ravel().tolist(), strict=True))
    norm, other = (sum(pair[side] ** 2 for pair in pairs) ** 0.5 for side in (0, 1))
    if norm == 0 or other == 0:
        assert bool(found.problem) == (norm != other)
        return
    assert found.problem == ""
    assert found.max_abs == pytest.approx(max(abs(a - e) for e, a in pairs))
    assert found.relative_l2 == pytest.approx(sum((a - e) ** 2 for e, a in pairs) ** 0.5 / norm)
    assert found.cosine == pytest.approx(sum(e * a for e, a in pairs) / norm / other, abs=1e-9)


def test_deviation_never_passes_over_nan_infinity_or_shape() -> None:
    plain = np.ones((2, 3), np.float32)
    for value in (np.nan, np.inf, -np.inf):
        poisoned = plain.copy()
        poisoned[1, 2] = value
        assert deviation(plain, poisoned).problem
        assert deviation(poisoned, plain).problem
        assert deviation(poisoned, -poisoned).problem or np.isnan(value)
        assert deviation(poisoned, poisoned).relative_l2 == 0
    assert deviation(plain, plain.T).problem == "shape [3, 2] instead of [2, 3]"
    assert deviation(plain, plain[:1]).problem
    assert deviation(plain, plain * 0).problem
    # Half of what is wrong is seen in half precision too, and integers are numbers.
    assert deviation(plain, (plain * 2).astype(np.float16)).relative_l2 == 1
    assert deviation(np.arange(3), np.arange(3)).cosine == pytest.approx(1)


def test_a_session_runs_files_bytes_and_models(tmp_path: Path) -> None:
    model = model_of("Abs")
    onnx.save_model(model, tmp_path / "abs.onnx")
    for source in (model, model.SerializeToString(), tmp_path / "abs.onnx"):
        session = open_session(source, threads=1)
        (node,) = inputs_of(session)
        assert node == ("images", ("batch", 3, 8, 8), np.dtype(np.float32))
        image = random_images((2, 3, 8, 8)) - 0.5
        np.testing.assert_array_equal(session.run(None, {"images": image})[0], np.abs(image))


def test_a_lean_session_keeps_no_memory_for_the_next_run() -> None:
    model = model_of("Abs")
    for lean in (False, True):
        options = open_session(model, lean=lean).get_session_options()
        assert (options.enable_cpu_mem_arena, options.enable_mem_pattern) == (not lean, not lean)


def test_a_session_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes(model_of("Abs").SerializeToString()[:-20])
    for path, why in (
        (tmp_path / "absent.onnx", "does not exist"),
        (tmp_path, "is a folder"),
        (truncated, "truncated.onnx ends too early"),
    ):
        with pytest.raises(UserError, match=why) as caught:
            open_session(path)
        assert "\n" not in caught.value.message
        assert caught.value.hint


def test_a_float64_position_term_gets_the_way_out_as_hint() -> None:
    weight = np.ones((1, 3, 1, 1))
    with pytest.raises(
        UserError, match=r"^ONNX Runtime refuses the model: Could not find an implementation for Conv"
    ) as e:
        open_session(model_of("Conv", elements=TensorProto.DOUBLE, weight=weight))
    assert "acmix-deploy fuse" in e.value.hint


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there(provider: str) -> None:
    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("an ONNX Runtime with providers for GPUs")
    with pytest.raises(
        MissingComponent, match=r"this ONNX Runtime has no \w+ExecutionProvider, but .*CPUExecution"
    ) as e:
        open_session(model_of("Abs"), provider=provider)
    assert e.value.hint.startswith(
        "Run: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime-gpu. "
    )


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_the_cpu_never_takes_over(
    provider: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    with pytest.raises(MissingComponent, match=r"has .*ExecutionProvider, which does not start here") as e:
        open_session(model_of("Abs"), provider=provider)
    assert PROVIDERS[provider] in e.value.message
    assert capsys.readouterr().out == ""


def test_providers_and_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    class Session:
        def __init__(self, model: bytes, options: object, *, providers: list, enable_fallback: bool) -> None:
            asked.append((providers, enable_fallback))

        def get_providers(self) -> list[str]:
            return [name for name, _ in asked[-1][0]]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    cpu, cuda, tensorrt = PROVIDERS.values()
    for provider in PROVIDERS:
        open_session(model_of("Abs"), provider=provider, plugin=tmp_path / "plugin.so")
    options = {"trt_extra_plugin_lib_paths": str(tmp_path / "plugin.so")}
    assert asked == [
        ([(cpu, {})], False),
        ([(cuda, {}), (cpu, {})], False),
        ([(tensorrt, options), (cuda, {}), (cpu, {})], False),
    ]


def test_a_runner_holds_its_session_only_while_active() -> None:
    runner = onnx_runner(model_of("Abs"), "plain")
    assert runner.name == "plain"
    with runner:
        assert runner.infer({"images": np.full((1, 3, 8, 8), -2, np.float32)})["output0"].max() == 2
    assert not hasattr(runner, "sess")


def test_precision_sees_float16_anywhere(tmp_path: Path) -> None:
    assert precision_of(model_of("Abs")) == "float32"
    assert precision_of(model_of("Abs", elements=TensorProto.FLOAT16)) == "float16"
    assert precision_of(model_of("Mul", weight=np.ones(1, np.float16))) == "float16"
    for target, name in ((TensorProto.DOUBLE, "float32"), (TensorProto.FLOAT16, "float16")):
        cast = model_of("Cast")
        cast.graph.node[0].attribute.append(helper.make_attribute("to", target))
        assert precision_of(cast) == name
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"broken.onnx is a text file"):
        precision_of(tmp_path / "broken.onnx")


@pytest.mark.parametrize("opset", [17, 18, 19, 21])
def test_file_formats_are_ones_that_onnx_itself_pairs_with_the_opset(opset: int) -> None:
    oldest = next(row[1] for row in helper.VERSION_TABLE if row[2] == opset)
    assert oldest <= ir_version(opset) <= 10


class Nested(nn.Module):
    """Tensors in a dict, a tuple and a list, with something that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"b": (x * self.factor, None), "a": [x.sum((2, 3)), "text", x.argmax(1)]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_torch_runner_flattens_outputs_and_speaks_float32(dtype: torch.dtype) -> None:
    image = random_images((2, 3, 4, 5))
    runner = TorchRunner(Nested().to(dtype), "eager", output_names=["times", "sum", "most"])
    with runner:
        outputs = runner.infer({"images": image})
        assert runner.last_inference_time() > 0
    assert [array.dtype for array in outputs.values()] == [np.float32, np.float32, np.int64]
    np.testing.assert_allclose(outputs["times"], image * 3, rtol=2e-3 if dtype is torch.float16 else 1e-6)
    np.testing.assert_array_equal(outputs["most"].shape, (2, 4, 5))
    with TorchRunner(Nested()) as unnamed:
        assert list(unnamed.infer({"images": image})) == ["output0", "output1", "output2"]


def test_a_torch_runner_leaves_the_module_fit_for_export() -> None:
    class Caching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache = x * 2
            return self.cache

    module = Caching()
    with TorchRunner(module) as runner:
        runner.infer({"images": random_images((1, 3, 4, 4))})
    assert not module.cache.is_inference()


def test_the_reason_is_one_line_of_the_root_cause() -> None:
    root = ValueError("\n  - the axis is 3\nmore that is not needed")
    outer = RuntimeError("Failed. What follows is a page of advice.")
    outer.__cause__ = root
    assert reason(outer) == "the axis is 3"
    assert reason(KeyError()) == "KeyError"
    assert reason(RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no kernel")) == "no kernel"
    assert len(reason(RuntimeError("word " * 500))) <= 300
