"""Compile the plugin for this machine, or for the headers and architectures that are asked for."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from acmix_deploy import __version__
from acmix_deploy.artifacts import replacing
from acmix_deploy.errors import CheckFailed
from acmix_deploy.plugin.library import PluginLibrary, check, describe
from acmix_deploy.plugin.toolchain import check_architectures, find_cmake, find_cuda, find_tensorrt
from acmix_deploy.process import run

SOURCES = Path(__file__).parent / "native"
"""The CMake project: the folder ``plugins`` of the repository."""

NAME = "libacmix_plugin.so"

_MEMORY_OF_A_COMPILER = 2 << 30  # bytes, generously


def build(
    folder: Path,
    *,
    tensorrt: Path | None = None,
    architectures: Sequence[int] = (),
    progress: Callable[[str], None] = lambda step: None,
) -> PluginLibrary:
    """Configure, compile and describe the plugin.

    Args:
        folder: where ``libacmix_plugin.so`` goes; made where it is missing.
        tensorrt: folder of TensorRT or of its headers; None to look for them.
        architectures: what to compile for, 87 for sm_87; none for the devices of this machine or, where there are
            none, all that are supported.
        progress: called with what is being done.

    Returns:
        What the library says of itself; its ``path`` is that of the file.

    Raises:
        MissingComponent: CUDA, TensorRT's headers, CMake or a compiler is missing, or an architecture is unknown.
        CheckFailed: it does not compile, or the library that was built is not what was asked for.
        UserError: ``folder`` cannot be written to.
    """
    cuda, headers, cmake = find_cuda(), find_tensorrt(tensorrt), find_cmake()
    check_architectures(architectures, cuda)
    with replacing(folder / NAME) as finished, tempfile.TemporaryDirectory() as temporary:
        progress(f"configuring for TensorRT {headers} with CUDA {cuda.version}")
        settings = {
            "CMAKE_CUDA_COMPILER": cuda.nvcc,
            "CMAKE_CUDA_ARCHITECTURES": ";".join(map(str, architectures)),
            "ACMIX_TENSORRT": headers.include,
            "ACMIX_VERSION": __version__,
        }
        options = [f"-D{name}={value}" for name, value in settings.items() if value]
        _run([cmake, "-S", SOURCES, "-B", temporary, *options], cuda.environment)

        def show(line: str) -> None:
            if percent := re.match(r"\[ *(\d+%)\] Building", line):
                progress(f"compiling, {percent[1]}")

        _run([cmake, "--build", temporary, "--parallel", str(_jobs())], cuda.environment, show)
        library = describe(Path(temporary, NAME))
        finished.write_bytes(Path(temporary, NAME).read_bytes())
        finished.chmod(0o755)
    return library.model_copy(update={"path": folder / NAME})


def library_in(folder: Path, progress: Callable[[str], None] = lambda step: None) -> Path:
    """The plugin of this version in a folder, compiled where there is none. Raises what :func:`build` does."""
    library = folder / NAME
    if not library.is_file() or check(library).version != __version__:
        build(folder, progress=progress)
    return library


def _run(
    command: Sequence[str | Path], environment: Mapping[str, str], show: Callable[[str], None] = lambda line: None
) -> None:
    """Run a command and pass on each line that it prints; it ends when this is interrupted.

    Raises:
        CheckFailed: it failed; says what it printed from the first error on.
    """
    done = run(command, environment=environment, each_line=show)
    if done.code:
        lines = (done.stdout + done.stderr).splitlines(keepends=True)
        first = next((index for index, line in enumerate(lines) if re.search(r"\berror\b", line, re.I)), -20)
        raise CheckFailed(f"the plugin does not compile:\n{''.join(lines[first:][:40]).rstrip()}")


def _jobs() -> int:
    """Compilers at a time: one a core, as far as the memory goes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // _MEMORY_OF_A_COMPILER))
