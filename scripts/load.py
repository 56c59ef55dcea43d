"""Load on a server of a detector, from a process of its own, with every answer compared with what the model finds.

Requests arrive at a constant rate whether the ones before them were answered or not, and their latency counts from when
they were to arrive; without --rate some clients ask one after another, and what they get is the capacity.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from acmix_deploy.detection.boxes import Detection, named
from acmix_deploy.detection.heads import Array
from acmix_deploy.detection.images import find, read
from acmix_deploy.serving.detector import Detector
from acmix_deploy.serving.kserve import HEADER_LENGTH

SCORE, EDGE = 1e-3, 0.1
"""How far an answer may be from the model's: alone and in a batch it computes in another order. EDGE is in pixels."""

_PATIENCE = 60.0


class Picture(NamedTuple):
    """A file and what the model finds in it."""

    data: bytes
    detections: list[Detection]


class Question(NamedTuple):
    """A request, and what tells whether the body of its answer is right."""

    path: str
    data: bytes
    headers: dict[str, str]
    is_right: Callable[[bytes], bool]


class Load:
    """Requests in turn, and what came of them."""

    def __init__(self, client: aiohttp.ClientSession, questions: Sequence[Question]) -> None:
        self._client, self._questions = client, questions
        self.statuses: Counter[str] = Counter()
        self.wrong = 0
        self.seconds: list[float] = []
        """Of those that were answered."""
        self._sent = 0

    async def ask(self, arrival: float) -> None:
        """One request that was to arrive at a time of :func:`time.perf_counter`."""
        path, data, headers, is_right = self._questions[self._sent % len(self._questions)]
        self._sent += 1
        try:
            async with self._client.post(path, data=data, headers=headers) as response:
                answer = await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            self.statuses[type(error).__name__] += 1
            return
        took = time.perf_counter() - arrival
        self.statuses[str(response.status)] += 1
        if response.status == 200:
            self.seconds.append(took)
            self.wrong += not is_right(answer)

    async def at_rate(self, rate: float, seconds: float) -> None:
        """Requests at a constant rate."""
        start = time.perf_counter()
        waiting: set[asyncio.Task[None]] = set()
        for index in range(round(rate * seconds)):
            arrival = start + index / rate
            await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
            waiting.add(task := asyncio.create_task(self.ask(arrival)))
            task.add_done_callback(waiting.discard)
        await asyncio.gather(*waiting)

    async def by_clients(self, clients: int, seconds: float) -> None:
        """Requests of clients each of which waits for its answer."""
        end = time.perf_counter() + seconds

        async def client() -> None:
            while (now := time.perf_counter()) < end:
                await self.ask(now)

        await asyncio.gather(*(client() for _ in range(clients)))


def same(answer: list[dict[str, Any]], right: Sequence[Detection]) -> bool:
    """Whether an answer has the same boxes, in any order."""
    left = list(right)
    for one in answer:
        fitting = [
            other
            for other in left
            if other.name == one["name"]
            and abs(other.score - one["score"]) <= SCORE
            and np.abs(np.subtract(other.box, one["box"])).max() <= EDGE
        ]
        if not fitting:
            return False
        left.remove(fitting[0])
    return not left


def known(model: Path, photos: Path) -> list[Picture]:
    """The pictures of a folder with what the model finds in each alone."""
    pictures = []
    with Detector.load(model, threads=1) as detector:
        for path in find(photos).paths:
            image = read(path)
            assert image is not None
            (found,) = detector([image])
            pictures.append(Picture(path.read_bytes(), named(found, detector.names)))
    return pictures


def about_picture(picture: Picture) -> Question:
    """What is in it?"""

    def is_right(body: bytes) -> bool:
        return same(json.loads(body)["images"][0]["detections"], picture.detections)

    return Question("/v1/detect", picture.data, {}, is_right)


def about_tensors(model: Path, photos: Path) -> list[Question]:
    """What the model gives for the pictures of a folder, by KServe v2: fitted here, in binary both ways."""
    questions = []
    with Detector.load(model, threads=1) as detector:
        ((image, _, dtype),), kinds = detector.inputs, {"uint8": "UINT8", "float32": "FP32"}
        for path in find(photos).paths:
            fitted = detector.fit([read(path)])
            ((_, output),) = detector.run(fitted).items()
            tensor = {
                "name": image,
                "datatype": kinds[dtype.name],
                "shape": fitted.batch.shape,
                "parameters": {"binary_data_size": fitted.batch.nbytes},
            }
            head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
            headers = {HEADER_LENGTH: str(len(head)), "content-type": "application/octet-stream"}

            def is_right(body: bytes, right: Array = output) -> bool:
                given = np.frombuffer(body[-right.nbytes :], right.dtype).reshape(right.shape)
                return np.allclose(given, right, rtol=SCORE, atol=EDGE)

            data = head + fitted.batch.tobytes()
            questions.append(Question(f"/v2/models/{detector.name}/infer", data, headers, is_right))
    return questions


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """The load that is asked for, and its outcome."""
    questions = about_tensors(options.model, options.photos) if options.tensors else []
    questions = questions or [*map(about_picture, known(options.model, options.photos))]
    timeout = aiohttp.ClientTimeout(total=_PATIENCE)
    connections = aiohttp.TCPConnector(limit=0)  # as many as it takes
    async with aiohttp.ClientSession(options.url, timeout=timeout, connector=connections) as client:
        load = Load(client, questions)
        start = time.perf_counter()
        if options.rate:
            await load.at_rate(options.rate, options.seconds)
        else:
            await load.by_clients(options.clients, options.seconds)
        took = time.perf_counter() - start
    p50, p90, p99 = np.percentile(load.seconds or [np.nan], [50, 90, 99]) * 1e3
    return {
        "requests": sum(load.statuses.values()),
        "statuses": dict(load.statuses),
        "wrong": load.wrong,
        "answers_per_second": round(len(load.seconds) / took, 2),
        "median_ms": round(p50, 2),
        "p90_ms": round(p90, 2),
        "p99_ms": round(p99, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model", type=Path, help="the file that is served")
    parser.add_argument("photos", type=Path, help="folder of images")
    parser.add_argument("--rate", type=float, metavar="R", help="requests in a second")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="without --rate (default: 16)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S")
    parser.add_argument("--tensors", action="store_true", help="send what the model takes, not pictures")
    outcome = asyncio.run(run(parser.parse_args()))
    print(json.dumps(outcome))
    return int(bool(outcome["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
