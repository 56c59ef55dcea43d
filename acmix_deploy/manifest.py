"""What an engine was built with and for, kept in its sidecar, and whether it fits a machine.

Whoever runs an engine reads this first: TensorRT's own answer to an engine of another machine comes late and is no
sentence. Of an engine that something else built it holds what the engine tells itself, and None for the rest.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from acmix_deploy import driver
from acmix_deploy.artifacts import read_artifact, sha256
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.targets import Precision

KIND = "engine"
"""The kind of artifact that has a manifest as its settings."""

Backend = Literal["tensorrt", "tensorrt_rtx"]
Shape = tuple[int, ...]

TITLES: dict[Backend, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_COMPUTE_CAPABILITY = 75, 76  # CUdevice_attribute, major and minor
_REBUILD = "Build it again on this machine: acmix-deploy build"
_ADOPT = "If TensorRT takes it here all the same: acmix-deploy adopt"


class Machine(BaseModel):
    """TensorRT and the device; None for what is not there or not told."""

    model_config = ConfigDict(frozen=True)

    backend: Backend = Field(description="TensorRT's Python module")
    version: str = Field(description="version of that TensorRT")
    cuda: str | None = Field(default=None, description="newest CUDA that the driver runs")
    driver: str | None = Field(default=None, description="release of the driver")
    gpu: str | None = Field(default=None, description="name of the device")
    sm: int | None = Field(default=None, description="its architecture: 87 stands for sm_87")

    @property
    def tensorrt(self) -> str:
        """``TensorRT 10.3.0``."""
        return f"{TITLES[self.backend]} {_release(self.version)}"

    @property
    def device(self) -> str:
        """``NVIDIA H200 (sm_90)``."""
        return device_title(self.gpu, self.sm)


class Plugin(BaseModel):
    """The plugin library that an engine calls."""

    model_config = ConfigDict(frozen=True)

    path: Path = Field(description="where it was when the engine was built or adopted")
    sha256: str = Field(description="SHA-256 of the file's bytes, hexadecimal")


class EngineTensor(BaseModel):
    """An input or output of an engine."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="name in the ONNX file")
    dtype: str = Field(description="TensorRT's name of the element type, such as FLOAT or HALF")
    shape: Shape = Field(description="sizes; -1 where an axis is free")


class Manifest(BaseModel):
    """Everything that decides what an engine does and where it runs."""

    model_config = ConfigDict(frozen=True)

    origin: Literal["built", "adopted"] = Field(
        default="built",
        description="built by acmix-deploy, or adopted: built by something else and asked as TensorRT deserialised it",
    )
    machine: Machine = Field(description="where it was built or, of another's engine, adopted")
    compute_capabilities: tuple[int, ...] = Field(
        description="architectures that it runs on if it is not for one device alone: 86 stands for sm_86"
    )
    plugin: Plugin | None = Field(description="the library with its custom layers, None where it has none")
    form: str | None = Field(
        description="any, plugin or plain: how the ONNX file spelt the attention; None where that is not known"
    )
    precision: Precision | None = Field(
        description="lowest type that the file, or a flag, allows the engine to compute in; None where it is not known"
    )
    strongly_typed: bool | None = Field(
        description="whether element types come from the ONNX file alone; None where that is not known"
    )
    flags: tuple[str, ...] | None = Field(description="TensorRT's BuilderFlag by name; None where they are not known")
    level: int | None = Field(description="builder optimization level; None where it is not known")
    profiles: dict[str, tuple[Shape, Shape, Shape]] = Field(
        description="smallest, usual and largest shape of each input with free axes"
    )
    inputs: tuple[EngineTensor, ...] = Field(description="inputs of the engine")
    outputs: tuple[EngineTensor, ...] = Field(description="outputs of the engine")
    metadata: ModelMetadata = Field(description="properties of the ONNX file, such as class names and stride")


class HeaderManifest(BaseModel):
    """Of an engine that something else built and that was not deserialised. Where it runs and what it takes is not
    known, so nothing runs it."""

    model_config = ConfigDict(frozen=True)

    origin: Literal["header", "trtexec"] = Field(
        default="header",
        description="header: adopted by what stands at the file's beginning; trtexec: built by that on a device where "
        "this package does not run",
    )
    backend: Backend | None = Field(description="what wrote it, None where that is not known")
    version: str | None = Field(description="release of that, None where it is not known")
    metadata: ModelMetadata = Field(
        description="what Ultralytics wrote before the engine, or of the file that was named"
    )

    @property
    def how(self) -> str:
        """Where it is from, in words."""
        return "adopted by its header alone" if self.origin == "header" else "built by trtexec"

    @property
    def tensorrt(self) -> str:
        """``TensorRT 10.3.0``, as far as it is known."""
        release = _release(self.version) if self.version else "of an unknown release"
        return f"{TITLES[self.backend] if self.backend else 'something'} {release}"


AnyManifest = Manifest | HeaderManifest


def manifest_of(settings: dict[str, Any]) -> AnyManifest:
    """The manifest in an engine's sidecar. Raises ValidationError where it is of another form."""
    form = HeaderManifest if settings.get("origin") in ("header", "trtexec") else Manifest
    return form.model_validate(settings)


def this_machine(backend: Backend) -> Machine:
    """What there is here.

    Raises:
        MissingComponent: the module cannot be imported.
    """
    try:
        version = str(importlib.import_module(backend).__version__)
    except (ImportError, OSError) as error:
        raise MissingComponent(f"{TITLES[backend]} cannot be imported: {error}") from error
    return Machine(backend=backend, version=version, **gpu_here())


def read_manifest(engine: Path) -> Manifest:
    """The manifest of an engine file whose bytes are still those that it was written for.

    Raises:
        UserError: there is no manifest, it is another artifact's, the engine has changed since, or it was never
            asked what it takes.
    """
    manifest = read_any_manifest(engine)
    if isinstance(manifest, HeaderManifest):
        raise UserError(
            f"{engine} was {manifest.how}: it is of {manifest.tensorrt}, and neither what it takes nor "
            "where it runs is known",
            f"On the machine that it fits: acmix-deploy adopt {engine}",
        )
    return manifest


def read_any_manifest(engine: Path) -> AnyManifest:
    """As :func:`read_manifest`, and of an engine that was adopted by its header what that says."""
    artifact = read_artifact(engine)
    if artifact.kind != KIND:
        raise UserError(f"{engine} is no engine: its sidecar says {artifact.kind}")
    try:
        return manifest_of(artifact.settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(f"the manifest of {engine} cannot be read: {place}: {first['msg']}", _REBUILD) from error


def check(manifest: Manifest, machine: Machine, plugin_sha256: str | None = None) -> None:
    """Refuse an engine that was built for something else than there is; looks at nothing but its arguments.

    Args:
        manifest: the engine's.
        machine: where it is to run.
        plugin_sha256: of the plugin library that would be loaded; None where there is none.

    Raises:
        UserError: naming what the engine was built for and what was found.
        MissingComponent: the same, where there is no GPU at all.
    """
    built, how = manifest.machine, manifest.origin
    rebuild = _REBUILD if how == "built" else _ADOPT
    misfit = UserError if machine.gpu else MissingComponent
    way_out = rebuild if machine.gpu else f"Run it on the device that it was {how} for."
    if built.tensorrt != machine.tensorrt:
        raise UserError(f"the engine was {how} with {built.tensorrt}, here is {machine.tensorrt}", rebuild)
    if manifest.compute_capabilities:
        newest = max(manifest.compute_capabilities)
        if machine.sm not in manifest.compute_capabilities and (machine.sm is None or machine.sm < newest):
            known = ", ".join(f"sm_{sm}" for sm in manifest.compute_capabilities)
            raise misfit(f"the engine was {how} for {known} and later, here is {machine.device}", way_out)
    elif (built.gpu, built.sm) != (machine.gpu, machine.sm):
        raise misfit(f"the engine was {how} for {built.device}, here is {machine.device}", way_out)
    if manifest.plugin and manifest.plugin.sha256 != plugin_sha256:
        found = f"the one here has {plugin_sha256[:12]}..." if plugin_sha256 else "there is none here"
        again = "build the engine again" if how == "built" else "adopt the engine again"
        raise UserError(
            f"the engine was {how} with the plugin of SHA-256 {manifest.plugin.sha256[:12]}..., {found}",
            f"Give the plugin that it was {how} with, or {again} with this one.",
        )


def read_fitting(engine: Path, machine: Machine | None = None, plugin: Path | None = None) -> Manifest:
    """:func:`read_manifest`, and :func:`check` it against what is here, the plugin's file included.

    Args:
        engine: the engine file.
        machine: where it is to run; by default :func:`this_machine`, with the engine's own TensorRT.
        plugin: the library to load; where the manifest says, by default.

    Raises:
        UserError: see the two.
        MissingComponent: see :func:`this_machine`.
    """
    manifest = read_manifest(engine)
    machine = machine or this_machine(manifest.machine.backend)
    if manifest.plugin:
        library = plugin or manifest.plugin.path
        check(manifest, machine, sha256(library) if library.is_file() else None)
    else:
        check(manifest, machine)
    return manifest


def device_title(gpu: str | None, sm: int | None) -> str:
    """``NVIDIA H200 (sm_90)``."""
    return f"{gpu} (sm_{sm})" if gpu else "no GPU"


def _release(version: str) -> str:
    """``10.3.0`` of ``10.3.0.26``: engines of builds that differ behind that are the same."""
    return ".".join(version.split(".")[:3])


def gpu_here() -> dict[str, Any]:
    """Those fields of :class:`Machine` that the driver tells of the first device; nothing where there is none."""
    name = ctypes.create_string_buffer(128)
    try:
        device = driver.first_device()
        driver.call("cuDeviceGetName", name, len(name), device)
        major, minor = (
            driver.made(ctypes.c_int, "cuDeviceGetAttribute", attribute, device).value
            for attribute in _COMPUTE_CAPABILITY
        )
        cuda = driver.made(ctypes.c_int, "cuDriverGetVersion").value
    except (OSError, driver.DriverError):
        return {}
    return {
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "driver": _driver_release(),
        "gpu": name.value.decode(),
        "sm": 10 * major + minor,
    }


def _driver_release() -> str | None:
    """``580.65.06`` where the kernel module tells it; a Jetson does not."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found[0] if found else None
