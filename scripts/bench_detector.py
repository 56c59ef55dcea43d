"""Time a detector on ONNX Runtime: the trained YOLOv8n with three ACmix blocks, as exported, fused, and in INT8.

The files take turns at 640x640 pixels. At 160x160, for which the detector was trained, each is compared with the first
by what it finds in drawn images, and docs/found.webp shows in some of them what the first and the second find.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from itertools import combinations, islice
from pathlib import Path

import numpy as np

from acmix_deploy.detection.boxes import Detection
from acmix_deploy.detection.drawing import PALETTE, draw_box, label
from acmix_deploy.detection.images import opencv, read
from acmix_deploy.detection.matching import SAME, overlaps
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
"""In how many images detections are compared, which is what `verify` takes, and how many are drawn."""
SEED, SHOWN_SEED = 12, 16
"""Of those in which detections are counted, and of those from which the drawn ones are chosen."""
_SIDE, _GAP, _TITLE = 380, 16, 40  # pixels: of an image, between images, of the line above a row
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


def draw(found: DetectionComparison, scenes: Sequence[shapes.Scene], target: Path) -> None:
    """Images with what the reference finds, in a row, and below them with what the candidate finds.

    They are those with the most classes among the images in which the reference is right and every name can be read,
    whatever the candidate makes of them.

    Args:
        found: in ``scenes``, whose files are named by their numbers.
        target: the picture.
    """

    def order(image: ImageComparison) -> tuple[int, str]:
        return -len({each.name for each in _reference(image)}), image.image.name

    cv2 = opencv()
    shown = [each for each in found.images if is_right(_reference(each), scenes[int(each.image.stem)]) and _clear(each)]
    images = sorted(shown, key=order)[:SHOWN]
    colours = dict(zip(shapes.NAMES, PALETTE, strict=False))
    whole = np.zeros((2 * (_TITLE + _SIDE), SHOWN * (_SIDE + _GAP) - _GAP, 4), np.uint8)  # see-through between images
    for row, (title, side) in enumerate(zip(FILES, ("reference", "candidate"), strict=False)):
        top = row * (_TITLE + _SIDE) + _TITLE
        cv2.putText(whole, title, (2, top - 13), cv2.FONT_HERSHEY_SIMPLEX, 0.8, _GREY, 2, cv2.LINE_AA)
        for column, image in enumerate(images):
            picture = cv2.resize(read(image.image), (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC)
            for pair in image.pairs:
                each: Detection | None = getattr(pair, side)
                if each:
                    draw_box(picture, _corners(each), _text(each), colours[each.name])
            left = column * (_SIDE + _GAP)
            whole[top : top + _SIDE, left : left + _SIDE] = cv2.cvtColor(picture, cv2.COLOR_BGR2BGRA)
    done, data = cv2.imencode(target.suffix, whole, [cv2.IMWRITE_WEBP_QUALITY, 80])
    assert done
    target.write_bytes(data.tobytes())


def is_right(found: Sequence[Detection], scene: shapes.Scene) -> bool:
    """Whether every shape of a scene is found once, with its class and in its place, and nothing else."""
    names = [shapes.NAMES[kind] for kind in scene.classes]
    same = np.array([[each.name == name for name in names] for each in found], bool).reshape(len(found), len(names))
    if same.shape[0] != same.shape[1]:
        return False
    pairs = same & (overlaps(np.array([each.box for each in found]).reshape(-1, 4), scene.boxes) >= SAME)
    return bool((pairs.sum(0) == 1).all() and (pairs.sum(1) == 1).all())


def _clear(image: ImageComparison) -> bool:
    """Whether no name of the reference's detections lies, as they are drawn, on another name or in another box."""
    blank = np.zeros((_SIDE, _SIDE, 3), np.uint8)
    boxes, labels = list[Sequence[int]](), list[Sequence[int]]()
    for each in _reference(image):
        left, top, *rest = map(round, _corners(each))
        boxes.append((left, top, *rest))
        labels.append(label(blank, (left, top), _text(each))[:4])

    def apart(one: Sequence[int], other: Sequence[int]) -> bool:
        return one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]

    return all(
        apart(labels[one], labels[other]) and apart(labels[one], boxes[other]) and apart(boxes[one], labels[other])
        for one, other in combinations(range(len(labels)), 2)
    )


def _reference(image: ImageComparison) -> list[Detection]:
    return [pair.reference for pair in image.pairs if pair.reference]


def _corners(found: Detection) -> list[float]:
    return [edge * _SIDE / shapes.SIZE for edge in found.box]


def _text(found: Detection) -> str:
    return f"{found.name} {found.score:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=40, help="runs of each file (default: 40)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each file (default: 4)")
    measured.add_folder(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench_video.draw_pictures(folder / "mosaics", 16, islice(bench_video.sizes(), 16))
        small = make(folder / "small", shapes.SIZE, shapes.write(folder / "calibration", seed=11, count=64))
        unseen = shapes.write(folder / "unseen", seed=SEED, count=IMAGES)
        found = compare(small, unseen)
        (pictured,) = compare(small[:2], shapes.write(folder / "pictured", seed=SHOWN_SEED, count=IMAGES))
        draw(pictured, [*shapes.images(SHOWN_SEED, IMAGES)], options.into.parent / PICTURE)
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
