"""Latencies are all kept, summed up right, and taken with one live session at a time."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from acmix_deploy import cli, manifest
from acmix_deploy.errors import UserError
from acmix_deploy.profile import Machine, Profile, compare, profile
from acmix_deploy.profile import run as profile_run
from acmix_deploy.profile import subjects as profile_subjects
from acmix_deploy.runtime.inputs import random_images
from acmix_deploy.runtime.onnxruntime import PROVIDER, PROVIDERS

MACHINE = Machine(cpu="a CPU", cores=2, system="a system", versions={})


def profile_file(file, **options):
    """The profile of one file in one round."""
    return profile([file], **{"rounds": 1, **options})[0]


def absolute(path: Path, *dims: int | str, elements: int = TensorProto.FLOAT) -> Path:
    values = [helper.make_tensor_value_info(name, elements, dims) for name in ("images", "output0")]
    graph = helper.make_graph([helper.make_node("Abs", ["images"], ["output0"])], "graph", values[:1], values[1:])
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@given(st.lists(st.floats(0.01, 1e3), min_size=1, max_size=40))
@settings(deadline=None, max_examples=40)
def test_percentiles_are_those_of_all_samples(samples: list[float]) -> None:
    found = Profile(
        file="model.onnx",
        input_shapes={"images": (1, 3, 8, 8)},
        provider="CPUExecutionProvider",
        threads=2,
        rounds=1,
        warmup_runs=1,
        stable=True,
        samples_ms=samples,
        machine=MACHINE,
    )
    in_order = sorted(samples)
    for q, value in ((50, found.median_ms), (90, found.p90_ms), (95, found.p95_ms), (99, found.p99_ms)):
        place = q / 100 * (len(samples) - 1)
        low = int(place)
        high = min(low + 1, len(samples) - 1)
        assert value == pytest.approx(in_order[low] + (place - low) * (in_order[high] - in_order[low]))
    assert Profile.model_validate_json(found.model_dump_json()) == found
    assert json.loads(found.model_dump_json())["p99_ms"] == found.p99_ms


def test_a_profile_keeps_every_sample_and_names_what_it_depends_on(tmp_path: Path) -> None:
    found = profile_file(absolute(tmp_path / "m.onnx", "batch", 3, 8, 8), input_shape=(4, 3, 64, 64), samples=7)
    assert len(found.samples_ms) == 7
    assert min(found.samples_ms) > 0
    assert found.input_shapes == {"images": (4, 3, 8, 8)}
    assert (found.file, found.rounds, found.notes) == ("m.onnx", 1, ())
    assert found.warmup_runs > 6 or not found.stable
    assert found.provider == "CPUExecutionProvider"
    assert found.machine == Machine.this()
    assert found.machine.cpu
    assert found.machine.versions["onnxruntime"] == onnxruntime.__version__


def test_float16_on_a_cpu_is_labelled(tmp_path: Path) -> None:
    found = profile_file(absolute(tmp_path / "half.onnx", 1, 3, 8, 8, elements=TensorProto.FLOAT16), samples=1)
    assert "FP16 on a CPU predicts nothing for a GPU" in found.notes[0]


def test_files_take_turns_with_one_live_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [absolute(tmp_path / f"{name}.onnx", 1, 3, 8, 8) for name in "ab"]
    opened: list[str] = []
    alive: weakref.WeakSet[onnxruntime.InferenceSession] = weakref.WeakSet()
    original = profile_subjects.open_session

    def watched(path: Path, threads: int | None, **how: object) -> onnxruntime.InferenceSession:
        assert not alive
        session = original(path, threads, **how)
        alive.add(session)
        opened.append(path.name)
        return session

    monkeypatch.setattr(profile_subjects, "open_session", watched)
    found = profile(files, samples=7, rounds=3, threads=1)
    assert opened == ["a.onnx", "b.onnx"] * 3
    assert [(entry.file, len(entry.samples_ms), entry.threads) for entry in found] == [
        ("a.onnx", 9, 1),
        ("b.onnx", 9, 1),
    ]
    assert [entry.round_samples for entry in found] == [(3, 3, 3)] * 2


class Clock:
    """Stands in for the ``time`` module: each run takes as long as the script says."""

    def __init__(self, *durations: float) -> None:
        self.now = 0.0
        self.durations = list(durations)

    def perf_counter(self) -> float:
        return self.now

    def run(self, *_: object) -> None:
        self.now += self.durations.pop(0) if len(self.durations) > 1 else self.durations[0]


def timed(path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock, **options: float) -> Profile:
    class Session:
        def get_inputs(self) -> list[object]:
            return onnxruntime.InferenceSession(path).get_inputs()

        run = staticmethod(clock.run)

    for module in (profile_run, profile_subjects):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(profile_subjects, "open_session", lambda *_, **how: Session())
    return profile_file(path, **options)


def test_counting_begins_when_latency_has_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = absolute(tmp_path / "m.onnx", 1, 3, 8, 8)
    found = timed(path, monkeypatch, Clock(9.0, 0.9, 0.6, 0.5, 0.2, *[0.1] * 8, 0.3, 0.1), samples=4, seconds=100.0)
    # The first run, five slow ones, then the second window of three that agrees with the one before it.
    assert found.warmup_runs == 10
    assert found.stable
    assert found.samples_ms == pytest.approx([100, 100, 100, 300])


def test_time_is_bounded_and_one_sample_is_certain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = absolute(tmp_path / "m.onnx", 1, 3, 8, 8)
    found = timed(path, monkeypatch, Clock(7.0), samples=100, seconds=5.0)
    assert (found.warmup_runs, found.stable, len(found.samples_ms)) == (2, False, 1)
    growing = timed(path, monkeypatch, Clock(*(0.01 * 1.2**n for n in range(90))), samples=2, seconds=1e9)
    assert not growing.stable
    assert growing.warmup_runs == 31
    assert np.diff(growing.samples_ms)[0] > 0


def test_what_cannot_be_profiled_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        profile_file(tmp_path / "absent.onnx")
    with pytest.raises(UserError, match="takes images of"):
        profile_file(absolute(tmp_path / "vector.onnx", 1, 3))
    path = tmp_path / "add.onnx"
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, "h", "w"]) for name in ("images", "output0")
    ]
    graph = helper.make_graph(
        [helper.make_node("Add", ["images", "fixed"], ["output0"])],
        "graph",
        values[:1],
        values[1:],
        [onnx.numpy_helper.from_array(np.ones((1, 3, 8, 8), np.float32), "fixed")],
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(UserError, match="does not run on"):
        profile_file(path, input_shape=(1, 3, 5, 5))


@pytest.fixture
def sessions(monkeypatch):
    """ONNX Runtime with all providers on an Orin, where the CPU does their work; what every session was asked for."""
    asked: list[tuple[str, list[tuple[str, dict[str, str]]], int]] = []

    class Session(onnxruntime.InferenceSession):
        def __init__(self, model, options, *, providers, enable_fallback):
            asked.append((Path(model).parent.name, providers, options.intra_op_num_threads))
            super().__init__(model, options, providers=[PROVIDER])

        def get_providers(self):
            return [name for name, _ in asked[-1][1]]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(manifest, "gpu_here", lambda: {"gpu": "Orin", "sm": 87, "driver": "540.4.0"})
    return asked


def test_an_onnx_file_on_a_gpu(sessions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = profile_run.Monitor
    with_nvml: list[bool] = []
    monkeypatch.setattr(profile_run, "Monitor", lambda *, nvml: with_nvml.append(nvml) or monitor(tmp_path, nvml=False))
    file = absolute(tmp_path / "half.onnx", 1, 3, 8, 8, elements=TensorProto.FLOAT16)
    (found,) = profile([file], provider="cuda", seconds=60)
    assert {providers[0][0] for _, providers, _ in sessions} == {"CUDAExecutionProvider"}
    assert len(sessions) == 1 + 3  # to look at it, and a turn in each round
    assert (found.provider, found.threads, with_nvml) == ("CUDAExecutionProvider", None, [True])
    assert (found.machine.gpu, found.machine.driver, found.machine.tensorrt) == ("Orin (sm_87)", "540.4.0", None)
    assert found.where == "ONNX Runtime's CUDAExecutionProvider on Orin (sm_87), driver 540.4.0"
    assert len(found.samples_ms) == 3 * 334
    assert found.warmup_runs >= 3 * 101
    assert found.with_transfers_ms == found.samples_ms
    (note,) = found.notes
    assert note.startswith("latency of an ONNX file on a GPU is that of a whole call of ONNX Runtime, with upload")
    with pytest.raises(UserError, match="runs on a GPU, where ONNX Runtime does not tell how long a layer takes"):
        profile([file], provider="cuda", layers=True)
    assert len(sessions) == 5  # before anything is measured


def test_provider_tensorrt_builds_once_for_each_file_and_takes_the_plugin(sessions, tmp_path: Path) -> None:
    files = [tmp_path / name / "model.onnx" for name in ("old", "new")]
    for file in files:
        file.parent.mkdir()
        absolute(file, 1, 3, 8, 8)
    plugin = tmp_path / "plugin.so"
    plugin.write_bytes(b"a plugin")
    profile(files, provider="tensorrt", plugin=plugin, samples=2, rounds=2, threads=1)
    kept: dict[str, set[str]] = {}
    for name, [(provider, options), *_], _ in sessions:
        assert provider == "TensorrtExecutionProvider"
        assert options["trt_extra_plugin_lib_paths"] == str(plugin)
        assert options["trt_engine_cache_enable"] == "True"
        kept.setdefault(name, set()).add(options["trt_engine_cache_path"])
    # Names in the graphs are the same, and by those ONNX Runtime would take one's engine for the other's.
    assert [len(folders) for folders in kept.values()] == [1, 1]
    ((old,), (new,)) = kept.values()
    assert old != new
    assert not Path(old).exists()
    assert {threads for *_, threads in sessions[2:]} == {1}
    for provider in ("cpu", "cuda"):
        with pytest.raises(UserError, match=r"plugin.so is for engines and --provider tensorrt, and there is nothing"):
            profile(files, provider=provider, plugin=plugin)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there(provider: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("an ONNX Runtime with providers for GPUs")
    assert cli.main(["profile", str(absolute(tmp_path / "m.onnx", 1, 3, 8, 8)), "--provider", provider]) == 3
    said = capsys.readouterr().err
    assert f"error: this ONNX Runtime has no {PROVIDERS[provider]}, but " in said
    assert "pip install onnxruntime-gpu" in said


class Doubled(torch.nn.Module):
    """Notes what it is given."""

    seen: ClassVar[list[tuple[torch.Tensor, int]]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append((images, torch.get_num_threads()))
        return images * 2


def test_a_checkpoint_runs_in_pytorch_on_the_same_noise(tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), tmp_path / "model.pt")
    before = torch.get_num_threads()
    found = profile_file(tmp_path / "model.pt", input_shape=(2, 3, 8, 8), samples=5, threads=1)
    assert (found.provider, found.precision, found.threads, len(found.samples_ms)) == ("PyTorch", "float32", 1, 5)
    assert found.where.startswith("PyTorch, 1 threads of ")
    assert found.input_shapes == {"images": (2, 3, 8, 8)}
    torch.save(Doubled(), tmp_path / "doubled.pt")
    profile_file(tmp_path / "doubled.pt", input_shape=(1, 3, 8, 8), samples=1, trust=True, threads=1)
    images, threads = Doubled.seen[-1]
    np.testing.assert_array_equal(images.numpy(), random_images((1, 3, 8, 8)))
    assert (threads, torch.get_num_threads()) == (1, before)
    with pytest.raises(UserError, match=r"does not run on .*expected input.* to have 3 channels"):
        profile_file(tmp_path / "model.pt", input_shape=(1, 4, 8, 8))
    with pytest.raises(UserError, match="checkpoint, whose layers are not timed"):
        profile_file(tmp_path / "model.pt", input_shape=(1, 3, 8, 8), samples=1, layers=True)
    assert found.notes == ()
    beside = profile_file(tmp_path / "model.pt", input_shape=(1, 3, 8, 8), samples=1, provider="cuda")
    assert beside.notes == ("a checkpoint runs in PyTorch on the CPU, whatever --provider says",)


def test_int8_that_gains_nothing_is_said() -> None:
    def timed_in(precision: str, *samples: float, **changed: object) -> Profile:
        fields = {"provider": "TensorRT 10.3.0", "machine": MACHINE, "precision": precision, "samples_ms": samples}
        return Profile(**{"file": f"{precision}.engine", **fields, **changed})

    half = timed_in("float16", 1.0, 1.1, 1.2)
    assert compare([half, timed_in("int8", 1.0, 1.1, 1.1)]) == [
        "int8.engine in INT8 is not faster than float16.engine in FP16: 1.100 against 1.100 ms"
    ]
    assert compare([timed_in("int8", 1.0, 1.09, 9.0), half]) == []
    assert compare([timed_in("float32", 9.0), half]) == []
    for elsewhere in (
        {"provider": "CPUExecutionProvider"},
        {"machine": None},
        {"input_shapes": {"images": (2, 3, 8, 8)}},
    ):
        assert compare([half, timed_in("int8", 9.0, **elsewhere)]) == []
