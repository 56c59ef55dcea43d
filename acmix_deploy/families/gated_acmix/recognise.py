"""Gated ACmix blocks inside any module."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import nn

from acmix_deploy.families.gated_acmix.graph import GATED_ACMIX
from acmix_deploy.families.gated_acmix.module import GatedACmix
from acmix_deploy.families.search import NotABlock, Proposal, Recogniser

_WINDOW_NAMES = ("window_size", "window", "ws")
_COMMON_WINDOW = 8


def _propose(module: nn.Module) -> Proposal:
    """A block is a module with a convolution, perhaps a BatchNorm, an nn.MultiheadAttention and two Linear layers, or
    1x1 convolutions in their place."""
    if any({*child.parameters()} == {*module.parameters()} for child in module.children()):
        raise NotABlock("a part of it holds all its parameters")
    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    attentions = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    if len(attentions) != 1:
        raise NotABlock(f"it has {len(attentions)} nn.MultiheadAttention, not one")
    (attention,) = attentions
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise NotABlock("its attention has keys and values of other sizes than the queries, or more of them")
    linears = [part for part in module.modules() if isinstance(part, nn.Linear) and part is not attention.out_proj]
    gate = linears or _pointwise_gate(convs)
    convs = [conv for conv in convs if conv not in gate]
    if [conv.out_channels for conv in convs] != [attention.embed_dim]:
        raise NotABlock(f"it has not one convolution to the {attention.embed_dim} channels of its attention")
    (conv,) = convs
    if conv.kernel_size[0] != conv.kernel_size[1] or conv.kernel_size[0] % 2 == 0 or len(norms) > 1:
        raise NotABlock("its convolution has not an odd square kernel and at most one BatchNorm")
    shapes = [layer.weight.shape[:2] for layer in gate]
    if len(gate) != 2 or shapes[0][1] != conv.in_channels or shapes[1] != (2, shapes[0][0]):
        raise NotABlock(
            f"it has not a gate of two Linear layers or 1x1 convolutions, from {conv.in_channels} features and to 2"
        )
    known = {parameter for part in (conv, *norms, attention, *gate) for parameter in part.parameters()}
    if any(parameter not in known for parameter in module.parameters()):
        raise NotABlock("it has parameters beside those of convolution, BatchNorm, attention and gate")

    first, last = gate[0] if linears else _linear(gate[0]), gate[1] if linears else _linear(gate[1])
    declared = (getattr(part, name, None) for part, name in product(module.modules(), _WINDOW_NAMES))
    window = next((size for size in declared if isinstance(size, int) and size > 0), _COMMON_WINDOW)
    same_width = conv.in_channels == conv.out_channels
    candidates = []
    for window_size, in_series, sequence_first, weights in product(
        (None, window), (False, True) if same_width else (True,), (False, True), (last, _linear(last, swapped=True))
    ):
        with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
            block = GatedACmix(
                conv.in_channels, attention.num_heads, conv.kernel_size[0], len(first.weight),
                sequence_first=sequence_first, in_series=in_series, out_channels=conv.out_channels,
                window_size=window_size,
            )  # fmt: skip
        block.conv[0] = conv
        block.conv[1] = norms[0] if norms else nn.Identity()
        block.attention.in_proj_weight, block.attention.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        block.attention.out_proj = attention.out_proj
        block.gate[2], block.gate[4] = first, weights
        candidates.append(block)
    random = torch.Generator().manual_seed(0)
    return Proposal(candidates, torch.randn(3, conv.in_channels, window, 2 * window, generator=random))


def _pointwise_gate(convs: Sequence[nn.Conv2d]) -> list[nn.Conv2d]:
    """The two convolutions of a gate that has such, by the two features that it gives; else nothing."""
    last = next((place for place, conv in enumerate(convs) if conv.out_channels == 2), 0)
    gate = [*convs[max(last - 1, 0) : last + 1]]
    return gate if len(gate) == 2 and all({*conv.kernel_size, conv.groups} == {1} for conv in gate) else []


def _resembles(module: nn.Module) -> bool:
    """Whether convolutions and an nn.MultiheadAttention stand side by side."""
    children = [*module.children()]
    attends = any(isinstance(child, nn.MultiheadAttention) for child in children)
    return attends and any(isinstance(part, nn.Conv2d) for child in children for part in child.modules())


def _linear(layer: nn.Linear | nn.Conv2d, *, swapped: bool = False) -> nn.Linear:
    """A layer of a gate as a Linear layer; ``swapped`` the last of one whose first weight is that of the attention."""
    weight = layer.weight.detach().flatten(1)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], len(weight))
    stored = None if layer.bias is None else layer.bias.detach()
    linear.weight = nn.Parameter(weight.flip(0) if swapped else weight)
    bias = None if stored is None else nn.Parameter(stored.flip(0) if swapped else stored)
    linear.register_parameter("bias", bias)
    return linear


RECOGNISER = Recogniser(
    family=GATED_ACMIX,
    block=GatedACmix,
    geometry=(
        "channels",
        "out_channels",
        "num_heads",
        "kernel_size",
        "hidden",
        "sequence_first",
        "in_series",
        "window_size",
    ),
    propose=_propose,
    resembles=_resembles,
)
