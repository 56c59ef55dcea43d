"""Stage 3: plain ONNX to fused ONNX, with onnx-graphsurgeon."""

from acmix_deploy.fusion.fuse import FusedBlock, FusionReport, fuse

__all__ = ["FusedBlock", "FusionReport", "fuse"]
