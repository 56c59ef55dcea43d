"""Other processes that are at work during a turn are seen in /proc and named; ours and the kernel's are not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from acmix_deploy.gate.verdict import judge
from acmix_deploy.profile import Profile, ProfileDocument, others
from acmix_deploy.profile.monitor import Conditions, Monitor
from acmix_deploy.profile.others import Other, in_words
from acmix_deploy.report.show_profile import show_profiles
from tests.gate.parts import pair

SECOND = others._TICKS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(now=100.0, monotonic=lambda: made.now)
    monkeypatch.setattr(others, "time", made)
    return made


def process(
    root: Path, pid: int, name: str, seconds: float, *, parent: int = 1, began: int = 7, kernel: bool = False
) -> None:
    """A process that has used so many seconds of CPU time, a third of them in the kernel."""
    ticks = round(seconds * SECOND)
    before = [
        "S",
        parent,
        pid,
        pid,
        0,
        -1,
        0x00200040 if kernel else 0x00400040,
        *"1234",
        ticks - ticks // 3,
        ticks // 3,
    ]
    (root / f"proc/{pid}").mkdir(parents=True, exist_ok=True)
    fields = " ".join(map(str, [*before, 9, 9, 20, 0, 1, 0, began, *[0] * 30]))
    (root / f"proc/{pid}/stat").write_text(f"{pid} ({name}) {fields}\n")


def test_the_busiest_that_are_none_of_ours(tmp_path: Path, clock: SimpleNamespace) -> None:
    ours = os.getpid()
    machine = Monitor(tmp_path, nvml=False)
    for pid, name, options in (
        (ours, "python", {}),
        (50, "worker", {"parent": ours}),
        (51, "helper", {"parent": 50}),
        (52, "kworker/0:1", {"kernel": True}),
        (60, "a (b) c)", {}),
        (61, "idle", {}),
        (62, "ended", {}),
        (63, "other", {}),
        (64, "reused", {}),
        (65, "fourth", {}),
    ):
        process(tmp_path, pid, name, 1000, **options)
    (tmp_path / "proc/self").mkdir()
    before = machine.processes()
    clock.now += 2.0
    for pid, name, seconds, options in (
        (ours, "python", 1002, {}),
        (50, "worker", 1002, {"parent": ours}),
        (51, "helper", 1002, {"parent": 50}),
        (52, "kworker/0:1", 1002, {"kernel": True}),
        (60, "a (b) c)", 1001.5, {}),
        (61, "idle", 1000.18, {}),
        (63, "other", 1001.0, {}),
        (64, "reused", 1.2, {"began": 8}),
        (65, "fourth", 1000.3, {}),
        (66, "new", 0.2, {"parent": 63}),
    ):
        process(tmp_path, pid, name, seconds, **options)
    (tmp_path / "proc/62/stat").unlink()
    found = machine.read_since(before)
    expected = [("a (b) c)", 60, 0.75), ("reused", 64, 0.6), ("other", 63, 0.5)]
    assert [(other.name, other.pid, pytest.approx(other.cores)) for other in found.others] == expected
    assert found.known
    for pid in (60, 63, 64):
        (tmp_path / f"proc/{pid}/stat").unlink()
    left = machine.read_since(before).others
    assert [(other.name, pytest.approx(other.cores)) for other in left] == [("fourth", 0.15)]  # and none of a tenth
    clock.now = 100.1
    (tmp_path / "proc/61/stat").unlink()
    process(tmp_path, 65, "fourth", 1000.04)
    (new,) = machine.read_since(before).others  # of the other one a share of so few ticks says nothing
    assert (new.name, new.cores) == ("new", pytest.approx(2))


def test_a_machine_without_proc(tmp_path: Path) -> None:
    machine = Monitor(tmp_path, nvml=False)
    assert machine.read_since(machine.processes()) == Conditions()


@pytest.mark.parametrize("in_container", [False, True])
def test_those_that_have_the_gpu_open(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, in_container: bool
) -> None:
    machine = Monitor(tmp_path, nvml=False)
    pids = (70, 71, 4711 if in_container else os.getpid())
    running = [SimpleNamespace(pid=pid) for pid in pids]
    nvml = SimpleNamespace(nvmlDeviceGetComputeRunningProcesses=lambda device: running, NVMLError=OSError)
    monkeypatch.setattr(machine, "_nvml", (nvml, "device"))
    monkeypatch.setattr(machine, "_read_nvml", dict)
    process(tmp_path, 70, "trainer", 0)
    before = machine.processes()
    clock.now += 1
    process(tmp_path, 70, "trainer", 1)
    found = machine.read_since(before).others
    if in_container:
        assert [(other.pid, other.cores) for other in found] == [(70, pytest.approx(1))]
    else:
        assert [(other.name, other.pid, other.cores) for other in found] == [("trainer", 70, None), ("?", 71, None)]
    nvml.nvmlDeviceGetComputeRunningProcesses = lambda device: (_ for _ in ()).throw(OSError())
    assert [other.cores for other in machine.read_since(before).others] == [pytest.approx(1)]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_that_is_at_work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "_MOST", 1000)  # this machine may be busy
    burn = "import time\nend = time.time() + 20\nwhile time.time() < end: pass"
    shell = [  # which ends, so that what it began is nobody's child
        "sh", "-c", '"$0" -c "$1" >&2 & echo $!', sys.executable, burn,
    ]  # fmt: skip
    pid = int(subprocess.run(shell, stdout=subprocess.PIPE, check=True).stdout)
    ours = subprocess.Popen([sys.executable, "-c", burn])
    try:
        machine = Monitor(nvml=False)
        before = machine.processes()
        deadline = time.monotonic() + 20
        found: dict[int, float | None] = {}
        while pid not in found and time.monotonic() < deadline:
            time.sleep(0.2)
            found = {other.pid: other.cores for other in machine.read_since(before).others}
        assert 0.1 < (found[pid] or 0) < 1.5
        assert not found.keys() & {os.getpid(), ours.pid}
    finally:
        ours.kill()
        ours.wait()
        os.kill(pid, signal.SIGKILL)


COMPILER, SERVER = Other(name="cc1plus", pid=812, cores=0.98), Other(name="Xorg", pid=9, cores=None)


def test_words() -> None:
    assert in_words([(), ()]) == ""
    slower = COMPILER.model_copy(update={"cores": 0.5})
    assert in_words([(COMPILER,), (SERVER, slower), ()]) == (
        "cc1plus (pid 812, up to 98% of a core, in 2 of 3 turns), Xorg (pid 9, has the GPU open, in 1 of 3 turns)"
    )
    many = [Other(name="cc1", pid=pid, cores=0.2) for pid in range(5)]
    assert in_words([many]).endswith("cc1 (pid 2, up to 20% of a core, in 1 of 1 turns), and 2 more")


def test_they_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    told = Conditions(others=(COMPILER,))
    found = Profile(
        file="model.onnx", provider="CPUExecutionProvider", samples_ms=(1.0,), conditions=(Conditions(), told) * 2
    )
    show_profiles(ProfileDocument(profiles=[found]), Console(width=200))
    said = (
        "other processes were at work while model.onnx was measured: cc1plus (pid 812, up to 98% of a core, in 2 of 2"
    )
    assert f"Note: {said} turns)" in capsys.readouterr().out
    assert Profile.model_validate_json(found.model_dump_json()) == found
    (comparison,) = judge([pair(after=told)]).comparisons
    said = (
        "other processes were at work while new.onnx was measured: cc1plus (pid 812, up to 98% of a core, in 16 of 16"
    )
    assert [note for note in comparison.notes if "other processes" in note] == [f"{said} turns)"]
