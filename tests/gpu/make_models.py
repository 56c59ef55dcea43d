"""What test_engines_gpu.py and scripts/bench_engines.py need of packages that a machine with a GPU may lack.

    python -m tests.gpu.make_models FOLDER

For each model, in opset 17, which every TensorRT from 8.5 on reads: FOLDER/NAME.plain.onnx as PyTorch exports the
authors' form of the block, NAME.fused.onnx, both in float32 and in float16 (NAME.plain.fp16.onnx), of a detector
NAME.fused.int8.onnx too, calibrated on the input; NAME.npz with an input, what ONNX Runtime makes of it with the
float32 file, the number of blocks, and the largest relative L2 accepted in each type.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from acmix_deploy import families, yolo
from acmix_deploy.export import export
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.precision import quantize, to_fp16
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import onnx_runner
from acmix_deploy.runtime.torch import TorchRunner
from acmix_deploy.verify.limits import TOLERANCES

Shape = tuple[int, int, int, int]


def models() -> dict[str, tuple[nn.Module, Shape, int]]:
    """By name: module, shape of its input, number of ACmix blocks."""
    torch.manual_seed(0)
    return {
        **{
            f"block-{channels}x{side}": (ACmix(channels, channels).eval(), (1, channels, side, side), 1)
            for channels, side in ((64, 80), (128, 40), (256, 20))
        },
        "yolov8n-acmix": (_detector("p3p4p5"), (1, 3, 640, 640), 3),
        "yolov8n": (_detector(None), (1, 3, 640, 640), 0),
    }


def _detector(variant: yolo.Variant | None) -> nn.Module:
    """An untrained YOLOv8n, with ACmix or without, whose batch normalisation has seen images."""
    tasks = yolo.ultralytics("nn.tasks")
    model = yolo.build(variant, "n") if variant else tasks.DetectionModel("yolov8n.yaml", verbose=False)
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the plain mean over all images seen
        for _ in range(4):
            model(torch.rand(2, 3, 256, 256))
    prepared: nn.Module = yolo.prepare_for_export(families.canonicalise(model.eval())[0])
    return prepared.float().eval()


def make(folder: Path, name: str, module: nn.Module, shape: Shape, blocks: int) -> None:
    """Write the files of one model."""
    folder.mkdir(parents=True, exist_ok=True)
    plain, fused = (folder / f"{name}.{form}.onnx" for form in ("plain", "fused"))
    image = {"images": np.random.default_rng(0).random(shape, np.float32)}
    export(module, plain, input_shape=shape, opset=17)
    fuse(plain, fused, expect=blocks)
    for path in (plain, fused):
        to_fp16(path, path.with_suffix(".fp16.onnx"), samples=[image])
    if shape[1] == 3:
        pixels = (image["images"][0].transpose(1, 2, 0) * 255).astype(np.uint8)
        with tempfile.TemporaryDirectory() as photos:
            cv2.imwrite(f"{photos}/noise.png", pixels)
            quantize(fused, fused.with_suffix(".int8.onnx"), Path(photos), image_size=shape[2:])
    with onnx_runner(plain, "exported") as runner:
        expected = {name: array.copy() for name, array in runner.infer(image).items()}
    with TorchRunner(module.half(), output_names=list(expected)) as runner:
        eager = runner.infer(image)
    error = max(deviation(expected[name], eager[name]).relative_l2 or 0 for name in expected)
    limits = {
        f"limit:{dtype}": TOLERANCES[dtype].limit(e) for dtype, e in (("float32", 0), ("float16", error), ("int8", 0))
    }
    inputs = {f"input:{name}": array for name, array in image.items()}
    outputs = {f"output:{name}": array for name, array in expected.items()}
    np.savez(folder / f"{name}.npz", blocks=blocks, **inputs, **outputs, **limits)


if __name__ == "__main__":
    for name, model in models().items():
        print(f"{name} ...", flush=True)
        make(Path(sys.argv[1]), name, *model)
