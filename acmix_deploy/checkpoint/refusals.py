"""What is said of a file that is not loaded."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from acmix_deploy.errors import UserError
from acmix_deploy.runtime import hints
from acmix_deploy.runtime.reason import place, raised, reason

if TYPE_CHECKING:
    from torch import nn


def unreadable(path: Path, error: Exception) -> UserError:
    """For a file on which ``error`` was raised while it was unpickled."""
    with path.open("rb") as file:
        start = file.read(2)
    if place(error):
        return _raising(path, error)
    if start == b"PK" and not zipfile.is_zipfile(path):
        found = "it is an archive whose end is missing"
    elif isinstance(error, (RuntimeError, OSError)):
        found = reason(error)
    else:  # whatever a pickle machine stumbles over when it is fed something else
        found = "its content makes no sense as one"
    return UserError(
        f"{path} cannot be read as a PyTorch checkpoint: {found}",
        hints.INCOMPLETE,
    )


def unusable(path: Path, error: Exception) -> UserError:
    """For a file that could be unpickled, and on whose content ``error`` was raised."""
    if place(error):
        return _raising(path, error)
    return UserError(
        f"{path} holds what cannot be used: {raised(error)}",
        "Its objects are not as their classes make them: another release of their package saved them, or they were "
        "changed.",
    )


def _raising(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be loaded, because code that it needs fails: {raised(error)}",
        "Mend that line, or load with the code that the checkpoint was saved with.",
    )


def does_not_run(what: str, module: nn.Module, shape: Sequence[int], error: Exception) -> UserError:
    """For a module that raised ``error`` on an input.

    Args:
        what: how it is called.
        module: knows the release that saved it, where :func:`acmix_deploy.checkpoint.load` was told.
        shape: [B, C, H, W] of the input.
        error: what its code raised. A missing attribute is a class that is not of the checkpoint's release.
    """
    where = f" ({found})" if (found := place(error)) else ""
    if lacking := _lacks(error):
        kind, attribute = lacking
        here, saved = _package_of(kind), getattr(module, "saved_by", "")
        by = f", which {saved} saved," if saved else ""
        return UserError(
            f"{what} does not run: {kind.__module__}.{kind.__qualname__}{f' of {here}' if here else ''} reads the "
            f"attribute {attribute!r}, and the one in the checkpoint{by} has none{where}",
            f"{hints.OTHER_RELEASE}{_pinned(saved)}.",
        )
    if isinstance(error, (NameError, ImportError, AttributeError, KeyError)):
        return UserError(f"{what} does not run: {raised(error)}", "No input helps: mend the code of the model.")
    return UserError(
        f"{what} does not run on an input of {list(shape)}: {reason(error)}{where}",
        "Check the input shape and the dynamic axes.",
    )


def _lacks(error: Exception) -> tuple[type, str] | None:
    """The class of a module and the attribute that its code missed."""
    from torch import nn

    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    if not isinstance(root, AttributeError) or not isinstance(root.obj, nn.Module):
        return None
    return type(root.obj), str(root.name)


def _package_of(kind: type) -> str:
    """``torch 2.14.1``: the package of a class with its version; empty where it has none."""
    package = sys.modules.get(kind.__module__.partition(".")[0])
    version = getattr(package, "__version__", None)
    return f"{package.__name__} {version}" if package and version else ""


def _is_here(saved: str) -> bool:
    """Whether a release such as ``ultralytics 8.3.100`` is the one that is installed."""
    name, _, version = saved.partition(" ")
    return getattr(sys.modules.get(name), "__version__", None) == version


def _pinned(saved: str) -> str:
    return f", pip install {saved.replace(' ', '==')}" if saved else ""


def untrusted(path: Path, found: list[str]) -> UserError:
    """For a file that would run ``found``."""
    return UserError(
        f"{path} names what a restricted load refuses: {_listed(found)}",
        hints.UNTRUSTED,
    )


def not_here(path: Path, unknown: Sequence[str], code: Path | None, saved: str = "") -> UserError:
    """For a module with classes that cannot be imported.

    Args:
        path: the file.
        unknown: their names, each followed by why it could not where that was tried.
        code: the folder where their code was to be.
        saved: the release of their package that the file names, ``ultralytics 8.3.100``.
    """
    by = f"; {saved} saved it" if saved else ""
    folder = _folder_of(unknown)
    ways = []
    if saved and not _is_here(saved):
        ways.append(f"install the release that saved it{_pinned(saved)}")
    if code:
        ways.append(f"see whether --code {code} is {folder or 'the folder of their code'}")
    elif folder:
        ways.append(f"name {folder}: --code DIR --trust, which runs code from the file")
    if not saved or not ways:
        ways.append("name what builds a module that takes the weights: --arch package.module:factory")
    hint = "; or, ".join(ways)
    return UserError(
        f"{path} needs classes that cannot be imported here: {_listed(unknown)}{by}", hint[0].upper() + hint[1:]
    )


def _folder_of(names: Sequence[str]) -> str:
    """Where the code of such classes usually stands; empty for those of the script that saved them."""
    packages = [name.partition(" ")[0].rpartition(".")[0] for name in names]
    if any(package.startswith("ultralytics.") for package in packages):
        return "the folder that holds ultralytics/ of the changed copy that it was trained with"
    files = [f"{package.replace('.', '/')}.py" for package in packages if package not in ("", "__main__")]
    if of_repository := [file for file in files if file.startswith("models/")]:
        return f"the folder that holds {max(of_repository)}, a repository such as those of YOLOv5, YOLOv7 and YOLOv9"
    return f"the folder that holds {files[0]}" if files else ""


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{', '.join(names[:8])}{more}"
