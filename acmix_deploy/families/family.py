"""What a family of blocks is. No PyTorch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import onnx
import onnx_graphsurgeon as gs

from acmix_deploy.families.reduction import Reduced, Request
from acmix_deploy.graph import Region
from acmix_deploy.operators.spec import Operator, Tolerance

if TYPE_CHECKING:
    from acmix_deploy.families.search import Recogniser


class Match(Protocol):
    """The parts of one block in a graph; each family has its own."""

    @property
    def region(self) -> Region:
        """What is replaced."""


M = TypeVar("M", bound=Match)


@dataclass(frozen=True)
class Family(Generic[M]):
    """Blocks of one kind: how they are known in a graph and in a module, and what they are replaced by."""

    name: str
    """Also of its folder, and the beginning of the names of its fused blocks."""
    anchors: tuple[str, ...]
    """Types of the nodes to look for a block from."""
    match: Callable[[gs.Graph, gs.Node], M]
    """The block around an anchor, by structure alone. Raises NoMatch."""
    reduce: Callable[[M, Request], Reduced]
    """A matched block in its reduced form. Raises NoMatch where it computes something else than a block."""
    tolerances: Mapping[str, Tolerance]
    """How far a reduced block may be from the original, by the type of its output."""
    operators: tuple[tuple[Operator, Callable[[int], onnx.FunctionProto]], ...] = ()
    """The custom operators of the reduced form, with their bodies by opset."""
    reduce_grouped: Callable[[M, Request], Reduced] | None = None
    """Like ``reduce``, with the convolution branch over q, k and v, for families that have one over x."""

    @property
    def recogniser(self) -> Recogniser:
        """How its blocks are known in a module. It needs PyTorch, so it is imported when it is asked for."""
        found: Recogniser = import_module(f"{__package__}.{self.name}.recognise").RECOGNISER
        return found
