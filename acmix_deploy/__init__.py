"""From a detector checkpoint with ACmix blocks to a verified, fused ONNX file."""

__version__ = "0.2.0"
