"""What tests of TensorRT need and may not find: headers, a compiler, TensorRT-RTX, built plugins. Skips name it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from acmix_deploy.errors import MissingComponent
from acmix_deploy.plugin.toolchain import find_cuda, find_tensorrt


def header_sets() -> list[Path]:
    folder = os.environ.get("ACMIX_TENSORRT_HEADERS")
    return sorted(path.parent for path in Path(folder).glob("*/NvInfer.h")) if folder else []


def newest_headers(major: int) -> Path:
    of_major = {t.version: t.include for t in map(find_tensorrt, header_sets()) if t.version[0] == major}
    if not of_major:
        pytest.skip(f"no headers of TensorRT {major}: name a folder of header sets in ACMIX_TENSORRT_HEADERS")
    return of_major[max(of_major)]


def run(command: list[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def cuda():
    try:
        return find_cuda()
    except MissingComponent as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def libraries(cuda, tmp_path_factory):
    """Built on demand: the plugin for the newest headers of a major version."""
    from acmix_deploy.plugin.build import build  # here, since a machine for GPU tests may lack what it imports

    built: dict[int, Path] = {}

    def library(major: int) -> Path:
        if major not in built:
            headers = newest_headers(major)
            folder = tmp_path_factory.mktemp(f"tensorrt{major}")
            try:
                built[major] = build(folder, tensorrt=headers, architectures=[cuda.architectures[-1]]).path
            except MissingComponent as error:
                pytest.skip(str(error))
        return built[major]

    return library


def rtx_libraries() -> Path:
    """The folder of TensorRT-RTX's libraries; its Python module is beside it."""
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("no TensorRT-RTX: pip install tensorrt-rtx-cu13")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def rtx(tmp_path_factory):
    """Run tensorrt_rtx_plugin.py: what it answers, and what was printed on stderr."""
    libraries = rtx_libraries()
    links = tmp_path_factory.mktemp("rtx")
    # The ONNX parser asks for the library by this name, which the package does not have.
    (links / "libtensorrt_rtx.so").symlink_to(libraries / "libtensorrt_rtx.so.1")

    def answer(*arguments: object) -> tuple[Any, str]:
        environment = {**os.environ, "LD_LIBRARY_PATH": f"{links}:{libraries}"}
        done = run(
            [sys.executable, Path(__file__).with_name("tensorrt_rtx_plugin.py"), *map(str, arguments)], env=environment
        )
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return answer
