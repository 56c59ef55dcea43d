"""AcmixReassembly in PyTorch, written for clarity: what every other implementation is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from acmix_deploy.operators.reassembly import check_geometry


def reassembly(
    x: Tensor, w: Tensor, *, groups: int, kernel_size: int, stride: int, upsampling: int, dilation: int
) -> Tensor:
    """Evaluate the operator's definition in float64, whatever the type of its inputs.

    Args:
        x: [B, G*c, H, W], any floating type.
        w: [B, G*K^2, H*u/s, W*u/s]; channel g*K^2 + row*K + column.
        groups: G.
        kernel_size: K.
        stride: s.
        upsampling: u.
        dilation: D.

    Returns:
        float64 [B, G*c, H*u/s, W*u/s].

    Raises:
        UserError: for a geometry outside the definition (see ``check_geometry``).
    """
    (height, width), (out_h, out_w) = x.shape[2:], w.shape[2:]
    check_geometry(kernel_size, stride, upsampling, (height, width), (out_h, out_w))
    margin = dilation * (kernel_size // 2)
    padded = F.pad(x.double(), [margin] * 4)
    rows, columns = (torch.arange(n, device=x.device) * stride // upsampling for n in (out_h, out_w))
    weights = w.double().reshape(len(w), groups, 1, kernel_size, kernel_size, out_h, out_w)
    y = padded.new_zeros(len(x), x.shape[1], out_h, out_w)
    for row in range(kernel_size):
        for column in range(kernel_size):
            seen = padded[:, :, (rows + dilation * row)[:, None], columns + dilation * column]
            by_group = seen.reshape(len(x), groups, -1, out_h, out_w)
            y += (by_group * weights[:, :, :, row, column]).flatten(1, 2)
    return y
