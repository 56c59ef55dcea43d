"""Compile the kernels and write what the compiler says each one needs to plugins/resources.csv."""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from acmix_deploy.errors import CheckFailed, MissingComponent
from acmix_deploy.plugin.toolchain import Cuda, find_cmake, find_cuda
from tests.plugin.kernels import PLUGINS

TABLE = Path(__file__).resolve().parents[1] / "plugins" / "resources.csv"


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture. Shared memory is the static one."""

    architecture: str
    kernel: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def measure(cuda: Cuda, architectures: str) -> list[Resources]:
    """Compile all kernels as the build does, warnings being errors, and read the compiler's report.

    Args:
        cuda: the compiler.
        architectures: such as ``87``, or ``all``.

    Raises:
        MissingComponent: CMake or c++filt is missing.
        CheckFailed: the kernels do not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "CMAKE_CUDA_COMPILER": cuda.nvcc,
            "CMAKE_CUDA_ARCHITECTURES": architectures,
            "CMAKE_CUDA_FLAGS": "-Xptxas=-v -Werror=all-warnings",
            "CMAKE_CXX_FLAGS": "-Werror",
            "ACMIX_TENSORRT": "OFF",
        }
        cmake = find_cmake()
        run(
            [cmake, "-S", PLUGINS, "-B", folder, *(f"-D{name}={value}" for name, value in settings.items())],
            cuda,
        )
        jobs = str(len(os.sched_getaffinity(0)))
        # The report of one file must not be mixed with another's.
        report = run([cmake, "--build", folder, "--parallel", jobs, "--", "--output-sync=target"], cuda)
    return parse(report)


def parse(report: str) -> list[Resources]:
    """The kernels in what ``ptxas -v`` printed, in order of architecture and name."""
    found = []
    for text in report.split("Compiling entry function ")[1:]:
        entry = re.match(r"'(\w+)' for '(sm_\d+)'", text)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        if not (entry and stack and registers):
            raise CheckFailed(f"the compiler's report has another form: {text[:300]}")
        shared = re.search(r"(\d+) bytes smem", text)
        spilled = int(stack[2]) + int(stack[3])
        used = int(registers[1]), int(shared[1]) if shared else 0, int(stack[1]), spilled
        found.append(Resources(entry[2], entry[1], *used))
    names = readable([resources.kernel for resources in found])
    named = [replace(resources, kernel=name) for resources, name in zip(found, names, strict=True)]
    return sorted(named, key=lambda resources: (int(resources.architecture[3:]), resources.kernel))


def read_table() -> tuple[str, list[Resources]]:
    """The CUDA release that the committed table was made with, and its rows."""
    release, rows = read_cells(TABLE)
    return release, [Resources(*row[:2], *map(int, row[2:])) for row in rows]


def read_cells(table: Path) -> tuple[str, list[list[str]]]:
    """The CUDA release that a committed table was made with, and the cells of its rows."""
    with table.open(encoding="utf-8", newline="") as file:
        release = file.readline().split()[-1]
        _, *rows = csv.reader(file)
    return release, rows


def write_table(table: Path, release: str, rows: Sequence[Any]) -> None:
    """Write a table that is committed, of dataclasses; ``make`` makes it by its name."""
    with table.open("w", encoding="utf-8", newline="") as file:
        file.write(f"# written by `make {table.stem}` with CUDA {release}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(rows[0]))
        writer.writerows([f"{cell:g}" if isinstance(cell, float) else cell for cell in astuple(row)] for row in rows)


def readable(symbols: Sequence[str]) -> list[str]:
    """Names as in the source, without return type, parameters and namespaces."""
    try:
        done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise MissingComponent(
            "c++filt was looked for on the PATH and not found", "apt-get install binutils"
        ) from error
    return [
        re.sub(r"acmix::|\(anonymous namespace\)::", "", re.sub(r"^void |\([^()]*(\([^()]*\)[^()]*)*\)$", "", name))
        for name in done.stdout.splitlines()
    ]


def run(command: Sequence[str | Path], cuda: Cuda) -> str:
    done = subprocess.run(
        command, env=cuda.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise CheckFailed(f"the kernels do not compile:\n{done.stdout[-4000:]}")
    return done.stdout


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    cuda = find_cuda()
    rows = measure(cuda, "all")
    write_table(TABLE, cuda.version, rows)
    architectures = dict.fromkeys(row.architecture for row in rows)
    print(f"{TABLE.name}: {len(rows)} kernels for {' '.join(architectures)}, CUDA {cuda.version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
