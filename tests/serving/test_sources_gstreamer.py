"""Pipelines of GStreamer: their text, how its own parser reads them, and frames through them with software elements."""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from acmix_deploy.serving import gstreamer, video
from acmix_deploy.serving.gstreamer import JETSON, SOFTWARE, has_element, reading, writing

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")

NAMES = (
    "a.avi",
    "a b.avi",
    'a" ! fakesink name="b.avi',
    "a ! fakesink.avi",
    "a'b.avi",
    "a\\",
    '\\" ! "',
    "ä,ö;ü (1) {2}.avi",
    "100%20.avi",
    "a\nb.avi",
    "a?b#c.avi",
)


@pytest.fixture(scope="module")
def library() -> Any:
    try:
        library = ctypes.CDLL("libgstreamer-1.0.so.0")
    except OSError:
        pytest.skip("GStreamer's library (libgstreamer-1.0.so.0) is not installed")
    library.gst_init(None, None)
    for function in ("gst_parse_launch", "gst_bin_get_by_name"):
        getattr(library, function).restype = ctypes.c_void_p
    return library


def parsed(library: Any, pipeline: str, name: str, value: str) -> str | None:
    """A text property of a named element, as GStreamer's parser reads a pipeline."""
    made = ctypes.c_void_p(library.gst_parse_launch(pipeline.encode(), None))
    element = ctypes.c_void_p(library.gst_bin_get_by_name(made, name.encode()))
    text = ctypes.c_char_p()
    ctypes.CDLL("libgobject-2.0.so.0").g_object_get(element, value.encode(), ctypes.byref(text), None)
    return text.value.decode() if text.value else None


def film(path: Path, count: int = 20, codec: str = "MJPG") -> Path:
    """A video whose frames are their numbers, ten levels each."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 20.0, (160, 120))
    for index in range(count):
        writer.write(np.full((120, 160, 3), 10 * index, np.uint8))
    writer.release()
    return path


def launch(command: list[str]) -> subprocess.CompletedProcess[str]:
    alone = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=alone)


def test_pipelines_of_a_jetson() -> None:
    to_bgr = (
        "nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! video/x-raw,format=BGR ! appsink sync=false max-buffers=2"
    )
    for source, start, live in (
        (Path("/videos/a b.mp4"), "uridecodebin uri=file:///videos/a%20b.mp4", False),
        (2, "v4l2src device=/dev/video2 ! decodebin", True),
        ("csi://1", "nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM),format=NV12", True),
        (
            "rtsp://me:se%20cret@10.0.0.2:554/h264?channel=1&subtype=0",
            "rtspsrc location=rtsp://me:se%20cret@10.0.0.2:554/h264?channel=1&subtype=0 latency=200 "
            "! application/x-rtp,media=video ! decodebin",
            True,
        ),
        ("http://10.0.0.2/a.mjpg", "uridecodebin uri=http://10.0.0.2/a.mjpg", True),
    ):
        assert reading(source, JETSON) == f"{start} ! {to_bgr}" + " drop=true" * live
    assert writing(7, (1280, 720), 30.0, JETSON) == (
        "appsrc ! videoconvert ! video/x-raw,format=BGRx ! nvvidconv ! video/x-raw(memory:NVMM),format=NV12 "
        "! nvv4l2h264enc bitrate=2764800 ! h264parse ! qtmux ! fdsink fd=7"
    )


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://a/b ! filesink location=/tmp/x",
        'rtsp://a/b" ! fakesink name="x',
        "rtsp://a/b' ! fakesink",
        "rtsp://a/b\\",
        "http://a/b\n!\tfakesink",
        "http://a/ü",
        "rtsp://a/\u00a0!\u2003x",
    ],
)
def test_a_url_adds_no_element(url: str) -> None:
    harmless = reading(url[:8] + "b", SOFTWARE)
    pipeline = reading(url, SOFTWARE)
    assert len(pipeline.split(" ! ")) == len(harmless.split(" ! "))
    assert len(pipeline.split()) == len(harmless.split())
    assert not set("\"'\\") & set(pipeline)
    assert pipeline.isascii()


@pytest.mark.parametrize("name", NAMES)
def test_names_arrive_as_they_are(name: str, library: Any, tmp_path: Path) -> None:
    pipeline = reading(tmp_path / name, SOFTWARE).replace("uridecodebin ", "uridecodebin name=x ")
    uri = parsed(library, pipeline, "x", "uri")
    assert uri
    assert unquote(urlsplit(uri).path) == str(tmp_path / name)
    assert len(pipeline.split(" ! ")) == 5


def test_a_pipeline_runs(tmp_path: Path) -> None:
    if not shutil.which("gst-launch-1.0"):
        pytest.skip("gst-launch-1.0 is not installed")
    path = film(tmp_path / "a ! b.avi")
    pipeline = reading(path, SOFTWARE).replace("appsink", f"filesink location={tmp_path}/out").split(" max-buffers")[0]
    done = launch(["gst-launch-1.0", "-q", *shlex.split(pipeline)])
    if "missing" in done.stderr.lower():
        pytest.skip(f"GStreamer lacks a plugin: {done.stderr.strip():.200}")
    assert done.returncode == 0, done.stderr
    frames = np.frombuffer((tmp_path / "out").read_bytes(), np.uint8).reshape(20, 120, 160, 3)
    assert np.abs(frames.mean((1, 2, 3)) - 10 * np.arange(20)).max() < 2


SCRIPT = """
import importlib.util, json, sys
from pathlib import Path
import cv2, numpy as np
name, read, written = sys.argv[1:]
spec = importlib.util.spec_from_file_location("gstreamer", name)
gstreamer = importlib.util.module_from_spec(spec)
sys.modules["gstreamer"] = gstreamer
spec.loader.exec_module(gstreamer)
capture = cv2.VideoCapture(gstreamer.reading(Path(read), gstreamer.SOFTWARE), cv2.CAP_GSTREAMER)
elements = gstreamer.Elements("videoconvert", "videoconvert ! jpegenc")
means = []
with open(written, "wb") as file:
    writer = cv2.VideoWriter(
        gstreamer.writing(file.fileno(), (160, 120), 20.0, elements), cv2.CAP_GSTREAMER, 0, 20.0, (160, 120), True
    )
    assert writer.isOpened()
    while True:
        done, image = capture.read()
        if not done:
            break
        means.append(float(image.mean()))
        writer.write(image)
    writer.release()
print(json.dumps([means, capture.getBackendName(), capture.get(cv2.CAP_PROP_FPS)]))
"""


@pytest.fixture(scope="module")
def python() -> str:
    """A Python whose OpenCV is built with GStreamer."""
    system = "/usr/bin/python3"
    done = launch([system, "-c", "import cv2; print(cv2.getBuildInformation())"]) if Path(system).exists() else None
    if not done or done.returncode or "YES" not in done.stdout.partition("GStreamer:")[2].partition("\n")[0]:
        pytest.skip(f"{system} has no OpenCV that is built with GStreamer: apt-get install python3-opencv")
    return system


@pytest.mark.parametrize("name", ['a" ! b.avi', "ä\\"])
def test_frames_through_opencv(name: str, python: str, tmp_path: Path) -> None:
    path = film(tmp_path / "a.avi").rename(tmp_path / name)
    out = tmp_path / f"out {name}.mp4"
    command = [python, "-c", SCRIPT, gstreamer.__file__, str(path), str(out)]
    done = launch(command)
    assert done.returncode == 0, done.stderr
    means, backend, fps = json.loads(done.stdout)
    assert (backend, fps) == ("GSTREAMER", 20)
    assert means == pytest.approx([10 * index for index in range(20)], abs=2)
    out = out.rename(tmp_path / "out.mp4")
    capture = cv2.VideoCapture(str(out))
    again = [float(capture.read()[1].mean()) for _ in range(20)]
    assert again == pytest.approx(means, abs=2)
    assert not capture.read()[0]


class Built:
    """Stands for an OpenCV that is built with GStreamer."""

    CAP_GSTREAMER, CAP_ANY = 1800, 0
    CAP_PROP_OPEN_TIMEOUT_MSEC, CAP_PROP_READ_TIMEOUT_MSEC, CAP_PROP_FRAME_COUNT, CAP_PROP_FPS = 53, 54, 7, 5

    def __init__(self, opens: bool = True) -> None:
        self.opens, self.asked = opens, []

    def getBuildInformation(self) -> str:
        return "    GStreamer:                   YES (1.20.3)\n"

    def VideoCapture(self, *given: Any) -> Any:
        self.asked.append(given)
        return self

    def VideoWriter(self, *given: Any) -> Any:
        self.asked.append(given)
        return self

    def VideoWriter_fourcc(self, *_: str) -> int:
        return 1

    def isOpened(self) -> bool:
        return self.opens or not str(self.asked[-1][0]).startswith("appsrc")

    def getBackendName(self) -> str:
        return "GSTREAMER"

    def get(self, what: int) -> float:
        return 20.0 if what == self.CAP_PROP_FPS else 1e9

    def release(self) -> None:
        pass


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[Built]:
    built = Built()
    monkeypatch.setattr(video, "opencv", lambda: built)
    video._has_gstreamer.cache_clear()
    yield built
    video._has_gstreamer.cache_clear()


def test_which_decoder_is_taken(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gstreamer, "has_element", lambda name: False)
    assert [video.elements(decoder) for decoder in ("auto", "opencv", "gstreamer")] == [None, None, SOFTWARE]
    monkeypatch.setattr(gstreamer, "has_element", lambda name: name == "nvv4l2decoder")
    assert [video.elements(decoder) for decoder in ("auto", "opencv", "gstreamer")] == [JETSON, None, JETSON]


def test_a_jetson_reads_and_writes_by_its_hardware(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gstreamer, "has_element", lambda name: True)
    capture = video.open_capture("rtsp://a/b")
    pipeline, backend, timeouts = built.asked.pop()
    assert (backend, timeouts) == (1800, [53, 10_000, 54, 10_000])
    assert "rtspsrc location=rtsp://a/b" in pipeline
    assert (video.frame_count(capture), video.seconds_of(capture, 3)) == (0, 0.15)
    writer = video.open_writer(tmp_path / "a.mp4", 20.0, (160, 120))
    assert writer
    pipeline, *rest = built.asked.pop()
    assert "nvv4l2h264enc" in pipeline
    assert rest == [1800, 0, 20.0, (160, 120), True]
    writer.release()
    video.open_writer(tmp_path / "a.avi", 20.0, (160, 120))
    assert built.asked.pop()[0] == str(tmp_path / "a.avi")
    built.opens = False  # a board without an encoder
    assert video.open_writer(tmp_path / "a.mp4", 20.0, (160, 120))
    assert built.asked.pop()[0] == str(tmp_path / "a.mp4")


def test_elements_are_known(library: Any) -> None:
    assert has_element("fakesink")
    assert not has_element("no such element")
