"""What tests of blocks share: random weights, files as PyTorch's exporters write them, and what those compute."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from acmix_deploy.families import FAMILIES
from acmix_deploy.fusion import fuse
from acmix_deploy.runtime.inputs import AXES
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session


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
) -> Path:
    """Write ``module`` as ONNX by one of PyTorch's exporters, with the axes named in ``dynamic`` free."""
    axes = {AXES[name]: name for name in dynamic}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if dynamic else None
            torch.onnx.export(
                module, (x,), path, dynamo=True, opset_version=18, dynamic_shapes=shapes, verbose=False,
                external_data=False,
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
    family: str, model: nn.Module, source: Path, *inputs: Tensor, count: int = 1, **options: Any
) -> onnx.ModelProto:
    """Fusing ``source`` replaces ``count`` blocks of ``family`` and changes no result."""
    (limit,) = (known.tolerances["float32"].floor for known in FAMILIES if known.name == family)
    target = source.with_name("fused.onnx")
    report = fuse(source, target, expect=count, **options).found
    assert [block.family for block in report.blocks if block.fused] == [family] * count
    for x in inputs:
        with torch.no_grad():
            found = deviation(model(x).numpy(), outputs(target, x))
        assert not found.problem
        assert found.relative_l2 < limit
    return onnx.load(target)
