"""Pre- and postprocessing as nodes of the graph, put around a network and taken off again.

Stages look at networks alone: they take off what is around one when they read a file, and put it back when they write.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from acmix_deploy.detection.metadata import ModelMetadata, Pixels
from acmix_deploy.errors import UserError
from acmix_deploy.graph import keep

_INPUT = "acmix_input"
"""Before the names of nodes and tensors between the file's input and the network's."""


class Processing(NamedTuple):
    """What is around a network."""

    pixels: Pixels | None = None
    """The file takes images [B, H, W, 3] in uint8, channels in this order, not [B, 3, H, W] in RGB, 0 to 1."""


def attach(model: onnx.ModelProto, processing: Processing) -> None:
    """Put nodes around a network, in place, and say so in its metadata.

    Pixels are cast first, since TensorRT takes uint8 from a Cast alone, then transposed and divided as
    :func:`acmix_deploy.detection.images.tensor` does, in float32. The input keeps its name.

    Raises:
        UserError: the network does not take one image [B, 3, H, W].
    """
    if processing.pixels:
        _attach_pixels(model, processing.pixels)
    _tell(model, processing)


def detach(model: onnx.ModelProto) -> Processing:
    """Take them off again, in place, as far as :func:`attach` put them there; what there was.

    Raises:
        UserError: the metadata tell of nodes that are not there.
    """
    found = Processing(ModelMetadata.of(model).pixels)
    if found.pixels:
        _detach_pixels(model)
    _tell(model, Processing())
    return found


def _tell(model: onnx.ModelProto, processing: Processing) -> None:
    entries = {entry.key: entry.value for entry in model.metadata_props if entry.key != "pixels"}
    if processing.pixels:
        entries["pixels"] = processing.pixels
    onnx.helper.set_model_props(model, entries)


def _attach_pixels(model: onnx.ModelProto, order: Pixels) -> None:
    graph = model.graph
    image = graph.input[0].type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in image.shape.dim]
    if len(graph.input) != 1 or len(shape) != 4 or shape[1] != 3:
        raise UserError(
            f"images in uint8 have three channels, and the model takes {graph.input[0].name} {shape}",
            "Leave out --input.",
        )
    name, inner = graph.input[0].name, f"{_INPUT}/{graph.input[0].name}"
    _rename(graph, name, inner)
    steps: list[tuple[str, dict[str, Any], Any]] = [
        ("Cast", {"to": TensorProto.FLOAT}, None),
        ("Transpose", {"perm": [0, 3, 1, 2]}, None),
    ]
    if order == "bgr":
        steps.append(("Gather", {"axis": 1}, np.array([2, 1, 0])))
    steps.append(("Div", {}, np.float32(255)))
    if image.elem_type == TensorProto.FLOAT16:
        steps.append(("Cast", {"to": TensorProto.FLOAT16}, None))
    nodes, taken = [], name
    for index, (kind, attributes, constant) in enumerate(steps):
        given = inner if index == len(steps) - 1 else f"{_INPUT}/{index}"
        operands = [taken]
        if constant is not None:
            operands.append(f"{_INPUT}/{kind}/operand")
            graph.initializer.append(numpy_helper.from_array(np.asarray(constant), operands[-1]))
        nodes.append(helper.make_node(kind, operands, [given], f"{_INPUT}/{kind}_{index}", **attributes))
        taken = given
    keep(graph.node, [*nodes, *graph.node])
    batch, channels, height, width = shape
    keep(graph.input, [helper.make_tensor_value_info(name, TensorProto.UINT8, [batch, height, width, channels])])


def _detach_pixels(model: onnx.ModelProto) -> None:
    graph = model.graph
    name, inner = graph.input[0].name, f"{_INPUT}/{graph.input[0].name}"
    ours = [node for node in graph.node if node.name.startswith(f"{_INPUT}/")]
    if not ours or ours[-1].output[0] != inner:
        raise UserError(
            f"the metadata tell that {name} is pixels, and the nodes that make floats of them are not as they were",
            "Export the file from its checkpoint: acmix-deploy export --input uint8",
        )
    half = len(ours) > 1 and ours[-1].op_type == "Cast"
    batch, height, width, _ = (dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim)
    dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    keep(graph.node, [node for node in graph.node if node not in ours])
    for tensors in (graph.initializer, graph.value_info):
        keep(tensors, [tensor for tensor in tensors if not tensor.name.startswith(f"{_INPUT}/")])
    keep(graph.input, [helper.make_tensor_value_info(name, dtype, [batch, 3, height, width])])
    _rename(graph, inner, name)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """What reads the tensor ``old`` reads ``new``."""
    for node in graph.node:
        node.input[:] = [new if taken == old else taken for taken in node.input]
        for attribute in node.attribute:
            for inside in (attribute.g, *attribute.graphs):
                _rename(inside, old, new)
