"""Devices for tests, as `ssh bench` reaches them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from acmix_deploy import __version__
from acmix_deploy.artifacts import sha256
from acmix_deploy.cli import main
from acmix_deploy.device.wheel import write_wheel
from tests.device.loopback import Device, device


@pytest.fixture
def bench(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A new device, which `ssh bench` reaches here; no device has a name yet."""
    with device(tmp_path_factory.mktemp("device") / "root") as made:
        use(made, monkeypatch)
        yield made


def use(made: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `ssh bench` reach a device, and keep names of devices in its folder."""
    monkeypatch.setenv("PATH", f"{made.client}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(made.root / "config"))


@pytest.fixture(scope="session")
def this_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel."""
    path = tmp_path_factory.mktemp("wheel") / "this.whl"
    write_wheel(path)
    return path


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """A device on which the package was installed, into a folder with a space. Nothing is downloaded."""
    with device(tmp_path_factory.mktemp("device") / "root") as made, pytest.MonkeyPatch.context() as patch:
        made.set(PIP_NO_INDEX="1")
        use(made, patch)
        assert main(["device", "add", "bench", "--folder", "a folder", "--install"]) == 0
        yield made


def stand_in(bench: Device, this_wheel: Path, verb: str) -> None:
    """Have a device without TensorRT, whose package is a script of sh in place of every verb."""
    folder = bench.home / "acmix-deploy"
    (folder / "venv/bin").mkdir(parents=True, exist_ok=True)
    (folder / "venv/bin/python").write_text(f'#!/bin/sh\n[ "$1" != -c ] || exit 1\n{verb}\n')
    (folder / "venv/bin/python").chmod(0o755)
    (folder / ".acmix-deploy").touch()
    (folder / "installed.json").write_text(json.dumps({"version": __version__, "wheel": sha256(this_wheel)}))
