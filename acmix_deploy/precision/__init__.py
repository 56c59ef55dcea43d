"""Stage 4: fused ONNX to typed ONNX."""

from acmix_deploy.precision.fp16 import Fp16Report, to_fp16
from acmix_deploy.precision.int8 import FloatLayer, Int8Report, QuantizedLayer, quantize
from acmix_deploy.precision.search import Goal, SearchReport

__all__ = [
    "FloatLayer",
    "Fp16Report",
    "Goal",
    "Int8Report",
    "QuantizedLayer",
    "SearchReport",
    "quantize",
    "to_fp16",
]
