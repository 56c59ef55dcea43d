"""A detector of bright squares, small enough to be read: eight by eight cells of eight pixels, a box for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

SIZE, CELL = 64, 8
_CHANNELS = 40
_SIDE = SIZE // CELL
LAYERS = ("mean", "spoilt", "same", "score")


def detector(path: Path, *, spoilt: float = 1, **metadata: str) -> Path:
    """Its score is high where a cell is bright. All layers but the last are convolutions that INT8 holds well.

    Args:
        path: where it goes.
        spoilt: how much larger the weights of a channel are that is always dark; they take the range of the others.
        metadata: entries beside those that make it a detector, or instead.
    """
    random = np.random.default_rng(0)
    mean = np.abs(random.standard_normal((_CHANNELS, 3, CELL, CELL))).astype(np.float32)
    mean /= mean.sum(axis=(1, 2, 3), keepdims=True)
    mean[0] = 0
    mixing = random.random((_CHANNELS, _CHANNELS, 1, 1)).astype(np.float32) / _CHANNELS * 2
    bad = mixing.copy()
    bad[:, 0] = spoilt / _CHANNELS
    centres = (np.arange(_SIDE) + 0.5) * CELL
    y, x = (grid.ravel() for grid in np.meshgrid(centres, centres, indexing="ij"))
    side = np.full(_SIDE**2, CELL)
    score = np.full((1, _CHANNELS, 1, 1), 10 / _CHANNELS, np.float32)
    arrays = {
        "mean.weight": mean,
        "spoilt.weight": bad,
        "same.weight": mixing,
        "score.weight": score,
        "score.bias": np.array([-5], np.float32),
        "boxes": np.stack((x, y, side, side))[None].astype(np.float32),
        "flat": np.array([1, 1, -1]),
    }
    nodes = [
        helper.make_node("Conv", ["images", "mean.weight"], ["a"], name="mean", strides=[CELL, CELL]),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "spoilt.weight"], ["c"], name="spoilt"),
        helper.make_node("Relu", ["c"], ["d"], name="relu_1"),
        helper.make_node("Conv", ["d", "same.weight"], ["e"], name="same"),
        helper.make_node("Conv", ["e", "score.weight", "score.bias"], ["f"], name="score"),
        helper.make_node("Sigmoid", ["f"], ["g"], name="sigmoid"),
        helper.make_node("Reshape", ["g", "flat"], ["h"], name="reshape"),
        helper.make_node("Concat", ["boxes", "h"], ["output0"], name="concat", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "blobs",
        [helper.make_tensor_value_info("images", 1, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("output0", 1, [1, 5, _SIDE**2])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    told = {"task": "detect", "names": "{0: 'blob'}", "imgsz": f"[{SIZE}, {SIZE}]"} | metadata
    helper.set_model_props(model, told)
    onnx.save(model, path)
    return path


def images(folder: Path, count: int, seed: int = 0) -> Path:
    """Dark scenes with two to five bright cells, and their labels in YOLO's form beside them."""
    import cv2

    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        image = random.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8)
        lines = []
        for cell in random.choice(_SIDE**2, random.integers(2, 6), replace=False):
            row, column = divmod(int(cell), _SIDE)
            image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = random.integers(200, 256)
            lines.append(f"0 {(column + 0.5) / _SIDE} {(row + 0.5) / _SIDE} {1 / _SIDE} {1 / _SIDE}\n")
        cv2.imwrite(str(folder / f"{index:03}.png"), image)
        (folder / f"{index:03}.txt").write_text("".join(lines))
    return folder
