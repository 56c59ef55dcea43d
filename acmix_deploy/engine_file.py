"""An engine file as far as it can be read without TensorRT: what Ultralytics writes before the engine, and which
release of TensorRT wrote the engine itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from acmix_deploy.errors import UserError

_LENGTH = 4  # bytes before the JSON, a little-endian signed number
_RELEASE = slice(24, 28)  # where the bytes of a release stand, as trtexec --getPlanVersionOnly reads it
_TAGS: dict[bytes, Literal["tensorrt", "tensorrt_rtx"]] = {
    b"ftrt": "tensorrt", b"ptrt": "tensorrt", b"vtrt": "tensorrt_rtx",
}  # fmt: skip


class EngineFile(NamedTuple):
    """The beginning of an engine file."""

    offset: int
    """Bytes before the engine itself; 0 where nothing stands before it."""
    header: dict[str, Any] | None
    """What Ultralytics writes before it; None where there is none."""
    backend: Literal["tensorrt", "tensorrt_rtx"] | None
    """What wrote the engine; None where it begins otherwise."""
    version: str | None
    """Its release, such as 10.3.0.26; None where the engine does not tell it, as before 8.6."""


def read_engine_file(path: Path) -> EngineFile:
    """The beginning of a file; of one that is no engine, nothing.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            offset, header = _header(file.read(_LENGTH + 1), path)
            file.seek(offset)
            plan = file.read(_RELEASE.stop)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    told = plan[:4] in (b"ftrt", b"vtrt") and plan[4:8] == bytes(4) and len(plan) == _RELEASE.stop
    version = ".".join(map(str, plan[_RELEASE])) if told and plan[_RELEASE.start] else None
    return EngineFile(offset, header, _TAGS.get(plan[:4]), version)


def read_engine(path: Path) -> bytes:
    """What TensorRT deserializes of a file. Raises UserError: it cannot be read."""
    return path.read_bytes()[read_engine_file(path).offset :]


def header_bytes(header: Mapping[str, Any]) -> bytes:
    """What stands before an engine of Ultralytics: the length of the JSON, and the JSON."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(_LENGTH, "little", signed=True) + text


def _header(head: bytes, path: Path) -> tuple[int, dict[str, Any] | None]:
    """Where the engine begins and what stands before it."""
    length = int.from_bytes(head[:_LENGTH], "little", signed=True)
    if head[_LENGTH:] != b"{" or not 0 < length <= path.stat().st_size - _LENGTH:
        return 0, None
    with path.open("rb") as file:
        file.seek(_LENGTH)
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            return 0, None
    return _LENGTH + length, header
