"""`detect` on folders, videos and streams: what is printed, drawn, skipped and kept, and how much memory it takes."""

from __future__ import annotations

import errno
import http.server
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from acmix_deploy import cli
from acmix_deploy.detection.boxes import Detections
from acmix_deploy.detection.drawing import PALETTE
from acmix_deploy.detection.images import read
from acmix_deploy.detection.suppression import CONFIDENCE
from acmix_deploy.serving import annotate, sources
from acmix_deploy.serving.detector import Detector
from acmix_deploy.serving.path import detect
from acmix_deploy.serving.sources import open_source
from scripts import shapes
from tests.serving.parts import Slow, selected, tiny

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images, one that is none, one of too many pixels, and a file of another kind."""
    folder = shapes.write(tmp_path / "drawn", 2, 3).rename(tmp_path / "photos")
    (folder / "0001a.png").write_bytes((folder / "0000.png").read_bytes()[:3000])
    data = bytearray((folder / "0000.png").read_bytes())
    data[16:24] = (50_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (folder / "0003.png").write_bytes(data)
    (folder / "notes.txt").write_text("no image")
    return folder


def film(path: Path, images: Iterable[np.ndarray], codec: str = "MJPG") -> Path:
    """A video of square images."""
    writer = None
    for image in images:
        writer = writer or cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 20.0, image.shape[:2])
        writer.write(image)
    writer.release()
    return path


def noise(count: int) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    return (random.integers(0, 255, (160, 160, 3)).astype(np.uint8) for _ in range(count))


def frames_of(path: Path) -> int:
    capture, count = cv2.VideoCapture(str(path)), 0
    while capture.read()[0]:
        count += 1
    return count


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def run(capsys: pytest.CaptureFixture[str], *command: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["detect", *map(str, command)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out, printed.err


def test_outputs_that_are_not_finite_are_no_empty_image(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, tiny(tmp_path / "a.onnx", bias=float("nan")), photos)
    assert (code, out) == (1, "")
    assert "a gives output0 with boxes or scores that are not finite, on noise" in err


def test_boxes_that_are_selected_already(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, selected(tmp_path / "a.onnx"), photos)
    assert (code, out) == (2, "")
    assert "a is not a detector: it gives output0 [1, 300, 6], whose rows are a box, a score and a class" in err
    code, out, _ = run(capsys, selected(tmp_path / "b.onnx", args="{'nms': True}"), photos)
    assert code == 0
    assert "1 0.90 at 40, 40, 120, 120" in out


def test_a_folder(shapes_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, shapes_model, photos, "--json", "-o", tmp_path / "found")
    assert code == 0
    found = {line.pop("source"): line for line in lines(out)}
    assert list(found) == ["0000.png", "0001.png", "0001a.png", "0002.png", "0003.png"]
    large = (
        "the picture is 50000 x 50000: at most 33.6 million pixels are taken; see --max-pixels or "
        "OPENCV_IO_MAX_IMAGE_PIXELS"
    )
    for broken, why in (("0001a.png", "the picture cannot be decoded"), ("0003.png", large)):
        problem = f"is no image that can be read: {why}"
        assert found.pop(broken) == {"document": "detect", "schema": 1, "detections": [], "problem": problem}
        assert err.count(f"{broken}: {problem}\n") == 1
    assert "3 images, 2 skipped, " in err
    with Detector.load(shapes_model) as detector:
        for name, line in found.items():
            (right,) = detector([read(photos / name)])
            assert (line["width"], line["height"]) == (160, 160)
            assert [detection["score"] for detection in line["detections"]] == pytest.approx(right.scores, abs=1e-5)
            assert [detection["box"] for detection in line["detections"]] == [
                pytest.approx(box, abs=0.0051) for box in right.boxes
            ]
            assert [d["name"] for d in line["detections"]] == [shapes.NAMES[kind] for kind in right.classes]
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == sorted(found)


def test_images_of_more_pixels_are_left_out(
    shapes_model: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENCV_IO_MAX_IMAGE_PIXELS", "1")  # what the option sets is undone then
    image = photos / "0000.png"
    code, _, err = run(capsys, shapes_model, image, "--max-pixels", 160 * 160 - 1)
    assert code == 2
    assert "0000.png: is no image that can be read: the picture is 160 x 160: at most 0.0256 million" in err
    code, out, _ = run(capsys, shapes_model, image, "--max-pixels", 160 * 160)
    assert (code, out.startswith("0000.png: ")) == (0, True)
    path = film(tmp_path / "clip.avi", [read(image)])
    assert run(capsys, shapes_model, path, "--max-pixels", 160 * 160)[0] == 0
    code, _, err = run(capsys, shapes_model, path, "--max-pixels", 160 * 160 - 1)
    assert code == 2
    assert "clip.avi has frames that are too large: the picture is 160 x 160" in err


def test_boxes_are_drawn_where_they_are(shapes_model: Path, photos: Path, tmp_path: Path) -> None:
    assert cli.main(["detect", str(shapes_model), str(photos / "0000.png"), "-o", str(tmp_path / "a.png")]) == 0
    before, drawn = read(photos / "0000.png"), read(tmp_path / "a.png")
    with Detector.load(shapes_model) as detector:
        (found,) = detector([before])
    colours = np.array([list(bytes.fromhex(PALETTE[kind][1:]))[::-1] for kind in found.classes])
    left, top, right, bottom = found.boxes[0].round().astype(int)
    middle = (top + bottom) // 2
    assert (drawn[middle, [left, right]] == colours[0]).all()
    changed = (before != drawn).any(axis=2)
    margin = np.ones((160, 160), bool)
    for box in found.boxes.round().astype(int):
        margin[max(box[1] - 25, 0) : box[3] + 3, max(box[0] - 3, 0) :] = False
    assert not changed[margin].any(), "nothing is drawn elsewhere"

    box = np.array([[20, 40, 90, 130]] * 2, np.float32)
    drawn = annotate.annotate(before, Detections(box, np.array([0.9, 0.3], np.float32), np.array([8, 2])), {})
    assert drawn[80, 20].tolist() == [*bytes.fromhex(PALETTE[1][1:])][::-1], "the best one is on top"


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_video(
    suffix: str, shapes_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("0000.png", "0001.png", "0002.png")
    path = film(tmp_path / "clip.avi", [read(photos / name) for name in names], "FFV1")
    out = tmp_path / "out" / f"found{suffix}"
    code, printed, _ = run(capsys, shapes_model, path, "--json", "-o", out)
    assert code == 0
    found = lines(printed)
    assert [(line["source"], line["frame"], line["seconds"]) for line in found] == [
        ("clip.avi", index, index / 20) for index in range(3)
    ]
    with Detector.load(shapes_model) as detector:
        for line, name in zip(found, names, strict=True):
            (right,) = detector([read(photos / name)])
            assert [d["score"] for d in line["detections"]] == pytest.approx(right.scores, abs=0.02)
    capture = cv2.VideoCapture(str(out))
    assert capture.get(cv2.CAP_PROP_FPS) == 20
    assert frames_of(out) == 3
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_sides_of_odd_length_are_kept(tmp_path: Path) -> None:
    source = SimpleNamespace(fps=10.0, name="0", files=())
    image = np.zeros((91, 161, 3), np.uint8)
    image[-1] = image[:, -1] = 255
    with annotate.open_output(tmp_path / "a.avi", source) as write:
        write("0", image)
        write("0", image[:40, :40])
    _, first = (capture := cv2.VideoCapture(str(tmp_path / "a.avi"))).read()
    assert first.shape == (92, 162, 3)
    assert first[90, :].mean() > 200
    assert first[:, 160].mean() > 200
    assert capture.read()[1].shape == (92, 162, 3)


@pytest.mark.parametrize(("suffix", "codec", "lost"), [(".mp4", "mp4v", 11), (".avi", "MJPG", 8)])
def test_broken_frames_are_skipped(
    suffix: str, codec: str, lost: int, shapes_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = film(tmp_path / f"clip{suffix}", noise(60), codec)
    data = bytearray(path.read_bytes())
    half, some = len(data) // 2, len(data) // 8
    data[half : half + some] = np.random.default_rng(0).bytes(some)
    path.write_bytes(data)
    code, out, err = run(capsys, shapes_model, path, "--json")
    *found, last = lines(out)
    missing = 60 - len(found)
    assert abs(missing - lost) <= 4, "the same, but for what another release of FFmpeg makes of it"
    assert last["problem"] == f"{missing} of 60 frames cannot be read"
    assert (code, found[-1]["seconds"]) == (0, 59 / 20 if suffix == ".mp4" else pytest.approx(51 / 20, abs=0.2))
    assert f"{len(found)} images, {missing} skipped, " in err


def test_a_video_that_is_cut_off(tmp_path: Path) -> None:
    path = film(tmp_path / "clip.avi", noise(40))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    *frames, last = open_source(str(path)).frames
    assert [frame.number for frame in frames] == [*range(len(frames))]
    assert 15 <= len(frames) <= 20
    assert (last.image, last.lost) == (None, 40 - len(frames))


def test_a_stream_whose_address_holds_a_password(tmp_path: Path) -> None:
    film(tmp_path / "clip.avi", noise(10))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = open_source(f"http://me:secret@127.0.0.1:{server.server_port}/clip.avi")
        names = {frame.source for frame in source.frames}
        server.shutdown()
    assert names == {source.name} == {f"http://127.0.0.1:{server.server_port}/clip.avi"}


def test_what_cannot_be_used_is_a_sentence(
    shapes_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    film(tmp_path / "clip.avi", noise(2))
    (tmp_path / "noise.mp4").write_bytes(bytes(1000))
    (tmp_path / "a.heic").write_bytes(bytes(1000))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    shutil.copy(photos / "0003.png", tmp_path / "broken")
    for command, said in (
        (["absent"], "absent does not exist"),
        ([tmp_path / "empty"], "holds no image"),
        ([tmp_path / "a.heic"], "Images end in one of .bmp, "),
        ([tmp_path / "noise.mp4"], "neither an image by its suffix nor a video"),
        (["99"], "99 cannot be opened as a camera"),
        (["9" * 20], "9 does not exist"),
        (["/dev/null"], "/dev/null is neither a file nor a folder"),
        (["rtsp://me:secret@127.0.0.1:9/x"], "error: rtsp://127.0.0.1:9/x cannot be opened as a video stream"),
        ([tmp_path / "broken"], "nothing in"),
        ([photos, "-o", tmp_path / "a.mp4"], "ends like a video, and"),
        ([tmp_path / "clip.avi", "-o", tmp_path / "folder"], "does not end like a video"),
        ([tmp_path / "clip.avi", "-o", tmp_path / "clip.avi"], "would be overwritten"),
        ([photos, "-o", photos], "would be overwritten"),
        ([photos, "-o", photos / ".." / "photos"], "would be overwritten"),
        ([photos / "0000.png", "-o", photos / "0000.png"], "would be overwritten"),
    ):
        code, _, err = run(capsys, shapes_model, *command)
        assert (code, err.count("error: ")) == (2, 1), err
        assert said in err
        assert "secret" not in err
    assert frames_of(tmp_path / "clip.avi") == 2


@pytest.mark.parametrize("kind", ["folder", "video"])
def test_memory_does_not_grow_with_the_number_of_images(kind: str, tmp_path: Path) -> None:
    """100 images, 300 MB of pixels."""
    black = np.zeros((1000, 1000, 3), np.uint8)
    if kind == "folder":
        cv2.imwrite(str(tmp_path / "0.png"), black)
        for index in range(1, 100):
            os.link(tmp_path / "0.png", tmp_path / f"{index}.png")
        source = open_source(str(tmp_path))
    else:
        source = open_source(str(film(tmp_path / "a.avi", [black] * 100)))

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() // 2**20

    before = resident()
    used = [resident() for _ in detect(Slow(), source)]
    assert len(used) == 100
    assert max(used) - before < 100


def start(shapes_model: Path, *command: object, limit: int = resource.RLIM_INFINITY) -> subprocess.Popen[str]:
    """The verb in a process of its own, in which files are at most ``limit`` bytes long."""
    script = f"""
import resource, signal, sys
from acmix_deploy.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
sys.exit(main(["detect", *sys.argv[1:]]))
"""
    words = map(str, [sys.executable, "-c", script, shapes_model, *command])
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_control_c_keeps_what_was_written(shapes_model: Path, tmp_path: Path) -> None:
    path, out = film(tmp_path / "clip.avi", noise(2000)), tmp_path / "found.mp4"
    with start(shapes_model, path, "--json", "-o", out) as process:
        first = [process.stdout.readline() for _ in range(5)]
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (130, False), err
    found = lines("".join(first) + rest)
    assert 5 <= len(found) < 2000
    assert len(found) - 1 <= frames_of(out) <= len(found)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_is_a_sentence(
    shapes_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    with start(
        shapes_model, film(tmp_path / "clip.avi", noise(60)), "-o", tmp_path / "a.avi", limit=200_000
    ) as process:
        _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (2, False), err
    assert "error: cannot write" in err
    assert "of 60 frames" in err

    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(full))
    code, _, err = run(capsys, shapes_model, photos, "-o", tmp_path / "found")
    assert (code, [*(tmp_path / "found").iterdir()]) == (2, [])
    assert "0000.png: No space left on device\nFree some space" in err
    monkeypatch.undo()

    left = iter([10**9, 10**9, 10**6])
    monkeypatch.setattr(annotate.shutil, "disk_usage", lambda _: SimpleNamespace(free=next(left)))
    code, _, err = run(capsys, shapes_model, tmp_path / "clip.avi", "-o", tmp_path / "b.mp4")
    assert (code, frames_of(tmp_path / "b.mp4")) == (2, 2)
    assert "b.mp4: less than 1.1 MB are free\nFree some space" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_printed(shapes_model: Path, photos: Path) -> None:
    command = f"{sys.executable} -m acmix_deploy.cli detect {shapes_model} {photos} --json"
    done = subprocess.run(f"{command} > /dev/full", shell=True, check=False, capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr, "ignored" in done.stderr) == (2, False, False)
    assert "\nerror: cannot write the output: No space left on device\nFree some space" in done.stderr
    done = subprocess.run(f"{command} | true", shell=True, check=False, capture_output=True, text=True)
    assert ("error" in done.stderr, "ignored" in done.stderr) == (False, False), done.stderr


def test_the_confidence_is_that_of_ultralytics_and_can_be_changed(
    shapes_model: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_default, strict = (
        lines(run(capsys, shapes_model, photos / "0000.png", "--json", *more)[1])[0]["detections"]
        for more in ([], ["--confidence", "0.9"])
    )
    assert all(detection["score"] > CONFIDENCE for detection in by_default)
    assert 0 < len(strict) < len(by_default)
    assert all(detection["score"] > 0.9 for detection in strict)
    default = cli.commands()["detect"].get_default("confidence")
    assert default == CONFIDENCE
    assert sources.DetectDocument.model_fields["schema_version"].default == 1
