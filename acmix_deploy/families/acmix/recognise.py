"""ACmix blocks inside any module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from acmix_deploy.errors import UserError
from acmix_deploy.families.acmix.graph import ACMIX
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.search import NotABlock, Proposal, Recogniser
from acmix_deploy.faults import FaultId

_COMMON_KERNELS = (7, 3, 5, 9, 11, 13)  # tried where a block does not tell its window


def _propose(module: nn.Module) -> Proposal:
    """A block is a module with three 1x1 convolutions of one shape, those of the position and of the maps, the grouped
    3x3 convolution and two rates."""
    parts, rates = _parts(module), _rates(module)
    blocks: list[ACmix] = []
    refusals: list[str] = []
    for kernel_att in dict.fromkeys((*_declared_kernels(module), *_COMMON_KERNELS)):
        try:
            blocks.append(_assemble(parts, rates, kernel_att))
        except UserError as error:
            refusals.append(error.message)
    reach = max(block.kernel_att for block in blocks) // 2
    size = [blocks[0].stride * (reach + extra) for extra in (2, 3)]
    repaired: list[FaultId] = []
    if parts["dep_conv"].bias is None:
        repaired.append("no-bias")
    if any(rate.dim() == 0 for rate in rates):
        repaired.append("scalar-rates")
    return Proposal(
        candidates=blocks,
        x=torch.randn(2, blocks[0].in_planes, *size, generator=torch.Generator().manual_seed(0)),
        repaired=repaired,
        refusals=refusals,
        fault="misplaced-argument" if refusals else "no-block",
    )


def _resembles(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    return {"conv_p", "dep_conv"} <= parts


def _parts(module: nn.Module) -> dict[str, nn.Conv2d]:
    """The block's convolutions under their published names, found by shape. Raises NotABlock."""
    convolutions = [child for child in module.children() if isinstance(child, nn.Conv2d)]

    def take(meaning: str, fits: Callable[[nn.Conv2d], bool]) -> nn.Conv2d:
        # From the end, since with few channels the projections, which come first, may fit as well.
        for found in reversed(convolutions):
            if fits(found):
                convolutions.remove(found)
                return found
        raise NotABlock(f"it has no {meaning} among its convolutions")

    dep_conv = take(
        "3x3 convolution of 9 * head_dim channels in head_dim groups",
        lambda c: c.kernel_size == (3, 3) and c.in_channels == 9 * c.groups and c.stride[0] == c.stride[1],
    )
    head_dim, planes = dep_conv.groups, dep_conv.out_channels
    head = planes // head_dim
    fc = take(
        f"1x1 convolution from 3 * {head} maps to 9 without a bias",
        lambda c: _is_pointwise(c, 3 * head, 9) and c.bias is None,
    )
    conv_p = take(f"1x1 convolution from 2 coordinates to {head_dim}", lambda c: _is_pointwise(c, 2, head_dim))
    if len(convolutions) != 3 or not all(_is_pointwise(c, convolutions[0].in_channels, planes) for c in convolutions):
        raise NotABlock(f"it has not three 1x1 convolutions from its input to {planes} channels beside those")
    conv1, conv2, conv3 = convolutions
    return {"conv1": conv1, "conv2": conv2, "conv3": conv3, "conv_p": conv_p, "fc": fc, "dep_conv": dep_conv}


def _is_pointwise(convolution: nn.Conv2d, in_channels: int, out_channels: int) -> bool:
    shape = (convolution.in_channels, convolution.out_channels, convolution.kernel_size, convolution.groups)
    return shape == (in_channels, out_channels, (1, 1), 1)


def _rates(module: nn.Module) -> list[nn.Parameter]:
    """The factors of the attention and of the convolution branch, in this order. Raises NotABlock."""
    rates = [parameter for parameter in module.parameters(recurse=False) if parameter.numel() == 1]
    if len(rates) != 2:
        raise NotABlock(f"it has {len(rates)} one-element parameters, not the two rates of its branches")
    return rates


def _declared_kernels(module: nn.Module) -> list[int]:
    """Sides of the attention window that the block's unfold layer or its attribute tells."""
    unfolds = [child.kernel_size for child in module.children() if isinstance(child, nn.Unfold)]
    sides = [size if isinstance(size, int) else size[0] for size in unfolds]
    return [side for side in (*sides, getattr(module, "kernel_att", None)) if isinstance(side, int)]


def _assemble(parts: dict[str, nn.Conv2d], rates: list[nn.Parameter], kernel_att: int) -> ACmix:
    """An ACmix that holds these parameters themselves, no copies. Raises UserError for an impossible window."""
    conv1, dep_conv = parts["conv1"], parts["dep_conv"]
    with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
        head = dep_conv.out_channels // dep_conv.groups
        block = ACmix(conv1.in_channels, conv1.out_channels, kernel_att, head, stride=dep_conv.stride[0])
    for name, part in parts.items():
        target = getattr(block, name)
        target.weight = part.weight
        if part.bias is None and target.bias is not None:
            target.bias = nn.Parameter(part.weight.new_zeros(part.out_channels))
        else:
            target.bias = part.bias
    block.rate1, block.rate2 = (
        rate if rate.dim() == 1 else nn.Parameter(rate.detach().reshape(1), rate.requires_grad) for rate in rates
    )
    return block


RECOGNISER = Recogniser(
    family=ACMIX,
    block=ACmix,
    geometry=("in_planes", "out_planes", "kernel_att", "head", "stride"),
    propose=_propose,
    resembles=_resembles,
    called="acmix",
    parameterless=(nn.ReflectionPad2d, nn.Unfold, nn.Softmax),
)
