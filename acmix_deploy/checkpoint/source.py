"""What every file is made from: a checkpoint's module, ready for export, and the model as it was loaded beside it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from torch.export import ExportedProgram

from acmix_deploy import families, yolo
from acmix_deploy.checkpoint.interpreter import load_elsewhere
from acmix_deploy.checkpoint.load import load
from acmix_deploy.checkpoint.reference import Reference, run
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.families.proof import keep_proven
from acmix_deploy.options import HeadChoice
from acmix_deploy.runtime.inputs import Shape, checked_shapes


@dataclass(frozen=True)
class Source:
    """A checkpoint, loaded."""

    module: nn.Module | ExportedProgram
    """Ready for export, with every known block replaced by its family's own."""
    reference: Reference
    """The model as it was loaded, to compare with."""
    blocks: tuple[families.BlockReport, ...]
    """What became of each block, and of modules that resemble one."""
    metadata: ModelMetadata
    """What is known of the model, such as class names and stride; goes into its files."""
    shape: Shape
    """[B, C, H, W] of the example."""
    notes: tuple[str, ...]
    """What was chosen or changed on the way."""


def load_source(
    path: Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    batch: int | None = None,
    input_shape: Sequence[int] | None = None,
    dynamic: Collection[str] = (),
    arch: str | None = None,
    head: HeadChoice | None = None,
    trust: bool = False,
    code: Path | None = None,
    python: Path | None = None,
) -> Source:
    """Load a checkpoint and replace its blocks, each proven equal at all shapes that its files will run at.

    Args:
        path: a pickled module, a checkpoint of Ultralytics, a state dict, or a program of ``torch.export``.
        image_size: side of a square image, or height and width, in pixels; by default those of training, else 640.
        batch: number of images, 1 by default.
        input_shape: [B, C, H, W], instead of ``image_size`` and ``batch``.
        dynamic: axes that will be free, out of "batch", "height" and "width".
        arch: "package.module:factory", called without arguments for the module that a state dict belongs to.
        head: of a detector with two, such as YOLOv10; by default the one that the checkpoint sets.
        trust: let the checkpoint run code; only for files that you trust.
        code: with ``trust``, folder of the code that the checkpoint needs. One process takes one such folder.
        python: with ``trust``, another interpreter, by which the checkpoint is loaded and run; blocks are then known in
            its file only.

    Returns:
        The model ready for export, beside the model as it was loaded.

    Raises:
        UserError: the checkpoint cannot be used, or not at this shape.
        MissingComponent: a package that it needs is not installed.
    """
    if python:
        loaded = load_elsewhere(path, python, trust=trust, code=code)
    else:
        loaded = load(path, arch=arch, head=head, trust=trust, code=code)
    told = loaded.metadata
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    shape = tuple(input_shape or (batch or 1, told.channels, *(image_size or told.imgsz)))
    shapes = checked_shapes(shape, dynamic, loaded.metadata.stride)
    reference = Reference(loaded)
    module, blocks = loaded.module, list[families.BlockReport]()
    if not isinstance(module, ExportedProgram):
        module, blocks = families.canonicalise(module)
        module, blocks = keep_proven(
            reference.model,
            module,
            blocks,
            run=lambda: [run(reference, shape) for shape in shapes],
            any_size=not {"height", "width"}.isdisjoint(dynamic),
        )
        module = yolo.prepare_for_export(module)
    return Source(module, reference, tuple(blocks), loaded.metadata, shape, loaded.notes)
