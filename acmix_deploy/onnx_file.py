"""What an ONNX file holds, as far as building from it or looking into it needs: operators, free axes, form, types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import onnx
from onnx import helper
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.operators import OPERATORS
from acmix_deploy.runtime.onnxruntime import precision_of
from acmix_deploy.targets import READ_SINCE, Precision, Target

FormFound = Literal["any", "plugin", "plain"]

_SHOWN = 3  # names in a sentence


class OnnxTensor(BaseModel):
    """An input or output of the file."""

    model_config = ConfigDict(frozen=True)

    name: str
    dtype: str = Field(description="element type by NumPy's name")
    shape: tuple[int | str, ...] = Field(description="sizes; a name or ? where an axis is free")


class CustomNode(BaseModel):
    """One node of a custom operator: a fused block."""

    model_config = ConfigDict(frozen=True)

    name: str
    operator: str
    attributes: dict[str, Any]


class OnnxFile(BaseModel):
    """An ONNX file in short."""

    model_config = ConfigDict(frozen=True)

    opset: int = Field(description="version of the standard operators")
    ir_version: int = Field(description="version of the file format")
    producer: str = Field(description="what wrote the file")
    inputs: tuple[OnnxTensor, ...]
    outputs: tuple[OnnxTensor, ...]
    operators: dict[str, int] = Field(description="nodes of the graph by type, most frequent first")
    functions: tuple[str, ...] = Field(description="custom operators with a definition in the file")
    fused: tuple[CustomNode, ...] = Field(description="nodes of this package's operators")
    form: FormFound = Field(
        description="any: custom operators with definitions, plugin: without them, plain: no custom operator"
    )
    precision: Precision = Field(description="int8 with Q/DQ nodes, float16 as soon as a tensor is, else float32")
    metadata: ModelMetadata = Field(description="properties that the exporter left, such as class names")


def describe(model: onnx.ModelProto) -> OnnxFile:
    """An ONNX model in short."""
    functions = tuple(f"{function.domain}.{function.name}" for function in model.functions)
    fused = tuple(fused_nodes(model))
    counts = Counter(node.op_type for node in _nodes(model.graph.node))
    return OnnxFile(
        opset=opset(model),
        ir_version=model.ir_version,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=tuple(map(_tensor, inputs(model))),
        outputs=tuple(map(_tensor, model.graph.output)),
        operators=dict(counts.most_common()),
        functions=functions,
        fused=tuple(
            CustomNode(name=node.name, operator=f"{node.domain}.{node.op_type}", attributes=_attributes(node))
            for node in fused
        ),
        form="plain" if not fused else "any" if functions else "plugin",
        precision=precision_of(model),
        metadata=ModelMetadata.of(model),
    )


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operators that the file uses."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs of the graph; before IR version 4 its weights stand among them."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in stored]


def fused_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of this package's operators."""
    ours = {(operator.domain, operator.op_type) for operator in OPERATORS}
    return [node for node in model.graph.node if (node.domain, node.op_type) in ours]


def counted(operators: Mapping[str, int]) -> str:
    """Operators by how often they are there, in words: "3 Conv"."""
    return ", ".join(f"{count} {operator}" for operator, count in operators.items())


def operators(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Names of the nodes by type, with those in branches, loops and functions; functions of the file left out."""
    functions = {(function.domain, function.name) for function in model.functions}
    bodies = (node for function in model.functions for node in function.node)
    found: dict[str, list[str]] = {}
    for node in _nodes([*model.graph.node, *bodies]):
        if (node.domain, node.op_type) not in functions:
            found.setdefault(node.op_type, []).append(node.name or f"the one that makes {node.output[0]}")
    return found


def unread(model: onnx.ModelProto, target: Target) -> dict[str, tuple[str, ...]]:
    """Operators that the parser of a target does not read, with their nodes; those of this package left out.

    A parser goes by the name alone, whatever the domain. For what it does not read it looks for a plugin of that name.
    """
    ours = {operator.op_type for operator in OPERATORS}
    return {
        operator: tuple(nodes)
        for operator, nodes in operators(model).items()
        if operator not in ours and not (_is_standard(operator, opset(model)) and target.reads(operator))
    }


def unread_note(operator: str, nodes: Sequence[str]) -> str:
    """What a person has to know of an operator that a TensorRT does not read: "Col2Im (/fold), which ..."."""
    since = READ_SINCE.get(operator)
    release = f"TensorRT before {'.'.join(map(str, since))}" if since else "TensorRT"
    return (
        f"{operator} ({some(nodes)}), which {release} does not read: a plugin called {operator} is needed there, "
        "or a model without it"
    )


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    """Sizes of a declared tensor, with a name or ``?`` where an axis is free."""
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim
    )


def _is_standard(operator: str, opset: int) -> bool:
    try:
        onnx.defs.get_schema(operator, opset)
    except onnx.defs.SchemaError:
        return False
    return True


def _tensor(value: onnx.ValueInfoProto) -> OnnxTensor:
    element = value.type.tensor_type.elem_type
    known = element in helper.get_all_tensor_dtypes()
    dtype = helper.tensor_dtype_to_np_dtype(element).name if known else "unknown"
    return OnnxTensor(name=value.name, dtype=dtype, shape=shape(value))


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Numbers as they are, all else as text."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    texts = {name: value.decode(errors="replace") for name, value in values.items() if isinstance(value, bytes)}
    return {name: value if isinstance(value, (int, float)) else str(value) for name, value in (values | texts).items()}


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, and those in their branches and loops."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g.node)
