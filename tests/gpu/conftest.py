"""One library for all tests on a GPU: kernels, C interface and reference."""

from __future__ import annotations

import device
import kernels
import pytest


@pytest.fixture(scope="session")
def library() -> device.DeviceKernels:
    if device.missing():
        pytest.skip(device.missing())
    return device.DeviceKernels(device.build("libacmix_test.so", [*kernels.SOURCES, device.REFERENCE]))
