"""Checkpoint -> module, without running code from the file unless it is trusted.

A pickle calls whatever it can name. The restricted load (``weights_only`` of torch) lets it name the modules of
torch.nn, of Ultralytics and of our families, and what it gets for such a name makes empty instances only: Ultralytics'
own constructors would evaluate strings of the pickle's choice. A name that nothing here answers to becomes a class
without code, made for one load: its instances keep their parameters, and may be a known block by those.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import pickletools
import re
import sys
import textwrap
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType, SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

from acmix_deploy import families, yolo
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.runtime.reason import reason

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

SUFFIXES = (".pt", ".pth", ".pt2", ".ckpt")
"""How the names of checkpoints end."""


@dataclass(frozen=True)
class LoadedModel:
    """What a file held.

    Attributes:
        module: in eval mode, in float32, on the CPU; or the program of a ``.pt2`` file, as it was saved.
        metadata: what serving needs to know, as entries of an ONNX file's metadata; empty where nothing is known.
        notes: what was chosen or changed on the way.
    """

    module: nn.Module | ExportedProgram
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load(path: str | Path, *, arch: str | None = None, trust: bool = False) -> LoadedModel:
    """Load a pickled module, an Ultralytics checkpoint, a state dict, or a program saved by ``torch.export``.

    A module whose class cannot be imported is a block of a family if its parts leave no doubt, which a note says.

    Args:
        path: the file. A dict's ``ema`` is preferred to its ``model``; a state dict is the file itself or its
            ``ema``, ``state_dict`` or ``model``, with or without ``module.`` before its names.
        arch: ``package.module:factory``, called without arguments for the module that a state dict belongs to, or a
            pickled module with classes that cannot be imported. The current directory is searched too.
        trust: load with an ordinary unpickler, which runs code from the file.

    Raises:
        UserError: not such a file, one that needs ``trust`` or ``arch``, or one that does not fit ``arch``.
        MissingComponent: PyTorch, or Ultralytics for a file that needs it, is not installed.
    """
    path = Path(path)
    contents = read(path, trust=trust)
    model, notes = contents.model, [*contents.notes]
    if path.suffix == ".pt2":
        return LoadedModel(model)
    if contents.unknown and not arch:
        raise _not_here(path, contents.unknown, trust)
    if model is None or contents.unknown:
        notes += [f"the weights of {name} put into what --arch makes" for name in contents.unknown]
        model = _fill(path, arch, contents.state)
    elif arch:
        notes.append(f"--arch {arch} is not needed: the file holds a whole module")
    try:
        model = model.float().eval()
        metadata = yolo.detection_metadata(model) or {}
    except Exception as error:
        raise _unreadable(path, error) from error
    notes += [f"weights converted from {name} to float32" for name in contents.types if name != "float32"]
    return LoadedModel(model, metadata, tuple(notes))


@dataclass(frozen=True)
class Contents:
    """What a file holds, as it was saved.

    Attributes:
        model: a module, which may have classes that are not here; the program of a ``.pt2`` file; None for weights
            alone.
        state: its parameters and buffers, with the names that they have in the file.
        unknown: names of its classes that cannot be imported and are no known blocks.
        beside: names in the pickle for which an inert object was taken, such as a configuration.
        notes: what was chosen on the way.
    """

    model: Any
    state: Mapping[str, Tensor] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def types(self) -> tuple[str, ...]:
        """The floating-point types of its tensors, by name."""
        types = {tensor.dtype for tensor in self.state.values() if tensor.is_floating_point()}
        return tuple(sorted(str(kind).removeprefix("torch.") for kind in types))


def read(path: Path, *, trust: bool = False) -> Contents:
    """What is in a file that :func:`load` takes; the same limits hold, and nothing is converted.

    Raises:
        UserError: not such a file, or one that needs ``trust``.
        MissingComponent: see :func:`load`.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}", "Name a checkpoint file.") from error
    try:
        from torch import nn
    except ModuleNotFoundError as error:
        raise MissingComponent(
            "PyTorch is needed to load a checkpoint and is not installed", "Run: pip install 'acmix-deploy[export]'"
        ) from error
    if path.suffix == ".pt2":
        return Contents(_load_program(path, trust))
    if _is_torchscript(path):
        raise UserError(
            f"{path} is a TorchScript archive, which holds no module", "Name the checkpoint it was made of."
        )

    _check_unpacked_size(path)
    loaded = _unpickle_trusted(path) if trust else _unpickle_restricted(path)
    model, notes = _find_model(path, loaded)
    unknown: list[str] = []
    state = model
    try:
        if isinstance(model, nn.Module):
            model, unknown = _blocks_by_parts(model, notes)
            state = model.state_dict()
        _check_numbers(path, state)
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error
    beside = [name for name in _pickled_names(path) if _beside_a_model(name)]
    return Contents(model if isinstance(model, nn.Module) else None, state, tuple(unknown), tuple(beside), tuple(notes))


def _unreadable(path: Path, error: Exception) -> UserError:
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


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _untrusted(path: Path, found: list[str]) -> UserError:
    return UserError(
        f"{path} names what a restricted load refuses: {_listed(found)}",
        "If these classes can be imported here, --trust loads it. That runs code from the file: use it only if you "
        "know where the file comes from.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a file holds


def _find_model(path: Path, loaded: object) -> tuple[Any, list[str]]:
    """The module, else the state dict, in what was unpickled, and notes on the choice."""
    from torch import nn

    notes = []
    model = loaded
    if isinstance(loaded, Mapping):
        choices = [key for key in ("ema", "model", "state_dict") if isinstance(loaded.get(key), nn.Module)]
        choices += [key for key in ("ema", "state_dict", "model") if _is_state_dict(loaded.get(key))]
        if choices:
            model = loaded[choices[0]]
            notes += [f"took '{key}' from the checkpoint" for key in choices[:1] if key == "ema"]
        if isinstance(model, nn.Module) and isinstance(loaded.get("train_args"), dict):
            model.args = loaded["train_args"]  # where Ultralytics itself keeps them: the image size is among them
    if isinstance(model, nn.DataParallel):
        model = model.module
    if not isinstance(model, nn.Module) and not _is_state_dict(model):
        entries = f" with {', '.join(map(repr, list(loaded)[:8]))}" if isinstance(loaded, dict) and loaded else ""
        raise UserError(
            f"{path} holds a {type(loaded).__name__}{entries} and no model",
            "A module or a state dict is needed, as the file itself or under 'ema', 'model' or 'state_dict'.",
        )
    return model, notes


def _is_state_dict(value: object) -> bool:
    from torch import Tensor

    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(entry, Tensor) for entry in value.values())


def _fill(path: Path, arch: str | None, state: Mapping[str, Any]) -> nn.Module:
    """The module that ``arch`` makes, with the weights of ``state``."""
    from torch import nn

    if not arch:
        raise UserError(
            f"{path} holds weights only: {len(state)} tensors, the first is {next(iter(state))!r}",
            "Name what builds their module, a callable without arguments: --arch package.module:factory",
        )
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    module_name, _, factory = arch.partition(":")
    try:
        with _importable_here():
            module = getattr(import_module(module_name), factory)()
    except Exception as error:
        raise UserError(
            f"--arch {arch} cannot be built: {type(error).__name__}: {reason(error)}",
            "It is package.module:factory, found from the current directory, and the factory takes no arguments.",
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(f"--arch {arch} makes {type(module)}, not a torch.nn.Module")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [textwrap.shorten(line, 200, placeholder=" ...") for line in str(error).splitlines()[1:]]
        more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise UserError(
            f"the weights in {path} do not fit {arch}: {'; '.join(lines[:4])}{more}",
            "Build the module as it was built for training, with the same number of classes.",
        ) from error
    return module


@contextmanager
def _importable_here() -> Iterator[None]:
    """Let modules in the current directory be imported."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


# ---------------------------------------------------------------------------------------------------------------------
# Classes that are not here


class _NotHere(type):
    """The type of classes that stand for ones that cannot be imported."""

    why = ""
    """What the attempt to import it said, where there was one."""

    def __call__(cls, *args: object, **options: object) -> object:
        raise UnpicklingError(f"the file calls the constructor of {cls.__name__}")


def _stand_in_for_absent(name: str, why: str = "") -> type:
    """A module's class called ``name``, without code: its instances keep what the file says of them."""
    from torch import nn

    package, _, attribute = name.rpartition(".")
    return _NotHere(attribute, (nn.Module,), {"__module__": package, "why": why})


def _is_absent(name: str) -> bool:
    """Whether nothing can be imported by that name. Imports nothing, so what exists may still lack the attribute."""
    package, _, attribute = name.rpartition(".")
    if package == "__main__" or name.startswith(_MODULE_PACKAGES):
        return not hasattr(sys.modules.get(package), attribute)
    with _importable_here():
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


def _blocks_by_parts(model: nn.Module, notes: list[str]) -> tuple[nn.Module, list[str]]:
    """Put a family's own module in the place of each that is one by its parts and whose class is not here.

    Returns:
        The model, another object where it was such a block itself, and the names of classes that stay unknown.
    """
    unknown: dict[str, None] = {}
    for path, module in list(model.named_modules()):
        kind = type(module)
        if not isinstance(kind, _NotHere):
            continue
        name = f"{kind.__module__}.{kind.__qualname__}"
        found = families.by_parts(module)
        if found is None:
            unknown[f"{name} ({kind.why})" if kind.why else name] = None
            continue
        family, block = found
        notes.append(
            f"{path or 'the model'}: {name} is not here, taken for {family} by its parts; its own code was not run to "
            "prove it"
        )
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child is module:
                    parent._modules[key] = block
        model = block if model is module else model
    return model, list(unknown)


def _not_here(path: Path, unknown: Sequence[str], trust: bool) -> UserError:
    ways = "Run from the directory of their code" + ("" if trust else " with --trust, which runs code from the file")
    return UserError(
        f"{path} needs classes that cannot be imported here: {_listed(unknown)}",
        f"{ways}; or name what builds a module that takes the weights: --arch package.module:factory",
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{', '.join(names[:8])}{more}"


# ---------------------------------------------------------------------------------------------------------------------
# Files that unpack to more than they are

_MOST_UNPACKED = 20  # times the size of the file; torch.save does not compress, and weights hardly can be


def _check_unpacked_size(path: Path) -> None:
    """Raises UserError for an archive that is small and says that it unpacks to something large."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > _MOST_UNPACKED * path.stat().st_size:
        raise _oversized(path, f"unpacks to {unpacked / 1e6:.0f} MB")


def _check_numbers(path: Path, state: Mapping[str, Any]) -> None:
    """Raises UserError where tensors are views that repeat few stored numbers many times: to convert one is to fill
    the memory."""
    numbers = sum(tensor.numel() for tensor in state.values())
    if numbers > _MOST_UNPACKED * path.stat().st_size:
        raise _oversized(path, f"holds tensors of {numbers:.1e} numbers")


def _oversized(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is {path.stat().st_size / 1e6:.1f} MB and {what}, which no checkpoint does",
        "Was it written by torch.save? Copy or download it again.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pickles

_MODULE_PACKAGES = ("torch.nn.", "ultralytics.nn.modules.", "ultralytics.nn.tasks.", "acmix_deploy.families.")


class _Nothing:
    """Stands for what is saved beside a model and not needed to run it."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_BESIDE_A_MODEL: dict[str, type] = {
    r"(argparse\.Namespace|ultralytics\.utils\.IterableSimpleNamespace)": SimpleNamespace,
    r"yacs\.config\.CfgNode": OrderedDict,
    r"numpy\.dtype": _Nothing,
    r"numpy\._?core\.multiarray\.scalar": _Nothing,
    r"pathlib\.(_local\.)?\w+Path": _Nothing,
    r"ultralytics\.utils\.(loss|tal)\.\w+": _Nothing,
}


# Tensors and containers, which every checkpoint names.
_PLAIN = re.compile(
    r"torch\.(\w*Storage|_utils\._rebuild_\w+|nn\.parameter\.Parameter|Size|device|b?float\w+|u?int\d+|bool)"
    r"|collections\.OrderedDict|_codecs\.encode|(__builtin__|builtins)\.set"
)


def _stand_in(name: str) -> type | None:
    """What a restricted load gives a pickle that names ``name``; None if that is refused."""
    from torch import nn

    if beside := _beside_a_model(name):
        return beside
    if not name.startswith(_MODULE_PACKAGES):
        return _stand_in_for_absent(name) if _is_absent(name) else None
    package, _, attribute = name.rpartition(".")
    if package.startswith("ultralytics."):
        yolo.ultralytics("nn.tasks")
    with suppress(ImportError, AttributeError):
        kind = getattr(import_module(package), attribute)
        if (
            isinstance(kind, type)
            and issubclass(kind, nn.Module)
            and f"{kind.__module__}.".startswith(_MODULE_PACKAGES)
        ):
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


# Allowed classes used as no module in today's format uses them: called, or stored with their source code.
_MISUSE = re.compile("the file calls the constructor|Only persistent_load of storage")


def _unpickle_restricted(path: Path) -> object:
    import torch

    names = _pickled_names(path)
    stand_ins = {name: stand_in for name in names if (stand_in := _stand_in(name)) is not None}
    refused = [name for name in names if name not in stand_ins]
    allowed: list[Any] = [(stand_in, name) for name, stand_in in stand_ins.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore")  # about other pickle protocols, which end in an error anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if refused or _MISUSE.search(str(error)):
            raise _untrusted(path, refused or names) from error
        raise _unreadable(path, error) from error
    except Exception as error:
        raise _unreadable(path, error) from error


def _unpickle_trusted(path: Path) -> object:
    import torch

    absent: list[str] = []

    class Unpickler(pickle.Unpickler):
        def find_class(self, package: str, attribute: str) -> Any:
            try:
                return super().find_class(package, attribute)
            except (ImportError, AttributeError) as error:
                name, why = f"{package}.{attribute}", reason(error)
                absent.append(f"{name} ({why})")
                return _beside_a_model(name) or _stand_in_for_absent(name, why)

    machine: Any = ModuleType("pickle")  # what torch takes in the place of that module
    machine.Unpickler = Unpickler
    machine.load = lambda file, **options: Unpickler(file, **options).load()
    try:
        with _importable_here():
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=machine)
    except Exception as error:
        raise (_not_here(path, absent, trust=True) if absent else _unreadable(path, error)) from error


def _pickled_names(path: Path) -> list[str]:
    """Names of classes and functions in the file, as far as it can be read; of those PyTorch itself does not allow."""
    import torch

    with suppress(Exception):
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
# Programs saved by torch.export

_PROGRAM_FILES = re.compile(
    r"models/\w+\.json|data/weights/(weight_\d+|\w+\.json)|data/constants/(tensor_\d+|\w+\.json)"
    r"|data/sample_inputs/\w+\.pt|archive_format|archive_version|byteorder|version|\.data/\w+|extra/.*"
)
_PROGRAM_NAMES = re.compile(r"[A-Z][A-Za-z]*|[a-z]+\d+|L|torch|max|min")
_PROGRAM_ATTRIBUTES = {"size", "stride", "storage_offset", "sym_max", "sym_min", "sym_float", "sym_int"}


def _load_program(path: Path, trust: bool) -> ExportedProgram:
    import torch

    try:
        refused = [] if trust else _code_in_program(path)
        if not refused:
            with _weights_only(not trust):
                return torch.export.load(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    raise _untrusted(path, refused)


@contextmanager
def _weights_only(enforced: bool) -> Iterator[None]:
    """Make every ``torch.load`` within a restricted one: ``torch.export.load`` asks for full ones."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    if enforced:
        os.environ[variable] = "1"
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


def _code_in_program(path: Path) -> list[str]:
    """What in a ``.pt2`` archive would run as code: files that are no weights, and sizes that are no arithmetic.

    PyTorch evaluates the expressions of symbolic sizes and of the guards on them, and loads pickled objects and
    compiled libraries from the archive.
    """
    found = []
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            inner = name.partition("/")[2]
            if not _PROGRAM_FILES.fullmatch(inner):
                found.append(inner or name)
            elif inner.startswith("models/"):
                found += [code for code in _expressions(json.loads(archive.read(name))) if not _is_arithmetic(code)]
    return found


def _expressions(node: Any, key: str = "") -> Iterator[str]:
    """Strings of a program's JSON that PyTorch evaluates."""
    if isinstance(node, str) and key in ("expr_str", "guards_code"):
        yield node
    elif isinstance(node, list):
        for entry in node:
            yield from _expressions(entry, key)
    elif isinstance(node, dict):
        if key == "range_constraints":
            yield from node
        for name, entry in node.items():
            yield from _expressions(entry, name)


def _is_arithmetic(code: str) -> bool:
    """Whether ``code`` only computes with sizes: operators, numbers, names of symbols and of sympy's classes."""
    kinds = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.Call, ast.keyword)
    signs = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context)
    try:
        nodes = list(ast.walk(ast.parse(code, mode="eval")))
    except SyntaxError:
        return False

    def harmless(node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return _PROGRAM_NAMES.fullmatch(node.id) is not None
        if isinstance(node, ast.Attribute):
            return node.attr in _PROGRAM_ATTRIBUTES
        if isinstance(node, ast.Constant):
            return not isinstance(node.value, str) or node.value.isidentifier()
        if isinstance(node, ast.Call) and not isinstance(node.func, (ast.Name, ast.Attribute)):
            return False
        return isinstance(node, kinds + signs)

    return all(map(harmless, nodes))
