"""AcmixNeighborhoodAttention in standard ONNX operators: the function body that travels with every node.

A runtime without a plugin runs this. Along each axis pixels are taken by residue class modulo the dilation, and those
of a class are cut into tiles of TILE queries, which share one window of TILE + K - 1 keys of their class. A key is
copied ((TILE + K - 1) / TILE)^2 times where unfold copies it K^2 times. What lies beyond the map is a pixel of zeros
behind the last one. Which keys a query sees, and with which bias, is one index into the table of biases: the border
decides it, so that one body serves all borders. Where shapes are static ONNX Runtime folds all of that as it loads the
file. The softmax is float32 in a float16 file too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from acmix_deploy.operators.function_builder import FunctionBuilder, Value
from acmix_deploy.operators.neighborhood_attention import NEIGHBORHOOD_ATTENTION, Border
from acmix_deploy.operators.position import key_offset
from acmix_deploy.targets import OPSETS

TILE = 4
"""Side of a query tile in pixels of a residue class."""


@dataclass(frozen=True)
class _Settings:
    """The attributes, int64 scalars and booleans."""

    kernel: Value
    dilation: Value
    border: Value
    zeros: Value
    shifted: Value


@dataclass(frozen=True)
class _Axis:
    """Index arithmetic along H or W, for t tiles of T queries that share S keys. All int64, but for booleans."""

    tiles: Value
    """t, of all residue classes, scalar."""
    query: Value
    """[t, T]: pixel of each query; a query past the end repeats the last one of its class."""
    key: Value
    """[t, S]: pixel of each key."""
    inside: Value
    """[t, S]: whether the key is on the map."""
    seen: Value
    """[t, T, S]: whether the query's window holds the key."""
    offset: Value
    """[t, T, S]: the key's distance from the query in steps of the dilation, plus K - 1; any where it is not seen."""
    tile_of: Value
    """[size]: tile of each pixel."""
    place: Value
    """[size]: place of each pixel in its tile."""


def _axis(f: FunctionBuilder, size: Value, tile: int, settings: _Settings) -> _Axis:
    kernel, dilation = settings.kernel, settings.dilation
    classes = f("Min", dilation, size)
    tiles_of_class = ((size - 1) // dilation + tile) // tile
    tiles = classes * tiles_of_class
    residue, first = f.range(tiles) // tiles_of_class, f.range(tiles) % tiles_of_class * tile
    members = (size - residue - 1) // dilation + 1  # of a tile's class

    query = f("Min", first.axes(1) + f.range(tile), (members - 1).axes(1))
    centred = query - kernel // 2
    moved = f("Max", f("Min", centred, (members - kernel).axes(1)), 0)
    start = f("Where", settings.shifted, moved, centred)

    # Not 0 where the window cannot stay inside or the border is none: the keys then take no such shape.
    too_small = f("Cast", settings.shifted, to=onnx.TensorProto.INT64) * (kernel * dilation // (size + 1))
    undefined = too_small + f("Abs", settings.border - Border.MASKED) // 2
    window = kernel + (tile - 1)
    places = f("Reshape", f.range(window), (window + undefined).axes(0))
    key = f("Gather", start, [0], axis=1) + places
    inside = f("And", f("GreaterOrEqual", key, 0), f("Less", key, members.axes(1)))

    of_window = key.axes(1) - start.axes(2)
    in_window = f("And", f("GreaterOrEqual", of_window, 0), f("Less", of_window, kernel))
    seen = f("And", in_window, f("Or", settings.zeros, inside.axes(1)))
    offset = key.axes(1) - query.axes(2) + (kernel - 1)

    pixel = f.range(size)
    tile_of = pixel % dilation * tiles_of_class + pixel // dilation // tile

    def pixels(of_class: Value) -> Value:
        return of_class * dilation + residue.axes(1)

    return _Axis(tiles, pixels(query), pixels(key), inside, seen, offset, tile_of, pixel // dilation % tile)


def function_body(opset: int = OPSETS[0], tile: int = TILE) -> onnx.FunctionProto:
    """The operator as an ONNX function.

    Every size is computed from ``Shape(qkv)``, so one body serves static and dynamic files.

    Args:
        opset: the opset of the model that will carry the function (the checker wants both equal), one of OPSETS.
        tile: side of a query tile in pixels of a residue class.
    """
    f = FunctionBuilder()
    qkv, position_weight, bias = (f.input(tensor.name) for tensor in NEIGHBORHOOD_ATTENTION.inputs)
    names = ("num_heads", "kernel_size", "dilation", "border")
    heads, kernel, dilation, border = (f.attribute(name, "int") for name in names)
    scale = f("CastLike", f.attribute("scale", "float"), qkv)
    zeros, shifted = f("Equal", border, int(Border.ZEROS)), f("Equal", border, int(Border.SHIFTED))
    settings = _Settings(kernel, dilation, border, zeros, shifted)

    batch, height, width = (f("Gather", f("Shape", qkv), axis) for axis in (0, 2, 3))
    head_dim = f("Gather", f("Shape", position_weight), 0)
    h, w = (_axis(f, size, tile, settings) for size in (height, width))

    # One row per pixel, then per (part, head): row = (pixel * 3 + part) * heads + head. The last pixel is of zeros.
    pixels = f("Transpose", f.reshape(qkv, 0, 0, -1), perm=[0, 2, 1])
    offset = key_offset(f, qkv, position_weight, height, width, heads)
    rows = f.reshape(f("Pad", pixels - offset, [0, 0, 0, 0, 1, 0]), 0, -1, head_dim)
    head = f.range(heads)

    def rows_of(pixel: Value, part: int, places: Value | int) -> Value:
        """Of pixels [t_h, t_w, places, places] for each head: [B, N * t_h * t_w, places^2, d]."""
        index = pixel * (heads * 3) + (head + heads * part).axes(1, 2, 3, 4)
        return f.reshape(f("Gather", rows, f.reshape(index, -1), axis=1), 0, -1, places, head_dim)

    window = kernel + (tile - 1)
    keys_of_tile, places = window * window, tile * tile
    on_map = f("And", h.inside.axes(1, 3), w.inside.axes(0, 2))
    key_pixel = f("Where", on_map, h.key.axes(1, 3) * width + w.key.axes(0, 2), height * width)
    query = rows_of(h.query.axes(1, 3) * width + w.query.axes(0, 2), 0, places)
    key, value = (rows_of(key_pixel, part, keys_of_tile) for part in (1, 2))

    # [t_h, t_w, T, T, S, S]: the entry of the bias, that behind the last, which hides the key, for one not seen.
    entries = kernel * 2 - 1
    last = entries * entries
    row = f("Where", h.seen, h.offset * entries, last)
    column = f("Where", w.seen, w.offset, last)
    entry = f.reshape(f("Min", row.axes(1, 3, 5) + column.axes(0, 2, 4), last), -1)
    hidden = f("CastLike", f.constant(np.array(-np.inf, np.float32)), qkv)
    table = f("Concat", f.reshape(bias, heads, -1), f("Expand", hidden, f.shape(heads, 1)), axis=1)
    added = f.reshape(f("Gather", table, entry, axis=1), -1, places, keys_of_tile)

    logits = f("MatMul", query * scale, f("Transpose", key, perm=[0, 1, 3, 2])) + added
    weights = f("Softmax", f("Cast", logits, to=onnx.TensorProto.FLOAT), axis=-1)
    attended = f("MatMul", f("CastLike", weights, qkv), value)

    tile_index = h.tile_of.axes(1) * w.tiles + w.tile_of
    place = tile_index * places + (h.place.axes(1) * tile + w.place)
    output_rows = f.reshape(place.axes(2) + head * (h.tiles * w.tiles * places), -1)
    in_order = f("Gather", f.reshape(attended, batch, -1, head_dim), output_rows, axis=1)
    maps = f("Transpose", f.reshape(in_order, 0, -1, heads * head_dim), perm=[0, 2, 1])
    return f.function(NEIGHBORHOOD_ATTENTION, opset, f.reshape(maps, 0, 0, height, width))
