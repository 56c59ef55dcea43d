"""AcmixNeighborhoodAttention: local attention under every border but reflection, with dilation and relative biases."""

from __future__ import annotations

from enum import IntEnum

from acmix_deploy.errors import UserError
from acmix_deploy.operators.spec import (
    KERNEL_MAXIMA,
    TENSORRT_ATTRIBUTES,
    TOLERANCES,
    Attribute,
    Kernel,
    Operator,
    Tensor,
)


class Border(IntEnum):
    """What a query sees beyond the map: functions of ONNX cannot branch on strings."""

    ZEROS = 1
    """Keys and values of zeros take part in the softmax, with their bias alone as logit."""
    MASKED = 2
    """Nothing."""
    SHIFTED = 3
    """Nothing, and the window is moved inside: that of NATTEN (arXiv 2204.07143), dilated as in arXiv 2209.15001."""


NEIGHBORHOOD_ATTENTION = Operator(
    domain="acmix",
    op_type="AcmixNeighborhoodAttention",
    version=1,
    formula="qkv = [q | k | v], each [B, N*d, H, W]; y_i = softmax_n(scale * q_i . (k_n - P l_n) + bias_in) v_n, where "
    "n runs over the K x K pixels around i that are D apart and l = (x, y) in [-1, 1]^2; bias_in is entry "
    "(n - i) / D + K - 1 of its head, row y and column x; beyond the map are zeros with a logit of bias_in (border 1), "
    "or nothing (2), or nothing and the window moves inside the pixels i + D m (3)",
    axes={
        "B": "batch",
        "N": "num_heads",
        "d": "head_dim",
        "H": "height",
        "W": "width",
        "K": "kernel_size",
        "D": "dilation",
        "b": "border",
    },
    inputs=(
        Tensor("qkv", ("B", "3*N*d", "H", "W"), "queries, keys and values, each N heads of d channels"),
        Tensor("position_weight", ("d", "2"), "P; zeros where there is no position term"),
        Tensor("bias", ("N", "2*K-1", "2*K-1"), "by relative offset; zeros where there is none"),
    ),
    outputs=(Tensor("y", ("B", "N*d", "H", "W"), "attended values"),),
    attributes=(
        Attribute("num_heads", "int", 1, "number of heads", minimum=1),
        Attribute("kernel_size", "int", 7, "odd", minimum=3),
        Attribute("dilation", "int", 1, "pixels between neighbours", minimum=1),
        Attribute(
            "border", "int", 1, "1 zeros, 2 masked, 3 shifted, which wants H and W >= K*D", minimum=1, names=Border
        ),
        Attribute("scale", "float", 1.0, "factor of the logits, usually d ** -0.5"),
        *TENSORRT_ATTRIBUTES,
    ),
    tolerances=TOLERANCES,
    kernels=(
        Kernel("mma", (("float16", "NCHW"), ("float16", "NHWC")), min_sm=75),
        Kernel("simt", (("float32", "NCHW"), ("float16", "NCHW"), ("float16", "NHWC"))),
    ),
    kernel_limits={
        "kernel_size": (3, 5, 7, 9),
        "border": tuple(map(int, Border)),
        "head_dim": tuple(range(8, 129, 8)),
    },
    kernel_maxima={**KERNEL_MAXIMA, "D": 65535},
    minima={"H": "K*D", "W": "K*D"},
    minima_where=("b", Border.SHIFTED),
)


def check_geometry(kernel_size: int, dilation: int, border: int, height: int, width: int) -> None:
    """Refuse what the operator does not define.

    Args:
        kernel_size: K, the side of the window in pixels.
        dilation: D, the distance of its pixels.
        border: a :class:`Border`.
        height, width: size of the map in pixels.

    Raises:
        UserError: naming the number that does not fit.
    """
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise UserError(f"kernel_size is {kernel_size}; it must be odd and at least 3")
    if dilation < 1:
        raise UserError(f"dilation is {dilation}; it must be at least 1")
    if border not in tuple(Border):
        raise UserError(f"border is {border}; it must be {', '.join(f'{b:d} for {b.name.lower()}' for b in Border)}")
    if border == Border.SHIFTED and min(height, width) < kernel_size * dilation:
        raise UserError(
            f"a {height}x{width} map is too small: a {kernel_size}x{kernel_size} window of pixels {dilation} apart "
            f"that stays inside needs {kernel_size * dilation} pixels each way",
            "Use a larger image, or a smaller window or dilation.",
        )
