"""A real Triton server on the CPU, from the package nvidia-pytriton, which has its Python backend alone.

Where a test needs the backend for ONNX files, a stand-in that runs them by ONNX Runtime takes its place: Triton lets a
backend be a Python file.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest

from acmix_deploy.detection.boxes import Detections
from acmix_deploy.detection.images import Placement


def triton_python() -> Path:
    """A Python with nvidia-pytriton and acmix-deploy[serve]."""
    if named := os.environ.get("ACMIX_TRITON_PYTHON"):
        return Path(named)
    if importlib.util.find_spec("pytriton"):
        return Path(sys.executable)
    pytest.skip(
        "no Triton: name a Python that has nvidia-pytriton and acmix-deploy[serve] in ACMIX_TRITON_PYTHON",
        allow_module_level=True,
    )


def found_in(outputs: dict[str, np.ndarray], image: int, placement: Placement) -> Detections:
    """The detections of one image in a batch of answers, after which there is nothing but zeros."""
    (count,) = outputs["num_detections"][image]
    parts = [outputs[f"detection_{name}"][image] for name in ("boxes", "scores", "classes")]
    assert not any(part[count:].any() for part in parts)
    boxes, scores, classes = (part[:count] for part in parts)
    return Detections(placement.undo(boxes), scores, classes.astype(np.int64))


def assert_equal(found: Detections, right: Detections, score: float = 0.0) -> None:
    np.testing.assert_array_equal(found.classes, right.classes)
    np.testing.assert_allclose(found.scores, right.scores, atol=score)
    np.testing.assert_allclose(found.boxes, right.boxes, atol=1e-3)


class Triton:
    """A running server."""

    def __init__(self, ports: Sequence[int], python: Path, folder: Path) -> None:
        self.http, self.grpc, self.metrics_address = (f"127.0.0.1:{port}" for port in ports)
        self._python, self._folder = python, folder

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5) as answer:
                return answer.status == 200
        except (URLError, OSError):
            return False

    def runs(self, model: str) -> tuple[int, int]:
        """Images that a model was asked about, and how often it ran."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        counts = (
            re.search(rf'^nv_inference_{name}\{{model="{re.escape(model)}",version="1"\}} (\d+)$', text, re.M)
            for name in ("count", "exec_count")
        )
        images, runs = (int(found[1]) for found in counts if found)
        return images, runs

    def ask(self, model: str, name: str, files: Sequence[Path]) -> dict[str, np.ndarray]:
        """See triton_client.py."""
        out = self._folder / f"{model}.npz"
        command = [self._python, Path(__file__).with_name("client.py"), self.http, self.grpc, model, name, out, *files]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return dict(np.load(out))


def ask_python(python: Path, expressions: str) -> list[str]:
    """The values of expressions, by commas, in another Python."""
    command = [python, "-c", f"import sys, sysconfig; print(*({expressions},), sep='\\n')"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().splitlines()


@contextmanager
def triton(repository: Path, folder: Path, python: Path | None = None) -> Iterator[Triton]:
    """Serve a repository with what is in ``folder / "backends"`` and Triton's own, until the end of the block.

    Models run in ``python``, by default the one that has Triton.
    """
    client = triton_python()
    (found,) = ask_python(client, "__import__('pytriton').__path__[0]")
    package = Path(found)
    described = (
        "'%d.%d' % sys.version_info[:2], sys.prefix, *map(sysconfig.get_config_var, ('LIBDIR', 'Py_ENABLE_SHARED'))"
    )
    version, prefix, libraries, shared = ask_python(python or client, described)
    stub = package / "tritonserver/python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        pytest.skip(f"nvidia-pytriton has no stub for Python {version}")
    if shared != "1":
        pytest.skip(f"{python or client} has no libpython as a shared library, which Triton's stub loads")
    backends = folder / "backends"
    shutil.copytree(package / "tritonserver/backends/python", backends / "python")
    shutil.copy(stub, backends / "python")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{package.parent / 'nvidia_pytriton.libs'}:{libraries}",
        # Triton's stub is isolated: it takes the environment of the `python3` that it finds first.
        "PATH": f"{prefix}/bin:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in sockets]
    command = [package / "tritonserver/bin/tritonserver", "--model-repository", repository]
    command += ["--backend-directory", backends]
    for protocol, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        command += [f"--{protocol}-address=127.0.0.1", f"--{protocol}-port={port}"]
    log = folder / "triton.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        server = Triton(ports, client, folder)
        end = time.monotonic() + 60
        while not server.ready():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield server
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
