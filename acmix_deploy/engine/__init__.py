"""Stage 5, typed ONNX to engine: the only place that builds."""
