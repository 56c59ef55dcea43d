"""Whatever happens to a server, it lives and answers the next good request."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving_parts import SOAK, TOKEN, Server, gone, serving, soak_form, tiny, wait_until

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

PICTURE = bytes(cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))[1])
BEARER = {"authorization": f"Bearer {TOKEN}"}
MALFORMED = 10_000 if SOAK else 500


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny(tmp_path / "tiny.onnx")


def score(response: httpx.Response) -> float:
    """Of the one box that the tiny model finds."""
    assert response.status_code == 200, response.text
    ((detection,),) = [image["detections"] for image in response.json()["images"]]
    return float(detection["score"])


def assert_answers(server: Server, **options: object) -> None:
    assert score(server.detect(PICTURE, **options)) == pytest.approx(0.9)


def test_a_killed_model_is_started_again(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server, ThreadPoolExecutor(4) as pool:
        assert_answers(server)
        for _ in range(2):  # while it has nothing to do
            server.model.kill()
            assert_answers(server)
        stopped = server.model
        stopped.suspend()  # while it is at work
        waiting = [pool.submit(httpx.post, f"{server.url}/v1/detect", content=PICTURE) for _ in range(4)]
        time.sleep(0.3)
        stopped.kill()
        assert [score(one.result()) for one in waiting] == pytest.approx([0.9] * 4)
        assert any("SIGKILL" in line["message"] for line in server.log)
        assert "acmix_model_loads 4.0" in server.client.get("/metrics").text


def test_a_model_that_stops_answering_is_not_ready_and_is_started_again(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path, "--deadline-ms", "1500") as server:
        assert_answers(server)
        assert server.client.get("/readyz").status_code == 200
        hung = server.model
        hung.suspend()
        assert server.detect(PICTURE).status_code == 504
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
        assert gone(hung.pid)
        assert_answers(server)
        server.model.suspend()
        wait_until(lambda: server.client.get("/readyz").status_code == 503)
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
        assert server.client.get("/healthz").status_code == 200
        assert_answers(server)


def test_a_file_that_became_garbage_harms_nobody_until_it_is_needed(model: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    good = tmp_path / "good.onnx"
    shutil.copy(model, good)
    with serving(model, tmp_path, "--token-file", str(tmp_path / "token")) as server:
        server.client.headers.update(BEARER)
        model.write_bytes(random.Random(0).randbytes(3000))
        assert_answers(server)
        response = server.client.post("/v1/reload")
        assert response.status_code == 409
        assert "the old model stays" in response.json()["error"]
        assert_answers(server)

        server.model.kill()
        response = server.detect(PICTURE)
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert "does not start" in response.json()["error"]
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/healthz").status_code == 200

        shutil.copy(good, model)
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
        assert_answers(server)


def test_another_model_takes_over_without_a_request_lost(model: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with serving(model, tmp_path, "--token-file", str(tmp_path / "token")) as server:
        server.client.headers.update(BEARER)
        scores: list[float] = []
        stop = threading.Event()

        def client() -> None:
            with httpx.Client(base_url=server.url, headers=BEARER, timeout=30) as own:
                while not stop.is_set():
                    scores.append(score(own.post("/v1/detect", content=PICTURE)))

        with ThreadPoolExecutor(3) as pool:
            clients = [pool.submit(client) for _ in range(3)]
            try:
                for bias in (0.02, 0.04, 0.06):
                    first = server.model.pid
                    tiny(model, bias=bias)
                    assert server.client.post("/v1/reload").status_code == 200
                    assert score(server.detect(PICTURE)) == pytest.approx(0.9 + bias)
                    wait_until(lambda first=first: gone(first))
                for change, why in (
                    ({"names": "{0: 'other'}"}, "its names were"),
                    ({"batch": 1}, "its inputs were"),
                    ({"bias": float("nan")}, "not finite on noise"),
                ):
                    tiny(model, **change)
                    response = server.client.post("/v1/reload")
                    assert (response.status_code, why in response.json()["error"]) == (409, True), response.text
                    assert score(server.detect(PICTURE)) == pytest.approx(0.96)
            finally:
                stop.set()
            for one in clients:
                one.result()
        assert {round(one, 2) for one in scores} == {0.9, 0.92, 0.94, 0.96}
        assert len(scores) > 20


def test_a_full_disk_stops_the_log_alone(model: Path, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    with serving(model, tmp_path, stderr=full) as server:
        for _ in range(5):
            assert_answers(server)
        server.model.kill()
        assert_answers(server)


def test_clients_that_leave_in_mid_upload_leave_nothing_behind(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server:
        assert_answers(server)
        before = server.rss()
        for _ in range(40):
            with socket.create_connection(server.address) as client:
                client.sendall(
                    b"POST /v1/detect HTTP/1.1\r\nhost: x\r\ncontent-length: 60000000\r\n\r\n" + bytes(1 << 20)
                )
        wait_until(lambda: sum(line.get("status") == 499 for line in server.log) == 40)
        for _ in range(20):  # more than fit at a time, were the others still counted
            assert_answers(server)
        assert server.rss() - before < 60e6
        assert not any("traceback" in line for line in server.log)


def test_slow_clients_are_cut_off_and_others_do_not_notice(model: Path, tmp_path: Path) -> None:
    """Heads and bodies that come a byte at a time: slow-loris. More of them than there may be connections."""
    with serving(model, tmp_path, "--deadline-ms", "2000") as server:
        heads = [socket.create_connection(server.address) for _ in range(60)]
        bodies = [socket.create_connection(server.address) for _ in range(60)]
        after_one = socket.create_connection(server.address)
        after_one.sendall(b"GET /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        start = time.monotonic()
        for client in heads:
            client.sendall(b"POST /v1/detect HTTP/1.1\r\n")
        for client in bodies:
            client.sendall(b"POST /v1/detect HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        open_ones = [*heads, *bodies, after_one]
        while open_ones and time.monotonic() - start < 8:
            for client in [*open_ones]:
                try:
                    client.sendall(b"x")
                except OSError:
                    open_ones.remove(client)
            assert_answers(server)
            time.sleep(0.1)
        assert not open_ones
        assert time.monotonic() - start > 1.5
        statuses = [line.get("status") for line in server.log]
        assert statuses.count(408) == len(bodies)


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
        yield path, body, {name: value for name, value in headers.items() if value.isprintable() and value.isascii()}


@soak_form
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


@soak_form
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


def test_a_server_that_is_killed_takes_its_model_with_it(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server:
        child = server.model.pid
        server.process.kill()
        wait_until(lambda: gone(child))
        server.code = -signal.SIGKILL
