"""Stage 3: plain ONNX to fused ONNX, with onnx-graphsurgeon."""

from acmix_deploy.fusion.fuse import ConvBranchChoice, FusedBlock, FusionReport, fuse

__all__ = ["ConvBranchChoice", "FusedBlock", "FusionReport", "fuse"]
