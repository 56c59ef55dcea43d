"""Detectors at work: images in, boxes out. Needs neither PyTorch nor ONNX nor Ultralytics."""
