"""Files that were quantised before fusing: what stands in and around their blocks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import helper, numpy_helper

from acmix_deploy.graph import Array, tidied

_INTEGER = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger")


def quantization(model: onnx.ModelProto) -> dict[str, int]:
    """The operators in the main graph that quantise or compute in integers, and how often each is there."""
    return dict(
        Counter(
            node.op_type
            for node in model.graph.node
            if node.op_type in _INTEGER or node.op_type.startswith(("QLinear", "QGemm"))
        )
    )


def without_pairs(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as it was before Q/DQ pairs were set, but for the rounding of stored tensors.

    To look for blocks in, not to be written: it computes in float what the file computes in INT8. Integer operators
    without pairs stay.
    """
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    producers = {name: node for node in graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in graph.initializer}
    stored |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    original: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        before = producers.get(node.input[0])
        if before is not None and before.op_type == "QuantizeLinear":
            original[node.output[0]] = before.input[0]
        elif stored.keys() >= {*filter(None, node.input)}:
            values = _dequantized(node, [numpy_helper.to_array(stored[name]) for name in node.input if name])
            if values is not None:
                graph.initializer.append(numpy_helper.from_array(values, f"{node.output[0]}/float"))
                original[node.output[0]] = f"{node.output[0]}/float"
    for node in graph.node:
        for index in range(len(node.input)):
            while node.input[index] in original:
                node.input[index] = original[node.input[index]]
    for value in graph.output:
        if value.name in original:
            dequantize = producers[value.name]
            dequantize.CopyFrom(helper.make_node("Identity", [original[value.name]], [value.name], name=value.name))
    return tidied(plain)


def _dequantized(node: onnx.NodeProto, inputs: list[Array]) -> Array | None:
    """What a DequantizeLinear makes of a stored tensor; None where its scales are of blocks."""
    values, scale, zero = (*inputs, np.array(0))[:3]
    axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1) % max(values.ndim, 1)
    if scale.size == 1:
        scale, zero = scale.reshape(()), zero.reshape(())
    elif scale.ndim == 1 and values.ndim and scale.size == values.shape[axis]:
        along = [1] * values.ndim
        along[axis] = -1
        scale, zero = scale.reshape(along), zero.reshape(along if zero.size > 1 else ())
    else:
        return None
    return np.asarray((values.astype(np.float32) - zero.astype(np.float32)) * scale, np.float32)
