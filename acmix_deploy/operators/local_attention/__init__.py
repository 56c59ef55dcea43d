"""AcmixLocalAttention: the one definition of the operator that an ACmix block's attention branch becomes."""

from __future__ import annotations

from acmix_deploy.errors import UserError
from acmix_deploy.operators.spec import (
    ATTENTION_AXES,
    TENSORRT_ATTRIBUTES,
    TOLERANCES,
    Attribute,
    Kernel,
    Operator,
    Tensor,
)

LOCAL_ATTENTION = Operator(
    domain="acmix",
    op_type="AcmixLocalAttention",
    version=1,
    formula="qkv = [q | k | v], each [B, N*d, H, W]; y_i = softmax_n(scale * q_i . (k_n - P l_n)) v_n, where n runs "
    "over the K x K neighbours of pixel i under reflection padding and l = (x, y) in [-1, 1]^2",
    axes=ATTENTION_AXES,
    inputs=(
        Tensor("qkv", ("B", "3*N*d", "H", "W"), "queries, keys and values, each N heads of d channels"),
        Tensor("position_weight", ("d", "2"), "P; zeros where the block has no position term"),
    ),
    outputs=(Tensor("y", ("B", "N*d", "H/s", "W/s"), "attended values"),),
    attributes=(
        Attribute("num_heads", "int", 1, "number of heads", minimum=1),
        Attribute("kernel_size", "int", 7, "odd; H and W must exceed K // 2", minimum=3),
        Attribute("stride", "int", 1, "divides H and W", minimum=1),
        Attribute("scale", "float", 1.0, "factor of the logits, usually d ** -0.5"),
        *TENSORRT_ATTRIBUTES,
    ),
    tolerances=TOLERANCES,
    kernels=(
        Kernel("mma", (("float16", "NCHW"), ("float16", "NHWC")), min_sm=75),
        Kernel("simt", (("float32", "NCHW"), ("float16", "NCHW"), ("float16", "NHWC"))),
    ),
    kernel_limits={"kernel_size": (3, 5, 7, 9), "stride": (1, 2), "head_dim": tuple(range(8, 129, 8))},
    minima={"H": "ceil(K/2)", "W": "ceil(K/2)"},
)


def check_geometry(kernel_size: int, stride: int, height: int, width: int) -> None:
    """Refuse what neither the paper's code nor any implementation here can compute.

    Args:
        kernel_size: K, the side of the attention window in pixels.
        stride: s.
        height, width: size of the input map in pixels.

    Raises:
        UserError: naming the number that does not fit.
    """
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise UserError(f"kernel_size is {kernel_size}; it must be odd and at least 3")
    if stride < 1:
        raise UserError(f"stride is {stride}; it must be at least 1")
    if height % stride or width % stride:
        raise UserError(
            f"a {height}x{width} map is not divisible by stride {stride}",
            "Choose an image size whose feature map at this block is a multiple of the block's stride.",
        )
    if min(height, width) <= kernel_size // 2:
        raise UserError(
            f"a {height}x{width} map is too small for a {kernel_size}x{kernel_size} window: reflection padding by "
            f"{kernel_size // 2} needs more than {kernel_size // 2} pixels each way",
            "Use a larger image or a smaller kernel_att.",
        )
