"""Whatever happens to a server, it lives and answers the next good request."""

from __future__ import annotations

import random
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serving.parts import PICTURE, TOKEN, assert_answers, gone, score, serving, tiny, wait_until

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")

BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny(tmp_path / "tiny.onnx")


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
        wait_until(lambda: gone(hung.pid))
        wait_until(lambda: server.client.get("/readyz").status_code == 200)
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
                    ({"bias": float("nan")}, "not finite, on noise"),
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
        assert not any(line["level"] == "error" for line in server.log)  # nothing had to be tried again


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
    """Together they sent more than the bodies that are taken at a time."""
    with serving(model, tmp_path) as server:
        assert_answers(server)
        before = server.rss()
        for _ in range(40):
            with socket.create_connection(server.address) as client:
                client.sendall(
                    b"POST /v1/detect HTTP/1.1\r\nhost: x\r\ncontent-length: 60000000\r\n\r\n" + bytes(7 << 20)
                )
        wait_until(lambda: sum(line.get("status") == 499 for line in server.log) == 40)
        assert_answers(server)
        assert server.rss() - before < 60e6
        assert not any("traceback" in line for line in server.log)


def test_slow_clients_are_cut_off_and_others_do_not_notice(model: Path, tmp_path: Path) -> None:
    """Heads and bodies that come a byte at a time, as slow-loris sends them."""
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


def test_a_server_that_is_killed_takes_its_model_with_it(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path) as server:
        child = server.model.pid
        server.process.kill()
        wait_until(lambda: gone(child))
        server.code = -signal.SIGKILL
