"""The libraries for tests on a GPU: kernels and C interface."""

from __future__ import annotations

import pytest

from tests.gpu import device
from tests.plugin import kernels


@pytest.fixture(scope="session")
def library() -> device.DeviceKernels:
    return load("libacmix_test.so")


@pytest.fixture(scope="session")
def turing_library() -> device.DeviceKernels:
    """The code for sm_75, as PTX that the driver compiles for this GPU."""
    return load("libacmix_test_75.so", "compute_75")


def load(name: str, architecture: str | None = None) -> device.DeviceKernels:
    if device.missing():
        pytest.skip(device.missing())
    path = device.build(name, kernels.SOURCES, architecture=architecture)
    return device.DeviceKernels(path)
