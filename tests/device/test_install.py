"""What is sent to be installed: the wheel of this package, and by `--offline` what it needs there."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest

from acmix_deploy import __version__
from acmix_deploy.cli import main
from acmix_deploy.device import install, remote
from acmix_deploy.device.install import _lacking, _platform, download
from acmix_deploy.device.session import DeviceSession, Facts
from acmix_deploy.device.wheel import NAME, write_wheel
from acmix_deploy.errors import MissingComponent
from acmix_deploy.process import Ended
from tests import ROOT
from tests.device.loopback import Device

JETSON = Facts(
    folder="/home/me/acmix-deploy",
    python="3.10.12",
    machine="aarch64",
    libc="glibc 2.35",
    boot="",
    time=0,
    free=0,
    jetson="",
    release="",
    tensorrt=None,
    cuda=None,
    used={},
    tools={},
)


# ---------------------------------------------------------------------------------------------------------------------
# The wheel


def test_the_wheel_is_the_same_each_time(tmp_path, this_wheel):
    write_wheel(tmp_path / NAME)
    assert (tmp_path / NAME).read_bytes() == this_wheel.read_bytes()


def test_what_is_in_the_wheel(this_wheel):
    with zipfile.ZipFile(this_wheel) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        content = {name: archive.read(name) for name in names}
    assert len(names) == len({*names})
    listed = git_files("acmix_deploy") + [
        f"acmix_deploy/plugin/native/{name.removeprefix('plugins/')}" for name in git_files("plugins")
    ]
    kept = [name for name in listed if not Path(name).name.startswith(".") and (ROOT / name).is_file()]
    kept = [name for name in kept if not (ROOT / name).is_symlink()]
    assert {*kept} <= {*names}
    assert "acmix_deploy/device/jetson/install.sh" in names
    assert not [name for name in names if name.endswith(".pyc") or ".." in name or name.startswith("/")]
    (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
    rows = [line.rsplit(",", 2) for line in content[record].decode().splitlines()]
    assert sorted(name for name, _, _ in rows) == sorted(names)
    for name, digest, size in rows:
        if name != record:
            told = base64.urlsafe_b64encode(hashlib.sha256(content[name]).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={told}", len(content[name]))


def git_files(folder: str) -> list[str]:
    done = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no git, or no repository")
    return done.stdout.splitlines()


def test_pip_takes_the_wheel(tmp_path, this_wheel):
    wheel = tmp_path / NAME
    wheel.write_bytes(this_wheel.read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--no-compile", "--target", tmp_path / "packages", wheel], check=True, timeout=120)
    assert (tmp_path / "packages/acmix_deploy/plugin/native/CMakeLists.txt").is_file()
    assert (tmp_path / "packages/bin/acmix-deploy").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Without a network there


def wheel(folder: Path, name: str, *needs: str) -> None:
    """A wheel that needs something and holds nothing."""
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl", "w") as archive:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", *(f"Requires-Dist: {need}" for need in needs)]
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n\nRequires-Dist: not-this\n")


def lacking(folder: Path, facts: Facts = JETSON) -> list[str]:
    return sorted({str(requirement) for requirement in _lacking(folder, facts)})


def test_what_is_lacking_is_told_by_the_device(tmp_path):
    """Conditions are those of its Python and machine, not of those here."""
    wheel(
        tmp_path,
        "acmix-deploy",
        "there",
        'older>=1; python_version < "3.11"',
        'newer; python_version >= "3.11"',
        'arm; platform_machine == "aarch64"',
        'intel; platform_machine == "x86_64"',
        'windows; sys_platform == "win32"',
        'served[all]; extra == "serve"',
        'exported; extra == "export"',
        'full; python_full_version >= "3.10.12"',
    )
    wheel(tmp_path, "there", "Deep.Er_one", "acmix-deploy")  # a circle
    wheel(tmp_path, "served", 'of-served; extra == "all"', 'not-asked; extra == "none"')
    assert lacking(tmp_path) == ["Deep.Er_one", "arm", "full", "of-served", "older>=1"]
    newer = JETSON.model_copy(update={"python": "3.12.3", "machine": "x86_64"})
    assert lacking(tmp_path, newer) == ["Deep.Er_one", "full", "intel", "newer", "of-served"]
    for name in ("deep-er-one", "arm", "full", "of-served", "older"):
        wheel(tmp_path, name)
    assert lacking(tmp_path) == []


def test_tags_of_the_device(tmp_path):
    """As pip itself names what runs on Ubuntu 22.04 of a Jetson."""
    words = _platform(JETSON)
    platforms = [word for flag, word in pairwise(words) if flag == "--platform"]
    assert platforms[0] == "manylinux_2_35_aarch64"
    assert {"manylinux_2_17_aarch64", "manylinux2014_aarch64", "linux_aarch64"} < {*platforms}
    assert not {"manylinux_2_36_aarch64", "manylinux_2_16_aarch64"} & {*platforms}
    assert [words[words.index(flag) + 1] for flag in ("--python-version", "--abi", "--implementation")] == [
        "310",
        "cp310",
        "cp",
    ]
    assert "manylinux_2_17_aarch64" in _platform(JETSON.model_copy(update={"libc": " "}))


def test_download_asks_again_for_what_is_lacking(tmp_path, monkeypatch):
    asked = []

    def pip(command, **_):
        place = command.index("--dest")
        folder, wanted = command[place + 1], command[place + 2 :]
        asked.append(wanted)
        if len(asked) == 1:
            wheel(Path(folder), "acmix-deploy", 'tomli; python_version < "3.11"', "numpy")
            wheel(Path(folder), "numpy")
        else:
            wheel(Path(folder), "tomli")
        return Ended(0, "", "")

    monkeypatch.setattr(install, "run", pip)
    download(tmp_path / "this.whl", JETSON, tmp_path)
    assert asked == [[f"{tmp_path}/this.whl[serve,tensorrt]"], ["tomli"]]
    monkeypatch.setattr(install, "run", lambda command, **_: Ended(1, "", "ERROR: No matching distribution for onnx"))
    with pytest.raises(MissingComponent, match=r"no wheels for aarch64: ERROR: No matching distribution for onnx"):
        download(tmp_path / "this.whl", JETSON, tmp_path)


def test_offline(bench: Device, tmp_path, monkeypatch, capsys):
    """What was downloaded goes there, and pip there asks nobody else."""
    log = bench.home / "pip.log"
    bench.program(
        "python3",
        f"""#!/bin/sh
        if [ "$1" = -m ]; then
            for folder; do :; done
            mkdir -p "$folder/bin"
            printf '#!/bin/sh\\necho "$@" >> {log}; ls wheels >> {log}\\n' > "$folder/bin/python"
            chmod +x "$folder/bin/python"
            exit
        fi
        exec {sys.executable} "$@"
    """,
    )
    monkeypatch.setattr(install, "download", lambda this, facts, folder: wheel(folder, "needed"))
    capsys.readouterr()
    assert main(["device", "add", "bench", "--install", "--offline"]) == 0, capsys.readouterr().err
    told = log.read_text()
    assert "pip install --disable-pip-version-check --no-index --find-links wheels wheels/acmix_deploy-" in told
    assert "needed-1.0-py3-none-any.whl" in told
    assert json.loads((bench.home / "acmix-deploy/installed.json").read_text())["version"] == __version__
    assert bench.left() == []


def test_offline_without_install(bench, capsys):
    assert main(["device", "add", "bench", "--offline"]) == 2
    assert "Add --install." in capsys.readouterr().err
    assert bench.calls() == []


def test_no_pip_there(bench, capsys):
    """As on Debian without python3-pip and python3-venv."""
    (packages,) = bench.home.glob(".local/lib/python*/site-packages")
    (packages / "none.pth").write_text("import sys; sys.modules['pip'] = sys.modules['ensurepip'] = None\n")
    assert main(["device", "add", "bench", "--install"]) == 3
    error, hint = capsys.readouterr().err.split("error: ")[1].splitlines()[:2]
    assert error.startswith("the package cannot be installed on bench: ")
    assert error.endswith("there is no pip; install it: sudo apt-get install python3-pip python3-venv")
    assert hint
    assert not (bench.home / "acmix-deploy/installed.json").exists()
    assert main(["device", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == []


def test_python_that_is_too_old(bench, tmp_path, capsys):
    """JetPack 5 has 3.8, in which what is sent there runs."""
    bench.old_python()
    assert main(["device", "add", "bench", "--install"]) == 3
    error = capsys.readouterr().err.split("error: ")[1].splitlines()[0]
    assert "bench has Python 3.8." in error
    assert "3.10" in error
    (tmp_path / "in").write_text("there")
    with DeviceSession("bench") as session:
        done = session.run(
            "a test", [["cp", "in", "out"]], files={"in": tmp_path / "in"}, writes={"out": tmp_path / "out"}
        )
    assert (done.code, (tmp_path / "out").read_text()) == (0, "there")
    assert bench.left() == []


# ---------------------------------------------------------------------------------------------------------------------
# What runs there in its own Python


def test_remote_is_python_of_jetpack_5():
    source = Path(remote.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {str(node.module).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names
