"""Blocks that were replaced, compared with the originals at every size that they will run at.

A block is proven equal on one random input when it is found (:mod:`acmix_deploy.families.search`). Its forward may
compute something else at another size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from acmix_deploy.families import FAMILIES, BlockReport
from acmix_deploy.families.search import relative_l2
from acmix_deploy.runtime.reason import reason
from acmix_deploy.runtime.torch import OnCpu

_SMALL = 16  # pixels; maps up to this side are tried where any size may come, and windows are rarely larger


def keep_proven(
    original: nn.Module,
    model: nn.Module,
    reports: Sequence[BlockReport],
    run: Callable[[], object],
    *,
    any_size: bool = False,
) -> tuple[nn.Module, list[BlockReport]]:
    """Put back, in place, every original block whose replacement computes something else.

    Args:
        original: the model as it was loaded, in float32.
        model: a copy of it in which ``reports`` says what was replaced.
        run: runs ``original`` at every shape that the model is to run at.
        any_size: whether it is to run at other heights and widths too: then small maps are tried as well, down to one
            pixel, as far as the original takes them.

    Returns:
        The model (another object where the model itself was a block), and the reports with what was put back.
    """
    proofs = {report.name: _Proof(original, model, report) for report in _replaced(model, reports)}
    hooks = [proof.module.register_forward_hook(proof.keep, with_kwargs=True) for proof in proofs.values()]
    try:
        if proofs:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    settled = []
    for report in reports:
        proof = proofs.get(report.name)
        if proof and (difference := proof.difference(any_size)):
            for path in _paths(report):
                model = _put(model, path, copy.deepcopy(proof.module))
            put_back: dict[str, Any] = {"status": "left alone", "reason": difference, "fault": "no-block"}
            put_back |= {"repaired": [], "geometry": None}
            settled.append(report.model_copy(update=put_back))
        else:
            settled.append(report)
    return model, settled


class _Call(NamedTuple):
    """What a block was given, and what it made of it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def shape(self) -> list[int]:
        """Of the first tensor that was given."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return next(([*leaf.shape] for leaf in leaves if isinstance(leaf, Tensor)), [])


class _Proof:
    """Original and replacement of one block, side by side."""

    def __init__(self, original: nn.Module, model: nn.Module, report: BlockReport) -> None:
        path = _paths(report)[0]
        self.module, self.replacement = original.get_submodule(path), model.get_submodule(path)
        (family,) = (family for family in FAMILIES if family.name == report.family)
        self._limit = family.tolerances["float32"].limit()
        self._calls: list[_Call] = []

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook of the original. What comes later may write into these tensors."""
        self._calls.append(_Call(*pytree.tree_map_only(Tensor, torch.clone, (args, kwargs, output))))

    def difference(self, any_size: bool) -> str:
        """Why the replacement is none, empty where it is one."""
        if not self._calls:
            return "the model does not call it as a module, so that nothing shows what it computes there"
        with torch.no_grad(), OnCpu():
            calls = chain(self._calls, self._on_small_maps() if any_size else ())
            return next(filter(None, map(self._compare, calls)), "")

    def _compare(self, call: _Call) -> str:
        name, shape = type(self.replacement).__name__, call.shape
        try:
            result = self.replacement(*call.args, **call.kwargs)
            if result.shape != call.output.shape:
                return f"on {shape} it gives {[*call.output.shape]} where {name} gives {[*result.shape]}"
            distance = relative_l2(result, call.output)
            if distance > self._limit:  # is it rounding?
                distance = self._in_float64(call)
        except Exception as error:
            return f"it takes {shape}, and {name} does not: {reason(error)}"
        if distance <= self._limit:
            return ""
        return f"on {shape} it differs from {name} by a relative L2 of {distance:.1e} (limit {self._limit:.0e})"

    def _in_float64(self, call: _Call) -> float:
        replacement, module = (copy.deepcopy(module).double() for module in (self.replacement, self.module))
        args, kwargs = pytree.tree_map_only(Tensor, _widened, (call.args, call.kwargs))
        return relative_l2(replacement(*args, **kwargs), module(*args, **kwargs))

    def _on_small_maps(self) -> Iterator[_Call]:
        """Calls with random maps of every small size that the original takes."""
        random = torch.Generator().manual_seed(0)
        for shape in self._small_shapes():
            x = torch.randn(shape, generator=random)
            try:
                output = self.module(x)
                sound = bool(output.isfinite().all())
            except Exception:  # it does not take this size
                continue
            if sound:
                yield _Call((x,), {}, output)

    def _small_shapes(self) -> Iterator[list[int]]:
        """Shapes of x with small heights and widths: the axes that differ from one image to another.

        There are none where the block is given more than x, which may have to be of the same size.
        """
        shapes = [call.shape for call in self._calls if len(call.args) == 1 and not call.kwargs]
        example = [*shapes[0]] if shapes else []
        follow = [axis for axis, size in enumerate(example) if axis and any(size != other[axis] for other in shapes)]
        for side in range(1, _SMALL + 1) if follow else ():
            for small in dict.fromkeys((tuple(follow), *((axis,) for axis in follow))):
                yield [side if axis in small else _SMALL if axis in follow else n for axis, n in enumerate(example)]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _replaced(model: nn.Module, reports: Sequence[BlockReport]) -> Iterator[BlockReport]:
    """Those of the blocks that stand in the model: one inside another that was replaced is gone."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return (report for report in reports if report.status == "replaced" and _paths(report)[0] in modules)


def _paths(report: BlockReport) -> list[str]:
    return report.name.split(", ")


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model
