"""A convolution in the two stages of "On the Integration of Self-Attention and Convolution" (arXiv 2111.14556)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.errors import UserError


class ShiftConv(nn.Module):
    """A k x k convolution as k*k 1x1 convolutions, fixed shifts and a sum (section 3.1 of the paper).

    ``y = bias + sum over taps (p, q) of shift(K_pq x, p - k // 2, q - k // 2)``, where ``K_pq`` is a 1x1 convolution
    and ``shift(f, dy, dx)[i, j] = f[i + dy, j + dx]``, zero outside the map. From [B, in_channels, H, W] to
    [B, out_channels, ceil(H / stride), ceil(W / stride)], in any floating-point type. :meth:`of` and
    :meth:`convolution` go from and to the ``nn.Conv2d`` that it equals.

    ``pointwise.weight`` is [out_channels * k * k, in_channels, 1, 1], the taps of one output channel row by row one
    after the other. ``pointwise.bias`` is None; where there is one, the shifts cut it off at the border, which no
    convolution does.

    Args:
        in_channels, out_channels: at least 1.
        kernel_size: k, odd.
        stride: of the result, in pixels.
        bias: whether there is one, [out_channels].

    Raises:
        UserError: for other numbers.
    """

    shifts: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, stride) < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(
                f"ShiftConv got in_channels={in_channels}, out_channels={out_channels}, kernel_size={kernel_size}, "
                f"stride={stride}; all are at least 1 and kernel_size is odd"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        taps = kernel_size**2
        self.pointwise = nn.Conv2d(in_channels, out_channels * taps, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        one_hot = torch.eye(taps).view(1, taps, kernel_size, kernel_size).repeat(out_channels, 1, 1, 1)
        self.register_buffer("shifts", one_hot, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The weights that ``nn.Conv2d`` of this size would begin with, and a bias of zero."""
        nn.init.uniform_(self.pointwise.weight, -1, 1)
        with torch.no_grad():
            self.pointwise.weight.mul_((self.in_channels * self.kernel_size**2) ** -0.5)
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        padding = self.kernel_size // 2
        return F.conv2d(self.pointwise(x), self.shifts, self.bias, self.stride, padding, groups=self.out_channels)

    @classmethod
    def of(cls, conv: nn.Conv2d) -> ShiftConv:
        """The same as ``conv``, in two stages, with copies of its weights.

        Raises:
            UserError: ``conv`` has groups, dilation, an even or oblong kernel, or padding that does not keep the map.
        """
        (side, *_), (stride, *_) = conv.kernel_size, conv.stride
        expected = nn.Conv2d(conv.in_channels, conv.out_channels, side, stride, side // 2, device="meta")
        for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            if (found := getattr(conv, name)) != (wanted := getattr(expected, name)):
                raise UserError(f"{name} of the convolution is {found}; it must be {wanted}")
        block = cls(conv.in_channels, conv.out_channels, side, stride, conv.bias is not None)
        block.to(conv.weight)
        with torch.no_grad():
            block.pointwise.weight.copy_(conv.weight.permute(0, 2, 3, 1).reshape_as(block.pointwise.weight))
            if block.bias is not None and conv.bias is not None:
                block.bias.copy_(conv.bias)
        return block.train(conv.training)

    def convolution(self) -> nn.Conv2d:
        """The one convolution that this is, with copies of the weights.

        Raises:
            UserError: ``pointwise`` has a bias other than zero.
        """
        if self.pointwise.bias is not None and self.pointwise.bias.any():
            raise UserError(
                "pointwise.bias is not zero; the shifts cut it off at the border, which no convolution does"
            )
        weight, k = self.pointwise.weight, self.kernel_size
        conv = nn.Conv2d(self.in_channels, self.out_channels, k, self.stride, k // 2, bias=self.bias is not None)
        conv.to(weight)
        with torch.no_grad():
            conv.weight.copy_(weight.view(self.out_channels, k, k, self.in_channels).permute(0, 3, 1, 2))
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"
