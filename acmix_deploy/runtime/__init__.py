"""Run anything: models of PyTorch and of ONNX Runtime behind polygraphy's runner interface, and what to feed them."""
