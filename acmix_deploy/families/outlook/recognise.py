"""Outlook attention inside any module."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families.outlook.graph import OUTLOOK
from acmix_deploy.families.outlook.module import OutlookAttention
from acmix_deploy.families.search import NotABlock, Proposal, Recogniser

_COMMON_KERNELS = (3, 5, 7)  # tried where a block does not tell its window
_COMMON_STRIDES = (1, 2)


def _propose(module: nn.Module) -> Proposal:
    """A block is a module with three Linear layers, two from its channels to as many and one to K^4 logits a head, and
    with no other parameters."""
    linears = [child for child in module.children() if isinstance(child, nn.Linear)]
    if len(linears) != 3 or {*module.parameters()} != {p for layer in linears for p in layer.parameters()}:
        raise NotABlock("its parameters are not those of three Linear layers")
    dim = linears[0].in_features
    orders = [
        (v, attn, proj)
        for v, attn, proj in itertools.permutations(linears)
        if all(layer.in_features == dim for layer in linears) and v.out_features == proj.out_features == dim
    ]
    if not orders:
        raise NotABlock(f"its Linear layers are not two from {dim} channels to as many and one to attention logits")
    candidates, refusals = [], []
    for (v, attn, proj), geometry in itertools.product(orders, _geometries(module)):
        heads, rest = divmod(attn.out_features, geometry[0] ** 4)
        if rest or not heads or dim % heads:
            continue
        for scale in _scales(module, (dim // heads) ** -0.5):
            try:
                candidates.append(_assemble(v, attn, proj, heads, geometry, scale))
            except UserError as error:
                refusals.append(error.message)
    if not candidates:
        outputs = sorted({attn.out_features for _, attn, _ in orders})
        raise NotABlock(refusals[0] if refusals else f"{outputs} logits are not K^4 for each of several heads")
    return Proposal(candidates=candidates, x=_input(candidates[0]), refusals=refusals)


def _resembles(module: nn.Module) -> bool:
    unfolds = any(isinstance(child, nn.Unfold) for child in module.children())
    linears = sum(isinstance(child, nn.Linear) for child in module.children())
    return unfolds and linears == 3


def _geometries(module: nn.Module) -> Iterator[tuple[int, int, int]]:
    """Kernel size, padding and stride: as an unfold layer says or attributes may say, else usual ones."""
    for unfold in (child for child in module.children() if isinstance(child, nn.Unfold)):
        sizes = [_one(size) for size in (unfold.kernel_size, unfold.padding, unfold.stride)]
        if None not in sizes:
            yield sizes[0], sizes[1], sizes[2]  # type: ignore[misc]
    declared = [_one(getattr(module, name, None)) for name in ("kernel_size", "padding", "stride")]
    kernels, paddings, strides = ([] if size is None else [size] for size in declared)
    for kernel in dict.fromkeys((*kernels, *_COMMON_KERNELS)):
        padding_choices = dict.fromkeys((*paddings, kernel // 2))
        yield from itertools.product([kernel], padding_choices, dict.fromkeys((*strides, *_COMMON_STRIDES)))


def _one(size: object) -> int | None:
    """A size that is one number, or the same along both axes; else None."""
    first = size[0] if isinstance(size, (tuple, list)) and len({*size}) == 1 else size
    return first if isinstance(first, int) else None


def _scales(module: nn.Module, usual: float) -> Iterator[float]:
    """Factors of the logits to try: what the module calls so, the usual one, and every other number that it keeps."""
    kept = [getattr(module, "scale", None), usual, *vars(module).values()]
    yield from dict.fromkeys(value for value in kept if isinstance(value, float) and value > 0)


def _assemble(
    v: nn.Linear, attn: nn.Linear, proj: nn.Linear, heads: int, geometry: tuple[int, int, int], scale: float
) -> OutlookAttention:
    """An OutlookAttention of these layers themselves, no copies. Raises UserError for an impossible geometry."""
    with torch.random.fork_rng(devices=[]):  # the layers that are replaced at once draw numbers
        block = OutlookAttention(v.in_features, heads, *geometry, qk_scale=scale)
    block.to(v.weight.device, v.weight.dtype)
    block.v, block.attn, block.proj = v, attn, proj
    return block


def _input(block: OutlookAttention) -> Tensor:
    """Random input of a size that the stride does not divide, unless only others have the windows that it needs."""
    odd = int(block.stride > 1 and block.kernel_size == 2 * block.padding + 1)
    height, width = (block.stride * (block.kernel_size + extra) + odd for extra in (0, 1))
    return torch.randn(2, height, width, block.dim, generator=torch.Generator().manual_seed(0))


RECOGNISER = Recogniser(
    family=OUTLOOK,
    block=OutlookAttention,
    geometry=("num_heads", "kernel_size", "padding", "stride"),
    propose=_propose,
    resembles=_resembles,
    channels_last=True,
    called="outlookatt",
    parameterless=(nn.AvgPool2d, nn.Dropout, nn.Unfold),
)
