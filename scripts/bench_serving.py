"""Time `serve` with files that take uint8 beside those that take floats: answers a second and p99, in turn.

Pictures are 1280x720 JPEG files, drawn as those of :mod:`scripts.bench_video`, which also makes the models: the trained
detector at 640x640, fused, and one that does nothing. One server at a time, with one thread; clients in a process of
their own send pictures, then what the model takes, by KServe v2 in binary.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from scripts import bench_video, measured

ROOT = Path(__file__).resolve().parents[1]
_CLIENTS = 4


def make_pixels(source: Path, path: Path) -> None:
    """The file, taking uint8 in BGR."""
    import onnx

    from acmix_deploy.processing import Processing, attach

    model = onnx.load(source)
    attach(model, Processing("bgr"))
    onnx.save(model, path)


def turn(model: Path, photos: Path, seconds: float, *, tensors: bool) -> dict[str, Any]:
    """What clients got of a server that is started for them."""
    command = [sys.executable, "-m", "acmix_deploy.cli", "serve", str(model), "--port", "0", "--threads", "1", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout
        url = json.loads(server.stdout.readline())["url"]
        load = [url, model, photos, "--clients", _CLIENTS, "--seconds", seconds, *["--tensors"] * tensors]
        done = subprocess.run(
            [sys.executable, ROOT / "scripts/load.py", *map(str, load)], stdout=subprocess.PIPE, check=True
        )
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for what is drawn and exported; what is there is used again")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="of a turn")
    measured.add_folder(parser)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    photos = folder / "hd16"
    if not photos.exists():
        bench_video.draw_pictures(photos, 16, iter([(1280, 720)] * 16))
    rows: list[list[measured.Value]] = []
    for name, make in (("shapes.fused", bench_video.make_model), ("nothing", bench_video.make_nothing)):
        floats, pixels = folder / f"{name}.onnx", folder / f"{name}.pixels.onnx"
        if not floats.exists():
            make(floats)
        make_pixels(floats, pixels)
        for sent in ("pictures", "tensors"):
            turns: dict[Path, list[dict[str, Any]]] = {floats: [], pixels: []}
            for _ in range(options.rounds):
                for file, taken in turns.items():
                    taken.append(turn(file, photos, options.seconds, tensors=sent == "tensors"))
            for file, taken in turns.items():
                rates, slowest = ([one[key] for one in taken] for key in ("answers_per_second", "p99_ms"))
                ratios = [one / other["answers_per_second"] for one, other in zip(rates, turns[floats], strict=True)]
                spreads = measured.spread(rates), measured.spread(slowest)
                told = ("uint8", *spreads, measured.spread(ratios)) if file is pixels else ("float32", *spreads, None)
                rows.append([name, sent, *told])
    columns = {
        **dict.fromkeys(("model", "sent", "file takes")),
        "answers a second": 1,
        "p99 ms": 1,
        "times the answers": 2,
    }
    cells = f"Medians [least to most] of {options.rounds} turns of {options.seconds:g} s that the files took in turn"
    measured.write(options.into, "pixels", cells, columns, rows, packages=("uvicorn", "opencv-python-headless"))


if __name__ == "__main__":
    main()
