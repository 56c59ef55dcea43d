"""The documents in a folder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acmix_deploy.artifacts import is_sidecar
from acmix_deploy.document import D, Document, Written, document_of, parse_document, read_json, written
from acmix_deploy.errors import UserError
from acmix_deploy.gate.samples import GateSamples
from acmix_deploy.profile import ProfileDocument
from acmix_deploy.profile.trtexec import read_times
from acmix_deploy.report.documents import (
    BuildDocument,
    Fp16Document,
    FuseDocument,
    GateDocument,
    QuantizeDocument,
    VerifyDocument,
)
from acmix_deploy.report.model import ExportReport

_KINDS: dict[Written, type[Document]] = {
    written(kind): kind
    for kind in (
        ExportReport,
        FuseDocument,
        Fp16Document,
        QuantizeDocument,
        BuildDocument,
        VerifyDocument,
        ProfileDocument,
        GateSamples,
        GateDocument,
    )
}


@dataclass(frozen=True)
class Folder:
    """What was read of a folder."""

    path: Path
    documents: dict[str, Document]
    """By the names of their files, in order."""
    notes: tuple[str, ...]
    """The files that were left out, and why."""

    def of(self, kind: type[D]) -> dict[str, D]:
        """The documents of one kind."""
        return {name: found for name, found in self.documents.items() if isinstance(found, kind)}


def read_folder(path: Path) -> Folder:
    """Read every JSON file of a folder, but not of folders in it.

    Sidecars are passed over. trtexec's times become a :class:`ProfileDocument`.

    Raises:
        UserError: it is no folder, or nothing in it could be used.
    """
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder", "Give the folder that the documents lie in, such as that of `export`."
        )
    documents: dict[str, Document] = {}
    notes = []
    for file in sorted(path.glob("*.json")):
        try:
            if document := _read(file):
                documents[file.name] = document
        except UserError as error:
            notes.append(error.message)
    if not documents:
        raise UserError(
            f"{path} holds no document to report on{_among(notes)}",
            "Give the folder of `export`, or keep there what other verbs print with --json.",
        )
    return Folder(path, documents, tuple(notes))


def _read(file: Path) -> Document | None:
    """A document; None for a sidecar. Raises UserError: it is broken, or none that is known."""
    content: Any = read_json(file)
    if isinstance(content, list):
        return ProfileDocument(profiles=[read_times(file)])
    if not _finite(content):
        raise UserError(f"{file} holds a number that is not finite")
    if is_sidecar(content):
        return None
    found = document_of(content)
    if found not in _KINDS:
        raise UserError(f"{file} is {f'what `{found}` writes' if found else 'no document'}, which is not reported on")
    return parse_document(_KINDS[found], content, file)


def _finite(content: Any) -> bool:
    if isinstance(content, dict | list):
        return all(map(_finite, content.values() if isinstance(content, dict) else content))
    return not isinstance(content, float) or math.isfinite(content)


def _among(notes: Iterable[str]) -> str:
    return "".join(f"; {note}" for note in notes)
