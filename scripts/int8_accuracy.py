"""What INT8 costs the trained detector in mean average precision: over several calibration sets, and with a target.

The table of docs/int8.md. Images are drawn, see scripts/shapes.py; those that files are compared on are the held-back
ones, which nothing was trained, calibrated or searched on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from acmix_deploy import families, yolo
from acmix_deploy.checkpoint import load
from acmix_deploy.export import export
from acmix_deploy.fusion import fuse
from acmix_deploy.precision import Goal, Int8Report, quantize
from acmix_deploy.report.tables import search_steps, searched
from acmix_deploy.verify.judges import ByLabels
from scripts import shapes
from scripts.train_shapes import CHECKPOINT, HELD_BACK

CALIBRATION, SEARCH = (11, 21, 31), 41
"""Seeds of the sets that ranges come from, and of the one that a search judges by."""
SHAPE = (1, 3, shapes.SIZE, shapes.SIZE)


class Row(NamedTuple):
    """One INT8 file."""

    name: str
    seed: int
    report: Int8Report
    drop: float
    """In points of mAP50-95, on the held-back images."""
    error: float
    """Its standard error."""


def fused(folder: Path) -> Path:
    """The float file: the trained detector, exported at 160x160 and fused."""
    model = load(CHECKPOINT)
    module = yolo.prepare_for_export(families.canonicalise(model.module)[0])
    export(module, folder / "plain.onnx", metadata=model.metadata, input_shape=SHAPE, opset=19, divisor=32)
    fuse(folder / "plain.onnx", folder / "fused.onnx", expect=3)
    return folder / "fused.onnx"


class Bench:
    """The float file with its images, in a folder.

    Args:
        folder: for all files.
        count: held-back images, and of those that a search judges by.
        calibration: images of each calibration set.
    """

    def __init__(self, folder: Path, count: int = 500, calibration: int = 128) -> None:
        self.folder, self.count, self.calibration = folder, count, calibration
        self.source = fused(folder)
        self.judge = ByLabels(self.source, SHAPE, shapes.write(folder / "held-back", HELD_BACK, count), 0.5)

    def row(self, name: str, seed: int = CALIBRATION[0], goal: float | None = None, **options: Any) -> Row:
        """Quantise with ``options`` of :func:`quantize`, calibrated on the set of ``seed``; search with a ``goal``."""
        images = shapes.write(self.folder / f"calibration-{seed}", seed, self.calibration)
        target = self.folder / "int8.onnx"
        wanted = None
        if goal is not None:
            labelled = shapes.write(self.folder / "search", SEARCH, self.count)
            wanted = Goal({"map_drop": goal}, lambda source, shape: ByLabels(source, shape, labelled, goal))
        made = quantize(self.source, target, images, goal=wanted, **options)
        figures = self.judge(onnx.load(made.artifact.path))
        return Row(name, seed, made.found, figures["map_drop"], figures["map_drop_error"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500, help="held-back images (default: 500)")
    parser.add_argument("--goal", type=float, default=0.1, help="points that the search accepts (default: 0.1)")
    arguments = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.images)
        print(f"float: {bench.judge.reference}, {arguments.images} images", flush=True)
        variants: dict[str, dict[str, Any]] = {
            "default": {},
            "--quantize-head": {"quantize_head": True},
            "--for onnxruntime": {"scheme": "uint8"},
            "--for onnxruntime --quantize-head": {"scheme": "uint8", "quantize_head": True},
        }
        for name, options in variants.items():
            for seed in CALIBRATION:
                row = bench.row(name, seed, **options)
                share = f"{len(row.report.layers)} layers, {row.report.int8_share:.1%} of multiply-adds"
                print(f"{name:33} seed {seed}: {share}, drop {row.drop:.3f} +- {row.error:.3f}", flush=True)
        row = bench.row("search", goal=arguments.goal, quantize_head=True)
        assert row.report.search
        print(searched(row.report.search))
        table = search_steps(row.report.search)
        for cells in zip(*(column.cells for column in table.columns), strict=True):
            print(" | ".join(map(str, cells)))
        print(f"on the held-back images: drop {row.drop:.3f} +- {row.error:.3f}; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
