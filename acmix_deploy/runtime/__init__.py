"""Run anything behind polygraphy's runner interface: PyTorch, ONNX Runtime, engines; and what to feed them.

Imports nothing by itself: :mod:`acmix_deploy.runtime.tensorrt` works where there is neither PyTorch nor ONNX.
"""
