"""The whole way, top to bottom: model.pt -> module -> plain ONNX -> fused -> typed -> engine -> verify -> profile.

Each step reads what the one before it wrote and writes one file with a sidecar that says where it came from.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
from torch import nn
from torch.export import ExportedProgram

from acmix_deploy import __version__, families, yolo
from acmix_deploy.artifacts import mark_exported, outdated, remove_exported, replacing, write_artifact
from acmix_deploy.checkpoint import LoadedModel, load
from acmix_deploy.checkpoint.reference import Reference
from acmix_deploy.detection.boxes import no_detector, unlike_told
from acmix_deploy.detection.images import Images, find, placed_batches
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.engine.build import BuildReport, build, target_here
from acmix_deploy.errors import AcmixDeployError, UserError
from acmix_deploy.export import INPUT, checked_shapes, export, run
from acmix_deploy.families.proof import keep_proven
from acmix_deploy.forms import takes_plugin, to_form, write_for
from acmix_deploy.fusion import ConvBranchChoice, fuse
from acmix_deploy.plugin.build import NAME as PLUGIN
from acmix_deploy.plugin.build import build as build_plugin
from acmix_deploy.plugin.library import check as check_plugin
from acmix_deploy.precision import FLOAT32, quantize, to_fp16
from acmix_deploy.profile import profile
from acmix_deploy.report.model import ExportReport, describe_file, next_steps, shapes_to_build
from acmix_deploy.report.target import TargetReport
from acmix_deploy.runtime.inputs import Shape, random_images
from acmix_deploy.runtime.models import open_model
from acmix_deploy.runtime.onnxruntime import onnx_runner, precision_of
from acmix_deploy.runtime.torch import TorchRunner
from acmix_deploy.targets import DEFAULT_OPSET, INT8_OPSET, Form, Target
from acmix_deploy.verify import Candidate, Scenes, Verification, verify

Progress = Callable[[str], None]


def deploy(
    checkpoint: Path,
    out: Path,
    *,
    fp16: bool = False,
    fp16_io: bool = False,
    calibration: Path | None = None,
    image_size: int | None = None,
    input_shape: tuple[int, int, int, int] | None = None,
    dynamic: Collection[str] = (),
    opset: int | None = None,
    float32: Sequence[str] = FLOAT32,
    target: Target | None = None,
    form: Form | None = None,
    engine: bool = True,
    plugin: Path | None = None,
    conv_branch: ConvBranchChoice = "auto",
    expect: int | None = None,
    arch: str | None = None,
    trust: bool = False,
    progress: Progress = lambda step: None,
) -> ExportReport:
    """Take a checkpoint to verified ONNX files and, on a machine with TensorRT and a GPU, to a verified engine.

    Args:
        checkpoint: what PyTorch or Ultralytics saved, see :func:`acmix_deploy.checkpoint.load`.
        out: folder for the files and ``report.json``.
        fp16: also write a file that computes in half precision.
        fp16_io: the same, with inputs and outputs in half precision too.
        calibration: folder of images; also write an INT8 file, calibrated on them, and verify every file on them.
        image_size: side of a square image in pixels; by default the model's own, else 640.
        input_shape: [B, C, H, W], instead of ``image_size``.
        dynamic: axes to leave free, out of "batch", "height" and "width".
        opset: 17 to 21; by default 18, or 19 for INT8, or the newest that the target reads.
        float32: what stays in float32 when all else is float16, see :func:`acmix_deploy.precision.to_fp16`.
        target: also write the file to carry to it, and build no engine here.
        form: form of that file, by default the target's own.
        engine: build one, where there is no ``target`` but TensorRT and a GPU.
        plugin: library for that engine; by default the one in ``out``, which is compiled where it is missing.
        conv_branch: form of the convolution branch, see :func:`acmix_deploy.fusion.fuse`.
        expect: number of blocks that must fuse.
        arch: "package.module:factory" for a checkpoint that holds a state dict alone.
        trust: let the checkpoint run code.
        progress: told what is being done.

    Returns:
        The report, which is also in ``report.json``. Whether the files are exact enough is in its ``passed``.

    Raises:
        UserError: the checkpoint or the request cannot be used; or there are calibration images and the model is a
            detector whose output cannot be decoded, such as one with an end-to-end head.
        CheckFailed: a file that computes something else, or another number of blocks than ``expect``.
        MissingComponent: a package that the checkpoint needs is not installed.
    """
    fp16 = fp16 or fp16_io
    notes: list[str] = []
    device = _device(notes) if engine and target is None else None
    if plugin and not device:
        raise UserError(
            f"{plugin} is for an engine, and none is built: {notes[0] if notes else 'there is no TensorRT with a GPU'}"
            if engine and target is None
            else f"{plugin} is for an engine, and none is asked for",
            "Leave out --plugin.",
        )
    reader = target or device
    if opset is None:
        wanted = INT8_OPSET if calibration else DEFAULT_OPSET
        opset = min(wanted, reader.opset) if reader else wanted
    if reader:
        reader.check_opset(opset, "the file asked for")
    if calibration:
        find(calibration, limit=1)
    seconds: dict[str, float] = {}
    paths = {role: out / f"{checkpoint.stem}{suffix}" for role, suffix in _SUFFIXES.items()}
    best = "int8" if calibration else "fp16" if fp16 else "fused"

    with _stage("load", seconds, progress, f"loading {checkpoint}"):
        model = load(checkpoint, arch=arch, trust=trust)
        shape = input_shape or _default_shape(model, image_size)
        divisor = model.metadata.stride
        reference = Reference(model)
        module, blocks = _recognise(model, reference, checked_shapes(shape, dynamic, divisor), dynamic)

    with _stage("export", seconds, progress, "exporting"):
        exported = export(
            module,
            paths["plain"],
            input_shape=shape,
            opset=opset,
            dynamic=dynamic,
            divisor=divisor,
            metadata=model.metadata,
            reference=reference,
            progress=progress,
        )
        asked = {"input_shape": list(shape), "dynamic": sorted(dynamic), "opset": opset}
        artifacts = {"plain": write_artifact(paths["plain"], "plain", parents=[checkpoint], settings=asked)}
        unlike = unlike_told(model.metadata, {output.name: output.shape for output in exported.outputs})
        if calibration and unlike:
            raise no_detector(paths["plain"].name, unlike)
        removed = remove_exported(out, checkpoint.stem)
        (out / "report.json").unlink(missing_ok=True)

    with _stage("fuse", seconds, progress, "fusing"):
        fusion = fuse(paths["plain"], paths["fused"], conv_branch=conv_branch, expect=expect, progress=progress)
        made = {"conv_branch": conv_branch}
        artifacts["fused"] = write_artifact(paths["fused"], "fused", parents=[paths["plain"]], settings=made)

    scenes = _scenes(calibration, exported.checked_shapes, model.metadata) if calibration else None
    feeds = _feeds(exported.checked_shapes, scenes)
    half = None
    if fp16:
        with _stage("fp16", seconds, progress, "converting to half precision"):
            half = to_fp16(paths["fused"], paths["fp16"], fp16_io=fp16_io, float32=float32, samples=feeds)
            made_fp16 = {"fp16_io": fp16_io, "float32": list(float32)}
            artifacts["fp16"] = write_artifact(paths["fp16"], "fp16", parents=[paths["fused"]], settings=made_fp16)

    int8 = None
    if calibration:
        with _stage("int8", seconds, progress, "converting to INT8"):
            int8 = quantize(
                paths["fused"],
                paths["int8"],
                calibration,
                fp16=opset >= INT8_OPSET,
                float32=float32,
                image_size=(shape[2], shape[3]),
                progress=progress,
            )
            made_int8 = {"method": int8.method, "rest": int8.rest}
            artifacts["int8"] = write_artifact(paths["int8"], "int8", parents=[paths["fused"]], settings=made_int8)

    runnable: dict[str, Path | onnx.ModelProto] = {role: artifact.path for role, artifact in artifacts.items()}
    made_for = None
    if target:
        with _stage("target", seconds, progress, f"writing the file for {target.name}"):
            typed = paths[_typed(best, target)]
            artifacts["target"], inlined = write_for(target, typed, form)
            made_for = TargetReport.of(target, artifacts["target"], inlined)
            # ONNX Runtime has no plugin: in its place the same file with the definitions.
            runnable["target"] = (
                to_form(onnx.load(typed), "any") if made_for.form == "plugin" else artifacts["target"].path
            )

    engines: dict[str, BuildReport] = {}
    if device:
        with _stage("engine", seconds, progress, "building engines"):
            plugin = plugin or (_plugin(out, notes, progress) if takes_plugin(onnx.load(paths["fused"])) else None)
            typed_roles = [role for role in artifacts if role in ("fp16", "int8")]
            for role in typed_roles or ["fused"]:
                engines[role] = build(
                    paths[_typed(role, device)],
                    paths[role].with_suffix(".engine"),
                    plugin=plugin,
                    fp16=role != "fused" and not device.strongly_typed,
                    timing_cache=out / "timing.cache",
                    shapes=shapes_to_build(exported),
                    progress=progress,
                )
                artifacts[f"{role} engine"] = engines[role].artifact
                runnable[f"{role} engine"] = engines[role].artifact.path

    with _stage("verify", seconds, progress, "comparing every file with the model"):
        names = {role: artifact.path.name for role, artifact in artifacts.items()}
        candidates = [_candidate(names[role], made) for role, made in runnable.items()]
        verification = _verify(reference, module, candidates, [] if scenes else feeds, scenes, model.metadata)

    with _stage("profile", seconds, progress, "timing every file"):
        timed = {role: model for role, model in runnable.items() if isinstance(model, Path)}
        profiles = profile([*timed.values()], input_shape=shape, plugin=plugin, rounds=_ROUNDS, seconds=_SECONDS)
        latency = dict(zip(timed, profiles, strict=True))

    origin = artifacts["plain"].parents[0]
    artifacts = {role: mark_exported(artifact, origin) for role, artifact in artifacts.items()}
    notes += outdated(out, removed, artifacts.values())
    report = ExportReport(
        model=str(checkpoint),
        notes=(*model.notes, *notes),
        blocks=tuple(blocks),
        reference=reference.report,
        export=exported,
        fusion=fusion,
        files={role: describe_file(artifact, latency.get(role)) for role, artifact in artifacts.items()},
        target=made_for,
        fp16=half,
        int8=int8,
        engines=engines,
        verification=verification,
        seconds=seconds,
        next_steps=next_steps(artifacts, exported, made_for, detector=model.metadata.detects and not unlike),
    )
    with replacing(out / "report.json") as temporary:
        temporary.write_text(report.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")
    return report


_SUFFIXES = {"plain": ".onnx", "fused": ".fused.onnx", "fp16": ".fp16.onnx", "int8": ".int8.onnx"}
_ROUNDS, _SECONDS = 3, 4.0  # of latency, for each file
_PHOTOS = 16  # that files are verified on


def _device(notes: list[str]) -> Target | None:
    """What the TensorRT of this machine takes; None where there is no GPU, and with a note where it cannot be used."""
    try:
        return target_here()
    except AcmixDeployError as error:
        notes.append(f"no engine was built: {error.message}")
        return None


def _typed(best: str, target: Target) -> str:
    """Role of the file that a target gets; half precision is a flag of the builder where types are not in the file."""
    return "fused" if best == "fp16" and not target.strongly_typed else best


def _plugin(out: Path, notes: list[str], progress: Progress) -> Path | None:
    """The plugin in ``out``, compiled where there is none of this version; None with a note where it cannot be."""
    library = out / PLUGIN
    try:
        if not library.is_file() or check_plugin(library).version != __version__:
            build_plugin(out, progress=progress)
    except AcmixDeployError as error:
        notes.append(f"the engine does without the plugin, so the attention is slower: {error.message}")
        return None
    return library


def _default_shape(model: LoadedModel, image_size: int | None) -> tuple[int, int, int, int]:
    """[1, C, H, W] from ``image_size``, else from the size that the model was trained at, else 640."""
    if image_size is not None:
        return 1, model.metadata.channels, image_size, image_size
    return model.metadata.usual_shape


def _recognise(
    model: LoadedModel, reference: Reference, shapes: Sequence[Shape], dynamic: Collection[str]
) -> tuple[nn.Module | ExportedProgram, list[families.BlockReport]]:
    """The module ready for export, with every known block replaced by its family's own, proven at all ``shapes``."""
    if isinstance(model.module, ExportedProgram):
        return model.module, []
    module, blocks = families.canonicalise(model.module)
    module, blocks = keep_proven(
        reference.model,
        module,
        blocks,
        run=lambda: [run(reference, shape) for shape in shapes],
        any_size=not {"height", "width"}.isdisjoint(dynamic),
    )
    return yolo.prepare_for_export(module), blocks


def _verify(
    reference: Reference,
    module: nn.Module | ExportedProgram,
    candidates: Sequence[Candidate],
    feeds: Sequence[dict[str, Images]],
    scenes: Scenes | None,
    metadata: ModelMetadata,
) -> Verification:
    """Every file against the model as it was loaded; ``module`` tells what half precision costs in PyTorch."""
    eager = {}
    if any(candidate.precision == "float16" for candidate in candidates):
        half = copy.deepcopy(module.module() if isinstance(module, ExportedProgram) else module).half()
        eager["float16"] = TorchRunner(half, "torch float16")
    runner = TorchRunner(reference, str(reference.report))
    return verify(runner, candidates, feeds, metadata=metadata, scenes=scenes, eager=eager)


def _candidate(name: str, model: Path | onnx.ModelProto) -> Candidate:
    if isinstance(model, onnx.ModelProto):
        return Candidate(onnx_runner(model, name), precision_of(model), model)
    opened = open_model(model, name)
    return Candidate(opened.runner, opened.precision, model if model.suffix == ".onnx" else None)


def _feeds(shapes: Sequence[tuple[int, ...]], scenes: Scenes | None) -> list[dict[str, Images]]:
    """Inputs of every shape: those of ``scenes``, else random ones."""
    if scenes:
        return [{INPUT: batch.images} for batch in scenes.batches]
    return [{INPUT: random_images(shape, seed)} for seed, shape in enumerate(shapes)]


def _scenes(photos: Path, shapes: Sequence[tuple[int, ...]], metadata: ModelMetadata) -> Scenes:
    """Photographs at every shape that the export was checked at, to compare detections in."""
    batches = placed_batches(find(photos, _PHOTOS).paths, shapes, metadata.letterbox)
    return Scenes(INPUT, [*batches], metadata.names)


@contextmanager
def _stage(name: str, seconds: dict[str, float], progress: Progress, message: str) -> Iterator[None]:
    """Tell that a stage begins and keep how long it took."""
    progress(message)
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)
