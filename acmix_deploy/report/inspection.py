"""What a file is, from what it came, and with which versions: for every file that a stage reads or writes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from acmix_deploy import onnx_file
from acmix_deploy.artifacts import Artifact, Parent, is_sidecar, sha256, sidecar
from acmix_deploy.document import document_of, read_json
from acmix_deploy.engine_file import read_engine_file
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.files import expect, kind_of
from acmix_deploy.graph import read
from acmix_deploy.manifest import TITLES, AnyManifest, manifest_of
from acmix_deploy.plugin.library import PluginLibrary, describe
from acmix_deploy.verify import read_verification

State = Literal["unchanged", "changed", "not here"]


class Ancestor(BaseModel):
    """A file that the one looked at was made from, itself or by way of another."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="name of the file, without its folder")
    kind: str = Field(description="what its own sidecar calls it; empty where it has none here")
    made: str = Field(description="the file that was made from it")
    state: State = Field(description="whether the file of that name in the same folder is still the one it was")


class Inspection(BaseModel):
    """A file, and what could be told about it without running it."""

    model_config = ConfigDict(frozen=True)

    path: Path = Field(description="the file")
    kind: str = Field(description="onnx, engine, plugin, checkpoint, document, or what its sidecar calls it")
    size_bytes: int = Field(description="size of the file")
    sha256: str = Field(description="SHA-256 of the file's bytes, hexadecimal")
    artifact: Artifact | None = Field(default=None, description="its sidecar, where there is one")
    unchanged: bool | None = Field(default=None, description="whether the bytes are those that the sidecar describes")
    ancestors: tuple[Ancestor, ...] = Field(default=(), description="nearest first")
    onnx: onnx_file.OnnxFile | None = Field(default=None, description="of an ONNX file")
    manifest: AnyManifest | None = Field(default=None, description="of an engine")
    plugin: PluginLibrary | None = Field(default=None, description="of a plugin library")
    told: dict[str, str] | None = Field(default=None, description="of a document: which one, and what it is about")
    notes: tuple[str, ...] = Field(default=(), description="what could not be told, and why")

    def check(self) -> None:
        """Raises CheckFailed when the file is not the one that its sidecar describes."""
        if self.artifact and not self.unchanged:
            raise CheckFailed(
                f"{self.path} has changed since its sidecar was written: its SHA-256 is {self.sha256[:12]}..., the "
                f"sidecar has {self.artifact.sha256[:12]}...",
                "Run the stage that made it again.",
            )


def inspect(path: Path) -> Inspection:
    """Look into a file without running it; a plugin library is loaded to be asked.

    Args:
        path: an ONNX file, an engine, a checkpoint, a plugin, a document, or a sidecar, which stands for its file.

    Returns:
        What could be told.

    Raises:
        UserError: it cannot be read, or is nothing that this package reads or writes.
        CheckFailed: a plugin library crashes.
    """
    if path.suffix == ".json" and is_sidecar(_documents(path)[0]):
        path = path.with_suffix("")
    artifact = _read_sidecar(path)
    kind, facts = _look(path, artifact)
    digest = sha256(path)
    return Inspection(
        path=path,
        kind=kind,
        size_bytes=path.stat().st_size,
        sha256=digest,
        artifact=artifact,
        unchanged=None if artifact is None else artifact.sha256 == digest,
        ancestors=tuple(_ancestors(path.parent, artifact)) if artifact else (),
        **facts,
    )


def _look(path: Path, artifact: Artifact | None) -> tuple[str, dict[str, Any]]:
    """Kind of a file, and those fields of :class:`Inspection` that belong to it."""
    if path.suffix == ".json":
        return "document", {"told": _told(path)}
    try:
        kind = expect(path, "onnx", "engine", "plugin", "checkpoint", "program", "torchscript")
        model = read(path, weights=False) if kind == "onnx" else None
    except UserError:
        if artifact and kind_of(path) in ("onnx", "engine", "unknown"):  # it is damaged, not another file
            return artifact.kind, {}
        raise
    if kind == "plugin":
        return kind, {"plugin": describe(path)}
    if kind == "engine":
        if artifact is None:
            return kind, {
                "notes": (f"it has no manifest, so it cannot be checked before it runs; {_told_by_engine(path)}",)
            }
        try:
            return kind, {"manifest": manifest_of(artifact.settings)}
        except ValidationError:
            return kind, {"notes": ("its manifest is of another form, so it cannot be checked before it runs",)}
    if model is None:
        return "checkpoint", {"notes": ("acmix-deploy doctor says what is in a checkpoint",)}
    return artifact.kind if artifact else "onnx", {"onnx": onnx_file.describe(model)}


def _told_by_engine(path: Path) -> str:
    """What an engine without a manifest says without TensorRT, and the way to one."""
    found = read_engine_file(path)
    version = f"{TITLES[found.backend]} {found.version} wrote it, " if found.backend and found.version else ""
    header = "Ultralytics' metadata stand before it, " if found.header else ""
    return f"{version}{header}acmix-deploy adopt makes one on the machine that it fits"


def _documents(path: Path) -> list[Any]:
    """The JSON in a file: one document, or one a line, as `detect` prints them."""
    try:
        return [read_json(path)]
    except UserError:
        with suppress(OSError, ValueError):
            if lines := path.read_bytes().splitlines():
                return [*map(from_json, lines)]
        raise


def _told(path: Path) -> dict[str, str]:
    """What a document tells in short."""
    first, *others = _documents(path)
    written = document_of(first)
    if written is None:
        raise UserError(f"{path} is neither the sidecar of a file nor what a verb writes")
    facts = {"document": str(written)}
    if written == "export":
        try:  # not as ExportReport, which needs PyTorch
            facts |= {role: str(file["artifact"]["path"]) for role, file in first["files"].items()}
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f"{path} does not name the files of an export") from error
    elif written == "verify":
        found = read_verification(path)
        candidates = {comparison.candidate for comparison in found.comparisons}
        verdict = {True: "passed", False: "failed", None: "not judged"}[found.passed]
        facts |= {"reference": found.reference, "compared with it": ", ".join(sorted(candidates)), "outcome": verdict}
    elif written == "detect":
        facts["images"] = str(1 + len(others))
    return facts


def _read_sidecar(path: Path) -> Artifact | None:
    """The sidecar of a file, whatever became of the file since."""
    try:
        return Artifact.model_validate_json(sidecar(path).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(
            f"{sidecar(path)} is no sidecar of this version, so {path.name} cannot be compared with it",
            "Make the file again, or remove the sidecar.",
        ) from error


def _ancestors(folder: Path, artifact: Artifact) -> list[Ancestor]:
    """The files of a folder that one in it was made from, as far as their sidecars tell."""
    found: dict[str, Ancestor] = {}
    queue = [(artifact.path.name, parent) for parent in artifact.parents]
    for made, parent in queue:
        if parent.sha256 in found:
            continue
        path = folder / parent.name
        origin = _read_sidecar(path)
        known = origin if origin and origin.sha256 == parent.sha256 else None
        found[parent.sha256] = Ancestor(
            name=parent.name, kind=known.kind if known else "", made=made, state=_state(path, parent)
        )
        if known:
            queue += [(parent.name, grandparent) for grandparent in known.parents]
    return list(found.values())


def _state(path: Path, parent: Parent) -> State:
    if not path.is_file():
        return "not here"
    return "unchanged" if sha256(path) == parent.sha256 else "changed"
