"""Models timed from a source to the boxes, in turn."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from acmix_deploy import cli
from acmix_deploy.serving import end_to_end as module
from acmix_deploy.serving.detector import Detector
from acmix_deploy.serving.end_to_end import EndToEndDocument, end_to_end
from acmix_deploy.serving.frames import Frame, Source
from tests.serving.parts import tiny

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (folder := tmp_path / "photos").mkdir()
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.png"), np.zeros((20, 30, 3), np.uint8))
    (folder / "broken.png").write_bytes(b"none")
    return folder


def test_files_take_turns_and_a_folder_begins_again(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, order, load = [tiny(tmp_path / "a.onnx"), tiny(tmp_path / "b.onnx", batch=2)], [], Detector.load

    def recorded(path: Path, **options: object) -> Detector:
        order.append((path.name, options["threads"]))
        return load(path, **options)

    monkeypatch.setattr(Detector, "load", recorded)
    found = end_to_end(files, str(photos), seconds=0.3, rounds=2, threads=1)
    assert order == [("a.onnx", 1), ("b.onnx", 1)] * 2
    assert (found.document, found.source, found.threads, len(found.machine.versions) > 0) == (
        "profile end-to-end",
        str(photos),
        1,
        True,
    )
    for model, file, batch in zip(found.models, files, (1, 2), strict=True):
        times = model.times
        assert (model.file, times.batch, len(model.rates)) == (str(file), batch, 2)
        assert times.images > 2 * 3, "more than are in the folder"
        assert 0.3 < times.seconds < 3
        assert times.images_per_second == pytest.approx(times.images / times.seconds)
        steps = {step.step: step.times for step in times.steps}
        assert list(steps) == ["decode", "fit", "run", "boxes"]
        assert steps["boxes"] >= times.images / batch
        assert min(model.rates) <= times.images_per_second * 1.01


def test_a_live_source_is_not_begun_again_and_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, closed = [], []

    def frames() -> Iterator[Frame]:
        for index in range(1000):
            yield Frame("0", np.zeros((9, 9, 3), np.uint8), number=index, dropped=int(index == 3))

    def open_source(name: str) -> Source:
        opened.append(name)
        return Source(name, frames(), fps=25.0, live=True, close=lambda: closed.append(name))

    monkeypatch.setattr(module, "open_source", open_source)
    found = end_to_end([tiny(tmp_path / "a.onnx")], "0", seconds=60, rounds=1)
    times = found.models[0].times
    assert (opened, closed) == (["0"], ["0"])
    assert (times.images, times.dropped, times.fps, times.kept_up) == (1000, 1, 25, False)


def test_what_cannot_be_timed_is_a_sentence(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny(tmp_path / "a.onnx")
    (tmp_path / "a.pt").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/0.png").write_bytes(b"none")
    for command, said in (
        (
            [tmp_path / "a.pt", "--end-to-end", photos],
            "a.pt is a PyTorch checkpoint; an ONNX file",
        ),
        ([model, "--end-to-end", tmp_path / "empty"], "holds no image"),
        ([model, "--end-to-end", tmp_path / "bad"], "bad can be read"),
        ([model, "--end-to-end", tmp_path / "absent"], "absent does not exist"),
        ([model, "--end-to-end", photos, "--layers"], "--layers is not for --end-to-end"),
        ([model, "--end-to-end", photos, "--samples", "5"], "--samples is not for --end-to-end"),
        ([model, "--end-to-end", photos, "--input-shape", "1,3,32,32"], "--input-shape is not for --end-to-end"),
        ([model, "--end-to-end", photos, "--on", "board"], "--on is not for --end-to-end"),
    ):
        capsys.readouterr()
        assert cli.main(["profile", *map(str, command)]) == 2
        printed = capsys.readouterr()
        assert (said in printed.err, "Traceback" in printed.err, printed.out) == (True, False, ""), printed.err


def test_a_source_that_stops_giving_images_ends_it(tmp_path: Path, photos: Path) -> None:
    """Its images are gone when it is opened again."""
    frames = module._again_and_again(module.open_source(str(photos)), str(photos))
    assert sum(next(frames).image is not None for _ in range(8)) == 6
    for file in photos.iterdir():
        file.write_bytes(b"none")
    rest = [*frames]
    assert len(rest) == 4
    assert not any(frame.image is not None for frame in rest)


def test_the_verb(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [str(tiny(tmp_path / name)) for name in ("a.onnx", "b.onnx")]
    assert cli.main(["profile", *models, "--end-to-end", str(photos), "--seconds", "0.2", "--json"]) == 0
    found = EndToEndDocument.model_validate(json.loads(capsys.readouterr().out))
    assert [model.file for model in found.models] == models
    assert all(len(model.rates) == 3 for model in found.models)
    assert cli.main(["profile", *models, "--end-to-end", str(photos), "--seconds", "0.2"]) == 0
    out = capsys.readouterr().out
    for word in (
        "decode",
        "fit",
        "run",
        "boxes",
        "busy",
        "images a second",
        "the others waited for",
        "times the first",
    ):
        assert word in out


class Camera:
    """Can be opened by one at a time, and takes long for a frame."""

    held = False

    def __init__(self, *_: object) -> None:
        self.opened = not Camera.held
        Camera.held = True

    def isOpened(self) -> bool:
        return self.opened

    def getBackendName(self) -> str:
        return "V4L2"

    def get(self, what: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, np.ndarray]:
        time.sleep(0.5)
        return True, np.zeros((20, 30, 3), np.uint8)

    def release(self) -> None:
        Camera.held = False


def test_a_camera_is_released_before_the_next_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    found = end_to_end([tiny(tmp_path / "a.onnx")], "0", seconds=0.2, rounds=2, threads=1)
    assert found.models[0].times.images >= 2
    assert not Camera.held
