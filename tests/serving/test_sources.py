"""Sources that stop, change, break or come faster than they are looked at: what is said, counted, and goes on."""

from __future__ import annotations

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from acmix_deploy import cli
from acmix_deploy.detection import pictures
from acmix_deploy.detection.heads import Array
from acmix_deploy.detection.images import decode, read, read_reduced
from acmix_deploy.detection.pictures import Broken
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.serving import live, video
from acmix_deploy.serving.detector import Detector, Feed
from acmix_deploy.serving.frames import Frame, Source
from acmix_deploy.serving.live import Live
from acmix_deploy.serving.sources import DetectDocument, open_source, reduced
from tests.serving.parts import tiny

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


def picture(value: int, width: int = 160, height: int = 120) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def jpeg(image: np.ndarray, *options: int) -> bytes:
    return bytes(cv2.imencode(".jpg", image, options)[1])


def detailed(width: int, height: int) -> np.ndarray:
    """As a photo has it: most of it smooth, with detail."""
    random = np.random.default_rng(0)
    small = random.integers(0, 255, (height // 8, width // 8, 3)).astype(np.uint8)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC))


class Camera:
    """Stands for OpenCV's VideoCapture: a frame, or None, each time that a period has passed."""

    opened: list[Camera]

    def __init__(self, images: Iterable[np.ndarray | None], period: float = 0.0) -> None:
        self.images, self.period, self.released = iter(images), period, 0

    def isOpened(self) -> bool:
        return True

    def getBackendName(self) -> str:
        return "V4L2"

    def get(self, what: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        time.sleep(self.period)
        image = next(self.images, None)
        return image is not None, image

    def release(self) -> None:
        self.released += 1


class Unplugged(Camera):
    def isOpened(self) -> bool:
        return False


def cameras(monkeypatch: pytest.MonkeyPatch, *each: Camera) -> Callable[[], int]:
    """What opening a source gives, one after another, then nothing; returns how often it was opened."""
    rest, count = iter(each), 0

    def capture(*_: object) -> Camera:
        nonlocal count
        count += 1
        return next(rest, Unplugged([]))

    monkeypatch.setattr(cv2, "VideoCapture", capture)
    return lambda: count


def every(source: Source) -> Iterator[Frame]:
    """The frames of a camera before any is dropped."""
    assert isinstance(source.frames, Live)
    return source.frames._frames()


def split(frames: Iterable[Frame]) -> tuple[list[Frame], list[str]]:
    """Frames with an image, and what was said."""
    given = list(frames)
    return [frame for frame in given if frame.image is not None], [frame.problem for frame in given if frame.problem]


def test_what_a_slow_caller_misses_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []

    def images() -> Iterator[np.ndarray]:
        for index in range(100):
            made.append(time.perf_counter())
            yield picture(index)

    monkeypatch.setattr(live, "PAUSES", ())
    cameras(monkeypatch, Camera(images(), 0.01))
    source = open_source("0")
    assert (source.live, source.fps, source.total) == (True, 25.0, None)
    seen, ages = [], []
    for frame in source.frames:
        if frame.image is not None:
            ages.append(time.perf_counter() - made[frame.number])
            seen.append(frame)
            time.sleep(0.05)
    numbers = [frame.number for frame in seen]
    assert [int(frame.image[0, 0, 0]) for frame in seen] == numbers
    assert 4 <= len(seen) <= 30
    assert seen[0].dropped == 0
    assert [frame.dropped for frame in seen[1:]] == [after - before - 1 for before, after in pairwise(numbers)]
    assert numbers[-1] == 99, "the newest is never dropped"
    assert np.median(ages) < 0.1, "in a queue they would be seconds old"


def test_a_fast_caller_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = threading.Semaphore()

    def images() -> Iterator[np.ndarray]:
        for index in range(20):
            assert taken.acquire(timeout=10)
            yield picture(index)

    monkeypatch.setattr(live, "PAUSES", ())
    cameras(monkeypatch, Camera(images()))
    seen = []
    for frame in open_source("0").frames:
        if frame.image is not None:
            seen.append((frame.number, frame.dropped))
            taken.release()
    assert seen == [(index, 0) for index in range(20)]


def test_a_camera_that_is_unplugged_and_plugged_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PAUSES", (0.01,) * 4)
    first, again = Camera([picture(1)] * 5), Camera([picture(2)] * 3)
    opened = cameras(monkeypatch, first, Unplugged([]), again)
    seen, said = split(every(open_source("0")))
    assert [frame.number for frame in seen] == [*range(8)]
    assert said == [
        "gives no more frames after 5; it is opened again",
        "gives frames again after 0 s",
        "gives no more frames after 8; it is opened again",
        "is given up after 4 tries; it ends after 8 frames",
    ]
    assert opened() == 5, "four tries in all, since it was never steady"
    assert first.released


def test_tries_begin_again_after_a_time_of_steadiness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PAUSES", (0.001,))
    monkeypatch.setattr(live, "STEADY", -1.0)
    cameras(monkeypatch, *(Camera([picture(1)]) for _ in range(4)))
    seen, said = split(every(open_source("0")))
    assert len(seen) == 4
    assert [text for text in said if "gives frames again" in text] == ["gives frames again after 0 s"] * 3


def test_a_source_is_closed_while_opencv_waits_for_its_next_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = threading.Event()

    def images() -> Iterator[np.ndarray]:
        yield from [picture(1)] * 3
        goes_on.wait(60)

    camera = Camera(images())
    cameras(monkeypatch, camera)
    source, seen = open_source("0"), []
    waiting = threading.Thread(target=lambda: seen.extend(source.frames))
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    source.close()
    waiting.join(2)
    assert not waiting.is_alive()
    assert list(source.frames) == []
    assert not camera.released, "it is in another thread's hands"
    goes_on.set()
    time.sleep(0.5)
    assert camera.released


def test_a_source_is_closed_between_two_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "PAUSES", (60.0,))
    camera = Camera([picture(1)] * 3)
    cameras(monkeypatch, camera)
    source = open_source("0")
    while "opened again" not in next(source.frames).problem:
        pass
    source.close()
    time.sleep(0.3)
    assert camera.released
    assert not [thread for thread in threading.enumerate() if thread.name == "frames of 0"]


def test_frames_of_too_many_pixels_and_of_another_size_are_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", str(200 * 200))
    monkeypatch.setattr(live, "PAUSES", ())
    small, other, large = picture(1), picture(2, 100, 100), picture(3, 300, 200)
    cameras(monkeypatch, Camera([small, other, small, *[large] * 5, other, None, None, small, None, small]))
    told = list(every(open_source("0")))
    assert [frame.number for frame in told if frame.image is not None] == [0, 1, 2, 8, 11, 13]
    assert [(frame.problem, frame.lost) for frame in told if frame.image is None and "opened" not in frame.problem] == [
        ("frames change their size, from 160 x 120 to 100 x 100", 0),
        ("is too large: the picture is 300 x 200: at most 0.04 million pixels are taken", 1),
        ("cannot be decoded", 1),
        ("is given up after 0 tries; it ends after 14 frames", 0),
        ("4 more frames were too large", 0),
        ("2 more frames were broken", 0),
    ]
    assert [frame.lost for frame in told if frame.image is not None] == [0, 0, 0, 4, 1, 1], "told before the end, too"


def test_what_is_left_out_at_the_end_and_what_is_lost_with_frames_that_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", str(200 * 200))
    monkeypatch.setattr(live, "PAUSES", ())
    small, large = picture(1), picture(3, 300, 200)
    cameras(monkeypatch, Camera([small, large, large, large, small, small, large, large]))
    frames = open_source("0").frames
    first = next(frames)
    time.sleep(0.3)
    rest = list(frames)
    assert sum(frame.lost for frame in (first, *rest)) == 5
    assert sum(1 + frame.dropped for frame in (first, *rest) if frame.image is not None) == 3
    assert rest[-1].problem == "4 more frames were too large"


def test_what_reading_raises_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    def images() -> Iterator[np.ndarray]:
        yield picture(1)
        raise OSError("gone")

    cameras(monkeypatch, Camera(images()))
    frames = open_source("0").frames
    assert next(frames).number == 0
    with pytest.raises(OSError, match="gone"):
        next(frames)
    assert list(frames) == []


Part = Callable[[bytes], None]


@contextmanager
def served(parts: Callable[[Part, int], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a camera that sends parts, each a JPEG by its header; they are given the number of the request."""
    monkeypatch.setattr(video, "TIMEOUT_MS", 500)
    monkeypatch.setattr(live, "PAUSES", (0.02, 0.02))
    monkeypatch.setenv("OPENCV_FFMPEG_LOGLEVEL", "-8")
    requests, done = 0, threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal requests
            requests += 1
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=b")
            self.end_headers()

            def part(data: bytes) -> None:
                head = f"--b\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                self.wfile.write(head.encode() + data + b"\r\n")
                done.wait(0.01)

            with suppress(OSError):
                parts(part, requests)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/video"
        finally:
            done.set()
            server.shutdown()


def test_a_stream_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(part: Part, request: int) -> None:
        for index in range(10 if request <= 2 else 0):
            part(jpeg(picture(index)))

    with served(parts, monkeypatch) as url:
        seen, said = split(open_source(url).frames)
    assert seen[-1].number == 19
    assert len(seen) + sum(frame.dropped for frame in seen) == 20
    assert said[0] == "gives no more frames after 10; it is opened again"
    assert said[-1] == "is given up after 2 tries; it ends after 20 frames"


def test_a_stream_that_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(part: Part, request: int) -> None:
        for index in range(10 if request == 1 else 0):
            part(jpeg(picture(index)))
        time.sleep(2)

    with served(parts, monkeypatch) as url:
        began = time.perf_counter()
        seen, said = split(open_source(url).frames)
        assert time.perf_counter() - began < 5
    assert seen[-1].number == 9
    assert said[-1] == "is given up after 2 tries; it ends after 10 frames"


def test_broken_pictures_in_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(part: Part, request: int) -> None:
        for index in range(30 if request == 1 else 0):
            part(jpeg(picture(index)) if index % 10 != 5 else bytes(3000))

    with served(parts, monkeypatch) as url:
        seen, said = split(open_source(url).frames)
    assert 27 <= len(seen) + sum(frame.dropped for frame in seen) <= 30
    assert said.count("cannot be decoded") == 1


@pytest.mark.parametrize(
    "inside", [b"no picture" * 300, bytes(cv2.imencode(".png", picture(0))[1])], ids=["text", "png"]
)
def test_a_stream_with_something_else_inside(
    inside: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def parts(part: Part, request: int) -> None:
        for _ in range(20):
            part(inside)

    with served(parts, monkeypatch) as url:
        began = time.perf_counter()
        assert cli.main(["detect", str(tiny(tmp_path / "a.onnx")), url]) == 2
        assert time.perf_counter() - began < 10
    said = capsys.readouterr().err
    assert f"error: nothing in {url} can be read" in said or f"error: {url} cannot be opened as a video stream" in said


def test_a_stream_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(lambda *_: time.sleep(2), monkeypatch) as url:
        began = time.perf_counter()
        with pytest.raises(UserError, match="cannot be opened as a video stream"):
            open_source(url)
        assert time.perf_counter() - began < 2


def interrupt(arguments: list[str], ready: Callable[[Iterable[str]], object]) -> None:
    """End `detect` by Ctrl-C soon after ``ready``, which is given the lines of its output, has returned true."""
    script = """
import signal, sys
from acmix_deploy.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(["detect", *sys.argv[1:]]))
"""
    command = [sys.executable, "-c", script, *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert ready(process.stdout)
        time.sleep(0.3)
        began = time.perf_counter()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert time.perf_counter() - began < 5, "and not the 10 s in which the stream may answer"
    assert (process.returncode, "Traceback" in err) == (130, False), err


def test_frames_that_are_left_are_ended() -> None:
    released = threading.Event()
    made: list[int] = []

    def frames() -> Generator[Frame]:
        try:
            for index in range(1000):
                made.append(index)
                yield Frame("a", picture(index % 5), number=index)
        finally:
            released.set()

    given, _ = live.closable(frames())
    assert [next(given).number, next(given).number] == [0, 1]
    del given
    assert released.wait(5)
    assert len(made) < 6, "one ahead"
    whole, close = live.closable(frames())
    assert [frame.number for frame in whole] == [*range(1000)]
    close()
    assert list(whole) == []


def seen(frame: int) -> Callable[[Iterable[str]], bool]:
    return lambda lines: any(f'"frame":{frame},' in line for line in lines)


def test_control_c_while_a_stream_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parts(part: Part, _: int) -> None:
        for index in range(20):
            part(jpeg(picture(index)))
        time.sleep(60)

    with served(parts, monkeypatch) as url:
        interrupt([str(tiny(tmp_path / "a.onnx")), url], seen(19))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_control_c_while_a_video_behind_a_url_is_silent(share: float, tmp_path: Path) -> None:
    """From the start, while it is opened, or in its middle; the frames before that are in the file."""
    film, out = tmp_path / "film.avi", tmp_path / "out.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"MJPG"), 10, (160, 120))
    for index in range(400):
        writer.write(cv2.resize(detailed(160, 120) + np.uint8(index % 5), (160, 120)))
    writer.release()
    data = film.read_bytes()
    asked, done = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            if share:
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with suppress(OSError):
                    self.wfile.write(data[: int(share * len(data))])
            done.wait(60)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/film.avi"
            ready = seen(50) if share else lambda _: asked.wait(30)
            interrupt([str(tiny(tmp_path / "a.onnx")), url, "-o", str(out)], ready)
        finally:
            done.set()
            server.shutdown()
    assert not share or cv2.VideoCapture(str(out)).get(cv2.CAP_PROP_FRAME_COUNT) > 50


def test_what_was_dropped_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    infer, real = Detector.infer, cv2.VideoCapture

    def slowly(self: Detector, feed: Feed) -> dict[str, Array]:
        time.sleep(0.05)
        return infer(self, feed)

    def capture(source: object, *rest: object) -> object:
        return Camera((picture(index) for index in range(60)), 0.01) if source == 0 else real(source, *rest)

    monkeypatch.setattr(Detector, "infer", slowly)
    monkeypatch.setattr(live, "PAUSES", ())
    monkeypatch.setattr(cv2, "VideoCapture", capture)
    out = tmp_path / "a.avi"
    assert cli.main(["detect", str(tiny(tmp_path / "a.onnx")), "0", "--json", "-o", str(out)]) == 0
    told = capsys.readouterr()
    lines = [DetectDocument.model_validate_json(line) for line in told.out.splitlines()]
    done, dropped = len([line for line in lines if line.width]), sum(line.dropped or 0 for line in lines)
    assert dropped > 20
    assert done + dropped == 60
    assert f"{done} images, {dropped} dropped, " in told.err
    assert "0: is given up after 0 tries; it ends after 60 frames" in told.err
    assert real(str(out)).get(cv2.CAP_PROP_FRAME_COUNT) == 60, "the video is as long as what it shows took"


@pytest.mark.parametrize("progressive", [0, 1])
def test_a_jpeg_that_is_cut_off_is_no_picture(progressive: int, tmp_path: Path) -> None:
    """Some releases of OpenCV give it, with what was in memory before."""
    whole = jpeg(detailed(320, 240), cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    thumbnail = jpeg(detailed(32, 24))
    exif = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    for data in (whole, whole[:2] + exif + whole[2:]):
        assert pictures.size(data) == (320, 240)
        assert pictures.size(data + bytes(100)) == (320, 240), "what follows the end is no matter"
        for kept in (len(data) - 1, len(data) - 2, len(data) // 2, len(data) - len(whole) + 700):
            with pytest.raises(Broken, match="the picture is cut off"):
                pictures.size(data[:kept])
            (tmp_path / "a.jpg").write_bytes(data[:kept])
            with pytest.raises(Broken):
                read(tmp_path / "a.jpg")


def test_broken_pictures_among_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, count = jpeg(detailed(64, 48)), 300
    broken = {7: good[: len(good) // 2], 70: b"", 170: b"no picture", 299: good[:-2]}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/good").write_bytes(good)
    for index in range(count):
        path = tmp_path / f"photos/{index:04}.jpg"
        if index in broken:
            path.write_bytes(broken[index])
        else:
            os.link(tmp_path / "photos/good", path)
    assert cli.main(["detect", str(tiny(tmp_path / "a.onnx")), str(tmp_path / "photos"), "--json"]) == 0
    told = capsys.readouterr()
    lines = [DetectDocument.model_validate_json(line) for line in told.out.splitlines()]
    assert [index for index, line in enumerate(lines) if line.problem] == [*broken]
    assert len(lines) == count
    for index in broken:
        assert told.err.count(f"{index:04}.jpg: is no image that can be read: ") == 1
    assert f"{count - len(broken)} images, {len(broken)} skipped, " in told.err


@pytest.mark.parametrize(
    ("size", "sees", "scale"),
    [
        ((640, 480), (160, 160), 4),
        ((640, 480), (161, 161), 2),
        ((639, 480), (320, 320), 1),
        ((3001, 2003), (320, 320), 8),
        ((320, 1280), (160, 160), 8),
        ((640, 480), (640, 640), 1),
    ],
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_scale(
    size: tuple[int, int], sees: tuple[int, int], scale: int, orientation: int, tmp_path: Path
) -> None:
    """Equal to averages of squares of pixels, as far as a JPEG is, and turned as the whole picture."""
    path = tmp_path / "a.jpg"
    path.write_bytes(turned(jpeg(detailed(*size), cv2.IMWRITE_JPEG_QUALITY, 95), orientation))

    def fitted(height: int, width: int) -> tuple[int, int]:
        part = min(sees[0] / height, sees[1] / width)
        return round(height * part), round(width * part)

    whole = read(path)
    image, original = read_reduced(path, fitted)
    assert original == whole.shape[:2] == (size if orientation == 6 else size[::-1])
    assert image.shape[:2] == tuple(-(-side // scale) for side in original)
    if orientation == 6:
        whole, image = np.rot90(whole), np.rot90(image)
    height, width = (side // scale for side in whole.shape[:2])
    blocks = whole[: height * scale, : width * scale].reshape(height, scale, width, scale, 3).mean((1, 3))
    assert np.abs(image[:height, :width] - blocks).mean() < 3


def turned(data: bytes, orientation: int) -> bytes:
    """A JPEG with an EXIF orientation. Source: Exif 2.3, 4.6.4."""
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01" + orientation.to_bytes(2, "big") + b"\x00\x00"
    tiff = b"MM\x00\x2a\x00\x00\x00\x08\x00\x01" + entry + bytes(4)
    payload = b"Exif\x00\x00" + tiff
    return data[:2] + b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload + data[2:]


def test_only_a_jpeg_is_reduced_and_sides_that_cannot_be_told_apart_are_left(tmp_path: Path) -> None:
    sees = (60, 60)
    for name, size, scale in (("a.png", (640, 480), 1), ("a.jpg", (641, 640), 8), ("b.jpg", (640, 639), 1)):
        cv2.imwrite(str(tmp_path / name), detailed(*size))
        image, original = read_reduced(tmp_path / name, lambda *_: sees)
        assert (round(size[0] / image.shape[1]), original) == (scale, size[::-1])
    (tmp_path / "c.jpg").write_bytes(jpeg(detailed(64, 48))[:-2])
    with pytest.raises(Broken, match="cut off"):
        read_reduced(tmp_path / "c.jpg", lambda *_: sees)
    assert decode(jpeg(detailed(64, 48)), 2).shape == (24, 32, 3)


def test_boxes_are_in_pixels_of_the_whole_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos/a.jpg"), detailed(1001, 999))
    cv2.imwrite(str(tmp_path / "photos/b.jpg"), detailed(200, 100))
    model = tiny(tmp_path / "a.onnx")
    with Detector.load(model) as detector:
        height = detector.input_shape[2]
        source = reduced(open_source(str(tmp_path / "photos")), detector.place)
        first, second = source.frames
    assert max(first.image.shape) < 1001 / 2
    assert max(first.image.shape) >= height
    assert (first.size, second.size) == ((999, 1001), (100, 200))
    found: dict[str, Any] = {}
    for option in ([], ["--fast-decode"]):
        assert cli.main(["detect", str(model), str(tmp_path / "photos"), "--json", *option]) == 0
        lines = capsys.readouterr().out.splitlines()
        found[str(option)] = [DetectDocument.model_validate_json(line) for line in lines]
    for exact, fast in zip(*found.values(), strict=True):
        assert (fast.width, fast.height) == (exact.width, exact.height)
        for one, other in zip(exact.detections, fast.detections, strict=True):
            assert other.box == pytest.approx(one.box, abs=8)
            assert max(other.box[0::2]) <= exact.width
            assert max(other.box[1::2]) <= exact.height
    assert cli.main(["detect", str(model), str(tmp_path / "photos"), "--fast-decode", "-o", str(tmp_path / "out")]) == 2
    assert "--fast-decode leaves no whole pictures for --output to draw into" in capsys.readouterr().err


def test_containers_without_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "none.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 20.0, (160, 120))
    writer.release()
    for name, codec, change in (("header.mp4", "mp4v", b"moov"), ("codec.avi", "MJPG", b"MJPG")):
        writer = cv2.VideoWriter(str(tmp_path / name), cv2.VideoWriter_fourcc(*codec), 20.0, (160, 120))
        for index in range(20):
            writer.write(picture(index))
        writer.release()
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data.replace(change, b"zzzz"))
    (tmp_path / "sound.wav").write_bytes(
        b"RIFF\x24\x01\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x40\x1f\x00\x00\x40\x1f\x00\x00\x01\x00\x08\x00"
        b"data\x00\x01\x00\x00" + bytes(256)
    )
    (tmp_path / "empty.mp4").write_bytes(b"")
    model = tiny(tmp_path / "a.onnx")
    for name in ("none.avi", "header.mp4", "codec.avi", "sound.wav", "empty.mp4"):
        code = cli.main(["detect", str(model), str(tmp_path / name)])
        err = capsys.readouterr().err
        assert (code, err.count("error: "), "Traceback" in err) == (2, 1, False), (name, err)


def test_a_decoder_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(video, "_has_gstreamer", lambda: False)
    (tmp_path / "a.mp4").write_bytes(b"")
    with pytest.raises(MissingComponent, match="built without GStreamer"):
        open_source(str(tmp_path / "a.mp4"), "gstreamer")
    with pytest.raises(MissingComponent, match="csi://0 needs a Jetson"):
        open_source("csi://0")
    with pytest.raises(UserError, match="no camera of a Jetson"):
        open_source("csi://0 ! fakesink")
    assert video.elements("auto") is None
