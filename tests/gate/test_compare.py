"""What cannot be compared is refused by name, stored samples of every form are read or refused, and drift is found."""

from __future__ import annotations

import json
import re
import shlex
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml

from acmix_deploy import cli
from acmix_deploy.errors import Inconclusive, UserError
from acmix_deploy.gate.compare import CLOCKS_APART, FIELDS, differences
from acmix_deploy.gate.history import read_history
from acmix_deploy.gate.read import read_pairs, read_samples
from acmix_deploy.gate.samples import GateSamples
from acmix_deploy.profile import Profile, ProfileDocument
from acmix_deploy.profile.monitor import Conditions
from acmix_deploy.report.documents import GateDocument, HistoryDocument
from tests import ROOT
from tests.gate.parts import CPU, GPU, START, alone, measured, pair, text, trtexec


def machine(base=CPU, **changed):
    return {"machine": base.model_copy(update=changed)}


def of_gpu(**changed):
    return {"kind": "engine", "provider": "TensorRT 10.3.0", "threads": None, "machine": GPU, **changed}


def after(**told):
    return {"after": Conditions(**told)}


OTHER = {
    "gpu": (of_gpu(), of_gpu(**machine(GPU, gpu="Thor (sm_110)"))),
    "driver": (of_gpu(), of_gpu(**machine(GPU, driver="550.0"))),
    "cpu": ({}, machine(cpu="another")),
    "cores": ({}, machine(cores=8)),
    "runtime": (of_gpu(), of_gpu(provider="TensorRT 10.7.0")),
    "threads": ({}, {"threads": 1}),
    "power_mode": (of_gpu(**after(power_mode="MAXN")), of_gpu(**after(power_mode="15W"))),
    "input_shapes": ({}, {"input_shapes": {"images": (2, 3, 64, 64)}}),
    "inputs": ({}, {"fed_with": "images, SHA-256 0123"}),
    "cpu_clock": (after(cpu_mhz=1000), after(cpu_mhz=1051)),
    "gpu_clock": (of_gpu(**after(gpu_mhz=1051)), of_gpu(**after(gpu_mhz=1000))),
    "memory_clock": (of_gpu(**after(memory_mhz=2000)), of_gpu(**after(memory_mhz=3000))),
}


@pytest.mark.parametrize("field", FIELDS)
def test_every_difference_is_named_and_may_be_allowed(
    field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, candidate = (measured(**fields) for fields in OTHER[field])
    (found,) = differences(baseline, candidate)
    assert found.field == field
    (swapped,) = differences(candidate, baseline)
    assert (swapped.baseline, swapped.candidate) == (found.candidate, found.baseline)
    document = GateSamples(baseline=baseline, candidate=candidate, interleaved=True)
    (tmp_path / "gate.json").write_text(text(document))
    arguments = ["gate", "check", str(tmp_path / "gate.json")]
    assert cli.main(arguments) == 4
    assert f"{field}: {found.baseline} against {found.candidate}" in capsys.readouterr().out
    assert cli.main([*arguments, "--strict"]) == 1
    assert cli.main([*arguments, "--allow", field]) == 0


@pytest.mark.parametrize(
    ("baseline", "candidate"),
    [
        ({}, {"sha256": "1" * 64, "precision": "int8", "model": "other.onnx"}),
        (of_gpu(plugin_sha256="2" * 64), of_gpu(plugin_sha256="3" * 64)),
        ({}, machine(system="a newer kernel")),
        ({}, machine(versions={**CPU.versions, "torch": "2.14.0"})),  # it did not run there
        (of_gpu(**after(cpu_mhz=1000, gpu_mhz=1000)), of_gpu(**after(cpu_mhz=3000, gpu_mhz=1049))),
        ({}, {"fed_with": None}),
    ],
)
def test_what_may_differ(baseline, candidate) -> None:
    assert differences(measured(**baseline), measured(**candidate)) == ()


def test_the_version_counts_of_what_ran_the_model() -> None:
    def ran(kind: str, **versions: str):
        return measured(
            kind=kind, provider="PyTorch", **machine(versions={"onnxruntime": "1", "torch": "2", **versions})
        )

    assert [found.candidate for found in differences(ran("pytorch"), ran("pytorch", torch="3"))] == ["PyTorch 3"]
    assert differences(ran("pytorch"), ran("pytorch", onnxruntime="3")) == ()
    assert differences(ran("onnx"), ran("onnx", onnxruntime="3"))
    assert differences(ran("onnx"), ran("pytorch"))


def test_unknown_fields_to_allow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gate.json").write_text(text(pair()))
    assert cli.main(["gate", "check", str(tmp_path / "gate.json"), "--allow", "weather"]) == 2
    assert "nothing is called weather" in capsys.readouterr().err


SINGLE = json.loads(text(alone()))


def changed(path: str, value: object) -> str:
    """The JSON of a measurement with something else at a place in it."""
    document = json.loads(text(alone()))
    *way, last = path.split(".")
    place = document
    for part in way:
        place = place[int(part) if part.isdigit() else part]
    place[int(last) if last.isdigit() else last] = value
    return json.dumps(document)


SAMPLE = "candidate.rounds.3.turns.1.samples_ms.7"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (changed("schema", 2), "is of version 2 of its form; this acmix-deploy reads version 1"),
        (changed(SAMPLE, float("nan")), f"{SAMPLE}: Input should be a finite number"),
        (changed(SAMPLE, None), f"{SAMPLE}: Input should be a valid number"),
        (changed(SAMPLE, -1.0), f"{SAMPLE}: Input should be greater than 0"),
        (changed(SAMPLE, 0.0), f"{SAMPLE}: Input should be greater than 0"),
        (changed("candidate.rounds.3.turns.1.samples_ms", []), "should have at least 1 item"),
        (text(alone())[:5000], "is not JSON, or not all of it: EOF while parsing"),
        ("", "is not JSON, or not all of it"),
        ('{"something": "else"}', "writes is needed"),
        ("3", "writes is needed"),
        ("[]", "the list is empty"),
        (json.dumps(trtexec([1.0, -2.0])), "holds no times of trtexec: 1.computeMs"),
        (json.dumps(trtexec([1.0, 0.0])), "holds latencies that no clock gives: 0.0"),
        ('{"document": "profile", "profiles": [{"file": "a.onnx", "provider": "x", "samples_ms": [1.0, NaN]}]}', "nan"),
        ('{"document": "profile", "schema": 2, "profiles": []}', "is of version 2"),
        ('{"document": "profile", "schema": 1, "profiles": []}', "profiles: List should have at least 1 item"),
    ],
)
def test_bad_input(content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.json").write_text(text(alone()))
    (tmp_path / "bad.json").write_text(content)
    assert cli.main(["gate", "check", str(tmp_path / "good.json"), str(tmp_path / "bad.json")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(tmp_path / "bad.json") in error
    (tmp_path / "good.json").unlink()
    assert cli.main(["gate", "history", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_too_few_rounds_or_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rounds in (("few", 4), ("many", 8)):
        (tmp_path / f"{name}.json").write_text(text(alone(rounds=rounds)))
    few, many = str(tmp_path / "few.json"), str(tmp_path / "many.json")
    assert cli.main(["gate", "check", few, many]) == 4
    assert "model.onnx has 4 rounds; at least 5 are needed" in capsys.readouterr().out
    assert cli.main(["gate", "check", few, many, "--strict"]) == 1
    assert cli.main(["gate", "check", many]) == 2
    assert "of 1 given, these hold one model alone" in capsys.readouterr().err
    assert cli.main(["gate", "check", many, many, many]) == 2
    assert cli.main(["gate", "check", str(tmp_path / "absent.json"), many]) == 2
    assert "absent.json" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["gate", "check", str(tmp_path / "empty"), many]) == 2
    assert "holds no .json file" in capsys.readouterr().err


@pytest.mark.parametrize(("ratio", "code"), [(0.8, 0), (1.0, 0), (1.2, 1), (1.03, 4)])
def test_exit_codes(ratio: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gate.json"
    file.write_text(text(pair(ratio)))
    options = ["--metric", "p50,p90", "--junit", str(tmp_path / "gate.xml"), "--summary", str(tmp_path / "summary.md")]
    assert cli.main(["gate", "check", str(file), "--json", *options]) == code
    outcome = {0: "pass", 1: "fail", 4: "inconclusive"}[code]
    document = GateDocument.model_validate_json(capsys.readouterr().out)
    assert document.outcome == outcome
    assert [judged.metric for judged in document.comparisons[0].judged] == ["p50", "p90"]
    assert outcome in (tmp_path / "summary.md").read_text()
    assert "<testsuite" in (tmp_path / "gate.xml").read_text()
    assert cli.main(["gate", "check", str(file), "--strict"]) == bool(code)
    (tmp_path / "other.json").write_text(text(pair(0.9)))
    assert cli.main(["gate", "check", str(file), str(tmp_path / "other.json"), "--tolerance", "40%"]) == 0


def test_a_faster_candidate_that_is_wrong_fails(tmp_path: Path) -> None:
    parity = {"metric": "relative L2 of boxes", "value": 0.3, "limit": 0.01, "passed": False}
    (tmp_path / "gate.json").write_text(text(pair(0.5, parity=(parity,))))
    assert cli.main(["gate", "check", str(tmp_path / "gate.json")]) == 1


@pytest.mark.parametrize("text", ["-1%", "2", "nan", "much", "3%%", ""])
def test_tolerances_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["gate", "check", "gate.json", f"--tolerance={text}"])
    assert stopped.value.code == 2
    assert f"'{text}' is not a share below 1, such as 3% or 0.03" in capsys.readouterr().err


def test_metrics_may_be_written_with_blanks_and_twice() -> None:
    found = cli.parser().parse_args(["gate", "check", "gate.json", "--metric", "p50, p99,p50"])
    assert found.metric == ("p50", "p99")


def test_copies_are_no_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stale file in the place of a new one would pass whatever the model does, and copies show no noise."""
    (tmp_path / "runs").mkdir()
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    for file in (old, new):
        file.write_text(text(alone()))
    for index in range(5):
        (tmp_path / "runs" / f"{index}.json").write_text(json.dumps(trtexec([1.0, 2.0])))
    assert cli.main(["gate", "check", str(old), str(new)]) == 2
    assert f"{old} and {new} hold the same samples" in capsys.readouterr().err
    assert cli.main(["gate", "check", str(old), str(tmp_path / "runs")]) == 2
    assert "0.json and" in capsys.readouterr().err


def profile(file: str, *samples: float, **fields: object) -> Profile:
    return Profile(file=file, provider="CPUExecutionProvider", machine=CPU, threads=4, samples_ms=samples, **fields)


def test_profiles_become_rounds(tmp_path: Path) -> None:
    conditions = tuple(Conditions(cpu_mhz=mhz) for mhz in (1.0, 2.0, 3.0, 4.0))
    profiles = [
        profile(name, *samples, round_samples=(2, 1), conditions=conditions)
        for name, samples in (("a.onnx", (1.0, 2.0, 3.0)), ("b.onnx", (4.0, 5.0, 6.0)), ("c.onnx", (7.0, 8.0, 9.0)))
    ]
    (tmp_path / "profile.json").write_text(text(ProfileDocument(profiles=profiles)))
    found = read_pairs([tmp_path / "profile.json"])
    assert [(pair.baseline.model, pair.candidate.model, pair.interleaved) for pair in found] == [
        ("a.onnx", "b.onnx", True),
        ("a.onnx", "c.onnx", True),
    ]
    assert [one.samples_ms for one in found[1].candidate.rounds] == [(7.0, 8.0), (9.0,)]
    assert [(turn.before.cpu_mhz, turn.after.cpu_mhz) for turn in found[0].candidate.turns] == [(1, 2), (3, 4)]
    (tmp_path / "profile.json").write_text(text(ProfileDocument(profiles=[profile("a.onnx", 1.0, round_samples=(2,))])))
    with pytest.raises(UserError, match="do not add up"):
        read_samples(tmp_path / "profile.json")


def test_a_folder_is_a_measurement_with_a_round_in_each_file(tmp_path: Path) -> None:
    for name, level in (("old", 1.0), ("new", 2.0)):
        (tmp_path / name).mkdir()
        for index in range(3):
            times = [level, level + index]
            (tmp_path / name / f"times{index}.json").write_text(json.dumps(trtexec(times)))
    (found,) = read_pairs([tmp_path / "old", tmp_path / "new"])
    assert (found.baseline.model, found.candidate.model, found.interleaved) == ("old", "new", False)
    assert [one.samples_ms for one in found.candidate.rounds] == [(2.0, 2.0), (2.0, 3.0), (2.0, 4.0)]
    assert differences(found.baseline, found.candidate) == ()
    (tmp_path / "new" / "times3.json").write_text(text(alone()))
    with pytest.raises(Inconclusive, match=r"do not belong together: .*kind.* changed on the way"):
        read_samples(tmp_path / "new")


def store(folder: Path, medians: list[float], **changes: dict[int, dict]) -> None:
    folder.mkdir()
    for index, median in enumerate(medians):
        document = alone(
            median_ms=median, seed=index, start=START + timedelta(days=index), **changes.get(f"at{index}", {})
        )
        # Names in another order than time.
        (folder / f"{100 - index}.json").write_text(text(document))


def test_history_finds_a_step_and_what_changed_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path / "runs", [10.0] * 6 + [11.0] * 6, at6={"sha256": "1" * 64, **machine(cpu="another")})
    ((found,), _) = read_history(tmp_path / "runs")
    assert [run.file for run in found.runs] == [f"{100 - index}.json" for index in range(12)]
    medians = [
        np.median([np.median(one.samples_ms) for one in read_samples(tmp_path / "runs" / run.file)[0].candidate.rounds])
        for run in found.runs
    ]
    assert [run.median_ms for run in found.runs] == pytest.approx(medians)
    assert [run.ratio for run in found.runs] == pytest.approx([median / medians[0] for median in medians])
    assert found.drift.kind == "step"
    assert found.drift.since == "94.json"
    assert found.drift.ratio == pytest.approx(1.1, rel=0.02)
    assert found.drift.p == pytest.approx(2 / 924, abs=0.002)  # as many orders of 6 and 6 as split like this
    assert found.runs[6].changed == ("model: another file", "cpu: a CPU against another")
    assert [run.changed for run in found.runs[1:6]] == [()] * 5
    assert cli.main(["gate", "history", str(tmp_path / "runs")]) == 0
    assert "A step: from 94.json on 1.1" in capsys.readouterr().out
    assert cli.main(["gate", "history", str(tmp_path / "runs"), "--json"]) == 0
    assert HistoryDocument.model_validate_json(capsys.readouterr().out).histories == [found]


def test_history_finds_a_trend(tmp_path: Path) -> None:
    store(tmp_path / "runs", [10.0 * 1.02**index for index in range(12)])
    ((found,), _) = read_history(tmp_path / "runs")
    assert found.drift.kind == "trend"
    assert found.drift.ratio == pytest.approx(1.02**11, rel=0.03)


def test_history_leaves_out_what_is_no_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a truncated file among many, or what other verbs wrote there."""
    store(tmp_path / "runs", [10.0] * 6)
    (tmp_path / "runs" / "verdict.json").write_text('{"document": "gate check", "schema": 1}')
    (tmp_path / "runs" / "truncated.json").write_text(text(alone())[:5000])
    assert cli.main(["gate", "history", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert "Left out: " in printed
    assert cli.main(["gate", "history", str(tmp_path / "runs"), "--json"]) == 0
    found = HistoryDocument.model_validate_json(capsys.readouterr().out)
    assert [len(one.runs) for one in found.histories] == [6]
    for name, note in zip(("truncated.json", "verdict.json"), found.notes, strict=True):
        assert name in note
        assert note in printed


def test_history_of_noise_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(tmp_path / "runs", [10.0] * 6)
    ((found,), _) = read_history(tmp_path / "runs")
    assert found.drift is None
    assert cli.main(["gate", "history", str(tmp_path / "absent")]) == 2
    assert "is not a folder" in capsys.readouterr().err


PAGE = (ROOT / "docs/gate.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("place", "device"), [("On a device behind ssh", "bench"), ("On a machine of your own", None)])
def test_the_workflows_are_yaml_whose_commands_parse(place: str, device: str | None) -> None:
    section = PAGE.partition(f"### {place}\n")[2].partition("\n##")[0]
    github, gitlab = (yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", section, re.M | re.S))
    (job,) = github["jobs"].values()
    assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    assert set(job) <= {"runs-on", "steps", "timeout-minutes"}
    commands = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
    (name,) = (name for name, value in gitlab.items() if isinstance(value, dict) and "script" in value)
    assert gitlab[name]["allow_failure"] == {"exit_codes": [4]}
    assert gitlab[name]["artifacts"]["reports"]["junit"] == "gate.xml"
    commands += [*gitlab[name].get("before_script", ()), *gitlab[name]["script"]]
    words = [shlex.split(part) for command in commands for part in command.split("||")]
    parsed = [cli.parser().parse_args(line[1:]) for line in words if line[:1] == ["acmix-deploy"]]
    runs = [options for options in parsed if "candidate" in options]
    assert len(parsed) == (8 if device else 4)
    assert [options.on for options in runs] == [device] * 2
    assert all(options.wait < 60 * job["timeout-minutes"] for options in runs if device)


def test_every_field_that_may_be_allowed_is_described() -> None:
    section = re.search(r"^## Not comparable\n(.*?)^## ", PAGE, re.M | re.S)[1]
    assert set(re.findall(r"^\| `(\w+)`", section, re.M)) == set(FIELDS)
    assert f"{CLOCKS_APART:.0%} apart or less" in section
