"""Swin's ACmix blocks inside any module."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from acmix_deploy.families.layout import ChannelsLast
from acmix_deploy.families.search import NotABlock, Proposal, Recogniser
from acmix_deploy.families.swin_acmix.graph import SWIN_ACMIX
from acmix_deploy.families.swin_acmix.module import SwinACmix, relative_positions
from acmix_deploy.faults import FaultId
from acmix_deploy.process import WHOLE_PROCESS


def _propose(module: nn.Module) -> Proposal:
    """A block is a module with linear layers for q, k, v and for the attention, the convolution of the maps, the
    grouped 3x3 convolution, two rates and a table of relative position bias."""
    layers = _layers(module)
    dep_conv = layers["dep_conv"]
    heads, dim = dep_conv.out_channels // dep_conv.groups, dep_conv.out_channels
    table = _table(module, heads)
    window_size = (math.isqrt(len(table)) + 1) // 2
    usual = (dim // heads) ** -0.5
    declared = getattr(module, "scale", None)
    scales = [float(declared)] if isinstance(declared, (int, float)) else []
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2 * window_size, 3 * window_size, dim, generator=random)
    calls = _calls(module, window_size, random)
    faults: dict[FaultId, bool] = {
        "no-bias": dep_conv.bias is None,
        "traced-batch": _freezes_the_batch(module, x, calls[-1]),
    }
    return Proposal(
        candidates=[_assemble(module, layers, table, window_size, scale) for scale in dict.fromkeys((*scales, usual))],
        x=x,
        calls=calls,
        repaired=[fault for fault, present in faults.items() if present],
    )


def _resembles(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    return {"qkv", "dep_conv"} <= parts


def _layers(module: nn.Module) -> dict[str, Any]:
    """The block's layers under their published names, found by shape. Raises NotABlock."""
    convolutions = [child for child in module.children() if isinstance(child, nn.Conv2d)]
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]

    def take(meaning: str, found: list[Any], fits: Callable[[Any], bool]) -> Any:
        layer = next(filter(fits, found), None)
        if layer is None:
            raise NotABlock(f"it has no {meaning}")
        return layer

    dep_conv = take(
        "3x3 convolution of 9 * head_dim channels in head_dim groups",
        convolutions,
        lambda c: (c.kernel_size, c.stride, c.padding) == ((3, 3), (1, 1), (1, 1)) and c.in_channels == 9 * c.groups,
    )
    dim = dep_conv.out_channels
    heads = dim // dep_conv.groups
    shape = (3 * heads, 9, (1, 1))
    fc = take(
        f"1x1 convolution from 3 * {heads} maps to 9 with a bias",
        convolutions,
        lambda c: (c.in_channels, c.out_channels, c.kernel_size) == shape and c.bias is not None,
    )
    qkv = take(
        f"linear layer from {dim} to 3 * {dim}", linears, lambda c: (c.in_features, c.out_features) == (dim, 3 * dim)
    )
    proj = take(
        f"linear layer from {dim} to {dim} with a bias",
        linears,
        lambda c: c.in_features == c.out_features == dim and c.bias is not None,
    )
    return {"qkv": qkv, "proj": proj, "fc": fc, "dep_conv": dep_conv}


def _table(module: nn.Module, heads: int) -> nn.Parameter:
    """The relative position bias, [(2 * side - 1) ** 2, heads]. Raises NotABlock."""
    for parameter in module.parameters(recurse=False):
        if parameter.dim() == 2 and parameter.shape[1] == heads:
            side = math.isqrt(len(parameter))
            if side**2 == len(parameter) and side % 2:
                return parameter
    raise NotABlock(f"it has no table of position bias for {heads} heads in a square window")


def _calls(module: nn.Module, window_size: int, random: torch.Generator) -> list[tuple[Any, ...]]:
    """How the forward of a block may be called, after x of 2 x 3 windows, with a random mask. Raises NotABlock."""
    taken = list(inspect.signature(module.forward).parameters)[1:]
    own = list(inspect.signature(SwinACmix.forward).parameters)[2:]
    if taken != own[: len(taken)]:
        raise NotABlock(f"its forward takes ({', '.join(['x', *taken])}), not (x, {', '.join(own)})")
    size = (2 * window_size, 3 * window_size)
    apart = torch.rand(6, window_size**2, window_size**2, generator=random) < 0.5
    calls: dict[int, tuple[Any, ...]] = {0: (), 2: size, 3: (*size, -100.0 * apart.float())}
    return [arguments for count, arguments in calls.items() if count == len(taken) or (count, len(taken)) == (2, 3)]


def _freezes_the_batch(module: nn.Module, x: Tensor, call: tuple[Any, ...]) -> bool:
    """Whether what a trace records of one image fails on two, as where ``int`` makes a number of a shape."""
    module = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    with WHOLE_PROCESS, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about that number
        for original in (module, ChannelsLast(module)):
            try:
                traced: Any = torch.jit.trace(_with(original, call), x[:1], check_trace=False)  # type: ignore[no-untyped-call]
            except Exception:  # the module's own: it says so itself when it is run
                continue
            try:
                return bool(traced(x).shape != x.shape)
            except RuntimeError:
                return True
    return False


def _with(module: nn.Module, call: tuple[Any, ...]) -> Callable[[Tensor], Any]:
    return lambda x: module(x, *call)


def _assemble(
    module: nn.Module, layers: dict[str, Any], table: nn.Parameter, window_size: int, scale: float
) -> SwinACmix:
    """A SwinACmix that holds these parameters themselves, no copies. Raises NotABlock for want of rates."""
    rates = [parameter for parameter in module.parameters(recurse=False) if parameter.shape == (1,)]
    if len(rates) != 2:
        raise NotABlock(f"it has {len(rates)} parameters of shape (1,), not the two rates of its branches")
    dim, heads = layers["dep_conv"].out_channels, table.shape[1]
    with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
        block = SwinACmix(dim, window_size, heads, qk_scale=scale)
    for name, layer in layers.items():
        target = getattr(block, name)
        target.weight, target.bias = layer.weight, layer.bias
    block.relative_position_bias_table = table
    block.rate1, block.rate2 = rates
    block.relative_position_index = relative_positions(window_size).to(table.device)
    return block


RECOGNISER = Recogniser(
    family=SWIN_ACMIX,
    block=SwinACmix,
    geometry=("dim", "window_size", "num_heads", "shift_size"),
    propose=_propose,
    resembles=_resembles,
    channels_last=True,
)
