"""Build the kernels for the CPU, over the emulated device of plugins/tests/cpu, and call them with arrays."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.axes import quantities, shapes
from acmix_deploy.operators.spec import Operator
from tests import ROOT

Array = NDArray[Any]

PLUGINS = ROOT / "plugins"
EMULATOR = PLUGINS / "tests" / "cpu"
SOURCES = sorted(path for path in (PLUGINS / "src").glob("*") if path.suffix in (".cpp", ".cu"))


def _mma_before_sm_80() -> str:
    """The statements by which ptx.cuh multiplies on GPUs without mma.m16n8k16, so that the CPU runs the same ones."""
    header = (PLUGINS / "include" / "acmix" / "ptx.cuh").read_text()
    found = re.search(r"void mma_k16\(.*?#else(.*?)#endif", header, re.DOTALL)
    assert found, "ptx.cuh has no mma_k16 with an #else"
    return " ".join(found[1].split())


# More optimization takes longer than it saves, and for kernels less does too. Variables start as a pattern and not as
# what happened to be there.
FLAGS = (
    *("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-strict-aliasing"),
    *("-U_FORTIFY_SOURCE", "-ftrivial-auto-var-init=pattern"),
    *("-I", str(EMULATOR), "-I", str(PLUGINS / "include"), f"-DACMIX_MMA_K16_BEFORE_SM_80={_mma_before_sm_80()}"),
)
# Every access of a kernel goes through the emulator, which knows what a GPU would fault on.
CHECKS = (
    "-fsanitize=kernel-address,alignment,bounds",
    *("--param", "asan-instrumentation-with-call-threshold=0", "--param", "asan-stack=0", "--param", "asan-globals=0"),
)

DTYPES = ("float32", "float16")
LAYOUTS = ("NCHW", "NHWC")
KERNELS = ("simt", "mma")
GUARD = 1 << 14  # bytes


def missing_compiler() -> str:
    """Why nothing can be built here, or an empty string."""
    if shutil.which("g++") is None:
        return "no g++ on the PATH"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    return "" if int(version.split(".")[0]) >= 12 else f"g++ {version}; half precision needs 12 or newer"


def build(sources: Sequence[Path], output: Path, *link_flags: str) -> Path:
    """Compile ``sources`` and the emulator, two at a time, and link them to ``output``."""

    def compile_one(source: Path) -> str:
        result = output.parent / f"{output.name}-{source.name}.o"
        own = ("-O2",) if source == emulator else (*CHECKS, "-O0") if source.suffix == ".cpp" else CHECKS
        run(["g++", *FLAGS, *own, "-c", source, "-o", result])
        return str(result)

    emulator = EMULATOR / "emulator.cpp"
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, emulator]))
    run(["g++", *objects, *link_flags, "-o", output])
    return output


@functools.cache
def library() -> Path:
    """The kernels and their C interface as one library, built again when what it is built from has changed."""
    output = PLUGINS.parent / "build" / "cpu" / "libacmix_cpu.so"
    output.parent.mkdir(parents=True, exist_ok=True)
    with (output.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not output.is_file() or output.stat().st_mtime < max(changed(), Path(__file__).stat().st_mtime):
            build(SOURCES, output.with_suffix(".part"), "-shared").replace(output)
    return output


def changed() -> float:
    """When the newest file in plugins/ was written."""
    return max(path.stat().st_mtime for path in PLUGINS.rglob("*") if path.is_file())


def run(command: Sequence[str | Path]) -> str:
    """What a command printed; fails with all of it when the command does."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def problem_type(operator: Operator) -> type[ctypes.Structure]:
    """The operator's struct in acmix/operators.h."""
    floats = [attribute.name for attribute in operator.attributes if attribute.kind == "float"]
    fields = [
        *((name, ctypes.c_int32) for name in ("dtype", "layout", *operator.axes.values())),
        *((name, ctypes.c_float) for name in floats),
    ]
    return type(operator.op_type, (ctypes.Structure,), {"_fields_": fields})


def windows_of(operator: Operator) -> list[dict[str, int]]:
    """All that the native kernels take beside heads: each kernel size with each stride, border and so on."""
    choices = {name: values for name, values in operator.kernel_limits.items() if name != "head_dim"}
    windows = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return [window for window in windows if 1 in (window.get("stride", 1), window.get("upsampling", 1))]


class Refused(Exception):
    """The library's reason for not launching, or how the launch ended."""


class Kernels:
    """The library's C interface for arrays. Four-dimensional arrays are NCHW here, whatever the layout in memory."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for function in ("acmix_describe", *(f"acmix_{operator.name}" for operator in OPERATORS)):
            getattr(self.library, function).restype = ctypes.c_char_p
        self.library.emulator_shared_bytes.restype = ctypes.c_size_t
        self.library.emulator_executed.restype = ctypes.c_uint32

    def entries(self, operator: Operator) -> list[dict[str, Any]]:
        """The rows of an operator's dispatch table."""
        found = json.loads(self.library.acmix_describe())["entries"]
        return [entry for entry in found if entry["operator"] == operator.op_type]

    def shared_bytes(self) -> int:
        """Shared memory that a block of the last launch asked for."""
        return self.library.emulator_shared_bytes()

    def blocks(self) -> int:
        """Blocks of the last launch."""
        return self.library.emulator_blocks()

    def warps(self) -> int:
        """Warps of the last launch, in all its blocks."""
        return self.blocks() * -(-self.library.emulator_threads() // 32)

    def executed(self, *instructions: str) -> int:
        """How often the first warp of the last block that ran executed instructions of these names."""
        return sum(self.library.emulator_executed(name.encode()) for name in instructions)

    def launch(
        self,
        operator: Operator,
        *inputs: Array | None,
        layout: str = "NCHW",
        kernel: str | None = None,
        offsets: tuple[int, int] = (0, 0),
        sm: int = 90,
        seed: int = 0,
        only_middle: bool = False,
        **attributes: Any,
    ) -> Array:
        """Run one kernel, its inputs and its output so many elements behind an aligned address: y.

        With ``only_middle`` the block in the middle of the grid runs, and no other.

        Raises Refused with the library's sentence, or with what went wrong in the launch.
        """
        dtype = next(array.dtype for array in inputs if array is not None)
        sizes = dict.fromkeys(operator.axes.values(), 0)
        sizes |= quantities(operator, attributes, [() if array is None else array.shape for array in inputs])
        divisors = {name: size or 1 for name, size in sizes.items() if name in attributes}
        shape = shapes(operator, {**sizes, **divisors})[-1]
        arrays = [None if array is None else Placed(to_memory(array, layout), offsets[0]) for array in inputs]
        y = Placed(to_memory(np.full(shape, np.nan, dtype), layout), offsets[1])
        memory = {"dtype": DTYPES.index(dtype.name), "layout": LAYOUTS.index(layout)}
        problem = problem_type(operator)(**memory, **{**attributes, **sizes})
        number = -1 if kernel is None else KERNELS.index(kernel)
        self.library.emulator_configure(sm, seed)
        if only_middle:
            self.library.emulator_run_middle()
        for placed in filter(None, [*arrays, y]):
            for fence in (placed.memory[: placed.start], placed.memory[placed.end :]):
                self.library.emulator_fence(ctypes.c_void_p(fence.ctypes.data), ctypes.c_size_t(fence.nbytes))
        pointers = [ctypes.c_void_p(None if placed is None else placed.array.ctypes.data) for placed in [*arrays, y]]
        reason = getattr(self.library, f"acmix_{operator.name}")(ctypes.byref(problem), number, *pointers, None)
        if reason is not None:
            raise Refused(reason.decode())
        return from_memory(y.array, layout, shape)


def to_memory(array: Array, layout: str) -> Array:
    """An NCHW array as it lies in memory; NHWC pads channels to a multiple of 8, with NaN. Others stay."""
    if layout == "NCHW" or array.ndim != 4:
        return array
    padding = ((0, 0), (0, 0), (0, 0), (0, -array.shape[1] % 8))
    return np.pad(array.transpose(0, 2, 3, 1), padding, constant_values=np.nan)


def from_memory(array: Array, layout: str, shape: tuple[int, ...]) -> Array:
    """The reverse: an NCHW array of the given shape."""
    return array if layout == "NCHW" else array.transpose(0, 3, 1, 2)[:, : shape[1]]


class Placed:
    """A copy of an array, ``offset`` elements behind an address aligned to 256 bytes, amid memory that stays unused."""

    def __init__(self, values: Array, offset: int) -> None:
        self.memory = np.full(values.nbytes + 2 * GUARD + 256, 0xFF, np.uint8)
        self.start = -(self.memory.ctypes.data + GUARD) % 256 + GUARD + offset * values.itemsize
        self.end = self.start + values.nbytes
        self.array = self.memory[self.start : self.end].view(values.dtype).reshape(values.shape)
        self.array[...] = values
