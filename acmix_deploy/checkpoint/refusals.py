"""What is said of a file that is not loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from acmix_deploy.errors import UserError
from acmix_deploy.runtime.reason import reason


def unreadable(path: Path, error: Exception) -> UserError:
    """For a file on which ``error`` was raised."""
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        found = "it is empty"
    elif start == b"PK" and not zipfile.is_zipfile(path):
        found = "it is an archive whose end is missing"
    elif isinstance(error, (RuntimeError, OSError)):
        found = reason(error)
    else:  # whatever a pickle machine stumbles over when it is fed something else
        found = "its content makes no sense as one"
    return UserError(
        f"{path} cannot be read as a PyTorch checkpoint: {found}",
        "Is it complete, and was it written by torch.save? Copy or download it again.",
    )


def untrusted(path: Path, found: list[str]) -> UserError:
    """For a file that would run ``found``."""
    return UserError(
        f"{path} names what a restricted load refuses: {_listed(found)}",
        "If these classes can be imported here, --trust loads it. That runs code from the file: use it only if you "
        "know where the file comes from.",
    )


def not_here(path: Path, unknown: Sequence[str], trust: bool) -> UserError:
    """For a module with classes that cannot be imported; ``trust`` says that running their code was allowed."""
    ways = "Run from the directory of their code" + ("" if trust else " with --trust, which runs code from the file")
    return UserError(
        f"{path} needs classes that cannot be imported here: {_listed(unknown)}",
        f"{ways}; or name what builds a module that takes the weights: --arch package.module:factory",
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{', '.join(names[:8])}{more}"
