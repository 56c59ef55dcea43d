"""The line between a client and the device of the tests: a TCP proxy that counts, and that can be cut or frozen."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST, as a box does that forgot the connection

Direction = Literal["sent", "received"]


class Proxy:
    """A port on 127.0.0.1 whose connections are carried to sockets that `serve` is given the numbers of.

    `connections` counts those that were made, `sent` and `received` the bytes from and to the client since the start.
    """

    def __init__(self, serve: Callable[[int], None]) -> None:
        self.connections = self.sent = self.received = 0
        self._serve = serve
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._passing = threading.Event()
        self._passing.set()
        self._up = True
        self._limit: tuple[Direction, int] | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def open(self) -> int:
        """Connections that stand now, such as that of an ssh which a ControlMaster left behind."""
        with self._lock:
            return len(self._pairs)

    def cut(self) -> None:
        """End every connection at once, on both sides; new ones are taken."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for end in (end for pair in pairs for end in pair):
            _reset(end)

    def cut_after(self, direction: Direction, count: int) -> None:
        """Cut once `count` more bytes went from ("sent") or to ("received") the client."""
        self._limit = (direction, getattr(self, direction) + count)

    def down(self) -> None:
        """Cut, and end at once what connects from now on, until `up`."""
        self._up = False
        self.cut()

    def up(self) -> None:
        self._up = True

    def freeze(self) -> None:
        """Carry nothing until `thaw`, and tell nobody, as where a cable was pulled; new connections get no answer."""
        self._passing.clear()

    def thaw(self) -> None:
        self._passing.set()

    def close(self) -> None:
        self.down()
        self._passing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if not self._up:
                _reset(client)
                continue
            # TCP on the other side too: sshd asks for addresses.
            with socket.create_server(("127.0.0.1", 0)) as listener:
                near = socket.create_connection(listener.getsockname())
                far, _ = listener.accept()
            self._serve(far.fileno())
            far.close()
            pair = (client, near)
            with self._lock:
                self._pairs.append(pair)
            threading.Thread(target=self._carry, args=pair, daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError, ValueError):
            for end in other:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(end, selectors.EVENT_READ)
            while selector.get_map():
                # Woken now and then, since closing a socket in another thread does not wake a selector.
                for key, _ in selector.select(timeout=0.05):
                    self._passing.wait()
                    source: socket.socket = key.fileobj  # type: ignore[assignment]
                    if data := source.recv(1 << 16):
                        other[source].sendall(data)
                        self._count("sent" if source is client else "received", len(data))
                    else:
                        selector.unregister(source)
                        other[source].shutdown(socket.SHUT_WR)
                if client.fileno() < 0:
                    return
        with self._lock:
            if (client, server) in self._pairs:
                self._pairs.remove((client, server))
        for end in other:
            end.close()

    def _count(self, direction: Direction, count: int) -> None:
        with self._lock:
            setattr(self, direction, getattr(self, direction) + count)
            reached = self._limit and getattr(self, self._limit[0]) >= self._limit[1]
        if reached:
            self._limit = None
            self.cut()


def _reset(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.shutdown(socket.SHUT_RDWR)
    end.close()
