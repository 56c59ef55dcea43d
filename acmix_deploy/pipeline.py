"""The whole way, top to bottom: model.pt -> module -> plain ONNX -> fused ONNX -> typed ONNX -> verify -> profile.

Each step reads what the one before it wrote and writes one file with a sidecar that says where it came from.
"""

from __future__ import annotations

import ast
import copy
import glob
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from torch import nn
from torch.export import ExportedProgram

from acmix_deploy import families, yolo
from acmix_deploy.artifacts import replacing, sidecar, write_artifact
from acmix_deploy.checkpoint import LoadedModel, load
from acmix_deploy.export import INPUT, export
from acmix_deploy.forms import to_form, write_for
from acmix_deploy.fusion import ConvBranchChoice, fuse
from acmix_deploy.precision import to_fp16
from acmix_deploy.profile import profile
from acmix_deploy.report.model import ExportReport, TargetReport, describe_file, next_steps
from acmix_deploy.runtime.inputs import random_images
from acmix_deploy.runtime.onnxruntime import element_type, onnx_runner
from acmix_deploy.runtime.torch import TorchRunner
from acmix_deploy.targets import DEFAULT_OPSET, Form, Target
from acmix_deploy.verify import Candidate, Verification, verify

Progress = Callable[[str], None]


def deploy(
    checkpoint: Path,
    out: Path,
    *,
    fp16: bool = False,
    fp16_io: bool = False,
    image_size: int | None = None,
    input_shape: tuple[int, int, int, int] | None = None,
    dynamic: Collection[str] = (),
    opset: int | None = None,
    target: Target | None = None,
    form: Form | None = None,
    conv_branch: ConvBranchChoice = "auto",
    expect: int | None = None,
    arch: str | None = None,
    trust: bool = False,
    progress: Progress = lambda step: None,
) -> ExportReport:
    """Take a checkpoint to verified ONNX files.

    Args:
        checkpoint: what PyTorch or Ultralytics saved, see :func:`acmix_deploy.checkpoint.load`.
        out: folder for the files and ``report.json``.
        fp16: also write a file that computes in half precision.
        fp16_io: the same, with inputs and outputs in half precision too.
        image_size: side of a square image in pixels; by default the model's own, else 640.
        input_shape: [B, C, H, W], instead of ``image_size``.
        dynamic: axes to leave free, out of "batch", "height" and "width".
        opset: 17 to 21; by default 18, or the newest that ``target`` reads.
        target: also write the file to carry to it.
        form: form of that file, by default the target's own.
        conv_branch: form of the convolution branch, see :func:`acmix_deploy.fusion.fuse`.
        expect: number of blocks that must fuse.
        arch: "package.module:factory" for a checkpoint that holds a state dict alone.
        trust: let the checkpoint run code.
        progress: told what is being done.

    Returns:
        The report, which is also in ``report.json``. Whether the files are exact enough is in its ``passed``.

    Raises:
        UserError: the checkpoint or the request cannot be used.
        CheckFailed: a file that computes something else, or another number of blocks than ``expect``.
        MissingComponent: a package that the checkpoint needs is not installed.
    """
    fp16 = fp16 or fp16_io
    if opset is None:
        opset = min(DEFAULT_OPSET, target.opset) if target else DEFAULT_OPSET
    if target:
        target.check_opset(opset, "the file asked for")
    seconds: dict[str, float] = {}
    paths = {role: out / f"{checkpoint.stem}{suffix}.onnx" for role, suffix in _SUFFIXES.items()}

    with _stage("load", seconds, progress, f"loading {checkpoint}"):
        model = load(checkpoint, arch=arch, trust=trust)
        shape = input_shape or _default_shape(model, image_size)
        module, blocks = _recognise(model)
        files = [*paths.values(), *_for_targets(paths)]
        for stale in (*files, *map(sidecar, files), out / "report.json"):
            if stale.is_file():
                stale.unlink()

    with _stage("export", seconds, progress, "exporting"):
        exported = export(
            module,
            paths["plain"],
            input_shape=shape,
            opset=opset,
            dynamic=dynamic,
            divisor=int(model.metadata.get("stride", 1)),
            metadata=model.metadata,
            progress=progress,
        )
        asked = {"input_shape": list(shape), "dynamic": sorted(dynamic), "opset": opset}
        artifacts = {"plain": write_artifact(paths["plain"], "plain", parents=[checkpoint], settings=asked)}

    with _stage("fuse", seconds, progress, "fusing"):
        fusion = fuse(paths["plain"], paths["fused"], conv_branch=conv_branch, expect=expect, progress=progress)
        made = {"conv_branch": conv_branch}
        artifacts["fused"] = write_artifact(paths["fused"], "fused", parents=[paths["plain"]], settings=made)

    if fp16:
        with _stage("fp16", seconds, progress, "converting to half precision"):
            to_fp16(paths["fused"], paths["fp16"], fp16_io=fp16_io)
            made_fp16 = {"fp16_io": fp16_io}
            artifacts["fp16"] = write_artifact(paths["fp16"], "fp16", parents=[paths["fused"]], settings=made_fp16)

    runnable: dict[str, Path | onnx.ModelProto] = {role: artifact.path for role, artifact in artifacts.items()}
    made_for = None
    if target:
        with _stage("target", seconds, progress, f"writing the file for {target.name}"):
            typed = "fp16" if fp16 and target.strongly_typed else "fused"
            artifacts["target"], inlined = write_for(target, paths[typed], form)
            made_for = TargetReport.of(target, artifacts["target"], inlined)
            # ONNX Runtime has no plugin: in its place the same file with the definitions.
            runnable["target"] = (
                to_form(onnx.load(paths[typed]), "any") if made_for.form == "plugin" else artifacts["target"].path
            )

    with _stage("verify", seconds, progress, "comparing every file with the PyTorch model"):
        names = {role: artifact.path.name for role, artifact in artifacts.items()}
        verification = _verify(
            module, {names[role]: model for role, model in runnable.items()}, exported.checked_shapes
        )

    with _stage("profile", seconds, progress, "timing every file on ONNX Runtime"):
        timed = {role: model for role, model in runnable.items() if isinstance(model, Path)}
        profiles = profile([*timed.values()], input_shape=shape, samples=_SAMPLES, rounds=_ROUNDS, seconds=_SECONDS)
        latency = dict(zip(timed, profiles, strict=True))

    report = ExportReport(
        model=str(checkpoint),
        notes=model.notes,
        blocks=tuple(blocks),
        export=exported,
        fusion=fusion,
        files={role: describe_file(artifact, latency.get(role)) for role, artifact in artifacts.items()},
        target=made_for,
        verification=verification,
        seconds=seconds,
        next_steps=next_steps(names, exported, made_for),
    )
    with replacing(out / "report.json") as temporary:
        temporary.write_text(report.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")
    return report


_SUFFIXES = {"plain": "", "fused": ".fused", "fp16": ".fp16"}
_SAMPLES, _ROUNDS, _SECONDS = 30, 3, 4.0  # of latency, for each file


def _for_targets(paths: dict[str, Path]) -> list[Path]:
    """The files for any target that an earlier run made from these."""
    pattern = re.compile(r"\.(jetpack|tensorrt)-[\d.]+\.onnx")
    return [
        other
        for path in paths.values()
        for other in path.parent.glob(f"{glob.escape(path.stem)}.*.onnx")
        if pattern.fullmatch(other.name.removeprefix(path.stem))
    ]


def _default_shape(model: LoadedModel, image_size: int | None) -> tuple[int, int, int, int]:
    """[1, C, H, W] from ``image_size``, else from the size that the model was trained at, else 640."""
    channels = int(model.metadata.get("channels", 3))
    if image_size is not None:
        return 1, channels, image_size, image_size
    height, width = ast.literal_eval(model.metadata.get("imgsz", "[640, 640]"))
    return 1, channels, height, width


def _recognise(model: LoadedModel) -> tuple[nn.Module | ExportedProgram, list[families.BlockReport]]:
    """The module ready for export, with every known block replaced by its family's own."""
    if isinstance(model.module, ExportedProgram):
        return model.module, []
    module, blocks = families.canonicalise(model.module)
    return yolo.prepare_for_export(module), blocks


def _verify(
    module: nn.Module | ExportedProgram,
    models: dict[str, Path | onnx.ModelProto],
    shapes: Collection[tuple[int, ...]],
) -> Verification:
    """Every file, by its name, against the PyTorch model, at every shape that the export was checked at."""
    reference = module.module() if isinstance(module, ExportedProgram) else module
    candidates = [Candidate(onnx_runner(model, name), element_type(model)) for name, model in models.items()]
    half = any(candidate.precision == "float16" for candidate in candidates)
    eager = {"float16": TorchRunner(copy.deepcopy(reference).half(), "torch float16")} if half else {}
    feeds = [{INPUT: random_images(tuple(shape), seed)} for seed, shape in enumerate(shapes)]
    return verify(TorchRunner(reference, "PyTorch"), candidates, feeds, eager=eager)


@contextmanager
def _stage(name: str, seconds: dict[str, float], progress: Progress, message: str) -> Iterator[None]:
    """Tell that a stage begins and keep how long it took."""
    progress(message)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)
