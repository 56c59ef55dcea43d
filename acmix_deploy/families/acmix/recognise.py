"""ACmix blocks inside any module, known by their parts and their results: names and class names prove nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from acmix_deploy.errors import UserError
from acmix_deploy.families import BlockReport
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION

_COMMON_KERNELS = (7, 3, 5, 9, 11, 13)  # tried where a block does not tell its window
_LAYER_ATTRIBUTES = ("i", "f", "type", "np")  # what Ultralytics sets on a layer: index, inputs, class name, size


class _NotAcmix(Exception):
    """Why a module is not an ACmix block."""


def canonicalise(model: nn.Module) -> tuple[nn.Module, list[BlockReport]]:
    """Swap, in place, each ACmix block of ``model`` for an :class:`ACmix` with the same weights, proven equal.

    A block is a module with three 1x1 convolutions of one shape, those of the position and of the maps, the grouped
    3x3 convolution and two rates. It is swapped if it and its replacement agree on random input: in float64 if the
    original runs in it, else in float32 or in its own type, and with whatever it sends to CUDA kept on the CPU. The
    replacement holds the original's parameters (type, device and ``requires_grad`` included), its mode and what
    Ultralytics notes on a layer.

    Returns:
        The model (another object where the model itself was a block), and a report for each block and for each module
        that only resembles one by its class name or its parts' names.
    """
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    replacements: dict[nn.Module, ACmix] = {}
    reports: dict[nn.Module, BlockReport] = {}
    for module, its_paths in paths.items():
        report = BlockReport(
            name=", ".join(its_paths), class_name=type(module).__name__, family="acmix", status="canonical"
        )
        try:
            if type(module) is ACmix:
                report.geometry = _geometry(module)
            else:
                replacements[module], report.repaired = _replacement(module)
                report.status, report.geometry = "replaced", _geometry(replacements[module])
        except _NotAcmix as reason:
            if not _resembles_acmix(module):
                continue
            report.status, report.reason = "left alone", str(reason)
        reports[module] = report

    containers = {module for module in reports if any(part in reports for part in list(module.modules())[1:])}
    for parent in paths:
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model), [report for module, report in reports.items() if module not in containers]


def _geometry(block: ACmix) -> dict[str, int]:
    return {key: getattr(block, key) for key in ("in_planes", "out_planes", "kernel_att", "head", "stride")}


def _resembles_acmix(module: nn.Module) -> bool:
    parts = {name for name, _ in module.named_children()}
    return "acmix" in type(module).__name__.lower() or {"conv_p", "dep_conv"} <= parts


def _replacement(module: nn.Module) -> tuple[ACmix, list[str]]:
    """The canonical block that computes what ``module`` does, and what it repairs. Raises _NotAcmix."""
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
    x = torch.randn(2, blocks[0].in_planes, *size, generator=torch.Generator().manual_seed(0))
    try:
        expected, repaired = _run_original(module, x, own_dtype=parts["conv1"].weight.dtype)
    except Exception as error:
        failure = f"its own forward fails: {type(error).__name__}: {str(error).splitlines()[0]}"
        raise _NotAcmix("; ".join([*refusals, failure])) from error
    half = expected.dtype in (torch.float16, torch.bfloat16)
    limit = LOCAL_ATTENTION.tolerances["float16" if half else "float32"].limit()
    distances = []
    for block in blocks:
        distances.append(_relative_l2(_run(block, x, expected.dtype), expected))
        if distances[-1] <= limit:
            break
    else:
        difference = (
            f"on random input it differs from ACmix with kernel_att={blocks[0].kernel_att} by a relative L2 of "
            f"{distances[0]:.1e} (limit {limit:.0e})"
        )
        raise _NotAcmix(refusals[0] if refusals else difference)

    if parts["dep_conv"].bias is None:
        repaired.append("dep_conv.bias is None")
    if any(rate.dim() == 0 for rate in rates):
        repaired.append("scalar rates widened to shape (1,)")
    for name in _LAYER_ATTRIBUTES:
        if hasattr(module, name):
            setattr(block, name, getattr(module, name))
    return block.train(module.training), repaired


def _parts(module: nn.Module) -> dict[str, nn.Conv2d]:
    """The block's convolutions under their published names, found by shape. Raises _NotAcmix."""
    convolutions = [child for child in module.children() if isinstance(child, nn.Conv2d)]

    def take(meaning: str, fits: Callable[[nn.Conv2d], bool]) -> nn.Conv2d:
        # From the end, since with few channels the projections, which come first, may fit as well.
        for found in reversed(convolutions):
            if fits(found):
                convolutions.remove(found)
                return found
        raise _NotAcmix(f"it has no {meaning} among its convolutions")

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
        raise _NotAcmix(f"it has not three 1x1 convolutions from its input to {planes} channels beside those")
    conv1, conv2, conv3 = convolutions
    return {"conv1": conv1, "conv2": conv2, "conv3": conv3, "conv_p": conv_p, "fc": fc, "dep_conv": dep_conv}


def _is_pointwise(convolution: nn.Conv2d, in_channels: int, out_channels: int) -> bool:
    shape = (convolution.in_channels, convolution.out_channels, convolution.kernel_size, convolution.groups)
    return shape == (in_channels, out_channels, (1, 1), 1)


def _rates(module: nn.Module) -> list[nn.Parameter]:
    """The factors of the attention and of the convolution branch, in this order. Raises _NotAcmix."""
    rates = [parameter for parameter in module.parameters(recurse=False) if parameter.numel() == 1]
    if len(rates) != 2:
        raise _NotAcmix(f"it has {len(rates)} one-element parameters, not the two rates of its branches")
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


class _OnCpu(TorchFunctionMode):
    """Keeps on the CPU what code inside would move to CUDA, and notes the faults of published blocks that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            self.faults["tensors moved to CUDA whatever the input's device"] = None
            return args[0]
        if func is torch.linspace:
            self.faults["position computed with linspace"] = None
        kwargs = {key: _cpu_for_cuda(value) for key, value in (kwargs or {}).items()}
        return func(*map(_cpu_for_cuda, args), **kwargs)


def _cpu_for_cuda(value: Any) -> Any:
    return "cpu" if isinstance(value, (str, torch.device)) and str(value).startswith("cuda") else value


def _run(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a copy of ``module`` in ``dtype`` on the CPU makes of ``x``."""
    with torch.no_grad():
        y: Tensor = copy.deepcopy(module).cpu().to(dtype).eval()(x.to(dtype))
    return y


def _run_original(module: nn.Module, x: Tensor, own_dtype: torch.dtype) -> tuple[Tensor, list[str]]:
    """The block's own result, in the widest type that it runs in, and the faults seen. Raises what the block does."""
    failures: dict[torch.dtype, Exception] = {}
    results = {}
    with _OnCpu() as watch:
        for dtype in dict.fromkeys((torch.float64, torch.float32, own_dtype)):
            try:
                results[dtype] = _run(module, x, dtype)
            except Exception as failure:
                failures[dtype] = failure
    if not results:
        raise failures[torch.float32]
    faults = list(watch.faults)
    if own_dtype in failures:
        faults.append(f"does not run in the {str(own_dtype).removeprefix('torch.')} of its weights")
    return next(iter(results.values())), faults


def _relative_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, infinite for tensors of unlike shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
