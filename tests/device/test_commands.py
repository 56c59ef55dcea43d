"""The command line with a device: names, hosts, interrupts, exit codes. The package there is a script of sh."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest

from acmix_deploy import __version__
from acmix_deploy.cli import main
from acmix_deploy.device import link
from tests.device.conftest import stand_in
from tests.device.loopback import Device, until

FOREVER = "echo running >> {mark}; trap 'echo ended >> {mark}; exit 143' TERM; while :; do sleep 0.1; done"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder for commands, with a file that is called model.onnx."""
    (tmp_path / "model.onnx").write_bytes(b"model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capsys, *arguments):
    """The exit code of a command and what it prints on stderr, but for what it does."""
    code = main([*arguments])
    return code, re.sub(r".* \.\.\.\n", "", capsys.readouterr().err)


# ---------------------------------------------------------------------------------------------------------------------
# Names


def test_names(bench, capsys):
    assert main(["device", "add", "bench-1", "bench", "--folder", "a folder"]) == 0
    assert "acmix-deploy is not installed in" in capsys.readouterr().out
    assert main(["device", "add", "other", "behind"]) == 0
    assert main(["device", "add", "bench-1", "--folder", "b folder"]) == 0  # the host stays
    capsys.readouterr()
    assert main(["device", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == [
        {"name": "bench-1", "host": "bench", "folder": "b folder"},
        {"name": "other", "host": "behind", "folder": "acmix-deploy"},
    ]
    assert main(["device", "check", "bench-1", "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["ready"], found["folder"]) == (False, f"{bench.home}/b folder")
    assert main(["device", "remove", "other"]) == 0
    assert said(capsys, "device", "remove", "benhc-1") == (
        2,
        "error: no device is called benhc-1\nDid you mean bench-1?\n",
    )
    assert main(["device", "list", "--json"]) == 0
    assert [device["name"] for device in json.loads(capsys.readouterr().out)["devices"]] == ["bench-1"]
    assert bench.left() == []


def test_what_cannot_be_reached_gets_no_name(bench, capsys):
    assert main(["device", "add", "far", "nowhere"]) == 3
    capsys.readouterr()
    assert main(["device", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == []


@pytest.mark.parametrize("host", ["-oProxyCommand=touch x", "-oProxyCommand=touch${IFS}x", "", "a b", "a\tb", "\n"])
def test_no_host(bench, here, capsys, host):
    for arguments in (["device", "check", "--", host], ["device", "add", "name", "--", host]):
        code, told = said(capsys, *arguments)
        assert (code, "is no host" in told) == (2, True)
    if host:
        code, told = said(capsys, "profile", "model.onnx", f"--on={host}")
        assert (code, "is no host" in told) == (2, True), told
    else:
        with pytest.raises(SystemExit, match="2"):
            main(["profile", "model.onnx", "--on="])
    assert bench.calls() == []
    assert [path.name for path in here.iterdir()] == ["model.onnx"]


def test_remove_files(bench, this_wheel, capsys):
    stand_in(bench, this_wheel, "exit 0")
    folder = bench.home / "acmix-deploy"
    (folder / "mine.txt").write_text("a user's")
    (folder / "timing.cache").write_text("of TensorRT")
    assert main(["device", "add", "bench"]) == 0
    assert main(["device", "remove", "bench", "--files"]) == 0
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    assert main(["device", "add", "bench"]) == 0
    assert main(["device", "remove", "bench", "--files"]) == 0
    assert not folder.exists()
    assert bench.left() == []


@pytest.mark.parametrize("folder", ["", ".", "~", "a/..", "..", "/"])
def test_no_folder_of_others(bench, capsys, folder):
    """`remove --files` removes folders in it that others may have too."""
    code, told = said(capsys, "device", "add", "bench", f"--folder={folder}")
    assert code == 2
    assert "on bench cannot be used: it has to be a folder of its own" in told


# ---------------------------------------------------------------------------------------------------------------------
# The connection


@pytest.mark.parametrize(
    ("host", "reason", "hint"),
    [
        ("stranger", "its host key is not known here: Host key verification failed.", "accept it once: ssh stranger"),
        ("refused", "it does not let you in: ", "ssh-copy-id refused"),
        ("nowhere", "no ssh server listens there: ", "Is sshd running"),
        ("no.such.host.invalid", "there is no host of that name: ", "Give user@host"),
    ],
)
def test_no_connection(bench, host, reason, hint):
    """Without a terminal nothing asks, so nothing hangs."""
    if host.endswith("invalid"):
        config = bench.root / "ssh_config"
        config.write_text(config.read_text().replace("HostName 127.0.0.1", "HostName %h"))
    command = [sys.executable, "-m", "acmix_deploy.cli", "device", "check", host]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        start_new_session=True,
    )
    connecting, error, told = done.stderr.splitlines()
    assert done.returncode == 3
    assert connecting == f"connecting to {host} ..."
    assert error.startswith(f"error: {host} cannot be reached: {reason}")
    assert hint in told
    assert bench.left() == []


def test_a_host_key_that_changed(bench, capsys):
    (bench.root / "known_hosts").write_text(f"bench {(bench.root / 'user_key.pub').read_text()}")
    code, told = said(capsys, "device", "check", "bench")
    assert code == 3
    assert "its host key is another one than that in known_hosts" in told
    assert "ssh-keygen -R bench" in told


def test_what_ssh_is_told(bench, here, this_wheel, capsys):
    """No name is in a command, and no option trusts a host."""
    stand_in(bench, this_wheel, "exit 3")
    name = "a b'\"$(touch x)`;.onnx"
    (here / name).write_bytes(b"model")
    assert main(["device", "add", "n;touch", "bench", "--folder", "$(touch x) 'f"]) == 0
    assert main(["profile", name, "--on", "bench"]) == 3
    calls = bench.calls()
    commands = {call[call.index("--") + 2] for call in calls if len(call) > call.index("--") + 2}
    assert commands == {link._COMMAND}
    assert {call[call.index("--") + 1] for call in calls} == {"bench"}
    for words in calls:
        assert "touch" not in "".join(words).replace(link._COMMAND, "")
        assert not re.search(
            "StrictHostKeyChecking|KnownHostsFile|UserKnownHosts|password|sshpass", "".join(words), re.I
        )
    assert not [*bench.home.glob("**/x"), *here.glob("x")]


def test_one_connection_a_command(bench, here, this_wheel, capsys):
    stand_in(bench, this_wheel, "exit 3")
    for count in (1, 2):
        assert main(["profile", "model.onnx", "--on", "bench"]) == 3
        assert bench.link.connections == count
    assert bench.left() == []


def test_what_is_there_is_not_sent_again(bench, here, this_wheel, capsys):
    weights = onnx.numpy_helper.from_array(np.frombuffer(os.urandom(1_000_000), np.uint8), "weights")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "graph", [], [], [weights])), "model.onnx")
    (here / "same.onnx").write_bytes((here / "model.onnx").read_bytes())
    stand_in(bench, this_wheel, "exit 3")
    sent = []
    for names in (["model.onnx"], ["same.onnx", "model.onnx"]):
        before = bench.link.sent
        assert main(["profile", *names, "--on", "bench"]) == 3
        sent.append(bench.link.sent - before)
        assert ("sending model.onnx to bench: 1.0 MB ..." in capsys.readouterr().err) == (len(sent) == 1)
    assert sent[0] > 1_000_000
    assert sent[1] < 300_000  # of which most is the script of each request


# ---------------------------------------------------------------------------------------------------------------------
# Ends


def started(bench: Device, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "acmix_deploy.cli", "profile", "model.onnx", "--on", "bench", *options]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  a script's background ignores it
    )
    assert until(lambda: (bench.home / "mark").exists() or process.poll() is not None, 60)
    assert process.poll() is None, process.communicate()
    return process


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_end_ends_what_runs_there(bench, here, this_wheel, sign, code):
    mark = bench.home / "mark"
    stand_in(bench, this_wheel, FOREVER.format(mark=mark))
    process = started(bench)
    os.kill(process.pid, sign)
    out, err = process.communicate(timeout=90)
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    assert until(lambda: mark.read_text() == "running\nended\n", 15)
    assert until(lambda: not bench.processes(), 15)
    assert until(lambda: not bench.link.open, 15)  # nor does a ControlMaster stay
    if sign != signal.SIGKILL:
        assert bench.left() == []
    assert [*bench.home.glob("acmix-deploy/jobs/*")] == []
    assert [path.name for path in here.iterdir()] == ["model.onnx"]


def test_an_interrupt_leaves_what_is_detached(bench, here, this_wheel):
    mark = bench.home / "mark"
    stand_in(bench, this_wheel, FOREVER.format(mark=mark))
    process = started(bench, "--detach")
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=90)
    assert process.returncode == 130
    assert until(lambda: not bench.link.open)
    assert mark.read_text() == "running\n"
    assert bench.processes()


# ---------------------------------------------------------------------------------------------------------------------
# The package


def test_a_device_without_the_package(bench, here, capsys):
    code, told = said(capsys, "profile", "model.onnx", "--on", "bench")
    assert (code, told) == (
        3,
        f"error: acmix-deploy is not installed in {bench.home}/acmix-deploy of bench\n"
        "Install it: acmix-deploy device add bench --install\n",
    )
    assert not (bench.home / "acmix-deploy").exists()


def test_another_version(bench, here, this_wheel, capsys):
    stand_in(bench, this_wheel, "exit 0")
    installed = bench.home / "acmix-deploy/installed.json"
    for version, words in (
        ("0.0.9", f"acmix-deploy 0.0.9, here is {__version__}"),
        (__version__, f"acmix-deploy {__version__} of another build"),
    ):
        installed.write_text(json.dumps({"version": version, "wheel": "of another"}))
        code, told = said(capsys, "profile", "model.onnx", "--on", "bench")
        assert code == 3
        assert f"error: bench has {words}" in told
        assert "Renew it: acmix-deploy device add bench --install\n" in told


def test_an_answer_of_something_else(bench, here, this_wheel, capsys):
    for verb, words in (
        ("echo '{}'", "error: bench answered with something else than profile does"),
        ("echo Illegal instruction >&2; exit 132", "error: what ran on bench ended with exit code 132: Illegal"),
        ("echo 'error: it is so' >&2; echo 'Do this.' >&2; exit 2", "error: on bench: it is so\nDo this."),
        ("kill -9 $$", "error: bench ended what ran there, as the system does when memory runs out"),
    ):
        stand_in(bench, this_wheel, verb)
        code, told = said(capsys, "profile", "model.onnx", "--on", "bench")
        assert (code, words in told) == (2 if "exit 2" in verb else 3, True), told
    assert bench.left() == []


def test_the_clock(bench, this_wheel, capsys):
    stand_in(bench, this_wheel, "exit 1")
    bench.clock(-86400 * 400)
    assert main(["device", "check", "bench", "--json"]) == 0
    (clock,) = [part for part in json.loads(capsys.readouterr().out)["components"] if part["name"] == "clock"]
    assert (clock["state"], clock["found"]) == ("fault", "the clock of bench is 400 d behind")
    assert "set-ntp" in clock["advice"]
