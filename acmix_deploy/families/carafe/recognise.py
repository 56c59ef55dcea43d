"""CARAFE inside any module."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from acmix_deploy.families.carafe.graph import CARAFE
from acmix_deploy.families.carafe.module import Carafe
from acmix_deploy.families.layers import ConvLayer, conv_layers, with_activations
from acmix_deploy.families.search import NotABlock, Proposal, Recogniser


def _propose(module: nn.Module) -> Proposal:
    """A block is a module with a 1x1 convolution, one to the weights of u x u times K x K neighbours, and perhaps a 1x1
    convolution of the result."""
    layers = conv_layers(module)
    if len(layers) not in (2, 3) or any(layer.conv.kernel_size != (1, 1) for layer in (layers[0], *layers[2:])):
        raise NotABlock("it has not a 1x1 convolution, another one and perhaps a 1x1 convolution behind it")
    channels, weights = layers[0].conv.in_channels, layers[1].conv.out_channels
    across = math.isqrt(weights)
    sizes = [(across // k_up, k_up) for k_up in range(3, across // 2 + 1, 2) if across % k_up == 0]
    if across**2 != weights or not sizes:
        raise NotABlock(f"{weights} weights a pixel are not u*u times K*K for an odd K")
    candidates = [_assemble(channels, own, scale, k_up) for scale, k_up in sizes for own in with_activations(layers)]
    x = torch.randn(2, channels, 5, 6, generator=torch.Generator().manual_seed(0))
    return Proposal(candidates, x)


def _resembles(module: nn.Module) -> bool:
    children = [*module.children()]
    convs = sum(isinstance(part, nn.Conv2d) for part in module.modules())
    return convs in (2, 3) and any(isinstance(child, nn.PixelShuffle) for child in children)


def _assemble(channels: int, layers: Sequence[ConvLayer], scale: int, k_up: int) -> Carafe:
    """A Carafe of these layers themselves, no copies."""
    with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
        block = Carafe(channels, 1, scale, k_up)
    block.comp, block.enc = (layer.module for layer in layers[:2])
    block.out = layers[2].module if layers[2:] else nn.Identity()
    return block


RECOGNISER = Recogniser(
    family=CARAFE,
    block=Carafe,
    geometry=("scale", "k_up"),
    propose=_propose,
    resembles=_resembles,
    called="carafe",
)
