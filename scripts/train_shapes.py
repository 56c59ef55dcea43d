"""Train YOLOv8n with an ACmix at P3, P4 and P5 on drawn shapes, with Ultralytics, on a CPU; or measure what it reached.

The file that this writes is AGPL-3.0, as is the code that trains it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts import shapes

CHECKPOINT = Path(__file__).resolve().parents[1] / "tests/data/shapes.pt"
TRAINING, VALIDATION, HELD_BACK = 1, 3, 2
"""Seeds of the three sets. The second only shows progress; the third is never seen before :func:`evaluate`."""

SETTINGS: dict[str, Any] = {
    "epochs": 30,
    "batch": 16,
    "nbs": 16,  # a step of the optimizer for each batch
    "optimizer": "AdamW",
    "lr0": 2e-3,
    "cos_lr": True,
    "warmup_epochs": 1,
    "warmup_bias_lr": 0.0,
    "mosaic": 0.0,
    "scale": 0.2,
    "flipud": 0.5,
    "amp": False,
    "pretrained": False,
}
_LOCAL: dict[str, Any] = {"imgsz": shapes.SIZE, "device": "cpu", "workers": 0, "plots": False}


def train(checkpoint: Path, count: int = 800, **settings: Any) -> None:
    """Train on ``count`` images and save the averaged weights as Ultralytics does, in half precision.

    Args:
        checkpoint: the file to write; its folder exists.
        count: number of images.
        settings: of Ultralytics, instead of those in :data:`SETTINGS`.
    """
    import torch

    from acmix_deploy import yolo

    settings = SETTINGS | settings
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = _describe(
            folder,
            train=shapes.write(folder / "training", TRAINING, count),
            val=shapes.write(folder / "validation", VALIDATION, 100),
        )
        # A model that is a module already needs no file; Ultralytics asks for the name of one all the same.
        files = {"model": "yolov8n-acmix.yaml", "data": data, "project": name, "save": False, "cache": True}
        trainer = yolo.ultralytics("models.yolo.detect").DetectionTrainer(overrides=files | _LOCAL | settings)
        trainer.model = yolo.build("p3p4p5", "n", len(shapes.NAMES))
        trainer.train()
        saved: dict[str, Any] = torch.load(trainer.last, weights_only=False)
    model = saved["model"]
    model.args = {"task": "detect", "imgsz": shapes.SIZE, **settings}
    kept = ("epoch", "version", "license", "docs")  # the rest tells of the machine and of the run
    torch.save({"model": model, "ema": None, "train_args": model.args} | {key: saved[key] for key in kept}, checkpoint)


def evaluate(model: Path, count: int = 500, **settings: Any) -> dict[str, float]:
    """mAP50, mAP50-95 and the like of Ultralytics' validator on held-back images.

    Args:
        model: a checkpoint, or an ONNX file that was made of one, whose own size Ultralytics takes.
        count: number of images.
        settings: other ones of the validator, such as ``imgsz``, which is 160.

    Raises:
        FileNotFoundError: there is no such file; Ultralytics would look for it on the network.
    """
    from acmix_deploy import yolo

    with tempfile.TemporaryDirectory() as name:
        images = shapes.write(Path(name) / "held-back", HELD_BACK, count)
        data = _describe(Path(name), train=images, val=images)
        detector = yolo.ultralytics("models").YOLO(model.resolve(strict=True), task="detect")
        measured = detector.val(data=data, project=name, batch=1, rect=False, verbose=False, **(_LOCAL | settings))
    results: dict[str, float] = measured.results_dict
    return results


def _describe(folder: Path, **splits: Path) -> str:
    """The file that names the folders of images and the classes to Ultralytics; JSON is YAML."""
    from acmix_deploy import yolo

    # Checking a data set, Ultralytics downloads the font of plots that nobody draws.
    yolo.ultralytics("data.utils").check_font = lambda font: None
    path = folder / "data.yaml"
    names = dict(enumerate(shapes.NAMES))
    path.write_text(json.dumps({"names": names} | {split: str(images) for split, images in splits.items()}))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, default=CHECKPOINT, help="file to write, or to measure")
    parser.add_argument("--evaluate", action="store_true", help="only measure")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as settings:
        os.environ |= {"YOLO_CONFIG_DIR": settings, "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
        start = time.monotonic()
        if not arguments.evaluate:
            train(arguments.model)
            print(f"trained in {(time.monotonic() - start) / 60:.0f} minutes")
        for name, value in evaluate(arguments.model).items():
            print(f"{name:24}{value:.4f}")


if __name__ == "__main__":
    main()
