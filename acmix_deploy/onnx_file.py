"""What an ONNX file holds, as far as building from it or looking into it needs: operators, free axes, form, types."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.operators import OPERATORS
from acmix_deploy.runtime.onnxruntime import precision_of
from acmix_deploy.targets import LIMITS, READ_SINCE, WAYS_OUT, Limit, Precision, Target, Version

FormFound = Literal["any", "plugin", "plain"]

_SHOWN = 3  # names in a sentence
_SMALL = 1 << 16  # values of a constant that are looked at


class OnnxTensor(BaseModel):
    """An input or output of the file."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="of the tensor")
    dtype: str = Field(description="element type by NumPy's name")
    shape: tuple[int | str, ...] = Field(description="sizes; a name or ? where an axis is free")


class CustomNode(BaseModel):
    """One node of a custom operator: a fused block."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="of the node")
    operator: str = Field(description="type of the node")
    attributes: dict[str, Any] = Field(description="its attributes, by name")


class OnnxFile(BaseModel):
    """An ONNX file in short."""

    model_config = ConfigDict(frozen=True)

    opset: int = Field(description="version of the standard operators")
    ir_version: int = Field(description="version of the file format")
    producer: str = Field(description="what wrote the file")
    inputs: tuple[OnnxTensor, ...] = Field(description="what it takes")
    outputs: tuple[OnnxTensor, ...] = Field(description="what it gives")
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
            found.setdefault(node.op_type, []).append(_called(node))
    return found


def unread(model: onnx.ModelProto, target: Target) -> dict[str, tuple[str, ...]]:
    """What the parser of a target does not read, with its nodes: operators, and those outside its limits.

    A parser goes by the name alone, whatever the domain. For what it does not read it looks for a plugin of that name.
    Operators of this package are left out. Limits are told as "Resize with antialias 1", by :data:`LIMITS`.
    """
    ours = {operator.op_type for operator in OPERATORS}
    found = {
        operator: tuple(nodes)
        for operator, nodes in operators(model).items()
        if operator not in ours and not (_is_standard(operator, opset(model)) and target.reads(operator))
    }
    outside: dict[str, list[str]] = {}
    for node, limit, value in _limits(model):
        if target.tensorrt and node.op_type not in found and (limit.since is None or target.tensorrt < limit.since):
            outside.setdefault(f"{node.op_type} with {limit.told.format(_shown_value(value))}", []).append(
                _called(node)
            )
    return found | {what: tuple(nodes) for what, nodes in outside.items()}


def zero_points(model: onnx.ModelProto) -> tuple[str, ...]:
    """The nodes that quantise with a zero point other than 0, which no TensorRT reads."""
    return tuple(_called(node) for node, limit, _ in _limits(model) if limit.fact.endswith("zero_point.value"))


def read_since(model: onnx.ModelProto) -> Version:
    """The first TensorRT that reads all that some release reads; (8, 5) where all that are supported do."""
    since = [READ_SINCE.get(operator) for operator in operators(model)]
    since += [limit.since for _, limit, _ in _limits(model)]
    return max([(8, 5), *filter(None, since)])


def unread_note(what: str, nodes: Sequence[str]) -> str:
    """What a person has to know of one entry of :func:`unread`: "Col2Im (/fold), which TensorRT does not read: ..."."""
    operator, _, told = what.partition(" with ")
    limit = next((one for one in LIMITS if operator in one.operators.split() and _tells(one, told)), None)
    since, way = (limit.since, limit.way) if limit else (READ_SINCE.get(operator), WAYS_OUT.get(operator, ""))
    release = f"TensorRT before {'.'.join(map(str, since))}" if since else "TensorRT"
    plugin = "" if limit else f"a plugin called {operator} is needed there, or "
    needed = f"{plugin}a model without it{' is needed there' * (not plugin)}"
    return f"{what} ({some(nodes)}), which {release} does not read: {needed}{f'; {way}' if way else ''}"


def leave_out_defaults(model: onnx.ModelProto) -> None:
    """Take the reduction "none" out of every ScatterND, in place.

    It is ONNX's default and PyTorch's exporter states it. onnx-tensorrt refuses the attribute whatever it says, at 10.0
    and 10.1 (onnxOpImporters.cpp) and maybe up to 10.8, since docs/Changelog.md of 10.9 has a fix of ScatterND.
    """
    for node in _nodes([*model.graph.node, *(node for function in model.functions for node in function.node)]):
        if node.op_type == "ScatterND":
            keep = [
                attribute for attribute in node.attribute if (attribute.name, attribute.s) != ("reduction", b"none")
            ]
            del node.attribute[:]
            node.attribute.extend(keep)


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


def _called(node: onnx.NodeProto) -> str:
    return node.name or f"the one that makes {node.output[0]}"


def _tells(limit: Limit, told: str) -> bool:
    """Whether this is what a limit says of some value."""
    return re.fullmatch(re.escape(limit.told).replace(r"\{\}", ".+"), told) is not None


def _shown_value(value: Any) -> str:
    """A fact in a sentence; of several numbers the first ones."""
    return some([str(one) for one in value]) if isinstance(value, (list, tuple)) else str(value)


def _limits(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, Limit, Any]]:
    """The nodes that a release does not read for one of :data:`LIMITS`, with the fact."""
    limits: dict[str, list[Limit]] = {}
    for limit in LIMITS:
        for operator in limit.operators.split():
            limits.setdefault(operator, []).append(limit)
    bodies = (node for function in model.functions for node in function.node)
    nodes = [*_nodes([*model.graph.node, *bodies])]
    constants = {tensor.name: tensor for graph in _graphs(model.graph) for tensor in graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in nodes
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    if any(node.op_type == "GridSample" for node in nodes):
        graph = onnx.shape_inference.infer_shapes(model).graph
        ranks = {value.name: len(shape(value)) for value in (*graph.input, *graph.value_info) if _has_shape(value)}
    else:
        ranks = {}
    results = {value.name for value in model.graph.output}
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    known = {*constants, *(name for function in model.functions for name in function.input)}
    for node in nodes:
        if node.op_type == "Constant" or (node.input and known.issuperset(filter(None, node.input))):
            known.update(node.output)
    for node in nodes:
        if node.op_type in limits and node.domain in ("", "ai.onnx") and _is_standard(node.op_type, opset(model)):
            facts = _facts(
                node, onnx.defs.get_schema(node.op_type, opset(model)), constants, types, known, ranks, results
            )
            for limit in limits[node.op_type]:
                if limit.fact in facts and not limit.read(facts[limit.fact]):
                    yield node, limit, facts[limit.fact]


def _facts(
    node: onnx.NodeProto,
    schema: onnx.defs.OpSchema,
    constants: Mapping[str, onnx.TensorProto],
    types: Mapping[str, int],
    known: Container[str],
    ranks: Mapping[str, int],
    results: Container[str],
) -> dict[str, Any]:
    """What :attr:`Limit.fact` can name of a node, as far as the file tells."""
    defaults = [attribute.default_value for attribute in schema.attributes.values() if attribute.default_value.name]
    stated = [attribute for attribute in node.attribute if not attribute.ref_attr_name]
    held = {attribute.name: helper.get_attribute_value(attribute) for attribute in (*defaults, *stated)}
    facts = {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value for name, value in held.items()
    }
    for name in {attribute.name for attribute in node.attribute if attribute.ref_attr_name}:
        facts.pop(name, None)
    if node.op_type == "Cast" and "to" in facts:
        facts["to"] = onnx.TensorProto.DataType.Name(facts["to"])
        if node.output[0] not in results:
            facts["to.within"] = facts["to"]
    facts |= {"operands": len(node.input), "outputs": sum(map(bool, node.output))}
    for parameter, name in zip(schema.inputs, node.input, strict=False):
        if name in ranks:
            facts[f"{parameter.name}.rank"] = ranks[name]
        if name in types:
            facts[f"{parameter.name}.type"] = onnx.TensorProto.DataType.Name(types[name])
        if tensor := constants.get(name):
            if tensor.data_location != onnx.TensorProto.EXTERNAL and np.prod(tensor.dims) <= _SMALL:
                facts[f"{parameter.name}.value"] = tuple(numpy_helper.to_array(tensor).reshape(-1).tolist())
        elif name and name not in known:
            facts[f"{parameter.name}.value"] = None
    return facts


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    return bool(value.type.tensor_type.HasField("shape"))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and those in its branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


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
