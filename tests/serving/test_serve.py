"""The server as its clients see it: pictures in, boxes out, and a sentence where there is none."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from acmix_deploy import __version__, cli
from acmix_deploy.detection.boxes import named
from acmix_deploy.detection.images import read
from acmix_deploy.serving.detector import Detector
from scripts import shapes
from scripts.load import Picture, known, same
from tests import ROOT
from tests.serving.parts import PICTURE, TOKEN, Server, constant, posed, serving, tiny, wait_until

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
for package in ("multipart", "prometheus_client", "starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A server sets it up for its process, which is this one where it does not start."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture(scope="module")
def pictures(shapes_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Picture]:
    return known(shapes_model, shapes.write(tmp_path_factory.mktemp("drawn"), seed=7, count=8))


@pytest.fixture(scope="module")
def server(shapes_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(shapes_model, tmp_path_factory.mktemp("server")) as running:
        yield running


def png(width: int, height: int) -> bytes:
    """A black picture of two colours, in few bytes."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width // 8 + 2)) for _ in range(height)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def encoded(image: np.ndarray, suffix: str) -> bytes:
    return bytes(cv2.imencode(suffix, image)[1])


def test_a_picture_is_answered_with_what_the_detector_finds(server: Server, pictures: list[Picture]) -> None:
    schema = json.loads((ROOT / "docs/schemas/detect-response.json").read_text(encoding="utf-8"))
    for picture in pictures:
        answer = server.detect(picture.data).json()
        assert (answer["schema"], answer["model"]) == (1, "shapes.fused")
        assert {*answer} == {*schema["properties"]}
        (image,) = answer["images"]
        assert (image["width"], image["height"]) == (shapes.SIZE, shapes.SIZE)
        assert picture.detections
        assert same(image["detections"], picture.detections)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_each_format_is_read_as_opencv_reads_it(
    server: Server, shapes_model: Path, tmp_path: Path, suffix: str
) -> None:
    (scene,) = shapes.images(3, 1)
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(encoded(np.pad(scene.image, ((0, 40), (30, 0), (0, 0))), suffix))
    image = read(path)
    assert image is not None
    with Detector.load(shapes_model, threads=1) as detector:
        right = named(detector([image])[0], detector.names)
    (found,) = server.detect(path.read_bytes()).json()["images"]
    assert (found["width"], found["height"]) == (190, 200)
    assert right
    assert same(found["detections"], right)


def test_quiet(shapes_model: Path, tmp_path: Path) -> None:
    """What goes wrong alone is in the log."""
    with serving(shapes_model, tmp_path, "--quiet") as server:
        assert server.detect(PICTURE).status_code == 200
        assert server.log == []


def test_what_is_served_is_told(shapes_model: Path, server: Server, tmp_path: Path) -> None:
    schema = json.loads((ROOT / "docs/schemas/model-response.json").read_text(encoding="utf-8"))
    answer = server.client.get("/v1/model").json()
    assert {*answer} == {*schema["properties"]}
    assert answer == {
        "document": "model response",
        "schema": 1,
        "model": "shapes.fused",
        "version": __version__,
        "task": "detect",
        "classes": {str(index): name for index, name in enumerate(shapes.NAMES)},
        "width": shapes.SIZE,
        "height": shapes.SIZE,
        "max_batch": 8,
        "confidence": 0.25,
        "max_bytes": 64 * 2**20,
    }
    wide = constant(
        tmp_path / "wide.onnx", np.full((1, 3), 1 / 3, np.float32), size=(32, 64), task="classify", names="{}"
    )
    (tmp_path / "token").write_text(TOKEN)
    options = ("--confidence", "0.5", "--max-batch", "2", "--token-file", str(tmp_path / "token"))
    with serving(wide, tmp_path, *options) as running:
        refused(running.client.get("/v1/model"), 401, "a token is needed")
        answer = running.client.get("/v1/model", headers={"authorization": f"Bearer {TOKEN}"}).json()
    told = {"task": "classify", "classes": {}, "width": 64, "height": 32, "max_batch": 2, "confidence": 0}
    assert {key: answer[key] for key in told} == told


def steps_of(response: httpx.Response) -> dict[str, float]:
    """Milliseconds by the name of a step, in their order."""
    found = [re.fullmatch(r"(\w+);dur=(\d+\.\d+)", part) for part in response.headers["server-timing"].split(", ")]
    assert all(found)
    return {one[1]: float(one[2]) for one in found if one}


def test_the_time_of_each_step_is_told(tmp_path: Path) -> None:
    def slowly() -> Iterator[bytes]:
        yield PICTURE[:9]
        time.sleep(0.3)
        yield PICTURE[9:]

    with serving(tiny(tmp_path / "tiny.onnx"), tmp_path, "--max-delay-ms", "200") as server:
        start = time.perf_counter()
        steps = steps_of(server.client.post("/v1/detect", content=slowly()))
        assert [*steps] == ["read", "decode", "wait", "copy", "fit", "run", "boxes", "encode"]
        assert 450 <= steps["read"] + steps["wait"] <= sum(steps.values()) <= 1e3 * (time.perf_counter() - start)
        assert steps["read"] >= 280
        assert steps["wait"] >= 190

        large = encoded(np.random.default_rng(0).integers(0, 255, (2000, 2000, 3), np.uint8), ".png")
        small, large_steps = steps_of(server.detect(PICTURE)), steps_of(server.detect(large))
        assert large_steps["decode"] > 2 * small["decode"]
        assert large_steps["copy"] > small["copy"]
        assert large_steps["fit"] > small["fit"]

        server.model.suspend()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.detect, PICTURE)
            wait_until(lambda: in_progress(server) == 1)
            time.sleep(0.6)
            server.model.resume()
            assert steps_of(waiting.result())["copy"] > 200
        assert "server-timing" not in server.detect(b"").headers


def test_several_pictures_in_one_request(server: Server, pictures: list[Picture]) -> None:
    files = [("picture", (f"{index}.png", picture.data)) for index, picture in enumerate(pictures)]
    answer = server.client.post("/v1/detect", files=files).json()
    assert len(answer["images"]) == len(pictures)
    for found, picture in zip(answer["images"], pictures, strict=True):
        assert same(found["detections"], picture.detections)


def test_what_a_task_has_beside_boxes_is_answered(tmp_path: Path) -> None:
    with serving(posed(tmp_path / "pose.onnx"), tmp_path) as running:
        (image,) = running.detect(encoded(np.zeros((64, 32, 3), np.uint8), ".png")).json()["images"]
    assert image["detections"] == [
        {"name": "thing", "score": 0.9, "box": [8, 24, 24, 40], "keypoints": [[12, 30, 1], [20, 34, 0.25]]}
    ]


def refused(response: httpx.Response, status: int, why: str) -> None:
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    answer = response.json()
    assert set(answer) == {"error", "request_id"}
    assert re.search(why, answer["error"])
    assert answer["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text


def test_what_is_no_picture_is_refused_in_a_sentence(server: Server, pictures: list[Picture]) -> None:
    data = pictures[0].data
    refused(server.detect(b""), 415, "not a picture in one of JPEG, PNG, WEBP")
    refused(server.detect(b"GIF89a" + data), 415, "not a picture")
    refused(server.detect(b"http://example.com/a.png"), 415, "not a picture")
    refused(server.detect(b"/etc/passwd"), 415, "not a picture")
    jpeg, webp = (encoded(cv2.imdecode(np.frombuffer(data, np.uint8), 1), suffix) for suffix in (".jpg", ".webp"))
    refused(server.detect(jpeg[: len(jpeg) // 2]), 400, "the picture is cut off")
    refused(server.detect(webp[:100] + bytes(50) + webp[150:]), 400, "the picture cannot be decoded")
    refused(server.detect(webp[: len(webp) // 2]), 400, "the picture cannot be decoded")
    refused(server.detect(webp[:20]), 400, "header cannot be read")
    refused(server.client.post("/v1/detect", files=[("a", ("a.png", b"x"))]), 415, "not a picture")
    refused(server.client.post("/v1/detect", files=[("a", ("a.png", data))] * 17), 400, "Too many files")
    refused(server.detect(data, headers={"content-type": "multipart/form-data"}), 400, "boundary")
    refused(server.detect(data, headers={"content-encoding": "gzip"}), 415, "compressed")
    refused(server.client.get("/v1/detect"), 405, "Method Not Allowed")
    refused(server.client.get("/nowhere"), 404, "Not Found")
    assert server.detect(data).status_code == 200


def test_large_pictures_and_bodies_are_refused_before_anything_is_decoded(
    server: Server, pictures: list[Picture]
) -> None:
    bomb = png(50_000, 50_000)
    assert len(bomb) < 400_000
    edge = png(8_200, 4_200)  # 34.4 million pixels, 103 MB decoded
    server.detect(pictures[0].data)
    before = server.rss()
    for data, why in ((bomb, "at most 33.6 million pixels"), (edge, "8200 x 4200: at most 33.6 million")):
        refused(server.detect(data), 413, why)
    refused(server.client.post("/v1/detect", files=[("a", pictures[0].data), ("b", bomb)]), 413, "million pixels")
    files = [("picture", png(8_000, 4_000))] * 5
    refused(server.client.post("/v1/detect", files=files), 413, "134.2 million pixels are taken in a request")
    assert server.rss() - before < 20e6

    with socket.create_connection(server.address) as client:
        client.sendall(b"POST /v1/detect HTTP/1.1\r\nhost: x\r\ncontent-length: 67108865\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 413")
    assert server.rss() - before < 20e6
    assert server.detect(pictures[0].data).status_code == 200


def test_opencv_refuses_too_what_is_too_large(tmp_path: Path) -> None:
    code = (
        "from acmix_deploy.detection import images, pictures; pictures.limit_opencv(); import sys\n"
        "try: images.decode(open(sys.argv[1], 'rb').read())\n"
        "except pictures.Broken: print('broken')"
    )
    (tmp_path / "edge.png").write_bytes(png(8_200, 4_200))
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "edge.png"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "broken\n", done.stderr


def test_requests_have_ids_and_lines_in_the_log(server: Server, pictures: list[Picture]) -> None:
    given = server.detect(pictures[0].data, headers={"x-request-id": "from-the-client.1"})
    assert given.headers["x-request-id"] == "from-the-client.1"
    made = server.detect(pictures[0].data, headers={"x-request-id": 'no"\\good'}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", made)
    assert made != server.detect(b"").headers["x-request-id"]

    wait_until(lambda: made in {line.get("id") for line in server.log})
    (line,) = (line for line in server.log if line.get("id") == made)
    assert {key: line[key] for key in ("level", "method", "path", "status", "client")} == {
        "level": "info", "method": "POST", "path": "/v1/detect", "status": 200, "client": "127.0.0.1"
    }  # fmt: skip
    assert line["ms"] > 0


def test_health_and_metrics(server: Server, pictures: list[Picture]) -> None:
    server.detect(pictures[0].data)
    server.detect(b"")
    assert server.client.get("/healthz").json() == {"live": True}
    assert server.client.get("/readyz").json() == {"ready": True}
    metrics = server.client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    found = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    assert float(found['acmix_requests_total{route="detect",status="200"}']) >= 1
    assert float(found['acmix_requests_total{route="detect",status="415"}']) >= 1
    assert float(found["acmix_batch_images_count"]) == float(found["acmix_run_seconds_count"]) >= 1
    assert float(found["acmix_images_in_progress"]) == 0
    assert float(found["acmix_model_loads"]) == 1


def in_progress(server: Server) -> float:
    (line,) = re.findall(r"^acmix_images_in_progress (.*)$", server.client.get("/metrics").text, re.M)
    return float(line)


def test_one_too_many_is_told_when_to_ask_again(tmp_path: Path) -> None:
    with serving(tiny(tmp_path / "tiny.onnx"), tmp_path, "--max-queue", "2") as server, ThreadPoolExecutor(2) as pool:
        server.model.suspend()
        waiting = [pool.submit(httpx.post, f"{server.url}/v1/detect", content=PICTURE, timeout=30) for _ in range(2)]
        wait_until(lambda: in_progress(server) == 2)
        response = server.detect(PICTURE)
        refused(response, 429, "2 of 2 images are being worked on")
        assert response.headers["retry-after"] == "1"
        server.model.resume()
        assert [one.result().status_code for one in waiting] == [200, 200]
        assert server.detect(PICTURE).status_code == 200


def test_reloading_is_off_without_a_token(server: Server) -> None:
    refused(server.client.post("/v1/reload"), 403, "reloading is off")


def test_a_fault_of_the_server_is_told_to_its_log_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from acmix_deploy.serving.app import Api
    from acmix_deploy.serving.batching import Limits
    from acmix_deploy.serving.worker import Setup

    async def fails(self: Api, request: object) -> None:
        raise RuntimeError("a secret of the server")

    monkeypatch.setattr(Api, "page", fails)
    app = Api(Setup(Path("none.onnx")), Limits()).app()

    async def ask(to_the_log: bool) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=to_the_log)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.get("/")

    response = asyncio.run(ask(to_the_log=False))
    refused(response, 500, "a fault of the server")
    assert "secret" not in response.text
    with pytest.raises(RuntimeError, match="secret"):
        asyncio.run(ask(to_the_log=True))


def test_pictures_that_take_long_to_decode_have_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is being decoded is waited for; those behind it are not begun."""
    from acmix_deploy.serving import app
    from acmix_deploy.serving.app import Api
    from acmix_deploy.serving.batching import Limits
    from acmix_deploy.serving.worker import Setup

    begun: list[bytes] = []
    monkeypatch.setattr(app, "decode", lambda data: (begun.append(data), time.sleep(0.2)))

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Api(Setup(Path("none.onnx")), Limits(deadline=0.3)).app())
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post("/v1/detect", files=[("a", PICTURE)] * 6)

    refused(asyncio.run(ask()), 504, "not decoded in time")
    assert len(begun) == 2


def test_only_this_machine_is_listened_to_by_default(server: Server) -> None:
    assert server.address[0] == "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; tells the address of the way out
        own = probe.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("this machine has no address but its loopback")
    with pytest.raises(OSError, match=r"refused|unreachable"):
        socket.create_connection((own, server.address[1]), timeout=5)


def test_a_token_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    with serving(tiny(tmp_path / "tiny.onnx"), tmp_path, "--token-file", str(tmp_path / "token")) as server:
        for path in ("/", "/healthz", "/readyz"):
            assert server.client.get(path).status_code == 200
        for headers in ({}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": f"Basic {TOKEN}"}):
            response = server.detect(PICTURE, headers=headers)
            refused(response, 401, "a token is needed")
            assert response.headers["www-authenticate"] == "Bearer"
            for path in ("/metrics", "/v2", "/v2/models/tiny"):
                refused(server.client.get(path, headers=headers), 401, "a token is needed")
            refused(server.client.post("/v1/reload", headers=headers), 401, "a token is needed")
        for scheme in ("Bearer", "bearer"):  # RFC 9110, section 11.1: case does not matter
            response = server.detect(PICTURE, headers={"authorization": f"{scheme} {TOKEN}"})
            assert response.json()["images"][0]["detections"]


@pytest.mark.parametrize("content", ["", "short", "with spaces in it, long", "é" * 20])
def test_a_token_has_to_be_one(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "token").write_text(content)
    model = tiny(tmp_path / "tiny.onnx")
    assert cli.main(["serve", str(model), "--port", "0", "--token-file", str(tmp_path / "token")]) == 2
    assert "token" in capsys.readouterr().err


def test_what_has_begun_is_finished_at_the_end(shapes_model: Path, tmp_path: Path, pictures: list[Picture]) -> None:
    """SIGTERM to both processes, as systemd sends it, while requests wait."""
    with serving(shapes_model, tmp_path, "--max-batch", "1") as server:
        server.detect(pictures[0].data)
        answers: list[httpx.Response] = []
        clients = [
            threading.Thread(
                target=lambda one=one: answers.append(httpx.post(f"{server.url}/v1/detect", content=one.data))
            )
            for one in pictures
            for _ in range(5)
        ]
        for client in clients:
            client.start()
        wait_until(lambda: in_progress(server) + len(answers) >= len(clients))
        assert in_progress(server)
        server.client.close()
        server.model.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join()
        assert server.process.wait(timeout=30) == 0
        assert [answer.status_code for answer in answers] == [200] * len(clients)
        assert all(answer.json()["images"][0]["detections"] for answer in answers)
        assert not any(line["level"] == "error" for line in server.log)


def test_an_address_in_use_and_a_file_that_is_none_are_told(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny(tmp_path / "tiny.onnx")
    assert cli.main(["serve", str(model), "--port", str(server.address[1])]) == 2
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path / "none.onnx"), "--port", "0"]) == 2
    assert "none.onnx does not exist" in capsys.readouterr().err


def test_nothing_heavy_is_needed(tmp_path: Path) -> None:
    """Neither the server nor its model's process imports what made the model."""
    blocked = (
        "import sys\nfor name in ('torch', 'onnx', 'ultralytics', 'onnx_graphsurgeon'): sys.modules[name] = None\n"
    )
    (tmp_path / "sitecustomize.py").write_text(blocked)
    model = tiny(tmp_path / "tiny.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        check = [sys.executable, "-c", "import torch"]
        assert b"ModuleNotFoundError" in subprocess.run(check, capture_output=True, check=False).stderr
        with serving(model, tmp_path) as server:
            assert server.detect(PICTURE).json()["images"][0]["detections"][0]["name"] == "thing"


def test_waiting_for_others_is_all_that_a_single_request_waits_for(tmp_path: Path) -> None:
    """Neither for an acknowledgement by TCP, which takes 40 ms, nor for a batch that does not fill."""
    with serving(tiny(tmp_path / "tiny.onnx"), tmp_path) as server:
        seconds = []
        for _ in range(30):
            start = time.perf_counter()
            server.detect(PICTURE)
            seconds.append(time.perf_counter() - start)
    assert np.quantile(seconds, 0.25) < 0.035


def test_the_document_on_stdout(server: Server) -> None:
    assert server.document == {"document": "serve", "schema": 1, "url": server.url, "model": "shapes.fused"}
