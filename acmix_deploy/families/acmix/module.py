"""The ACmix block of "On the Integration of Self-Attention and Convolution" (arXiv 2111.14556)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families.coordinates import coordinates
from acmix_deploy.operators.local_attention import check_geometry


class ACmix(nn.Module):
    """Local self-attention and a 3x3 convolution over one shared set of 1x1 projections.

    ``y = rate1 * attention(q, k, v) + rate2 * dep_conv(fc(q, k, v))``, from [B, in_planes, H, W] to
    [B, out_planes, H / stride, W / stride], in any floating-point type. Parameters have the names and shapes of the
    authors' ``ResNet/test_bottleneck.py``. As there, ``fc`` and ``dep_conv`` have no bias; one that a state dict brings
    is taken over. Its rates may be of one element, which become of shape (1,), or of ``out_planes``: [1, C, 1, 1].

    A block in the place of a class that does more (``recognise``) also has ``kept``, the factor of x that is added, and
    ``behind``, the layers that follow.

    Args:
        in_planes, out_planes: channels; ``out_planes`` is a multiple of ``head``.
        kernel_att: K, side of the attention window in pixels; odd, at least 3.
        head: attention heads.
        kernel_conv: side of the convolution branch's kernel; 3.
        stride: of both branches; divides H and W.
        dilation: of the attention window; 1.

    Raises:
        UserError: for a combination that the authors' code cannot compute either, here or (map sizes) at the call.
    """

    def __init__(
        self,
        in_planes: int,
        out_planes: int,
        kernel_att: int = 7,
        head: int = 4,
        kernel_conv: int = 3,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        if min(in_planes, out_planes, head) < 1 or out_planes % head:
            raise UserError(
                f"ACmix got in_planes={in_planes}, out_planes={out_planes}, head={head}; "
                "all are at least 1 and out_planes is a multiple of head"
            )
        if kernel_conv != 3:
            raise UserError(f"kernel_conv is {kernel_conv}; only 3 keeps the map size of the attention branch")
        if dilation != 1:
            raise UserError(f"dilation is {dilation}; ACmix is defined for 1 only")
        check_geometry(kernel_att, stride, kernel_att * stride, kernel_att * stride)
        self.in_planes = in_planes
        self.out_planes = out_planes
        self.kernel_att = kernel_att
        self.head = head
        self.head_dim = out_planes // head
        self.stride = stride

        self.conv1 = nn.Conv2d(in_planes, out_planes, 1)
        self.conv2 = nn.Conv2d(in_planes, out_planes, 1)
        self.conv3 = nn.Conv2d(in_planes, out_planes, 1)
        self.conv_p = nn.Conv2d(2, self.head_dim, 1)
        self.fc = nn.Conv2d(3 * head, 9, 1, bias=False)
        self.dep_conv = nn.Conv2d(
            9 * self.head_dim, out_planes, 3, stride=stride, padding=1, groups=self.head_dim, bias=False
        )
        self.rate1 = nn.Parameter(torch.empty(1))
        self.rate2 = nn.Parameter(torch.empty(1))
        self.register_parameter("kept", None)
        self.register_module("behind", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both rates to 0.5 and ``dep_conv`` to the nine shifts of the paper's equation 10, summed."""
        nn.init.constant_(self.rate1, 0.5)
        nn.init.constant_(self.rate2, 0.5)
        with torch.no_grad():
            self.dep_conv.weight.copy_(torch.eye(9).view(9, 3, 3).expand_as(self.dep_conv.weight))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.conv1(x), self.conv2(x), self.conv3(x)
        height, width = q.shape[2:]
        if not torch.compiler.is_compiling() and isinstance(height, int):  # else sizes are symbols: a graph is made
            check_geometry(self.kernel_att, self.stride, height, width)
        y: Tensor = self.rate1 * self._attend(q, k, v) + self.rate2 * self._convolve(q, k, v)
        kept, behind = self._parameters.get("kept"), self._modules.get("behind")  # old pickles have neither
        y = y if kept is None else y + kept * x
        return y if behind is None else behind(y)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax_n(q_i . (k_n + p_i - p_n) / sqrt(d)) v_n over the K x K neighbours n of each pixel i."""
        batch, _, height, width = q.shape
        heads, s, area = (batch * self.head, self.head_dim), self.stride, self.kernel_att**2
        out = (height // s, width // s)
        position = self.conv_p(coordinates(q))
        queries = (q * self.head_dim**-0.5).reshape(*heads, height, width)[:, :, ::s, ::s].unsqueeze(2)
        own_position = position[:, :, ::s, ::s].unsqueeze(2)
        keys = self._neighbours(k.reshape(*heads, height, width)).view(*heads, area, *out)
        values = self._neighbours(v.reshape(*heads, height, width)).view(*heads, area, *out)
        their_position = self._neighbours(position).view(1, self.head_dim, area, *out)
        weights = (queries * (keys + own_position - their_position)).sum(1).softmax(1)
        attended: Tensor = (weights.unsqueeze(1) * values).sum(2)
        return attended.reshape(batch, self.out_planes, *out)

    def _neighbours(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C * K * K, pixels / stride**2], reflected at the border."""
        padding = self.kernel_att // 2
        return F.unfold(F.pad(x, (padding,) * 4, mode="reflect"), self.kernel_att, stride=self.stride)

    def _convolve(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The k*k maps of each of the head_dim channels, then shifted and summed by ``dep_conv``."""
        batch, _, height, width = q.shape
        qkv = torch.cat([part.reshape(batch, self.head, self.head_dim, -1) for part in (q, k, v)], 1)
        maps: Tensor = self.fc(qkv).permute(0, 2, 1, 3).reshape(batch, 9 * self.head_dim, height, width)
        shifted: Tensor = self.dep_conv(maps)
        return shifted

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("rate1", "rate2"):
            rate, own = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if rate is not None and rate.numel() in (1, self.out_planes):
                shape = (1,) if rate.numel() == 1 else (1, self.out_planes, 1, 1)
                state_dict[f"{prefix}{name}"] = rate.reshape(shape)
                if own.shape != shape:
                    setattr(self, name, nn.Parameter(own.new_empty(shape)))
        for name, conv in (("fc", self.fc), ("dep_conv", self.dep_conv)):
            if f"{prefix}{name}.weight" in state_dict:
                has_bias = f"{prefix}{name}.bias" in state_dict
                conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels)) if has_bias else None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"kernel_att={self.kernel_att}, head={self.head}, stride={self.stride}"
