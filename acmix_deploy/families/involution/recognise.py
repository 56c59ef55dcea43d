"""Involutions inside any module."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from acmix_deploy.families.involution.graph import INVOLUTION
from acmix_deploy.families.involution.module import Involution
from acmix_deploy.families.layers import ConvLayer, conv_layers, with_activations
from acmix_deploy.families.search import NotABlock, Proposal, Recogniser

_COMMON_KERNELS = (7, 3, 5, 9)  # tried where a block does not tell its window
_COMMON_STRIDES = (1, 2)


def _propose(module: nn.Module) -> Proposal:
    """A block is a module with two 1x1 convolutions, to the weights of K x K neighbours for groups of its channels."""
    layers = conv_layers(module)
    if len(layers) != 2 or any((layer.conv.kernel_size, layer.conv.groups) != ((1, 1), 1) for layer in layers):
        raise NotABlock("it has not two 1x1 convolutions")
    channels, weights = layers[0].conv.in_channels, layers[1].conv.out_channels
    candidates = []
    for kernel_size, stride, dilation in _geometries(module):
        groups, rest = divmod(weights, kernel_size**2)
        if rest or not groups or channels % groups or kernel_size % 2 == 0:
            continue
        for own in with_activations(layers):
            candidates.append(_assemble(channels, own, kernel_size, stride, channels // groups, dilation))
    if not candidates:
        raise NotABlock(f"{weights} weights a pixel are not K*K for groups of {channels} channels")
    return Proposal(candidates, _input(candidates[0]))


def _resembles(module: nn.Module) -> bool:
    children = [*module.children()]
    convs = sum(isinstance(part, nn.Conv2d) for part in module.modules())
    return convs == 2 and any(isinstance(child, nn.Unfold) for child in children)


def _geometries(module: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Kernel size, stride and dilation: as an unfold layer says or attributes may say, else usual ones."""
    sources = (*(child for child in module.children() if isinstance(child, nn.Unfold)), module)
    kernels, strides, dilations = (
        [size for source in sources if (size := _one(getattr(source, name, None)))]
        for name in ("kernel_size", "stride", "dilation")
    )
    yield from itertools.product(
        dict.fromkeys((*kernels, *_COMMON_KERNELS)),
        dict.fromkeys((*strides, *_COMMON_STRIDES)),
        dict.fromkeys((*dilations, 1)),
    )


def _one(size: object) -> int | None:
    """A size that is one number, or the same along both axes; else None."""
    first = size[0] if isinstance(size, (tuple, list)) and len({*size}) == 1 else size
    return first if isinstance(first, int) and first > 0 else None


def _assemble(
    channels: int, layers: Sequence[ConvLayer], kernel_size: int, stride: int, group_channels: int, dilation: int
) -> Involution:
    """An Involution of these layers themselves, no copies."""
    with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
        block = Involution(channels, kernel_size, stride, group_channels, 1, dilation)
    block.conv1, block.conv2 = (layer.module for layer in layers)
    return block


def _input(block: Involution) -> Tensor:
    """Random input of a size that any stride divides."""
    side = block.stride * (block.dilation * (block.kernel_size // 2) + 2)
    shape = (2, block.channels, 2 * side, 2 * side + 2 * block.stride)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


RECOGNISER = Recogniser(
    family=INVOLUTION,
    block=Involution,
    geometry=("kernel_size", "stride", "group_channels", "dilation"),
    propose=_propose,
    resembles=_resembles,
    called="involution",
)
