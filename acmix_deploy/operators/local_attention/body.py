"""AcmixLocalAttention in standard ONNX operators: the function body that travels with every node.

A runtime without a plugin runs this. Queries are cut into tiles of TILE x TILE; the queries of a tile share one window
of ((TILE - 1) * s + K)^2 keys, gathered by reflected index, and a mask hides from each query what lies outside its
own K x K neighbourhood. A key is copied ((TILE + K - 1) / TILE)^2 times where unfold copies it K^2 times. A row of
head_dim numbers is the unit of every gather, so one transposition of whole pixels is the only one on the way in.
The softmax is float32 in a float16 file too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from acmix_deploy.operators.function_builder import FunctionBuilder, Value
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.position import key_offset
from acmix_deploy.targets import OPSETS

TILE = 4
"""Side of a query tile in output pixels; 4 was fastest on ONNX Runtime, see docs/benchmarks.md."""


@dataclass(frozen=True)
class _Axis:
    """Index arithmetic along H or W, for t tiles of T queries that share S keys. All int64."""

    out: Value
    """Number of output pixels, scalar."""
    tiles: Value
    """t, scalar."""
    query: Value
    """[t, T]: input pixel of each query; a query past the end repeats the last one."""
    key: Value
    """[t, S]: input pixel of each key, reflected at the borders."""
    tile_of: Value
    """[out]: tile of each output pixel."""
    place: Value
    """[out]: place of each output pixel in its tile."""


def _axis(f: FunctionBuilder, size: Value, tile: int, stride: Value, window: Value, margin: Value) -> _Axis:
    out = size // stride
    tiles = (out + (tile - 1)) // tile
    start = (f.range(tiles) * tile).axes(1)
    query = f("Min", start + f.range(tile), out - 1) * stride
    last = size - 1
    # Not 0 where reflection is undefined or the stride does not divide: the window then takes no such shape.
    undefined = margin // size + (size - out * stride)
    offsets = f("Reshape", f.range(window), (window + undefined).axes(0)) - margin
    reflected = last - f("Abs", last - f("Abs", start * stride + offsets))
    key = f("Max", reflected, 0)
    pixel = f.range(out)
    return _Axis(out, tiles, query, key, pixel // tile, pixel % tile)


def function_body(opset: int = OPSETS[0], tile: int = TILE) -> onnx.FunctionProto:
    """The operator as an ONNX function.

    Every size is computed from ``Shape(qkv)``, so one body serves static and dynamic files; where shapes are static
    ONNX Runtime folds the index arithmetic as it loads the file.

    Args:
        opset: the opset of the model that will carry the function (the checker wants both equal), one of OPSETS.
        tile: side of a query tile in output pixels.
    """
    f = FunctionBuilder()
    qkv, position_weight = f.input("qkv"), f.input("position_weight")
    heads, kernel, stride = (f.attribute(name, "int") for name in ("num_heads", "kernel_size", "stride"))
    scale = f("CastLike", f.attribute("scale", "float"), qkv)

    height, width = (f("Gather", f("Shape", qkv), axis) for axis in (2, 3))
    head_dim = f("Gather", f("Shape", position_weight), 0)
    channels = heads * head_dim
    window = stride * (tile - 1) + kernel
    margin = kernel // 2
    h = _axis(f, height, tile, stride, window, margin)
    w = _axis(f, width, tile, stride, window, margin)

    # One row per pixel, then per (part, head): row = (pixel * 3 + part) * heads + head.
    pixels = f("Transpose", f.reshape(qkv, 0, 0, -1), perm=[0, 2, 1])
    rows = f.reshape(pixels - key_offset(f, qkv, position_weight, height, width, heads), 0, -1, head_dim)

    head = f.range(heads)

    def row_index(h_pixel: Value, w_pixel: Value) -> Value:
        """Rows of part q for every head, tile and place: [N * t_h * t_w * places]."""
        pixel = h_pixel.axes(1, 3) * width + w_pixel.axes(0, 2)
        return f.reshape(pixel * (heads * 3) + head.axes(1, 2, 3, 4), -1)

    places = tile * tile
    keys_of_tile = window * window
    query_rows, key_rows = row_index(h.query, w.query), row_index(h.key, w.key)
    query = f.reshape(f("Gather", rows, query_rows, axis=1), -1, places, head_dim)
    key = f.reshape(f("Gather", rows, key_rows + heads, axis=1), -1, keys_of_tile, head_dim)
    value = f.reshape(f("Gather", rows, key_rows + heads * 2, axis=1), -1, keys_of_tile, head_dim)

    logits = f("MatMul", query * scale, f("Transpose", key, perm=[0, 2, 1]))
    logits = logits + _neighbourhood_mask(f, qkv, tile, window, stride, kernel)
    weights = f("Softmax", f("Cast", logits, to=onnx.TensorProto.FLOAT), axis=-1)
    attended = f("MatMul", f("CastLike", weights, qkv), value)

    tile_index = h.tile_of.axes(1) * w.tiles + w.tile_of
    place = tile_index * places + (h.place.axes(1) * tile + w.place)
    output_rows = f.reshape(place.axes(2) + head * (h.tiles * w.tiles * places), -1)
    batch = f("Gather", f("Shape", qkv), 0)
    in_order = f("Gather", f.reshape(attended, batch, -1, head_dim), output_rows, axis=1)
    maps = f("Transpose", f.reshape(in_order, 0, -1, channels), perm=[0, 2, 1])
    y = f.reshape(maps, 0, 0, h.out, w.out)

    return f.function(LOCAL_ATTENTION, opset, y)


def _neighbourhood_mask(
    f: FunctionBuilder, qkv: Value, tile: int, window: Value, stride: Value, kernel: Value
) -> Value:
    """0 where a key of the tile's window is a neighbour of the query, -inf elsewhere: [T*T, S*S], of qkv's type."""
    offset = f.range(window) - (f.range(tile) * stride).axes(1)
    valid = f("And", f("GreaterOrEqual", offset, 0), f("Less", offset, kernel))
    both = f("And", valid.axes(1, 3), valid.axes(0, 2))
    zero, hidden = f.constant(np.array(0, np.float32)), f.constant(np.array(-np.inf, np.float32))
    mask = f("CastLike", f("Where", both, zero, hidden), qkv)
    return f.reshape(mask, tile * tile, -1)
