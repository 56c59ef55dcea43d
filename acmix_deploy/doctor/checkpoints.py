"""Known faults of checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acmix_deploy import families
from acmix_deploy.checkpoint import Contents, read
from acmix_deploy.doctor.diagnosis import Examination, Finding
from acmix_deploy.doctor.faults import FAULTS

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = ("conv_p.weight", "fc.weight", "dep_conv.weight", "rate1", "rate2")  # of an ACmix, in a state dict


def examine_checkpoint(path: Path, trust: bool, code: Path | None, progress: Callable[[str], None]) -> Examination:
    """What a checkpoint holds and which faults it has. Raises what :func:`acmix_deploy.checkpoint.read` does."""
    contents = read(path, trust=trust, code=code)
    blocks: list[families.BlockReport] = []
    findings, notes = [], [*contents.notes]
    if contents.program:
        notes.append("blocks of a program are recognised once it is an ONNX file")
    elif contents.unknown:
        findings.append(Finding.of("missing-class", f"{', '.join(contents.unknown)} cannot be imported here"))
    elif contents.model is not None:
        progress("comparing its blocks with known ones")
        _, blocks = families.canonicalise(copy.deepcopy(contents.model))
        findings += [finding for block in blocks for finding in _of_block(block)]
    if contents.model is None or contents.unknown:
        findings += _of_state(contents.state)
    if contents.model is None and contents.beside:
        findings.append(Finding.of("blocked-load", f"{', '.join(contents.beside)} beside the weights"))
    return Examination(
        path=path,
        kind="checkpoint",
        contents=_described(contents),
        module_blocks=tuple(blocks),
        findings=tuple(findings),
        notes=tuple(notes),
    )


def _described(contents: Contents) -> dict[str, str]:
    state = contents.state
    model: Any = contents.model
    kind = f"{type(model).__module__}.{type(model).__qualname__}" if model is not None else "weights alone"
    told = {"holds": kind}
    if state:
        told["numbers"] = f"{sum(tensor.numel() for tensor in state.values())} in {len(state)} tensors"
        told["types"] = ", ".join(contents.types)
    if model is None:
        told["to export it"] = "--arch package.module:factory names what builds the module"
        if all(name.startswith("module.") for name in state):
            told["names"] = "begin with module., which is dropped"
        if blocks := [*_blocks(state)]:
            told["ACmix by its names"] = ", ".join(block or "the model itself" for block in blocks)
    return told


def _of_block(block: families.BlockReport) -> Iterator[Finding]:
    name = block.name or "the model"
    for fault in block.repaired:
        yield Finding.of(fault, FAULTS[fault].of_block, name)
    if block.fault:
        yield Finding.of(block.fault, f"{block.class_name} is left alone: {block.reason}", name)


def _blocks(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Paths of what has the parts of an ACmix."""
    for name in state:
        if name == _PARTS[0] or name.endswith(f".{_PARTS[0]}"):
            prefix = name.removesuffix(_PARTS[0])
            if all(f"{prefix}{part}" in state for part in _PARTS):
                yield prefix.removesuffix(".")


def _of_state(state: Mapping[str, Tensor]) -> Iterator[Finding]:
    """Faults of the blocks in a state dict, as far as tensors tell them."""
    for block in _blocks(state):
        prefix = f"{block}." if block else ""
        if f"{prefix}dep_conv.bias" not in state:
            yield Finding.of("no-bias", "there is no dep_conv.bias", block or "the model")
        if state[f"{prefix}rate1"].dim() == 0:
            yield Finding.of("scalar-rates", "rate1 and rate2 are scalars", block or "the model")
