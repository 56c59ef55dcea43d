"""Bodies and heads that are nearly right: each is answered as what it is, and the server lives."""

from __future__ import annotations

import io
import json
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.serving.parts import PICTURE, SOAK, SOAK_FORM, assert_answers, serving, tiny

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

pytestmark = SOAK_FORM

MALFORMED = 10_000 if SOAK else 500


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny(tmp_path / "tiny.onnx")


def mutated(source: random.Random, data: bytes) -> bytes:
    """Some bytes flipped, removed, doubled or replaced."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 8)):
        at = source.randrange(len(changed) + 1)
        kind = source.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << source.randrange(8)
        elif kind == 1:
            del changed[at : at + source.randint(1, 200)]
        elif kind == 2:
            changed[at:at] = changed[at : at + source.randint(1, 200)]
        elif kind == 3:
            changed[at : at + 4] = source.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"{[\"'"])
        else:
            del changed[at:]
    return bytes(changed)


def malformed(source: random.Random) -> Iterator[tuple[str, bytes, dict[str, str]]]:
    """Paths, bodies and headers that are nearly right, without end."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    pictures = [bytes(cv2.imencode(suffix, noise)[1]) for suffix in (".png", ".jpg", ".webp")]
    sent = httpx.Request("POST", "http://x", files=[("a", ("a.png", io.BytesIO(one))) for one in pictures])
    multipart, kind = sent.read(), sent.headers["content-type"]
    node = {"name": "images", "shape": [1, 3, 32, 32], "datatype": "FP32"}
    binary = json.dumps({"inputs": [{**node, "parameters": {"binary_data_size": 12288}}]}).encode()
    plain = json.dumps({"inputs": [{**node, "data": [0.5] * 3072}], "outputs": [{"name": "output0"}]}).encode()
    infer = "/v2/models/tiny/infer"
    makers: list[Callable[[], tuple[str, bytes, dict[str, str]]]] = [
        lambda: ("/v1/detect", mutated(source, source.choice(pictures)), {}),
        lambda: ("/v1/detect", mutated(source, multipart), {"content-type": kind}),
        lambda: ("/v1/detect", multipart, {"content-type": mutated(source, kind.encode()).decode("latin-1")}),
        lambda: ("/v1/detect", source.randbytes(source.randrange(300)), {}),
        lambda: (infer, mutated(source, plain), {}),
        lambda: (infer, mutated(source, plain[:120]) + plain[120:], {}),
        lambda: (
            infer,
            mutated(source, binary + bytes(12288)),
            {"inference-header-content-length": str(len(binary) + source.choice([0, 0, 0, -1, 1, 99999]))},
        ),
        lambda: (infer, mutated(source, binary) + bytes(12288), {"inference-header-content-length": str(len(binary))}),
    ]
    while True:
        path, body, headers = source.choice(makers)()
        kept = {name: value.strip() for name, value in headers.items() if value.isprintable() and value.isascii()}
        yield path, body, kept


def test_malformed_bodies(model: Path, tmp_path: Path) -> None:
    """Each is answered as what it is; none with a fault of the server, nor with its traceback."""
    allowed = {200, 400, 413, 415, 422}
    seen = set()
    with serving(model, tmp_path) as server:
        bodies = malformed(random.Random(5))
        for index in range(MALFORMED):
            path, body, headers = next(bodies)
            response = server.client.post(path, content=body, headers=headers)
            assert response.status_code in allowed, (response.text, path, headers, body[:2000])
            assert "Traceback" not in response.text
            seen.add(response.status_code)
            if index % 25 == 0:
                assert_answers(server)
            if index == 200:
                before = server.rss()
        assert server.rss() - before < 30e6
        assert seen >= {200, 400, 415}
        assert "acmix_model_loads 1.0" in server.client.get("/metrics").text
        assert not any("traceback" in line for line in server.log)


def test_malformed_http(model: Path, tmp_path: Path) -> None:
    source = random.Random(6)
    head = b"POST /v1/detect?a=b HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ntransfer-encoding: chunked\r\n\r\n"
    whole = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(PICTURE), PICTURE)
    with serving(model, tmp_path) as server:
        for index in range(MALFORMED // 5):
            with socket.create_connection(server.address, timeout=30) as client:
                client.sendall(mutated(source, whole[:200]) + whole[200 : source.choice([200, 900, len(whole)])])
                client.shutdown(socket.SHUT_WR)
                try:
                    answer = client.recv(20)
                except ConnectionResetError:
                    answer = b""
                assert not answer or answer[9:12] in (b"200", b"400", b"404", b"405", b"413", b"415", b"431"), answer
            if index % 25 == 0:
                assert_answers(server)
