"""What a file in float16 computes, on a machine without float16.

ONNX Runtime computes half nodes in float32 on a CPU and keeps what is between them in float32, where nothing is rounded
and nothing overflows. Tensor cores take half operands, accumulate in float32 and round what they store.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper, inliner, shape_inference

from acmix_deploy.forms import to_form
from acmix_deploy.graph import as_float32, in_order, keep
from acmix_deploy.operators import OPERATORS
from acmix_deploy.runtime.onnxruntime import open_session, precision_of
from acmix_deploy.runtime.reason import reason

HALF = TensorProto.FLOAT16

_EXACT = frozenset({
    "Abs", "Clip", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND",
    "GlobalMaxPool", "Identity", "Max", "MaxPool", "Min", "Neg", "Pad", "ReduceMax", "ReduceMin", "Relu",
    "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
"""Operators whose results are among their inputs, or these without their sign."""


def runnable(model: Path | onnx.ModelProto) -> Path | onnx.ModelProto:
    """What computes on a CPU what the file says: :func:`rounded` of one that holds float16, else the file itself."""
    held = onnx.load(model) if isinstance(model, Path) else model
    half = precision_of(held) == "float16" or any(tensor.data_type == HALF for tensor in held.graph.initializer)
    return rounded(held) if half else model


def faithful(model: Path | onnx.ModelProto) -> tuple[Path | onnx.ModelProto, str]:
    """What is :func:`runnable`; where the file cannot be rewritten the file itself, and why it cannot."""
    try:
        return runnable(model), ""
    except Exception as error:  # whatever rewriting a file stumbles over
        return model, reason(error)


def rounded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model in float32 that rounds every tensor which the file holds in float16 to what float16 holds of it.

    Between nodes computed in float32 stand pairs of Cast, to float16 and back, which ONNX Runtime executes at every
    level of optimisation. Nodes of custom operators that the plugin takes are computed in float32 and their results
    rounded, as the plugin does it; of all others each node of the definition is rounded. What is inside a branch or
    loop is not. TensorRT rounds less often: what it fuses with a convolution, such as an activation or a sum, stays in
    float32 until the last of them is stored.

    Args:
        model: any, with its definitions; it stays as it is.

    Returns:
        A model of the same inputs and outputs, those in float16 now float32. Tensors of the main graph keep their
        names; before it is rounded, ``x`` is ``exact x``.

    Raises:
        UserError: a custom operator has no definition in the file, or ONNX Runtime does not know an operator.
    """
    ordered = onnx.ModelProto()
    ordered.CopyFrom(model)
    in_order(ordered)
    formed = to_form(shape_inference.infer_shapes(ordered), "any")
    ours = {(operator.domain, operator.op_type) for operator in OPERATORS}
    bodies = {(function.domain, function.name) for function in formed.functions}
    if bodies - ours:
        formed = inliner.inline_selected_functions(formed, [*bodies - ours])
    wide = shape_inference.infer_shapes(formed)
    values = (*wide.graph.input, *wide.graph.value_info, *wide.graph.output)
    half = {value.name for value in values if value.type.tensor_type.elem_type == HALF} | _halves_untold(wide)
    inputs = {value.name: f"rounded {value.name}" for value in wide.graph.input if value.name in half}
    as_float32(wide, {HALF})
    keep(wide.graph.value_info, [])
    nodes = [cast for name, taken in inputs.items() for cast in _pair(name, taken)]
    for node in wide.graph.node:
        node.input[:] = [inputs.get(name, name) for name in node.input]
        stated = any(attribute.type == onnx.AttributeProto.FLOAT for attribute in node.attribute)  # before opset 11
        results = [name for name in node.output if name in half and (stated or node.op_type not in _EXACT)]
        node.output[:] = [f"exact {name}" if name in results else name for name in node.output]
        nodes += [node, *(cast for name in results for cast in _pair(f"exact {name}", name))]
    rewritten = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    keep(wide.graph.node, rewritten)
    return wide


def _halves_untold(model: onnx.ModelProto) -> set[str]:
    """Results in float16 of which ONNX cannot tell the type, as behind an operator of ONNX Runtime's own."""
    graph = model.graph
    told = {value.name for value in (*graph.value_info, *graph.output)}
    untold = [name for node in graph.node for name in node.output if name and name not in told]
    if not untold:
        return set()
    asked = onnx.ModelProto()
    asked.CopyFrom(model)
    keep(asked.graph.output, [onnx.ValueInfoProto(name=name) for name in untold])
    session = open_session(asked, optimize=False)
    return {value.name for value in session.get_outputs() if value.type == "tensor(float16)"}


def _pair(source: str, target: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    between = f"half {target}"
    return (
        helper.make_node("Cast", [source], [between], f"{between}/Cast", to=HALF),
        helper.make_node("Cast", [between], [target], f"{target}/Cast", to=TensorProto.FLOAT),
    )
