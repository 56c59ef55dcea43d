"""The libraries for tests on a GPU: kernels and C interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu import device


@pytest.fixture(scope="session")
def library() -> device.DeviceKernels:
    return load(device.library)


@pytest.fixture(scope="session")
def turing_library() -> device.DeviceKernels:
    if device.EMULATED:
        pytest.skip("no driver that compiles PTX: the device is emulated")
    return load(device.turing_library)


def load(build: Callable[[], Path]) -> device.DeviceKernels:
    if device.missing():
        pytest.skip(device.missing())
    return device.DeviceKernels(build())
