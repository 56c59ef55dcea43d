"""CUDA's driver, by calls that every release has which runs an engine: the machine needs no other part of CUDA."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, TypeVar

Result = TypeVar("Result")

OUT_OF_MEMORY = 2


class DriverError(Exception):
    """A call that failed: which, and what the driver says of it. ``status`` is its CUresult."""

    def __init__(self, call: str, status: int) -> None:
        super().__init__(f"{call} failed: {_text('cuGetErrorString', status)} ({_text('cuGetErrorName', status)})")
        self.status = status


@functools.cache
def library() -> Any:
    """The driver. Raises OSError: there is none."""
    return ctypes.CDLL("libcuda.so.1")


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver. Numbers are passed as C's int; all else as an object of ctypes.

    Raises:
        DriverError: it fails.
        OSError: there is no driver.
    """
    if status := getattr(library(), name)(*arguments):
        raise DriverError(name, status)


def made(kind: type[Result], name: str, *arguments: Any) -> Result:
    """What a function writes to its first argument, a pointer. Raises what :func:`call` does."""
    result: Any = kind()
    call(name, ctypes.byref(result), *arguments)
    return result  # type: ignore[no-any-return]


def first_device() -> ctypes.c_int:
    """The first device. Raises what :func:`call` does, also where there is none."""
    call("cuInit", 0)
    return made(ctypes.c_int, "cuDeviceGet", 0)


def _text(name: str, status: int) -> str:
    text = ctypes.c_char_p()
    getattr(library(), name)(status, ctypes.byref(text))
    return (text.value or b"unknown").decode()
