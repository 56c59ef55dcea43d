"""What one stage hands to the next: a file and, beside it, a JSON sidecar that says where the file came from."""

from __future__ import annotations

import errno
import hashlib
import platform
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from acmix_deploy import __version__
from acmix_deploy.errors import AcmixDeployError, UserError

# The packages whose version can change what a stage writes or measures.
DISTRIBUTIONS = (
    "acmix-deploy",
    "torch",
    "onnx",
    "onnxscript",
    "onnx-graphsurgeon",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
)


class Parent(BaseModel):
    """A file that another one was made from, known by its content wherever it lies."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="file name without folder")
    sha256: str = Field(description="SHA-256 of the file's bytes, hexadecimal")


class Artifact(BaseModel):
    """A file made by a stage, with its origin. The sidecar of ``model.onnx`` is ``model.onnx.json``."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema", description="version of this JSON form")
    path: Path = Field(description="the file; in the sidecar its name alone, so that a folder can be moved")
    kind: str = Field(description="what the stage made, such as 'plain', 'fused' or 'fp16'")
    sha256: str = Field(description="SHA-256 of the file's bytes, hexadecimal")
    parents: tuple[Parent, ...] = Field(default=(), description="the files that it was made from")
    versions: dict[str, str] = Field(description="versions of Python and of the packages that took part")
    settings: dict[str, Any] = Field(default_factory=dict, description="the options that the stage ran with")
    checkpoint: Parent | None = Field(
        default=None, description="what `export` made it from, in however many stages; null where another verb made it"
    )


Found = TypeVar("Found")


@dataclass(frozen=True)
class StageResult(Generic[Found]):
    """What every stage returns: the file that it wrote, with its sidecar, and what it found on the way."""

    artifact: Artifact
    """The file, as its sidecar describes it."""
    found: Found
    """What the stage found, such as the error of each block."""


def check_output(target: Path, *sources: Path) -> None:
    """To be called before long work: raises UserError where ``target`` is a folder or one of the files to be read."""
    if target.is_dir():
        raise UserError(f"cannot write {target}: it is a folder", "Give the name of a file.")
    if any(source.resolve() == target.resolve() for source in sources):
        raise UserError(f"{target} is to be read, and would be overwritten", "Give the output another name.")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file so that its final name never holds half of it.

    Yields a path in the same folder (made where it is missing) for the caller to write to. It takes the place of
    ``path`` when the block ends and is removed when the block raises anything, KeyboardInterrupt included; what a user
    is told names ``path`` then.

    Raises:
        UserError: the folder cannot be made or written to, ``path`` is a folder, or the disk is full.
    """
    path = Path(path)
    check_output(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror} ({error.filename})", "Choose a folder that you may write to."
        ) from error
    try:
        with writing(path):
            yield temporary
            temporary.replace(path)
    except AcmixDeployError as error:
        error.message = error.message.replace(temporary.name, path.name)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(target: object) -> Iterator[None]:
    """Raise UserError, naming the ``target``, where what is done within ends with a full disk."""
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise no_space(target, str(error.strerror)) from error
        raise


def is_full(error: Exception) -> bool:
    """Whether a disk or a quota is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_space(target: object, found: str) -> UserError:
    """A full disk as an error."""
    return UserError(f"cannot write {target}: {found}", "Free some space or choose another disk.")


def sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, hexadecimal. Raises UserError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of those :data:`DISTRIBUTIONS` that are installed; imports none of them."""
    found = {name: _version(name) for name in DISTRIBUTIONS} | {"acmix-deploy": __version__}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


@cache
def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def sidecar(path: Path) -> Path:
    """Where the origin of ``path`` is kept."""
    return path.with_name(path.name + ".json")


def write_artifact(
    path: Path,
    kind: str,
    *,
    parents: Iterable[Path] = (),
    settings: Mapping[str, Any] | None = None,
    digest: str | None = None,
) -> Artifact:
    """Describe a finished file and write its sidecar.

    Args:
        path: the file, complete and under its final name.
        kind: see :class:`Artifact`.
        parents: the files that it was made from.
        settings: the options that the stage ran with; JSON values.
        digest: SHA-256 of a file that is elsewhere.

    Raises:
        UserError: a file cannot be read or the sidecar cannot be written.
    """
    path = Path(path)
    artifact = Artifact(
        path=path,
        kind=kind,
        sha256=digest or sha256(path),
        parents=tuple(Parent(name=Path(parent).name, sha256=sha256(parent)) for parent in parents),
        versions=versions(),
        settings=dict(settings or {}),
    )
    _write_sidecar(artifact)
    return artifact


def _write_sidecar(artifact: Artifact) -> None:
    with replacing(sidecar(artifact.path)) as temporary:
        in_folder = artifact.model_copy(update={"path": Path(artifact.path.name)})
        temporary.write_text(in_folder.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")


def read_artifact(path: Path) -> Artifact:
    """What the sidecar of a file says, checked against the file as it is now.

    Args:
        path: the file, not the sidecar.

    Returns:
        The file, what made it, and what from.

    Raises:
        UserError: there is no sidecar, it is of another form, or the file has changed since.
    """
    path = Path(path)
    artifact = _read_sidecar(path)
    if (found := sha256(path)) != artifact.sha256:
        raise UserError(
            f"{path} has changed since {sidecar(path).name} was written: its SHA-256 is {found[:12]}..., "
            f"the sidecar has {artifact.sha256[:12]}...",
            "Run the stage that made it again.",
        )
    return artifact.model_copy(update={"path": path})


def _read_sidecar(path: Path) -> Artifact:
    try:
        return Artifact.model_validate_json(sidecar(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} has no sidecar {sidecar(path).name}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise UserError(f"{sidecar(path)} is not the sidecar of an artifact: {place}: {first['msg']}") from error


def is_sidecar(content: Any) -> bool:
    """Whether JSON is a sidecar. It says of which kind its file is, as a document says which ``document`` it is."""
    return isinstance(content, dict) and {"kind", "sha256"} <= content.keys() and "document" not in content


def mark_exported(artifact: Artifact, checkpoint: Parent) -> Artifact:
    """Say in the sidecar that ``export`` made the file from ``checkpoint``, so that its next run may delete it."""
    artifact = artifact.model_copy(update={"checkpoint": checkpoint})
    _write_sidecar(artifact)
    return artifact


def remove_exported(folder: Path, stem: str) -> list[str]:
    """Delete what ``export`` made from a checkpoint called ``stem``, with the sidecars that say so.

    A file that has changed since or has another name stays, and so does one that another verb made.

    Returns:
        The names of the files that were deleted.
    """
    found = [
        artifact.path
        for artifact in _artifacts(folder)
        if artifact.checkpoint
        and Path(artifact.checkpoint.name).stem == stem
        and _read_sidecar(artifact.path).path.name == artifact.path.name
    ]
    for path in found:
        path.unlink()
        sidecar(path).unlink()
    return [path.name for path in found]


def outdated(folder: Path, removed: Iterable[str], made: Iterable[Artifact]) -> list[str]:
    """A sentence for each file in ``folder`` that was made from one that is not there any more as it was.

    Args:
        folder: where to look.
        removed: names of the files that were deleted from it.
        made: the files that were written to it since.
    """
    now = dict.fromkeys(removed, "") | {artifact.path.name: artifact.sha256 for artifact in made}
    return [
        f"{artifact.path.name} is not of this run: it was made from a former {parent.name}"
        for artifact in _artifacts(folder)
        for parent in artifact.parents
        if artifact.path.name not in now and now.get(parent.name, parent.sha256) != parent.sha256
    ]


def _artifacts(folder: Path) -> list[Artifact]:
    """Those in a folder that are as their sidecars say."""
    found = []
    for path in sorted(beside.with_suffix("") for beside in folder.glob("*.json")):
        if path.is_file():
            with suppress(UserError):  # other JSON, or a file that has changed
                found.append(read_artifact(path))
    return found
