"""AcmixOutlookAttention in standard ONNX operators: the function body that travels with every node.

A runtime without a plugin runs this. unfold is one Gather of rows of head_dim numbers, the weighted sum one MatMul,
and fold one Gather and a sum: every pixel reads the K^2 windows that may cover it, where there is none a row of zeros.
No Col2Im, which TensorRT's parser lacks, and one form for every K and stride. Other spellings of fold were slower, see
docs/benchmarks.md. The softmax is float32 in a float16 file too.
"""

from __future__ import annotations

import onnx

from acmix_deploy.operators.function_builder import FunctionBuilder, Value
from acmix_deploy.operators.outlook_attention import OUTLOOK_ATTENTION
from acmix_deploy.targets import OPSETS


def function_body(opset: int = OPSETS[0]) -> onnx.FunctionProto:
    """The operator as an ONNX function.

    Every size is computed from the inputs' shapes, so one body serves static and dynamic files; where shapes are static
    ONNX Runtime folds the index arithmetic as it loads the file.

    Args:
        opset: the opset of the model that will carry the function (the checker wants both equal), one of OPSETS.
    """
    f = FunctionBuilder()
    logits, values = f.input("logits"), f.input("values")
    heads, kernel, stride = (f.attribute(name, "int") for name in ("num_heads", "kernel_size", "stride"))
    scale = f("CastLike", f.attribute("scale", "float"), logits)

    channels, height, width = (f("Gather", f("Shape", values), axis) for axis in (1, 2, 3))
    windows_h, windows_w = (f("Gather", f("Shape", logits), axis) for axis in (2, 3))
    head_dim = channels // heads
    places, margin = kernel * kernel, kernel // 2
    head = f.range(heads)

    # One matrix [to, from] per (window, head), window-major.
    by_window = f("Transpose", f.reshape(logits * scale, 0, 0, -1), perm=[0, 2, 1])
    matrices = f("Cast", f.reshape(by_window, 0, -1, places, places), to=onnx.TensorProto.FLOAT)
    weights = f("CastLike", f("Softmax", matrices, axis=-1), logits)

    # Unfold: rows of the padded map, row = pixel * heads + head.
    padded = f("Pad", values, f.shape(0, 0, margin, margin, 0, 0, margin, margin))
    rows = f.reshape(f("Transpose", f.reshape(padded, 0, 0, -1), perm=[0, 2, 1]), 0, -1, head_dim)
    window_row, window_column = (
        (f.range(count) * stride).axes(1) + _places(f, size, count, kernel, stride)
        for size, count in ((height, windows_h), (width, windows_w))
    )
    pixel = window_row.axes(1, 3) * (width + margin * 2) + window_column.axes(0, 2)  # [h, w, K, K]
    seen_rows = f.reshape(pixel, -1, 1, places) * heads + head.axes(1)
    seen = f.reshape(f("Gather", rows, f.reshape(seen_rows, -1), axis=1), 0, -1, places, head_dim)

    # Fold: rows of the windows' results, row = (window * heads + head) * K^2 + place, and one of zeros behind them.
    mixed = f.reshape(f("MatMul", weights, seen), 0, -1, head_dim)
    with_zeros = f("Pad", mixed, [0, 0, 0, 0, 1, 0])
    row, row_exists = _covering(f, height, windows_h, kernel, stride, margin)
    column, column_exists = _covering(f, width, windows_w, kernel, stride, margin)
    window = f.reshape(row.axes(1, 3) * windows_w + column.axes(0, 2), -1, 1, places)  # of [H, W, K, K]
    exists = f.reshape(f("And", row_exists.axes(1, 3), column_exists.axes(0, 2)), -1, 1, places)
    place_rows = (window * heads + head.axes(1)) * places + f.range(places)
    zeros = windows_h * windows_w * heads * places
    folded_rows = f.reshape(f("Where", exists, place_rows, zeros), -1)
    by_place = f.reshape(f("Gather", with_zeros, folded_rows, axis=1), 0, -1, places, head_dim)
    pixels = f.reshape(f("ReduceSum", by_place, [2], keepdims=0), 0, -1, channels)
    y = f.reshape(f("Transpose", pixels, perm=[0, 2, 1]), 0, 0, height, width)

    return f.function(OUTLOOK_ATTENTION, opset, y)


def _places(f: FunctionBuilder, size: Value, windows: Value, kernel: Value, stride: Value) -> Value:
    """Places of a window along one axis: [K]. Where there are not ceil(size/s) windows that is no shape of them."""
    wrong = windows - (size + (stride - 1)) // stride
    return f("Reshape", f.range(kernel), (kernel + wrong * wrong).axes(0))


def _covering(
    f: FunctionBuilder, size: Value, windows: Value, kernel: Value, stride: Value, margin: Value
) -> tuple[Value, Value]:
    """Along one axis, the window in which each pixel is place k, and whether there is such a one: both [size, K]."""
    middle = (f.range(size) + margin).axes(1) - f.range(kernel)
    window = middle // stride
    on_grid = f("And", f("Equal", middle % stride, 0), f("GreaterOrEqual", middle, 0))
    return window, f("And", on_grid, f("Less", window, windows))
