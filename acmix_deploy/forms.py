"""A fused or typed ONNX file in the form that a target takes: see :data:`acmix_deploy.targets.Form`.

A node becomes standard operators by a copy of its definition with the node's own attributes and element type filled in,
which onnx.inliner puts in its place. TensorRT 8 knows no CastLike and misreads ``value_int``; such a copy has neither.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, inliner, numpy_helper, shape_inference
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy import onnx_file
from acmix_deploy.artifacts import StageResult, replacing, write_artifact
from acmix_deploy.errors import UserError
from acmix_deploy.graph import in_order, keep, name_nodes, read, with_weights
from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.axes import quantities
from acmix_deploy.runtime.onnxruntime import unlogged
from acmix_deploy.targets import Form, Target

_OPERATORS = {(operator.domain, operator.op_type): operator for operator in OPERATORS}
_STANDARD = ("", "ai.onnx")
_NORMALIZATION = "LayerNormalization"
_LARGEST_CONSTANT = 1 << 20  # bytes; what is larger stays computed, such as P*l of a large map


class TargetReport(BaseModel):
    """The file to carry to a target."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="the target, as in docs/targets.md")
    tensorrt: str = Field(
        description="its TensorRT, major and minor version; empty where something else reads the file"
    )
    form: Form = Field(description="any: nodes and definitions; plugin: nodes alone; plain: standard operators")
    file: str = Field(description="name of the file")
    inlined: dict[str, str] = Field(
        description="nodes that the plugin refuses, and why; standard operators in the file"
    )
    unread: dict[str, tuple[str, ...]] = Field(
        default={},
        description="what its TensorRT does not read, with the nodes: an operator, or one with what keeps it from it",
    )


def write_for(target: Target, source: Path, form: Form | None = None) -> StageResult[TargetReport]:
    """Write the file for a target beside the file that it is made from: ``NAME.TARGET.onnx``, with a sidecar.

    Args:
        target: what reads it.
        source: fused or typed ONNX file.
        form: another one than the target's own. A file without a node for the plugin is "plain" whatever is asked.

    Raises:
        UserError: the target reads no file of this opset or form, or a definition is missing.
    """
    model = read(source)
    name_nodes(model)
    target.check_opset(onnx_file.opset(model), str(source))
    inlined = {} if form == "plain" or target.tensorrt is None else refused(model)
    if form:
        target.check_form(form)
    made = (form or target.form) if takes_plugin(model) else "plain"
    path = source.with_name(f"{source.stem}.{target.name}.onnx")
    formed = to_form(model, made)
    if target.tensorrt:
        onnx_file.leave_out_defaults(formed)
        if not target.reads(_NORMALIZATION):
            _spell_layer_normalization(formed)
    with replacing(path) as temporary:
        onnx.save(formed, temporary)
    report = TargetReport(
        name=target.name,
        tensorrt=target.version,
        form=made,
        file=path.name,
        inlined=inlined,
        unread=onnx_file.unread(formed, target) if target.tensorrt else {},
    )
    settings = {"target": target.name, "tensorrt": target.version, "form": made}
    return StageResult(write_artifact(path, "target", parents=with_weights(source), settings=settings), report)


def to_form(model: onnx.ModelProto, form: Form) -> onnx.ModelProto:
    """The model in another form; ``model`` itself stays as it is.

    "any" and "plugin" keep the custom nodes that the plugin takes. All other custom nodes become standard operators,
    named after the node that they were: ``acmix_0.attention/MatMul_91__1``. What can be computed of them beforehand is
    stored, so that little index arithmetic is left where shapes are static. "plugin" and "plain" have no functions.

    Args:
        model: with its custom operators as nodes and, for those that are to become standard operators, as functions.
        form: the form wanted.

    Raises:
        UserError: the definition of a custom operator that has to become standard operators is not in the model.
    """
    formed = onnx.ModelProto()
    formed.CopyFrom(model)
    name_nodes(formed)
    in_order(formed)
    formed = _inline(formed, refused(formed) if form != "plain" else {node.name for node in custom_nodes(formed)})
    if form != "any":
        # Without the definitions nobody can infer what is behind a custom node.
        formed = shape_inference.infer_shapes(formed, data_prop=True)
        formed = inliner.inline_selected_functions(formed, [*_OPERATORS], exclude=True)
        del formed.functions[:]
    used = {*_STANDARD, *(node.domain for node in (*formed.graph.node, *formed.functions))}
    imports = [entry for entry in formed.opset_import if entry.domain in used]
    del formed.opset_import[:]
    formed.opset_import.extend(imports)
    name_nodes(formed)
    if form != "plugin":  # the checker knows a custom operator by its function
        onnx.checker.check_model(formed)
    return formed


def _spell_layer_normalization(model: onnx.ModelProto) -> None:
    """Write each LayerNormalization of the graph in operators that TensorRT 8.5 reads, in place; opset 17.

    One stays whose other outputs are read, that is not in float32, or whose axis counts from the front of a tensor of
    unknown rank.
    """
    tensors = _tensors(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        axis = values.get("axis", -1)
        rank = len(tensors[node.input[0]][1]) if node.op_type == _NORMALIZATION and node.input[0] in tensors else 0
        first = axis - rank if axis >= 0 else axis
        float32 = node.op_type == _NORMALIZATION and tensors.get(node.input[1], (0,))[0] == onnx.TensorProto.FLOAT
        if not float32 or node.domain not in _STANDARD or any(node.output[1:]) or first >= 0:
            nodes.append(node)
            continue
        epsilon = f"{node.name}/epsilon"
        model.graph.initializer.append(numpy_helper.from_array(np.float32(values.get("epsilon", 1e-5)), epsilon))
        nodes += _normalized(node, [*range(first, 0)], epsilon)
    keep(model.graph.node, nodes)


def _normalized(node: onnx.NodeProto, axes: list[int], epsilon: str) -> list[onnx.NodeProto]:
    """A LayerNormalization by its definition: (x - mean) / sqrt(variance + epsilon) * scale + bias."""
    made: list[onnx.NodeProto] = []

    def add(operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"{node.name}/{operator}_{len(made)}"
        made.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    x, scale, *bias = filter(None, node.input)
    difference = add("Sub", x, add("ReduceMean", x, axes=axes))
    variance = add("ReduceMean", add("Mul", difference, difference), axes=axes)
    y = add("Mul", add("Div", difference, add("Sqrt", add("Add", variance, epsilon))), scale)
    if bias:
        add("Add", y, *bias)
    made[-1].output[0] = node.output[0]
    return made


def takes_plugin(model: onnx.ModelProto) -> bool:
    """Whether there is a node that the plugin computes."""
    return len(custom_nodes(model)) > len(refused(model))


def owner(node: str, nodes: Collection[str]) -> str:
    """Which of ``nodes`` a node of the form "plain" was made from, by their names; itself where that is not told."""
    return next((name for name in (node, node.rpartition("/")[0]) if name in nodes), node)


def refused(model: onnx.ModelProto) -> dict[str, str]:
    """The custom nodes that the plugin does not take, by name, and what is outside ``Operator.kernel_limits``."""
    tensors = _tensors(model)
    found = {}
    for node in custom_nodes(model):
        operator = _OPERATORS[node.domain, node.op_type]
        shapes = [tensors[name][1] if name in tensors else () for name in node.input]
        sizes = quantities(operator, _attributes(node), shapes)
        outside = [
            f"{name} {sizes.get(name, 'unknown')}"
            for name, values in operator.kernel_limits.items()
            if sizes.get(name) not in values
        ]
        if outside:
            found[node.name] = ", ".join(outside)
    return found


def _inline(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """The model with the custom nodes called ``names`` as standard operators."""
    if not names:
        return model
    bodies = {(function.domain, function.name): function for function in model.functions}
    tensors = _tensors(model)
    copies = []
    for node in [node for node in custom_nodes(model) if node.name in names]:
        body = bodies.get((node.domain, node.op_type))
        if body is None:
            raise UserError(
                f"the file holds {node.op_type} without its definition in standard operators",
                "Give the fused or typed file that it was made from.",
            )
        types = [tensors[name][0] for name in node.input if name in tensors]
        if not types:
            raise UserError(f"the element type of {node.name} does not follow from the file", "Export it again.")
        copies.append(_filled_in(body, node, types[0]))
        node.op_type = copies[-1].name
        del node.attribute[:]
    model.functions.extend(copies)
    inlined = shape_inference.infer_shapes(
        inliner.inline_selected_functions(model, [(copy.domain, copy.name) for copy in copies]), data_prop=True
    )
    ours = tuple(f"{name}/" for name in names)
    graph = gs.import_onnx(inlined)
    with unlogged():  # graphsurgeon folds with ONNX Runtime; its warnings help nobody here
        graph.fold_constants(
            size_threshold=_LARGEST_CONSTANT,
            should_exclude_node=lambda node: not node.name.startswith(ours),
            recurse_functions=False,
        )
    graph.cleanup().toposort()
    inlined.graph.CopyFrom(gs.export_onnx(graph, do_type_check=False).graph)  # graphsurgeon drops the metadata
    return inlined


def _filled_in(body: onnx.FunctionProto, node: onnx.NodeProto, element_type: int) -> onnx.FunctionProto:
    """A definition for one node alone: without attributes, in the type of its tensors."""
    attributes = _attributes(node)
    copy = onnx.FunctionProto()
    copy.CopyFrom(body)
    copy.name = f"{body.name}/{node.name}"
    del copy.attribute[:]
    for index, inner in enumerate(copy.node):
        if inner.op_type == "CastLike":
            inner.op_type = "Cast"
            del inner.input[1:]
            inner.attribute.append(helper.make_attribute("to", element_type))
        inner.name = f"{node.name}/{inner.op_type}_{index}"
        for attribute in list(inner.attribute):
            if attribute.ref_attr_name:
                kind = np.int64 if attribute.type == onnx.AttributeProto.INT else np.float32
                value = numpy_helper.from_array(np.array(attributes[attribute.ref_attr_name], kind))
                attribute.CopyFrom(helper.make_attribute("value", value))
    return copy


def custom_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of custom operators. Raises UserError for one that is not as its operator is defined."""
    found = [node for node in model.graph.node if (node.domain, node.op_type) in _OPERATORS]
    for node in found:
        operator = _OPERATORS[node.domain, node.op_type]
        wrong = [f"{len(node.input)} inputs"] * (len(node.input) != len(operator.inputs))
        values = _attributes(node)
        for attribute in operator.attributes:
            value = values[attribute.name]
            low = isinstance(value, int) and attribute.minimum is not None and value < attribute.minimum
            wrong += [f"{attribute.name} {value}"] * (low or type(value) is not type(attribute.default))
        if wrong:
            raise UserError(
                f"{node.name} is no {node.op_type}: it has {', '.join(wrong)}",
                "docs/operator.md defines it; give a file that `acmix-deploy fuse` wrote.",
            )
    return found


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a custom node, those left out at their default."""
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    texts = {name: value.decode(errors="replace") for name, value in values.items() if isinstance(value, bytes)}
    defaults: dict[str, Any] = {
        attribute.name: attribute.default for attribute in _OPERATORS[node.domain, node.op_type].attributes
    }
    return defaults | values | texts


def _tensors(model: onnx.ModelProto) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Element type and sizes of the tensors of a graph, as far as they are known; 0 for a free size."""
    graph = shape_inference.infer_shapes(model).graph
    types = [(value.name, value.type.tensor_type) for value in (*graph.input, *graph.value_info, *graph.output)]
    found = {name: (type.elem_type, tuple(dim.dim_value for dim in type.shape.dim)) for name, type in types}
    return found | {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}
