"""The HTTP application: routes, limits, a token, logs and metrics around a batcher."""

from __future__ import annotations

import hmac
import logging
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from importlib import resources
from typing import Any, Literal

import anyio
from anyio.to_thread import run_sync
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field
from starlette.applications import Starlette
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from acmix_deploy import __version__
from acmix_deploy.detection import pictures
from acmix_deploy.detection.boxes import Detection, named
from acmix_deploy.detection.images import decode
from acmix_deploy.detection.metadata import Task
from acmix_deploy.document import Document
from acmix_deploy.errors import AcmixDeployError, CheckFailed, UserError
from acmix_deploy.runtime.onnxruntime import usable_cores
from acmix_deploy.serving import kserve
from acmix_deploy.serving.batching import Batcher, Budget, Expired, Limits, Overloaded, Unavailable
from acmix_deploy.serving.worker import Setup

access = logging.getLogger("acmix_deploy.access")

MAX_BODY = 1 << 26
"""Bytes in a body: 64 MiB."""
MAX_BODIES = 4 * MAX_BODY
"""Bytes in all bodies that are being read or worked on."""
MAX_DECODED = 4 * pictures.MAX_PIXELS
"""Pixels in all pictures that are being decoded, wait or run."""
MAX_PICTURES = 16
"""In a request."""

_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_OPEN = frozenset({"/", "/healthz", "/readyz"})  # to everyone, also where there is a token
_CLIENT_GONE = 499  # as nginx logs it
_SECURITY = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
}


class Found(BaseModel):
    """What is in one picture."""

    width: int = Field(description="of the picture in pixels")
    height: int = Field(description="of the picture in pixels")
    detections: list[Detection] = Field(description="the highest score first")


class DetectResponse(Document):
    """The answer to ``POST /v1/detect``."""

    document: Literal["detect response"] = "detect response"
    model: str = Field(description="name of the model")
    images: list[Found] = Field(description="in the order of the request")


class ModelResponse(Document):
    """The answer to ``GET /v1/model``."""

    document: Literal["model response"] = "model response"
    model: str = Field(description="name of the model")
    version: str = Field(description="of acmix-deploy, which serves it")
    task: Task = Field(description="what it finds")
    classes: dict[int, str] = Field(description="names by index; none where the file tells none")
    width: int = Field(description="of the model's input in pixels, to which pictures are fitted")
    height: int = Field(description="of the model's input in pixels")
    max_batch: int = Field(description="pictures in a run at most")
    confidence: float = Field(
        description="score that detections are above; 0 of classify, whose best classes are told whatever their scores"
    )
    max_bytes: int = Field(description="in the body of a request")


class Metrics:
    """What Prometheus is told."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "acmix_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "acmix_request_seconds",
            "From head to answer.",
            ("route",),
            registry=self.registry,
        )
        self.batches = Histogram(
            "acmix_batch_images", "Images in a run.", buckets=[1, 2, 4, 8, 16, 32, 64], registry=self.registry
        )
        self.runs = Histogram("acmix_run_seconds", "Of the model, on a batch.", registry=self.registry)

    def run(self, images: int, seconds: float) -> None:
        """A run of the model."""
        self.batches.observe(images)
        self.runs.observe(seconds)

    def watch(self, batcher: Batcher) -> None:
        """Have the state of a batcher told."""
        held = Gauge("acmix_images_in_progress", "Images that wait or run.", registry=self.registry)
        held.set_function(lambda: batcher.places.held)
        starts = Gauge("acmix_model_loads", "How often a model was loaded.", registry=self.registry)
        starts.set_function(lambda: batcher.starts)


class Api:
    """The routes of a server of one model."""

    def __init__(self, setup: Setup, limits: Limits, token: str | None = None) -> None:
        self.metrics = Metrics()
        self.batcher = Batcher(setup, limits, self.metrics.run)
        self.metrics.watch(self.batcher)
        self._token = token
        self._bodies = Budget(MAX_BODIES, "bytes")
        self._decoded = Budget(MAX_DECODED, "pixels")
        self._most = min(MAX_PICTURES, limits.max_queue)
        self._threads = anyio.CapacityLimiter(usable_cores())
        self._parsing = anyio.CapacityLimiter(1)  # JSON becomes large, and Python reads no two at a time anyway

    def app(self) -> ASGIApp:
        """The whole of it as an application; :attr:`batcher` has to be open while it runs."""
        model = "/v2/models/{name}"
        routes = [
            Route("/", self.page),
            Route("/healthz", self.alive),
            Route("/readyz", self.ready),
            Route("/metrics", self.tell_metrics),
            Route("/v1/model", self.model),
            Route("/v1/detect", self.detect, methods=["POST"]),
            Route("/v1/reload", self.reload, methods=["POST"]),
            Route("/v2", self.kserve_server),
            Route("/v2/health/live", self.alive),
            Route("/v2/health/ready", self.ready),
            *(
                route
                for path in (model, model + "/versions/{version}")
                for route in (
                    Route(path, self.kserve_model),
                    Route(path + "/ready", self.ready),
                    Route(path + "/infer", self.kserve_infer, methods=["POST"]),
                )
            ),
        ]
        handlers: dict[Any, Any] = {
            HTTPException: lambda request, error: _refusal(request, error.status_code, error.detail, error.headers),
            Overloaded: lambda request, error: _refusal(request, 429, str(error), {"retry-after": "1"}),
            Unavailable: lambda request, error: _refusal(request, 503, str(error), {"retry-after": "1"}),
            Expired: lambda request, error: _refusal(request, 504, str(error)),
            TimeoutError: lambda request, error: _refusal(request, 504, "the pictures were not decoded in time"),
            UserError: lambda request, error: _refusal(request, 400, error.message),
            pictures.Broken: lambda request, error: _refusal(request, 400, str(error)),
            pictures.TooLarge: lambda request, error: _refusal(request, 413, str(error)),
            pictures.NoPicture: lambda request, error: _refusal(request, 415, str(error)),
            ClientDisconnect: lambda request, error: Response(status_code=_CLIENT_GONE),
            Exception: lambda request, error: _refusal(request, 500, "a fault of the server; its log tells more"),
        }
        return _Observed(Starlette(routes=routes, exception_handlers=handlers), self.metrics, self._token)

    async def page(self, request: Request) -> Response:
        """Drop a picture, see the boxes."""
        text = resources.files("acmix_deploy.serving").joinpath("page.html").read_text(encoding="utf-8")
        return Response(text, media_type="text/html", headers=_SECURITY)

    async def alive(self, request: Request) -> Response:
        """The process answers."""
        self._named(request)
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """The model answers."""
        self._named(request)
        if not await self.batcher.ready():
            raise Unavailable("the model does not answer")
        return JSONResponse({"ready": True})

    async def tell_metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self.metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def model(self, request: Request) -> Response:
        """What is served."""
        served = self.batcher.served
        height, width = served.input_shape[2:]
        return _json(
            ModelResponse(
                model=served.name,
                version=__version__,
                task=served.task,
                classes=served.names,
                width=width,
                height=height,
                max_batch=served.max_batch,
                confidence=served.confidence,
                max_bytes=MAX_BODY,
            )
        )

    async def detect(self, request: Request) -> Response:
        """Pictures in, boxes out, and in Server-Timing the time of each step."""
        steps = _Steps()
        async with _body(request, self._bodies, self.batcher.limits.deadline) as body:
            files = await _files(request, body, self._most)
            steps.end("read")
            pixels = sum(map(pictures.pixels, files))
            if pixels > MAX_DECODED:
                raise HTTPException(413, f"at most {MAX_DECODED / 1e6:.1f} million pixels are taken in a request")
            with self.batcher.places.hold(len(files)), self._decoded.hold(pixels):
                with anyio.fail_after(self.batcher.limits.deadline):
                    images = [await run_sync(decode, file, limiter=self._threads) for file in files]
                steps.end("decode")
                found, times = await self.batcher.detect(images)
                steps.tell({"wait": times.waited, "copy": times.copied, **times.ran})
        served = self.batcher.served
        response = DetectResponse(
            model=served.name,
            images=[
                Found(width=image.shape[1], height=image.shape[0], detections=named(boxes, served.names))
                for image, boxes in zip(images, found, strict=True)
            ],
        )
        answer = _json(response)
        steps.end("encode")
        answer.headers["server-timing"] = steps.header()
        return answer

    async def reload(self, request: Request) -> Response:
        """Serve the model's file as it is now."""
        if not self._token:
            raise HTTPException(403, "reloading is off; start the server with --token-file to have it on")
        try:
            await self.batcher.reload()
        except AcmixDeployError as error:
            raise HTTPException(409, f"the old model stays: {error.message}") from error
        return JSONResponse({"model": self.batcher.served.name, "loads": self.batcher.starts})

    async def kserve_server(self, request: Request) -> Response:
        """Metadata of the server."""
        return JSONResponse(kserve.server_metadata())

    async def kserve_model(self, request: Request) -> Response:
        """Metadata of the model."""
        self._named(request)
        return JSONResponse(kserve.model_metadata(self.batcher.served))

    async def kserve_infer(self, request: Request) -> Response:
        """Arrays in, arrays out."""
        self._named(request)
        served = self.batcher.served
        async with _body(request, self._bodies, self.batcher.limits.deadline) as body:
            length = request.headers.get(kserve.HEADER_LENGTH)
            asked = await run_sync(kserve.parse, body, length, served, limiter=self._parsing)
            batch = max((len(array) for array in asked.feed.values() if array.ndim), default=1)
            if batch > (most := max(served.max_batch, served.input_shape[0])):
                raise HTTPException(413, f"at most {most} images are taken in a run")
            with self.batcher.places.hold(batch):
                try:
                    outputs = await self.batcher.infer(asked.feed)
                except CheckFailed as error:  # such as a size that does not fit the model's strides
                    raise HTTPException(422, error.message) from error
        content, headers = await run_sync(kserve.answer, asked, outputs, served, limiter=self._threads)
        return Response(content, headers=headers)

    def _named(self, request: Request) -> None:
        """Raises HTTPException where a path names another model or version."""
        name, version = request.path_params.get("name"), request.path_params.get("version", "1")
        served = self.batcher.served.name
        if name not in (None, served) or version != "1":
            raise HTTPException(404, f"there is the model {served} in version 1 alone")


class _Steps:
    """The seconds of a request's steps, from its head on."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def end(self, name: str) -> None:
        """A step is over, which began where the last one ended."""
        self.tell({name: time.perf_counter() - self._began})

    def tell(self, seconds: Mapping[str, float]) -> None:
        """Steps are over whose time was taken elsewhere."""
        self._seconds |= seconds
        self._began = time.perf_counter()

    def header(self) -> str:
        """The value of Server-Timing, in milliseconds. Source: W3C, Server Timing, section 3."""
        return ", ".join(f"{name};dur={1e3 * seconds:.2f}" for name, seconds in self._seconds.items())


class _Observed:
    """Around everything: a request's id, whether its sender may, its line in the log, its metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics, token: str | None) -> None:
        self._app, self._metrics = app, metrics
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope["state"] = {"id": request_id, "read": False}
        start, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] += [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            if self._token and scope["path"] not in _OPEN and not _carries(headers, self._token):
                refusal = _refusal(Request(scope), 401, "a token is needed", {"www-authenticate": "Bearer"})
                await refusal(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("endpoint"), "__name__", "none")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            told = {"id": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            client = (scope.get("client") or ("",))[0]
            access.info("request", extra={"told": {**told, "ms": round(1e3 * seconds, 1), "client": client}})


def _json(document: Document) -> Response:
    return Response(document.model_dump_json(by_alias=True, exclude_none=True), media_type="application/json")


def _carries(headers: Headers, token: str) -> bool:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _refusal(request: Request, status: int, why: str, headers: Mapping[str, str] | None = None) -> Response:
    """A sentence instead of an answer; the connection goes with a body that nobody read."""
    unread = not request.state.read and request.method not in ("GET", "HEAD")
    return JSONResponse(
        {"error": why, "request_id": request.state.id},
        status,
        {**(headers or {}), **({"connection": "close"} if unread else {})},
    )


@asynccontextmanager
async def _body(request: Request, budget: Budget, seconds: float) -> AsyncIterator[bytes]:
    """The body of a request, which counts for as long as the block lasts.

    Raises:
        HTTPException: it is compressed, larger than :data:`MAX_BODY`, or not there in as many seconds.
        Overloaded: there are too many others.
        ClientDisconnect: the client is gone.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "compressed bodies are not taken")
    too_large = HTTPException(413, f"at most {MAX_BODY} bytes are taken")
    if int(request.headers.get("content-length", 0)) > MAX_BODY:
        raise too_large
    body = bytearray()
    with ExitStack() as held:
        try:
            with anyio.fail_after(seconds):
                async for chunk in request.stream():
                    held.enter_context(budget.hold(len(chunk)))
                    body += chunk
                    if len(body) > MAX_BODY:
                        raise too_large
        except TimeoutError as error:
            raise HTTPException(408, f"the body was not there in {seconds:g} s") from error
        request.state.read = True
        yield bytes(body)


class _InMemory(MultiPartParser):
    """Parts stay in memory, where the body is as well."""

    spool_max_size = MAX_BODY


async def _files(request: Request, body: bytes, most: int) -> list[bytes]:
    """The pictures in a body, which is one or, in multipart/form-data, has them as its files.

    Raises:
        HTTPException: there is none, there are too many, or it is no multipart/form-data.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/"):
        return [body]

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await _InMemory(request.headers, stream(), max_files=most, max_fields=most).parse()
    except MultiPartException as error:
        raise HTTPException(400, error.message) from error
    files = [await part.read() for _, part in form.multi_items() if isinstance(part, UploadFile)]
    await form.close()
    if not files:
        raise HTTPException(400, "no file is in this multipart/form-data")
    return files
