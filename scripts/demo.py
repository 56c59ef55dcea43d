"""The main job on a YOLOv8n with ACmix blocks at P3, P4 and P5: make a checkpoint, then what a user would run on it.

The weights are random, but not dead: batch normalisation has seen images, so that the outputs depend on the input
and the errors in the table mean something.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from acmix_deploy import cli, yolo

FOLDER = Path("out/demo")
IMAGE_SIZE = 640


def make_checkpoint(path: Path, variant: yolo.Variant = "p3p4p5") -> None:
    """Save an untrained detector as Ultralytics saves a trained one: pickled, in half precision."""
    torch.manual_seed(0)
    model = yolo.build(variant, "n")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("rate1", "rate2")):
                parameter.uniform_(0.3, 0.9)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the plain mean over all images seen
        for _ in range(4):
            model.train()(torch.rand(2, 3, 256, 256))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.eval().half(), "ema": None, "train_args": {"imgsz": IMAGE_SIZE}}, path)


if __name__ == "__main__":
    checkpoint = FOLDER / "yolov8n-acmix.pt"
    make_checkpoint(checkpoint)
    command = ["export", str(checkpoint), "--fp16", "--expect", "3", "--out", str(FOLDER)]
    print(f"$ acmix-deploy {' '.join(command)}", flush=True)
    sys.exit(cli.main([*command, *sys.argv[1:]]))
