"""The fused file of every family, read and built by TensorRT-RTX."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import Tensor, nn

from acmix_deploy.engine.build import build
from acmix_deploy.families import FAMILIES
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.gated_acmix.module import GatedACmix
from acmix_deploy.families.outlook.module import OutlookAttention
from acmix_deploy.families.shift_conv.module import ShiftConv
from acmix_deploy.families.swin_acmix.module import SwinACmix
from acmix_deploy.families.windowed_acmix.module import WindowedACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.options import FLOAT32
from acmix_deploy.precision import to_fp16
from tests.families.parts import assert_fused, export, randomised
from tests.plugin import parts as tensorrt_parts


class Model(nn.Module):
    """A block between convolutions, as in a detector."""

    def __init__(self, block: nn.Module, *, channels_last: bool) -> None:
        super().__init__()
        self.before, self.block, self.after = nn.Conv2d(3, 32, 1), block, nn.Conv2d(32, 4, 1)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).relu()
        y = self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.channels_last else self.block(x)
        return self.after(y.relu())


MODELS = {
    "acmix": lambda: Model(ACmix(32, 32, head=2), channels_last=False),
    "swin_acmix": lambda: Model(SwinACmix(32, 4, 2, shift_size=2), channels_last=True),
    "shift_conv": lambda: Model(ShiftConv(32, 32), channels_last=False),
    "outlook": lambda: Model(OutlookAttention(32, 2), channels_last=True),
    "windowed_acmix": lambda: Model(WindowedACmix(32, 7, 2), channels_last=True),
    "gated_acmix": lambda: Model(GatedACmix(32, 2), channels_last=False),
}
SIZE, LARGER = (16, 24), (32, 32)  # no multiples of the window of windowed_acmix


@pytest.mark.parametrize("axes", [(), ("batch", "height", "width")], ids=["static", "dynamic"])
@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_rtx_builds(tmp_path, family, axes):
    tensorrt_parts.rtx_libraries()
    model = randomised(MODELS[family]())
    x, others = torch.randn(1, 3, *SIZE), [torch.randn(2, 3, *LARGER)] if axes else []
    source = export(model, x, tmp_path / "plain.onnx", dynamic=axes)
    assert_fused(family, model, source, x, *others)
    shapes = ((1, 3, *SIZE), (2, 3, *LARGER), (3, 3, *LARGER)) if axes else None
    report = build(tmp_path / "fused.onnx", tmp_path / "model.engine", shapes=shapes).found
    assert report.layers > 0
    assert report.manifest.profiles == ({"x": shapes} if axes else {})


def test_rtx_computes_window_and_global_attention_in_one_kernel(rtx, tmp_path):
    """In half precision, whether the Softmax stays in float32 or not. Smaller heads than of 16 it leaves apart."""
    paths = []
    for family in ("swin_acmix", "windowed_acmix", "gated_acmix"):
        source = export(randomised(MODELS[family]()), torch.randn(1, 3, *SIZE), tmp_path / f"{family}.onnx")
        fused = tmp_path / f"{family}.fused.onnx"
        fuse(source, fused, expect=1)
        for float32 in ((), FLOAT32):
            paths.append(tmp_path / f"{family}.{len(float32)}.onnx")
            to_fp16(fused, paths[-1], float32=float32)
    answers, _ = rtx("build", "-", *paths)
    for path, answer in zip(paths, answers, strict=True):
        nodes = {node.name: node.op_type for node in onnx.load(path).graph.node}
        (kernel,) = answer["attention"]
        assert sorted(nodes[name] for name in kernel if nodes[name] not in ("Add", "Cast")) == [
            "MatMul",
            "MatMul",
            "Softmax",
        ], path.name
