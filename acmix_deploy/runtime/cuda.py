"""The few calls of CUDA's driver that running an engine takes, as objects that free what they hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from ctypes import byref, c_float, c_size_t, c_uint64, c_void_p
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from acmix_deploy import driver
from acmix_deploy.errors import CheckFailed, MissingComponent

if TYPE_CHECKING:
    from typing_extensions import Self


_HINT = "Install NVIDIA's driver; on a Jetson it comes with JetPack."
_NON_BLOCKING, _CAPTURE_OF_THIS_THREAD = 1, 1
_thread = threading.local()


def _use_device() -> None:
    """Have the calls of this thread go to the context on the first device that TensorRT uses too.

    Raises:
        MissingComponent: there is no driver, or no device that it can use.
    """
    if hasattr(_thread, "context"):
        return
    try:
        context = driver.made(c_void_p, "cuDevicePrimaryCtxRetain", driver.first_device())
        driver.call("cuCtxSetCurrent", context)
    except OSError as error:
        raise MissingComponent(f"engines run by CUDA's driver, which cannot be loaded: {error}", _HINT) from error
    except driver.DriverError as error:
        raise MissingComponent(f"there is no device to run an engine on: {error}", _HINT) from error
    _thread.context = context


class _Owned:
    """A handle of CUDA's that is given back once."""

    handle: c_void_p | None

    def __init__(self, handle: c_void_p, give_back: str) -> None:
        self.handle = handle
        self._give_back = give_back

    @property
    def address(self) -> int:
        """The handle as a number. Raises ValueError: it was given back."""
        if self.handle is None or self.handle.value is None:
            raise ValueError("it was given back")
        return self.handle.value

    def close(self) -> None:
        """Give it back; what CUDA says is left out, since after a kernel that failed every call repeats the failure."""
        if self.handle is not None:
            with suppress(CheckFailed, MissingComponent):
                _call(self._give_back, self.handle)
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
        super().__init__(_made("cuStreamCreate", _NON_BLOCKING), "cuStreamDestroy_v2")

    def synchronize(self) -> None:
        """Wait until all that was put on it is done. Raises CheckFailed: some of it failed."""
        _call("cuStreamSynchronize", self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """What ``work`` puts on this stream, as a graph; nothing of it runs now."""
        graph = c_void_p()
        _call("cuStreamBeginCapture_v2", self.handle, _CAPTURE_OF_THIS_THREAD)
        try:
            work()
        except BaseException:
            with suppress(CheckFailed):  # what was captured so far is of no use
                _call("cuStreamEndCapture", self.handle, byref(graph))
                _call("cuGraphDestroy", graph)
            raise
        _call("cuStreamEndCapture", self.handle, byref(graph))
        with _Owned(graph, "cuGraphDestroy"):
            return Graph(_made("cuGraphInstantiateWithFlags", graph, c_uint64(0)))


class Graph(_Owned):
    """A captured graph, ready to be launched. See :meth:`Stream.capture`."""

    def __init__(self, executable: c_void_p) -> None:
        super().__init__(executable, "cuGraphExecDestroy")

    def launch(self, stream: Stream) -> None:
        """Put it on a stream."""
        if self.handle is None:
            raise ValueError("the graph was captured for shapes, or for a context, that are gone")
        _call("cuGraphLaunch", self.handle, stream.handle)


class Event(_Owned):
    """A point in the work of a stream, with the time at which it was reached."""

    def __init__(self) -> None:
        super().__init__(_made("cuEventCreate", 0), "cuEventDestroy_v2")

    def record(self, stream: Stream) -> None:
        """Set it behind what is on the stream now."""
        _call("cuEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until it is reached."""
        _call("cuEventSynchronize", self.handle)

    def ms_since(self, start: Event) -> float:
        """Milliseconds from ``start`` to this event; both have been reached."""
        milliseconds = c_float()
        _call("cuEventElapsedTime", byref(milliseconds), start.handle, self.handle)
        return milliseconds.value


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
            device = _made("cuMemAlloc_v2", c_size_t(self.nbytes))
            self._device = stack.enter_context(_Owned(device, "cuMemFree_v2"))
            host = _made("cuMemHostAlloc", c_size_t(self.nbytes), 0)
            self._host = stack.enter_context(_Owned(host, "cuMemFreeHost"))
            self._held = stack.pop_all()

    @property
    def address(self) -> int:
        """Where the device's side begins."""
        return self._device.address

    @property
    def array(self) -> NDArray[Any]:
        """The host's side; not to be touched after :meth:`close`."""
        return np.asarray(_View(self._host.address, self.shape, self.dtype))

    def upload(self, stream: Stream) -> None:
        """Put a copy of the host's side to the device on a stream."""
        self._copy("cuMemcpyHtoDAsync_v2", self._device, self._host, stream)

    def download(self, stream: Stream) -> None:
        """Put a copy of the device's side to the host on a stream."""
        self._copy("cuMemcpyDtoHAsync_v2", self._host, self._device, stream)

    def close(self) -> None:
        """Free both sides."""
        self._held.close()

    def _copy(self, name: str, target: _Owned, source: _Owned, stream: Stream) -> None:
        _call(name, target.handle, source.handle, c_size_t(self.nbytes), stream.handle)


class _View:
    """Memory at an address, as NumPy takes it."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, False), "shape": shape, "typestr": dtype.str}


def _made(name: str, *arguments: Any) -> c_void_p:
    """The handle that a call makes. Raises what :func:`_call` does."""
    handle = c_void_p()
    _call(name, byref(handle), *arguments)
    return handle


def _call(name: str, *arguments: Any) -> None:
    """Call the driver.

    Raises:
        MissingComponent: too little memory, no driver, or no device.
        CheckFailed: the call fails otherwise, or work before it did.
    """
    _use_device()
    try:
        driver.call(name, *arguments)
    except driver.DriverError as error:
        if error.status != driver.OUT_OF_MEMORY:
            raise CheckFailed(str(error)) from error
        size = next((f" of {argument.value} bytes" for argument in arguments if isinstance(argument, c_size_t)), "")
        raise MissingComponent(
            f"too little device memory: {name}{size} failed",
            "End other programs on the device, or run smaller images or batches.",
        ) from error
