"""What a file is, by its content: whoever opens one asks here, and says so where it is something else."""

from __future__ import annotations

import json
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISDIR
from typing import IO, Literal

from acmix_deploy.artifacts import sha256, sidecar
from acmix_deploy.engine_file import read_engine_file
from acmix_deploy.errors import UserError, did_you_mean

Kind = Literal[
    "checkpoint", "program", "torchscript", "onnx", "engine", "plugin", "safetensors", "image", "video", "sidecar",
    "json", "text", "folder", "empty", "unknown",
]  # fmt: skip

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".pt2", ".ckpt")
"""How the names of checkpoints end."""

LARGEST_MESSAGE = 2**31 - 1
"""Bytes of an ONNX file at most: protobuf, its format, reads no more."""

_TITLES: dict[Kind, str] = {
    "checkpoint": "a PyTorch checkpoint",
    "program": "a program of torch.export",
    "torchscript": "a TorchScript archive",
    "onnx": "an ONNX file",
    "engine": "an engine",
    "plugin": "a shared library",
    "safetensors": "a file of safetensors",
    "image": "an image",
    "video": "a video",
    "sidecar": "the sidecar of another file",
    "json": "a JSON document",
    "text": "a text file",
    "folder": "a folder",
    "empty": "empty",
    "unknown": "of no kind that is known here",
}

# Fields of a ModelProto and how protobuf writes each: 0 is a number, 2 are bytes with their length before them.
_ONNX_FIELDS = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_MOST_FIELDS = 1000  # that are looked at
_MOST_JSON = 1 << 26  # bytes that are parsed to tell JSON from other text
_HEAD = 512


def kind_of(path: Path) -> Kind:
    """What a file or folder is. Its name decides only where its content is nothing that is known.

    Raises:
        UserError: it does not exist or cannot be opened.
    """
    try:
        if S_ISDIR(path.stat().st_mode):
            return "folder"
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a name that no file can have
        raise not_there(path) from None
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}", "Name a file that you may read.") from error
    if not head:
        return "empty"
    told = _by_mark(path, head) or _by_structure(path, head)
    return _by_origin(path, told) or told or _by_name(path)


def not_there(path: Path) -> UserError:
    """For a file that does not exist: what its name may have been meant to be."""
    if re.match("https?:/", str(path)):
        address = re.sub("^(https?:/)/*", r"\1/", str(path))  # Path makes one of two slashes
        return UserError(f"{address} is an address, and nothing is downloaded here", "Download it, then name the file.")
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):  # no folder, or one that may not be listed
        beside = []
    meant = did_you_mean(path.name, beside)
    return UserError(f"{path} does not exist", f"{meant} Name a file that is there.".lstrip())


def expect(path: Path, *wanted: Kind) -> Kind:
    """The kind of a file, which has to be one of those wanted, and whole where that can be told before it is read.

    Raises:
        UserError: it cannot be opened, or is something else, with the verb or step that takes what it is; or an ONNX
            file that ends too early or is larger than ONNX files can be.
    """
    kind = kind_of(path)
    if kind not in wanted:
        needed = [_TITLES[choice] for choice in wanted]
        needed = [" or ".join(filter(None, [", ".join(needed[:-1]), needed[-1]]))]
        raise UserError(f"{path} is {_described(path, kind)}; {needed[0]} is needed", _way_out(path, kind, wanted))
    if kind == "onnx":
        _check_onnx(path)
    return kind


# ---------------------------------------------------------------------------------------------------------------------
# Kinds


def _by_origin(path: Path, told: Kind | None) -> Kind | None:
    """An engine has any content; what makes it one is what wrote it. What else its content tells is something that took
    its place, such as a pointer of Git LFS, unless its bytes are still the ones that were written."""
    written = _json(sidecar(path))
    if written.get("kind") != "engine" or (told and told != "engine" and written.get("sha256") != sha256(path)):
        return None
    return "engine"


def _by_mark(path: Path, head: bytes) -> Kind | None:
    """By the bytes that files of a kind begin with."""
    if head[1:4] == b"trt" or read_engine_file(path).backend:
        return "engine"
    if head.startswith(b"\x7fELF"):
        return "plugin"
    if head.startswith(b"PK\x03\x04"):
        return _in_archive(path)
    if head[0] == 0x80 and head[1] in range(2, 6):  # a pickle and its protocol
        return "checkpoint"
    riff = head[8:12] if head.startswith(b"RIFF") else b""
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")) or riff == b"WEBP":
        return "image"
    if head.startswith(b"BM") and head[6:10] == bytes(4):
        return "image"
    if head[4:8] == b"ftyp" or head.startswith(b"\x1aE\xdf\xa3") or riff == b"AVI ":
        return "video"
    if head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] <= path.stat().st_size - 8:
        return "safetensors"
    return None


def _by_structure(path: Path, head: bytes) -> Kind | None:
    if _is_text(head):
        if path.suffix.lower() in CHECKPOINT_SUFFIXES and _is_pickle(path):
            return "checkpoint"  # the oldest pickles are text
        if head.lstrip()[:1] not in (b"{", b"["):
            return "text"
        try:
            document = json.loads(path.read_bytes()) if path.stat().st_size < _MOST_JSON else None
        except (ValueError, RecursionError):
            return "text"
        described = isinstance(document, dict) and {"kind", "sha256", "settings"} <= document.keys()
        return "sidecar" if described else "json"
    with path.open("rb") as file:
        fields = {number for number, _ in _fields(file)}
    return "onnx" if fields >= {1, 7} or fields >= {7, 8} else None


def _by_name(path: Path) -> Kind:
    suffix = path.suffix.lower()
    if suffix in CHECKPOINT_SUFFIXES:
        return "program" if suffix == ".pt2" else "checkpoint"
    return "onnx" if suffix == ".onnx" else "unknown"


def _in_archive(path: Path) -> Kind | None:
    if not zipfile.is_zipfile(path):  # its end is missing
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return "torchscript"
    if "archive_format" in inner or any(name.startswith("models/") for name in inner):
        return "program"
    return "checkpoint" if "data.pkl" in inner else None


def _is_text(head: bytes) -> bool:
    text = _text(head)
    most = len(text) // 8 + 1  # characters of an older encoding than UTF-8, or cut off by the end of the head
    return text.count("\ufffd") <= most and all(one.isprintable() or one.isspace() for one in text)


def _text(head: bytes) -> str:
    return head.decode("utf-8-sig", errors="replace")


def _is_pickle(path: Path) -> bool:
    """Whether it begins with a whole pickle."""
    with path.open("rb") as file:
        try:
            return any(opcode.name == "STOP" for opcode, _, _ in pickletools.genops(file))
        except Exception:  # whatever it makes of other content
            return False


def _json(path: Path) -> dict[str, object]:
    """The object in a JSON file; empty where there is none."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# ONNX files, without reading what is in them


def _fields(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Number of each field of a ModelProto and the offset at which it ends, up to what is no such field."""
    for _ in range(_MOST_FIELDS):
        if (tag := _number(file)) is None:
            return
        number, form = tag >> 3, tag & 7
        value = _number(file) if _ONNX_FIELDS.get(number) == form else None
        if value is None:
            return
        yield number, file.seek(value, 1) if form == 2 else file.tell()


def _number(file: IO[bytes]) -> int | None:
    """A number as protobuf writes it, seven bits a byte; None at the end of the file."""
    value = 0
    for shift in range(0, 70, 7):
        if not (byte := file.read(1)):
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None


def _check_onnx(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        end = max((end for _, end in _fields(file)), default=0)
    if end > size:
        raise UserError(
            f"{path} ends too early: it holds {size} bytes, and what stands in it goes on to {end}",
            "Copy or download it again.",
        )
    if size > LARGEST_MESSAGE:
        raise too_large(path, size)


TOO_LARGE_HINT = (
    "Files with their weights beside them (external_data=True of torch.onnx.export) may be larger. ONNX Runtime "
    "runs those, so detect, verify and profile take them, and what changes a file does not."
)


def too_large(path: Path, size: int) -> UserError:
    """For an ONNX file of ``size`` bytes with its weights, more than protobuf can hold in one piece."""
    return UserError(
        f"{path} holds {size / 1e9:.1f} GB, and an ONNX model in one piece has at most {LARGEST_MESSAGE / 1e9:.1f} GB, "
        "where protobuf ends",
        TOO_LARGE_HINT,
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is said


def _described(path: Path, kind: Kind) -> str:
    title = _TITLES[kind]
    if kind == "unknown":
        with path.open("rb") as file:
            return f"{title}: it begins with {file.read(8).hex(' ')}"
    if kind in ("text", "json"):
        with path.open("rb") as file:
            text = _text(file.read(_HEAD)).strip()
        known, _ = _known_text(text)
        return f"{known or title} that begins with {text.partition(chr(10))[0].strip()[:40]!r}"
    return title


def _known_text(text: str) -> tuple[str, str]:
    """What text that took the place of a file is by its first words, and the way out; empty where it is any text."""
    return next(
        ((title, way_out) for words, title, way_out in _TEXTS if re.match(words, text, re.IGNORECASE)), ("", "")
    )


_TEXTS = (
    ("version https://git-lfs", "a pointer of Git LFS", "Run: git lfs pull"),
    ("<!doctype html|<html", "an HTML page", "A page was saved in place of the file: download the file itself."),
)


def _way_out(path: Path, kind: Kind, wanted: tuple[Kind, ...]) -> str:
    if kind in ("checkpoint", "program"):
        return f"Make an ONNX file of it: acmix-deploy export {path}"
    if kind == "onnx":
        fused = path.with_name(f"{path.stem}.fused.onnx")
        return f"Name the checkpoint that it was made of; or go on from here: acmix-deploy fuse {path} -o {fused}"
    if kind == "engine":
        source = "ONNX file that it was built from" if "onnx" in wanted else "checkpoint that it goes back to"
        return f"Name the {source}; an engine is for detect, serve, package, verify, profile and gate."
    if kind == "text":
        with path.open("rb") as file:
            _, way_out = _known_text(_text(file.read(_HEAD)).strip())
        return way_out or "Was something else saved under this name?"
    ways: dict[Kind, str] = {
        "torchscript": "It holds no module that can be exported again: name the checkpoint that it was made of.",
        "plugin": "A plugin goes to --plugin; acmix-deploy plugin check says what is in it.",
        "safetensors": "It holds weights alone: save what safetensors.torch.load_file reads of it with torch.save, and "
        "name what builds their module: acmix-deploy export weights.pt --arch package.module:factory",
        "image": "Name a model; images come after it: acmix-deploy detect MODEL IMAGE",
        "video": "Name a model; a video comes after it: acmix-deploy detect MODEL VIDEO",
        "sidecar": f"Name the file itself: {path.parent / path.stem}",
        "json": "Name the model itself; acmix-deploy report shows documents.",
        "folder": "Name a file in it.",
        "empty": "Copy or download it again.",
    }
    return ways.get(kind, "Is it the right file? acmix-deploy --help says what each verb takes.")
