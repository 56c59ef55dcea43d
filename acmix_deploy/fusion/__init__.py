"""Stage 3: plain ONNX to fused ONNX, with onnx-graphsurgeon."""

from acmix_deploy.fusion.fuse import FusionReport, fuse
from acmix_deploy.fusion.replace import FusedBlock

__all__ = ["FusedBlock", "FusionReport", "fuse"]
