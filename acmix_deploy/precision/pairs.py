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

_INT8_WEIGHTS = 18  # opset; a file of a lower one may go to TensorRT 8, which wants weights in float32 and a pair


def ends(layers: Sequence[onnx.NodeProto], scheme: Int8Scheme) -> Iterator[str]:
    """The activations that become INT8, some of them more than once: inputs of the layers, and what ``scheme`` adds."""
    for node in layers:
        yield node.input[0]
        if scheme == "uint8":
            yield node.output[0]


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
        layers: nodes of its graph, see :data:`RANK`.
        ranges: smallest and largest value that is covered, of all that :func:`ends` names and maybe of others.
        scheme: which pairs. ``uint8`` has int32 biases, and weights of 7 bits: on x86 without VNNI two products of 8
            bits are summed in 16, where those of whole ranges saturate.
    """
    uint8 = scheme == "uint8"
    read = {name for node in layers for name in node.input}
    made = {node.output[0] for node in layers}
    tensors = list(dict.fromkeys(ends(layers, scheme)))
    alone = helper.make_model(
        helper.make_graph(
            layers,
            "layers",
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in read - made],
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors if name in made],
            [tensor for tensor in model.graph.initializer if tensor.name in read],
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
        op_types_to_quantize=list(RANK),
        extra_options={
            "ActivationSymmetric": not uint8,
            "AddQDQPairToWeight": not uint8 and opset(model) < _INT8_WEIGHTS,
            "DedicatedQDQPair": True,  # for TensorRT
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
