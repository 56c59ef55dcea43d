"""What there is on this machine, and what is wrong with it."""

from __future__ import annotations

import importlib
import importlib.util
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from acmix_deploy import __version__, yolo
from acmix_deploy.checkpoint import load
from acmix_deploy.doctor.diagnosis import Component
from acmix_deploy.errors import AcmixDeployError, MissingComponent, UserError
from acmix_deploy.manifest import TITLES, Backend, gpu_here
from acmix_deploy.plugin.build import NAME
from acmix_deploy.plugin.library import check, installed_tensorrt
from acmix_deploy.plugin.toolchain import find_cmake, find_cuda, find_tensorrt
from acmix_deploy.profile.monitor import Monitor
from acmix_deploy.runtime import hints
from acmix_deploy.runtime.reason import raised, reason
from acmix_deploy.targets import target_of

_PACKAGES = (
    # module, what it is called, what needs it, extra of this package
    ("torch", "PyTorch", "checkpoints", "export"),
    ("onnx", "ONNX", "files", ""),
    ("onnxruntime", "ONNX Runtime", "checks of files", ""),
    ("ultralytics", "Ultralytics", "its checkpoints", "ultralytics"),
)
_REINSTALL = "Install it again for this Python; on a Jetson it comes with JetPack."


def environment(plugin: Path | None = None, root: Path = Path("/")) -> tuple[Component, ...]:
    """Everything on this machine that a stage may need. Takes seconds: packages are imported, nvcc compiles a line.

    Args:
        plugin: the library to look into; by default one of the usual name in the current directory.
        root: where /sys, /proc and /etc are; another folder in tests.
    """
    return (
        Component(name="acmix-deploy", state="ok", found=__version__),
        Component(
            name="Python", state="ok", found=f"{platform.python_version()}, {platform.machine()}, {sys.executable}"
        ),
        *(_package(*package) for package in _PACKAGES),
        *_tensorrt(),
        _tool("TensorRT headers", "the plugin cannot be compiled", lambda: str(find_tensorrt())),
        _tool("CUDA compiler", "the plugin cannot be compiled", _cuda_compiler),
        _tool("CMake", "the plugin cannot be compiled", lambda: str(find_cmake())),
        _gpu(),
        _plugin(plugin),
        *_machine(root),
    )


def _package(module: str, title: str, purpose: str, extra: str) -> Component:
    install = f"pip install 'acmix-deploy[{extra}]'" if extra else "pip install --force-reinstall acmix-deploy"
    if importlib.util.find_spec(module) is None:
        return Component(
            name=title, state="missing", found=f"not installed; {purpose} need it", advice=f"Run: {install}"
        )
    try:
        package: Any = importlib.import_module(module)
    except Exception as error:  # what a broken installation raises
        return Component(
            name=title, state="fault", found=f"installed and cannot be imported: {reason(error)}", advice=install
        )
    found = str(package.__version__)
    if module == "torch":
        found += f", built for CUDA {package.version.cuda}" if package.version.cuda else ", for the CPU"
    if module == "onnxruntime":
        names = (name.removesuffix("ExecutionProvider") for name in package.get_available_providers())
        found += f", {', '.join(names)}"
    if module == "ultralytics" and "torch" in sys.modules and (problem := _ultralytics_problem()):
        return Component(
            name=title,
            state="fault",
            found=f"{found}, and a checkpoint that it makes does not load: {problem}",
            advice=hints.OTHER_ULTRALYTICS,
        )
    return Component(name=title, state="ok", found=found)


def _ultralytics_problem() -> str:
    """What goes wrong with the least checkpoint that it makes, on the way to an export; empty where nothing does."""
    import torch

    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "smallest.pt")
            torch.save({"model": yolo.smallest()}, path)
            loaded: Any = load(path).module
        with torch.no_grad():
            yolo.prepare_for_export(loaded)(torch.zeros(1, 3, 64, 64))
    except AcmixDeployError as error:
        return error.message
    except Exception as error:  # whatever another release of it raises
        return raised(error)
    return ""


def _tensorrt() -> Iterator[Component]:
    """TensorRT, and TensorRT-RTX where it is."""
    for name in get_args(Backend):
        title = TITLES[name]
        if importlib.util.find_spec(name) is None:
            if name == "tensorrt":
                libraries = ", ".join(installed_tensorrt())
                yield Component(
                    name=title,
                    state="missing",
                    found=f"{f'{libraries}, but ' if libraries else ''}not for this Python; engines need it",
                    advice=hints.NO_TENSORRT,
                )
            continue
        try:
            version = str(importlib.import_module(name).__version__)
            if name == "tensorrt":
                major, minor = version.split(".")[:2]
                target_of((int(major), int(minor)))
        except UserError as error:
            yield Component(name=title, state="fault", found=error.message, advice=error.hint)
        except Exception as error:  # what a broken installation raises
            yield Component(name=title, state="fault", found=f"cannot be imported: {reason(error)}", advice=_REINSTALL)
        else:
            yield Component(name=title, state="ok", found=version)


def _cuda_compiler() -> str:
    cuda = find_cuda()
    return f"{cuda.version}, {cuda.nvcc}"


def _tool(name: str, without: str, find: Callable[[], str]) -> Component:
    try:
        return Component(name=name, state="ok", found=find())
    except MissingComponent as error:
        return Component(name=name, state="missing", found=f"{error.message}; {without}", advice=error.hint)


def _gpu() -> Component:
    device = gpu_here()
    if not device:
        return Component(name="GPU", state="missing", found="none that CUDA's driver knows; engines need one to run")
    driver = f", driver {device['driver']}" if device["driver"] else ""
    return Component(
        name="GPU", state="ok", found=f"{device['gpu']} (sm_{device['sm']}), CUDA {device['cuda']} at most{driver}"
    )


def _plugin(plugin: Path | None) -> Component:
    path = plugin or Path(NAME)
    if not plugin and not path.is_file():
        return Component(
            name="plugin",
            state="missing",
            found=f"no {NAME} in this folder; without it engines spell attention in standard layers",
            advice="Name it with --plugin, or run: acmix-deploy plugin build",
        )
    try:
        library = check(path)
    except AcmixDeployError as error:
        return Component(name="plugin", state="fault", found=error.message, advice=error.hint)
    found = f"{path}: version {library.version}, TensorRT {library.tensorrt}, CUDA {library.cuda}"
    if library.version != __version__:
        return Component(name="plugin", state="fault", found=found, advice="Build it again: acmix-deploy plugin build")
    return Component(name="plugin", state="ok", found=f"{found}, {library.architectures}")


def _machine(root: Path) -> Iterator[Component]:
    """A Jetson's model, release and mode; clocks and temperature of any GPU that tells them."""
    model = _text(root / "proc/device-tree/model")
    jetson = model is not None and ("jetson" in model.lower() or (root / "etc/nv_tegra_release").exists())
    if jetson:
        release = re.search(r"R(\d+).*?REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release") or "")
        linux = f", Jetson Linux {release[1]}.{release[2]}" if release else ""
        yield Component(name="Jetson", state="ok", found=f"{model}{linux}")
    told = Monitor(root).read()
    if told.power_mode:
        yield Component(name="nvpmodel" if jetson else "power limit", state="ok", found=told.power_mode)
    elif jetson:
        yield Component(name="nvpmodel", state="missing", found="it does not tell its mode", advice="sudo nvpmodel -q")
    clocks = [
        f"{title} {value:.0f} MHz" for title, value in (("GPU", told.gpu_mhz), ("memory", told.memory_mhz)) if value
    ]
    if told.temperature_c is not None:
        clocks.append(f"{told.temperature_c:.0f} degrees Celsius")
    if told.throttling:
        yield Component(
            name="clocks",
            state="fault",
            found=", ".join([*clocks, f"held down by {' and '.join(told.throttling)}"]),
            advice="Cool it, or choose another power mode; figures that are measured now are too slow.",
        )
    elif clocks:
        yield Component(name="clocks", state="ok", found=", ".join(clocks))


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return None
