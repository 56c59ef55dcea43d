"""Batches, places and deadlines by a model that does as it is told; and the process of a model, by its messages."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from acmix_deploy.artifacts import write_artifact
from acmix_deploy.detection.boxes import Detections
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.runtime.inputs import Input
from acmix_deploy.serving import batching, worker
from acmix_deploy.serving.batching import Batcher, Budget, Expired, Limits, Overloaded, Times, Unavailable
from acmix_deploy.serving.detector import Detector
from acmix_deploy.serving.worker import Died, Seconds, Served, Setup
from tests.engine.parts import make_engine
from tests.serving.parts import selected, tiny

NODE = Input("images", ("batch", 3, 8, 8), np.dtype(np.float32))


class Model:
    """In the place of a worker. What it finds in an image is the image's first value."""

    runs: list[int]
    """Images of each run; 0 for arrays."""
    takes = 0.0
    """Seconds for a run."""
    dies: list[bool]
    """For each run, whether the model ends in it; it does not when the list ends."""
    fails: Exception | None

    def __init__(self, setup: Setup) -> None:
        self._killed = threading.Event()
        self._most = setup.max_batch

    def load(self) -> Served:
        if Model.fails:
            raise Model.fails
        return Served("model", {}, (NODE,), (), (1, 3, 8, 8), self._most, "detect", 0.25, "")

    def detect(self, images: Sequence[Any]) -> tuple[list[Detections], Seconds]:
        self._run(len(images))
        found = [Detections(np.zeros((0, 4)), image.ravel()[:1].astype(np.float32), np.zeros(1)) for image in images]
        return found, {"run": Model.takes / 2}

    def infer(self, feed: dict[str, Any]) -> tuple[dict[str, Any], Seconds]:
        self._run(0)
        return {"out": feed["in"] * 2}, {"run": Model.takes / 2}

    def _run(self, images: int) -> None:
        Model.runs.append(images)
        if (Model.dies and Model.dies.pop(0)) or self._killed.wait(Model.takes):
            raise Died("it ended")

    def kill(self) -> None:
        self._killed.set()

    def close(self) -> None:
        self.kill()


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> type[Model]:
    monkeypatch.setattr(batching, "Worker", Model)
    Model.runs, Model.dies, Model.takes, Model.fails = [], [], 0.0, None
    return Model


def image(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, np.uint8)


def within(limits: Limits, work: Callable[[Batcher], Awaitable[Any]], max_batch: int = 4) -> Any:
    async def all_of_it() -> Any:
        batcher = Batcher(Setup(Path("model.onnx"), max_batch=max_batch), limits)
        await batcher.open()
        try:
            return await asyncio.wait_for(work(batcher), 20)
        finally:
            await batcher.close()

    return asyncio.run(all_of_it())


def values(answer: tuple[list[Detections], Times]) -> list[float]:
    return [float(one.scores[0]) for one in answer[0]]


def test_requests_are_run_together_and_everyone_gets_his_own() -> None:
    async def work(batcher: Batcher) -> None:
        sizes = [1, 1, 1, 1, 3, 2, 2, 5, 1]
        given = [[image(10 * index + inner) for inner in range(size)] for index, size in enumerate(sizes)]
        answers = await asyncio.gather(*(batcher.detect(images) for images in given))
        assert [values(found) for found in answers] == [
            [10 * index + inner for inner in range(size)] for index, size in enumerate(sizes)
        ]

    within(Limits(max_delay=0.02), work)
    assert Model.runs == [4, 3, 4, 5, 1]


def test_an_image_waits_for_others_no_longer_than_it_has_to() -> None:
    async def seconds(batcher: Batcher, count: int) -> float:
        start = time.perf_counter()
        await asyncio.gather(*(batcher.detect([image(0)]) for _ in range(count)))
        return time.perf_counter() - start

    limits = Limits(max_delay=0.5)
    assert 0.5 <= within(limits, lambda batcher: seconds(batcher, 1)) < 0.9
    assert within(limits, lambda batcher: seconds(batcher, 4)) < 0.4
    assert within(limits, lambda batcher: seconds(batcher, 1), max_batch=1) < 0.4
    assert Model.runs == [1, 4, 1]


def test_the_time_of_a_request_is_told_in_parts() -> None:
    async def work(batcher: Batcher) -> list[Times]:
        answers = await asyncio.gather(*(batcher.detect([image(0)]) for _ in range(2)))
        return [times for _, times in answers]

    Model.takes = 0.4  # and the model says that it took half of it, so that the other half was the way
    first, second = within(Limits(max_delay=0.2), work, max_batch=1)
    alone = within(Limits(max_delay=0.2), work)[0]
    for times, waited in ((first, 0.0), (second, 0.4), (alone, 0.2)):
        assert (times.waited, times.copied) == pytest.approx((waited, 0.2), abs=0.1)
        assert times.ran == {"run": 0.2}


def test_one_who_comes_later_is_waited_for_from_the_first_on() -> None:
    async def work(batcher: Batcher) -> float:
        start = time.perf_counter()
        first = asyncio.create_task(batcher.detect([image(1)]))
        await asyncio.sleep(0.3)
        await asyncio.gather(first, batcher.detect([image(2)]))
        return time.perf_counter() - start

    assert within(Limits(max_delay=0.5), work) < 0.75
    assert Model.runs == [2]


def test_arrays_are_run_by_themselves_and_at_once() -> None:
    async def work(batcher: Batcher) -> None:
        start = time.perf_counter()
        feeds = [{"in": np.array([[index]])} for index in range(3)]
        answers = await asyncio.gather(*(batcher.infer(feed) for feed in feeds))
        assert [int(answer["out"][0, 0]) for answer in answers] == [0, 2, 4]
        assert time.perf_counter() - start < 0.4

    within(Limits(max_delay=0.5), work)
    assert Model.runs == [0, 0, 0]


def test_places_are_bounded() -> None:
    places = Budget(4, "images")
    with places.hold(3):
        with places.hold(1), pytest.raises(Overloaded, match="4 of 4 images"), places.hold(1):
            pass
        with pytest.raises(Overloaded), places.hold(2):
            pass
    with places.hold(9), pytest.raises(Overloaded), places.hold(1):
        pass
    assert places.held == 0


def test_a_deadline_passes_and_who_has_left_is_not_run() -> None:
    Model.takes = 0.5

    async def work(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.detect([image(1)]))
        await asyncio.sleep(0.1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(batcher.detect([image(2)]), 0.1)
        assert values(await first) == [1]
        assert values(await batcher.detect([image(3)])) == [3]
        Model.takes = 10
        with pytest.raises(Expired, match=r"no answer in 0.8 s"):
            await batcher.detect([image(4)])
        Model.takes = 0
        assert values(await batcher.detect([image(5)])) == [5]
        assert batcher.starts == 2

    within(Limits(max_delay=0, deadline=0.8), work)
    assert Model.runs == [1, 1, 1, 1]


def test_a_model_that_ends_is_started_again_once_a_request() -> None:
    async def work(batcher: Batcher) -> None:
        Model.dies = [True]
        assert values(await batcher.detect([image(1)])) == [1]
        Model.dies = [True, True]
        with pytest.raises(Unavailable, match="the model ended while it worked on this"):
            await batcher.detect([image(2)])
        assert values(await batcher.detect([image(3)])) == [3]
        Model.dies, Model.fails = [True], UserError("the file is garbage")
        for _ in range(2):
            with pytest.raises(Unavailable, match="the model does not start again"):
                await batcher.detect([image(4)])
        assert not await batcher.ready()
        Model.fails = None
        batcher._failure = None
        assert await batcher.ready()

    within(Limits(max_delay=0), work)


def test_a_fault_in_a_run_ends_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(batcher: Batcher) -> None:
        for error in (CheckFailed("the model fails"), ZeroDivisionError()):
            with monkeypatch.context() as patch:
                patch.setattr(Model, "_run", lambda self, images, error=error: (_ for _ in ()).throw(error))
                with pytest.raises(type(error)):
                    await batcher.detect([image(1)])
            assert values(await batcher.detect([image(2)])) == [2]

    within(Limits(max_delay=0), work)


def test_the_process_of_a_model_by_its_messages(tmp_path: Path, gpu: Any) -> None:
    """Here a thread, so that an engine can run on the stand-ins; its answers are those of the detector."""
    onnx_file = tiny(tmp_path / "tiny.onnx")
    metadata = {"task": "detect", "names": "{0: 'thing'}"}
    profiles = {"images": ((1, 3, 32, 32), (1, 3, 32, 32), (4, 3, 32, 32))}
    engine = make_engine(tmp_path / "tiny.engine", onnx.load(onnx_file), profiles, metadata=metadata)
    ours, theirs = Pipe()
    serving = threading.Thread(target=worker.serve, args=[theirs])
    serving.start()

    def ask(request: object) -> Any:
        ours.send(request)
        return ours.recv()

    try:
        served = ask(Setup(engine, max_batch=8))
        assert (served.name, served.max_batch, served.names) == ("tiny", 4, {0: "thing"})
        with Detector.load(onnx_file) as detector:
            (right,) = detector([image(9)])
        start = time.perf_counter()
        answers, seconds = ask(("detect", [image(9)] * 6))
        assert [*seconds] == ["fit", "run", "boxes"]
        assert 0 < min(seconds.values()) < sum(seconds.values()) < time.perf_counter() - start
        for found in answers:
            np.testing.assert_array_equal(found.boxes, right.boxes)
        assert ask(("infer", {"images": np.zeros((2, 3, 32, 32), np.float32)}))[0]["output0"].shape == (2, 5, 4)
        assert [*ask(("infer", {"images": np.zeros((2, 3, 32, 32), np.float32)}))[1]] == ["run"]
        assert isinstance(ask(("infer", {})), UserError)
        assert isinstance(ask(("detect", [None])), CheckFailed)
    finally:
        ours.close()
        serving.join()


def test_a_request_of_many_images_takes_as_many_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Detector.load(tiny(tmp_path / "tiny.onnx")) as detector:
        assert worker.tried(detector, 2).max_batch == 2
        runs: list[int] = []
        infer = detector.infer
        monkeypatch.setattr(detector, "infer", lambda feed: runs.append(len(feed["images"])) or infer(feed))
        found, seconds = worker.detected(detector, [image(9)] * 5)
        assert len(found) == 5
        assert [*seconds] == ["fit", "run", "boxes"]
        assert runs == [2, 2, 1]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda path: path.write_bytes(b"garbage"), "is a text file"),
        (lambda path: tiny(path, bias=float("nan")), "gives output0 with .* that are not finite, on noise"),
        (selected, "is not a detector: it gives output0 .* whose rows are a box, a score and a class"),
        (lambda path: (write_artifact(path, "fused"), path.write_bytes(path.read_bytes()[:-9])), "has changed since"),
        (lambda path: path.unlink(), "does not exist"),
    ],
    ids=["garbage", "not finite", "rows", "half copied", "gone"],
)
def test_a_file_that_does_not_verify(tmp_path: Path, change: Callable[[Path], object], why: str) -> None:
    change(path := tiny(tmp_path / "tiny.onnx"))
    process = worker.Worker(Setup(path, {"threads": 1}))
    with pytest.raises((UserError, CheckFailed), match=why):
        process.load()
    process.close()


def test_a_process_that_ends_is_told(tmp_path: Path) -> None:
    process = worker.Worker(Setup(tiny(tmp_path / "tiny.onnx"), {"threads": 1}))
    process.load()
    process.kill()
    with pytest.raises(Died, match="SIGKILL"):
        process.detect([image(1)])
    process.close()
