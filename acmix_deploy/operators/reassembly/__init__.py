"""AcmixReassembly: unfold, weigh and sum, as Involution (arXiv 2103.06255) and CARAFE (arXiv 1905.02188) do."""

from __future__ import annotations

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

_MOST = KERNEL_MAXIMA["H*W"]

REASSEMBLY = Operator(
    domain="acmix",
    op_type="AcmixReassembly",
    version=1,
    formula="y[b, g*c + i, p] = sum over the K x K neighbours n of w[b, g*K^2 + n, p] * x[b, g*c + i, "
    "floor(s * p / u) + D * n], with zeros outside the map; n counts from -(K // 2), row by row",
    axes={
        "B": "batch",
        "G": "groups",
        "c": "group_channels",
        "H": "height",
        "W": "width",
        "K": "kernel_size",
        "s": "stride",
        "u": "upsampling",
        "D": "dilation",
    },
    inputs=(
        Tensor("x", ("B", "G*c", "H", "W"), "G groups of c channels"),
        Tensor("w", ("B", "G*K^2", "H*u/s", "W*u/s"), "weights of the neighbours of every output pixel, as they are"),
    ),
    outputs=(Tensor("y", ("B", "G*c", "H*u/s", "W*u/s"), "weighted sums"),),
    attributes=(
        Attribute("groups", "int", 1, "channels that share weights are one group", minimum=1),
        Attribute("kernel_size", "int", 7, "odd", minimum=3),
        Attribute("stride", "int", 1, "divides H and W; 1 where upsampling is not", minimum=1),
        Attribute("upsampling", "int", 1, "output pixels for an input pixel along an axis", minimum=1),
        Attribute("dilation", "int", 1, "pixels of x from neighbour to neighbour", minimum=1),
        *TENSORRT_ATTRIBUTES,
    ),
    tolerances=TOLERANCES,
    kernels=(Kernel("simt", (("float32", "NCHW"), ("float16", "NCHW"), ("float16", "NHWC"))),),
    kernel_limits={"kernel_size": (3, 5, 7, 9), "stride": (1, 2), "upsampling": (1, 2, 3, 4)},
    kernel_maxima={
        "B": KERNEL_MAXIMA["B"],
        "G*c": KERNEL_MAXIMA["B"],
        "H*W*u^2": _MOST,
        # NHWC pads a single channel to 8, and the 9 weights of a single group, at the least, to 16.
        "G*c*W*u": _MOST // 8,
        "G*K^2*W*u": _MOST * 9 // 16,
        "D": 65535,
    },
)


def check_geometry(kernel_size: int, stride: int, upsampling: int, size: tuple[int, int], out: tuple[int, int]) -> None:
    """Refuse what the operator does not define.

    Args:
        kernel_size: K, the neighbours of a pixel along one axis.
        stride: s, pixels of x between those of y.
        upsampling: u, pixels of y for one of x along an axis.
        size: (H, W) of x.
        out: the size of the weights.

    Raises:
        UserError: naming the number that does not fit.
    """
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise UserError(f"kernel_size is {kernel_size}; it must be odd and at least 3")
    if min(stride, upsampling) != 1:
        raise UserError(f"stride is {stride} and upsampling {upsampling}; one of them must be 1, the other at least 1")
    if any(pixels % stride for pixels in size):
        raise UserError(
            f"a {size[0]}x{size[1]} map is not divisible by stride {stride}",
            "Choose an image size whose feature map at this block is a multiple of the block's stride.",
        )
    expected = tuple(pixels * upsampling // stride for pixels in size)
    if out != expected:
        raise UserError(
            f"a {size[0]}x{size[1]} map with stride {stride} and upsampling {upsampling} becomes "
            f"{expected[0]}x{expected[1]}; the weights are for {out[0]}x{out[1]}"
        )
