"""Blocks inside any module, known by their parts and their results: names and class names prove nothing.

A family says what a module's replacement would be; here replacement and original are compared, and swapped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from acmix_deploy.families import BlockReport
from acmix_deploy.families.family import Family
from acmix_deploy.families.layout import ChannelsFirst, ChannelsLast
from acmix_deploy.faults import FaultId
from acmix_deploy.graph import Reached
from acmix_deploy.runtime.reason import reason
from acmix_deploy.runtime.torch import OnCpu

_LAYER_ATTRIBUTES = ("i", "f", "type", "np")  # what Ultralytics sets on a layer: index, inputs, class name, size


class NotABlock(Exception):
    """Why a module is no block of a family.

    Args:
        reason: in words, for the report.
        reached: how close it came.
        fault: the known fault that is the reason, if it is one.
    """

    def __init__(self, reason: str, reached: Reached = Reached.NOTHING, fault: FaultId = "no-block") -> None:
        super().__init__(reason)
        self.reached = reached
        self.fault: FaultId = fault


@dataclass(frozen=True)
class Proposal:
    """What a module may be replaced by, if it computes the same."""

    candidates: Sequence[nn.Module]
    """Blocks of the family's own class, the likeliest first. They hold the original's parameters themselves, or new
    ones made from them where the family lays them out otherwise: joined, reordered or computed."""
    x: Tensor
    """Random input to compare on, float32."""
    calls: Sequence[tuple[Any, ...]] = ((),)
    """What follows x in each call to compare."""
    repaired: Sequence[FaultId] = ()
    """Faults of the original, as its parts tell them."""
    refusals: Sequence[str] = field(default=())
    """Why likelier candidates could not be built."""
    fault: FaultId = "no-block"
    """The known fault that they are."""


@dataclass(frozen=True)
class Recogniser:
    """How blocks of one family are known in a module."""

    family: Family[Any]
    block: type[nn.Module]
    """The family's own module."""
    geometry: tuple[str, ...]
    """Its constructor's arguments, each an attribute of the block: an integer, or None, which is not reported."""
    propose: Callable[[nn.Module], Proposal]
    """What a module may be replaced by. Raises NotABlock."""
    resembles: Callable[[nn.Module], bool]
    """Whether a person would take a module for such a block by its parts, so that it is worth saying why it is none."""
    parameterless: tuple[type[nn.Module], ...] | None = None
    """What a published block has for children beside those with parameters; None where its parts alone leave a doubt
    whose block it is."""
    channels_last: bool = False
    """Whether the block takes [B, H, W, C], not [B, C, H, W]. A module that takes the other is one too, permuted."""
    called: str = ""
    """What the name of such a class has in it, in lower case and without underscores, if names tell a person so."""

    def canonicalise(self, model: nn.Module) -> tuple[nn.Module, list[BlockReport]]:
        """Swap, in place, each block of ``model`` for the family's own module with the same weights, proven equal.

        A module is swapped if it and a candidate agree on random input: in float64 if the original runs in it, else in
        float32 or in its own type, and with whatever it sends to CUDA kept on the CPU. The replacement has the
        parameters of a :class:`Proposal`, of the original's type and on its device, its mode and what Ultralytics notes
        on a layer.

        Returns:
            The model (another object where the model itself was a block), and a report for each block and for each
            module that only resembles one.
        """
        paths: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(path)
        replacements: dict[nn.Module, nn.Module] = {}
        reports: dict[nn.Module, BlockReport] = {}
        for module, its_paths in paths.items():
            report = BlockReport(
                name=", ".join(its_paths), class_name=type(module).__name__, family=self.family.name, status="canonical"
            )
            try:
                if type(module) is not self.block:
                    replacements[module], report.repaired = self._replacement(module)
                    report.status = "replaced"
                block = replacements.get(module, module)
                block = block.block if isinstance(block, (ChannelsFirst, ChannelsLast)) else block
                arguments = ((name, getattr(block, name)) for name in self.geometry)
                report.geometry = {name: int(value) for name, value in arguments if value is not None}
            except NotABlock as why:
                seen = self._resembles(module)
                if not seen:
                    continue
                report.status, report.reason, report.fault = "left alone", str(why), why.fault
                report.reached = max(seen, why.reached)
            reports[module] = report

        containers = {module for module in reports if any(part in reports for part in list(module.modules())[1:])}
        for parent in paths:
            for name, child in list(parent._modules.items()):
                if child in replacements:
                    setattr(parent, name, replacements[child])
        found = [report for module, report in reports.items() if module not in containers]
        return replacements.get(model, model), found

    def by_parts(self, module: nn.Module) -> nn.Module | None:
        """The block that ``module`` is by its parts, for one whose code is not here; None where they leave a doubt.

        Needed are parameters under the family's own names, a geometry that the module states itself, and no
        child that the published block does not have.
        """
        if self.parameterless is None:
            return None
        try:
            candidates = self.propose(module).candidates
        except NotABlock:
            return None
        others = [child for child in module.children() if not list(child.parameters())]
        fitting = [
            block
            for block in candidates
            if all(getattr(module, name, None) == getattr(block, name) for name in self.geometry)
        ]
        if not fitting or not all(isinstance(child, self.parameterless) for child in others):
            return None
        kept = {name: tensor.data_ptr() for name, tensor in fitting[0].state_dict().items()}
        if any(kept.get(name) != tensor.data_ptr() for name, tensor in module.state_dict().items()):
            return None
        return self._dressed(fitting[0], module)

    def _resembles(self, module: nn.Module) -> Reached:
        """How close a module that is no block comes at first sight."""
        try:
            if self.resembles(module):
                return Reached.PARTS
        except Exception:  # parts of any kind
            return Reached.NOTHING
        named = self.called and self.called in type(module).__name__.lower().replace("_", "")
        return Reached.KIND if named else Reached.NOTHING

    @staticmethod
    def _dressed(block: nn.Module, module: nn.Module) -> nn.Module:
        """``block`` with the mode of ``module`` and with what Ultralytics notes on a layer."""
        for name in _LAYER_ATTRIBUTES:
            if hasattr(module, name):
                setattr(block, name, getattr(module, name))
        return block.train(module.training)

    def _replacement(self, module: nn.Module) -> tuple[nn.Module, list[FaultId]]:
        """The block of this family that computes what ``module`` does, and what it repairs. Raises NotABlock."""
        try:
            proposal = self.propose(module)
        except NotABlock:
            raise
        except Exception as error:  # parts of any kind, such as weights that are computed or not there yet
            raise NotABlock(f"its parts are none of a block: {reason(error)}") from error
        own_dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
        reasons, failures = [*proposal.refusals], []
        turned, back = (ChannelsLast, ChannelsFirst) if self.channels_last else (ChannelsFirst, ChannelsLast)
        for original in (module, turned(module)):
            try:
                expected, faults = run_original(original, proposal, own_dtype)
            except Exception as error:
                failures.append(error)
                continue
            block, difference = self._equal(proposal, expected)
            difference = difference or self._differs_elsewhere(original, block, proposal, expected[0].dtype)
            if block and not difference:
                block = block if original is module else back(block)
                return self._dressed(block, module), [*faults, *proposal.repaired]
            reasons.append(difference)
        if len(reasons) > len(proposal.refusals):
            raise NotABlock(reasons[0], Reached.WHOLE, proposal.fault)
        failure = f"its own forward fails: {type(failures[0]).__name__}: {str(failures[0]).splitlines()[0]}"
        raise NotABlock("; ".join([*reasons, failure]), Reached.WHOLE, proposal.fault) from failures[0]

    def _differs_elsewhere(
        self, original: nn.Module, block: nn.Module | None, proposal: Proposal, dtype: torch.dtype
    ) -> str:
        """How ``block`` differs on more and larger maps, where ``original`` takes them; empty where it does not."""
        if block is None or proposal.x.dim() != 4 or any(proposal.calls):
            return ""
        shape = [*proposal.x.shape]
        shape[0] += 1
        for axis in (1, 2) if self.channels_last else (2, 3):
            shape[axis] *= 2
        larger = replace(proposal, x=torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        try:
            with OnCpu():
                expected = _run(original, larger, dtype)
        except Exception:  # it is for one size
            return ""
        return self._equal(replace(larger, candidates=[block]), expected)[1]

    def _equal(self, proposal: Proposal, expected: Sequence[Tensor]) -> tuple[nn.Module | None, str]:
        """The candidate that gives what is expected, else how the likeliest differs."""
        dtype = expected[0].dtype
        half = dtype in (torch.float16, torch.bfloat16)
        limit = self.family.tolerances["float16" if half else "float32"].limit()
        differences = []
        for block in proposal.candidates:
            arguments = ", ".join(f"{name}={getattr(block, name)}" for name in self.geometry)
            candidate = f"{self.block.__name__}({arguments})"
            try:
                results = _run(block, proposal, dtype)
            except Exception as error:  # parts of another stride or padding than the block's own
                differences.append(f"it takes {[*proposal.x.shape]}, and {candidate} does not: {reason(error)}")
                continue
            distance = float(np.max([*map(relative_l2, results, expected)]))  # NaN where one is
            if distance <= limit:
                return block, ""
            differences.append(
                f"on random input it differs from {candidate} by a relative L2 of {distance:.1e} (limit {limit:.0e})"
                if math.isfinite(distance)
                else f"it gives {_shapes(expected)} where {candidate} gives {_shapes(results)}"
            )
        return None, differences[0]


def _run(module: nn.Module, proposal: Proposal, dtype: torch.dtype) -> list[Tensor]:
    """What a copy of ``module`` in ``dtype`` on the CPU makes of each of the proposal's calls."""
    module = copy.deepcopy(module).cpu().to(dtype).eval()
    with torch.no_grad():
        results = [
            module(*(value.to(dtype) if isinstance(value, Tensor) else value for value in (proposal.x, *call)))
            for call in proposal.calls
        ]
    if not all(isinstance(result, Tensor) for result in results):
        raise TypeError(f"it returns a {type(results[0]).__name__}, not a tensor")
    return results


def run_original(module: nn.Module, proposal: Proposal, own_dtype: torch.dtype) -> tuple[list[Tensor], list[FaultId]]:
    """The block's own results, in the widest type that it runs in, and the faults seen. Raises what the block does."""
    failures: dict[torch.dtype, Exception] = {}
    results = {}
    with OnCpu() as watch:
        for dtype in dict.fromkeys((torch.float64, torch.float32, own_dtype)):
            try:
                results[dtype] = _run(module, proposal, dtype)
            except Exception as failure:
                failures[dtype] = failure
    if not results:
        raise failures[torch.float32]
    faults = list(watch.faults)
    if own_dtype in failures:
        faults.append("float32-position")
    return next(iter(results.values())), faults


def _shapes(results: Sequence[Tensor]) -> str:
    return ", ".join(str([*result.shape]) for result in results)


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, infinite for tensors of unlike shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
