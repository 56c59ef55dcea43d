"""The device of the tests is one: sessions are real, what it lacks is lacking, and faults are noticed by OpenSSH."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.device import loopback
from tests.device.loopback import Device, until

BOOT_ID = "/proc/sys/kernel/random/boot_id"


def start(bench: Device, command: str, *options: str) -> subprocess.Popen[str]:
    """A session that prints its first line and goes on."""
    command = f"echo started; {command}"
    line = [bench.client / "ssh", *options, "bench", command]
    session = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert session.stdout is not None
    assert session.stdout.readline() == "started\n", session.communicate()
    return session


def test_a_session(bench):
    done = bench.ssh('cat; pwd; echo "$HOME $TMPDIR"; exit 7', stdin=b"in\n")
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.split() == ["in", str(bench.home), str(bench.home), str(bench.tmp)]
    assert bench.link.connections == 1
    assert bench.link.sent > 500
    assert bench.link.received > 500
    assert until(lambda: not bench.link.open)
    assert bench.processes() == []


def test_ssh_is_found_on_the_path(bench):
    assert subprocess.check_output(["ssh", "bench", "pwd"], text=True) == f"{bench.home}\n"


def test_one_connection_for_many_commands(bench, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a socket's path has to be short
    shared = ["ssh", "-o", "ControlPath=socket", "-o", "ControlMaster=auto", "-o", "ControlPersist=60"]
    for profile in ("echo one", "echo two"):
        bench.profile(profile)
        assert (
            subprocess.check_output([*shared, "bench", "true"], text=True, stderr=subprocess.DEVNULL)
            == f"{profile[5:]}\n"
        )
    assert (bench.link.connections, bench.link.open) == (1, 1)
    bench.link.cut()
    assert until(lambda: not (tmp_path / "socket").exists())


def test_hosts(bench):
    assert bench.ssh("echo there", "behind").stdout == "there\n"
    assert bench.link.connections == 2
    for host, message in (
        ("stranger", "Host key verification failed"),
        ("refused", "Permission denied (publickey)"),
        ("nowhere", "Connection refused"),
    ):
        done = bench.ssh("true", host)
        assert (done.returncode, message in done.stderr) == (255, True), done.stderr


def test_its_python(bench):
    there, absent = ("numpy", "onnx", "onnxruntime", "pydantic"), ("acmix_deploy", "torch", "ultralytics")
    code = f"import sys, {', '.join(there)}\nfrom importlib.util import find_spec\n"
    code += f"print(*sys.version_info[:2], *filter(find_spec, {absent}))"
    venv = "python3 -m venv --without-pip --system-site-packages 'a b' && 'a b/bin/python'"
    answer = bench.ssh(f"{venv} -c {shlex.quote(code)}")
    assert (answer.stdout, answer.stderr) == ("{} {}\n".format(*sys.version_info[:2]), "")


def test_a_shell_that_prints(bench):
    bench.profile("echo Welcome; printf 'no newline'; printf 'nor here' >&2")
    done = bench.ssh("echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("Welcome\nno newlineout\n", "nor hereerr\n")


def test_programs(bench):
    bench.program("trtexec", '#!/bin/sh\necho "&&&& PASSED $1"\n')
    bench.without("cat")
    bench.without("python*")
    answer = bench.ssh("trtexec 'a b'; command -v cp; command -v cat || echo no cat; python3 -V")
    assert answer.stdout.splitlines() == ["&&&& PASSED a b", f"{bench.root}/programs/cp", "no cat"]
    assert (answer.returncode, "python3: not found" in answer.stderr) == (127, True)


def test_an_old_python(bench):
    bench.old_python()
    assert (
        bench.ssh("""python3 -c 'import sys; print(sys.version_info[:2], sys.version[:4])'""").stdout == "(3, 8) 3.8.\n"
    )


def test_a_connection_that_is_cut(bench):
    session = start(bench, "sleep 60")
    bench.link.cut()
    assert session.wait(timeout=5) == 255
    assert bench.link.open == 0
    assert bench.processes()  # what ran there runs on, as on a real one
    bench.kill()
    assert bench.processes() == []


def test_a_connection_that_is_cut_while_it_sends(bench):
    bench.link.cut_after("sent", 3_000_000)
    done = bench.ssh("cat > received", stdin=bytes(10_000_000))
    assert done.returncode == 255
    assert 0 < (bench.home / "received").stat().st_size <= 3_000_000
    assert bench.ssh("true").returncode == 0


def test_a_connection_that_is_silent(bench):
    session = start(bench, "sleep 60", "-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=1")
    bench.link.freeze()
    assert session.wait(timeout=5) == 255
    assert "not responding" in session.communicate()[1]
    bench.link.thaw()


def test_no_connection(bench):
    bench.link.down()
    assert bench.ssh("true").returncode == 255
    bench.link.up()
    assert bench.ssh("true").returncode == 0


def test_a_reboot(bench):
    ask = f'cat {BOOT_ID}; python3 -c \'print(open("{BOOT_ID}").read(), end="")\''
    before = bench.ssh(ask).stdout.split()
    assert before == [Path(BOOT_ID).read_text().strip()] * 2
    session = start(bench, "touch $TMPDIR/lost; setsid sleep 60 & sleep 60")
    bench.reboot()
    assert session.wait(timeout=5) == 255
    first, second = bench.ssh(ask).stdout.split()
    assert first == second != before[0]
    assert (bench.processes(), list(bench.tmp.iterdir())) == ([], [])


def test_another_time(bench):
    bench.clock(-(10**8))
    date, seconds, _ = bench.ssh(
        "date +%s; python3 -c 'import time; print(time.time(), time.monotonic())'"
    ).stdout.split()
    assert float(date) == pytest.approx(time.time() - 1e8, abs=60)
    assert float(seconds) == pytest.approx(time.time() - 1e8, abs=60)


def test_a_small_disk(bench):
    with bench.small_disk(bench.home / "disk", "1m") as disk:
        done = bench.ssh('python3 -c \'open("disk/file", "wb").write(bytes(1 << 21))\'')
        assert "No space left on device" in done.stderr
        assert (disk / "file").stat().st_size == 1 << 20
    assert not (bench.home / "disk/file").exists()


def test_nothing_is_left(tmp_path):
    with loopback.device(tmp_path / "root") as device:
        session = start(device, "setsid sleep 60 & sleep 60")
    assert session.wait(timeout=5) == 255
    assert (device.processes(), list(tmp_path.iterdir())) == ([], [])


def test_what_is_missing_has_a_name(monkeypatch):
    monkeypatch.setattr(loopback, "SSHD", Path("/nowhere/sshd"))
    assert loopback.missing.__wrapped__() == "no /nowhere/sshd: apt-get install openssh-server"
