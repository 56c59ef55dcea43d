"""Engines are timed between events and beside other files: on stand-ins for CUDA and TensorRT, where all work on a
stream takes a millisecond."""

from __future__ import annotations

import json
import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from acmix_deploy import cli
from acmix_deploy.artifacts import write_artifact
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.profile import Profile, ProfileDocument, monitor, profile, run
from acmix_deploy.profile.layers import Layer
from acmix_deploy.profile.monitor import Conditions, Monitor
from acmix_deploy.profile.others import Processes
from acmix_deploy.report.show_profile import show_profiles
from tests.engine.parts import make_engine

DETECTOR = ("/model.0/conv/Conv", "acmix_0.qkv", "acmix_0.attention", "acmix_0.y", "acmix_1.qkv", "node_tail")


def chain(*names: str, outputs: int = 1, dims=(1, 3, 8, 8)) -> onnx.ModelProto:
    """|images| again and again by nodes of these names; the last results are the outputs."""
    tensors = ["images", *(f"t{index}" for index in range(1, len(names) + 1))]
    nodes = [
        helper.make_node("Abs", [source], [target], name=name)
        for name, source, target in zip(names, tensors, tensors[1:], strict=False)
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in tensors]
    graph = helper.make_graph(nodes, "graph", values[:1], values[-outputs:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(autouse=True)
def _no_sensors(monkeypatch):
    monkeypatch.setattr(Monitor, "read", lambda self: Conditions())
    monkeypatch.setattr(Monitor, "processes", lambda self: Processes(time.monotonic(), {}))


@pytest.fixture
def engine(gpu, tmp_path):
    return make_engine(tmp_path / "model.engine", chain(*DETECTOR, outputs=2), precision="int8")


def test_the_gpu_alone_and_with_transfers(engine: Path) -> None:
    (found,) = profile([engine], samples=7, rounds=2, seconds=600)
    assert found.samples_ms == (1.0,) * 8  # the graph alone
    assert found.with_transfers_ms == (4.0,) * 8  # an upload, and a download of each output, besides
    assert (found.median_ms, found.median_with_transfers_ms) == (1.0, 4.0)
    assert found.stable
    assert found.warmup_runs == 2 * (1 + 2 * 50)
    assert (found.file, found.precision, found.threads, found.rounds) == ("model.engine", "int8", None, 2)
    assert found.input_shapes == {"images": (1, 3, 8, 8)}
    assert found.provider == "TensorRT 8.6.0"
    assert found.machine is not None
    assert (found.machine.gpu, found.machine.tensorrt) == ("Orin (sm_87)", "TensorRT 8.6.0")
    assert found.where == "TensorRT 8.6.0 on Orin (sm_87), driver unknown"
    assert Profile.model_validate_json(found.model_dump_json()) == found


def test_a_thousand_samples_by_default(gpu, engine: Path) -> None:
    (found,) = profile([engine], seconds=60)
    assert 1000 <= len(found.samples_ms) <= 1002
    assert gpu.calls["cuGraphLaunch"] == len(found.samples_ms) + found.warmup_runs - 3


def test_inputs_of_free_size_have_to_be_in_the_profile(gpu, tmp_path: Path) -> None:
    shapes = ((1, 3, 8, 8), (1, 3, 16, 16), (4, 3, 32, 32))
    free = make_engine(tmp_path / "free.plan", chain("a", dims=("b", 3, "h", "w")), {"images": shapes})
    (found,) = profile([free], input_shape=(2, 3, 16, 32), samples=3)
    assert found.input_shapes == {"images": (2, 3, 16, 32)}
    with pytest.raises(
        UserError, match=r"is built for \[1, 3, 8, 8\] to \[4, 3, 32, 32\], and is given \[1, 3, 64, 64\]"
    ):
        profile([free], input_shape=(1, 3, 64, 64))


def test_a_file_that_is_no_engine(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to run")
    with pytest.raises(UserError, match=r"notes.txt is a text file that begins with 'nothing to run'; an ONNX file"):
        profile([tmp_path / "notes.txt"])


def test_layers_are_summed_by_block(engine: Path) -> None:
    (found,) = profile([engine], samples=1, layers=True)
    # The stand-in's layers take 1, 2, 3 ... ms; it calls them otherwise and names their nodes.
    assert [(layer.name, layer.median_ms) for layer in found.layers] == [
        (f"my_{name}", number) for number, name in enumerate(DETECTOR, 1)
    ]
    assert [(block.block, block.layers, block.ms) for block in found.blocks] == [
        ("/model.0", 1, 1.0),
        ("acmix_0", 3, 9.0),
        ("acmix_1", 1, 5.0),
        ("other", 1, 6.0),
    ]
    assert [block.share for block in found.blocks] == pytest.approx([1 / 21, 9 / 21, 5 / 21, 6 / 21])
    assert found.samples_ms == (1.0,) * 3


def test_blocks_of_an_engine_of_a_plain_file_come_from_that_file(
    gpu,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from acmix_deploy.profile import subjects

    model = chain("first", "second")
    onnx.save(model, tmp_path / "model.onnx")
    engine = make_engine(tmp_path / "model.engine", model)
    settings = json.loads((tmp_path / "model.engine.json").read_text())["settings"]
    write_artifact(engine, "engine", parents=[tmp_path / "model.onnx"], settings=settings)
    monkeypatch.setattr(subjects, "blocks_of", lambda model: {model.graph.node[1].name: "acmix_0"})
    assert [layer.block for layer in profile([engine], samples=1, layers=True)[0].layers] == ["other", "acmix_0"]
    onnx.save(chain("first", "second", "third"), tmp_path / "model.onnx")  # no longer what it was built from
    assert [layer.block for layer in profile([engine], samples=1, layers=True)[0].layers] == ["other", "other"]


def test_power_is_read_under_load_after_the_latencies(
    gpu,
    engine: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched: list[int] = []

    def read(self: Monitor) -> Conditions:
        launched.append(gpu.calls["cuGraphLaunch"])
        return Conditions(power_w=30.0, gpu_mhz=900.0, throttling=("power limit",) if len(launched) > 2 else ())

    monkeypatch.setattr(Monitor, "read", read)
    monkeypatch.setattr(monitor, "INTERVAL", 0.005)
    monkeypatch.setattr(run, "_LOAD_SECONDS", (0.05, 0.2))
    (found,) = profile([engine], samples=5, rounds=1, power=True)
    _, before, after, *under_load = launched  # the first is that of need_power
    assert (before, after) == (0, found.warmup_runs - 1 + 5)
    assert len(under_load) == len(found.power.readings) >= 3
    assert after < under_load[0] < under_load[-1]
    assert [reading.power_w for reading in found.conditions] == [30.0, 30.0]
    assert found.power.mean_w == pytest.approx(30)
    runs = gpu.calls["cuGraphLaunch"] - after
    assert found.power.inference_ms == pytest.approx(250 / runs, rel=0.5)
    assert found.power.energy_mj == pytest.approx(30 * found.power.inference_ms)
    assert found.throttling == ("power limit",)
    assert len(found.samples_ms) == 5


def test_power_where_nothing_tells_it(engine: Path) -> None:
    with pytest.raises(MissingComponent, match="nothing here tells power"):
        profile([engine], power=True)


def test_engines_onnx_files_and_trtexec_in_one_table(engine: Path, tmp_path: Path, capsys) -> None:
    onnx.save(chain("a"), tmp_path / "plain.onnx")
    entry = {"h2dMs": 0.5, "computeMs": 2.0, "d2hMs": 0.5, "latencyMs": 3.0}
    (tmp_path / "times.json").write_text(json.dumps([entry] * 4))
    files = [str(path) for path in (tmp_path / "plain.onnx", engine, tmp_path / "times.json")]
    assert cli.main(["profile", *files, "--samples", "3", "--seconds", "1", "--layers"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert rows["file"][-3:] == ["samples", "times", "faster"]
    assert rows["model.engine"][1:-2] == ["1.000"] * 4 + ["4.000"]
    assert rows["times.json"][1:-2] == ["2.000"] * 4 + ["3.000"]
    assert "acmix, all 2" in printed
    assert "66.7%" in printed
    assert "TensorRT 8.6.0 on Orin (sm_87)" in printed
    assert "Note: times of trtexec" in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert cli.main(["profile", *files, "--samples", "3", "--seconds", "1", "--json"]) == 0
    document = ProfileDocument.model_validate_json(capsys.readouterr().out)
    assert [entry.file for entry in document.profiles] == ["plain.onnx", "model.engine", "times.json"]


def test_what_is_shown_fits_100_columns() -> None:
    layers = [
        Layer(name=f"l{index}", kind="Conv", block=block, median_ms=12.3 * index + 0.1)
        for index, block in enumerate(["acmix_0", "acmix_1", *(f"/model.{n}" for n in range(14)), "other"])
    ]
    told = Conditions(
        gpu_mhz=1300.5, memory_mhz=3199, temperature_c=48, throttling=("over-current",), power_mode="MAXN"
    )
    power = monitor.Power.of([told.model_copy(update={"power_w": 30.0})], inference_ms=4.0, images=1)
    shared = {
        "provider": "TensorRT 10.3.0",
        "with_transfers_ms": (1234.5678,),
        "conditions": (told, told),
        "power": power,
    }
    profiles = [
        Profile(file=name, samples_ms=(1034.5678,) * 1000, layers=layers, stable=False, **shared)
        for name in ("yolov8n-acmix.fp16.engine", "yolov8n-acmix.int8.engine")
    ]
    console = Console(width=100, record=True, markup=False, highlight=False)
    show_profiles(ProfileDocument(profiles=profiles), console)
    printed = console.export_text()
    for cell in ("1034.6", "1234.6", "acmix, all 2", "and 5 more", "1300", "over-current", "MAXN", "30.0", "120.0"):
        assert cell in printed, cell
    assert "in some round" in printed
    assert "yolov8n-acmix.fp16.engine" in printed.splitlines()[1]  # not folded
