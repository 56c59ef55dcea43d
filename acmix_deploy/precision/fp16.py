"""Fused ONNX to half precision: the types stand in the file, so that every runtime computes in the same ones."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import onnx
from onnx import TensorProto
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.artifacts import replacing
from acmix_deploy.graph import name_nodes

_COMPUTE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_DECODE_WEIGHTS = 32  # at most; the fixed kernel in a YOLOv8 head's decode has 16, the bins of its integral


class Fp16Report(BaseModel):
    """What :func:`to_fp16` kept as it was."""

    model_config = ConfigDict(frozen=True)

    float32_nodes: list[str] = Field(description="nodes that still compute in float32")
    float32_io: bool = Field(description="whether inputs and outputs of the file are float32")


def to_fp16(source: Path, target: Path, *, fp16_io: bool = False) -> Fp16Report:
    """Write a float32 ONNX file as one whose weights and activations are float16.

    What follows the last learnt layer stays in float32: a detection head's decode holds pixel coordinates up to the
    image size, where float16 has steps of half a pixel.

    Args:
        source: ONNX file in float32.
        target: where the float16 file goes.
        fp16_io: make inputs and outputs float16 too.

    Raises:
        UserError: the target cannot be written.
    """
    model = onnx.load(source)
    name_nodes(model)  # the converter leaves nodes in float32 by name
    kept = tail(model)
    converted = convert_float_to_float16(
        model,
        keep_io_types=not fp16_io,
        node_block_list=kept,
    )
    _drop_repeated_casts(converted)
    editor = OnnxModel(converted)  # the converter appends casts at the end, and casts there and back
    editor.remove_cascaded_cast_nodes()
    editor.remove_useless_cast_nodes()
    editor.topological_sort()
    typed = editor.model
    onnx.checker.check_model(typed)
    with replacing(target) as temporary:
        onnx.save(typed, temporary)
    return Fp16Report(float32_nodes=kept, float32_io=not fp16_io)


def tail(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes behind the last learnt layers: convolutions, products, custom operators, and
    weighted sums of these."""
    sizes = {tensor.name: _size(tensor) for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    custom = {(function.domain, function.name) for function in model.functions}

    learnt: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        weights = sum(sizes.get(name, 0) for name in node.input)
        operands = [name for name in node.input if name in producers]
        sums = node.op_type in ("Add", "Mul") and operands and all(name in learnt for name in operands)
        if (node.domain, node.op_type) in custom or (node.op_type in _COMPUTE and weights > _DECODE_WEIGHTS) or sums:
            learnt.update(dict.fromkeys(node.output, node))

    ahead: set[int] = set()
    queue = deque(learnt.values())
    while queue:
        node = queue.popleft()
        if id(node) not in ahead:
            ahead.add(id(node))
            queue.extend(producers[name] for name in node.input if name in producers)
    return [node.name for node in model.graph.node if id(node) not in ahead and node.op_type != "Shape"]


def _drop_repeated_casts(model: onnx.ModelProto) -> None:
    """Keep one of the equal casts that the converter adds for each float32 node that reads a tensor."""
    seen: set[str] = set()
    for node in list(model.graph.node):
        if node.output[0] in seen:
            model.graph.node.remove(node)
        seen.add(node.output[0])


def _size(tensor: TensorProto) -> int:
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count
