"""The faults of published blocks and their copies, each with its symptom and what mends it. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

from acmix_deploy.detection.boxes import NO_DETECTOR_HINT
from acmix_deploy.faults import FaultId

REPLACED = "acmix-deploy export replaces the block by its own, proven equal"


@dataclass(frozen=True)
class Fault:
    """One known fault."""

    what: str
    symptom: str
    """What a user sees of it, with the message in the words of the library that gives it."""
    remedy: str
    """What mends it; a sentence."""
    of_block: str = ""
    """What is said of a block that has it."""


FAULTS: dict[FaultId, Fault] = {
    "float64-position": Fault(
        "`torch.linspace` makes the position term float64 in TorchScript exports",
        "ONNX Runtime: `Could not find an implementation for Conv`",
        "acmix-deploy fuse removes the chain from the file.",
    ),
    "linspace-position": Fault(
        "coordinates come from `torch.linspace`, whose length an exporter keeps as a constant or whose type it widens",
        "other sizes fail, though the signature is dynamic",
        f"{REPLACED}; in code: `a = torch.arange(W); a * 2 / a[-1:] - 1`.",
        "position computed with linspace",
    ),
    "frozen-size": Fault(
        "a height or width that is declared free holds for the size of the export alone",
        "ONNX Runtime fails on every other size",
        "Export the checkpoint again with acmix-deploy export --dynamic height,width, which runs the file at other "
        "sizes before it counts.",
    ),
    "frozen-batch": Fault(
        "the batch is declared free and fixed inside, as by `int(...)` in `window_reverse`",
        "the file exports, and fails at batch 2 or mixes images",
        "Export the checkpoint again with acmix-deploy export --dynamic batch, which runs the file at another batch "
        "before it counts.",
    ),
    "traced-batch": Fault(
        "the batch is computed with `int(...)`, which tracing keeps as a constant",
        "the file exports, and fails at batch 2",
        f"{REPLACED}; in code: reshape with -1 for the batch.",
        "exported by tracing it holds for one batch alone",
    ),
    "float32-position": Fault(
        "position tensors are made in float32 whatever the model's type",
        "PyTorch: `Input type (float) and bias type (c10::Half) should be the same`",
        f"{REPLACED}; in code: make the coordinates in the type of the input.",
        "does not run in the type of its weights",
    ),
    "cuda-position": Fault(
        "`.cuda()` whatever the input's device",
        "fails without a GPU, or on the second one",
        f"{REPLACED}; in code: give `device=x.device`.",
        "tensors moved to CUDA whatever the input's device",
    ),
    "no-bias": Fault(
        "initialisation sets `dep_conv.bias` to `None`",
        "checkpoints with and without that tensor: `Missing key(s) in state_dict`, `Unexpected key(s)`",
        "The project's own ACmix loads both; acmix-deploy export needs nothing.",
        "dep_conv.bias is None",
    ),
    "scalar-rates": Fault(
        "rates are scalars in some copies, of shape (1,) in others",
        "PyTorch: `size mismatch for rate1`",
        "The project's own ACmix widens them; acmix-deploy export needs nothing.",
        "scalar rates widened to shape (1,)",
    ),
    "col2im": Fault(
        "`torch.nn.functional.fold`, which exporters write as Col2Im",
        "TensorRT reads no Col2Im, and the TorchScript exporter writes none of sizes that it traces",
        f"{REPLACED}, or acmix-deploy fuse takes it out of the file.",
        "fold, which exporters write as Col2Im and TensorRT does not read",
    ),
    "folded-position": Fault(
        "constant folding stored the unfolded position term",
        "the file grows with the image size, by K*K numbers for each pixel and channel of a head",
        "acmix-deploy fuse recovers the two numbers of each channel that it was made of, and drops the tensor.",
    ),
    "misplaced-argument": Fault(
        "YAML arguments ended up in the wrong place: `kernel_att` 512 or 1",
        "fails, or computes something else",
        "Put the arguments in the order [out_planes, kernel_att, head] and train again.",
    ),
    "no-block": Fault(
        "a module is called or built like a known block and computes something else",
        "",
        "It is exported as it is and not fused; if it should be a known block, the reason says what to change.",
    ),
    "hidden-block": Fault(
        "the file was quantised before it was fused: Q/DQ nodes stand in and around its blocks",
        "acmix-deploy fuse finds no block in it, and attention runs through dequantised tensors",
        "acmix-deploy fuse on the float file first, then acmix-deploy quantize on what that wrote.",
    ),
    "blocked-load": Fault(
        "a configuration object (yacs, argparse) lies beside the weights",
        "PyTorch: `Unsupported global: GLOBAL yacs.config.CfgNode was not an allowed global by default`",
        "acmix-deploy loads it with an inert object in its place; for torch.load, save the configuration as text.",
    ),
    "missing-class": Fault(
        "classes of the model cannot be imported: `models.common`, `__main__`, a changed Ultralytics",
        "PyTorch: `Can't get attribute`, `No module named 'models'`",
        "Name the folder of their code, --code DIR --trust, or what builds the model: --arch package.module:factory.",
    ),
    "refused-file": Fault(
        "the file is not valid ONNX, or ONNX Runtime refuses it",
        "",
        "Export the checkpoint again with acmix-deploy export.",
    ),
    "other-outputs": Fault(
        "a file gives something else than its metadata tell: another task, another number of classes, rows of boxes, "
        "scores and classes that are not told",
        "scores above 1, boxes where nothing is; `detect` and `serve` refuse the file",
        NO_DETECTOR_HINT,
    ),
    "other-machine": Fault(
        "the engine was built for something else than there is here",
        "",
        "Build it again on this machine: acmix-deploy build.",
    ),
}
