"""ACmix blocks inside any module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, nn

from acmix_deploy.errors import UserError
from acmix_deploy.families.acmix.graph import ACMIX
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.search import NotABlock, Proposal, Recogniser, run_original
from acmix_deploy.faults import FaultId
from acmix_deploy.operators.local_attention import check_geometry

_COMMON_KERNELS = (7, 3, 5, 9, 11, 13)  # tried where a block does not tell its window
_EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}  # of the result, relative: what may be left
_ROUGH = 1e-2  # the same in half precision

Weights = tuple[Tensor, "Tensor | None"]


@dataclass(frozen=True)
class _Parts:
    """A block's layers, found by shape."""

    projections: list[Weights]
    """Of queries, keys and values, or one of all three."""
    conv_p: Weights
    fc: Weights
    dep_convs: list[nn.Conv2d]
    """One, or two whose results are added."""

    @property
    def stride(self) -> int:
        return self.dep_convs[0].stride[0]

    def orders(self) -> Iterator[list[Weights]]:
        """Queries, keys and values, as they may be told apart; the likeliest first."""
        if len(self.projections) == 3:
            yield from map(list, permutations(self.projections))
            return
        ((weight, bias),) = self.projections
        head_dim, planes = self.dep_convs[0].groups, self.dep_convs[0].out_channels
        channels = torch.arange(3 * planes)
        by_head = channels.view(-1, 3, head_dim).transpose(0, 1).reshape(3, -1)
        for thirds in (channels.view(3, -1), by_head, channels.view(-1, 3).T):
            for order in permutations(thirds):
                yield [(_new(weight[own], weight), None if bias is None else _new(bias[own], bias)) for own in order]


def _propose(module: nn.Module) -> Proposal:
    """A block is a module with projections of one shape, the 1x1 convolutions of the position and of the maps, and the
    grouped 3x3 convolution. How its branches are added is measured."""
    parts = _parts(module, ())
    refusals: list[str] = []
    kernels = _kernels(module, refusals)
    reach = max(kernels) // 2
    size = [parts.stride * (reach + extra) for extra in (2, 3)]
    in_planes = parts.projections[0][0].shape[1]
    repaired: list[FaultId] = []
    if all(conv.bias is None for conv in parts.dep_convs):
        repaired.append("no-bias")
    if any(rate.dim() == 0 for rate in module.parameters(recurse=False)):
        repaired.append("scalar-rates")
    proposal = Proposal(
        candidates=(),
        x=torch.randn(2, in_planes, *size, generator=torch.Generator().manual_seed(0)),
        repaired=repaired,
        refusals=refusals,
        fault="misplaced-argument" if refusals else "no-block",
    )
    block = _measured(module, proposal, kernels)
    candidates = [block] if block else [_plain(module, parts, kernel) for kernel in kernels]
    return Proposal(candidates, proposal.x, repaired=repaired, refusals=refusals, fault=proposal.fault)


def _resembles(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    return {"conv_p", "dep_conv"} <= parts


def _parts(module: nn.Module, behind: Sequence[nn.Module]) -> _Parts:
    """The block's layers, but for those ``behind``. Raises NotABlock."""
    layers = [child for child in module.children() if isinstance(child, (nn.Conv2d, nn.Linear)) and child not in behind]

    def take(meaning: str, fits: Callable[[nn.Conv2d | nn.Linear], bool]) -> nn.Conv2d | nn.Linear:
        # From the end, since with few channels the projections, which come first, may fit as well.
        if found := next(filter(fits, reversed(layers)), None):
            layers.remove(found)
            return found
        raise NotABlock(f"it has no {meaning} among its convolutions")

    def is_dep_conv(layer: nn.Module) -> bool:
        if not isinstance(layer, nn.Conv2d):
            return False
        shape = (layer.kernel_size, layer.in_channels, layer.stride[0])
        return shape == ((3, 3), 9 * layer.groups, layer.stride[1])

    dep_conv = take("3x3 convolution of 9 * head_dim channels in head_dim groups", is_dep_conv)
    assert isinstance(dep_conv, nn.Conv2d)
    head_dim, planes = dep_conv.groups, dep_conv.out_channels
    head = planes // head_dim
    others = [layer for layer in layers if isinstance(layer, nn.Conv2d) and is_dep_conv(layer)]
    layers = [layer for layer in layers if layer not in others]
    fc = take(f"1x1 convolution from 3 * {head} maps to 9", lambda layer: _shape(layer) == (9, 3 * head))
    conv_p = take(f"1x1 convolution from 2 coordinates to {head_dim}", lambda layer: _shape(layer) == (head_dim, 2))
    shapes = [_shape(layer) for layer in layers]
    if len({*shapes}) != 1 or (len(shapes), (shapes[0] or (0,))[0]) not in ((3, planes), (1, 3 * planes)):
        raise NotABlock(f"it has not three 1x1 convolutions from its input to {planes} channels beside those")
    return _Parts([*map(_weights, layers)], _weights(conv_p), _weights(fc), [dep_conv, *others])


def _shape(layer: nn.Module) -> tuple[int, int] | None:
    """Channels that a layer makes of each pixel, and of how many; None for one that does more."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.Conv2d) and (layer.kernel_size, layer.groups) == ((1, 1), 1):
        return layer.out_channels, layer.in_channels
    return None


def _weights(layer: nn.Conv2d | nn.Linear) -> Weights:
    weight = layer.weight if isinstance(layer, nn.Conv2d) else _new(layer.weight[..., None, None], layer.weight)
    return weight, layer.bias


def _new(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), like.requires_grad)


def _kernels(module: nn.Module, refusals: list[str]) -> list[int]:
    """Sides that the attention's window may have, the likeliest first: what the block's unfold layer or its attribute
    tells, then the usual ones. Those that no block has are refused."""
    unfolds = [child.kernel_size for child in module.children() if isinstance(child, nn.Unfold)]
    sides = [size if isinstance(size, int) else size[0] for size in unfolds]
    declared = [side for side in (*sides, getattr(module, "kernel_att", None)) if isinstance(side, int)]
    kernels = []
    for kernel in dict.fromkeys((*declared, *_COMMON_KERNELS)):
        try:
            check_geometry(kernel, 1, kernel, kernel)
        except UserError as error:
            refusals.append(error.message)
        else:
            kernels.append(kernel)
    return kernels


def _plain(module: nn.Module, parts: _Parts, kernel: int) -> ACmix:
    """The block by its parts alone, as it is published: rates are its own parameters. Raises NotABlock."""
    rates = [rate for rate in module.parameters(recurse=False) if rate.numel() in (1, parts.dep_convs[0].out_channels)]
    if len(rates) != 2 or len(parts.dep_convs) != 1:
        raise NotABlock(
            f"it has {len(rates)} parameters of one element or one a channel, not the two rates of its branches, and "
            "does not add these otherwise"
        )
    block = _assemble(parts, next(parts.orders()), kernel)
    block.rate1, block.rate2 = map(_as_rate, rates)
    return block


def _as_rate(rate: nn.Parameter) -> nn.Parameter:
    shape = (1,) if rate.numel() == 1 else (1, rate.numel(), 1, 1)
    return rate if rate.shape == shape else _new(rate.reshape(shape), rate)


def _assemble(parts: _Parts, projections: Sequence[Weights], kernel: int) -> ACmix:
    """An ACmix that holds these parameters themselves, no copies."""
    dep_conv = parts.dep_convs[0]
    planes, head_dim = dep_conv.out_channels, dep_conv.groups
    with torch.device("meta"):  # neither memory nor random numbers for what is replaced at once
        block = ACmix(projections[0][0].shape[1], planes, kernel, planes // head_dim, stride=parts.stride)
    whole = (*projections, parts.conv_p, parts.fc, (dep_conv.weight, dep_conv.bias))
    for name, (weight, bias) in zip(("conv1", "conv2", "conv3", "conv_p", "fc", "dep_conv"), whole, strict=True):
        target = getattr(block, name)
        wants_bias = bias is None and target.bias is not None
        target.weight, target.bias = weight, nn.Parameter(weight.new_zeros(len(weight))) if wants_bias else bias
    return block


def _measured(module: nn.Module, proposal: Proposal, kernels: Sequence[int]) -> ACmix | None:
    """The block that computes what ``module`` does on random input, if any does.

    Its result in front of its last layers is, channel by channel, a sum of the attention, of each convolution and of x,
    each with a factor, and a number. Least squares find these.
    """
    try:
        result, behind = _observed(module, proposal)
        parts = _parts(module, behind)
    except Exception:  # whatever its code raises, the comparison will tell
        return None
    exact = _EXACT.get(result.dtype, _ROUGH)
    result = result.double()
    for kernel in kernels:
        for projections in parts.orders():
            block = _assemble(parts, projections, kernel)
            terms = _terms(block, parts, proposal.x)
            if terms[0].shape != result.shape:
                return None
            with_ones = [*terms, torch.ones_like(result)]
            known, target = (torch.stack(t, -1).transpose(0, 1).flatten(1, 3) for t in (with_ones, [result]))
            if not (known.isfinite().all() and target.isfinite().all()):
                return None
            factors = torch.linalg.lstsq(known, target, driver="gelsd").solution
            if float((known @ factors - target).norm()) < exact * float(target.norm()):
                own = [*module.parameters(recurse=False)]
                return _with_factors(block, parts, own, factors[..., 0], exact, behind)
    return None


def _observed(module: nn.Module, proposal: Proposal) -> tuple[Tensor, list[nn.Module]]:
    """What ``module`` makes of x before its last layers, and these."""
    calls: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []

    def note(child: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((child, inputs[0], inputs[0].clone(), output))  # which a layer may write into

        return hook

    hooks = [child.register_forward_hook(note(child)) for child in module.children()]
    try:
        dtype = next(parameter.dtype for parameter in module.parameters())
        (result, *_), _ = run_original(module, proposal, dtype)
    finally:
        for hook in hooks:
            hook.remove()
    behind: list[nn.Module] = []
    last = result
    for child, given, kept, made in reversed(calls):
        if made is last:
            behind.insert(0, child)
            last, result = given, kept
    return result, behind


def _terms(block: ACmix, parts: _Parts, x: Tensor) -> list[Tensor]:
    """The attention of ``block``, each convolution, and x where it has the shape of these; in float64."""
    stored = ((name, value) for name, value in block.state_dict().items() if not value.is_meta)
    whole = {name: value.detach().cpu().double() for name, value in stored}
    with torch.device("meta"):
        own = ACmix(block.in_planes, block.out_planes, block.kernel_att, block.head, stride=block.stride)
    own.load_state_dict(whole, strict=False, assign=True)
    x = x.double()
    with torch.no_grad():
        q, k, v = own.conv1(x), own.conv2(x), own.conv3(x)
        terms = [own._attend(q, k, v)]
        for conv in parts.dep_convs:
            own.dep_conv.weight = nn.Parameter(conv.weight.detach().cpu().double())
            own.dep_conv.bias = None
            terms.append(own._convolve(q, k, v))
    return [*terms, x] if x.shape == terms[0].shape else terms


def _with_factors(
    block: ACmix, parts: _Parts, rates: Iterable[nn.Parameter], factors: Tensor, exact: float, behind: list[nn.Module]
) -> ACmix:
    """``block`` with the measured ``factors`` [C, terms], as parameters of the original where these are it."""
    own, close = parts.dep_convs[0], max(10 * exact, 1e-6)
    unused = [rate for rate in rates if rate.numel() in (1, len(factors))]

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=close, atol=close * float(factors.abs().max()))

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().double().reshape(-1).expand(len(factors))

    def rate(values: Tensor) -> nn.Parameter:
        for found in unused:
            if same(wide(found), values):
                unused.remove(found)
                return _as_rate(found)
        values = values[:1] if same(values[:1], values) else values.view(1, -1, 1, 1)
        return nn.Parameter(values.to(own.weight))

    count = len(parts.dep_convs)
    convolutions, shift = factors[:, 1 : 1 + count], factors[:, -1]
    block.rate1 = rate(factors[:, 0])
    if count == 1 and bool((convolutions.abs() > close).all()):
        block.rate2 = rate(convolutions[:, 0])
        bias = shift / convolutions[:, 0]
        if own.bias is None or not same(wide(own.bias) * convolutions[:, 0], shift):
            block.dep_conv.bias = None if same(shift, torch.zeros_like(shift)) else nn.Parameter(bias.to(own.weight))
    else:
        kernels = [conv.weight.detach().cpu().double() for conv in parts.dep_convs]
        weight = sum(factor.view(-1, 1, 1, 1) * kernel for factor, kernel in zip(convolutions.T, kernels, strict=True))
        assert isinstance(weight, Tensor)
        block.rate2 = nn.Parameter(own.weight.new_ones(1))
        block.dep_conv.weight, block.dep_conv.bias = (nn.Parameter(t.to(own.weight)) for t in (weight, shift))
    if factors.shape[1] > count + 2 and not same(factors[:, -2], torch.zeros_like(shift)):
        block.kept = rate(factors[:, -2])
    if behind:
        block.behind = behind[0] if len(behind) == 1 else nn.Sequential(*behind)
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
