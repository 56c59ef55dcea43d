"""This package as it is here, as a wheel."""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import acmix_deploy
from acmix_deploy.artifacts import replacing

NAME = f"acmix_deploy-{acmix_deploy.__version__}-py3-none-any.whl"

_DISTRIBUTION = "acmix-deploy"
_INFO = f"acmix_deploy-{acmix_deploy.__version__}.dist-info"
_WHEEL = "Wheel-Version: 1.0\nGenerator: acmix-deploy\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(path: Path) -> None:
    """Write the wheel; the same bytes for the same files.

    The form is that of https://packaging.python.org/en/latest/specifications/binary-distribution-format. An editable
    installation has no wheel of its own and may lie where nothing can be built, so it is packed from the files that are
    imported.
    """
    found = metadata.distribution(_DISTRIBUTION)
    information = {"METADATA": _metadata(found), "entry_points.txt": found.read_text("entry_points.txt") or ""}
    described = {f"{_INFO}/{name}": text.encode() for name, text in (*information.items(), ("WHEEL", _WHEEL))}
    record = []
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
    ):
        for name, content in (*_files(), *described.items()):
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record.append(f"{name},sha256={digest},{len(content)}\n")
            archive.writestr(zipfile.ZipInfo(name), content)
        archive.writestr(zipfile.ZipInfo(f"{_INFO}/RECORD"), "".join([*record, f"{_INFO}/RECORD,,\n"]))


def _metadata(found: metadata.Distribution) -> str:
    """What pip has to know, in a form that does not depend on what installed the package here."""
    from packaging.requirements import Requirement

    fields = [("Metadata-Version", "2.1"), ("Name", _DISTRIBUTION), ("Version", acmix_deploy.__version__)]
    fields += [("Requires-Python", text) for text in found.metadata.get_all("Requires-Python", [])]
    fields += [("Provides-Extra", extra) for extra in sorted(found.metadata.get_all("Provides-Extra", []))]
    fields += [("Requires-Dist", text) for text in sorted(str(Requirement(each)) for each in found.requires or [])]
    return "".join(f"{name}: {text}\n" for name, text in fields)


def _files() -> Iterator[tuple[str, bytes]]:
    """Files of the package by their names in the wheel, those behind its link to the plugin's sources too."""
    package = Path(acmix_deploy.__file__).parent
    for folder, folders, names in os.walk(package, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        for name in sorted(names):
            file = Path(folder, name)
            if not name.startswith(".") and file.suffix != ".pyc":
                yield file.relative_to(package.parent).as_posix(), file.read_bytes()
