"""What can be deployed: one folder a family of blocks, named in ``FAMILIES``.

A family's folder holds ``module`` (the block, needs torch), ``recognise`` (its blocks in a module, needs torch) and
``graph`` (its blocks in an ONNX graph, without torch). Each is imported when it is asked for, by :func:`part`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel

if TYPE_CHECKING:
    from torch import nn

FAMILIES: tuple[str, ...] = ("acmix",)


class BlockReport(BaseModel):
    """What became of one block, or of a module that looked like one."""

    name: str
    """Its path in the model, e.g. ``model.16``; a block used in several places has the paths joined by ``, ``."""
    class_name: str
    family: str
    status: Literal["canonical", "replaced", "left alone"]
    reason: str = ""
    """Why it was left alone."""
    repaired: list[str] = []
    """Faults of the original that the replacement does not have."""
    geometry: dict[str, int] | None = None
    """The arguments that the family's own module is built with."""


def part(family: str, name: Literal["module", "recognise", "graph"]) -> ModuleType:
    """The submodule ``name`` of a family, imported now."""
    return import_module(f"{__name__}.{family}.{name}")


def canonicalise(model: nn.Module) -> tuple[nn.Module, list[BlockReport]]:
    """Swap, in place, every block of every family for the family's own module, proven equal.

    Returns:
        The model (another object where the model itself was a block), and a report for each block found.
    """
    reports: list[BlockReport] = []
    for family in FAMILIES:
        model, found = part(family, "recognise").canonicalise(model)
        reports += found
    return model, reports
