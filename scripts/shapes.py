"""A detection data set of drawn shapes: as many images as wanted, the same for the same seed on every machine.

Six classes on gradients, stripes and patches under noise, 12 to 60 pixels wide, at any angle, some partly hidden by
others. Colours say nothing about the class. Drawn in integers by NumPy alone, from a stream that NumPy has frozen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE = 160
"""Width and height of every image in pixels."""

_TURNS = np.exp(2j * np.pi * np.arange(20) / 20)
_POLYGONS = {  # corners as x + iy, in a circle of radius 1
    "square": _TURNS[::5],
    "triangle": np.exp(2j * np.pi * np.arange(3) / 3),
    "star": _TURNS[::2] * np.tile([1, 0.4], 5),
    "cross": np.concatenate([np.array([0.95 + 0.3j, 0.3 + 0.3j, 0.3 + 0.95j]) * turn for turn in _TURNS[::5]]),
}
_HOLE = {"circle": 0.0, "ring": 0.55}  # radius of the hole, in radii
NAMES = (*_HOLE, *_POLYGONS)

_FINE = 4  # positions to a pixel, along x and y
_VISIBLE = 0.6  # share of a shape's area that others leave to be seen


class Scene(NamedTuple):
    """One image and what is on it."""

    image: NDArray[np.uint8]
    """[SIZE, SIZE, 3] in BGR."""
    boxes: NDArray[np.float32]
    """[N, 4] as x1, y1, x2, y2 in pixels, around the whole shape whether hidden in part or not."""
    classes: NDArray[np.int64]
    """[N], indices into :data:`NAMES`."""


def images(seed: int, count: int) -> Iterator[Scene]:
    """``count`` scenes of the stream that begins at ``seed``."""
    random = np.random.RandomState(seed)
    for _ in range(count):
        yield _scene(random)


def write(folder: Path, seed: int, count: int) -> Path:
    """Write scenes as Ultralytics reads them: ``images/*.png`` and, for each, ``labels/*.txt``.

    Returns:
        The folder of the images.
    """
    import cv2

    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(images(seed, count)):
        cv2.imwrite(str(folder / f"images/{index:04}.png"), scene.image)
        (folder / f"labels/{index:04}.txt").write_text(labels(scene), encoding="utf-8")
    return folder / "images"


def write_dataset(folder: Path, training: int, validation: int) -> Path:
    """Write a data set as Ultralytics reads it: images to train on (seed 1), others to validate on (seed 3), and the
    file that names both.

    Returns:
        That file, ``data.yaml``.
    """
    splits = {
        "train": write(folder / "train", 1, training),
        "val": write(folder / "val", 3, validation),
    }
    lines = {"path": str(folder.resolve())} | {name: f"{name}/{images.name}" for name, images in splits.items()}
    described = "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())
    names = "".join(f"  {index}: {name}\n" for index, name in enumerate(NAMES))
    (folder / "data.yaml").write_text(f"{described}names:\n{names}", encoding="utf-8")
    return folder / "data.yaml"


def labels(scene: Scene) -> str:
    """The label file of a scene: class, centre x, centre y, width and height a line, in fractions of the image."""
    corners = scene.boxes / SIZE
    rows = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    lines = zip(scene.classes, rows, strict=True)
    return "".join(f"{kind} {' '.join(f'{value:.6f}' for value in row)}\n" for kind, row in lines)


def _scene(random: np.random.RandomState) -> Scene:
    image = _background(random)
    owner = np.full((SIZE, SIZE), -1)  # the shape that is seen at a pixel
    areas: list[int] = []
    boxes, classes = [], []
    for _ in range(random.randint(3, 10)):
        kind = random.randint(len(NAMES))
        radius = random.randint(6 * _FINE, random.randint(8 * _FINE, 30 * _FINE + 1))
        x, y = random.randint(radius, SIZE * _FINE - radius, 2)
        coverage, box = _rasterise(NAMES[kind], x, y, radius, random.random_sample())
        covered = coverage * 2 >= _FINE**2
        colour = _colour_unlike(image[covered].mean(0), random)
        left = np.bincount(owner[~covered & (owner >= 0)], minlength=len(areas))
        if (left < _VISIBLE * np.array(areas)).any():
            continue
        owner[covered] = len(areas)
        areas.append(int(covered.sum()))
        alpha = coverage[..., None]
        image = (image * (_FINE**2 - alpha) + colour * alpha) // _FINE**2
        boxes.append(box)
        classes.append(kind)
    noise = random.randint(0, 20)
    image = (image + random.randint(-noise, noise + 1, image.shape)).clip(0, 255)
    return Scene(image.astype(np.uint8), np.array(boxes, np.float32), np.array(classes, np.int64))


def _background(random: np.random.RandomState) -> NDArray[Any]:
    """Two colours that are not far apart, mixed as a gradient, as stripes or by patches."""
    y, x = np.mgrid[:SIZE, :SIZE]
    first = random.randint(0, 256, 3)
    second = (first + random.randint(-60, 61, 3)).clip(0, 255)
    slope = random.randint(-4, 5, 2)
    along = slope[0] * x + slope[1] * y
    along -= along.min()
    period, style = random.randint(10, 60), random.randint(3)
    if style == 0:
        weight = along * 16 // max(along.max(), 1)
    elif style == 1:
        weight = along // period % 2 * 16
    else:
        weight = random.randint(0, 17, (SIZE, SIZE))[y // period, x // period]
    return (first * (16 - weight[..., None]) + second * weight[..., None]) // 16


def _colour_unlike(other: NDArray[Any], random: np.random.RandomState) -> NDArray[Any]:
    while True:
        colour = random.randint(0, 256, 3)
        if np.abs(colour - other).sum() >= 120:
            return colour


def _rasterise(name: str, x: int, y: int, radius: int, turn: float) -> tuple[NDArray[Any], list[float]]:
    """How many of the _FINE**2 positions in each pixel a shape covers, [SIZE, SIZE], and its box in pixels.

    Args:
        name: of :data:`NAMES`.
        x, y, radius: of the circle around it, in positions.
        turn: angle in full turns.
    """
    start = [(centre - radius) // _FINE for centre in (x, y)]
    stop = [min(SIZE, (centre + radius) // _FINE + 1) for centre in (x, y)]
    columns, rows = (np.arange(a * _FINE, b * _FINE) - c for a, b, c in zip(start, stop, (x, y), strict=True))
    rows = rows[:, None]
    if name in _HOLE:
        distance = columns**2 + rows**2
        inside = (distance <= radius**2) & (distance >= int(radius * _HOLE[name]) ** 2)
    else:
        corners = np.rint(radius * _POLYGONS[name] * np.exp(2j * np.pi * turn))
        inside = np.zeros((rows.size, columns.size), bool)
        for a, b in zip(corners, np.roll(corners, -1), strict=True):  # a ray to the right crosses the edge a-b, or not
            (ax, ay), (bx, by) = ((int(corner.real), int(corner.imag)) for corner in (a, b))
            crosses = ((columns - ax) * (by - ay) < (rows - ay) * (bx - ax)) == (by > ay)
            inside ^= ((ay > rows) != (by > rows)) & crosses
    coverage = np.zeros((SIZE, SIZE), np.int64)
    parts = inside.reshape(stop[1] - start[1], _FINE, stop[0] - start[0], _FINE)
    coverage[start[1] : stop[1], start[0] : stop[0]] = parts.sum((1, 3))
    (left, right), (top, bottom) = (np.flatnonzero(inside.any(axis))[[0, -1]] for axis in (0, 1))
    box = [
        start[0] + left / _FINE,
        start[1] + top / _FINE,
        start[0] + (right + 1) / _FINE,
        start[1] + (bottom + 1) / _FINE,
    ]
    return coverage, box


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a detection data set of shapes, as Ultralytics reads one.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=800, help="images to train on (default: 800)")
    parser.add_argument("--val", type=int, default=100, help="images to validate on (default: 100)")
    arguments = parser.parse_args()
    print(f"drawn: {write_dataset(arguments.folder, arguments.train, arguments.val)}")


if __name__ == "__main__":
    main()
