"""What test_tensorrt_gpu.py needs of packages that a machine with a GPU may lack: files for TensorRT, and answers.

    python tests/gpu/make_models.py FOLDER

For each model: FOLDER/NAME.onnx, fused, opset 17, without function bodies, so that every TensorRT from 8.5 on reads it
and only the plugin can take its attention; NAME.fp16.onnx, the same in float16; NAME.npz with an input, what ONNX
Runtime makes of it with the file as exported, and the largest relative L2 accepted in each type.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from acmix_deploy import families, yolo
from acmix_deploy.export import export
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.operators import LOCAL_ATTENTION
from acmix_deploy.precision import to_fp16
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import onnx_runner
from acmix_deploy.runtime.torch import TorchRunner

Shape = tuple[int, int, int, int]


def models() -> dict[str, tuple[nn.Module, Shape, int]]:
    """By name: module, shape of its input, number of ACmix blocks."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    from demo import make_checkpoint

    from acmix_deploy.checkpoint import load

    torch.manual_seed(0)
    found: dict[str, tuple[nn.Module, Shape, int]] = {
        f"block-{channels}x{side}": (ACmix(channels, channels).eval(), (1, channels, side, side), 1)
        for channels, side in ((64, 80), (128, 40), (256, 20))
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "yolov8n.pt")
        make_checkpoint(checkpoint)
        detector = yolo.prepare_for_export(families.canonicalise(load(checkpoint).module)[0])
    return found | {"yolov8n": (detector.float().eval(), (1, 3, 320, 320), 3)}


def make(folder: Path, name: str, module: nn.Module, shape: Shape, blocks: int) -> None:
    """Write the three files of one model."""
    folder.mkdir(parents=True, exist_ok=True)
    fused, half = folder / f"{name}.onnx", folder / f"{name}.fp16.onnx"
    image = {"images": np.random.default_rng(0).random(shape, np.float32)}
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary, "plain.onnx")
        export(module, plain, input_shape=shape, opset=17)
        fuse(plain, fused, expect=blocks)
        with onnx_runner(plain, "exported") as runner:
            expected = {name: array.copy() for name, array in runner.infer(image).items()}
    to_fp16(fused, half)
    for path in (fused, half):
        model = onnx.load(path)
        del model.functions[:]
        onnx.save(model, path)

    with TorchRunner(module.half(), output_names=list(expected)) as runner:
        eager = runner.infer(image)
    error = max(deviation(expected[name], eager[name]).relative_l2 or 0 for name in expected)
    limits = {
        f"limit:{dtype}": LOCAL_ATTENTION.tolerances[dtype].limit(e)
        for dtype, e in (("float32", 0), ("float16", error))
    }
    inputs = {f"input:{name}": array for name, array in image.items()}
    outputs = {f"output:{name}": array for name, array in expected.items()}
    np.savez(folder / f"{name}.npz", blocks=blocks, **inputs, **outputs, **limits)


if __name__ == "__main__":
    for name, model in models().items():
        print(f"{name} ...", flush=True)
        make(Path(sys.argv[1]), name, *model)
