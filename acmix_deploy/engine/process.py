"""Drives :mod:`acmix_deploy.engine.backend` in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from acmix_deploy.errors import CheckFailed, MissingComponent
from acmix_deploy.manifest import TITLES, Backend
from acmix_deploy.process import importing_here, run

_SAID_BY_PLUGIN = "acmix: "


def find_backend(wanted: Backend | None = None) -> Backend:
    """The TensorRT that can be imported, TensorRT before TensorRT-RTX; imports neither.

    Raises:
        MissingComponent: there is none, or not the one that is wanted.
    """
    choices: tuple[Backend, ...] = (wanted,) if wanted else get_args(Backend)
    found = next((name for name in choices if importlib.util.find_spec(name)), None)
    if found is None:
        raise MissingComponent(
            f"no {' and no '.join(TITLES[name] for name in choices)} for {sys.executable}",
            "On a Jetson TensorRT comes with JetPack: make the environment with --system-site-packages. Elsewhere: "
            "pip install tensorrt, or without a GPU pip install 'acmix-deploy[rtx]'",
        )
    return found


def ask(request: Mapping[str, Any], progress: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Let the backend answer a request; its process ends when this is interrupted.

    Returns:
        The answer (see :func:`acmix_deploy.engine.backend.build` and ``describe``), and what the plugin library said on
        stderr.

    Raises:
        CheckFailed: the process crashed.
        MissingComponent: the system ended it, as it does when memory runs out.
    """
    answer: dict[str, Any] | None = None

    def hear(line: str) -> None:
        nonlocal answer
        message = json.loads(line)
        answer = message.get("answer")
        if "progress" in message:
            progress(message["progress"])

    command = [sys.executable, str(Path(__file__).with_name("backend.py"))]
    with _environment(request["module"]) as environment:
        done = run(command, json.dumps(request), environment=environment, each_line=hear)
    title = TITLES[request["module"]]
    work = "build" if "onnx" in request else "reading of the engine"
    if done.killed:
        raise MissingComponent(
            f"the system ended the {work} with {title}, as it does when memory runs out",
            "Close other programs" + (", or build for a smaller --max." if "onnx" in request else "."),
        )
    if answer is None:
        raise CheckFailed(f"{title} ended in the middle of the {work} ({done.how}): {done.last_words}")
    said = done.stderr.splitlines()
    notes = [line.partition(_SAID_BY_PLUGIN)[2] for line in said if line.startswith(_SAID_BY_PLUGIN)]
    return answer, "; ".join(notes)


@contextmanager
def _environment(backend: Backend) -> Iterator[dict[str, str]]:
    """Variables that let the process import what this one can, and TensorRT-RTX's parser find its library.

    The parser asks for ``libtensorrt_rtx.so``; the package holds ``libtensorrt_rtx.so.1`` alone.
    """
    environment = importing_here()
    spec = importlib.util.find_spec("tensorrt_rtx_libs") if backend == "tensorrt_rtx" else None
    if spec is None or not spec.submodule_search_locations:
        yield environment
        return
    libraries = Path(spec.submodule_search_locations[0])
    with tempfile.TemporaryDirectory() as folder:
        for library in libraries.glob("libtensorrt_rtx.so.*"):
            Path(folder, "libtensorrt_rtx.so").symlink_to(library)
        searched = (folder, libraries, os.environ.get("LD_LIBRARY_PATH"))
        yield {**environment, "LD_LIBRARY_PATH": os.pathsep.join(str(path) for path in searched if path)}
