"""The package as a Jetson gets it, on Debian for aarch64 under qemu-user (``python -m scripts.aarch64``).

Not here: a GPU and its driver, TensorRT's libraries, JetPack's packages and sensors, and times that mean anything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from acmix_deploy.device import wheel
from acmix_deploy.errors import MissingComponent
from acmix_deploy.plugin.build import SOURCES
from acmix_deploy.plugin.toolchain import PYPI_CUDA
from scripts import aarch64, shapes
from scripts.instructions import find_tool
from scripts.resources import Resources, read_table, readable
from tests.plugin.parts import run
from tests.plugin.test_kernel_resources import regressions

pytestmark = pytest.mark.soak

INSTALL = Path(wheel.__file__).parent / "jetson/install.sh"
FOLDER = "/opt/acmix-deploy"
KERNELS = "reassembly_simt"
"""Those of the smallest source file: under emulation all of them take too long."""
PIP = ("--no-index", "--find-links", "/wheels")


class Board:
    """The root, and a folder for files, which it sees as /work."""

    def __init__(self, root: Path) -> None:
        self.root, self.prefix = root, aarch64.enter(root)
        self.work = root / "work"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()

    def run(self, *command: str | Path) -> str:
        done = aarch64.run(self.prefix, *command, timeout=7200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def acmix(self, *arguments: str | Path) -> str:
        return self.run(f"{FOLDER}/venv/bin/acmix-deploy", *arguments)


@pytest.fixture(scope="module")
def board() -> Board:
    """With the package, installed from a wheel as `device add --install --offline` does it."""
    if not (folder := os.environ.get("ACMIX_AARCH64")):
        pytest.skip("no Debian for aarch64: python -m scripts.aarch64 ROOT, and name ROOT in ACMIX_AARCH64")
    try:
        made = Board(Path(folder).absolute())
    except MissingComponent as error:
        pytest.skip(str(error))
    shutil.rmtree(made.root / FOLDER[1:], ignore_errors=True)
    wheel.write_wheel(made.work / wheel.NAME)
    shutil.copy(INSTALL, made.work)
    made.run("bash", "/work/install.sh", FOLDER, f"/work/{wheel.NAME}", *PIP)
    return made


@pytest.fixture(scope="module")
def detector(board, shapes_model) -> Path:
    """The trained detector for images of 160x160 pixels, and images of shapes."""
    shutil.copy(shapes_model, board.work)
    shapes.write(board.work / "shapes", seed=2, count=4)
    return board.work / shapes_model.name


def here(*arguments: str | Path) -> str:
    """What a verb prints on this machine."""
    command = [sys.executable, "-m", "acmix_deploy.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_doctor(board):
    found = {row["name"]: row for row in json.loads(board.acmix("doctor", "--json"))["environment"]}
    assert found["Python"]["found"].startswith(f"{aarch64.FACTS.python}, aarch64, {FOLDER}/venv/bin/python")
    assert {name for name, row in found.items() if row["state"] == "ok"} >= {"acmix-deploy", "ONNX", "ONNX Runtime"}
    assert {row["state"] for row in found.values()} <= {"ok", "missing"}


def test_detections(board, detector):
    """Those of this machine."""

    def read(printed: str) -> list[dict[str, Any]]:
        return [found for line in printed.splitlines() for found in json.loads(line)["detections"]]

    there = read(board.acmix("detect", f"/work/{detector.name}", "/work/shapes/images", "--json"))
    expected = read(here("detect", detector, board.work / "shapes/images", "--json"))
    assert len(expected) > 10
    assert [found["name"] for found in there] == [found["name"] for found in expected]
    for found, same in zip(there, expected, strict=True):
        assert found["score"] == pytest.approx(same["score"], abs=1e-4)
        assert found["box"] == pytest.approx(same["box"], abs=0.05)


def test_inspect_profile_and_gate(board, detector):
    """They work; of an emulated CPU the times say nothing."""
    model = f"/work/{detector.name}"
    board.acmix("inspect", model)
    board.acmix("profile", model, "--samples", "2", "--seconds", "1", "--threads", "1")
    board.acmix(
        "gate",
        "run",
        "--candidate",
        model,
        "--rounds",
        "1",
        "--samples",
        "2",
        "--threads",
        "1",
        "-o",
        "/work/gate.json",
    )
    assert json.loads((board.work / "gate.json").read_text())


def test_kernels(board):
    """One operator, compiled for an Orin by an nvcc for aarch64: its kernels are those of the table."""
    release, table = read_table()
    board.run(f"{FOLDER}/venv/bin/python", "-m", "pip", "install", *PIP, *PYPI_CUDA)
    found = {row["name"]: row for row in json.loads(board.acmix("doctor", "--json"))["environment"]}
    compiler = found["CUDA compiler"]
    assert (compiler["state"], found["CMake"]["state"]) == ("ok", "ok")
    assert release in compiler["found"]
    (nvcc,) = board.root.glob(f"{FOLDER[1:]}/venv/lib/python3*/site-packages/nvidia/cu*/bin/nvcc")
    shutil.copytree(SOURCES, board.work / "native")
    options = ["-arch=sm_87", "-std=c++17", "-Xcompiler=-fPIC", "-I/work/native/include"]
    source = f"/work/native/src/{KERNELS}.cu"
    board.run(f"/{nvcc.relative_to(board.root)}", *options, "-c", source, "-o", "/work/kernels.o")
    made = board.work / "kernels.o"
    (machine,) = struct.unpack_from("<H", made.read_bytes(), 18)
    assert machine == 183  # EM_AARCH64
    expected = [row for row in table if row.architecture == "sm_87" and row.kernel.startswith(KERNELS)]
    assert expected
    assert regressions(used(made), expected) == []


def used(made: Path) -> list[Resources]:
    """What each kernel of a file needs, as cuobjdump reads it. Skips where that is missing."""
    try:
        tool = find_tool("cuobjdump")
    except MissingComponent as error:
        pytest.skip(str(error))
    printed = run([tool, "--dump-resource-usage", made]).stdout
    rows = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", printed)
    names = readable([row[0] for row in rows])
    numbers = ([int(number) for number in row[1:]] for row in rows)
    return [
        Resources("sm_87", name, registers, shared, stack, spilled)
        for name, (registers, stack, shared, spilled) in zip(names, numbers, strict=True)
    ]
