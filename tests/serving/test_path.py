"""Steps in threads that overlap: order, errors, memory, and what is said of their times."""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from acmix_deploy import cli
from acmix_deploy.detection.drawing import draw_outlines
from acmix_deploy.runtime.tensorrt import EngineRunner
from acmix_deploy.serving import path as path_module
from acmix_deploy.serving.detector import Detector
from acmix_deploy.serving.frames import Frame, Source
from acmix_deploy.serving.path import Clock, PathTimes, ahead, detect
from tests.engine.parts import make_engine
from tests.serving.parts import Slow, tiny

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")


def source(count: int, *, seconds: float = 0.0, without: int = -1, live: bool = False, fps: float = 0) -> Source:
    """Frames whose first pixel is their number, modulo 7; the one at ``without`` has no image."""

    def frames() -> Iterator[Frame]:
        for index in range(count):
            time.sleep(seconds)
            image = np.full((1, 1, 3), index % 7, np.uint8)
            yield Frame("a", None if index == without else image, number=index)

    return Source("a", frames(), fps=fps or None, live=live)


def threads_after(before: int) -> int:
    """How many threads more there are than before, once those that end have ended."""
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    return threading.active_count() - before


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("live", [False, True])
def test_frames_come_in_order_with_what_is_in_them(batch: int, live: bool) -> None:
    slow = Slow(batch)
    taken = [*detect(slow, source(301, without=5, live=live))]
    assert [frame.number for frame, _ in taken] == [*range(301)]
    assert [None if found is None else len(found.scores) for _, found in taken] == [
        None if index == 5 else index % 7 for index in range(301)
    ]
    in_fours = [4, 1, *[4] * 73, 3] if live else [4, 3, *[4] * 73, 1]
    assert slow.given == ([1] * 300 if batch == 1 else in_fours)


def test_what_happened_to_a_live_source_waits_for_no_other_frame() -> None:
    goes_on = threading.Event()

    def frames() -> Iterator[Frame]:
        yield Frame("0", np.zeros((1, 1, 3), np.uint8), number=0)
        yield Frame("0", None, "gives no more frames")
        assert goes_on.wait(10), "what was said is seen before there is another frame"
        yield Frame("0", np.zeros((1, 1, 3), np.uint8), number=1)

    numbers = []
    for frame, _ in detect(Slow(4), Source("0", frames(), fps=25.0, live=True)):
        numbers.append(frame.number)
        if frame.problem:
            goes_on.set()
    assert numbers == [0, None, 1]


def test_steps_overlap() -> None:
    slow = Slow(fit=0.03, run=0.03)
    before, start = threading.active_count(), time.perf_counter()
    for _ in detect(slow, source(20, seconds=0.03)):
        time.sleep(0.03)  # stands for what is drawn
    seconds = time.perf_counter() - start
    assert 0.6 < seconds < 1.2, "the longest of four times 0.6 s, and not their sum"
    assert slow.threads["fit"] != slow.threads["run"] != slow.threads["boxes"] == {threading.current_thread().name}
    assert threads_after(before) == 0


def test_of_a_live_source_what_is_seen_is_not_old() -> None:
    """One run ahead, and no frame is asked for before the model is free for it."""
    asked: list[float] = []

    def frames() -> Iterator[Frame]:
        while len(asked) < 12:
            asked.append(time.perf_counter())
            yield Frame("0", np.zeros((1, 1, 3), np.uint8), number=len(asked) - 1)

    ages = []
    for frame, _ in detect(Slow(run=0.05), Source("0", frames(), fps=25.0, live=True)):
        assert frame.number is not None
        ages.append(time.perf_counter() - asked[frame.number])
    assert np.median(ages) < 0.1, "its own run"


def test_little_is_in_memory_however_many_frames_there_are() -> None:
    there: list[weakref.ref[np.ndarray]] = []
    most = 0

    def frames() -> Iterator[Frame]:
        for index in range(1000):
            image = np.zeros((1, 1, 3), np.uint8)
            there.append(weakref.ref(image))
            yield Frame("a", image, number=index)

    for index, _ in enumerate(detect(Slow(4), Source("a", frames()))):
        if index % 100 == 0:
            time.sleep(0.02)  # a slow consumer: what follows is made as far as it may
        most = max(most, sum(image() is not None for image in there[-100:]))
    assert len(there) == 1000
    assert 12 < most <= 5 * 4


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("stage", ["decode", "fit", "run", "boxes", "consumer"])
def test_an_error_in_any_step_arrives_and_ends_all_threads(stage: str, live: bool) -> None:
    class Failing(Slow):
        def _step(self, name: str) -> None:
            self.done = getattr(self, "done", 0) + (name == stage)
            if self.done == 5 and name == stage:
                raise OSError(f"{name} failed")

    def frames() -> Iterator[Frame]:
        for index in range(100):
            if stage == "decode" and index == 5:
                raise OSError("decode failed")
            yield Frame("a", np.zeros((1, 1, 3), np.uint8), number=index)

    before, taken = threading.active_count(), 0

    def consume() -> None:
        nonlocal taken
        found = detect(Failing(), Source("a", frames(), live=live))
        try:
            for _ in found:
                taken += 1
                if stage == "consumer" and taken == 5:
                    raise OSError("consumer failed")
        finally:
            found.close()

    with pytest.raises(OSError, match=f"{stage} failed"):
        consume()
    assert taken == (4 if stage in ("fit", "run", "boxes") else 5)
    assert threads_after(before) == 0


def test_what_is_not_begun_is_not_done_when_it_is_closed() -> None:
    slow = Slow()
    found = detect(slow, source(1000))
    next(found)
    found.close()
    assert len(slow.given) <= 3
    assert [*found] == []


def test_what_decoding_raises_arrives_and_leaving_early_ends_it() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise OSError("gone")

    taken = []
    with pytest.raises(OSError, match="gone"):
        taken.extend(ahead(numbers(), 2))
    assert taken == [*range(5)]
    before = threading.active_count()
    following = ahead(iter(range(100)), 3)
    assert next(following) == 0
    following.close()
    assert threading.active_count() == before


def test_a_signal_while_a_thread_is_started_is_what_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    start, main, before = threading.Thread.start, threading.current_thread(), threading.active_count()

    def interrupted(self: threading.Thread) -> None:
        start(self)
        if threading.current_thread() is main:
            time.sleep(0.05)  # until it is at work
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    slow = Slow(run=0.02)
    with pytest.raises(KeyboardInterrupt):
        next(detect(slow, source(1000, seconds=0.02)))
    given = len(slow.given)
    assert threads_after(before) == 0
    assert len(slow.given) == given, "nothing runs a detector that may be closed"


class Ticks:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_times_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = Ticks()
    clock = Clock(ticks)
    for ms in range(1, 101):
        with clock.step("run"):
            ticks.seconds += ms / 1e3
    with clock.step("fit"):
        ticks.seconds += 0.95

    def images() -> Iterator[int]:
        for index in range(4):
            ticks.seconds += 1.0
            yield index
        ticks.seconds += 500.0  # the end is no image

    for _ in clock.over("decode", images()):
        ticks.seconds += 0.25  # of another step
    with pytest.raises(ValueError, match="no time"), clock.step("boxes"):
        raise ValueError("no time")
    clock.pause()
    with clock.step("run"):
        ticks.seconds += 1000.0
    clock.pause()
    clock.resume()
    ticks.seconds += 489.0
    times = clock.times(Source("a", iter(()), fps=0.2), images=100, batch=2)
    assert (times.seconds, times.images_per_second) == (pytest.approx(1000), pytest.approx(0.1))
    assert [(step.step, step.times) for step in times.steps] == [("decode", 4), ("fit", 1), ("run", 100)]
    decode, fit, run = times.steps
    assert (decode.median_ms, decode.p99_ms, decode.busy) == pytest.approx((1000, 1000, 0.004))
    assert (fit.median_ms, fit.p99_ms, fit.busy) == pytest.approx((950, 950, 0.00095))
    assert (run.median_ms, run.p99_ms, run.busy) == pytest.approx((50.5, 99.01, 0.00505))
    assert (times.bottleneck, times.kept_up, times.batch) == ("run", False, 2)
    monkeypatch.setattr(path_module, "KEPT", 3)
    short = Clock(ticks)
    for ms in (900, 1, 2, 3):
        with short.step("boxes"):
            ticks.seconds += ms / 1e3
    (boxes,) = short.times(Source("a", iter(())), 4, 1).steps
    assert (boxes.times, boxes.median_ms, boxes.busy) == pytest.approx((4, 2, 1))


def test_what_an_engine_copies_is_a_step_of_its_own(gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(tiny(tmp_path / "a.onnx", batch=1))
    engine = make_engine(
        tmp_path / "a.engine", model, metadata={entry.key: entry.value for entry in model.metadata_props}
    )
    prepare = EngineRunner.prepare

    def slowly(self: EngineRunner, feed: dict[str, np.ndarray]) -> None:
        time.sleep(0.02)
        prepare(self, feed)

    monkeypatch.setattr(EngineRunner, "prepare", slowly)
    clock = Clock()
    with Detector.load(engine) as detector:
        images = Source("a", (Frame("a", np.zeros((9, 9, 3), np.uint8)) for _ in range(5)))
        assert [len(found.scores) for _, found in detect(detector, images, clock)] == [1] * 5
    steps = {step.step: step for step in clock.times(images, 5, 1).steps}
    assert list(steps) == ["decode", "fit", "copy", "run", "boxes"]
    assert steps["copy"].times == steps["run"].times == 5
    assert 20 + 1 <= steps["copy"].median_ms < 40, "an upload takes a millisecond of the stand-in's clock"
    assert steps["run"].median_ms < 15


@pytest.mark.parametrize(
    ("of", "decode", "dropped", "bottleneck", "kept_up"),
    [
        (Source("a", iter(())), 0.9, 0, "decode", None),
        (Source("a", iter(()), fps=10.0), 0.9, 0, "decode", True),
        (Source("a", iter(()), fps=10.1), 0.1, 0, "run", False),
        (Source("0", iter(()), fps=30.0, live=True), 0.9, 0, "source", True),
        (Source("0", iter(()), fps=30.0, live=True), 0.1, 0, "run", True),
        (Source("0", iter(()), fps=30.0, live=True), 0.1, 2, "run", False),
    ],
)
def test_what_the_others_waited_for(
    of: Source, decode: float, dropped: int, bottleneck: str, kept_up: bool | None
) -> None:
    ticks = Ticks()
    clock = Clock(ticks)
    with clock.step("decode"):
        ticks.seconds += decode
    with clock.step("run"):
        ticks.seconds += 1 - decode
    times = clock.times(of, 10, 1, dropped)
    assert (times.bottleneck, times.kept_up, times.dropped) == (bottleneck, kept_up, dropped)
    if of.fps and not of.live:
        assert clock.times(of, 10, 1, lost=1).kept_up, "frames that cannot be read take no time of the model"


def test_nothing_was_seen() -> None:
    times = Clock(Ticks()).times(Source("a", iter(())), 0, 1)
    assert (times.steps, times.bottleneck, times.images_per_second) == ([], None, 0)


def test_stats_of_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny(tmp_path / "a.onnx")
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(5):
        cv2.imwrite(str(folder / f"{index}.png"), np.zeros((20, 30, 3), np.uint8))
    (folder / "5.png").write_bytes(b"none")
    assert cli.main(["detect", str(model), str(folder), "--stats", "--json", "-o", str(tmp_path / "out")]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    stats = json.loads(last)
    assert (len(lines), stats["document"], stats["schema"], stats["source"]) == (6, "detect stats", 1, str(folder))
    times = PathTimes.model_validate(stats["times"])
    assert (times.images, times.batch, times.fps, times.kept_up) == (5, 1, None, None)
    assert [(step.step, step.times) for step in times.steps] == [
        ("decode", 6),
        ("fit", 5),
        ("run", 5),
        ("boxes", 5),
        ("draw", 5),
    ]
    assert times.bottleneck in [step.step for step in times.steps]

    model = model.rename(tmp_path / f"{'a' * 80}.onnx")  # lines of a pipe may be longer than 80 columns
    assert cli.main(["detect", str(model), str(folder / "0.png"), "--stats"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "0.png: thing 0.90 at 11, 7, 19, 14\n"
    assert [line.split()[0] for line in printed.err.splitlines()[-6:]] == [
        "step",
        "decode",
        "fit",
        "run",
        "boxes",
        f"{model.name}:",
    ]
    assert "draw" not in printed.err
    assert cli.main(["detect", str(model), str(folder / "0.png"), "--json"]) == 0
    assert "stats" not in capsys.readouterr().out


def test_a_tint_changes_what_it_did_when_the_whole_image_was_blended() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        image = random.integers(0, 256, (*random.integers(1, 60, 2), 3), np.uint8)
        outlines = [random.uniform(-20, 80, (count, 2)).tolist() for count in random.integers(1, 6, random.integers(4))]
        points = [np.array(outline).round().astype(np.int32) for outline in outlines]
        tinted = cv2.fillPoly(image.copy(), points, (0, 94, 213))
        expected = cv2.addWeighted(image, 0.6, tinted, 0.4, 0)
        draw_outlines(image, outlines, "#d55e00", filled=True)
        np.testing.assert_array_equal(image, expected)
