"""Write a manifest for an engine that something else built: by asking the engine, or else by what its file says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from acmix_deploy import onnx_file
from acmix_deploy.artifacts import Artifact, StageResult, sha256, sidecar, write_artifact
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.engine.process import ask, find_backend
from acmix_deploy.engine_file import EngineFile, read_engine_file
from acmix_deploy.errors import CheckFailed, MissingComponent, UserError
from acmix_deploy.files import expect
from acmix_deploy.graph import read
from acmix_deploy.manifest import (
    KIND,
    TITLES,
    AnyManifest,
    HeaderManifest,
    Machine,
    Manifest,
    Plugin,
    manifest_of,
    this_machine,
)
from acmix_deploy.runtime.reason import out_of_memory

_AMPERE = (80,)  # and later: what HardwareCompatibilityLevel.AMPERE_PLUS stands for
_OF_ANOTHER = re.compile(r"incompatible device|[Vv]ersion tag|serialization version|compute capability", re.IGNORECASE)
_NO_CREATOR = re.compile(r"plugin.{0,40}creator|creator.{0,40}not found|creator failed", re.IGNORECASE)
_SHOWN = 3  # errors named in a message


class AdoptReport(BaseModel):
    """An engine that was adopted."""

    model_config = ConfigDict(frozen=True)

    manifest: AnyManifest = Field(description="what is known of the engine")
    layers: int | None = Field(description="layers that the engine describes; None where it was not deserialised")
    plugin_layers: tuple[str, ...] = Field(description="those of them that it describes as computed by a plugin")
    notes: tuple[str, ...] = Field(description="what is not known, and why")


def adopt(
    engine: Path,
    *,
    metadata: Path | None = None,
    plugin: Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> StageResult[AdoptReport]:
    """Write a manifest beside an engine of trtexec, polygraphy or Ultralytics. The engine stays as it is.

    TensorRT deserialises it in a process of its own, and it is asked for its inputs, outputs and profiles. Where there
    is no GPU, or the engine is for another TensorRT or device, the manifest holds what the file's beginning says alone.

    Args:
        engine: the file.
        metadata: ONNX file that it was built from, for its metadata; by default those that Ultralytics wrote before the
            engine, else none.
        plugin: library with its custom layers. It is loaded, and recorded, where the engine cannot do without.
        progress: called with what is being done.

    Returns:
        The engine with its sidecar, and what is known of it.

    Raises:
        UserError: it is no engine, has a manifest that another build or file left, needs a plugin, takes or gives what
            is not run here, or is not of the file that ``metadata`` names.
        CheckFailed: TensorRT does not take it, for another reason than that it is for something else.
        MissingComponent: there is nothing to ask it with, and its file says nothing.
    """
    expect(engine, "engine")
    _check_sidecar(engine)
    found = read_engine_file(engine)
    if found.offset == engine.stat().st_size:
        raise UserError(f"{engine} ends behind what Ultralytics wrote before the engine", "Copy or export it again.")
    model = read(metadata, weights=False) if metadata and expect(metadata, "onnx") else None
    told = ModelMetadata.of(model) if model else ModelMetadata.of_header(found.header or {})
    machine, why_not = _machine(found)
    answer: Mapping[str, Any] = {}
    if machine:
        answer, why_not = _asked(engine, found, machine, plugin, progress)
    notes = []
    if not told.entries:
        notes.append(
            "nothing tells its class names, stride and task: name the ONNX file that it is of, --metadata FILE"
        )
    manifest: AnyManifest
    if machine and answer:
        if model and metadata:
            _check_same(engine, answer, model, metadata)
        notes += _notes(engine, answer, plugin)
        manifest = _manifest(answer, machine, plugin, told, found)
    else:
        if not found.version and not found.header:
            raise MissingComponent(
                f"{engine} cannot be asked, and its beginning tells nothing: {why_not}",
                f"On the machine that it fits: acmix-deploy adopt {engine}",
            )
        notes.append(
            f"{why_not}; so the manifest holds what the file's beginning tells, and neither what the engine takes nor "
            f"where it runs is known. On the machine that it fits: acmix-deploy adopt {engine}"
        )
        manifest = HeaderManifest(backend=found.backend, version=found.version, metadata=told)
    report = AdoptReport(
        manifest=manifest,
        layers=answer["layers"] if answer else None,
        plugin_layers=tuple(answer["plugin_layers"]) if answer else (),
        notes=tuple(notes),
    )
    return StageResult(write_artifact(engine, KIND, settings=manifest.model_dump(mode="json")), report)


def _check_sidecar(engine: Path) -> None:
    """Raises UserError where there is one that is not of an earlier adoption of this very file."""
    path = sidecar(engine)
    if not path.exists():
        return
    remove = f"If it is of no use any more: rm {path}"
    try:
        artifact = Artifact.model_validate_json(path.read_bytes())
        manifest = manifest_of(artifact.settings) if artifact.kind == KIND else None
    except (ValidationError, OSError) as error:
        raise UserError(f"{path} is there already, and is no manifest that can be read", remove) from error
    if manifest is None:
        raise UserError(f"{path} is there already, and describes a file of the kind {artifact.kind}", remove)
    if (digest := sha256(engine)) != artifact.sha256:
        raise UserError(
            f"{path} is the manifest of another engine: it was {_how(manifest)} with the SHA-256 "
            f"{artifact.sha256[:12]}..., and {engine.name} has {digest[:12]}...",
            remove,
        )
    if manifest.origin == "built":
        raise UserError(
            f"{engine} has its manifest: acmix-deploy built it with {manifest.machine.tensorrt}, and it is unchanged",
            f"It is ready to use. To ask the engine all the same, move {path} elsewhere first.",
        )


def _how(manifest: AnyManifest) -> str:
    return "built by acmix-deploy" if manifest.origin == "built" else "adopted"


def _machine(found: EngineFile) -> tuple[Machine | None, str]:
    """What there is here to ask an engine with; or None, and what is missing."""
    try:
        machine = this_machine(find_backend(found.backend))
    except MissingComponent as error:
        return None, error.message
    return (machine, "") if machine.gpu else (None, f"there is no GPU here for {machine.tensorrt}")


def _asked(
    engine: Path, found: EngineFile, machine: Machine, plugin: Path | None, progress: Callable[[str], None]
) -> tuple[Mapping[str, Any], str]:
    """What the engine says of itself; or nothing, and in what it is another machine's."""
    request = {
        "module": machine.backend,
        "engine": str(engine),
        "offset": found.offset,
        "plugin": str(plugin.resolve()) if plugin else None,
    }
    answer, said = ask(request, progress)
    if "failure" not in answer:
        _check_tensors(engine, answer)
        return answer, ""
    text = "; ".join(dict.fromkeys(error.strip() for error in answer["errors"][:_SHOWN])) or "it gives no reason"
    if answer["failure"] == "plugin":
        raise UserError(f"the plugin cannot be loaded: {text}", "Build it here: acmix-deploy plugin build")
    if out_of_memory(text):
        raise MissingComponent(
            f"too little memory on {machine.device} for {machine.tensorrt} to deserialise {engine}: {text}",
            "End other programs on the device.",
        )
    if _NO_CREATOR.search(text):
        raise UserError(
            f"{engine} has layers of a plugin {'that the library has not' if plugin else 'that is not loaded'}: {text}"
            f"{': ' + said if said else ''}",
            "Name the library that it was built with: --plugin FILE",
        )
    written_by = f"{TITLES[found.backend]} {found.version}" if found.backend and found.version else ""
    if found.version and found.version.split(".")[:3] != machine.version.split(".")[:3]:
        return {}, f"it was written by {written_by}, and {machine.tensorrt} here does not take it: {text}"
    if _OF_ANOTHER.search(text):
        return {}, f"{machine.tensorrt} on {machine.device} does not take it: {text}"
    raise CheckFailed(f"{machine.tensorrt} does not take {engine}: {text}", "Copy or build it again.")


def _check_tensors(engine: Path, answer: Mapping[str, Any]) -> None:
    """Refuse what the runner would give or read wrongly."""
    for tensor in (*answer["inputs"], *answer["outputs"]):
        if tensor["format"] != "LINEAR":
            raise UserError(
                f"{tensor['name']} of {engine} has its values in the format {tensor['format']}, and engines are run "
                "here with linear ones",
                "Build it without --inputIOFormats and --outputIOFormats, or with :chw.",
            )
        if tensor["location"] != "DEVICE":
            raise UserError(
                f"{tensor['name']} of {engine} is a shape that TensorRT reads on the host; engines are run here with "
                "tensors alone",
                "Build it from a file whose sizes are no inputs.",
            )


def _check_same(engine: Path, answer: Mapping[str, Any], model: onnx.ModelProto, path: Path) -> None:
    """Refuse metadata of a file that takes or gives something else than the engine."""
    declared = {value.name: onnx_file.shape(value) for value in (*onnx_file.inputs(model), *model.graph.output)}
    found = {tensor["name"]: tuple(tensor["shape"]) for tensor in (*answer["inputs"], *answer["outputs"])}
    if declared.keys() != found.keys():
        raise UserError(
            f"{engine} has the tensors {', '.join(sorted(found))}, and {path} {', '.join(sorted(declared))}",
            "Name the file that the engine was built from.",
        )
    for name, shape in found.items():
        sizes = declared[name]
        fits = len(shape) == len(sizes) and all(
            not isinstance(size, int) or size == own for size, own in zip(sizes, shape, strict=True)
        )
        if sizes and not fits:
            raise UserError(
                f"{name} of {engine} is {list(shape)}, and {list(sizes)} in {path}",
                "Name the file that the engine was built from.",
            )


def _notes(engine: Path, answer: Mapping[str, Any], plugin: Path | None) -> list[str]:
    notes = []
    if plugin and not answer["needs_plugin"]:
        notes.append(f"TensorRT takes {engine.name} without {plugin.name}, so the manifest names no plugin")
    if answer["profile_count"] > 1 and answer["profiles"]:
        notes.append(f"of its {answer['profile_count']} optimization profiles the first is used")
    return notes


def _manifest(
    answer: Mapping[str, Any], machine: Machine, plugin: Path | None, metadata: ModelMetadata, found: EngineFile
) -> Manifest:
    return Manifest(
        origin="adopted",
        machine=machine,
        compute_capabilities=_AMPERE if answer["hardware"] == "AMPERE_PLUS" else (),
        plugin=Plugin(path=plugin.resolve(), sha256=sha256(plugin)) if plugin and answer["needs_plugin"] else None,
        form=None,
        precision=ModelMetadata.of_header(found.header or {}).lowered,
        strongly_typed=None,
        flags=None,
        level=None,
        profiles=answer["profiles"],
        inputs=tuple(answer["inputs"]),
        outputs=tuple(answer["outputs"]),
        metadata=metadata,
    )
