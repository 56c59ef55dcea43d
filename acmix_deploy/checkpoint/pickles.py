"""What a pickle may name, and what it gets for that.

A pickle calls whatever it can name. The restricted load (``weights_only`` of torch) lets it name the modules of
torch.nn, of Ultralytics and of our families, and what it gets for such a name makes empty instances only: Ultralytics'
own constructors would evaluate strings of the pickle's choice. Of Ultralytics, or of the changed copy that is
installed, those are meant that its models are made of: nothing else of it is imported for a name, since its files may
install packages when they are. A name that nothing here answers to becomes a class without code, made for one load:
its instances keep their parameters, and may be a known block by those.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType, SimpleNamespace
from typing import IO, Any

from acmix_deploy import yolo
from acmix_deploy.checkpoint.refusals import not_here, unreadable, untrusted
from acmix_deploy.errors import UserError
from acmix_deploy.process import WHOLE_PROCESS
from acmix_deploy.runtime.reason import reason


def unpickle(path: Path, *, trust: bool, code: Path | None = None) -> object:
    """What ``torch.save`` wrote, on the CPU.

    Args:
        path: the file.
        trust: load with an ordinary unpickler, which runs code from the file.
        code: the folder of the code that it needs.

    Raises:
        UserError: it cannot be read, or names what may not be named.
    """
    return _unpickle_trusted(path, code) if trust else _unpickle_restricted(path)


def named_beside_a_model(path: Path) -> tuple[str, ...]:
    """Names in the file for which an inert object is taken."""
    return tuple(name for name in _pickled_names(path) if _beside_a_model(name))


# Allowed classes used as no module in today's format uses them: called, or stored with their source code.
_MISUSE = re.compile("the file calls the constructor|Only persistent_load of storage")


def _unpickle_restricted(path: Path) -> object:
    import torch

    names = _pickled_names(path)
    stand_ins = {name: stand_in for name in names if (stand_in := _stand_in(name)) is not None}
    refused = [name for name in names if name not in stand_ins]
    allowed: list[Any] = [(stand_in, name) for name, stand_in in stand_ins.items()]
    try:
        with WHOLE_PROCESS, warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")  # about other pickle protocols, which end in an error anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if refused or _MISUSE.search(str(error)):
            raise untrusted(path, refused or names) from error
        raise unreadable(path, error) from error
    except Exception as error:
        raise unreadable(path, error) from error


def _unpickle_trusted(path: Path, code: Path | None) -> object:
    import torch

    absent: list[str] = []

    class Unpickler(pickle.Unpickler):
        def find_class(self, package: str, attribute: str) -> Any:
            try:
                found = super().find_class(package, attribute)
                if code:
                    _check_place(package, code)
                return found
            except (ImportError, AttributeError) as error:
                name, why = f"{package}.{attribute}", reason(error)
                absent.append(f"{name} ({why})")
                return _beside_a_model(name) or _stand_in_for_absent(name, why)

    machine: Any = ModuleType("pickle")  # what torch takes in the place of that module
    machine.Unpickler = Unpickler
    machine.load = lambda file, **options: Unpickler(file, **options).load()
    try:
        with importable(code):
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=machine)
    except UserError:
        raise
    except Exception as error:
        raise (not_here(path, absent, code) if absent else unreadable(path, error)) from error


def _check_place(package: str, code: Path) -> None:
    """Raises UserError where a package that the folder ``code`` holds was imported from somewhere else before."""
    name = package.partition(".")[0]
    if not (code / name).is_dir() and not (code / f"{name}.py").is_file():
        return
    module: Any = sys.modules[name]
    places = {Path(place) for place in (*getattr(module, "__path__", ()), getattr(module, "__file__", None)) if place}
    if not any(place.resolve().is_relative_to(code.resolve()) for place in places):
        raise UserError(
            f"the module {name} is to come from {code}, and one of {', '.join(map(str, places))} is imported already",
            "Load checkpoints that need different code in processes of their own.",
        )


# Tensors and containers, which every checkpoint names.
_PLAIN = re.compile(
    r"torch\.(\w*Storage|_utils\._rebuild_\w+|nn\.parameter\.Parameter|Size|device|b?float\w+|u?int\d+|bool)"
    r"|collections\.OrderedDict|_codecs\.encode|(__builtin__|builtins)\.set"
)


def _pickled_names(path: Path) -> list[str]:
    """Names of classes and functions in the file, as far as it can be read; of those PyTorch itself does not allow."""
    import torch

    with suppress(Exception), WHOLE_PROCESS:  # it leaves out what another thread has allowed
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    names: set[str] = set()
    with suppress(Exception), _open_pickle(path) as file:
        while True:  # older files are a row of pickles; what follows the last is no pickle and ends this
            texts: list[str] = []
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STACK_GLOBAL":
                    names.add(".".join(texts[-2:]))
                elif opcode.name in ("GLOBAL", "INST"):
                    names.add(str(argument).replace(" ", ".", 1))
                elif isinstance(argument, str):
                    texts.append(argument)
    return sorted(name for name in names if re.fullmatch(r"[\w.]+", name) and not _PLAIN.fullmatch(name))


@contextmanager
def _open_pickle(path: Path) -> Iterator[IO[bytes]]:
    """The pickle that a file of torch.save is, or has in it."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                yield file


# ---------------------------------------------------------------------------------------------------------------------
# What stands for a name

_MODULE_PACKAGES = ("torch.nn.", "ultralytics.nn.", "acmix_deploy.families.")
_RUN_FILES = ("ultralytics.nn.autobackend.", "ultralytics.nn.backends.")  # no parts of a model, though some are modules


def _may_name_module(name: str) -> bool:
    return name.startswith(_MODULE_PACKAGES) and not name.startswith(_RUN_FILES)


class _Nothing:
    """Stands for what is saved beside a model and not needed to run it."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_BESIDE_A_MODEL: dict[str, type] = {
    r"(argparse\.Namespace|ultralytics\.(yolo\.)?utils\.IterableSimpleNamespace)": SimpleNamespace,
    r"yacs\.config\.CfgNode": OrderedDict,
    # scalars and arrays, such as the fitness of YOLOv5, YOLOv7 and YOLOv9
    r"numpy\.(dtype|ndarray)": _Nothing,
    r"numpy\._?core\.multiarray\.(scalar|_reconstruct)": _Nothing,
    r"pathlib\.(_local\.)?\w+Path": _Nothing,
    r"ultralytics\.(yolo\.)?utils\.(loss|tal)\.\w+": _Nothing,
    # how a classifier of Ultralytics prepares images
    r"torchvision\.transforms\.(transforms|functional)\.[A-Z]\w+": _Nothing,
    r"ultralytics\.(yolo\.)?data\.augment\.(CenterCrop|ToTensor|ClassifyLetterBox)": _Nothing,
}


def _stand_in(name: str) -> type | None:
    """What a restricted load gives a pickle that names ``name``; None if that is refused."""
    from torch import nn

    if beside := _beside_a_model(name):
        return beside
    if not _may_name_module(name):
        return _stand_in_for_absent(name) if _is_absent(name) else None
    package, _, attribute = name.rpartition(".")
    with suppress(ImportError, AttributeError):
        if package.startswith("ultralytics."):
            yolo.ultralytics("nn.tasks")
            kind = getattr(sys.modules[package], attribute) if package in sys.modules else None
        else:
            kind = getattr(import_module(package), attribute)
        if isinstance(kind, type) and issubclass(kind, nn.Module) and _may_name_module(f"{kind.__module__}."):
            return _empty_instances_of(kind)
    return _stand_in_for_absent(name) if _is_absent(name) else None


def _beside_a_model(name: str) -> type | None:
    return next((stand_in for pattern, stand_in in _BESIDE_A_MODEL.items() if re.fullmatch(pattern, name)), None)


def _empty_instances_of(kind: type) -> type:
    """A class whose instances are instances of ``kind`` on which no constructor has run.

    It equals ``kind``, because the unpickler asks whether the type of what it fills is among the classes allowed.
    """

    class EqualToKind(type):
        def __eq__(cls, other: object) -> bool:
            return other is cls or other is kind

        def __hash__(cls) -> int:
            return hash(kind)

        def __call__(cls, *args: object) -> object:
            raise UnpicklingError(f"the file calls the constructor of {kind.__name__}")

    class Empty(metaclass=EqualToKind):
        def __new__(cls, *args: object) -> Any:
            return object.__new__(kind)

    return Empty


# ---------------------------------------------------------------------------------------------------------------------
# Classes that are not here


class NotHere(type):
    """The type of classes that stand for ones that cannot be imported."""

    why = ""
    """What the attempt to import it said, where there was one."""

    def __call__(cls, *args: object, **options: object) -> object:
        raise UnpicklingError(f"the file calls the constructor of {cls.__name__}")


def _stand_in_for_absent(name: str, why: str = "") -> type:
    """A module's class called ``name``, without code: its instances keep what the file says of them."""
    from torch import nn

    package, _, attribute = name.rpartition(".")
    return NotHere(attribute, (nn.Module,), {"__module__": package, "why": why})


def _is_absent(name: str) -> bool:
    """Whether nothing can be imported by that name. Imports nothing, so what exists may still lack the attribute."""
    package, _, attribute = name.rpartition(".")
    if package == "__main__" or (package in sys.modules and _may_name_module(name)):
        return not hasattr(sys.modules.get(package), attribute)
    with importable():
        return not _exists(package)


def _exists(package: str) -> bool:
    folders: list[str] = []
    for depth, _ in enumerate(package.split("."), 1):
        name = ".".join(package.split(".")[:depth])
        if name in sys.modules:
            folders = list(getattr(sys.modules[name], "__path__", []))
            continue
        spec = None
        with suppress(ImportError, ValueError):
            spec = find_spec(name) if depth == 1 else PathFinder.find_spec(name, folders)
        if spec is None:
            return False
        folders = list(spec.submodule_search_locations or [])
    return True


@contextmanager
def importable(code: Path | None = None) -> Iterator[None]:
    """Let modules in the folder ``code``, else those in the current directory, be imported before all others."""
    with WHOLE_PROCESS:
        before = list(sys.path)
        sys.path[:0] = [str(folder.resolve()) for folder in (code, Path.cwd()) if folder]
        try:
            yield
        finally:
            sys.path[:] = before
