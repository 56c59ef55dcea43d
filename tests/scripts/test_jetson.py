"""The scripts for a Jetson, with programs on the PATH that stand in for its own, and the commands of docs/jetson.md."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from acmix_deploy import cli
from acmix_deploy.targets import TARGETS
from tests import ROOT

SCRIPTS = ROOT / "scripts/jetson"
PAGE = (ROOT / "docs/jetson.md").read_text(encoding="utf-8")

STAND_INS = {
    # What a script writes into /etc goes elsewhere.
    "sudo": 'exec "${@//\\/etc\\//$ROOT/etc/}"',
    "nvpmodel": "echo 'NV Power Mode: MAXN'",
    # Asks before it overwrites a file, as the real one, and may fail with exit code 0.
    "jetson_clocks": """
        case "${1-set}" in
            --store) [ ! -e "$2" ] || { read -r; exit 1; }; echo 306 >"$2" ;;
            --restore) echo "restored $(cat "$2")" >>"$ROOT/log"; echo "${RESTORE_SAYS-}" ;;
            set) echo "${SET_SAYS-}" ;;
        esac
    """,
    "apt-get": "",
    "systemctl": "",
    # Makes an environment whose programs only say how they were called.
    "python3": """
        case "$1" in
            -c) "$PYTHON" -c "import sys; sys.version_info = (3, ${MINOR-10}); $2" ;;
            --version) echo "Python 3.$MINOR" ;;
            -m) mkdir -p "${!#}/bin"; cp "$ROOT/bin/venv-python" "${!#}/bin/python" ;;
        esac
    """,
    "venv-python": '[ "$3" != install ] || cp "$ROOT/bin/systemctl" "$(dirname "$0")/acmix-deploy"',
    "dpkg": 'exit "${DPKG-1}"',
    "workload": 'echo "running" >>"$ROOT/log"; exit "${EXITS-0}"',
}


@pytest.fixture
def jetson(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Runs a script where the programs of a Jetson are; gives its end, and every call that it made, in order."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "etc/default").mkdir(parents=True)
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    for name, body in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/bash\necho "$(basename "$0") $*" >>"$ROOT/log"\n{body}\n')
        program.chmod(0o755)

    def run(name: str, *arguments: object, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        done = subprocess.run(
            # As from a terminal: in a group of its own, with no signal ignored.
            ["env", "--default-signal", SCRIPTS / name, *map(str, arguments)],
            env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "ROOT": str(tmp_path), "PYTHON": sys.executable, **variables},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        return done, log.read_text().splitlines() if log.exists() else []

    return run


@pytest.fixture
def installed(jetson, tmp_path):
    """A folder after install.sh, and a model in it."""
    done, _ = jetson("install.sh", tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    (tmp_path / "folder/model.engine").touch()
    return tmp_path / "folder"


def program(name: str) -> str:
    """Path of a program on the PATH or beside this Python; the test is skipped where there is none."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or pytest.skip(f"{name} is not installed")


def test_shellcheck() -> None:
    scripts = [*ROOT.glob("scripts/**/*.sh"), ROOT / ".ci/run"]
    assert len(scripts) > 4
    done = subprocess.run([program("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert not done.stdout


@pytest.mark.parametrize("name", [path.name for path in SCRIPTS.glob("*.sh")])
def test_without_arguments_the_usage_is_told(jetson, name: str) -> None:
    done, calls = jetson(name)
    assert (done.returncode, calls) == (2, [])
    assert done.stderr.startswith(f"usage: {name} ")


def test_clocks_are_restored(jetson) -> None:
    done, calls = jetson("clocks.sh", "workload", "a b", EXITS="7")
    assert done.returncode == 7
    assert "MAXN" in done.stderr
    (stored,) = (call for call in calls if call.startswith("jetson_clocks --store "))
    state = stored.split()[-1]
    assert [call for call in calls if not call.startswith("sudo")] == [
        "nvpmodel -q",
        stored,
        "jetson_clocks ",
        "workload a b",
        "running",
        f"jetson_clocks --restore {state}",
        "restored 306",
    ]
    assert not Path(state).parent.exists()


def test_clocks_that_cannot_be_set_are_restored_and_nothing_runs(jetson) -> None:
    done, calls = jetson("clocks.sh", "workload", SET_SAYS="Error: Failed to max GPU frequency!")
    assert done.returncode == 1
    assert "Failed to max GPU frequency!" in done.stderr
    assert "running" not in calls
    assert calls[-1] == "restored 306"


def test_clocks_that_cannot_be_restored_can_be_later(jetson) -> None:
    done, _ = jetson("clocks.sh", "workload", RESTORE_SAYS="Error: Failed to restore clk_min_rate")
    assert done.returncode == 1
    state = Path(re.findall(r"^error: jetson_clocks --restore (\S+): Error: ", done.stderr, re.M)[0])
    assert state.read_text() == "306\n"
    shutil.rmtree(state.parent)


def test_clocks_that_cannot_be_stored_are_not_set(jetson, tmp_path: Path) -> None:
    (tmp_path / "bin/jetson_clocks").write_text('#!/bin/bash\necho "clocks $*" >>"$ROOT/log"\nexit 1\n')
    done, calls = jetson("clocks.sh", "workload")
    assert done.returncode == 1
    assert [call for call in calls if call.startswith("clocks")] == [calls[-1]]
    assert "--store" in calls[-1]


@pytest.mark.parametrize(("number", "to"), [("TERM", "$PPID"), ("HUP", "$PPID"), ("INT", "0")])
def test_clocks_are_restored_after_a_signal(jetson, tmp_path: Path, number: str, to: str) -> None:
    (tmp_path / "bin/workload").write_text(f"#!/bin/bash\nkill -{number} {to}\nsleep 1\n")
    done, calls = jetson("clocks.sh", "workload")
    assert done.returncode == -signal.Signals[f"SIG{number}"]
    assert calls[-1] == "restored 306"


def test_elsewhere_the_scripts_say_so(jetson, tmp_path: Path) -> None:
    (tmp_path / "bin/nvpmodel").unlink()
    done, calls = jetson("clocks.sh", "workload")
    assert (done.returncode, calls) == (3, [])
    assert "run this on a Jetson" in done.stderr
    done, calls = jetson("install.sh", tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    assert not any(call.startswith(("sudo", "apt-get")) for call in calls)


def test_install(jetson, tmp_path: Path) -> None:
    done, calls = jetson("install.sh", tmp_path / "folder")
    assert done.returncode == 0, done.stderr
    assert any(call.startswith("apt-get install --yes nvidia-jetpack ") for call in calls)
    assert f"python3 -m venv --system-site-packages --without-pip {tmp_path}/folder/venv" in calls
    (pip,) = (call for call in calls if " install " in call and call.startswith("python "))
    path, extras = pip.split()[-1].rstrip("]").split("[")
    assert (Path(path).resolve(), extras) == (ROOT, "serve,tensorrt")
    assert calls[-1] == "acmix-deploy doctor"


def test_install_of_a_wheel_renews_it_and_asks_for_nothing_that_is_there(jetson, tmp_path: Path) -> None:
    for again in (False, True):
        done, calls = jetson("install.sh", tmp_path / "a b", "my.whl", "--no-index", DPKG="0")
        assert done.returncode == 0, done.stderr
        assert not any(call.startswith(("sudo", "apt-get", "acmix-deploy")) for call in calls)
        pip = [call for call in calls if " install " in call and call.startswith("python ")]
        options = "python -m pip install --disable-pip-version-check --no-index"
        renewed = [f"{options} --force-reinstall --no-deps my.whl"] * again
        assert pip == [*renewed, f"{options} my.whl[serve,tensorrt]"]


def test_install_needs_a_newer_python_than_jetpack_5_has(jetson, tmp_path: Path) -> None:
    done, calls = jetson("install.sh", tmp_path / "folder", MINOR="8")
    assert done.returncode == 3
    assert "Python 3.8 is too old" in done.stderr
    assert not any(call.startswith(("sudo", "apt-get")) for call in calls)


def test_build(jetson, installed: Path) -> None:
    done, calls = jetson("build.sh", installed, "a/model.fp16.onnx", "--fp16", "--level", "5")
    assert done.returncode == 0, done.stderr
    plugin, build = (cli.parser().parse_args(shlex.split(call)[1:]) for call in calls)
    assert plugin.out == installed
    assert (build.model, build.output) == (Path("a/model.fp16.onnx"), installed / "model.fp16.engine")
    assert build.plugin == installed / "libacmix_plugin.so"
    assert (build.fp16, build.level) == (True, 5)


def test_service(jetson, installed: Path, tmp_path: Path) -> None:
    done, calls = jetson("service.sh", installed, installed / "model.engine", "--port", "8001")
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if call.startswith("systemctl")] == [
        "systemctl daemon-reload",
        "systemctl enable acmix-deploy",
        "systemctl restart acmix-deploy",
    ]
    unit = (tmp_path / "etc/systemd/system/acmix-deploy.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", unit, re.M)
    name, value = (tmp_path / "etc/default/acmix-deploy").read_text().strip().split("=", 1)
    executable, *arguments = command.replace(f"${name}", shlex.split(value)[0]).split()
    assert Path(executable) == installed / "venv/bin/acmix-deploy"
    options = cli.parser().parse_args(arguments)
    assert (options.model, options.port, options.host) == (installed / "model.engine", 8001, "127.0.0.1")
    verify_unit(tmp_path / "etc/systemd/system", "")


@pytest.mark.parametrize("drop_in", re.findall(r"^```ini\n(.*?)^```$", PAGE, re.M | re.S))
def test_drop_ins_of_the_documentation(jetson, installed: Path, tmp_path: Path, drop_in: str) -> None:
    assert jetson("service.sh", installed, installed / "model.engine")[0].returncode == 0
    drop_in = drop_in.replace("/opt/acmix-deploy", str(installed)).replace("/usr/bin/jetson_clocks", "/bin/true")
    verify_unit(tmp_path / "etc/systemd/system", drop_in)
    for command in re.findall(r"/acmix-deploy (.*)$", drop_in, re.M):
        cli.parser().parse_args(command.replace("$ARGUMENTS", "model.engine").split())


def verify_unit(folder: Path, drop_in: str) -> None:
    """systemd finds nothing wrong with the service. It says so in words; its exit code is 0 for most mistakes."""
    if drop_in:
        (folder / "acmix-deploy.service.d").mkdir()
        (folder / "acmix-deploy.service.d/override.conf").write_text(drop_in)
    done = subprocess.run(
        [program("systemd-analyze"), "verify", "--man=no", folder / "acmix-deploy.service"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_service_refuses_what_systemd_would_read_otherwise(jetson, installed: Path) -> None:
    (installed / "my model.engine").touch()
    for arguments in (
        [installed / "none.engine"],
        [installed / "my model.engine"],
        [installed / "model.engine", "--host", '$(id)"'],
    ):
        done, calls = jetson("service.sh", installed, *arguments)
        assert (done.returncode, calls) == (2, [])
        assert done.stderr.startswith("error: ")


def test_commands_of_the_documentation() -> None:
    """Every acmix-deploy command parses; every script exists and gets as many arguments as its usage says."""
    blocks = "\n".join(re.findall(r"^```(?:console|text)\n(.*?)^```$", PAGE, re.M | re.S))
    commands = re.findall(r"(?:^|^\$ |clocks.sh )(acmix-deploy .*)$", blocks, re.M)
    assert len(commands) > 4
    for command in commands:
        cli.parser().parse_args(shlex.split(command)[1:])
    scripts = re.findall(r"scripts/jetson/(\S+)(?=(.*)$)", blocks, re.M)
    assert {name for name, _ in scripts} == {path.name for path in SCRIPTS.glob("*.sh")}
    for name, arguments in scripts:
        usage = (SCRIPTS / name).read_text().splitlines()[1]
        needed = re.findall(r"\b[A-Z]{2}[A-Za-z.]*", usage.split(" [")[0].split(": ", 1)[1].split(":")[0])
        assert len(shlex.split(arguments)) >= len(needed) > 0, usage
        if verb := {"build.sh": "build --output model.engine", "service.sh": "serve"}.get(name):
            cli.parser().parse_args([*verb.split(), *shlex.split(arguments)[1:]])
    assert set(re.findall(r"--for (\S+)", blocks)) <= set(TARGETS)
