"""The linear position term of attention in standard ONNX operators."""

from __future__ import annotations

import numpy as np
import onnx

from acmix_deploy.operators.function_builder import FunctionBuilder, Value


def key_offset(
    f: FunctionBuilder, qkv: Value, position_weight: Value, height: Value, width: Value, heads: Value
) -> Value:
    """P*l for the keys and zero for queries and values: [H*W, 3*C], computed in float32, of qkv's type."""
    weight = f("Cast", position_weight, to=onnx.TensorProto.FLOAT)

    def term(size: Value, column: int) -> Value:
        """Coordinates along one axis times the column of P that belongs to it: [size, d]. One pixel is at -1."""
        pixel = f("Cast", f.range(size), to=onnx.TensorProto.FLOAT)
        last = f("Cast", f("Max", size - 1, 1), to=onnx.TensorProto.FLOAT)
        coordinate = f("Div", pixel + pixel, last) - f.constant(np.array(1, np.float32))
        return coordinate.axes(1) * f("Gather", weight, column, axis=1)

    position = term(width, 0).axes(0) + term(height, 1).axes(1)
    is_key = f.constant(np.array([0, 1, 0], np.float32).reshape(3, 1, 1))
    per_part = position.axes(2, 3) * is_key
    per_head = f("Expand", per_part, f.shape(1, 1, 1, heads, 1))
    channels = f("Gather", f("Shape", qkv), 1)
    return f("CastLike", f.reshape(per_head, -1, channels), qkv)
