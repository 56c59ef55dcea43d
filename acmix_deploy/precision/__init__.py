"""Stage 4: fused ONNX to typed ONNX."""

from acmix_deploy.precision.fp16 import Fp16Report, to_fp16
from acmix_deploy.precision.int8 import FloatLayer, Int8Report, QuantizedLayer, quantize

__all__ = ["FloatLayer", "Fp16Report", "Int8Report", "QuantizedLayer", "quantize", "to_fp16"]
