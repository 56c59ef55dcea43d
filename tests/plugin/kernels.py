"""Build the kernels for the CPU, over the emulated device of plugins/tests/cpu, and call them with arrays."""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


# More optimization takes longer than it saves. Variables start as a pattern and not as what happened to be there.
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
        run(["g++", *FLAGS, *(("-O2",) if source == emulator else CHECKS), "-c", source, "-o", result])
        return str(result)

    emulator = EMULATOR / "emulator.cpp"
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, [*sources, emulator]))
    run(["g++", *objects, *link_flags, "-o", output])
    return output


@functools.cache
def library() -> Path:
    """The kernels and their C interface as one library, built once for all tests."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return build(SOURCES, Path(folder, "libacmix_cpu.so"), "-shared")


def run(command: Sequence[str | Path]) -> str:
    """What a command printed; fails with all of it when the command does."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


class Problem(ctypes.Structure):
    """acmix::LocalAttention and acmix::OutlookAttention: their fields are the same."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                *("dtype", "layout", "batch", "num_heads", "head_dim"),
                *("height", "width", "kernel_size", "stride"),
            )
        ),
        ("scale", ctypes.c_float),
    )


class Refused(Exception):
    """The library's reason for not launching, or how the launch ended."""


class Kernels:
    """The library's C interface for arrays. Four-dimensional arrays are NCHW here, whatever the layout in memory."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        for function in ("acmix_describe", "acmix_local_attention", "acmix_outlook_attention"):
            getattr(self.library, function).restype = ctypes.c_char_p
        self.library.emulator_shared_bytes.restype = ctypes.c_size_t

    def entries(self, operator: str) -> list[dict[str, Any]]:
        """The rows of an operator's dispatch table."""
        found = json.loads(self.library.acmix_describe())["entries"]
        return [entry for entry in found if entry["operator"] == operator]

    def shared_bytes(self) -> int:
        """Shared memory that a block of the last launch asked for."""
        return self.library.emulator_shared_bytes()

    def local_attention(self, qkv: Array, position_weight: Array | None, *, num_heads: int, **settings: Any) -> Array:
        """y of the operator; ``settings`` as for :meth:`_launch`."""
        batch, channels, height, width = qkv.shape
        stride = max(settings["stride"], 1)
        return self._launch(
            self.library.acmix_local_attention,
            (qkv, position_weight),
            (batch, channels // 3, height // stride, width // stride),
            problem={"head_dim": channels // 3 // num_heads, "num_heads": num_heads, "height": height, "width": width},
            **settings,
        )

    def outlook_attention(self, logits: Array, values: Array, *, num_heads: int, **settings: Any) -> Array:
        """y of the operator; ``settings`` as for :meth:`_launch`."""
        _, channels, height, width = values.shape
        return self._launch(
            self.library.acmix_outlook_attention,
            (logits, values),
            values.shape,
            problem={"head_dim": channels // num_heads, "num_heads": num_heads, "height": height, "width": width},
            **settings,
        )

    def _launch(
        self,
        function: Any,
        inputs: Sequence[Array | None],
        shape: tuple[int, ...],
        *,
        problem: dict[str, int],
        layout: str = "NCHW",
        kernel: str | None = None,
        kernel_size: int,
        stride: int,
        scale: float,
        offsets: tuple[int, int] = (0, 0),
        sm: int = 90,
        seed: int = 0,
    ) -> Array:
        """Run one kernel, its inputs and its output so many elements behind an aligned address.

        Raises Refused with the library's sentence, or with what went wrong in the launch.
        """
        dtype = next(array.dtype for array in inputs if array is not None)
        arrays = [None if array is None else Placed(to_memory(array, layout), offsets[0]) for array in inputs]
        y = Placed(to_memory(np.full(shape, np.nan, dtype), layout), offsets[1])
        fields = Problem(
            dtype=DTYPES.index(dtype.name),
            layout=LAYOUTS.index(layout),
            batch=shape[0],
            kernel_size=kernel_size,
            stride=stride,
            scale=scale,
            **problem,
        )
        number = -1 if kernel is None else KERNELS.index(kernel)
        self.library.emulator_configure(sm, seed)
        for placed in filter(None, [*arrays, y]):
            for fence in (placed.memory[: placed.start], placed.memory[placed.end :]):
                self.library.emulator_fence(ctypes.c_void_p(fence.ctypes.data), ctypes.c_size_t(fence.nbytes))
        pointers = [ctypes.c_void_p(None if placed is None else placed.array.ctypes.data) for placed in [*arrays, y]]
        reason = function(ctypes.byref(fields), number, *pointers, None)
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
