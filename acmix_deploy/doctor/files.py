"""Look into a file for the known faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from acmix_deploy.artifacts import sha256, sidecar
from acmix_deploy.detection.heads import unlike_told
from acmix_deploy.doctor.diagnosis import Examination, Finding
from acmix_deploy.errors import AcmixDeployError, MissingComponent
from acmix_deploy.files import expect
from acmix_deploy.manifest import HeaderManifest, check, read_any_manifest, this_machine
from acmix_deploy.plugin.library import check as check_plugin
from acmix_deploy.runtime.tensorrt import outputs_of

Progress = Callable[[str], None]


def examine(
    path: Path,
    *,
    trust: bool = False,
    code: Path | None = None,
    plugin: Path | None = None,
    progress: Progress = lambda step: None,
) -> Examination:
    """What is in a checkpoint, an ONNX file, an engine or a plugin, and which known faults it has.

    Args:
        path: the file. Its kind follows from its content.
        trust: let a checkpoint run code.
        code: with ``trust``, folder of the code that the checkpoint needs.
        plugin: the library that an engine would be run with.
        progress: told what is being done.

    Returns:
        What the file holds, and its faults.

    Raises:
        UserError: it cannot be read, or is none of these.
        MissingComponent: PyTorch, for a checkpoint, is not installed.
        CheckFailed: a plugin crashes.
    """
    kind = expect(path, "checkpoint", "program", "onnx", "engine", "plugin")
    progress(f"looking into {path}")
    if kind == "plugin":
        return _plugin(path)
    if kind == "engine":
        return _engine(path, plugin)
    if kind != "onnx":
        from acmix_deploy.doctor.checkpoints import examine_checkpoint

        return examine_checkpoint(path, trust, code, progress)
    from acmix_deploy.doctor.graphs import examine_onnx

    return examine_onnx(path, progress)


def _plugin(path: Path) -> Examination:
    library = check_plugin(path)
    contents = {
        "version": library.version,
        "TensorRT": library.tensorrt,
        "CUDA": library.cuda,
        "architectures": library.architectures,
        "operators": ", ".join(f"{creator.name} by {creator.interface}" for creator in library.creators),
    }
    return Examination(path=path, kind="plugin", contents=contents, findings=())


def _engine(path: Path, plugin: Path | None) -> Examination:
    """An engine by its manifest; it is not loaded."""
    if not sidecar(path).is_file():
        note = (
            "it has no manifest, so it cannot be told what it was built for: on the machine that it fits, acmix-deploy "
            f"adopt {path} writes one"
        )
        return Examination(path=path, kind="engine", contents={}, findings=(), notes=(note,))
    manifest = read_any_manifest(path)
    if isinstance(manifest, HeaderManifest):
        note = (
            f"it was {manifest.how}, so whether it fits this machine cannot be told: on the machine that "
            f"it fits, acmix-deploy adopt {path}"
        )
        contents = {"built with": manifest.tensorrt, "for": "unknown"}
        return Examination(path=path, kind="engine", contents=contents, findings=(), notes=(note,))
    machine = manifest.machine
    contents = {
        f"{manifest.origin} with": machine.tensorrt,
        "for": ", ".join(f"sm_{sm}" for sm in manifest.compute_capabilities) or machine.device,
        "precision": manifest.precision or "unknown",
        "plugin": str(manifest.plugin.path) if manifest.plugin else "none",
    }
    findings, notes = [], []
    shapes = {node.name: node.dims for node in outputs_of(manifest)}
    if manifest.metadata.detects and (unlike := unlike_told(manifest.metadata, shapes)):
        findings.append(Finding.of("other-outputs", f"it {unlike}"))
    try:
        library = plugin or (manifest.plugin.path if manifest.plugin else None)
        check(manifest, this_machine(machine.backend), sha256(library) if library and library.is_file() else None)
    except MissingComponent as error:
        notes.append(f"whether it fits this machine cannot be told: {error.message}")
    except AcmixDeployError as error:
        findings.append(Finding.of("other-machine", error.message, remedy=error.hint))
    return Examination(path=path, kind="engine", contents=contents, findings=tuple(findings), notes=tuple(notes))
