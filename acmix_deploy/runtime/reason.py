"""Other libraries' errors in one line."""

from __future__ import annotations

import re
import textwrap

# What ONNX Runtime says of itself: the kind of error, and the place in its own source.
_ORT_NOISE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |(?<=Status Message: )/\S+:\d+ .*?\) (?=\w)")
_NO_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient (memory|workspace)|MemoryAllocation", re.IGNORECASE)
_LONGEST = 300


def reason(error: BaseException) -> str:
    """The first telling line of what went wrong at the root of ``error``'s chain of causes, or the error's type."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = (line.strip(" -\t") for line in str(error).splitlines() if "TORCH_LOGS" not in line)
    line = next(filter(None, lines), type(error).__name__)
    return textwrap.shorten(_ORT_NOISE.sub("", line), _LONGEST, placeholder=" ...")


def out_of_memory(said: str) -> bool:
    """Whether TensorRT says that the device has too little memory."""
    return bool(_NO_MEMORY.search(said))
