"""What a built plugin holds, asked of the library itself in a process of its own: a crash there ends nothing here."""

from __future__ import annotations

import ctypes.util
import json
import re
import sys
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, Field

from acmix_deploy.errors import CheckFailed, MissingComponent, UserError
from acmix_deploy.files import expect
from acmix_deploy.process import run

_ASK = """
import ctypes, sys
try:
    library = ctypes.CDLL(sys.argv[1])
except OSError as error:
    sys.exit(str(error))
for name in ("acmix_describe", "acmix_creators"):
    function = getattr(library, name, None)
    if function is None:
        sys.exit(f"it has no {name}")
    function.restype = ctypes.c_char_p
    print(function().decode())
"""


class Creator(BaseModel):
    """What TensorRT finds an operator's plugin by."""

    name: str = Field(description="type of the operator")
    version: str = Field(description="plugin_version of the nodes that it takes")
    namespace: str = Field(description="plugin_namespace of the nodes that it takes")
    interface: str = Field(description="TensorRT's interface that the plugin implements")


class Entry(BaseModel):
    """One kernel of the library."""

    operator: str = Field(description="type of the operator")
    dtype: str = Field(description="element type")
    layout: str = Field(description="NCHW or NHWC, TensorRT's LINEAR and HWC8")
    head_dim: int = Field(
        description="largest head_dim that it takes; smaller ones are padded to it; 0 where it has none"
    )
    kernel: str = Field(description="simt or mma, scalar arithmetic or tensor cores")
    min_sm: int = Field(description="oldest architecture that it runs on: 80 stands for sm_80, 0 for any")


class PluginLibrary(BaseModel):
    """A built plugin, as it describes itself."""

    path: Path = Field(description="the library")
    version: str = Field(description="version of acmix-deploy that it was built from")
    sources: str = Field(default="", description="first digits of a digest of its kernels' sources")
    cuda: str = Field(description="CUDA toolkit that it was built with")
    architectures: str = Field(description="what it was compiled for: sm_* is machine code, compute_* PTX")
    tensorrt: str = Field(description="TensorRT whose headers it was built with")
    creators: list[Creator] = Field(description="the operators that it brings to TensorRT")
    entries: list[Entry] = Field(description="its kernels")


def describe(path: Path) -> PluginLibrary:
    """Load a library and ask what it holds.

    Raises:
        UserError: it does not exist, cannot be loaded or is no plugin of acmix-deploy.
        CheckFailed: loading it ended the process, or its answer cannot be read.
        MissingComponent: it does not answer within a minute.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist", "Build it first: acmix-deploy plugin build")
    expect(path, "plugin")
    command = [sys.executable, "-I", "-c", _ASK, str(path.resolve())]
    done = run(command, timeout=60, name=str(path))
    if done.code < 0:
        raise CheckFailed(f"{path} ended the process that loaded it: {done.how}")
    if done.code:
        reason = done.stderr.strip().replace(f"{path.resolve()}: ", "")
        raise UserError(f"{path} is no plugin that loads here: {reason}", "Build it on this machine.")
    try:
        described, created = map(json.loads, done.stdout.splitlines())
        return PluginLibrary.model_validate({"path": path, **described, **created})
    except ValueError as error:
        raise CheckFailed(f"{path} describes itself in words that this version does not understand: {error}") from error


def installed_tensorrt() -> dict[str, int]:
    """Major versions of the TensorRT installations that a program here would load, by where they were found."""
    found = {}
    if library := re.fullmatch(r"libnvinfer\.so\.(\d+)", ctypes.util.find_library("nvinfer") or ""):
        found[library[0]] = int(library[1])
    for package in ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"):
        try:
            found[f"Python package {package}"] = int(metadata.version(package).partition(".")[0])
        except metadata.PackageNotFoundError:
            continue
    return found


def check(path: Path) -> PluginLibrary:
    """:func:`describe` a library and compare it with the TensorRT installed here, if any.

    Raises:
        UserError, CheckFailed: see :func:`describe`.
        MissingComponent: only another major version of TensorRT is installed.
    """
    library = describe(path)
    installed = installed_tensorrt()
    major = int(library.tensorrt.partition(".")[0])
    if installed and major not in installed.values():
        found = ", ".join(f"{version} ({where})" for where, version in installed.items())
        raise MissingComponent(
            f"{path} was built for TensorRT {major}; installed here is {found}",
            "Build it against the headers of the installed one: acmix-deploy plugin build",
        )
    return library
