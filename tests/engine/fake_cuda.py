"""Stands for ``cuda.bindings.runtime`` where there is no GPU; nothing happens before somebody waits for it.

Device memory is memory of this process under addresses that cannot be read, so a pointer of the wrong side is an error.
What is put on a stream runs when the stream, or an event on it, is synchronized. Memory is NaN when it is new and after
it is freed. Work that does not say otherwise takes a millisecond of :attr:`Cuda.clock`.
"""

from __future__ import annotations

import collections
import ctypes
import enum
from collections.abc import Callable
from typing import Any

_FIRST_ADDRESS = 0x100  # no process has memory there
_NAN = 0xFF  # as every byte of a float16 or float32


class _NotSubscriptable(enum.EnumMeta):
    """As enumerations of cuda-bindings 13 are."""

    def __getitem__(cls, name: str) -> Any:
        raise TypeError(f"type {cls.__name__!r} is not subscriptable")


class cudaError_t(enum.IntEnum, metaclass=_NotSubscriptable):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorInvalidResourceHandle = 400
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum, metaclass=_NotSubscriptable):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class cudaStreamCaptureMode(enum.IntEnum, metaclass=_NotSubscriptable):
    cudaStreamCaptureModeThreadLocal = 1


Work = Callable[[], None]
OK = (cudaError_t.cudaSuccess,)
INVALID = (cudaError_t.cudaErrorInvalidValue,)


class Handle:
    """A stream, event or graph; an integer for those who want a pointer."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.queue: list[Work] = []
        self.captured: list[Work] | None = None
        self.time: float | None = None

    def __int__(self) -> int:
        return id(self)


class Cuda:
    """The module. ``live`` has what was made and not given back, ``memory`` the bytes that may be allotted."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0

    def __init__(self) -> None:
        self.memory = 1 << 30
        self.clock = 0.0
        self.error = cudaError_t.cudaSuccess
        self.calls: collections.Counter[str] = collections.Counter()
        self._handles: dict[int, Handle] = {}
        self._blocks: dict[int, Any] = {}  # of the device and of the host, by address
        self._freed: list[Any] = []  # kept, so that what reads them reads NaN
        self._next = _FIRST_ADDRESS

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and name[4:5].isupper() and callable(getattr(type(self), name)):
            self.calls[name] += 1
        return super().__getattribute__(name)

    @property
    def live(self) -> dict[str, int]:
        kinds = [handle.kind for handle in self._handles.values()]
        kinds += ["device" if self._is_device(address) else "host" for address in self._blocks]
        return dict(collections.Counter(kinds))

    def block(self, address: int) -> Any:
        """The device's bytes at an address, for whoever stands for a kernel."""
        assert self._is_device(address), f"{address:#x} is no address of the device"
        return self._blocks.get(address, None) or self._fail()

    def put(self, stream: int, work: Work, milliseconds: float = 1.0) -> None:
        """Put work on a stream, or into the graph that it is captured for."""

        def timed() -> None:
            work()
            self.clock += milliseconds

        handle = self._handles[int(stream)]
        (handle.queue if handle.captured is None else handle.captured).append(timed)

    def capturing(self, stream: int) -> bool:
        return self._handles[int(stream)].captured is not None

    def run(self, stream: int) -> None:
        """Do all that is on a stream."""
        queue = self._handles[int(stream)].queue
        while queue and not self.error:
            queue.pop(0)()

    def cudaGetErrorString(self, error: Any) -> Any:
        return (*OK, f"it is {cudaError_t(error).name}".encode())

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return self._made("stream")

    def cudaStreamSynchronize(self, stream: Handle) -> Any:
        if stream.captured is not None:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self.run(int(stream))
        return (self.error,)

    def cudaStreamDestroy(self, stream: Handle) -> Any:
        self.run(int(stream))
        return self._gone(stream)

    def cudaStreamBeginCapture(self, stream: Handle, mode: Any) -> Any:
        stream.captured = []
        return OK

    def cudaStreamEndCapture(self, stream: Handle) -> Any:
        status, graph = self._made("graph")
        graph.queue, stream.captured = stream.captured, None
        return status, graph

    def cudaGraphInstantiate(self, graph: Handle, flags: int) -> Any:
        status, executable = self._made("executable graph")
        executable.queue = list(graph.queue)
        return status, executable

    def cudaGraphLaunch(self, executable: Handle, stream: Handle) -> Any:
        if int(executable) not in self._handles:
            return (cudaError_t.cudaErrorInvalidResourceHandle,)
        stream.queue += executable.queue
        return OK

    def cudaGraphDestroy(self, graph: Handle) -> Any:
        return self._gone(graph)

    def cudaGraphExecDestroy(self, executable: Handle) -> Any:
        return self._gone(executable)

    def cudaEventCreate(self) -> Any:
        return self._made("event")

    def cudaEventRecord(self, event: Handle, stream: Handle) -> Any:
        def stamp() -> None:
            event.time = self.clock

        event.time = None
        event.queue = [lambda: self.run(int(stream))]
        self.put(int(stream), stamp, 0)
        return OK

    def cudaEventSynchronize(self, event: Handle) -> Any:
        for work in event.queue:
            work()
        return (self.error,)

    def cudaEventElapsedTime(self, start: Handle, end: Handle) -> Any:
        if start.time is None or end.time is None:
            return (*INVALID, None)
        return (*OK, end.time - start.time)

    def cudaEventDestroy(self, event: Handle) -> Any:
        return self._gone(event)

    def cudaMalloc(self, size: int) -> Any:
        self.memory -= size
        if self.memory < 0:
            self.memory += size
            return cudaError_t.cudaErrorMemoryAllocation, None
        address, self._next = self._next, self._next + 1
        self._blocks[address] = self._bytes(size)
        return (*OK, address)

    def cudaFree(self, address: int) -> Any:
        self.memory += len(self._blocks[address])
        return self._free(address)

    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        block = self._bytes(size)
        self._blocks[ctypes.addressof(block)] = block
        return (*OK, ctypes.addressof(block))

    def cudaFreeHost(self, address: int) -> Any:
        return self._free(address)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: Handle) -> Any:
        to_device = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        if (self._is_device(target), self._is_device(source)) != (to_device, not to_device):
            return INVALID

        def copy() -> None:
            blocks = [self._blocks.get(address) for address in (target, source)]
            if any(block is None or len(block) < size for block in blocks):
                self._fail()
            else:
                ctypes.memmove(*blocks, size)

        self.put(int(stream), copy)
        return OK

    def _made(self, kind: str) -> Any:
        handle = Handle(kind)
        self._handles[int(handle)] = handle
        return (*OK, handle)

    def _gone(self, handle: Handle) -> Any:
        del self._handles[int(handle)]  # a second time is an error
        return OK

    def _free(self, address: int) -> Any:
        block = self._blocks.pop(address)  # a second time is an error
        ctypes.memset(block, _NAN, len(block))
        self._freed.append(block)
        return OK

    def _bytes(self, size: int) -> Any:
        block = (ctypes.c_ubyte * size)()
        ctypes.memset(block, _NAN, size)
        return block

    def _is_device(self, address: int) -> bool:
        return address < self._next

    def _fail(self) -> None:
        """As a kernel that reads what is not there: the error stays."""
        self.error = cudaError_t.cudaErrorIllegalAddress
