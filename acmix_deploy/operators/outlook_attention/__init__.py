"""AcmixOutlookAttention: what lies between the projections of VOLO's outlook attention (arXiv 2106.13112)."""

from __future__ import annotations

from acmix_deploy.errors import UserError
from acmix_deploy.operators.spec import (
    ATTENTION_AXES,
    KERNEL_MAXIMA,
    TENSORRT_ATTRIBUTES,
    TOLERANCES,
    Attribute,
    Kernel,
    Operator,
    Tensor,
)

OUTLOOK_ATTENTION = Operator(
    domain="acmix",
    op_type="AcmixOutlookAttention",
    version=1,
    formula="y = fold(softmax_from(scale * logits) unfold(values)), windows of K x K pixels with zero padding K // 2 "
    "around every s-th pixel; channel (n*K^2 + to)*K^2 + from of logits is the weight "
    "in head n with which place 'from' of a window adds to its place 'to'",
    axes=ATTENTION_AXES,
    inputs=(
        Tensor("logits", ("B", "N*K^4", "ceil(H/s)", "ceil(W/s)"), "attention logits of every window, N heads"),
        Tensor("values", ("B", "N*d", "H", "W"), "N heads of d channels"),
    ),
    outputs=(Tensor("y", ("B", "N*d", "H", "W"), "sum over the windows that cover a pixel"),),
    attributes=(
        Attribute("num_heads", "int", 1, "number of heads", minimum=1),
        Attribute("kernel_size", "int", 3, "odd", minimum=3),
        Attribute("stride", "int", 1, "pixels between windows", minimum=1),
        Attribute("scale", "float", 1.0, "factor of the logits, usually d ** -0.5"),
        *TENSORRT_ATTRIBUTES,
    ),
    tolerances=TOLERANCES,
    kernels=(Kernel("simt", (("float32", "NCHW"), ("float16", "NCHW"), ("float16", "NHWC"))),),
    kernel_limits={"kernel_size": (3, 5, 7), "stride": (1, 2), "head_dim": tuple(range(8, 129, 8))},
    # NHWC pads the 81 logits of a single head, at the least, to 88.
    kernel_maxima={**KERNEL_MAXIMA, "N*K^4*W": KERNEL_MAXIMA["H*W"] * 81 // 88},
)


def check_geometry(kernel_size: int, stride: int, size: tuple[int, int], windows: tuple[int, int]) -> None:
    """Refuse what the operator does not define.

    Args:
        kernel_size: K, the side of a window in pixels.
        stride: s, the distance of neighbouring windows in pixels.
        size: (H, W) of the values.
        windows: (h, w) of the logits.

    Raises:
        UserError: naming the number that does not fit.
    """
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise UserError(f"kernel_size is {kernel_size}; it must be odd and at least 3")
    if stride < 1:
        raise UserError(f"stride is {stride}; it must be at least 1")
    expected = tuple(-(-pixels // stride) for pixels in size)
    if windows != expected:
        (height, width), (found_h, found_w), (h, w) = size, windows, expected
        raise UserError(
            f"values of {height}x{width} pixels under stride {stride} have {h}x{w} windows; the logits have "
            f"{found_h}x{found_w}"
        )
