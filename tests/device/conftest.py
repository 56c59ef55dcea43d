"""Devices for tests, as `ssh bench` reaches them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.device.loopback import Device, device


@pytest.fixture
def bench(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A new device, which `ssh bench` reaches here; no device has a name yet."""
    with device(tmp_path_factory.mktemp("device") / "root") as made:
        monkeypatch.setenv("PATH", f"{made.client}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(made.root / "config"))
        yield made
