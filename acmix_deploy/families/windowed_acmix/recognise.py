"""Windowed ACmix blocks inside any module."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from acmix_deploy.families.layout import ChannelsLast
from acmix_deploy.families.search import NotABlock, Proposal, Recogniser
from acmix_deploy.families.windowed_acmix.graph import WINDOWED_ACMIX
from acmix_deploy.families.windowed_acmix.module import WindowedACmix

_COMMON_WINDOWS = (7, 14, 8)  # tried where a block does not tell
_COMMON_HEADS = (4, 8, 2, 1, 3, 6, 12, 16)
_WINDOW_NAMES = ("window_size", "window", "ws")
_HEADS_NAMES = ("num_heads", "heads", "head", "n_heads")


def _propose(module: nn.Module) -> Proposal:
    """A block is a module with a depthwise convolution, Linear layers to q, k, v and of the result, perhaps a LayerNorm
    and perhaps a table of biases, and with no other parameters."""
    if any({*child.parameters()} == {*module.parameters()} for child in module.children()):
        raise NotABlock("a part of it holds all its parameters")
    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    if len(convs) != 1 or not _is_depthwise(convs[0]):
        raise NotABlock("it has not one convolution, depthwise with an odd square kernel")
    dim = convs[0].in_channels
    shapes = [(part.in_features, part.out_features) for part in linears]
    if shapes not in ([(dim, 3 * dim), (dim, dim)], [(dim, dim)] * 4):
        raise NotABlock(f"it has not Linear layers from {dim} channels to q, k, v and, last, to {dim} channels")
    if [norm.normalized_shape for norm in norms] not in ([], [(dim,)]):
        raise NotABlock(f"it has more than one LayerNorm, or one that is not over its {dim} channels")
    known = {parameter for part in (*convs, *linears, *norms) for parameter in part.parameters()}
    others = [parameter for parameter in module.parameters() if parameter not in known]
    table = others[0] if others else None
    if len(others) > 1 or (table is not None and not _is_table(table, dim)):
        shown = ", ".join(str([*parameter.shape]) for parameter in others)
        raise NotABlock(f"beside its layers it has parameters {shown}, not one table of (2w - 1)**2 x heads biases")
    qkv = linears[0] if len(linears) == 2 else _joined(linears[:3])
    candidates = []
    for window, heads in _geometries(module, dim, table):
        with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
            block = WindowedACmix(dim, window, heads, convs[0].kernel_size[0], position_bias=table is not None)
        block.qkv, block.conv, block.proj = qkv, convs[0], linears[-1]
        block.norm = norms[0] if norms else nn.Identity()
        block.relative_position_bias_table = table
        candidates.append(block)
    return Proposal(candidates=candidates, x=_input(module, candidates[0]))


def _resembles(module: nn.Module) -> bool:
    """Whether a depthwise convolution stands beside Linear layers, as in no other block that is common."""
    children = [*module.children()]
    depthwise = any(isinstance(child, nn.Conv2d) and _is_depthwise(child) for child in children)
    return depthwise and sum(isinstance(child, nn.Linear) for child in children) >= 2


def _is_depthwise(conv: nn.Conv2d) -> bool:
    height, width = conv.kernel_size
    return conv.groups == conv.in_channels == conv.out_channels > 1 and height == width and height % 2 == 1


def _is_table(table: Tensor, dim: int) -> bool:
    return table.dim() == 2 and math.isqrt(len(table)) ** 2 == len(table) and dim % table.shape[1] == 0


def _joined(parts: Sequence[nn.Linear]) -> nn.Linear:
    """Linear layers of one input as one; their biases are all there or none is."""
    biases = [part.bias for part in parts if part.bias is not None]
    if len(biases) not in (0, len(parts)):
        raise NotABlock("some of its layers to q, k and v have a bias and some have none")
    with torch.device("meta"):
        joined = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts))
    joined.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
    joined.register_parameter("bias", nn.Parameter(torch.cat([bias.detach() for bias in biases])) if biases else None)
    return joined


def _geometries(module: nn.Module, dim: int, table: Tensor | None) -> Iterator[tuple[int, int]]:
    """Sides of the window and numbers of heads to try: as the table says, else as an attribute may say, else usual."""
    if table is not None:
        yield (math.isqrt(len(table)) + 1) // 2, table.shape[1]
        return
    windows = dict.fromkeys((*_declared(module, _WINDOW_NAMES), *_COMMON_WINDOWS))
    heads = dict.fromkeys((*_declared(module, _HEADS_NAMES), *_COMMON_HEADS))
    yield from itertools.product(windows, (number for number in heads if dim % number == 0))


def _declared(module: nn.Module, names: Sequence[str]) -> Iterator[int]:
    for part, name in itertools.product(module.modules(), names):
        value = getattr(part, name, None)
        value = value[0] if isinstance(value, (tuple, list)) and value else value
        if isinstance(value, int) and value > 0:
            yield value


def _input(module: nn.Module, block: WindowedACmix) -> Tensor:
    """Random input, of a size that the window does not divide where the module takes one."""
    window, every = block.window_size, math.lcm(*_COMMON_WINDOWS)
    random = torch.Generator().manual_seed(0)
    for height, width in ((window + 2, 2 * window + 1), (2 * window, window), (every, every)):
        x = torch.randn(2, height, width, block.dim, generator=random)
        if any(_takes(one, x) for one in (module, ChannelsLast(module))):
            break
    return x


def _takes(module: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            copy.deepcopy(module).cpu().float().eval()(x)
    except Exception:  # the model's own code; what it says, it says again when it is compared
        return False
    return True


RECOGNISER = Recogniser(
    family=WINDOWED_ACMIX,
    block=WindowedACmix,
    geometry=("dim", "window_size", "num_heads", "kernel_size", "position_bias"),
    propose=_propose,
    resembles=_resembles,
    channels_last=True,
)
