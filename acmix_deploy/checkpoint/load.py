"""What a file holds, and the module that is made of it."""

from __future__ import annotations

import re
import textwrap
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmix_deploy import families, yolo
from acmix_deploy.checkpoint.pickles import NotHere, importable, named_beside_a_model, unpickle
from acmix_deploy.checkpoint.programs import load_program
from acmix_deploy.checkpoint.refusals import not_here, unusable
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import AcmixDeployError, MissingComponent, UserError
from acmix_deploy.files import expect
from acmix_deploy.options import HeadChoice, check_code
from acmix_deploy.runtime.reason import reason

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram


@dataclass(frozen=True)
class LoadedModel:
    """What a file held.

    Attributes:
        module: in eval mode, in float32, on the CPU; or the program of a ``.pt2`` file, as it was saved.
        metadata: what serving needs to know; empty where nothing is known.
        notes: what was chosen or changed on the way.
        by_parts: paths of the blocks that a family's own module stands for, since their class is not here.
    """

    module: nn.Module | ExportedProgram
    metadata: ModelMetadata = field(default_factory=ModelMetadata)
    notes: tuple[str, ...] = ()
    by_parts: tuple[str, ...] = ()


def load(
    path: str | Path,
    *,
    arch: str | None = None,
    head: HeadChoice | None = None,
    trust: bool = False,
    code: Path | None = None,
) -> LoadedModel:
    """Load a pickled module, an Ultralytics checkpoint, a state dict, or a program saved by ``torch.export``.

    A module whose class cannot be imported is a block of a family if its parts leave no doubt, which a note says.

    Args:
        path: the file. A dict's ``ema`` is preferred to its ``model``; a state dict is the file itself or its
            ``ema``, ``state_dict`` or ``model``, with or without ``module.`` before its names.
        arch: ``package.module:factory``, called without arguments for the module that a state dict belongs to, or a
            pickled module with classes that cannot be imported. The current directory is searched too.
        head: of an Ultralytics detector with two; by default the one that the checkpoint sets.
        trust: load with an ordinary unpickler, which runs code from the file.
        code: with ``trust``, the folder of the code that the file needs, searched before all others. What is imported
            from there stays imported, under names as common as ``models`` and ``utils``: one process, one such folder.

    Raises:
        UserError: not such a file, one that needs ``trust``, ``code`` or ``arch``, or one that does not fit ``arch``.
        MissingComponent: PyTorch, or Ultralytics for a file that needs it, is not installed.
    """
    path = Path(path)
    contents = read(path, trust=trust, code=code)
    model, notes = contents.model, [*contents.notes]
    if contents.program:
        return LoadedModel(model)
    if contents.unknown and not arch:
        raise not_here(path, contents.unknown, code, getattr(model, "saved_by", ""))
    by_parts = contents.by_parts
    if model is None or contents.unknown:
        by_parts = ()
        notes += [f"the weights of {name} put into what --arch makes" for name in contents.unknown]
        model = _fill(path, arch, contents.state, code)
    elif arch:
        notes.append(f"--arch {arch} is not needed: the file holds a whole module")
    from torch import nn

    try:
        model = model.float().eval()
        for layer in model.modules():
            if type(layer) is nn.Upsample:  # PyTorch below 1.11 had no such setting
                vars(layer).setdefault("recompute_scale_factor", None)
        chosen = yolo.keep_head(model, getattr(model, "saved_by", "").rpartition(" ")[2], head)
        metadata = yolo.detection_metadata(model)
    except AcmixDeployError:
        raise
    except Exception as error:
        raise unusable(path, error) from error
    notes += [chosen] * bool(chosen)
    notes += [f"weights converted from {name} to float32" for name in contents.types if name != "float32"]
    return LoadedModel(model, metadata, tuple(notes), by_parts)


@dataclass(frozen=True)
class Contents:
    """What a file holds, as it was saved.

    Attributes:
        model: a module, which may have classes that are not here; the program of a ``.pt2`` file; None for weights
            alone.
        state: its parameters and buffers, with the names that they have in the file.
        unknown: names of its classes that cannot be imported and are no known blocks.
        by_parts: paths of blocks whose classes cannot be imported and that are known by their parts.
        beside: names in the pickle for which an inert object was taken, such as a configuration.
        notes: what was chosen on the way.
        program: whether the model is the program of a ``.pt2`` file.
    """

    model: Any
    state: Mapping[str, Tensor] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    by_parts: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    program: bool = False

    @property
    def types(self) -> tuple[str, ...]:
        """The floating-point types of its tensors, by name."""
        types = {tensor.dtype for tensor in self.state.values() if tensor.is_floating_point()}
        return tuple(sorted(str(kind).removeprefix("torch.") for kind in types))


def read(path: Path, *, trust: bool = False, code: Path | None = None) -> Contents:
    """What is in a file that :func:`load` takes; the same limits hold, and nothing is converted.

    Raises:
        UserError: not such a file, or one that needs ``trust`` or ``code``.
        MissingComponent: see :func:`load`.
    """
    check_code(code, trust)
    kind = expect(path, "checkpoint", "program")
    try:
        from torch import nn
    except ModuleNotFoundError as error:
        raise MissingComponent(
            "PyTorch is needed to load a checkpoint and is not installed", "Run: pip install 'acmix-deploy[export]'"
        ) from error
    if kind == "program":
        return Contents(load_program(path, trust=trust), program=True)
    _check_unpacked_size(path)
    model, notes = _find_model(path, unpickle(path, trust=trust, code=code))
    unknown: list[str] = []
    by_parts: list[str] = []
    state = model
    try:
        if isinstance(model, nn.Module):
            model, by_parts, unknown = _blocks_by_parts(model, notes)
            state = model.state_dict()
        _check_numbers(path, state)
    except UserError:
        raise
    except Exception as error:
        raise unusable(path, error) from error
    module = model if isinstance(model, nn.Module) else None
    return Contents(module, state, tuple(unknown), tuple(by_parts), named_beside_a_model(path), tuple(notes))


# ---------------------------------------------------------------------------------------------------------------------
# What was unpickled


def _find_model(path: Path, loaded: object) -> tuple[Any, list[str]]:
    """The module, else the state dict, in what was unpickled, and notes on the choice."""
    from torch import nn

    notes = []
    model: Any = loaded
    if isinstance(loaded, Mapping):
        choices = [key for key in ("ema", "model", "state_dict") if isinstance(loaded.get(key), nn.Module)]
        choices += [key for key in ("ema", "state_dict", "model") if _is_state_dict(loaded.get(key))]
        if choices:
            model = loaded[choices[0]]
            notes += [f"took '{key}' from the checkpoint" for key in choices[:1] if key == "ema"]
        if isinstance(model, nn.Module) and isinstance(loaded.get("train_args"), dict):
            model.args = loaded["train_args"]  # where Ultralytics itself keeps them: the image size is among them
        elif isinstance(model, nn.Module) and isinstance(loaded.get("opt"), dict) and not hasattr(model, "args"):
            model.args = loaded["opt"]  # the same of YOLOv5 and YOLOv9
        version = str(loaded.get("version"))
        if type(model).__module__.startswith("ultralytics.") and re.fullmatch(r"\d[\w.+]{,31}", version):
            model.saved_by = f"ultralytics {version}"
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


def _fill(path: Path, arch: str | None, state: Mapping[str, Any], code: Path | None) -> nn.Module:
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
        with importable(code):
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


def _blocks_by_parts(model: nn.Module, notes: list[str]) -> tuple[nn.Module, list[str], list[str]]:
    """Put a family's own module in the place of each that is one by its parts and whose class is not here.

    Returns:
        The model, another object where it was such a block itself, the paths of what was replaced, and the names of
        classes that stay unknown.
    """
    replaced: list[str] = []
    unknown: dict[str, None] = {}
    for path, module in list(model.named_modules()):
        kind = type(module)
        if not isinstance(kind, NotHere):
            continue
        name = f"{kind.__module__}.{kind.__qualname__}"
        found = families.by_parts(module)
        if found is None:
            unknown[f"{name} ({kind.why})" if kind.why else name] = None
            continue
        family, block = found
        replaced.append(path or "the model")
        notes.append(
            f"{path or 'the model'}: {name} is not here, taken for {family} by its parts; its own code was not run to "
            "prove it"
        )
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child is module:
                    parent._modules[key] = block
        model = block if model is module else model
    return model, replaced, list(unknown)


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
