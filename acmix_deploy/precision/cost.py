"""What layers of an ONNX graph cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import onnx
from onnx import helper

from acmix_deploy.graph import SHAPE_OF, Feeds
from acmix_deploy.runtime.onnxruntime import open_session


def multiply_adds(model: onnx.ModelProto, layers: Sequence[onnx.NodeProto], sample: Feeds) -> dict[str, int]:
    """Of each convolution and matrix product of the main graph, by the name of its node.

    Args:
        model: every node named.
        layers: Conv, ConvTranspose, Gemm and MatMul nodes of it.
        sample: inputs by name; sizes are those that tensors have on it.
    """
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    del sized.graph.output[:]
    tensors = dict.fromkeys(name for node in layers for name in (*node.input[:2], node.output[0]))
    for name in tensors:
        sized.graph.node.append(helper.make_node("Shape", [name], [SHAPE_OF.format(name)]))
        sized.graph.output.append(onnx.ValueInfoProto(name=SHAPE_OF.format(name)))
    shapes = dict(zip(tensors, open_session(sized).run(None, sample), strict=True))

    def cost(node: onnx.NodeProto) -> int:
        data, weight, result = ([*map(int, shapes[name])] for name in (*node.input[:2], node.output[0]))
        if node.op_type == "Conv":
            return prod(result) * prod(weight[1:])
        if node.op_type == "ConvTranspose":
            return prod(data) * prod(weight[1:])
        transposed = node.op_type == "Gemm" and any(entry.name == "transA" and entry.i for entry in node.attribute)
        return prod(result) * data[0 if transposed else -1]

    return {node.name: cost(node) for node in layers}
