"""Time detection from files to boxes: this package's `detect` beside Ultralytics' predict(stream=True), in turn.

Pictures and the video are drawn, see :mod:`scripts.shapes`: mosaics of scenes, enlarged, under noise. The model is the
trained detector, fused, for images of 640x640 pixels; then one that does nothing, which leaves the path alone. There is
a process for each side and turn, one at a time, on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib import import_module
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scripts import measured, shapes

SIZE = 640
"""Of the models' input."""

THREADS = 2

SIDES = ("detect", "predict")
"""This package, and Ultralytics."""

_ASPECTS = (3 / 4, 2 / 3, 9 / 16)  # height of a picture by its width
_ALONE = 100  # images of which each step is timed while nothing else runs


def mosaic(scenes: Sequence[shapes.Scene], first: int, width: int, height: int) -> NDArray[np.uint8]:
    """Scenes side by side, four of them across, [height, width, 3] in BGR."""
    import cv2

    rows = -(-height * 4 // width)
    chosen = [scenes[(first + index) % len(scenes)].image for index in range(4 * rows)]
    lines = [np.hstack(chosen[4 * row : 4 * row + 4]) for row in range(rows)]
    side = shapes.SIZE * 4
    whole = np.vstack(lines)[: round(side * height / width)]
    return np.asarray(cv2.resize(whole, (width, height), interpolation=cv2.INTER_CUBIC))


def noisy(image: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """Under noise as of a sensor."""
    return (image.astype(np.int16) + random.integers(-6, 7, image.shape)).clip(0, 255).astype(np.uint8)


def draw_pictures(folder: Path, count: int, sizes: Iterator[tuple[int, int]]) -> None:
    """JPEG files of quality 90, of the sizes (width, height)."""
    import cv2

    folder.mkdir(parents=True)
    scenes, random = [*shapes.images(5, 60)], np.random.default_rng(0)
    for index, (width, height) in enumerate(islice(sizes, count)):
        image = noisy(mosaic(scenes, 5 * index, width, height), random)
        cv2.imwrite(str(folder / f"{index:04}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])


def draw_video(path: Path, count: int) -> None:
    """A walk over a mosaic, 1280x720, MPEG-4, 30 frames a second."""
    import cv2

    whole = mosaic([*shapes.images(6, 60)], 0, 2560, 1440)
    random = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 30.0, (1280, 720))
    for index in range(count):
        left, top = (round(edge * (0.5 - 0.5 * np.cos(index / 90 * turns))) for edge, turns in ((1280, 1), (720, 1.7)))
        writer.write(noisy(whole[top : top + 720, left : left + 1280], random))
    writer.release()


def sizes() -> Iterator[tuple[int, int]]:
    """600 to 1900 pixels wide, in three aspect ratios."""
    random = np.random.default_rng(1)
    while True:
        width = int(random.integers(600, 1901))
        yield width, round(width * _ASPECTS[int(random.integers(len(_ASPECTS)))])


def make_model(path: Path, size: int = SIZE) -> None:
    """The trained detector, fused, for images of a size; beside it, as it was exported, `plain.onnx`."""
    from acmix_deploy import families, yolo
    from acmix_deploy.checkpoint import load
    from acmix_deploy.export import export
    from acmix_deploy.fusion import fuse
    from scripts.train_shapes import CHECKPOINT

    model, plain = load(CHECKPOINT), path.with_name("plain.onnx")
    module: Any = model.module
    module = yolo.prepare_for_export(families.canonicalise(module)[0])
    export(module, plain, metadata=model.metadata, input_shape=(1, 3, size, size), opset=17, divisor=32)
    fuse(plain, path, expect=3)


def make_nothing(path: Path) -> None:
    """A model that gives the same 20 boxes of 80 classes for every image, [1, 84, 8400], and looks at one pixel."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random, boxes = np.random.default_rng(0), np.zeros((1, 84, 8400), np.float32)
    for index in range(20):
        boxes[0, :4, index * 7] = [*random.uniform(80, 560, 2), *random.uniform(20, 80, 2)]
        boxes[0, 4 + random.integers(80), index * 7] = random.uniform(0.3, 0.9)
    constants = {
        "boxes": boxes,
        "begin": np.array([0, 0, 0]),
        "end": np.array([1, 1, 1]),
        "axes": np.array([1, 2, 3]),
        "squeezed": np.array([3]),
        "nothing": np.array(0, np.float32),
    }
    nodes = [
        helper.make_node("Slice", ["images", "begin", "end", "axes"], ["pixel"]),
        helper.make_node("Squeeze", ["pixel", "squeezed"], ["flat"]),
        helper.make_node("Mul", ["flat", "nothing"], ["zero"]),
        helper.make_node("Add", ["zero", "boxes"], ["output0"]),
    ]
    graph = helper.make_graph(
        nodes,
        "nothing",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 84, 8400])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    names = {index: f"class{index}" for index in range(80)}
    told = {"task": "detect", "stride": 32, "batch": 1, "imgsz": [SIZE, SIZE], "names": names}
    helper.set_model_props(model, {key: str(value) for key, value in told.items()})
    onnx.save(model, path)


def detect_side(model: Path, source: str) -> dict[str, Any]:
    """Images through this package: all of them by its pipeline, then some step by step with nothing beside them."""
    from acmix_deploy.serving.detector import Detector
    from acmix_deploy.serving.path import Clock, detect
    from acmix_deploy.serving.sources import open_source

    boxes = images = 0
    with Detector.load(model, threads=THREADS) as detector:
        opened = open_source(source)
        clock = Clock()
        with closing(detect(detector, opened, clock)) as frames:
            for _, found in frames:
                images += 1
                boxes += len(found.scores) if found else 0
        times = clock.times(opened, images, 1)
        memory = peak_memory()
        alone: dict[str, list[float]] = {"decode": [], "fit": [], "run": [], "boxes": []}
        frames_again = open_source(source).frames
        for _ in range(min(_ALONE, images)):
            ticks = [time.perf_counter()]
            image = next(frames_again).image
            assert image is not None
            ticks.append(time.perf_counter())
            fitted = detector.fit([image])
            ticks.append(time.perf_counter())
            outputs = detector.run(fitted)
            ticks.append(time.perf_counter())
            detector.boxes(outputs, fitted.placements)
            ticks.append(time.perf_counter())
            for step, seconds in zip(alone, np.diff(ticks), strict=True):
                alone[step].append(float(seconds) * 1e3)
    step_ms = {step: median(samples) for step, samples in alone.items()}
    return {
        "images": images,
        "boxes": boxes,
        "images_per_second": times.images_per_second,
        "decode_ms": step_ms["decode"],
        "model_ms": step_ms["run"],
        "outside_ms": step_ms["fit"] + step_ms["boxes"],
        "memory_mb": memory,
        "busy": {step.step: step.busy for step in times.steps},
        "bottleneck": times.bottleneck,
    }


def predict_side(model: Path, source: str) -> dict[str, Any]:
    """Images through Ultralytics; the steps are those that it tells of each image, decoding what its loader takes."""
    loader = import_module("ultralytics.data.loaders").LoadImagesAndVideos
    decode: list[float] = []
    load_next = loader.__next__

    def timed(self: Any) -> Any:
        start = time.perf_counter()
        loaded = load_next(self)
        decode.append((time.perf_counter() - start) * 1e3)
        return loaded

    yolo = import_module("ultralytics").YOLO(model, task="detect")
    options: dict[str, Any] = {"imgsz": SIZE, "conf": 0.25, "iou": 0.7, "device": "cpu", "verbose": False}
    yolo.predict(np.zeros((SIZE, SIZE, 3), np.uint8), **options)
    loader.__next__ = timed
    boxes, told = 0, []
    start = time.perf_counter()
    for result in yolo.predict(source, stream=True, **options):
        boxes += len(result.boxes)
        told.append(result.speed)
    seconds = time.perf_counter() - start
    return {
        "images": len(told),
        "boxes": boxes,
        "images_per_second": len(told) / seconds,
        "decode_ms": median(decode),
        "model_ms": median(speed["inference"] for speed in told),
        "outside_ms": median(speed["preprocess"] + speed["postprocess"] for speed in told),
        "memory_mb": peak_memory(),
    }


def peak_memory() -> float:
    """Most memory that this process had until now, in MB; getrusage begins with what the parent had."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def in_process(side: str, model: Path, source: Path) -> dict[str, Any]:
    """A side in a process of its own, on two cores."""
    command = [sys.executable, "-m", "scripts.bench_video", "--side", side, str(model), str(source)]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:THREADS]))
    done = subprocess.run(["taskset", "-c", cores, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


_FIGURES = {"images_per_second": 1, "model_ms": 2, "outside_ms": 2, "decode_ms": 2, "memory_mb": 0}
_TITLES = ("images a second", "model ms", "outside ms", "decode ms", "peak memory MB")


def row(name: str, side: str, turns: list[dict[str, Any]]) -> list[measured.Value]:
    """What a side found, over its turns."""
    spreads = (measured.spread([turn[key] for turn in turns]) for key in _FIGURES)
    return [name, f"`{side}`", turns[0]["images"], turns[0]["boxes"], *spreads]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for what is drawn and exported; what is there is used again")
    parser.add_argument("--images", type=int, default=300, metavar="N")
    parser.add_argument("--frames", type=int, default=500, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--only", choices=("pictures", "video", "nothing"), nargs="*")
    measured.add_folder(parser)
    options = parser.parse_args()

    folder = options.folder
    cases = {
        "pictures": (folder / "shapes.fused.onnx", folder / f"pictures{options.images}"),
        "video": (folder / "shapes.fused.onnx", folder / f"video{options.frames}.mp4"),
        "nothing": (folder / "nothing.onnx", folder / f"hd{options.images}"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[Path, Callable[[Path], None]] = {
        cases["pictures"][0]: make_model,
        cases["nothing"][0]: make_nothing,
        cases["pictures"][1]: lambda path: draw_pictures(path, options.images, sizes()),
        cases["video"][1]: lambda path: draw_video(path, options.frames),
        cases["nothing"][1]: lambda path: draw_pictures(path, options.images, iter([(1280, 720)] * options.images)),
    }
    chosen = {name: case for name, case in cases.items() if not options.only or name in options.only}
    for path, make in makers.items():
        if not path.exists() and any(path in case for case in chosen.values()):
            print(f"making {path} ...", file=sys.stderr)
            make(path)
    rows: list[list[measured.Value]] = []
    for name, (model, source) in chosen.items():
        turns: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(options.rounds):
            for side in SIDES:
                print(f"{side}, {name} ...", file=sys.stderr)
                turns[side].append(in_process(side, model, source))
        rows += (row(name, side, turns[side]) for side in SIDES)
        last = turns["detect"][-1]
        shares = ", ".join(f"{step} {share:.0%}" for step, share in last["busy"].items())
        print(f"{name}: {shares}; waited for {last['bottleneck']}", file=sys.stderr)
    columns = {"source": None, "side": None, "images": 0, "boxes": 0}
    columns |= dict(zip(_TITLES, _FIGURES.values(), strict=True))
    packages = ("numpy", "opencv-python-headless", "ultralytics-opencv-headless")
    cells = f"Medians [least to most] of {options.rounds} turns"
    measured.write(options.into, "files-to-boxes", cells, columns, rows, packages=packages, threads=THREADS)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side, model, source = sys.argv[2:]
        print(json.dumps({"detect": detect_side, "predict": predict_side}[side](Path(model), source)))
    else:
        main()
