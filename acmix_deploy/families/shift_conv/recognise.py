"""1x1 convolutions with fixed shifts inside any module, as the ShiftConv that they are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor, nn

from acmix_deploy.families.search import NotABlock, Proposal, Recogniser
from acmix_deploy.families.shift_conv.algebra import (
    UNSHIFTED,
    OneConvolution,
    collapse,
    is_shift,
    read_shifts,
)
from acmix_deploy.families.shift_conv.graph import SHIFT_CONV
from acmix_deploy.families.shift_conv.module import ShiftConv
from acmix_deploy.graph import Array, NoMatch

_SIDE = 24  # of the maps that shifts are measured on, in pixels
_USUAL_TAPS = (9, 25, 49)  # tried where no convolution tells how many maps shifts make of one
_WITHOUT_WEIGHTS = (nn.Identity, nn.ZeroPad2d)


def _propose(module: nn.Module) -> Proposal:
    """A block is a module with nothing but 1x1 convolutions of its input, or one of shifted maps, and fixed shifts."""
    pointwise, shifts = _parts(module)
    inputs = pointwise[0].in_channels
    forms = [(_maps_behind, inputs)]
    if len(pointwise) == 1:
        unshifted = [conv.in_channels for conv in shifts] or [inputs // t for t in _USUAL_TAPS if inputs % t == 0]
        forms += [(_maps_before, channels) for channels in unshifted]
    refusals = []
    for maps, channels in forms:
        try:
            one = maps(module, channels)
        except (NoMatch, NotABlock) as reason:
            refusals.append(str(reason))
            continue
        x = torch.randn(2, channels, 9, 12, generator=torch.Generator().manual_seed(0))
        return Proposal(candidates=[_assemble(one, pointwise[0].weight)], x=x)
    raise NotABlock(next((reason for reason in refusals if reason != UNSHIFTED), UNSHIFTED))


def _resembles(module: nn.Module) -> bool:
    with suppress(NotABlock):
        return bool(_parts(module)[1])
    return False


def _parts(module: nn.Module) -> tuple[list[nn.Conv2d], list[nn.Conv2d]]:
    """The 1x1 convolutions, all of as many channels, and the convolutions that shift. Raises NotABlock."""
    pointwise, shifts = [], []
    for child in module.children():
        for part in child if isinstance(child, nn.ModuleList) else [child]:
            if isinstance(part, nn.Conv2d) and _is_pointwise(part):
                pointwise.append(part)
            elif isinstance(part, nn.Conv2d) and is_shift(part.weight.detach().cpu().numpy()):
                shifts.append(part)
            elif not isinstance(part, _WITHOUT_WEIGHTS):
                raise NotABlock(f"it has a {type(part).__name__} that is neither a 1x1 convolution nor a shift")
    if len({conv.in_channels for conv in pointwise}) != 1:
        raise NotABlock("it has no 1x1 convolutions of one number of channels")
    return pointwise, shifts


def _is_pointwise(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)


def _maps_behind(module: nn.Module, channels: int) -> OneConvolution:
    """The block as 1x1 convolutions of its input with shifts behind them. Raises NoMatch or NotABlock."""
    module = copy.deepcopy(module).cpu().float().eval()
    pointwise, _ = _parts(module)
    widths = [conv.out_channels for conv in pointwise]
    x = torch.zeros(1, channels, _SIDE, _SIDE)

    def run(maps: Array) -> Array:
        parts = torch.split(torch.from_numpy(maps), widths, 1)
        hooks = [
            conv.register_forward_hook(lambda *_, part=part: part) for conv, part in zip(pointwise, parts, strict=True)
        ]
        try:
            return _call(module, x).numpy()
        finally:
            for hook in hooks:
                hook.remove()

    shifts = read_shifts(run, (1, sum(widths), _SIDE, _SIDE))
    return collapse(*_weights(pointwise), shifts, shifts_first=False)


def _maps_before(module: nn.Module, channels: int) -> OneConvolution:
    """The block as one 1x1 convolution of what shifts make of its input. Raises NoMatch or NotABlock."""
    module = copy.deepcopy(module).cpu().float().eval()
    (pointwise,), _ = _parts(module)
    seen: list[Tensor] = []
    pointwise.register_forward_pre_hook(lambda conv, inputs: seen.append(inputs[0]))

    def run(maps: Array) -> Array:
        seen.clear()
        _call(module, torch.from_numpy(maps))
        if len(seen) != 1:
            raise NotABlock(f"its 1x1 convolution runs {len(seen)} times")
        return seen[0].numpy()

    shifts = read_shifts(run, (1, channels, _SIDE, _SIDE))
    return collapse(*_weights([pointwise]), shifts, shifts_first=True)


def _call(module: nn.Module, x: Tensor) -> Tensor:
    """The result of a module of anyone's. Raises NotABlock where it fails or is no tensor."""
    try:
        with torch.no_grad():
            y = module(x)
    except Exception as error:
        raise NotABlock(f"its own forward fails: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    if not isinstance(y, Tensor):
        raise NotABlock(f"its result is a {type(y).__name__}, not a map")
    return y


def _weights(pointwise: Sequence[nn.Conv2d]) -> tuple[Array, Array]:
    """Weights [M, C] and biases [M] of 1x1 convolutions, one below the other."""
    weights = [conv.weight.detach().numpy()[:, :, 0, 0] for conv in pointwise]
    biases = [np.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().numpy() for conv in pointwise]
    return np.concatenate(weights), np.concatenate(biases)


def _assemble(one: OneConvolution, like: Tensor) -> ShiftConv:
    """A ShiftConv that computes ``one``, of the type and on the device of ``like``."""
    out_channels, in_channels, *_ = one.weight.shape
    reach = max(one.pads)
    top, left, bottom, right = (reach - pad for pad in one.pads)
    widths = ((0, 0), (0, 0), (top, bottom), (left, right))
    kernel, border = np.pad(one.weight, widths), np.pad(one.border, widths)
    with torch.random.fork_rng(devices=[]):  # the parameters that are replaced at once draw numbers
        block = ShiftConv(in_channels, out_channels, 2 * reach + 1, one.stride, bias=bool(one.bias.any())).to(like)

    def parameter(values: Array) -> nn.Parameter:
        return nn.Parameter(torch.from_numpy(np.ascontiguousarray(values)).to(like), like.requires_grad)

    block.pointwise.weight = parameter(kernel.transpose(0, 2, 3, 1).reshape(-1, in_channels, 1, 1))
    if border.any():
        block.pointwise.bias = parameter(border.reshape(-1))
    if block.bias is not None:
        block.bias = parameter(one.bias)
    return block


RECOGNISER = Recogniser(
    family=SHIFT_CONV,
    block=ShiftConv,
    geometry=("in_channels", "out_channels", "kernel_size", "stride"),
    propose=_propose,
    resembles=_resembles,
    called="shiftconv",
)
