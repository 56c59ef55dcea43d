"""Give the trained detector to other tools, and write down what comes out: docs/measured/tools.json.

Needs `pip install onnxsim onnxslim`; `--modelopt` names the Python of an environment with `nvidia-modelopt[onnx]`.
Files are timed in turn by the CPU time of one thread, which other programs hardly change.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from acmix_deploy.forms import to_form
from acmix_deploy.fusion import fuse
from acmix_deploy.graph import count_nodes
from acmix_deploy.precision import quantize
from acmix_deploy.verify.judges import ByLabels
from scripts import measured, shapes
from scripts.train_shapes import CHECKPOINT, HELD_BACK

SHAPE = (1, 3, shapes.SIZE, shapes.SIZE)
COLUMNS = {"file": None, "nodes": 0, "CPU ms": 1, "times faster": 2, "mAP50": 3, "mAP50-95": 3}
_TOOLS = "ultralytics-opencv-headless", "onnxsim", "onnxslim", "polygraphy", "onnxruntime", "torch"


def files(folder: Path, modelopt: Path | None) -> dict[str, Path]:
    """A file of each tool, and of this package, by what was done."""
    calibration = shapes.write(folder / "calibration", seed=11, count=64)
    exported, raw, fused, plain, int8 = (folder / f"{name}.onnx" for name in ("ul", "raw", "fused", "plain", "int8"))
    for path, simplify in ((exported, True), (raw, False)):
        _ultralytics(path, simplify)
    made = {"exported by Ultralytics": exported, "the same with `simplify=False`": raw}
    polygraphy = "-c", "from polygraphy.tools import main; main()"
    for name, command in {
        "that, simplified by onnxsim": ["-m", "onnxsim", raw],
        "that, by `polygraphy surgeon sanitize`": [*polygraphy, "surgeon", "sanitize", raw, "--fold-constants", "-o"],
    }.items():
        made[name] = folder / f"{len(made)}.onnx"
        _run(sys.executable, *command, made[name])
    made["the first, by `acmix-deploy fuse`"] = fuse(exported, fused, expect=3).artifact.path
    onnx.save(to_form(onnx.load(fused), "plain"), plain)
    made["the same, in the form `plain`"] = plain
    made["the fused file, by `acmix-deploy quantize`: INT8"] = quantize(fused, int8, calibration).artifact.path
    if modelopt:
        np.save(folder / "images.npy", _images(calibration))
        for mode in ("int8", "fp8"):
            for name, source in {"the first": exported, "the form `plain`": plain, "the fused file": fused}.items():
                title, target = f"{name}, by ModelOpt: {mode.upper()}", folder / f"{len(made)}.onnx"
                options = ["--calibration_eps", "cpu", "--high_precision_dtype", "fp32", "--output_path", target]
                options += ["--calibration_data_path", folder / "images.npy"]
                program = [modelopt, "-m", "modelopt.onnx.quantization", "--quantize_mode", mode]
                _run(*program, "--onnx_path", source, *options, may_fail=True)
                made[title] = target
    return made


def _ultralytics(path: Path, simplify: bool) -> None:
    from acmix_deploy import yolo

    shutil.copy(CHECKPOINT, path.with_suffix(".pt"))
    model = yolo.ultralytics("models").YOLO(path.with_suffix(".pt"))
    model.export(format="onnx", imgsz=shapes.SIZE, device="cpu", simplify=simplify)


def _images(folder: Path) -> np.ndarray:
    import cv2

    pictures = [cv2.imread(str(path)) for path in sorted(folder.rglob("*.png"))]
    return np.stack([image[:, :, ::-1].transpose(2, 0, 1) for image in pictures]).astype(np.float32) / 255


def _run(*command: str | Path, may_fail: bool = False) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(command, done.stderr.strip().splitlines()[-1], sep="\n", file=sys.stderr)
        if not may_fail:
            raise SystemExit(done.returncode)


def times(paths: list[Path], turns: int) -> dict[Path, np.ndarray]:
    """Milliseconds of CPU of each run, the first of each turn left out."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    x = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
    sessions = [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in paths]
    found: dict[Path, list[float]] = {path: [] for path in paths}
    for _ in range(turns):
        for path, session in zip(paths, sessions, strict=True):
            for run in range(5):
                start = time.thread_time()
                session.run(None, {session.get_inputs()[0].name: x})
                if run:
                    found[path].append(1e3 * (time.thread_time() - start))
    return {path: np.array(values) for path, values in found.items()}


def figures(made: dict[str, Path], folder: Path, images: int, turns: int) -> list[list[measured.Value]]:
    """Rows of :data:`COLUMNS`: each file with its nodes, its speed and what it detects."""
    first, *_ = written = {name: path for name, path in made.items() if path.exists()}
    floats = [path for name, path in written.items() if not any(mode in name for mode in ("INT8", "FP8"))]
    found = {path: float(np.median(each)) for path, each in times(floats, turns).items()}
    judge = ByLabels(written[first], SHAPE, shapes.write(folder / "held-back", HELD_BACK, images), 0.5)
    rows: list[list[measured.Value]] = []
    for name, path in made.items():
        if name not in written:
            rows.append([name, "fails", *[None] * 4])
            continue
        model = onnx.load(path)
        if not model.metadata_props:  # some tools lose it, and it tells what an output is
            model.metadata_props.extend(onnx.load(written[first]).metadata_props)
        detected = judge(model)
        speed = [found[path], found[written[first]] / found[path]] if path in found else [None, None]
        rows.append([name, count_nodes(model), *speed, detected["map50"], detected["map50_95"]])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--modelopt", type=Path, help="a Python with nvidia-modelopt[onnx]")
    parser.add_argument("--images", type=int, default=200, help="held-back images (default: 200)")
    parser.add_argument("--turns", type=int, default=12, help="turns of four runs each (default: 12)")
    measured.add_folder(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"YOLO_CONFIG_DIR": name, "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
        rows = figures(files(Path(name), options.modelopt), Path(name), options.images, options.turns)
    versions = {tool: metadata.version(tool) for tool in _TOOLS}
    if options.modelopt:
        code = "from importlib import metadata; print(metadata.version('nvidia-modelopt'))"
        asked = subprocess.run([options.modelopt, "-c", code], capture_output=True, text=True, check=True)
        versions["nvidia-modelopt"] = asked.stdout.strip()
    cells = f"{options.images} held-back images; CPU time of one thread, median of {4 * options.turns} runs"
    measured.write(options.into, "tools", cells, COLUMNS, rows, installed=versions, threads=1)


if __name__ == "__main__":
    main()
