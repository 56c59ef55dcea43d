"""CAFM blocks inside any module."""

from __future__ import annotations

import torch
from torch import nn

from acmix_deploy.families.cafm import graph
from acmix_deploy.families.cafm.module import CAFM, flat
from acmix_deploy.families.search import NotABlock, Proposal, Recogniser


def _propose(module: nn.Module) -> Proposal:
    """A block is a module with five convolutions, of depth 1 or without one, and a temperature a head."""
    convs = _convs(module)
    parameters = {parameter for conv in convs for parameter in conv.parameters()}
    temperatures = [parameter for parameter in module.parameters() if parameter not in parameters]
    if len(temperatures) != 1:
        raise NotABlock(f"beside its convolutions it has {len(temperatures)} parameters, not one temperature a head")
    (temperature,) = temperatures
    heads = temperature.numel()
    shapes = {conv: (*flat(conv.weight).shape, conv.groups) for conv in convs}
    dim = next((shape[1] for shape in shapes.values() if shape[0] == 3 * shape[1] and shape[4] == 1), 0)
    if not dim or dim % heads:
        raise NotABlock(f"it has no 1x1 convolution from channels that {heads} heads divide to three times as many")
    wanted = {
        "qkv": (3 * dim, dim, 1, 1, 1),
        "qkv_dwconv": (3 * dim, 1, 3, 3, 3 * dim),
        "project_out": (dim, dim, 1, 1, 1),
        "fc": (9, 3 * heads, 1, 1, 1),
        "dep_conv": (dim, 9, 3, 3, dim // heads),
    }
    with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
        candidates = [CAFM(dim, heads, in_order=in_order) for in_order in (False, True)]
    for name, shape in wanted.items():
        conv = next((conv for conv in convs if shapes[conv] == shape), None)
        if conv is None:
            raise NotABlock(f"it has no convolution {name} of shape {[*shape[:4]]} in {shape[4]} groups")
        convs.remove(conv)
        weight = conv.weight if conv.weight.dim() == 4 else nn.Parameter(flat(conv.weight.detach()))
        for block in candidates:
            layer = getattr(block, name)
            layer.weight, layer.bias = weight, conv.bias
    if temperature.shape != (heads, 1, 1):
        temperature = nn.Parameter(temperature.detach().reshape(heads, 1, 1))
    for block in candidates:
        block.temperature = temperature
    return Proposal(candidates, torch.randn(2, dim, 5, 6, generator=torch.Generator().manual_seed(0)))


def _resembles(module: nn.Module) -> bool:
    """Whether there are as many convolutions as a block has, one of them to nine maps, and a parameter beside them."""
    convs = [child for child in module.children() if isinstance(child, (nn.Conv2d, nn.Conv3d))]
    own = [*module.parameters(recurse=False)]
    return len(convs) == 5 and len(own) == 1 and any(conv.out_channels == 9 for conv in convs)


def _convs(module: nn.Module) -> list[nn.Conv2d | nn.Conv3d]:
    convs = [child for child in module.children() if isinstance(child, (nn.Conv2d, nn.Conv3d))]
    if len(convs) != 5:
        raise NotABlock(f"it has {len(convs)} convolutions, not five")
    return convs


RECOGNISER = Recogniser(
    family=graph.CAFM,
    block=CAFM,
    geometry=("dim", "num_heads", "in_order"),
    propose=_propose,
    resembles=_resembles,
    called="cafm",
)
