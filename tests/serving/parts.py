"""Servers in processes of their own, and what they are asked."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from acmix_deploy.detection.boxes import Detections
from acmix_deploy.detection.images import Placement
from acmix_deploy.serving.detector import Fitted

SOAK = bool(os.environ.get("ACMIX_SOAK"))
SOAK_FORM = [pytest.mark.soak] if SOAK else []
"""Of tests with a short form, and a long one for `make soak`, which asks for the mark."""

TOKEN = "a-token-for-tests"

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
PICTURE = bytes(cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))[1])


class Server:
    """``acmix-deploy serve`` as its users start it."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self._log, self.code = process, log, 0
        assert process.stdout
        line = process.stdout.readline()
        assert line, log.read_text()
        self.document: dict[str, Any] = json.loads(line)
        self.url: str = self.document["url"]
        self.client = httpx.Client(base_url=self.url, timeout=30)

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        assert url.port
        return url.host, url.port

    @property
    def log(self) -> list[dict[str, Any]]:
        """Its lines so far; others are those of libpng."""
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]

    @property
    def model(self) -> psutil.Process:
        """The process with the model."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def rss(self) -> int:
        """Bytes in memory of both processes."""
        server = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in (server, *server.children()))

    def detect(self, data: bytes, **options: Any) -> httpx.Response:
        return self.client.post("/v1/detect", content=data, **options)


class Slow:
    """Stands for a detector whose steps take their time, in seconds, and find nothing."""

    def __init__(self, batch: int = 1, fit: float = 0.0, run: float = 0.0, boxes: float = 0.0) -> None:
        self.input_shape = (batch, 3, 160, 160)
        self.taking = {"fit": fit, "run": run, "boxes": boxes}
        self.given: list[int] = []
        self.threads: dict[str, set[str]] = {"fit": set(), "run": set(), "boxes": set()}

    def fit(self, images: list[np.ndarray]) -> Fitted:
        self._step("fit")
        memory = np.array([image.flat[0] for image in images])
        return Fitted(memory, [Placement((1, 1), (1, 1), 0, 0, (1, 1))] * len(images), memory)

    def run(self, fitted: Fitted) -> dict[str, np.ndarray]:
        self.given.append(len(fitted.batch))
        self._step("run")
        return {"output0": fitted.batch}

    def copy_seconds(self) -> None:
        """Nothing tells."""

    def boxes(self, outputs: dict[str, np.ndarray], placements: list[Placement]) -> list[Detections]:
        """As many boxes in each image as its first value tells."""
        self._step("boxes")
        counts = outputs["output0"][: len(placements)].tolist()
        return [Detections(np.zeros((n, 4), np.float32), np.ones(n, np.float32), np.zeros(n, int)) for n in counts]

    def _step(self, name: str) -> None:
        self.threads[name].add(threading.current_thread().name)
        if self.taking[name]:
            time.sleep(self.taking[name])


@contextmanager
def serving(model: Path, folder: Path, *options: str, stderr: Path | None = None) -> Iterator[Server]:
    """A server of a model at a free port, with its log in a folder. It has to end within seconds and with its code."""
    log = stderr or folder / "serve.log"
    command = [sys.executable, "-m", "acmix_deploy.cli", "serve", str(model), "--port", "0", "--threads", "1", "--json"]
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=file, text=True, cwd=folder)
    server = None
    try:
        server = Server(process, log)
        yield server
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == server.code
    finally:
        if server:
            server.client.close()
        for child in psutil.Process(process.pid).children() if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    """Ask again until something is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def tiny(path: Path, *, names: str = "{0: 'thing'}", batch: int | str = "batch", bias: float = 0.0) -> Path:
    """A detector of images of 32x32 pixels that loads in no time and finds one box; ``bias`` moves its scores."""
    out = np.zeros((1, 4 + len(ast.literal_eval(names)), 4), np.float32)
    out[0, :5, 0] = 16, 16, 8, 8, 0.9 + bias
    return constant(path, out, batch=batch, task="detect", names=names)


def selected(path: Path, **metadata: str) -> Path:
    """A file with non-maximum suppression in it: rows [B, 300, 6] of a box, its score and its class, then zeros."""
    out = np.zeros((1, 300, 6), np.float32)
    out[0, :2] = (8, 8, 24, 24, 0.9, 1), (2, 2, 30, 30, 0.4, 0)
    return constant(path, out, **{"task": "detect", **metadata})


def posed(path: Path) -> Path:
    """A file of the task pose for images of 32x32 pixels that finds one box with two points, the second unseen."""
    out = np.zeros((1, 5 + 6, 4), np.float32)
    out[0, :, 0] = 16, 16, 8, 8, 0.9, 14, 15, 1, 18, 17, 0.25
    return constant(path, out, task="pose", names="{0: 'thing'}", kpt_shape="[2, 3]")


def small(path: Path, element: int = TensorProto.FLOAT, outputs: int = 6, **metadata: str) -> Path:
    """Something like a detector of 8 x 8 pixels an anchor: all boxes alike, the class scores mean colours."""
    image = helper.make_tensor_value_info("images", element, ["batch", 3, "height", "width"])
    output = helper.make_tensor_value_info("output0", element, ["batch", outputs, "anchors"])
    weight = np.zeros((6, 3, 8, 8), np.float32)[:outputs]
    weight[4:5, 0] = weight[5:, 2] = 1 / 64  # class 0 is red, class 1 blue
    bias = np.array([16, 16, 8, 8, 0, 0], np.float32)[:outputs]
    kind = helper.tensor_dtype_to_np_dtype(element)
    constants = [
        helper.make_tensor(name, element if name != "sizes" else TensorProto.INT64, value.shape, value.tobytes(), True)
        for name, value in (
            ("weight", weight.astype(kind)),
            ("bias", bias.astype(kind)),
            ("sizes", np.array([0, outputs, -1], np.int64)),
        )
    ]
    nodes = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["map"], strides=[8, 8]),
        helper.make_node("Reshape", ["map", "sizes"], ["output0"]),
    ]
    graph = helper.make_graph(nodes, "small", [image], [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"task": "detect", "imgsz": "[32, 48]", **metadata})
    onnx.save(model, path)
    return path


def constant(
    path: Path,
    out: np.ndarray,
    *,
    batch: int | str = "batch",
    size: tuple[int, int] = (32, 32),
    **metadata: str,
) -> Path:
    """A file that gives the same for every image, and NaN for one with a NaN or an infinity in it."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Squeeze", ["mean", "last"], ["flat"]),
        helper.make_node("Mul", ["flat", "nothing"], ["zero"]),
        helper.make_node("Add", ["zero", "boxes"], ["output0"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, *size])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [batch, *out.shape[1:]])],
        [
            numpy_helper.from_array(out, "boxes"),
            numpy_helper.from_array(np.arange(out.ndim, 4), "last"),
            numpy_helper.from_array(np.array(0, np.float32), "nothing"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"imgsz": str([*size]), **metadata})
    onnx.save(model, path)
    return path


def score(response: httpx.Response) -> float:
    """Of the one box that the tiny model finds."""
    assert response.status_code == 200, response.text
    ((detection,),) = [image["detections"] for image in response.json()["images"]]
    return float(detection["score"])


def assert_answers(server: Server, **options: object) -> None:
    assert score(server.detect(PICTURE, **options)) == pytest.approx(0.9)
