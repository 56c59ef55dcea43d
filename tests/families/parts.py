"""What tests of blocks share: random weights, files as PyTorch's exporters write them, and what those compute."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from acmix_deploy.families import FAMILIES, canonicalise
from acmix_deploy.families.examples import Examples
from acmix_deploy.families.family import Family
from acmix_deploy.fusion import FusionReport, fuse
from acmix_deploy.runtime.inputs import AXES
from acmix_deploy.runtime.onnxruntime import open_session


class Variant(NamedTuple):
    """One of a family's blocks."""

    family: Family[Any]
    examples: Examples

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.family.name, self.examples.variant)))


def variants_of(family: Family[Any]) -> list[Variant]:
    found: tuple[Examples, ...] = import_module(f"acmix_deploy.families.{family.name}.examples").EXAMPLES
    return [Variant(family, examples) for examples in found]


VARIANTS = [variant for family in FAMILIES for variant in variants_of(family)]


EXPORTS = [
    pytest.param(exporter, dynamic, id=f"{exporter}-{'dynamic' if dynamic else 'static'}", marks=marks)
    for exporter, dynamic, marks in (
        ("torchscript", (), ()),
        ("torchscript", AXES, ()),
        ("dynamo", AXES, ()),
        ("dynamo", (), pytest.mark.soak),  # as its dynamic graphs, with sizes filled in
    )
]
"""Exporters, and the axes that they leave free."""


def exports_of(names: Iterable[str], by_dynamo: Collection[str]) -> list[Any]:
    """Each name by each of :data:`EXPORTS`; by the slow one only those of ``by_dynamo``, the others as soak."""
    return [
        pytest.param(
            name,
            *export.values,
            id=f"{export.id}-{name}",
            marks=[*export.marks, *[pytest.mark.soak] * (export.id == "dynamo-dynamic" and name not in by_dynamo)],
        )
        for export in EXPORTS
        for name in names
    ]


def example(variant: Variant, *, as_others_have_it: bool = False) -> tuple[Any, Tensor]:
    """A block of 8 channels, and two maps for it."""
    examples = variant.examples
    make = (as_others_have_it and examples.as_others_have_it) or examples.block
    x = torch.randn(2, 8, 8, 12, generator=torch.Generator().manual_seed(0))
    return randomised(make(8)), x.permute(0, 2, 3, 1).contiguous() if examples.channels_last else x


class Model(nn.Module):
    """A block between convolutions, with a residual where sizes allow, as in a detector: from 3 channels to 4."""

    def __init__(self, variant: Variant, block: nn.Module | None = None, *, channels: int = 8) -> None:
        super().__init__()
        examples = variant.examples
        self.channels_last, self.resizes = examples.channels_last, examples.resizes
        self.before, self.block = nn.Conv2d(3, channels, 1), block or examples.block(channels)
        self.after = nn.Conv2d(channels, 4, 1)
        randomised(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).relu()
        y = self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.channels_last else self.block(x)
        return self.after(y if self.resizes else x + y)


def randomised(module: nn.Module) -> Any:
    """The module in eval mode, with all that it learns and its statistics drawn anew: no value is without effect."""
    generator = torch.Generator().manual_seed(0)

    def random(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * 0.5

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(random(parameter))
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.copy_(random(layer.running_mean))
                layer.running_var.copy_(random(layer.running_var).abs() + 0.5)
    return module.eval()


def relative_l2(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    actual, expected = (torch.as_tensor(value).detach().double() for value in (actual, expected))
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def export(
    module: nn.Module,
    x: Tensor,
    path: Path,
    *,
    exporter: str = "torchscript",
    dynamic: Collection[str] = (),
    opset: int = 17,
    fold: bool = True,
    divisor: int = 1,
) -> Path:
    """Write ``module`` as ONNX by one of PyTorch's exporters, with the axes named in ``dynamic`` free.

    Heights and widths are multiples of ``divisor``, which the dynamo exporter wants to be told.
    """
    axes = {AXES[name]: name for name in dynamic}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            free: dict[int, Any] = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
            if divisor > 1:
                free |= {axis: divisor * torch.export.Dim(name, min=2, max=64) for axis, name in axes.items() if axis}
            torch.onnx.export(
                module, (x,), path, dynamo=True, opset_version=18, dynamic_shapes=(free,) if free else None,
                verbose=False, external_data=False,
            )  # fmt: skip
        else:
            torch.onnx.export(
                module, (x,), path, dynamo=False, opset_version=opset, input_names=["x"], do_constant_folding=fold,
                dynamic_axes={"x": axes},
            )  # fmt: skip
    return path


def outputs(path: Path, x: Tensor) -> Any:
    """The first output."""
    session = open_session(path)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def assert_fused(
    family: Family[Any], model: nn.Module, source: Path, *inputs: Tensor, count: int = 1, **options: Any
) -> FusionReport:
    """Fusing ``source`` to ``fused.onnx`` beside it replaces ``count`` blocks of ``family`` and changes no result."""
    target = source.with_name("fused.onnx")
    report = fuse(source, target, expect=count, **options).found
    assert [block.family for block in report.blocks if block.fused] == [family.name] * count
    kinds = operators(target)
    if family.operators:
        assert sum(kinds.count(operator.op_type) for operator, _ in family.operators) == count
        assert not {"Softmax", "Col2Im", "ConvTranspose", "Pad"} & {*kinds}
    for x in inputs:
        assert relative_l2(outputs(target, x), model(x)) < family.tolerances["float32"].floor
    return report


def assert_left_alone_in_a_module(family: Family[Any], module: nn.Module, reason: str | None) -> None:
    """It is not replaced, and mentioned for a reason with these words; not at all where they are None."""
    randomised(module)
    model, reports = canonicalise(nn.Sequential(nn.Identity(), module))
    assert model[1] is module
    left_alone = ("1", type(module).__name__, family.name, "left alone", None)
    found = [(report.name, report.class_name, report.family, report.status, report.geometry) for report in reports]
    assert found == [left_alone] * (reason is not None)
    assert all(reason in report.reason for report in reports), reports


def assert_left_alone_in_a_graph(
    family: Family[Any], model: nn.Module, source: Path, x: Tensor, reason: str | None
) -> None:
    """The same of the graph in ``source``, whose first result stays as it is."""
    target = source.with_name("fused.onnx")
    blocks = fuse(source, target, expect=0).found.blocks
    assert {block.family for block in blocks} == ({family.name} if reason is not None else set()), blocks
    assert all(reason in block.reason for block in blocks), blocks
    expected = model(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert relative_l2(outputs(target, x), expected) < family.tolerances["float32"].floor
