"""AcmixReassembly in standard ONNX operators: the function body that travels with every node.

A runtime without a plugin runs this. Output pixels that read one pixel of x are a cell, u x u of them where there is
upsampling, one where there is a stride. A tile is TILE x TILE cells that are the dilation apart, and sees S x S pixels
of x, S = (TILE - 1) * s + K. They are gathered once, rows of c numbers. The weights of a cell are zeros but at its own
K x K of them, so that a product of matrices weighs and sums for all cells. A pixel is copied (S / TILE)^2 times where
unfold copies it K^2 times. Other ways to spread the weights were slower, see docs/benchmarks.md.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import onnx

from acmix_deploy.operators.function_builder import FunctionBuilder, Value
from acmix_deploy.operators.reassembly import REASSEMBLY
from acmix_deploy.targets import OPSETS

TILE = 3
"""Side of a tile in cells; 3 was as fast as 4 on ONNX Runtime, with fewer nodes, see docs/benchmarks.md."""


@dataclass(frozen=True)
class _Axis:
    """Index arithmetic along H or W, for t tiles of T cells that see S pixels of x. All int64."""

    cells: Value
    """Number of cells, scalar."""
    tiles: Value
    """t, scalar."""
    cell: Value
    """[t, T]: each cell of a tile; one past the end repeats the last one."""
    seen: Value
    """[t, S]: each pixel that a tile sees, inside the map or not."""
    inside: Value
    """[t, S]: whether it is inside."""
    tile_of: Value
    """[cells]: tile of each cell."""
    place: Value
    """[cells]: place of each cell in its tile."""


def function_body(opset: int = OPSETS[0], tile: int = TILE) -> onnx.FunctionProto:
    """The operator as an ONNX function.

    Every size is computed from the inputs' shapes, so one body serves static and dynamic files; where shapes are static
    ONNX Runtime folds the index arithmetic as it loads the file.

    Args:
        opset: the opset of the model that will carry the function (the checker wants both equal), one of OPSETS.
        tile: side of a tile in cells.
    """
    f = FunctionBuilder()
    x, w = f.input("x"), f.input("w")
    groups, kernel, stride, up, dilation = (
        f.attribute(name, "int") for name in ("groups", "kernel_size", "stride", "upsampling", "dilation")
    )
    batch, channels = (f("Gather", f("Shape", x), axis) for axis in (0, 1))
    group_channels = channels // groups
    window = stride * (tile - 1) + kernel
    rows, columns = (_axis(f, x, w, axis, tile, window, kernel, stride, up, dilation) for axis in (2, 3))
    group = f.range(groups)
    tiles = rows.tiles * columns.tiles
    tile_pixels = up * up * (tile * tile)

    # One row per pixel of x and group, and one of zeros behind them.
    pixels = f.reshape(f("Transpose", f.reshape(x, 0, 0, -1), perm=[0, 2, 1]), 0, -1, group_channels)
    with_zeros = f("Pad", pixels, [0, 0, 0, 0, 1, 0])
    height, width = (f("Gather", f("Shape", x), axis) for axis in (2, 3))
    pixel = rows.seen.axes(1, 3) * width + columns.seen.axes(0, 2)  # [t_h, t_w, S, S]
    inside = f("And", rows.inside.axes(1, 3), columns.inside.axes(0, 2))
    zeros = height * width * groups
    seen_rows = f.reshape(f("Where", inside, pixel * groups + group.axes(1, 2, 3, 4), zeros), -1)
    seen = f.reshape(f("Gather", with_zeros, seen_rows, axis=1), -1, window * window, group_channels)

    # K^2 weights per output pixel, for each place of the tile those of [t_h, t_w, u, u], each with zeros around them.
    part = f.range(up)
    row = (f("Transpose", rows.cell, perm=[1, 0]) * up).axes(1, 3, 4, 5) + part.axes(0, 1, 2, 3, 5)
    column = (f("Transpose", columns.cell, perm=[1, 0]) * up).axes(0, 2, 4, 5) + part
    at_place = f.reshape(row * (columns.cells * up) + column, tile * tile, -1)
    by_pixel = f("Transpose", f.reshape(w, 0, groups, kernel * kernel, -1), perm=[0, 1, 3, 2])
    placed = []
    for place, (down, right) in enumerate(itertools.product(range(tile), repeat=2)):
        weights = f("Gather", by_pixel, f("Gather", at_place, place), axis=2)
        margins = np.array([0, 0, down, right, 0, 0, tile - 1 - down, tile - 1 - right], np.int64)
        placed.append(f("Pad", f.reshape(weights, -1, 1, kernel, kernel), f("Mul", stride, margins)))
    band = f.reshape(f("Concat", *placed, axis=1), -1, tile_pixels, window * window)

    sums = f("MatMul", band, seen)
    in_tiles = f.reshape(sums, batch, -1, group_channels)
    tile_of = rows.tile_of.axes(1) * columns.tiles + columns.tile_of
    first = tile_of * tile_pixels + (rows.place.axes(1) * tile + columns.place)  # [cells, cells]
    out = first.axes(1, 3) + ((part * up).axes(1, 2) + part) * (tile * tile)  # [cells, u, cells, u]
    y_rows = f.reshape(f.reshape(out, -1, 1) + group * (tiles * tile_pixels), -1)
    in_order = f.reshape(f("Gather", in_tiles, y_rows, axis=1), 0, -1, channels)
    y = f.reshape(f("Transpose", in_order, perm=[0, 2, 1]), 0, 0, rows.cells * up, columns.cells * up)

    return f.function(REASSEMBLY, opset, y)


def _axis(
    f: FunctionBuilder,
    x: Value,
    w: Value,
    axis: int,
    tile: int,
    window: Value,
    kernel: Value,
    stride: Value,
    up: Value,
    dilation: Value,
) -> _Axis:
    size, out = (f("Gather", f("Shape", tensor), axis) for tensor in (x, w))
    cells = size // stride
    # Cells of one tile are `dilation` apart; a stretch is the tiles that begin with cells less than that apart.
    stretches = ((cells + (dilation - 1)) // dilation + (tile - 1)) // tile
    tiles = stretches * dilation
    index = f.range(tiles)
    first = index // stretches + index % stretches * dilation * tile
    cell = f("Min", first.axes(1) + f.range(tile) * dilation, cells - 1)
    # Not 0 where the operator is not defined: the window then takes no such shape.
    wrong = size * up - out * stride
    undefined = wrong * wrong + (stride - 1) * (up - 1)
    offsets = f("Reshape", f.range(window), (window + undefined).axes(0)) - kernel // 2
    seen = (first * stride).axes(1) + offsets * dilation
    inside = f("And", f("GreaterOrEqual", seen, 0), f("Less", seen, size))
    each = f.range(cells)
    of_first = each // dilation  # place among the cells that are multiples of the dilation apart
    return _Axis(cells, tiles, cell, seen, inside, each % dilation * stretches + of_first // tile, of_first % tile)
