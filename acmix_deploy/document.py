"""JSON documents with the version of their form: what verbs print with ``--json``, and what is read again later."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError
from pydantic_core import from_json

from acmix_deploy.artifacts import replacing
from acmix_deploy.errors import UserError

Written = Literal[
    "adopt",
    "build",
    "detect",
    "detect response",
    "detect stats",
    "device",
    "device list",
    "doctor",
    "doctor error",
    "export",
    "fp16",
    "fuse",
    "gate check",
    "gate history",
    "gate run",
    "inspect",
    "model response",
    "package deepstream",
    "package triton",
    "plugin",
    "profile",
    "profile end-to-end",
    "quantize",
    "report",
    "serve",
    "verify",
]
"""What documents there are: by the verb that writes them, or whose server answers with them."""


class Document(BaseModel):
    """A JSON document that says what it is, in a form with a version."""

    document: Written
    schema_version: Literal[1] = Field(
        default=1, alias="schema", description="version of this form; grows when a field is renamed or changes meaning"
    )


D = TypeVar("D", bound=Document)
M = TypeVar("M", bound=BaseModel)


def written(kind: type[Document]) -> Written:
    """Which document a type is of."""
    name: Written = kind.model_fields["document"].default
    return name


def document_of(content: Any) -> Written | None:
    """Which document JSON is; None where it is none that is known."""
    found = content.get("document") if isinstance(content, dict) else None
    return found if found in get_args(Written) else None


def write_document(document: Document, path: Path) -> None:
    """Write a document as JSON. Raises UserError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(document.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """What is in a JSON file, NaN included. Raises UserError: it cannot be read, or is not whole JSON."""
    try:
        return from_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON, or not all of it: {error}", "Was it copied or written to its end?"
        ) from error


def check_document(content: Any, path: Path, *expected: Written) -> None:
    """Raises UserError where JSON is none of the documents expected, or of another version."""
    found = document_of(content)
    if found not in expected:
        is_one = f"what `{found}` writes" if found else "no document"
        raise UserError(f"{path} is {is_one}; what `{'` or `'.join(expected)}` writes is needed")
    version = content.get("schema")
    known = Document.model_fields["schema_version"].default
    if version is not None and version != known:
        raise UserError(
            f"{path} is of version {version} of its form; this acmix-deploy reads version {known}",
            "Use the acmix-deploy that wrote it, or write it again with this one.",
        )


def parse(kind: type[M], content: Any, path: Path) -> M:
    """A model from JSON. Raises UserError where something in it is missing or out of range, with its place."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise UserError(f"{path} does not hold what it should: {place}: {first['msg']}") from error


def parse_document(kind: type[D], content: Any, path: Path) -> D:
    """A document from what :func:`read_json` gave. Raises what :func:`check_document` and :func:`parse` do."""
    check_document(content, path, written(kind))
    return parse(kind, content, path)
