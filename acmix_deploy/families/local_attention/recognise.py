"""Local attention inside any module."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from acmix_deploy.families.local_attention.graph import LOCAL_ATTENTION
from acmix_deploy.families.local_attention.module import LocalAttention
from acmix_deploy.families.search import NotABlock, Proposal, Recogniser
from acmix_deploy.graph import Reached
from acmix_deploy.operators.neighborhood_attention import Border
from acmix_deploy.runtime.reason import reason
from acmix_deploy.runtime.torch import OnCpu

_SIDES = (13, 29)
"""Of the maps on which a window is looked for: most fit the first."""

_HEADS = ("num_heads", "heads", "n_heads", "head", "groups")
"""What modules call the number of their heads."""

_ORDERS = ("3 N d", "N 3 d", "N d 3")
"""How one projection may lay out q, k and v."""


class _Parts(NamedTuple):
    """Layers of a block: 1x1 convolutions, or Linear layers of a block that takes [B, H, W, C]."""

    projections: list[nn.Conv2d | nn.Linear]
    """One to q, k and v together, or three."""
    proj: nn.Conv2d | nn.Linear | None
    position: nn.Conv2d | None
    others: list[nn.Parameter]
    """Parameters beside those of the layers."""
    channels: int
    """Of q."""

    @property
    def table(self) -> nn.Parameter | None:
        """Of biases."""
        return self.others[0] if self.others else None


class _Window(NamedTuple):
    """What the result at a pixel depends on."""

    kernel_size: int
    dilation: int
    borders: tuple[Border | None, ...]
    """That leave the same pixels in a corner."""


def _propose(module: nn.Module) -> Proposal:
    """A block is a module of 1x1 convolutions, or Linear layers, to q, k and v, perhaps with one of the result, one of
    the coordinates and a table of biases, in which each pixel depends on a square window."""
    parts = _parts(module)
    window = _window(module, parts)
    if len(parts.others) > 1:
        raise NotABlock(f"beside its layers it has {len(parts.others)} parameters, not one table of biases")
    candidates = [
        block
        for heads, border in itertools.product(_heads(module, parts, window), window.borders)
        for block in _assemble(module, parts, window, heads, border)
    ]
    if not candidates:
        raise NotABlock(f"its parameters do not fit windows of {window.kernel_size}x{window.kernel_size} pixels")
    height, width = (window.kernel_size * window.dilation + extra for extra in (1, 2))
    x = torch.randn(2, candidates[0].in_channels, height, width, generator=torch.Generator().manual_seed(0))
    return Proposal(candidates, x)


def _parts(module: nn.Module) -> _Parts:
    """The layers of a block. Raises NotABlock where it has others."""
    layers = [part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    if module in layers or not 1 <= len(layers) <= 5:
        raise NotABlock(f"it has {len(layers)} layers")
    called = (child for child in module.children() if not isinstance(child, (nn.ModuleDict, nn.ModuleList)))
    if any({*child.parameters()} == {*module.parameters()} for child in called):
        raise NotABlock("a part of it holds all its parameters")
    if any(isinstance(part, nn.Conv2d) and not _is_pointwise(part) for part in layers):
        raise NotABlock("not all of its convolutions are 1x1")
    own = {parameter for layer in layers for parameter in layer.parameters()}
    tables = [parameter for parameter in module.parameters() if parameter not in own]
    position = next((part for part in layers if isinstance(part, nn.Conv2d) and part.in_channels == 2), None)
    shapes = [_shape(part) for part in layers if part is not position]
    outputs, inputs = shapes[0] if shapes else (0, 0)
    if len(shapes) in (1, 2) and outputs % 3 == 0 and all(into == outputs // 3 for _, into in shapes[1:]):
        count, channels = 1, outputs // 3
    elif shapes[:3] == [(outputs, inputs)] * 3 and all(into == outputs for _, into in shapes[3:]) and len(shapes) < 5:
        count, channels = 3, outputs
    else:
        raise NotABlock("its layers are not one or three to queries, keys and values, and perhaps one of the result")
    others = [part for part in layers if part is not position]
    return _Parts(others[:count], next(iter(others[count:]), None), position, tables, channels)


def _is_pointwise(conv: nn.Conv2d) -> bool:
    padded = conv.padding not in ((0, 0), "same", "valid")
    return (conv.kernel_size, conv.stride, conv.groups) == ((1, 1), (1, 1), 1) and not padded


def _shape(layer: nn.Conv2d | nn.Linear) -> tuple[int, int]:
    """Outputs and inputs."""
    return layer.weight.shape[0], layer.weight.shape[1]


def _window(module: nn.Module, parts: _Parts) -> _Window:
    """The window of a module, from the pixels that its result depends on in the middle and in a corner. Raises
    NotABlock where these are no window."""
    for side in _SIDES:
        middle, corner = _read(module, parts, side)
        steps = torch.diff(torch.cat([middle, middle[-1:]]))
        if len(middle) < side - 2 or side == _SIDES[-1]:
            break
    dilation = int(steps[0]) if len(middle) > 1 else 1
    kernel_size, reach = len(middle), len(middle) // 2
    expected = side // 2 + dilation * torch.arange(-reach, reach + 1)
    if kernel_size < 3 or kernel_size % 2 == 0 or not torch.equal(middle, expected) or kernel_size * dilation > side:
        raise NotABlock(f"its result depends on {kernel_size} columns of its input, not on a window around each pixel")
    if torch.equal(corner, dilation * torch.arange(kernel_size)):
        return _Window(kernel_size, dilation, (Border.SHIFTED,))
    if torch.equal(corner, dilation * torch.arange(reach + 1)):
        reflect = (None,) if dilation == 1 and parts.table is None else ()
        return _Window(kernel_size, dilation, (Border.ZEROS, Border.MASKED, *reflect))
    raise NotABlock("in a corner its result depends on other pixels than a window has there", Reached.WHOLE)


def _read(module: nn.Module, parts: _Parts, side: int) -> tuple[Tensor, Tensor]:
    """The columns of a square map that the results in its middle and in its first corner depend on. Raises NotABlock
    where they depend on others than these rows."""
    last = isinstance(parts.projections[0], nn.Linear)
    module = copy.deepcopy(module).cpu().eval()
    channels = _shape(parts.projections[0])[1]
    shape = (1, side, side, channels) if last else (1, channels, side, side)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    found = []
    try:
        with OnCpu():
            y = module.float()(x)
            width = _shape(parts.proj)[0] if parts.proj else parts.channels
            expected = (1, side, side, width) if last else (1, width, side, side)
            if not isinstance(y, Tensor) or y.shape != expected:
                raise NotABlock(f"it does not give one map of {width} channels")
            maps = y.permute(0, 3, 1, 2) if last else y
            for place in (side // 2, 0):
                (slope,) = torch.autograd.grad(maps[0, :, place, place].sum(), x, retain_graph=True)
                seen = slope[0].abs().sum(-1 if last else 0) > 0
                rows, columns = seen.any(1), seen.any(0)
                if not torch.equal(seen, rows[:, None] & columns) or not torch.equal(rows, columns):
                    raise NotABlock("its result does not depend on a square window around each pixel")
                found.append(columns.nonzero().flatten())
    except NotABlock:
        raise
    except Exception as error:
        raise NotABlock(f"its own forward fails: {reason(error)}") from error
    return found[0], found[1]


def _heads(module: nn.Module, parts: _Parts, window: _Window) -> list[int]:
    """Numbers of heads: what the module tells, else all that fit."""
    declared = [value for name in _HEADS if isinstance(value := getattr(module, name, None), int)]
    fitting = [heads for heads in range(1, parts.channels + 1) if parts.channels % heads == 0]
    if parts.position is not None:
        fitting = [heads for heads in fitting if parts.channels // heads == parts.position.out_channels]
    if parts.table is not None:
        fitting = [heads for heads in fitting if _bias(parts.table, heads, window.kernel_size) is not None]
    return [heads for heads in dict.fromkeys(declared) if heads in fitting] or fitting


def _bias(table: Tensor, heads: int, kernel_size: int) -> Tensor | None:
    """A table of biases as [heads, 2K - 1, 2K - 1] by relative offset; None where it has another size."""
    full = 2 * kernel_size - 1
    for side in (full, kernel_size):
        if table.numel() == heads * side**2:
            first = table.shape[0] == heads or table.shape[:2] == (1, heads) or table.shape[-1] != heads
            by_head = table.reshape(heads, side, side) if first else table.reshape(side, side, heads).permute(2, 0, 1)
            margin = (full - side) // 2
            return nn.functional.pad(by_head, (margin,) * 4)
    return None


def _assemble(
    module: nn.Module, parts: _Parts, window: _Window, heads: int, border: Border | None
) -> Iterator[LocalAttention]:
    """Blocks of these layers with one border, in the orders of q, k and v and with the factors of the logits that a
    module may have."""
    head_dim = parts.channels // heads
    declared = getattr(module, "scale", None)
    factors = [declared] if isinstance(declared, float) and declared > 0 else []
    table = None if parts.table is None else _bias(parts.table.detach(), heads, window.kernel_size)
    for qkv, factor in itertools.product(_orders(parts, heads), dict.fromkeys((*factors, head_dim**-0.5, 1.0))):
        with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
            block = LocalAttention(
                _shape(parts.projections[0])[1],
                parts.channels,
                window.kernel_size,
                heads,
                dilation=window.dilation,
                border=border,
                position=parts.position is not None,
                bias=parts.table is not None,
                projection=parts.proj is not None,
            )
        weight, bias = qkv
        if not math.isclose(factor, block.scale):
            gains = torch.ones_like(bias)
            gains[: parts.channels] = factor / block.scale
            weight, bias = weight * gains.unsqueeze(1), bias * gains
        if parts.position is not None and block.position is not None:
            block.position.weight = parts.position.weight
            if parts.position.bias is not None and border == Border.ZEROS:  # those outside the map are without it
                bias = bias.clone()
                bias[parts.channels : 2 * parts.channels] -= parts.position.bias.detach().repeat(heads)
        block.qkv.weight, block.qkv.bias = nn.Parameter(weight[:, :, None, None]), nn.Parameter(bias)
        if table is not None:
            block.rpb = nn.Parameter(table)
        if parts.proj is not None:
            project = parts.proj.weight.detach().flatten(1)
            block.proj = nn.Conv2d(project.shape[1], len(project), 1, device="meta")
            block.proj.weight, block.proj.bias = nn.Parameter(project[:, :, None, None]), parts.proj.bias
        yield block


def _orders(parts: _Parts, heads: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight [3 * C, Cin] and bias [3 * C] of q, k and v, one below the other, as the layers may mean them."""
    layers = parts.projections
    weights = [layer.weight.detach().flatten(1) for layer in layers]
    biases = [
        layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach() for layer in layers
    ]
    if len(layers) == 3:
        for order in itertools.permutations(range(3)):
            yield torch.cat([weights[i] for i in order]), torch.cat([biases[i] for i in order])
        return
    sizes = {"3": 3, "N": heads, "d": parts.channels // heads}
    for layout in _ORDERS:
        letters = layout.split()
        rows = torch.arange(3 * parts.channels).reshape([sizes[letter] for letter in letters])
        index = rows.permute([letters.index(letter) for letter in "3Nd"]).flatten()
        straight = layout == _ORDERS[0]
        yield (weights[0], biases[0]) if straight else (weights[0][index], biases[0][index])


def _resembles(module: nn.Module) -> bool:
    """Whether each pixel of its result depends on a window, though it has layers for queries, keys and values alone."""
    try:
        _window(module, _parts(module))
    except NotABlock:
        return False
    return True


RECOGNISER = Recogniser(
    family=LOCAL_ATTENTION,
    block=LocalAttention,
    geometry=("in_channels", "out_channels", "kernel_size", "num_heads", "dilation", "border"),
    propose=_propose,
    resembles=_resembles,
)
