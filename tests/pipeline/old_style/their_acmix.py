"""An ACmix written for tests in the syntax of Python 3.8 and in operators that PyTorch 1.13 exports."""

import torch
from torch import nn


class ACmix(nn.Module):
    """[B, C, H, W] to the same: attention over 7x7 pixels, and a convolution of the same projections."""

    def __init__(self, channels, heads=4, window=7):
        super().__init__()
        d = channels // heads
        self.heads, self.kernel_att = heads, window
        self.rate1, self.rate2 = nn.Parameter(torch.tensor([0.7])), nn.Parameter(torch.tensor([0.4]))
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.conv_p = nn.Conv2d(2, d, 1)
        self.pad, self.unfold = nn.ReflectionPad2d(window // 2), nn.Unfold(window)
        self.fc = nn.Conv2d(3 * heads, 9, 1, bias=False)
        self.dep_conv = nn.Conv2d(9 * d, channels, 3, 1, 1, groups=d, bias=False)

    def forward(self, x):
        batch, channels, height, width = x.shape
        d, window = channels // self.heads, self.kernel_att**2
        q, k, v = self.conv1(x), self.conv2(x), self.conv3(x)
        columns, rows = (torch.arange(n, dtype=x.dtype, device=x.device) / (n - 1) * 2 - 1 for n in (width, height))
        place = torch.stack((columns.view(1, -1).repeat(height, 1), rows.view(-1, 1).repeat(1, width)))
        p = self.conv_p(place.unsqueeze(0))

        def around(maps):
            """The pixels around each: [B * N, d, window, H, W]."""
            return self.unfold(self.pad(maps)).view(-1, d, window, height, width)

        each = q.reshape(batch * self.heads, d, 1, height, width) * d**-0.5
        offset = p.view(1, d, 1, height, width) - around(p)
        weights = (each * (around(k.reshape(-1, d, height, width)) + offset)).sum(1, keepdim=True).softmax(2)
        attended = (weights * around(v.reshape(-1, d, height, width))).sum(2).view(batch, channels, height, width)
        joined = torch.cat((q, k, v), 1).view(batch, 3 * self.heads, d * height, width)
        maps = self.fc(joined).view(batch, 9, d, height, width).permute(0, 2, 1, 3, 4)
        shifted = self.dep_conv(maps.reshape(batch, 9 * d, height, width))
        return self.rate1 * attended + self.rate2 * shifted
