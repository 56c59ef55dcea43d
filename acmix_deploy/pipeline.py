"""The whole way, top to bottom: model.pt -> module -> plain ONNX -> fused -> typed -> engine -> verify -> profile.

A stage reads a file, writes a file with a sidecar that says where it came from, and returns what it found together with
that artifact: :class:`acmix_deploy.artifacts.StageResult`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import onnx
from torch.export import ExportedProgram

from acmix_deploy.artifacts import Artifact, StageResult, mark_exported, outdated, remove_exported
from acmix_deploy.checkpoint.source import Source, load_source
from acmix_deploy.detection.boxes import no_detector
from acmix_deploy.detection.heads import unlike_told
from acmix_deploy.device.link import Unavailable
from acmix_deploy.device.stages import RemoteStages
from acmix_deploy.document import write_document
from acmix_deploy.engine.build import BuildReport, build
from acmix_deploy.errors import AcmixDeployError, CheckFailed, UserError
from acmix_deploy.export import INPUT, export
from acmix_deploy.exported import ExportResult
from acmix_deploy.forms import TargetReport, takes_plugin, to_form, write_for
from acmix_deploy.fusion import FusionReport, fuse
from acmix_deploy.graph import Feeds
from acmix_deploy.manifest import KIND as ENGINE
from acmix_deploy.plan import Plan
from acmix_deploy.plugin.build import library_in
from acmix_deploy.precision import Fp16Report, Int8Report, quantize, to_fp16
from acmix_deploy.processing import Processing
from acmix_deploy.profile import Profile, profile
from acmix_deploy.report.model import ExportReport, describe_file, next_steps
from acmix_deploy.runtime.inputs import noise
from acmix_deploy.runtime.torch import TorchRunner
from acmix_deploy.targets import INT8_OPSET
from acmix_deploy.verify import (
    Candidate,
    LayerErrors,
    Scenes,
    Verification,
    compare_layers,
    failing_first,
    verify,
)
from acmix_deploy.verify.limits import FILE_TOLERANCES

Progress = Callable[[str], None]
Result = TypeVar("Result")

_PHOTOS = 16  # that files are verified on


def deploy(plan: Plan, progress: Progress = lambda step: None, there: RemoteStages | None = None) -> ExportReport:
    """Take a checkpoint to verified ONNX files and, on a machine with TensorRT and a GPU, to verified engines.

    The report is also in ``report.json``; whether the files are exact enough is in its ``passed``.

    Args:
        plan: what is made; with a device ``plan.engine_target`` is ``there.target``.
        progress: told what is being done.
        there: the device on which engines are built and files timed; this machine by default.

    Returns:
        What every stage found.

    Raises:
        UserError: the checkpoint or the plan cannot be used, or the detections of a detector cannot be decoded.
        CheckFailed: a file that computes something else, or another number of blocks than ``plan.expect``.
        MissingComponent: a package that the checkpoint needs is not installed.
    """
    if there and plan.engine_target != (None if plan.no_engine else there.target):
        raise UserError("the plan is for another device", "Give it engine_target=there.target.")
    work = _Work(plan, progress, there)
    sizes = there.sizes if there else {}
    source = work.stage("load", f"loading {plan.checkpoint}", lambda: _load(plan))
    exported = work.file("export", "exporting", lambda: _export(work, source))
    fusion = work.file("fuse", "fusing", lambda: _fuse(work))
    inputs = _inputs(plan, source, exported)
    half = work.file("fp16", "converting to FP16", lambda: _to_fp16(work, inputs)) if plan.half else None
    int8 = work.file("int8", "converting to INT8", lambda: _quantize(work, source)) if plan.int8 else None
    target = None
    if plan.made_for:
        target = work.file("target", f"writing for {plan.made_for.name}", lambda: _write_for(plan))
    engines = work.stage("engine", "building engines", lambda: _build(work, exported)) if plan.device else {}
    verification = work.stage("verify", "comparing every file with the model", lambda: _verify(work, source, inputs))
    latency = {} if plan.no_profile else work.stage("profile", "timing every file", lambda: _profile(work, source))
    artifacts = work.marked()
    device = there.report() if there else None
    detector = source.metadata.detects and not work.unlike
    report = ExportReport(
        model=str(plan.checkpoint),
        notes=(*source.notes, *plan.notes, *work.notes, *outdated(plan.out, work.removed, artifacts.values())),
        blocks=source.blocks,
        reference=source.reference.report,
        export=exported,
        fusion=fusion,
        files={
            role: describe_file(artifact, latency.get(role), sizes.get(artifact.path.name))
            for role, artifact in artifacts.items()
        },
        target=target,
        fp16=half,
        int8=int8,
        engines=engines,
        device=device,
        verification=verification,
        seconds=work.seconds,
        next_steps=next_steps(artifacts, exported, target, device, detector=detector),
    )
    write_document(report, plan.report)
    return report


@dataclass
class _Work:
    """What the stages of one run wrote and found on the way."""

    plan: Plan
    progress: Progress
    there: RemoteStages | None
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """By role: the kind of a file; of an engine with the role of the file that it was built from."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By stage."""
    notes: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    """Names of files of the run before."""
    unlike: str = ""
    """What keeps the outputs of a detector from being decoded."""

    def stage(self, name: str, message: str, run: Callable[[], Result]) -> Result:
        """Tell that a stage begins, and keep how long it took."""
        self.progress(message)
        start = time.perf_counter()
        result = run()
        self.seconds[name] = round(time.perf_counter() - start, 2)
        return result

    def file(self, name: str, message: str, run: Callable[[], StageResult[Result]]) -> Result:
        """A stage that writes a file: keep that, and return what was found."""
        made = self.stage(name, message, run)
        self.artifacts[made.artifact.kind] = made.artifact
        return made.found

    def marked(self) -> dict[str, Artifact]:
        """The files, their sidecars now saying that the next run from this checkpoint may delete them."""
        (checkpoint,) = self.artifacts["plain"].parents
        return {role: mark_exported(artifact, checkpoint) for role, artifact in self.artifacts.items()}


def _load(plan: Plan) -> Source:
    return load_source(
        plan.checkpoint,
        image_size=plan.image_size,
        batch=plan.batch,
        input_shape=plan.input_shape,
        dynamic=plan.dynamic,
        arch=plan.arch,
        head=plan.head,
        trust=plan.trust,
        code=plan.code,
        python=plan.python,
    )


def _export(work: _Work, source: Source) -> StageResult[ExportResult]:
    """Files of a former run are deleted only once there is one to take their place."""
    plan = work.plan
    made = export(
        source.module,
        plan.path("plain"),
        checkpoint=plan.checkpoint,
        input_shape=source.shape,
        opset=plan.chosen_opset,
        dynamic=plan.dynamic,
        divisor=source.metadata.stride,
        metadata=source.metadata,
        reference=source.reference,
        processing=Processing(plan.pixels, plan.nms),
        progress=work.progress,
    )
    if source.metadata.detects:
        told = source.metadata.with_suppression(plan.nms)
        work.unlike = unlike_told(told, {output.name: output.shape for output in made.found.outputs})
    if plan.int8 and work.unlike:
        raise no_detector(made.artifact.path.name, work.unlike)
    work.removed = remove_exported(plan.out, plan.checkpoint.stem)
    plan.report.unlink(missing_ok=True)
    return made


def _fuse(work: _Work) -> StageResult[FusionReport]:
    plan, files = work.plan, (work.plan.path("plain"), work.plan.path("fused"))
    return fuse(*files, conv_branch=plan.chosen_branch, expect=plan.expect, progress=work.progress)


def _inputs(plan: Plan, source: Source, exported: ExportResult) -> Scenes | list[Feeds]:
    """At every shape that the export was checked at: photographs, or random images where there are none."""
    if not plan.calibration:
        return noise(INPUT, exported.checked_shapes)
    return Scenes.read(INPUT, plan.calibration, exported.checked_shapes, source.metadata, limit=_PHOTOS)


def _feeds(inputs: Scenes | list[Feeds]) -> Sequence[Feeds]:
    return inputs.feeds if isinstance(inputs, Scenes) else inputs


def _to_fp16(work: _Work, inputs: Scenes | list[Feeds]) -> StageResult[Fp16Report]:
    plan, files = work.plan, (work.plan.path("fused"), work.plan.path("fp16"))
    return to_fp16(*files, fp16_io=plan.fp16_io, float32=plan.float32, samples=_feeds(inputs))


def _quantize(work: _Work, source: Source) -> StageResult[Int8Report]:
    plan = work.plan
    assert plan.calibration
    scheme = plan.target.int8 if plan.target else "symmetric"
    return quantize(
        plan.path("fused"),
        plan.path("int8"),
        plan.calibration,
        scheme=scheme,
        fp16=plan.chosen_opset >= INT8_OPSET and scheme == "symmetric",
        float32=plan.float32,
        image_size=(source.shape[2], source.shape[3]),
        progress=work.progress,
    )


def _write_for(plan: Plan) -> StageResult[TargetReport]:
    assert plan.made_for
    return write_for(plan.made_for, plan.path(plan.role_for(plan.made_for)), plan.form)


def _build(work: _Work, exported: ExportResult) -> dict[str, BuildReport]:
    plan, device, there = work.plan, work.plan.device, work.there
    assert device
    plugin = plan.plugin
    if not plugin and takes_plugin(onnx.load(plan.path("fused"))):
        try:
            plugin = there.library() if there else library_in(plan.out, work.progress)
        except Unavailable:
            raise
        except AcmixDeployError as error:
            work.notes.append(f"the engine does without the plugin, so the attention is slower: {error.message}")
    found = {}
    for role in [role for role in work.artifacts if role in ("fp16", "int8")] or ["fused"]:
        make = there.build if there else partial(build, timing_cache=plan.out / "timing.cache", progress=work.progress)
        made = make(
            plan.path(plan.role_for(device, role)),
            plan.path(f"{role} engine"),
            plugin=plugin,
            fp16=role != "fused" and not device.strongly_typed,
            shapes=exported.shapes_to_build,
        )
        work.artifacts[f"{role} engine"] = made.artifact
        if made.found:
            found[f"{role} engine"] = made.found
    return found


def _verify(work: _Work, source: Source, inputs: Scenes | list[Feeds]) -> Verification:
    """Every file against the model as it was loaded; the one for a target by its twin that ONNX Runtime takes."""
    plan = work.plan
    candidates = []
    feeds = _feeds(inputs)
    for artifact in work.artifacts.values():
        model: Path | onnx.ModelProto = artifact.path
        if work.there and artifact.kind == ENGINE:
            if work.there.uncompared:
                work.notes.append(f"{artifact.path.name} was not compared: {work.there.uncompared}")
            else:
                candidates.append(work.there.candidate(artifact, feeds))
            continue
        if _needs_plugin(artifact):
            assert plan.target
            model = to_form(onnx.load(plan.path(plan.role_for(plan.target))), "any")
        candidates.append(Candidate.of(model, artifact.path.name))
    eager = {"float32": lambda: TorchRunner(copy.deepcopy(source.reference).double(), "torch float64")}
    if not plan.python and any(candidate.precision == "float16" for candidate in candidates):
        module = source.module.module() if isinstance(source.module, ExportedProgram) else source.module
        eager["float16"] = lambda: TorchRunner(copy.deepcopy(module).half(), "torch float16")
    runner = TorchRunner(source.reference, str(source.reference.report))
    found = verify(runner, candidates, inputs, metadata=source.metadata, eager=eager)
    return found.model_copy(update={"layers": tuple(_along(work, found, inputs))})


def _along(work: _Work, found: Verification, inputs: Scenes | list[Feeds]) -> Iterator[LayerErrors]:
    """Where the error begins in the typed files of which something is beyond a limit."""
    plan = work.plan
    feeds = failing_first(found, _feeds(inputs))
    for artifact in (artifact for role, artifact in work.artifacts.items() if role in ("fp16", "int8")):
        name = artifact.path.name
        if name in found.beyond:
            work.progress(f"looking where the error of {name} begins")
            limits = {**FILE_TOLERANCES, **found.limits_of(name)}
            try:
                yield compare_layers(
                    name, plan.path("fused"), artifact.path, feeds, tolerances=limits, float32=plan.float32
                )
            except (CheckFailed, UserError) as error:
                work.notes.append(f"where the error of {name} begins cannot be told: {error.message}")


def _profile(work: _Work, source: Source) -> dict[str, Profile]:
    """Latency by role, of the files that run here or, where a device is named, of what is made to run there."""
    there = work.there
    timed = {role: artifact.path for role, artifact in work.artifacts.items() if not _needs_plugin(artifact)}
    if there:
        on_gpu = there.runs_engines and any(role.endswith(ENGINE) for role in timed)
        timed = {role: path for role, path in timed.items() if role.endswith(ENGINE) == on_gpu}
    found = (there.profile if there else profile)(
        [*timed.values()], input_shape=source.shape, seconds=work.plan.seconds
    )
    return dict(zip(timed, found, strict=True))


def _needs_plugin(artifact: Artifact) -> bool:
    """Whether it is a file for TensorRT's plugin alone, which ONNX Runtime does not take."""
    return artifact.kind == "target" and artifact.settings["form"] == "plugin"
