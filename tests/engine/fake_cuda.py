"""Stands for CUDA's driver where there is no GPU; nothing happens before somebody waits for it.

Device memory is memory of this process under addresses that cannot be read, so a pointer of the wrong side is an error.
What is put on a stream runs when the stream, or an event on it, is synchronized. Memory is NaN when it is new and after
it is freed. Work that does not say otherwise takes a millisecond of :attr:`Cuda.clock`.
"""

from __future__ import annotations

import collections
import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

_FIRST_ADDRESS = 0x100  # no process has memory there
_NAN = 0xFF  # as every byte of a float16 or float32


SUCCESS = 0
INVALID_VALUE, OUT_OF_MEMORY, NO_DEVICE, INVALID_CONTEXT = 1, 2, 100, 201
INVALID_HANDLE, ILLEGAL_ADDRESS, STREAM_CAPTURE_UNSUPPORTED = 400, 700, 900
THREAD_LOCAL = 1  # CUstreamCaptureMode
ATTRIBUTES = {75: 8, 76: 7}  # compute capability, major and minor
_NAMES = {OUT_OF_MEMORY: "CUDA_ERROR_OUT_OF_MEMORY", ILLEGAL_ADDRESS: "CUDA_ERROR_ILLEGAL_ADDRESS"}

Work = Callable[[], None]


class Handle:
    """A stream, event or graph."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.queue: list[Work] = []
        self.captured: list[Work] | None = None
        self.time: float | None = None


class Cuda:
    """The library. ``live`` has what was made and not given back, ``memory`` the bytes that may be allotted.

    Functions take what ctypes passes on: numbers, objects of ctypes and references to them.
    """

    def __init__(self) -> None:
        self.memory = 1 << 30
        self.clock = 0.0
        self.error = SUCCESS
        self.calls: collections.Counter[str] = collections.Counter()
        self._thread = threading.local()
        self._handles: dict[int, Handle] = {}
        self._blocks: dict[int, Any] = {}  # of the device and of the host, by address
        self._freed: list[Any] = []  # kept, so that what reads them reads NaN
        self._next = _FIRST_ADDRESS

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu"):
            self.calls[name] += 1
            without = ("cuInit", "cuGetError", "cuDevice", "cuDriver", "cuCtx")
            if not name.startswith(without) and not hasattr(self._thread, "context"):
                return lambda *arguments: INVALID_CONTEXT
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

        handle = self._handles[stream]
        (handle.queue if handle.captured is None else handle.captured).append(timed)

    def capturing(self, stream: int) -> bool:
        return self._handles[stream].captured is not None

    def run(self, stream: int) -> None:
        """Do all that is on a stream."""
        queue = self._handles[stream].queue
        while queue and not self.error:
            queue.pop(0)()

    def cuInit(self, flags: int) -> int:
        return SUCCESS

    def cuGetErrorString(self, status: int, text: Any) -> int:
        return self._give(text, f"it is {status}".encode())

    def cuGetErrorName(self, status: int, text: Any) -> int:
        return self._give(text, _NAMES.get(status, "CUDA_ERROR").encode())

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return self._give(device, ordinal)

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"Orin"
        return SUCCESS

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        return self._give(value, ATTRIBUTES[attribute])

    def cuDeviceGetPCIBusId(self, bus: Any, size: int, device: Any) -> int:
        bus.value = b"0000:01:00.0"
        return SUCCESS

    def cuDriverGetVersion(self, version: Any) -> int:
        return self._give(version, 12060)

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        return self._give(context, 1 + device.value)

    def cuCtxSetCurrent(self, context: Any) -> int:
        self._thread.context = context.value
        return SUCCESS

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        return self._make(stream, "stream")

    def cuStreamSynchronize(self, stream: Any) -> int:
        if self.capturing(stream.value):
            return STREAM_CAPTURE_UNSUPPORTED
        self.run(stream.value)
        return self.error

    def cuStreamDestroy_v2(self, stream: Any) -> int:
        self.run(stream.value)
        return self._gone(stream)

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:
        assert mode == THREAD_LOCAL
        self._of(stream).captured = []
        return SUCCESS

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        work, self._of(stream).captured = self._of(stream).captured, None
        return self._make(graph, "graph", work or ())

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        return self._make(executable, "executable graph", self._of(graph).queue)

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:
        if executable.value not in self._handles:
            return INVALID_HANDLE
        self._of(stream).queue += self._of(executable).queue
        return SUCCESS

    def cuGraphDestroy(self, graph: Any) -> int:
        return self._gone(graph)

    def cuGraphExecDestroy(self, executable: Any) -> int:
        return self._gone(executable)

    def cuEventCreate(self, event: Any, flags: int) -> int:
        return self._make(event, "event")

    def cuEventRecord(self, event: Any, stream: Any) -> int:
        recorded = self._of(event)

        def stamp() -> None:
            recorded.time = self.clock

        recorded.time = None
        recorded.queue = [lambda: self.run(stream.value)]
        self.put(stream.value, stamp, 0)
        return SUCCESS

    def cuEventSynchronize(self, event: Any) -> int:
        for work in self._of(event).queue:
            work()
        return self.error

    def cuEventElapsedTime(self, milliseconds: Any, start: Any, end: Any) -> int:
        times = [self._of(event).time for event in (start, end)]
        return INVALID_VALUE if None in times else self._give(milliseconds, times[1] - times[0])

    def cuEventDestroy_v2(self, event: Any) -> int:
        return self._gone(event)

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:
        if size.value > self.memory:
            return OUT_OF_MEMORY
        self.memory -= size.value
        address, self._next = self._next, self._next + 1
        self._blocks[address] = self._bytes(size.value)
        return self._give(pointer, address)

    def cuMemFree_v2(self, pointer: Any) -> int:
        self.memory += len(self._blocks[pointer.value])
        return self._free(pointer.value)

    def cuMemHostAlloc(self, pointer: Any, size: Any, flags: int) -> int:
        block = self._bytes(size.value)
        self._blocks[ctypes.addressof(block)] = block
        return self._give(pointer, ctypes.addressof(block))

    def cuMemFreeHost(self, pointer: Any) -> int:
        return self._free(pointer.value)

    def cuMemcpyHtoDAsync_v2(self, device: Any, host: Any, size: Any, stream: Any) -> int:
        return self._copy(device, host, size.value, stream) if self._are(device, host) else INVALID_VALUE

    def cuMemcpyDtoHAsync_v2(self, host: Any, device: Any, size: Any, stream: Any) -> int:
        return self._copy(host, device, size.value, stream) if self._are(device, host) else INVALID_VALUE

    def _are(self, device: Any, host: Any) -> bool:
        return self._is_device(device.value) and not self._is_device(host.value)

    def _copy(self, target: Any, source: Any, size: int, stream: Any) -> int:
        def copy() -> None:
            blocks = [self._blocks.get(pointer.value) for pointer in (target, source)]
            if any(block is None or len(block) < size for block in blocks):
                self._fail()
            else:
                ctypes.memmove(*blocks, size)

        self.put(stream.value, copy)
        return SUCCESS

    def _give(self, reference: Any, value: Any) -> int:
        """Write where a reference points to."""
        reference._obj.value = value
        return SUCCESS

    def _of(self, handle: Any) -> Handle:
        return self._handles[handle.value]

    def _make(self, reference: Any, kind: str, work: Sequence[Work] = ()) -> int:
        handle = Handle(kind)
        handle.queue = list(work)
        self._handles[id(handle)] = handle
        return self._give(reference, id(handle))

    def _gone(self, handle: Any) -> int:
        del self._handles[handle.value]  # a second time is an error
        return SUCCESS

    def _free(self, address: int) -> int:
        block = self._blocks.pop(address)  # a second time is an error
        ctypes.memset(block, _NAN, len(block))
        self._freed.append(block)
        return SUCCESS

    def _bytes(self, size: int) -> Any:
        block = (ctypes.c_ubyte * size)()
        ctypes.memset(block, _NAN, size)
        return block

    def _is_device(self, address: int) -> bool:
        return address < self._next

    def _fail(self) -> None:
        """As a kernel that reads what is not there: the error stays."""
        self.error = ILLEGAL_ADDRESS
