"""Build the kernels for this machine's GPU, and call them with tensors of PyTorch.

    python -m tests.gpu.device

builds all that the tests and figures here load. With ACMIX_GPU_DEVICE=emulated the kernels run on the CPU, over
plugins/tests/cpu, so that all but the card itself can be tried without one.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmix_deploy import driver
from acmix_deploy.errors import MissingComponent
from acmix_deploy.operators.spec import Operator
from acmix_deploy.plugin.toolchain import find_cuda
from tests.plugin import kernels
from tests.plugin.kernels import DTYPES, GUARD, LAYOUTS, PLUGINS, Refused

if TYPE_CHECKING:
    from torch import Tensor

EMULATED = os.environ.get("ACMIX_GPU_DEVICE") == "emulated"
DEVICE = "cpu" if EMULATED else "cuda"
BUILD = PLUGINS.parent / "build" / "gpu"


def attribute(number: int) -> int | None:
    """A CUdevice_attribute of the first GPU; None where there is no GPU."""
    try:
        return driver.made(ctypes.c_int, "cuDeviceGetAttribute", number, driver.first_device()).value
    except (OSError, driver.DriverError):
        return None


def compute_capability() -> int | None:
    """That of the first GPU, 90 for sm_90; None where there is no GPU."""
    major, minor = attribute(75), attribute(76)
    return None if major is None or minor is None else major * 10 + minor


def missing() -> str:
    """Why nothing can be built and run here, or an empty string."""
    if EMULATED:
        return kernels.missing_compiler()
    if compute_capability() is None:
        return "no NVIDIA GPU"
    try:
        find_cuda()
    except MissingComponent as error:
        return error.message
    return ""


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on the PATH or beside nvcc; None where it is not."""
    return shutil.which(name) or shutil.which(name, path=find_cuda().nvcc.parent)


def build(name: str, sources: Sequence[Path], headers: Path | None = None, architecture: str | None = None) -> Path:
    """Compile ``sources`` for this machine's GPU and link them, doing again only what has changed: the file's path.

    ``headers`` is TensorRT's folder of them, for the sources that need it. ``architecture`` is another than this GPU's;
    of compute_75 the library holds PTX alone, which the driver compiles when it loads it.
    """
    changed = kernels.changed()
    nvcc = [str(find_cuda().nvcc), f"-arch={architecture or f'sm_{compute_capability()}'}"]
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-Wall,-Wextra,-fvisibility=hidden"]
    includes = ["-I", str(PLUGINS / "include"), "-I", str(PLUGINS / "src")]
    output = BUILD / name
    BUILD.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        needs_headers = headers is not None and source.parent.name == "tensorrt"
        command = [*nvcc, *flags, *includes, *(["-isystem", str(headers)] if needs_headers else []), "-c", str(source)]
        result = BUILD / f"{source.name}-{zlib.crc32(' '.join(command).encode()):08x}.o"
        if not result.is_file() or result.stat().st_mtime < changed:
            part = result.with_suffix(".part")
            kernels.run([*command, "-o", part])
            part.replace(result)  # whole, even where this is ended
        return str(result)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    shared = ["-shared", "-Xlinker=--exclude-libs,ALL"] if output.suffix == ".so" else []
    kernels.run([*nvcc, *shared, *objects, "-ldl", "-o", output])
    return output


def library() -> Path:
    """The kernels and their C interface."""
    return kernels.library() if EMULATED else build("libacmix_test.so", kernels.SOURCES)


def turing_library() -> Path:
    """The code for sm_75, as PTX that the driver compiles for this GPU."""
    return build("libacmix_test_75.so", kernels.SOURCES, architecture="compute_75")


def sanitized_program() -> Path:
    """The program for compute-sanitizer."""
    return build("sanitize", [*kernels.SOURCES, PLUGINS / "tests" / "gpu" / "sanitize.cu"])


def limit(operator: Operator, dtype: str) -> float:
    """The operator's tolerance, where rounding the result is the error that eager code has at least."""
    return operator.tolerances[dtype].limit(2**-11 if dtype == "float16" else 0)


@dataclass(frozen=True)
class Placed:
    """A tensor amid guards: every byte of ``memory`` is 0xFF, a NaN in both types, until something writes it."""

    memory: Tensor
    tensor: Tensor
    start: int
    end: int

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: str, layout: str, offset: int = 0) -> Placed:
        """All NaN. ``shape`` is NCHW; ``offset`` elements behind an address aligned to 256 bytes."""
        import torch

        kind = getattr(torch, dtype)
        if layout == "NHWC" and len(shape) == 4:
            batch, channels, height, width = shape
            stored = (batch, height, width, -(-channels // 8) * 8)
        else:
            stored = shape
        start, size = GUARD + offset * kind.itemsize, math.prod(stored) * kind.itemsize
        memory = torch.full((start + size + GUARD,), 0xFF, dtype=torch.uint8, device=DEVICE)
        tensor = memory[start : start + size].view(kind).view(stored)
        if stored is not shape:
            tensor = tensor.permute(0, 3, 1, 2)[:, : shape[1]]
        return Placed(memory, tensor, start, start + size)

    def guards_hold(self) -> bool:
        """Whether the memory around the tensor is as it was."""
        return bool((self.memory[: self.start] == 0xFF).all() and (self.memory[self.end :] == 0xFF).all())


class DeviceKernels:
    """The kernels, for tensors as they lie in the GPU's memory."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.acmix_describe.restype = ctypes.c_char_p
        self.entries: list[dict[str, Any]] = json.loads(self.library.acmix_describe())["entries"]

    def launch(
        self,
        operator: Operator,
        problem: ctypes.Structure,
        inputs: Sequence[Tensor | None],
        y: Tensor,
        kernel: str | None = None,
    ) -> None:
        """Launch on the current stream the kernel of that name, the fastest for None.

        Raises:
            Refused: with the library's reason.
        """
        function = getattr(self.library, f"acmix_{operator.name}")
        function.restype = ctypes.c_char_p
        number = -1 if kernel is None else kernels.KERNELS.index(kernel)
        pointers = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in (*inputs, y)]
        reason = function(ctypes.byref(problem), number, *pointers, ctypes.c_void_p(current_stream()))
        if reason is not None:
            raise Refused(reason.decode())


def oracle(operator: Operator, inputs: Sequence[Tensor], attributes: dict[str, int | float]) -> Tensor:
    """What the kernels should compute, float64 and NCHW. An image at a time, since oracles copy whole windows."""
    import torch

    function = getattr(import_module(f"acmix_deploy.operators.{operator.name}.oracle"), operator.name)
    batched = [tensor.axes[0] == "B" for tensor in operator.inputs]
    images = (
        [x[image : image + 1] if by_image else x for x, by_image in zip(inputs, batched, strict=True)]
        for image in range(inputs[batched.index(True)].shape[0])
    )
    return torch.cat([function(*image, **attributes) for image in images])


def current_stream() -> int:
    """PyTorch's, as CUDA knows it."""
    return cuda().current_stream().cuda_stream


def cuda() -> Any:
    """torch.cuda, or what stands in for it."""
    return import_module("tests.gpu.emulated" if EMULATED else "torch.cuda")


def capture(calls: Callable[[], object]) -> Callable[[], object]:
    """What launches the same again: the replay of a CUDA graph. An emulated device has none."""
    if EMULATED:
        return calls
    graph = cuda().CUDAGraph()
    with cuda().graph(graph):
        calls()
    return graph.replay


def problem_for(operator: Operator, entry: dict[str, Any], fields: dict[str, int | float]) -> ctypes.Structure:
    """One that asks for this row of the dispatch table, when ``fields`` has its head_dim."""
    memory = {"dtype": DTYPES.index(entry["dtype"]), "layout": LAYOUTS.index(entry["layout"])}
    return kernels.problem_type(operator)(**memory, **fields)


if __name__ == "__main__":
    if missing():
        sys.exit(f"error: {missing()}")
    with ThreadPoolExecutor() as pool:
        built = list(pool.map(lambda make: make(), [library] if EMULATED else [library, turing_library]))
    print(*built, *([] if EMULATED else [sanitized_program()]), sep="\n")
