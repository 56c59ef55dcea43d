"""Window and global attention in the fused files, as TensorRT-RTX builds them."""

from __future__ import annotations

import onnx
import torch

from acmix_deploy.families.gated_acmix.graph import GATED_ACMIX
from acmix_deploy.families.swin_acmix.graph import SWIN_ACMIX
from acmix_deploy.families.windowed_acmix.graph import WINDOWED_ACMIX
from acmix_deploy.fusion import fuse
from acmix_deploy.options import FLOAT32
from acmix_deploy.precision import to_fp16
from tests.families.parts import Model, export, variants_of


def test_rtx_computes_window_and_global_attention_in_one_kernel(rtx, tmp_path):
    """In half precision, whether the Softmax stays in float32 or not. Smaller heads than of 16 it leaves apart."""
    paths = []
    for family in (SWIN_ACMIX, WINDOWED_ACMIX, GATED_ACMIX):
        source = export(Model(variants_of(family)[0], channels=32), torch.randn(1, 3, 16, 24), tmp_path / "plain.onnx")
        fused = tmp_path / "fused.onnx"
        fuse(source, fused, expect=1)
        for float32 in ((), FLOAT32):
            paths.append(tmp_path / f"{family.name}.{len(float32)}.onnx")
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
