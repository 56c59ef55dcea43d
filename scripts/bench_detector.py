"""Time a detector on ONNX Runtime: the trained YOLOv8n with three ACmix blocks, as exported, fused, and in INT8.

The files take turns at 640x640 pixels. At 160x160, for which the detector was trained, each is compared with the first
by what it finds in drawn images, and docs/found.webp shows that in three of them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from acmix_deploy.detection.boxes import Detection
from acmix_deploy.detection.drawing import PALETTE, draw_box
from acmix_deploy.detection.images import opencv, read
from acmix_deploy.fusion import fuse
from acmix_deploy.precision import quantize
from acmix_deploy.profile import profile
from acmix_deploy.verify import DetectionComparison, compare_files
from acmix_deploy.verify.detections import ImageComparison
from scripts import bench_video, measured, shapes

PICTURE = "found.webp"
FILES = "as PyTorch exports it", "fused", "fused, INT8 for a CPU"
LARGE = bench_video.SIZE
IMAGES, SHOWN = 32, 3
"""Of what files find something in; the first is what `verify` takes."""
_SIDE, _GAP, _TITLE = 520, 20, 56  # pixels: of an image, between images, of the line above a row
_GREY = 144, 133, 122, 255  # BGRA; can be read on white and on black


def make(folder: Path, size: int, calibration: Path) -> list[Path]:
    """The three files for images of a size."""
    folder.mkdir()
    plain, fused, grouped, int8 = (folder / f"{name}.onnx" for name in ("plain", "fused", "grouped", "int8"))
    bench_video.make_model(fused, size)
    fuse(plain, grouped, conv_branch="grouped", expect=3)
    quantize(grouped, int8, calibration, scheme="uint8")
    return [plain, fused, int8]


def compare(files: Sequence[Path], images: Path) -> list[DetectionComparison]:
    """What each file but the first finds in images, against the first."""
    found = (compare_files(files[0], file, images=images) for file in files[1:])
    return [comparison for verification in found for comparison in verification.detections]


def draw(found: DetectionComparison, target: Path) -> None:
    """Three images with what the reference finds, in a row, and below them with what the candidate finds."""

    def classes(image: ImageComparison) -> set[str]:
        return {each.name for pair in image.pairs if (each := pair.reference)}

    cv2 = opencv()
    # Those with the most classes, whatever the candidate makes of them.
    images = sorted(found.images, key=lambda image: (-len(classes(image)), image.image.name))[:SHOWN]
    colours = dict(zip(shapes.NAMES, PALETTE, strict=False))
    whole = np.zeros((2 * (_TITLE + _SIDE), SHOWN * (_SIDE + _GAP) - _GAP, 4), np.uint8)  # see-through between images
    for row, (title, side) in enumerate(zip((FILES[0], FILES[-1]), ("reference", "candidate"), strict=True)):
        top = row * (_TITLE + _SIDE) + _TITLE
        cv2.putText(whole, title, (2, top - 18), cv2.FONT_HERSHEY_SIMPLEX, 1.1, _GREY, 2, cv2.LINE_AA)
        for column, image in enumerate(images):
            picture = cv2.resize(read(image.image), (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)
            for pair in image.pairs:
                each: Detection | None = getattr(pair, side)
                if each:
                    corners = [edge * _SIDE / shapes.SIZE for edge in each.box]
                    draw_box(picture, corners, f"{each.name} {each.score:.2f}", colours[each.name])
            left = column * (_SIDE + _GAP)
            whole[top : top + _SIDE, left : left + _SIDE] = cv2.cvtColor(picture, cv2.COLOR_BGR2BGRA)
    done, data = cv2.imencode(target.suffix, whole, [cv2.IMWRITE_WEBP_QUALITY, 65])
    assert done
    target.write_bytes(data.tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60, help="runs of each file (default: 60)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each file (default: 6)")
    measured.add_folder(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_video.draw_pictures(folder / "mosaics", 16, islice(bench_video.sizes(), 16))
        small = make(folder / "small", shapes.SIZE, shapes.write(folder / "calibration", seed=11, count=64))
        unseen = shapes.write(folder / "unseen", seed=12, count=IMAGES)
        found = compare(small, unseen)
        draw(found[-1], options.into.parent / PICTURE)
        large = make(folder / "large", LARGE, folder / "mosaics")
        times = profile(large, samples=options.samples, rounds=options.rounds, seconds=120)
        expected = found[0].expected
        rows: list[list[measured.Value]] = []
        for title, file, time, one in zip(FILES, large, times, (None, *found), strict=True):
            megabytes = file.stat().st_size / 1e6
            faster = measured.times_faster(times[0], time) if one else None
            counts = (one.matched, one.lost + one.class_changes, one.added) if one else (expected, None, None)
            rows.append([title, megabytes, measured.percentiles(time), faster, *counts])
    cells = (
        f"Median [10th to 90th percentile] of {options.samples} runs at {LARGE}x{LARGE} in {options.rounds} turns, "
        f"batch 1, and the ratio of medians [over the turns]; boxes in {IMAGES} drawn images at "
        f"{shapes.SIZE}x{shapes.SIZE}"
    )
    columns = {"file": None, "MB": 1, "ms": 0, "times faster": 1, "boxes found": 0, "lost": 0, "added": 0}
    measured.write(options.into, "detector", cells, columns, rows, threads=times[0].threads)


if __name__ == "__main__":
    main()
