"""What tests of every operator need: its oracle, its body, one problem, a file that holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.spec import Operator

TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}

every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)


def oracle_of(operator: Operator) -> Callable[..., torch.Tensor]:
    return getattr(import_module(f"acmix_deploy.operators.{operator.name}.oracle"), operator.name)


def oracle(operator: Operator, inputs: Sequence[np.ndarray], attributes: Mapping[str, Any]) -> np.ndarray:
    """y of the definition, in float64."""
    return oracle_of(operator)(*map(torch.from_numpy, inputs), **attributes).numpy()


def function_body(operator: Operator) -> Callable[..., onnx.FunctionProto]:
    return import_module(f"acmix_deploy.operators.{operator.name}.body").function_body


def attributes_of(operator: Operator, sizes: Mapping[str, int], **others: float) -> dict[str, Any]:
    """The attributes that are no sizes are given by name, ``scale`` by default as attention has it."""
    others = {"scale": sizes.get("head_dim", 1) ** -0.5, **others}
    names = [attribute.name for attribute in operator.attributes if attribute.kind != "string"]
    return {name: others[name] if name in others else sizes[name] for name in names}


def example_of(operator: Operator, **sizes: int) -> dict[str, int]:
    """All sizes by name: these, as far as the operator has them, two parts of 8 channels, the others 1."""
    usual = {"num_heads": 2, "groups": 2, "head_dim": 8, "group_channels": 8, **sizes}
    return {name: usual.get(name, 1) for name in operator.axes.values()}


def one_node_model(
    operator: Operator,
    dtype: str,
    shapes: Sequence[Sequence[int | str]],
    attributes: Mapping[str, Any],
    body: Callable[..., onnx.FunctionProto] | None = None,
    opset: int = 17,
) -> onnx.ModelProto:
    """A file with nothing but the operator and its body, for inputs of these shapes."""
    names = [tensor.name for tensor in operator.inputs]
    defaults = {attribute.name: attribute.default for attribute in operator.attributes}
    node = helper.make_node(operator.op_type, names, ["y"], domain=operator.domain, **{**defaults, **attributes})
    rank = len(operator.outputs[0].axes)
    *inputs, output = (
        helper.make_tensor_value_info(name, TYPES[dtype], shape)
        for name, shape in zip([*names, "y"], [*shapes, [None] * rank], strict=True)
    )
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, [output]),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(operator.domain, 1)],
        functions=[(body or function_body(operator))(opset)],
        ir_version=8 if opset <= 18 else 10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model
