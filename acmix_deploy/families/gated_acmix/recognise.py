"""Gated ACmix blocks inside any module."""

from __future__ import annotations

from itertools import product

import torch
from torch import nn

from acmix_deploy.families.gated_acmix.graph import GATED_ACMIX
from acmix_deploy.families.gated_acmix.module import GatedACmix
from acmix_deploy.families.search import NotABlock, Proposal, Recogniser


def _propose(module: nn.Module) -> Proposal:
    """A block is a module with a convolution, perhaps a BatchNorm, an nn.MultiheadAttention and two Linear layers."""
    if any({*child.parameters()} == {*module.parameters()} for child in module.children()):
        raise NotABlock("a part of it holds all its parameters")
    convs = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    attentions = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    if len(attentions) != 1:
        raise NotABlock(f"it has {len(attentions)} nn.MultiheadAttention, not one")
    (attention,) = attentions
    channels = attention.embed_dim
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise NotABlock("its attention has keys and values of other sizes than the queries, or more of them")
    if [(conv.in_channels, conv.out_channels) for conv in convs] != [(channels, channels)]:
        raise NotABlock(f"it has not one convolution from {channels} channels to as many")
    (conv,) = convs
    if conv.kernel_size[0] != conv.kernel_size[1] or conv.kernel_size[0] % 2 == 0 or len(norms) > 1:
        raise NotABlock("its convolution has not an odd square kernel and at most one BatchNorm")
    linears = [part for part in module.modules() if isinstance(part, nn.Linear) and part is not attention.out_proj]
    if len(linears) != 2 or linears[0].in_features != channels or linears[1].out_features != 2:
        raise NotABlock(f"it has not a gate of two Linear layers, from {channels} features and to 2")
    known = {parameter for part in (conv, *norms, attention, *linears) for parameter in part.parameters()}
    if any(parameter not in known for parameter in module.parameters()):
        raise NotABlock("it has parameters beside those of convolution, BatchNorm, attention and gate")

    candidates = []
    for last, sequence_first in product((linears[1], _swapped(linears[1])), (False, True)):
        with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
            size = (channels, attention.num_heads, conv.kernel_size[0], linears[0].out_features)
            block = GatedACmix(*size, sequence_first=sequence_first)
        block.conv[0] = conv
        block.conv[1] = norms[0] if norms else nn.Identity()
        block.attention.in_proj_weight, block.attention.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        block.attention.out_proj = attention.out_proj
        block.gate[2], block.gate[4] = linears[0], last
        candidates.append(block)
    return Proposal(candidates, torch.randn(3, channels, 5, 6, generator=torch.Generator().manual_seed(0)))


def _resembles(module: nn.Module) -> bool:
    """Whether convolutions and an nn.MultiheadAttention stand side by side."""
    children = [*module.children()]
    attends = any(isinstance(child, nn.MultiheadAttention) for child in children)
    return attends and any(isinstance(part, nn.Conv2d) for child in children for part in child.modules())


def _swapped(linear: nn.Linear) -> nn.Linear:
    """The last layer of a gate whose first weight is that of the attention."""
    with torch.device("meta"):
        swapped = nn.Linear(linear.in_features, linear.out_features)
    swapped.weight = nn.Parameter(linear.weight.detach().flip(0))
    bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().flip(0))
    swapped.register_parameter("bias", bias)
    return swapped


RECOGNISER = Recogniser(
    family=GATED_ACMIX,
    block=GatedACmix,
    geometry=("channels", "num_heads", "kernel_size", "hidden", "sequence_first"),
    propose=_propose,
    resembles=_resembles,
)
