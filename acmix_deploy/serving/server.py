"""The process that serves: a socket, uvicorn with a deadline for heads, and an end that lets requests finish."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import signal
import socket
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Literal

import uvicorn
from pydantic import Field
from uvicorn.protocols.http.h11_impl import H11Protocol

from acmix_deploy.document import Document
from acmix_deploy.errors import UserError
from acmix_deploy.serving.app import Api
from acmix_deploy.serving.batching import Limits
from acmix_deploy.serving.worker import Setup

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
"""At a time; others are answered with 503."""


class ServeDocument(Document):
    """What ``acmix-deploy serve --json`` prints once requests are taken."""

    document: Literal["serve"] = "serve"
    url: str = Field(description="where it listens")
    model: str = Field(description="name of the model")


class Protocol(H11Protocol):
    """Closes connections on which no head arrives in as long as they are kept alive, which uvicorn leaves open."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(transport)
        self._wait_for_head()

    def on_response_complete(self) -> None:
        """An answer was sent."""
        self._wait_for_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        if self._late:
            self._late.cancel()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        if self._late:
            self._late.cancel()
        self._late = self.loop.call_later(self.timeout_keep_alive, self._close_if_waiting)

    def _close_if_waiting(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Time in UTC, level, logger, message, what a request's line tells, and the traceback where there is one."""
        at = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": at, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        line.update(getattr(record, "told", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def serve(
    setup: Setup,
    limits: Limits,
    *,
    host: str,
    port: int,
    token: str | None = None,
    started: Callable[[ServeDocument], None] = lambda document: None,
) -> None:
    """Serve a model until SIGINT or SIGTERM, then finish what has begun.

    Args:
        setup: the model.
        limits: of time and places.
        host: address to listen at.
        port: the same; a free one with 0.
        token: that clients have to bring, if any.
        started: told where, once requests are taken.

    Raises:
        UserError: the address cannot be listened at.
        AcmixDeployError: the model does not load.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    asyncio.run(_serve(setup, limits, host, port, token, started))


async def _serve(
    setup: Setup, limits: Limits, host: str, port: int, token: str | None, started: Callable[[ServeDocument], None]
) -> None:
    api = Api(setup, limits, token)
    with _listening(host, port) as listening:
        log.info("loading %s", setup.path)
        await api.batcher.open()
        try:
            config = uvicorn.Config(
                api.app(),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=math.ceil(limits.deadline),
                timeout_graceful_shutdown=math.ceil(2 * limits.deadline),
            )
            name = f"[{host}]" if ":" in host else host
            url = f"http://{name}:{listening.getsockname()[1]}"
            served = api.batcher.served
            if served.note:
                log.warning("%s", served.note)
            log.info("serving %s at %s", served.name, url)
            started(ServeDocument(url=url, model=served.name))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn sends itself again what it was ended with
            await uvicorn.Server(config).serve(sockets=[listening])
        finally:
            await api.batcher.close()


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family, backlog=MAX_CONNECTIONS)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen at {host}:{port}: {error}", "Choose another --host or --port.") from error
    # Connections inherit it. asyncio sets it where a socket tells its protocol, as this one does not, and without it a
    # body waits 40 ms for the head's acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
