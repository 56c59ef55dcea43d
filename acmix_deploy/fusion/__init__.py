"""Stage 3: plain ONNX to fused ONNX, with onnx-graphsurgeon."""

from acmix_deploy.fusion.fuse import ConvBranchChoice, FusionReport, fuse
from acmix_deploy.fusion.replace import FusedBlock

__all__ = ["ConvBranchChoice", "FusedBlock", "FusionReport", "fuse"]
