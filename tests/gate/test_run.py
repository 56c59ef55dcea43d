"""Models are measured in turn, each turn in a process of its own, and what was measured outlives what breaks off."""

from __future__ import annotations

import json
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from acmix_deploy import cli, manifest
from acmix_deploy.artifacts import sha256
from acmix_deploy.errors import UserError
from acmix_deploy.gate import measure as measure_module
from acmix_deploy.gate import worker
from acmix_deploy.gate.compare import differences
from acmix_deploy.gate.measure import measure
from acmix_deploy.gate.parity import parity_of
from acmix_deploy.gate.read import read_samples
from acmix_deploy.gate.worker import Request
from acmix_deploy.profile.monitor import Conditions
from acmix_deploy.profile.subjects import RunSettings
from acmix_deploy.profile.timing import Machine
from acmix_deploy.report.documents import VerifyDocument
from acmix_deploy.verify import Verification, verification
from tests.engine.parts import make_engine
from tests.gate.parts import text


def chain(path: Path, length: int = 1, elements: int = TensorProto.FLOAT) -> Path:
    """|images| so many times over."""
    tensors = ["images", *(f"t{index}" for index in range(1, length)), "output0"]
    nodes = [helper.make_node("Abs", [source], [target]) for source, target in pairwise(tensors)]
    values = [helper.make_tensor_value_info(name, elements, [1, 3, 16, 16]) for name in ("images", "output0")]
    graph = helper.make_graph(nodes, "graph", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, path)
    return path


def gate(*arguments: object) -> int:
    return cli.main(["gate", *map(str, arguments)])


def test_two_models_are_measured_in_turn(tmp_path: Path) -> None:
    old, new = chain(tmp_path / "old.onnx"), chain(tmp_path / "new.onnx", 2)
    output = tmp_path / "gate.json"
    options = ("--rounds", 2, "--samples", 7, "--seconds", 5, "--threads", 1)
    assert gate("run", "--baseline", old, "--candidate", new, "-o", output, *options) == 0
    (found,) = read_samples(output)
    assert found.interleaved
    assert found.baseline is not None
    assert (found.baseline.model, found.candidate.model) == ("old.onnx", "new.onnx")
    assert (found.baseline.sha256, found.candidate.sha256) == (sha256(old), sha256(new))
    positions = [
        [[turn.position for turn in one.turns] for one in measured.rounds]
        for measured in (found.baseline, found.candidate)
    ]
    assert positions == [[[0, 3], [1, 2]], [[1, 2], [0, 3]]]
    turns = [*found.baseline.turns, *found.candidate.turns]
    assert [len(turn.samples_ms) for turn in turns] == [7] * 8
    assert all(turn.after.load is not None for turn in turns if Path("/proc/loadavg").exists())
    in_time = sorted(turns, key=lambda turn: turn.started)
    places = [(index, turn.position) for index, turn in enumerate(in_time)]
    assert places == [(index, index % 4) for index in range(8)]
    apart = [later.started - turn.started for turn, later in pairwise(in_time)]
    assert min(apart) > timedelta(seconds=0.1)  # a Python and ONNX Runtime start in between
    for measured in (found.baseline, found.candidate):
        assert (measured.kind, measured.provider, measured.threads) == ("onnx", "CPUExecutionProvider", 1)
        assert (measured.machine, measured.fed_with, measured.dropped) == (Machine.this(), "noise", 0)
        assert measured.input_shapes == {"images": (1, 3, 16, 16)}


WORKER = """
import json, os, signal, sys
request = json.load(sys.stdin)
with open({log!r}, "a") as log:
    print(os.getpid(), request["file"], request["index"], request["position"], file=log)
{action}
turn = {{"samples_ms": [1.0], "position": request["position"], "after": {{"throttling": throttling}}}}
measured = {{
    "model": os.path.basename(request["file"]), "sha256": sha256, "kind": "onnx", "provider": "CPUExecutionProvider",
    "rounds": [{{"index": request["index"], "turns": [turn]}}],
}}
print(json.dumps({{"measured": measured}}))
"""


@pytest.fixture
def in_worker(tmp_path, monkeypatch):
    """Puts a script in the place of the worker, which does ``action`` first, and gives what every process was asked."""

    def replace(action):
        script, log = tmp_path / "worker.py", tmp_path / "log"
        action = f"throttling, sha256 = [], 'same'\n{action}"
        script.write_text(WORKER.format(log=str(log), action=action))
        monkeypatch.setattr(worker, "__file__", str(script))
        return lambda: [line.split() for line in log.read_text().splitlines()]

    return replace


def run_pair(tmp_path, *options):
    files = ("--baseline", tmp_path / "old.onnx", "--candidate", tmp_path / "new.onnx")
    return gate("run", *files, "-o", tmp_path / "gate.json", *options)


def test_every_turn_has_its_process(in_worker, tmp_path: Path) -> None:
    asked = in_worker("")
    assert run_pair(tmp_path, "--rounds", 3) == 0
    order = [(Path(file).stem, int(index), int(position)) for _, file, index, position in asked()]
    old_first, new_first = ["old", "new", "new", "old"], ["new", "old", "old", "new"]
    assert [stem for stem, *_ in order] == [*old_first, *new_first, *old_first]
    assert [place for _, *place in order] == [[index, position] for index in range(3) for position in range(4)]
    assert len({process for process, *_ in asked()}) == 12


@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "crashed (SIGSEGV): nothing on stderr"),
        ("print('noise'); sys.exit('the model gave up')", "crashed (exit code 1): the model gave up"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "crashed (SIGKILL)"),
        ("print(json.dumps({'refusal': [2, 'too much', 'less']})); sys.exit()", "broke off: too much"),
        ("sha256 = 'another'", "sha256 changed on the way"),
    ],
)
def test_what_breaks_off_in_round_7_leaves_the_rounds_before(
    in_worker, tmp_path: Path, capsys: pytest.CaptureFixture[str], action: str, said: str
) -> None:
    in_worker(f"if request['index'] == 6:\n    {action}")
    assert run_pair(tmp_path) == 4
    error = capsys.readouterr().err
    assert "error: round 7 of 12 broke off" in error
    assert said in error
    assert f"The rounds before it, 6, are in {tmp_path / 'gate.json'}." in error
    (kept,) = read_samples(tmp_path / "gate.json")
    assert [one.index for one in kept.candidate.rounds] == [one.index for one in kept.baseline.rounds] == [*range(6)]


def test_what_breaks_off_at_once(in_worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_worker("os.kill(os.getpid(), signal.SIGKILL)")
    assert run_pair(tmp_path) == 4
    assert "runs out" in capsys.readouterr().err
    in_worker("print(json.dumps({'refusal': [3, 'no TensorRT', 'install it']})); sys.exit()")
    assert run_pair(tmp_path) == 3
    assert capsys.readouterr().err.endswith("error: no TensorRT\ninstall it\n")
    assert not (tmp_path / "gate.json").exists()


def test_a_provider_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("an ONNX Runtime with providers for GPUs")
    file = chain(tmp_path / "model.onnx")
    assert gate("run", "--candidate", file, "--provider", "cuda", "-o", tmp_path / "gate.json") == 3
    assert "error: this ONNX Runtime has no CUDAExecutionProvider, but " in capsys.readouterr().err


def test_an_onnx_file_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = onnxruntime.InferenceSession
    on_gpu = type(
        "OnGpu",
        (session,),
        {
            "__init__": lambda self, model, options, **how: session.__init__(
                self, model, options, providers=["CPUExecutionProvider"]
            ),
            "get_providers": lambda self: ["TensorrtExecutionProvider"],
        },
    )
    file = chain(tmp_path / "model.onnx")
    (tmp_path / "plugin.so").write_bytes(b"a plugin")
    setup = RunSettings(threads=1, plugin=tmp_path / "plugin.so")
    on_cpu = worker.measure(Request(file=file, setup=setup, samples=3, seconds=5))
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_gpu)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.setattr(manifest, "gpu_here", lambda: {"gpu": "Orin", "sm": 87})
    setup = setup.model_copy(update={"provider": "tensorrt"})
    found = worker.measure(Request(file=file, setup=setup, samples=3, seconds=5))
    assert (found.kind, found.provider, found.threads) == ("onnx", "TensorrtExecutionProvider", None)
    assert (on_cpu.plugin_sha256, found.plugin_sha256) == (None, sha256(tmp_path / "plugin.so"))
    assert [one.field for one in differences(on_cpu, found)][:2] == ["gpu", "runtime"]
    assert found.notes[0].startswith("latency of an ONNX file on a GPU is that of a whole call")


def test_a_file_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gate("run", "--candidate", tmp_path / "absent.onnx", "-o", tmp_path / "gate.json") == 2
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["baseline", "candidate", "parity"])
def test_what_is_read_is_not_overwritten(role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / name for name in ("baseline", "candidate", "parity")}
    for file in files.values():
        file.write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    options = [text for name, file in files.items() for text in (f"--{name}", file)]
    assert gate("run", *options, "-o", tmp_path / "folder" / ".." / role) == 2
    assert f"{files[role]} is read" in capsys.readouterr().err
    assert files[role].read_bytes() == b"precious"


def test_rounds_that_throttle_are_repeated_then_dropped(in_worker, tmp_path: Path) -> None:
    # Round 1 throttles once, round 2 whenever it is tried; both models drop a round in which one of them throttled.
    count = "tries = sum(f' {request[\"index\"]} 0' in line for line in open(log.name))"
    throttles = "request['position'] == 2 and (request['index'] == 2 or request['index'] == 1 and tries == 1)"
    asked = in_worker(f"{count}\nif {throttles}:\n    throttling = ['power limit']")
    assert run_pair(tmp_path, "--rounds", 4) == 0
    (found,) = read_samples(tmp_path / "gate.json")
    for measured in (found.baseline, found.candidate):
        assert [one.index for one in measured.rounds] == [0, 1, 3]
        assert measured.dropped == 1
        assert not any(turn.throttling for turn in measured.turns)
    tried = [int(index) for _, _, index, position in asked() if position == "0"]
    assert tried == [0, 1, 1, 2, 2, 2, 3]


def test_nothing_but_throttling(in_worker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_worker("throttling = ['temperature of the CPU']")
    assert run_pair(tmp_path, "--rounds", 2) == 4
    assert "no round counts: in every one clocks were held down by temperature of the CPU" in capsys.readouterr().err
    assert not (tmp_path / "gate.json").exists()


def test_one_model_alone_and_files_of_one_name(in_worker, tmp_path: Path) -> None:
    asked = in_worker("")
    alone = measure(tmp_path / "new.onnx", tmp_path / "gate.json", rounds=2)
    assert (alone.baseline, alone.interleaved, len(asked())) == (None, False, 4)
    paths = [tmp_path / name / "model.onnx" for name in ("old", "new")]
    pair = measure(paths[1], tmp_path / "gate.json", baseline=paths[0], rounds=1)
    assert (pair.baseline.model, pair.candidate.model) == tuple(map(str, paths))


def test_an_engine_with_its_plugin(gpu, empty_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.Monitor, "read", lambda self: Conditions(gpu_mhz=900.0))
    model = onnx.load(chain(tmp_path / "model.onnx"))
    engine = make_engine(tmp_path / "model.engine", model, plugin=empty_library)
    found = worker.measure(Request(file=engine, setup=RunSettings(), samples=20, seconds=30, index=3, position=2))
    ((one,), (turn,)) = found.rounds, found.turns
    assert (one.index, turn.position) == (3, 2)
    assert turn.samples_ms == (1.0,) * 20  # the stand-in's GPU takes a millisecond, without transfers
    assert (found.kind, found.provider, found.clock("gpu_mhz")) == ("engine", "TensorRT 8.6.0", 900)
    assert (found.sha256, found.plugin_sha256) == (sha256(engine), sha256(empty_library))


def test_a_checkpoint(tmp_path: Path) -> None:
    torch.save(torch.nn.Conv2d(3, 4, 3), tmp_path / "model.pt")
    setup = RunSettings(input_shape=(1, 3, 8, 8), threads=1)
    found = worker.measure(Request(file=tmp_path / "model.pt", setup=setup, samples=3, seconds=5))
    assert (found.kind, found.provider, found.sha256) == ("pytorch", "PyTorch", sha256(tmp_path / "model.pt"))
    assert len(next(found.turns).samples_ms) == 3


def test_what_a_model_prints_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("talkative.py").write_text(
        "from torch import nn\n\ndef make():\n    print('{}')\n    return nn.Conv2d(3, 4, 3)"
    )
    torch.save(torch.nn.Conv2d(3, 4, 3).state_dict(), "weights.pt")
    setup = RunSettings(input_shape=(1, 3, 8, 8), threads=1, arch="talkative:make")
    found = measure_module._ask(Request(file=Path("weights.pt"), setup=setup, samples=3, seconds=5))
    assert (found.model, found.kind) == ("weights.pt", "pytorch")


def test_the_input_may_come_from_images_and_its_type_does_not_matter(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="needs opencv")

    def fed_with(folder: Path, elements: int) -> str | None:
        model = chain(tmp_path / "model.onnx", elements=elements)
        return worker.measure(Request(file=model, setup=RunSettings(images=folder), samples=1, seconds=5)).fed_with

    found = set()
    for name, grey in (("dark", 10), ("light", 200)):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "a.png"), np.full((20, 30, 3), grey, np.uint8))
        of_types = {fed_with(tmp_path / name, elements) for elements in (TensorProto.FLOAT, TensorProto.FLOAT16)}
        assert len(of_types) == 1
        found |= of_types
    assert len(found) == 2


def comparison(candidate: str, output: str, value: float) -> verification.Comparison:
    return verification.Comparison(
        candidate=candidate,
        precision="float16",
        output=output,
        input_shapes={"images": (1, 3, 8, 8)},
        limit=0.01,
        max_abs=value,
        relative_l2=value,
        cosine=1.0,
        problem="",
    )


def test_parity_comes_from_the_report_beside_the_file_or_from_a_verification(tmp_path: Path) -> None:
    model = chain(tmp_path / "new.onnx")
    assert parity_of(model) == ()
    comparisons = [comparison("new.onnx", "boxes", 0.002), comparison("new.onnx", "scores", 0.03)]
    comparisons.append(comparison("other.onnx", "boxes", 9.0))
    verified = Verification(reference="PyTorch", comparisons=tuple(comparisons))
    (tmp_path / "verify.json").write_text(text(VerifyDocument(**verified.model_dump())))
    found = parity_of(model, tmp_path / "verify.json")
    assert [(one.metric, one.value, one.limit, one.passed) for one in found] == [
        ("relative L2 of boxes", 0.002, 0.01, True),
        ("relative L2 of scores", 0.03, 0.01, False),
    ]
    files = {"fp16": {"artifact": {"sha256": sha256(model)}}}
    report = {"document": "export", "verification": json.loads(verified.model_dump_json()), "files": files}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert parity_of(model) == found
    chain(model, 2)  # no longer the file that was verified
    assert parity_of(model) == ()
    with pytest.raises(UserError, match=r"says nothing of third.onnx, but of new.onnx, other.onnx"):
        parity_of(tmp_path / "third.onnx", tmp_path / "verify.json")


def test_parity_is_stored_with_the_candidate(in_worker, tmp_path: Path) -> None:
    in_worker("")
    verified = Verification(reference="old.onnx", comparisons=(comparison("new.onnx", "boxes", 0.02),))
    (tmp_path / "verify.json").write_text(text(VerifyDocument(**verified.model_dump())))
    assert run_pair(tmp_path, "--rounds", 1, "--parity", tmp_path / "verify.json") == 0
    (found,) = read_samples(tmp_path / "gate.json")
    assert [one.passed for one in found.candidate.parity] == [False]
    assert found.baseline.parity == ()


def test_an_interruption_leaves_the_rounds_before(in_worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = in_worker("")

    def interrupted(*arguments, **options):
        if (tmp_path / "log").exists() and len(asked()) == 10:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    run = measure_module.run
    monkeypatch.setattr(measure_module, "run", interrupted)
    assert run_pair(tmp_path) == 130
    (kept,) = read_samples(tmp_path / "gate.json")
    assert [one.index for one in kept.candidate.rounds] == [0, 1]
