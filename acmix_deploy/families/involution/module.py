"""Involution of "Involution: Inverting the Inherence of Convolution for Visual Recognition" (arXiv 2103.06255)."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.errors import UserError


class Involution(nn.Module):
    """Every pixel predicts with which weights its K x K neighbours are summed; channels of a group share them.

    ``y = sum_n w_n x_n`` with ``w = conv2(conv1(pool(x)))`` and zeros around the map, from [B, C, H, W] to
    [B, C, H/s, W/s], in any floating-point type. Parameters have the names and shapes of the authors' ``involution``
    (https://github.com/d-li14/involution).

    Args:
        channels: C, a multiple of ``group_channels`` and at least ``reduction_ratio``.
        kernel_size: K, odd.
        stride: s; ``w`` is predicted from averages over squares of this side.
        group_channels: channels that share weights.
        reduction_ratio: C over the channels between the two convolutions.
        dilation: pixels from neighbour to neighbour.

    Raises:
        UserError: for other numbers, and at the call for a map that the stride does not divide.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        stride: int = 1,
        group_channels: int = 16,
        reduction_ratio: int = 4,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        if (
            min(channels, group_channels, reduction_ratio) < 1
            or channels % group_channels
            or channels < reduction_ratio
        ):
            raise UserError(
                f"Involution got channels={channels}, group_channels={group_channels}, "
                f"reduction_ratio={reduction_ratio}; channels is a multiple of group_channels and at least "
                "reduction_ratio, all at least 1"
            )
        if kernel_size < 3 or kernel_size % 2 == 0 or min(stride, dilation) < 1:
            raise UserError(
                f"Involution got kernel_size={kernel_size}, stride={stride}, dilation={dilation}; kernel_size is odd "
                "and at least 3, stride and dilation are at least 1"
            )
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.group_channels = group_channels
        self.dilation = dilation

        between = channels // reduction_ratio
        self.conv1 = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(channels, between, 1, bias=False), bn=nn.BatchNorm2d(between), act=nn.ReLU())
        )
        self.conv2 = nn.Sequential(
            OrderedDict(conv=nn.Conv2d(between, kernel_size**2 * (channels // group_channels), 1))
        )
        self.unfold = nn.Unfold(kernel_size, dilation, dilation * (kernel_size // 2), stride)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if not torch.compiler.is_compiling() and isinstance(height, int):  # else sizes are symbols: a graph is made
            self._check_size(height, width)
        squares = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        w = self.conv2(self.conv1(squares))
        h_out, w_out = w.shape[2:]
        by_group = self.unfold(x).reshape(batch, -1, self.group_channels, self.kernel_size**2, h_out, w_out)
        summed = (w.reshape(batch, -1, 1, self.kernel_size**2, h_out, w_out) * by_group).sum(3)
        y: Tensor = summed.reshape(batch, channels, h_out, w_out)
        return y

    def _check_size(self, height: int, width: int) -> None:
        if height % self.stride or width % self.stride:
            raise UserError(
                f"a {height}x{width} map is not divisible by stride {self.stride}",
                "Choose an image size whose feature map at this block is a multiple of the block's stride.",
            )

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"group_channels={self.group_channels}, dilation={self.dilation}"
        )
