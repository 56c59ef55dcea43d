"""The few calls of the CUDA runtime that running an engine takes, as objects that free what they hold."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from acmix_deploy.errors import CheckFailed, MissingComponent

if TYPE_CHECKING:
    from typing_extensions import Self


def runtime() -> Any:
    """The module ``cuda.bindings.runtime``.

    Raises:
        MissingComponent: it cannot be imported.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingComponent(
            f"cuda-bindings is needed to run an engine, and cannot be imported: {error}",
            "Run: pip install 'acmix-deploy[tensorrt]'",
        ) from error


class _Owned:
    """A handle of CUDA's that is given back once."""

    def __init__(self, handle: Any, give_back: str) -> None:
        self.handle = handle
        self._give_back = give_back

    def close(self) -> None:
        """Give it back; what CUDA says is left out, since after a kernel that failed every call repeats the failure."""
        if self.handle is not None:
            getattr(runtime(), self._give_back)(self.handle)
            self.handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Stream(_Owned):
    """A stream that does not wait for the default one."""

    def __init__(self) -> None:
        super().__init__(_call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking), "cudaStreamDestroy")

    def synchronize(self) -> None:
        """Wait until all that was put on it is done. Raises CheckFailed: some of it failed."""
        _call("cudaStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """What ``work`` puts on this stream, as a graph; nothing of it runs now."""
        cuda = runtime()
        _call("cudaStreamBeginCapture", self.handle, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        except BaseException:
            _, unfinished = cuda.cudaStreamEndCapture(self.handle)
            cuda.cudaGraphDestroy(unfinished)
            raise
        graph = _call("cudaStreamEndCapture", self.handle)
        try:
            return Graph(_call("cudaGraphInstantiate", graph, 0))
        finally:
            cuda.cudaGraphDestroy(graph)


class Graph(_Owned):
    """A captured graph, ready to be launched. See :meth:`Stream.capture`."""

    def __init__(self, executable: Any) -> None:
        super().__init__(executable, "cudaGraphExecDestroy")

    def launch(self, stream: Stream) -> None:
        """Put it on a stream."""
        if self.handle is None:
            raise ValueError("the graph was captured for shapes, or for a context, that are gone")
        _call("cudaGraphLaunch", self.handle, stream.handle)


class Event(_Owned):
    """A point in the work of a stream, with the time at which it was reached."""

    def __init__(self) -> None:
        super().__init__(_call("cudaEventCreate"), "cudaEventDestroy")

    def record(self, stream: Stream) -> None:
        """Set it behind what is on the stream now."""
        _call("cudaEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until it is reached."""
        _call("cudaEventSynchronize", self.handle)

    def ms_since(self, start: Event) -> float:
        """Milliseconds from ``start`` to this event; both have been reached."""
        return float(_call("cudaEventElapsedTime", start.handle, self.handle))


class Buffer:
    """Device memory and, beside it, pinned host memory for the same array.

    Args:
        shape: of the array.
        dtype: of its elements.

    Raises:
        MissingComponent: too little memory.
    """

    def __init__(self, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.nbytes = max(int(np.prod(self.shape)), 1) * dtype.itemsize
        with ExitStack() as stack:
            self._device = stack.enter_context(_Owned(_call("cudaMalloc", self.nbytes), "cudaFree"))
            host = _call("cudaHostAlloc", self.nbytes, runtime().cudaHostAllocDefault)
            self._host = stack.enter_context(_Owned(host, "cudaFreeHost"))
            self._held = stack.pop_all()

    @property
    def address(self) -> int:
        """Where the device's side begins."""
        return int(self._device.handle)

    @property
    def array(self) -> NDArray[Any]:
        """The host's side; not to be touched after :meth:`close`."""
        return np.asarray(_View(int(self._host.handle), self.shape, self.dtype))

    def upload(self, stream: Stream) -> None:
        """Put a copy of the host's side to the device on a stream."""
        self._copy(self._device, self._host, "cudaMemcpyHostToDevice", stream)

    def download(self, stream: Stream) -> None:
        """Put a copy of the device's side to the host on a stream."""
        self._copy(self._host, self._device, "cudaMemcpyDeviceToHost", stream)

    def close(self) -> None:
        """Free both sides."""
        self._held.close()

    def _copy(self, target: _Owned, source: _Owned, direction: str, stream: Stream) -> None:
        kind = getattr(runtime().cudaMemcpyKind, direction)
        _call("cudaMemcpyAsync", target.handle, source.handle, self.nbytes, kind, stream.handle)


class _View:
    """Memory at an address, as NumPy takes it."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, False), "shape": shape, "typestr": dtype.str}


def _call(name: str, *arguments: Any) -> Any:
    """The result of a call.

    Raises:
        MissingComponent: too little memory, or a driver that is too old.
        CheckFailed: the call fails otherwise, or work before it did.
    """
    cuda = runtime()
    status, *values = getattr(cuda, name)(*arguments)
    if not int(status):
        return values[0] if values else None
    if status == cuda.cudaError_t.cudaErrorMemoryAllocation:
        size = f" of {arguments[0]} bytes" if name in ("cudaMalloc", "cudaHostAlloc") else ""
        raise MissingComponent(
            f"too little device memory: {name}{size} failed",
            "End other programs on the device, or run smaller images or batches.",
        )
    if status == cuda.cudaError_t.cudaErrorInsufficientDriver:
        raise MissingComponent(
            "the driver here is older than the CUDA of the installed cuda-bindings, or there is none",
            "Install cuda-bindings for the driver's CUDA; where that is CUDA 12: pip install 'cuda-bindings<13'",
        )
    raise CheckFailed(f"{name} failed: {cuda.cudaGetErrorString(status)[1].decode()} ({status.name})")
