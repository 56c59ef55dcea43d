"""What is used of torch.cuda, for an emulated device: a call has ended when it returns, and the clock is the host's."""

from __future__ import annotations

import time
from types import SimpleNamespace


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.seconds - self.seconds)


def synchronize() -> None:
    pass


def current_stream() -> SimpleNamespace:
    return SimpleNamespace(cuda_stream=0)


def get_device_properties(device: int) -> SimpleNamespace:
    return SimpleNamespace(name="emulated", L2_cache_size=1 << 16, multi_processor_count=1)
