"""Other libraries' errors in one line."""

from __future__ import annotations

import re
import sys
import sysconfig
import textwrap
import traceback
from pathlib import Path

# What ONNX Runtime says of itself: the kind of error, and the place in its own source.
_ORT_NOISE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |(?<=Status Message: )/\S+:\d+ .*?\) (?=\w)")
_NO_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient (memory|workspace)|MemoryAllocation", re.IGNORECASE)
_LONGEST = 300


def reason(error: BaseException) -> str:
    """The first telling line of what went wrong at the root of ``error``'s chain of causes, or the error's type."""
    error = _root(error)
    lines = (line.strip(" -\t") for line in str(error).splitlines() if "TORCH_LOGS" not in line)
    line = next(filter(None, lines), type(error).__name__)
    return textwrap.shorten(_ORT_NOISE.sub("", line), _LONGEST, placeholder=" ...")


def raised(error: BaseException) -> str:
    """The type of the error at the root of ``error``'s chain of causes, what it says, and :func:`place` where known."""
    name, said = type(_root(error)).__name__, reason(error)
    where = place(error)
    return f"{name}{f': {said}' if said != name else ''}{f' ({where})' if where else ''}"


def place(error: BaseException) -> str:
    """The last line of other code than PyTorch's, Python's and ours on the way to ``error``'s root, and its function.

    One in no installed package is preferred; empty where no such code took part.
    """
    frames = [frame for frame in traceback.extract_tb(_root(error).__traceback__) if _is_other(frame.filename)]
    frames = [frame for frame in frames if not _is_installed(frame.filename)] or frames
    return f"{frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name}" if frames else ""


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_other(file: str) -> bool:
    packages = (getattr(sys.modules.get(name), "__file__", None) for name in ("acmix_deploy", "torch", "numpy"))
    apart = [Path(package).parent for package in packages if package]
    if not _is_installed(file):
        apart.append(Path(sysconfig.get_path("stdlib")))
    return not file.startswith("<") and not any(Path(file).is_relative_to(folder) for folder in apart)


def _is_installed(file: str) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def out_of_memory(said: str) -> bool:
    """Whether TensorRT says that the device has too little memory."""
    return bool(_NO_MEMORY.search(said))
