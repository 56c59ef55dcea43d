"""Find what the plugin is built with: CUDA, TensorRT's headers, CMake; where not, say what was looked for where."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from acmix_deploy.errors import MissingComponent
from acmix_deploy.process import run

OLDEST_TENSORRT = (8, 5)
OLDEST_CMAKE = (3, 18)
PYPI_CUDA = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
"""The packages that together hold a compiler for CUDA 13 and later; all of one release."""

_CUDA = Path("/usr/local/cuda")
_HEADER_FOLDERS = (".", "include", "include/aarch64-linux-gnu", "include/x86_64-linux-gnu")
_TENSORRT_PLACES = tuple(map(Path, ("/usr", "/usr/local/tensorrt", "/usr/local/TensorRT", "/opt/tensorrt")))


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler that has all it needs."""

    nvcc: Path
    version: str
    """Release, such as ``13.0``."""
    includes: tuple[Path, ...]
    """Folders of the headers."""
    environment: dict[str, str] = field(repr=False)
    """Variables that it has to run with."""
    architectures: tuple[int, ...]
    """What it compiles for; 87 stands for sm_87."""


@dataclass(frozen=True)
class TensorRT:
    """A set of TensorRT headers."""

    include: Path
    version: tuple[int, int, int]

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


def find_cuda() -> Cuda:
    """The CUDA compiler of this machine: of CUDA_HOME, the PATH, /usr/local/cuda or the PyPI packages, in that order.

    Raises:
        MissingComponent: there is none, or the first one lacks a part.
    """
    candidates = _nvcc_candidates()
    nvcc = next((path for path in candidates if path.is_file()), None)
    if nvcc is None:
        raise MissingComponent(
            "nvcc was looked for in CUDA_HOME, on the PATH, in /usr/local/cuda and among the Python packages, and not "
            "found",
            f"Install the CUDA toolkit (part of JetPack), or run: pip install {' '.join(PYPI_CUDA)}",
        )
    # A dry run names the folders that nvcc itself uses, whichever way it was installed.
    settings = _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull)
    # The Python packages have lib where nvcc looks in lib64.
    libraries = [folder.parent / "lib" for folder in _folders(settings, "LIBRARIES") if folder.name == "lib64"]
    release = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    codes = re.findall(r"\bsm_(\d+)\b", _output(nvcc, "--list-gpu-code"))
    cuda = Cuda(
        nvcc=nvcc,
        version=release[1] if release else "unknown",
        includes=tuple(_folders(settings, "INCLUDES") + _folders(settings, "SYSTEM_INCLUDES")),
        environment={**os.environ, "LIBRARY_PATH": _joined(os.environ.get("LIBRARY_PATH"), *libraries)},
        architectures=tuple(sorted(map(int, codes))),
    )
    _try(cuda)
    return cuda


def find_tensorrt(folder: Path | None = None) -> TensorRT:
    """TensorRT's headers in ``folder`` or, without one, where its packages put them.

    Args:
        folder: where TensorRT was unpacked, or its headers themselves.

    Raises:
        MissingComponent: there are none, or they are too old.
    """
    places = [folder] if folder else _TENSORRT_PLACES
    folders = (place / name for place in places for name in _HEADER_FOLDERS)
    include = next((place for place in folders if (place / "NvInferVersion.h").is_file()), None)
    if include is None:
        looked_in = ", ".join(map(str, places))
        raise MissingComponent(
            f"NvInferVersion.h of TensorRT was looked for in {looked_in} and the include folders there, and not found",
            "Give TensorRT's folder with --tensorrt DIR, or install its headers: apt-get install libnvinfer-dev",
        )
    text = (include / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")
    # 10.13 and later define NV_TENSORRT_MAJOR as another macro, which holds the number.
    found = dict(re.findall(r"define\s+(?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)(?:_ENTERPRISE)?\s+(\d+)", text))
    if len(found) != 3:
        raise MissingComponent(f"{include / 'NvInferVersion.h'} does not say which TensorRT it belongs to")
    tensorrt = TensorRT(include.absolute(), (int(found["MAJOR"]), int(found["MINOR"]), int(found["PATCH"])))
    if tensorrt.version < OLDEST_TENSORRT:
        raise MissingComponent(f"the headers in {include} are of TensorRT {tensorrt}; 8.5 or newer is needed")
    return tensorrt


def find_cmake() -> Path:
    """CMake, on the PATH or beside this Python.

    Raises:
        MissingComponent: there is none, it is too old, or there is nothing that it could build with.
    """
    found = shutil.which("cmake", path=_joined(os.environ.get("PATH"), Path(sys.executable).parent))
    if not found:
        raise MissingComponent("cmake was looked for on the PATH and not found", "Run: pip install cmake")
    text = _output(Path(found), "--version")
    version = re.search(r"version (\d+)\.(\d+)", text)
    if not version or (int(version[1]), int(version[2])) < OLDEST_CMAKE:
        raise MissingComponent(
            f"{found} is {text.splitlines()[0]}; 3.18 or newer is needed", "Run: pip install --upgrade cmake"
        )
    for tool in ("make", "c++"):
        if not shutil.which(tool):
            raise MissingComponent(f"{tool} was looked for on the PATH and not found", "apt-get install g++ make")
    return Path(found)


def check_architectures(architectures: Iterable[int], cuda: Cuda) -> None:
    """Raises MissingComponent for an architecture that the CUDA compiler does not know."""
    unknown = [arch for arch in architectures if arch not in cuda.architectures]
    if unknown:
        raise MissingComponent(
            f"{cuda.nvcc} of CUDA {cuda.version} does not know sm_{unknown[0]}; it knows "
            + ", ".join(f"sm_{arch}" for arch in cuda.architectures),
            "Choose another --arch, or a CUDA toolkit of the device's own release.",
        )


def _nvcc_candidates() -> list[Path]:
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    on_path = shutil.which("nvcc")
    packages = importlib.util.find_spec("nvidia")
    folders = packages.submodule_search_locations or [] if packages else []
    return [
        *(home / "bin/nvcc" for home in homes),
        *([Path(on_path)] if on_path else []),
        _CUDA / "bin/nvcc",
        *(path for folder in folders for path in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)),
    ]


def _folders(settings: str, name: str) -> list[Path]:
    """The folders in one setting that a dry run of nvcc prints."""
    line = re.search(rf"^#\$ {name}=(.*)$", settings, re.M)
    return [Path(os.path.normpath(path)) for path in re.findall(r'"(?:-I|-L)?(/[^"]*)"', line[1] if line else "")]


def _try(cuda: Cuda) -> None:
    """Raises MissingComponent where a small kernel does not compile and link, with the compiler's first complaint."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("#include <cuda_fp16.h>\n__global__ void probe(__half* x) { *x = __float2half(1.0f); }\n")
        command: list[str | Path] = [cuda.nvcc, "-shared", "-Xcompiler=-fPIC", source, "-o", source.with_suffix(".so")]
        done = run(command, environment=cuda.environment)
    if done.code:
        lines = (done.stdout + done.stderr).replace(f"{folder}/", "").splitlines() or [done.how]
        reason = next((line for line in lines if re.search("error|cannot|not found", line)), lines[0])
        raise MissingComponent(
            f"{cuda.nvcc} was found and does not work: {reason.strip()}",
            f"Install the whole CUDA toolkit; of the Python packages: pip install {' '.join(PYPI_CUDA)}",
        )


def _joined(*folders: str | Path | None) -> str:
    return os.pathsep.join(str(folder) for folder in folders if folder)


def _output(program: Path, *arguments: str) -> str:
    """What a program prints. Raises MissingComponent where it does not run."""
    done = run([program, *arguments], timeout=60)
    if done.code:
        raise MissingComponent(f"{program} {arguments[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout + done.stderr
