"""Stage 4: fused ONNX to typed ONNX."""

from acmix_deploy.precision.fp16 import Fp16Report, to_fp16

__all__ = ["Fp16Report", "to_fp16"]
