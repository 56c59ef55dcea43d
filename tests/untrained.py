"""Checkpoints of detectors that nobody trained, as Ultralytics saves them.

The weights are random, but not dead: batch normalisation has seen images, so that outputs depend on the input and on
every block.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from acmix_deploy import yolo


def make_checkpoint(path: Path, variant: yolo.Variant = "p3p4p5", scale: yolo.Scale = "n") -> None:
    """Save an untrained YOLOv8 with ACmix: pickled, in half precision, with the arguments of its training."""
    torch.manual_seed(0)
    model = enlivened(yolo.build(variant, scale))
    torch.save({"model": model.half(), "ema": None, "train_args": {"imgsz": 640}}, path)


def enlivened(detector: Any) -> nn.Module:
    """:func:`settled` for a detector of Ultralytics, whose scores become such as images have.

    They begin near 1e-5, where ONNX Runtime's Sigmoid is not exact to 1e-4.
    """
    with torch.no_grad():
        for branch in detector.model[-1].cv3:
            branch[-1].bias.fill_(-2)
    return settled(detector)


def settled(model: nn.Module) -> nn.Module:
    """The model in eval mode, the rates of its ACmix blocks apart and its statistics those of noise.

    Normalised maps are kept small, where SiLU is nearly linear, and the noise is large enough for the last maps to have
    statistics: in large models float32 itself is not exact to 1e-5 otherwise.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("rate1", "rate2")):
                parameter.uniform_(0.3, 0.9)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(0.25)
                module.momentum = None  # the plain mean over all images seen
        for _ in range(2):
            model.train()(torch.rand(2, 3, 256, 256))
    return model.eval()
