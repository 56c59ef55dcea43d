"""QuantizeLinear and DequantizeLinear around the layers of a graph that become INT8, by onnxruntime's quantizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from acmix_deploy.graph import tidied
from acmix_deploy.onnx_file import opset
from acmix_deploy.targets import Int8Scheme

RANK = {"Conv": None, "Gemm": 2, "MatMul": 2}
"""What becomes INT8, and the rank that its weight must have."""

_BETWEEN = ("Add", "Concat", "MaxPool", "Mul", "Resize", "Sigmoid", "Split")  # that have integer kernels too
_FIRST = ("MaxPool", "Resize", "Split", *RANK)  # of which the first input alone is an activation
_INT8_WEIGHTS = 18  # opset; a file of a lower one may go to TensorRT 8, which wants weights in float32 and a pair


def between(model: onnx.ModelProto, layers: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that compute in uint8 beside the layers: activations, residual sums, and what moves pixels.

    All that they read is made by such nodes or by layers, and one of them reads what they make.
    """
    custom = {(function.domain, function.name) for function in model.functions}
    found = [
        node
        for node in model.graph.node
        if node.op_type in _BETWEEN and (node.domain, node.op_type) not in custom and node.domain in ("", "ai.onnx")
    ]
    while True:
        nodes = [*layers, *found]
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in _activations(node)}
        kept = [node for node in found if made.issuperset(_activations(node)) and read.intersection(node.output)]
        if len(kept) == len(found):
            return found
        found = kept


def _activations(node: onnx.NodeProto) -> list[str]:
    return list(node.input[:1] if node.op_type in _FIRST else node.input)


def ends(nodes: Sequence[onnx.NodeProto], scheme: Int8Scheme) -> Iterator[str]:
    """The activations that become INT8, some of them more than once: inputs of the nodes, and what ``scheme`` adds."""
    for node in nodes:
        yield from _activations(node)
        if scheme == "uint8":
            yield from node.output


def insert(
    model: onnx.ModelProto,
    layers: Sequence[onnx.NodeProto],
    ranges: Mapping[str, tuple[float, float]],
    scheme: Int8Scheme,
) -> onnx.ModelProto:
    """The model with Q/DQ at the layers; tensors keep their names, and what is quantised before them has another one.

    The quantizer sees the layers alone: in the whole graph it would hand the dequantized input to every other reader
    too, to residual sums, to the layers that were to stay in float, and to outputs (1.22 to 1.31).

    Args:
        model: in float32.
        layers: nodes of its graph, see :data:`RANK`, and those of :func:`between`.
        ranges: smallest and largest value that is covered, of all that :func:`ends` names and maybe of others.
        scheme: which pairs. ``uint8`` has int32 biases, and weights of 7 bits: on x86 without VNNI two products of 8
            bits are summed in 16, where those of whole ranges saturate.
    """
    uint8 = scheme == "uint8"
    order = {node.output[0]: index for index, node in enumerate(model.graph.node)}
    layers = sorted(layers, key=lambda node: order[node.output[0]])  # MaxPool wants its input seen before
    read = {name for node in layers for name in node.input}
    made = {name for node in layers for name in node.output}
    stored = [tensor for tensor in model.graph.initializer if tensor.name in read]
    tensors = list(dict.fromkeys(ends(layers, scheme)))
    alone = helper.make_model(
        helper.make_graph(
            layers,
            "layers",
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors if name not in made],
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors if name in made],
            stored,
        ),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    quantized = QDQQuantizer(
        alone,
        per_channel=True,
        reduce_range=uint8,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8 if uint8 else QuantType.QInt8,
        tensors_range=TensorsData(
            CalibrationMethod.MinMax, {name: tuple(map(np.float32, ranges[name])) for name in tensors}
        ),
        nodes_to_quantize=[],
        nodes_to_exclude=[],
        op_types_to_quantize=[*RANK, *_BETWEEN],
        extra_options={
            "ActivationSymmetric": not uint8,
            "AddQDQPairToWeight": not uint8 and opset(model) < _INT8_WEIGHTS,
            "DedicatedQDQPair": not uint8,  # for TensorRT
            "OpTypesToExcludeOutputQuantization": [] if uint8 else list(RANK),
            "QuantizeBias": uint8,
        },
    ).quantize_model()
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    for node in layers:
        typed.graph.node.remove(node)
    present = {tensor.name for tensor in model.graph.initializer}
    renamed = {name: f"{name}/int32" for node in quantized.graph.node for name in node.output if name in present}
    for node in quantized.graph.node:  # other readers of a bias keep it
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
    typed.graph.node.extend(quantized.graph.node)
    typed.graph.initializer.extend(tensor for tensor in quantized.graph.initializer if tensor.name not in present)
    typed = tidied(typed)
    onnx.checker.check_model(typed)
    return typed
