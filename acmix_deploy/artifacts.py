"""What one stage hands to the next: a file and, beside it, a JSON sidecar that says where the file came from."""

from __future__ import annotations

import errno
import hashlib
import platform
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

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
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder", "Give the name of a file.")
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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(target, str(error.strerror)) from error
        raise


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
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def sidecar(path: Path) -> Path:
    """Where the origin of ``path`` is kept."""
    return path.with_name(path.name + ".json")


def write_artifact(
    path: Path, kind: str, *, parents: Iterable[Path] = (), settings: Mapping[str, Any] | None = None
) -> Artifact:
    """Describe a finished file and write its sidecar.

    Args:
        path: the file, complete and under its final name.
        kind: see :class:`Artifact`.
        parents: the files that it was made from.
        settings: the options that the stage ran with; JSON values.

    Raises:
        UserError: a file cannot be read or the sidecar cannot be written.
    """
    path = Path(path)
    artifact = Artifact(
        path=path,
        kind=kind,
        sha256=sha256(path),
        parents=tuple(Parent(name=Path(parent).name, sha256=sha256(parent)) for parent in parents),
        versions=versions(),
        settings=dict(settings or {}),
    )
    with replacing(sidecar(path)) as temporary:
        in_folder = artifact.model_copy(update={"path": Path(path.name)})
        temporary.write_text(in_folder.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")
    return artifact


def read_artifact(path: Path) -> Artifact:
    """The artifact that :func:`write_artifact` described, checked against the file as it is now.

    Raises:
        UserError: there is no sidecar, it is of another form, or the file has changed since.
    """
    path = Path(path)
    try:
        artifact = Artifact.model_validate_json(sidecar(path).read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} has no sidecar {sidecar(path).name}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the document"
        raise UserError(f"{sidecar(path)} is not the sidecar of an artifact: {place}: {first['msg']}") from error
    if (found := sha256(path)) != artifact.sha256:
        raise UserError(
            f"{path} has changed since {sidecar(path).name} was written: its SHA-256 is {found[:12]}..., "
            f"the sidecar has {artifact.sha256[:12]}...",
            "Run the stage that made it again.",
        )
    return artifact.model_copy(update={"path": path})
