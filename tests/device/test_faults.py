"""What may go wrong between here and a device: one sentence, nothing half on either side, and the next call works.

Programs are those of a shell, in a :class:`acmix_deploy.DeviceSession`; the verbs' own are in test_verbs.py.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from pathlib import Path

import pytest

from acmix_deploy.device import link, remote
from acmix_deploy.device.link import LinkLost, Unavailable
from acmix_deploy.device.session import DeviceSession
from acmix_deploy.errors import AcmixDeployError, MissingComponent, UserError
from tests.device.loopback import Device, until

LONG = "echo started >> {mark}; echo working ... >&2; until [ -e {mark}.end ]; do sleep 0.1; done; echo done"


@dataclasses.dataclass
class Job:
    """A program on the device that runs for a while, in a thread of its own here."""

    bench: Device
    session: DeviceSession
    program: str = LONG
    keep: bool = False
    error: BaseException | None = None
    stdout: str = ""

    @property
    def mark(self) -> Path:
        return self.bench.home / "mark"

    def __enter__(self) -> Job:
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert until(self.mark.exists), self.error
        return self

    def end(self) -> None:
        """Have it end, in a moment."""
        self.mark.with_name("mark.end").touch()

    def __exit__(self, *_: object) -> None:
        self.end()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.stdout = run(self.session, self.program.format(mark=self.mark), keep=self.keep).stdout
        except BaseException as error:
            self.error = error

    @property
    def runs(self) -> int:
        return self.mark.read_text().count("started")


@pytest.fixture(autouse=True)
def _no_tensorrt(monkeypatch):
    """Nor the package, which would be asked for it."""
    monkeypatch.setattr(DeviceSession, "machine", None)


def run(session, program, **options):
    return session.run("a test", [["sh", "-c", program]], **options)


def raised(kind, do):
    """What is told of an error, which is one sentence."""
    with pytest.raises(kind) as caught:
        do()
    assert type(caught.value) is kind
    assert "\n" not in caught.value.message
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The connection


def test_cut_while_a_file_is_sent(bench, tmp_path):
    (tmp_path / "model").write_bytes(os.urandom(6_000_000))
    with DeviceSession("bench") as session:
        bench.link.cut_after("sent", 2_000_000)
        said = raised(LinkLost, lambda: run(session, "cat model", files={"model": tmp_path / "model"}))
    assert said.startswith("the connection to bench was lost")
    assert LinkLost.exit_code == 3
    store = bench.home / "acmix-deploy/store"
    assert until(lambda: not bench.processes())
    assert [*store.iterdir()] == []
    with DeviceSession("bench") as session:
        assert run(session, "wc -c < model", files={"model": tmp_path / "model"}).stdout.strip() == "6000000"
    (kept,) = store.iterdir()
    assert kept.read_bytes() == (tmp_path / "model").read_bytes()
    assert bench.left() == []


def test_cut_while_a_file_is_fetched(bench, tmp_path):
    out, program = tmp_path / "out", "echo run >> ../../../runs; head -c 6000000 /dev/urandom > out"
    for _ in range(2):  # the second finds what the first one left
        with DeviceSession("bench", detach=True) as session:
            if not out.exists():
                bench.link.cut_after("received", 2_000_000)
            with pytest.raises(LinkLost, match="the connection to bench was lost"):
                run(session, program, writes={"out": out})
        assert [*tmp_path.iterdir()] == []
    with DeviceSession("bench", detach=True) as session:
        assert run(session, program, writes={"out": out}).found
    assert out.stat().st_size == 6_000_000
    assert (bench.home / "acmix-deploy/runs").read_text() == "run\n"
    assert bench.left() == []


def test_cut_during_a_job_ends_it(bench):
    with DeviceSession("bench") as session, Job(bench, session) as job:
        bench.link.cut()
        assert until(lambda: not bench.processes())
    assert isinstance(job.error, LinkLost)
    assert job.error.message.endswith("; what ran there is ended there")
    assert "--detach" in job.error.hint
    assert bench.left() == []


def test_cut_during_a_detached_job(bench):
    with DeviceSession("bench", detach=True) as session, Job(bench, session) as job:
        bench.link.cut()
        assert until(lambda: job.error)
        assert job.error.message.endswith("; what ran there goes on")
        with DeviceSession("bench", detach=True, progress=lambda step: job.end()) as second:
            done = run(second, job.program.format(mark=job.mark))
    assert (done.code, done.stdout, done.found, job.runs) == (0, "done\n", True, 1)
    assert bench.left() == []


def test_the_result_of_a_detached_job_waits(bench):
    with DeviceSession("bench", detach=True) as session, Job(bench, session) as job:
        bench.link.cut()
    assert until(lambda: not bench.processes())
    steps = []
    with DeviceSession("bench", detach=True, progress=steps.append) as session:
        done = run(session, job.program.format(mark=job.mark))
    assert (done.stdout, done.found, job.runs) == ("done\n", True, 1)
    assert [step for step in steps if step.startswith("found on bench, begun ")]
    with DeviceSession("bench", detach=True) as session:  # it was taken
        assert not run(session, "echo other").found
    assert bench.left() == []


@pytest.fixture
def impatient(monkeypatch):
    """Count a silent connection as lost after a second or two, on both sides."""
    monkeypatch.setattr(link, "_ALIVE", ("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=1"))
    monkeypatch.setattr(link, "_BEAT_S", 0.2)
    script = link._SCRIPT.replace(b"_BEAT_S = 60.0", b"_BEAT_S = 1.5")
    assert script != link._SCRIPT
    monkeypatch.setattr(link, "_SCRIPT", script)


def test_a_silent_connection_ends_a_job_on_both_sides(bench, impatient):
    with DeviceSession("bench") as session, Job(bench, session) as job:
        bench.link.freeze()
        assert until(lambda: not any("sh\0-c" in text for text in running(bench)), 10)  # though nothing is cut
    assert isinstance(job.error, LinkLost)
    assert "is ended there" in job.error.message
    bench.link.thaw()
    bench.link.cut()
    assert bench.left() == []


def running(bench):
    for pid in bench.processes():
        try:
            yield Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            continue


def test_a_job_longer_than_the_beat_is_not_lost(bench, impatient):
    with DeviceSession("bench") as session:
        assert run(session, "sleep 2.5; echo there").stdout == "there\n"


def test_half_an_answer(bench, monkeypatch):
    """Cut in the middle of a line, JSON is not read."""
    half = link._SCRIPT.replace(
        b'+ b"\\n")\n    sys.stdout.buffer.flush()', b"[:20]); sys.stdout.buffer.flush(); os._exit(0)"
    )
    assert half != link._SCRIPT
    monkeypatch.setattr(link, "_SCRIPT", half)
    said = raised(MissingComponent, lambda: DeviceSession("bench").__enter__())
    assert "python3 gave no answer on bench: exit code 0" in said
    assert bench.left() == []


# ---------------------------------------------------------------------------------------------------------------------
# The disk


def test_no_space_for_what_is_sent(bench, tmp_path):
    (tmp_path / "small").write_bytes(bytes(1000))
    (tmp_path / "large").write_bytes(os.urandom(3_000_000))
    files = {name: tmp_path / name for name in ("small", "large")}
    with bench.small_disk(bench.home / "acmix-deploy", "1m") as disk, DeviceSession("bench") as session:
        said = raised(UserError, lambda: run(session, "cat *", files=files))
        assert said.startswith("cannot write files on bench: No space left on device")
        assert [path.name for path in disk.glob("store/*")] == []
        assert run(session, "wc -c < small", files={"small": files["small"]}).stdout.strip() == "1000"


@pytest.mark.parametrize("program", ["head -c 3000000 /dev/zero > out", "head -c 3000000 /dev/zero"])
def test_no_space_for_what_a_job_writes(bench, tmp_path, program):
    with bench.small_disk(bench.home / "acmix-deploy", "1m") as disk, DeviceSession("bench") as session:
        said = raised(UserError, lambda: run(session, program, writes={"out": tmp_path / "out"}))
        assert said.startswith("cannot write files on bench: No space left on device")
        assert [*disk.glob("jobs/*")] == []
        assert run(session, "echo there").stdout == "there\n"
    assert [*tmp_path.iterdir()] == []


def test_no_folder_can_be_made(bench):
    from acmix_deploy.device.registry import Device as Named

    with DeviceSession(Named(name="bench", host="bench", folder="/dev/null/folder")) as session:
        said = raised(UserError, lambda: run(session, "true"))
    assert said.startswith("/dev/null/folder on bench cannot be used: Not a directory")
    assert "device add bench --folder DIR" in said
    assert bench.left() == []


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def test_no_python(bench):
    bench.without("python*")
    said = raised(MissingComponent, lambda: DeviceSession("bench").__enter__())
    assert said == "bench has no python3\nInstall it there: apt-get install python3"
    assert bench.left() == []


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'python3: error while loading shared libraries: libz.so: cannot open' >&2; exit 127", "loading shared"),
        ("echo 'Fatal Python error: init_fs_encoding' >&2; exit 1", "exit code 1: Fatal Python error"),
    ],
)
def test_python_that_fails(bench, script, told):
    bench.program("python3", f"#!/bin/sh\n{script}\n")
    said = raised(MissingComponent, lambda: DeviceSession("bench").__enter__())
    assert said.startswith("python3 gave no answer on bench: exit code ")
    assert told in said
    assert "has no python3" not in said
    assert bench.left() == []


def test_a_login_shell_that_prints(bench, tmp_path):
    bench.profile("echo Welcome; printf 'no newline'; echo 'stty: not a terminal' >&2")
    (tmp_path / "in").write_bytes(b"in\n")
    with DeviceSession("bench") as session:
        program = "cat in; echo said >&2; printf '\\001\\n\\036acmix' > out"
        done = run(session, program, files={"in": tmp_path / "in"}, writes={"out": tmp_path / "out"})
    assert (done.stdout, done.said) == ("in\n", ["said"])
    assert (tmp_path / "out").read_bytes() == b"\1\n\x1eacmix"


def test_a_reboot_in_the_middle(bench):
    with DeviceSession("bench", detach=True) as session, Job(bench, session, keep=True) as job:
        bench.reboot()
    assert isinstance(job.error, LinkLost)
    steps = []
    with DeviceSession("bench", detach=True, progress=steps.append) as session:
        done = run(session, job.program.format(mark=job.mark), keep=True)
    assert (done.stdout, done.found, job.runs) == ("done\n", False, 2)
    assert "bench restarted when this ran there before; it runs again" in steps
    assert [path.name for path in bench.home.glob("*/jobs/*")] == [done.job]


def test_killed_for_memory(bench):
    with DeviceSession("bench") as session:
        done = run(session, "echo asked for too much >&2; kill -9 $$")
        said = raised(MissingComponent, lambda: session.check(done))
    assert said.startswith("bench ended what ran there, as the system does when memory runs out\n")
    assert bench.left() == []


def test_a_program_does_not_outlive_its_keeper(bench):
    """As where the system ends that one, for want of memory."""
    with DeviceSession("bench") as session, Job(bench, session, "echo started > {mark}; exec sleep 60") as job:
        (program,) = (pid for pid in bench.processes() if "sleep" in Path(f"/proc/{pid}/cmdline").read_text())
        parent = Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()[1]
        os.kill(int(parent), 9)
        assert until(lambda: not Path(f"/proc/{program}").exists())
    assert job.error.message == "a test was ended on bench from outside"
    assert bench.left() == []


def test_no_such_program(bench):
    with DeviceSession("bench") as session:
        said = raised(MissingComponent, lambda: session.run("a test", [["/nowhere/trtexec"]]))
    assert said == "/nowhere/trtexec does not run on bench: No such file or directory"
    assert bench.left() == []


# ---------------------------------------------------------------------------------------------------------------------
# One at a time


def test_held(bench):
    steps = []
    with (
        DeviceSession("bench") as first,
        DeviceSession("bench", wait=0) as second,
        DeviceSession(
            "bench", progress=lambda step: (steps.append(step), job.end() if "waiting" in step else None)
        ) as third,
        Job(bench, first) as job,
    ):
        said = raised(Unavailable, lambda: run(second, "echo second"))
        assert "bench is in use: " in said
        assert "@" in said
        assert "runs a test there since " in said
        assert run(second, "echo beside", alone=False).stdout == "beside\n"
        assert not steps[1:]
        assert run(third, "echo third").stdout == "third\n"
    assert steps[1].startswith("waiting for bench: ")
    assert bench.left() == []


def test_two_that_run_the_same_both_get_their_own(bench):
    with DeviceSession("bench") as first, DeviceSession("bench") as second, Job(bench, first) as job:
        second.progress = lambda step: job.end()
        done = run(second, job.program.format(mark=job.mark))
    assert (done.stdout, done.found, job.stdout, job.runs) == ("done\n", False, "done\n", 2)
    assert bench.left() == []


def test_waiting_ends_with_the_connection(bench):
    with DeviceSession("bench") as first, DeviceSession("bench") as second, Job(bench, first):
        waiting = threading.Thread(target=lambda: raised(LinkLost, lambda: run(second, "echo")))
        waiting.start()
        time.sleep(0.5)
        bench.link.cut()
        waiting.join(10)
        assert until(lambda: not bench.processes())
    assert until(lambda: not bench.left()), bench.left()


@pytest.mark.skipif(os.getuid() != 0, reason="another user's file: needs root")
def test_a_lock_that_another_user_made(tmp_path, monkeypatch):
    """Locked all the same, by whoever can read it."""
    tmp_path.chmod(0o755)
    for folder in list(tmp_path.parents)[:3]:
        folder.chmod(0o755)
    (tmp_path / "acmix-deploy.lock").write_text("{}")
    (tmp_path / "acmix-deploy.lock").chmod(0o644)
    monkeypatch.setattr(remote.tempfile, "tempdir", str(tmp_path))
    request = {"alone": True, "wait": 0.0, "who": "me", "what": "a test"}
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.setuid(65534)
            remote._device_lock(request, None)
            code = 7
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_exit_codes():
    """A script of CI tells these apart."""
    assert (LinkLost.exit_code, MissingComponent.exit_code, UserError.exit_code) == (3, 3, 2)
    assert issubclass(LinkLost, AcmixDeployError)
