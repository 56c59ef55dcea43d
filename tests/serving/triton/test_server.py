"""A real Triton serves what was packaged, on the CPU: the same photographs, over HTTP and gRPC, many at a time."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from acmix_deploy.detection.boxes import named
from acmix_deploy.detection.images import Image, Letterbox, Placement, tensor
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.processing import Processing, attach
from acmix_deploy.serving.detector import Detector
from acmix_deploy.serving.triton.repository import package
from scripts import shapes
from tests import ROOT
from tests.serving.parts import tiny
from tests.serving.triton.parts import Triton, assert_equal, found_in, triton, triton_python

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")

triton_python()
PROTOCOLS, TURNS = ("http", "grpc"), range(3)


@pytest.fixture(scope="module")
def server(shapes_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """The detector as the ensemble "native", by the Python backend as "python", and a file of a fixed batch."""
    folder = tmp_path_factory.mktemp("triton")
    for name in ("native", "python"):
        shutil.copy(shapes_model, folder / f"{name}.onnx")
        package(folder / f"{name}.onnx", folder / "repository", backend=name, max_delay_ms=50)
    package(tiny(folder / "one.onnx", batch=1), folder / "repository")
    model = onnx.load(shapes_model)
    attach(model, Processing("bgr", Suppression()))
    for name in ("bytes-native", "bytes-python"):
        onnx.save(model, folder / f"{name}.onnx")
        package(folder / f"{name}.onnx", folder / "repository", backend=name.partition("-")[2])
    shutil.copytree(Path(__file__).with_name("onnxruntime_backend"), folder / "backends/onnxruntime")
    with triton(folder / "repository", folder) as running:
        yield running


@pytest.fixture(scope="module")
def photos() -> dict[str, Image]:
    """Of several sizes, one without anything to find."""
    images = [scene.image for scene in shapes.images(6, 4)]
    images[1] = images[1][10:150, 60:120]
    images[2] = cv2.resize(images[2], (333, 517))
    return {f"{index}.png": image for index, image in enumerate([*images, np.full((90, 200, 3), 114, np.uint8)])}


def right_of(model: Path, photos: dict[str, Image]) -> dict[str, object]:
    with Detector.load(model) as detector:
        return {name: detector([image])[0] for name, image in photos.items()}


def assert_answers(
    answers: dict[str, np.ndarray], right: dict[str, object], suffix: str, placements: dict[str, Placement]
) -> None:
    assert len(answers) == len(right) * len(PROTOCOLS) * len(TURNS) * 4, [*answers]
    for name, expected in right.items():
        for protocol in PROTOCOLS:
            for turn in TURNS:
                key = f"{Path(name).stem}{suffix}/{protocol}/{turn}/"
                outputs = {name[len(key) :]: array for name, array in answers.items() if name.startswith(key)}
                assert_equal(found_in(outputs, 0, placements[name]), expected, score=1e-5)


def test_pictures_by_the_python_backend(
    server: Triton, shapes_model: Path, photos: dict[str, Image], tmp_path: Path
) -> None:
    for name, image in photos.items():
        cv2.imwrite(str(tmp_path / name), image)
    right = right_of(shapes_model, photos)
    answers = server.ask("python", "image", [tmp_path / name for name in photos])
    whole = {name: Placement(image.shape[:2], image.shape[:2], 0, 0, image.shape[:2]) for name, image in photos.items()}
    assert_answers(answers, right, ".png", whole)
    assert sum(len(found.scores) for found in right.values()) > 10
    images, runs = server.runs("python")
    assert images == len(photos) * 6 > runs, "requests were not put together"


def test_tensors_by_the_ensemble(server: Triton, shapes_model: Path, photos: dict[str, Image], tmp_path: Path) -> None:
    letterbox = Letterbox()
    files = []
    for name, image in photos.items():
        files.append(tmp_path / f"{Path(name).stem}.npy")
        np.save(files[-1], tensor(letterbox(image, 160, 160))[None])
    answers = server.ask("native", "images", files)
    placements = {name: letterbox.place(image.shape, 160, 160) for name, image in photos.items()}
    assert_answers(answers, right_of(shapes_model, photos), ".npy", placements)
    images, runs = server.runs("native.network")
    assert images == 1 + 8 + len(photos) * 6, "of the warm-up and of the requests"
    assert runs - 2 < len(photos) * 6, "requests were not put together"
    assert server.runs("native.boxes")[0] == len(photos) * 6


def test_pixels_in_and_boxes_out(server: Triton, shapes_model: Path, photos: dict[str, Image], tmp_path: Path) -> None:
    """A file that takes uint8 and suppresses boxes, by both backends."""
    letterbox = Letterbox()
    for name, image in photos.items():
        cv2.imwrite(str(tmp_path / name), image)
        np.save(tmp_path / f"{Path(name).stem}.npy", letterbox(image, 160, 160)[None])
    right = right_of(shapes_model, photos)
    placements = {name: letterbox.place(image.shape, 160, 160) for name, image in photos.items()}
    whole = {name: Placement(image.shape[:2], image.shape[:2], 0, 0, image.shape[:2]) for name, image in photos.items()}
    answers = server.ask("bytes-native", "images", [tmp_path / f"{Path(name).stem}.npy" for name in photos])
    assert_answers(answers, right, ".npy", placements)
    assert_answers(server.ask("bytes-python", "image", [tmp_path / name for name in photos]), right, ".png", whole)


def test_clients_of_the_documentation(
    server: Triton, shapes_model: Path, photos: dict[str, Image], tmp_path: Path
) -> None:
    image = photos["2.png"]
    cv2.imwrite(str(tmp_path / "photo.png"), image)
    (tmp_path / "photo.png").rename(tmp_path / "photo.jpg")
    with Detector.load(shapes_model) as detector:
        (found,) = detector([image])
    right = named(found, dict(enumerate(shapes.NAMES)))
    assert right
    page = (ROOT / "docs/triton.md").read_text(encoding="utf-8")
    clients = re.findall(r"^```py\n(.*?)^```$", page, re.M | re.S)
    for model, client in zip(("python", "native"), clients, strict=True):
        code = client.replace("localhost:8000", server.http).replace("shapes.fused", model)
        command = [triton_python(), "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert [line[0] for line in lines] == [detection.name for detection in right]
        numbers = np.array([line[1:] for line in lines], float)
        np.testing.assert_allclose(numbers[:, 0], [detection.score for detection in right], atol=2e-5)
        np.testing.assert_allclose(numbers[:, 1:], [detection.box for detection in right], atol=2e-2)


def test_a_fixed_batch(server: Triton, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros((1, 3, 32, 32), np.float32))
    answers = server.ask("one", "images", [tmp_path / "one.npy"])
    for protocol in PROTOCOLS:
        assert answers[f"one.npy/{protocol}/0/num_detections"].tolist() == [[1]]
        np.testing.assert_allclose(answers[f"one.npy/{protocol}/0/detection_boxes"][0, 0], (12, 12, 20, 20))


def test_a_broken_picture_spoils_no_other(server: Triton, photos: dict[str, Image], tmp_path: Path) -> None:
    good = tmp_path / "0.png"
    cv2.imwrite(str(good), photos["0.png"])
    head = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + struct.pack(">I", 1 << 20) + b"IDAT"
    bad = {
        "text.bin": (b"not a picture", "not a picture in one of JPEG, PNG, WEBP"),
        "empty.bin": (b"", "not a picture"),
        "cut.png": (good.read_bytes()[:300], "the picture cannot be decoded"),
        "huge.png": (b"\x89PNG\r\n\x1a\n" + chunks, "at most 33.6 million pixels are taken"),
    }
    for name, (content, _) in bad.items():
        (tmp_path / name).write_bytes(content)
    answers = server.ask("python", "image", [good, *(tmp_path / name for name in bad)])
    for protocol in PROTOCOLS:
        for turn in TURNS:
            assert answers[f"0.png/{protocol}/{turn}/num_detections"].item() > 0
            for name, (_, message) in bad.items():
                error = str(answers[f"{name}/{protocol}/{turn}/error"])
                assert message in error
                assert "Traceback" not in error
                assert ".py" not in error


def test_a_triton_that_misreads_arrays_is_not_served(tmp_path: Path) -> None:
    """Triton 24.10, which nvidia-pytriton has, with NumPy 2."""
    if np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip("NumPy here is older than 2")
    package(tiny(tmp_path / "model.onnx"), tmp_path / "repository", backend="python")
    with pytest.raises(AssertionError) as raised, triton(tmp_path / "repository", tmp_path, Path(sys.executable)):
        pass
    assert f"cannot read arrays of NumPy {np.__version__}" in str(raised.value)
    assert "Install numpy<2" in str(raised.value)
