"""Pre- and postprocessing as nodes of the graph, put around a network and taken off again.

Stages look at networks alone: they take off what is around one when they read a file, and put it back when they write.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from acmix_deploy.detection.heads import Dims, Head, NoHead, head_of
from acmix_deploy.detection.metadata import ModelMetadata, Pixels
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.errors import UserError
from acmix_deploy.graph import keep, names_read, read, sizes_of
from acmix_deploy.nms import graph_of

_INPUT = "acmix_input"
"""Before the names of nodes and tensors between the file's input and the network's."""

_NMS = "acmix_nms"
"""The same between the network's output and the file's."""


SAY_PIXELS = (
    "Export it with an input in float32, or from its checkpoint: acmix-deploy export --input uint8, which tells them."
)
"""What to do about a file of which :func:`untold_pixels` has something to say."""


class Processing(NamedTuple):
    """What is around a network."""

    pixels: Pixels | None = None
    """The file takes images [B, H, W, 3] in uint8, channels in this order, not [B, 3, H, W] in RGB, 0 to 1."""
    suppression: Suppression | None = None
    """The file gives rows [B, N, 6] of boxes that do not overlap, not one for every anchor."""


NOTHING = Processing()


def attach(model: onnx.ModelProto, processing: Processing) -> None:
    """Put nodes around a network, in place, and say so in its metadata.

    Pixels are cast first, since TensorRT takes uint8 from a Cast alone, then transposed and divided as
    :func:`acmix_deploy.detection.images.tensor` does, in float32. All releases since 8.5 take that: kUINT8 in
    NvInferRuntimeCommon.h of 8.5.2, and docs/Changelog.md of onnx-tensorrt at 8.5. Boxes are suppressed in float32, see
    :func:`acmix_deploy.nms.graph_of`. Input and output keep their names.

    Raises:
        UserError: the network does not take one image [B, 3, H, W], or what it gives are no boxes of anchors.
    """
    if processing.pixels:
        _attach_pixels(model, processing.pixels)
    if processing.suppression:
        _attach_suppression(model, processing.suppression)
    _tell(model, processing)


def detach(model: onnx.ModelProto) -> Processing:
    """Take them off again, in place, as far as :func:`attach` put them there; what there was.

    Raises:
        UserError: the metadata tell of nodes that are not there.
    """
    metadata = ModelMetadata.of(model)
    found = Processing(metadata.pixels, metadata.suppression)
    if found.pixels:
        _detach_pixels(model, found.pixels)
    if found.suppression:
        _detach_suppression(model, found.suppression)
    _tell(model, NOTHING)
    return found


def untold_pixels(model: onnx.ModelProto) -> str:
    """What to say of a file that takes images in uint8 of which its metadata tell nothing; empty of any other."""
    for value in model.graph.input:
        tensor = value.type.tensor_type
        if tensor.elem_type == TensorProto.UINT8 and len(tensor.shape.dim) == 4 and not ModelMetadata.of(model).pixels:
            shape = ", ".join(map(str, sizes_of(value)))
            return f"takes {value.name} [{shape}] in uint8, and its metadata do not tell what their channels are"
    return ""


def network_of(model: Path | onnx.ModelProto) -> Path | onnx.ModelProto:
    """What is within :func:`attach`'s nodes: it takes images [B, 3, H, W] in floats, and gives boxes for every anchor.
    Without such nodes that is the model itself.

    Raises:
        UserError: what :func:`detach` and :func:`acmix_deploy.graph.read` raise.
    """
    held = read(model, weights=False) if isinstance(model, Path) else model
    metadata = ModelMetadata.of(held)
    if not (metadata.pixels or metadata.suppression):
        return model
    network = onnx.ModelProto()
    network.CopyFrom(read(model) if isinstance(model, Path) else model)
    detach(network)
    return network


def with_network_output(model: Path | onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """A model that suppresses boxes with an output more, what the network gives; and its name.

    Raises:
        UserError: the metadata tell of nodes that are not there.
    """
    both = onnx.ModelProto()
    both.CopyFrom(read(model) if isinstance(model, Path) else model)
    inner, declared = _behind_network(both)
    both.graph.output.append(declared)
    return both, inner


def suppression_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """Of a model that suppresses boxes what is behind the network, which takes the network's output.

    Raises:
        UserError: the metadata tell of nodes that are not there.
    """
    _, declared = _behind_network(model)
    nodes, constants = (
        [item for item in items if item.name.startswith(f"{_NMS}/")]
        for items in (model.graph.node, model.graph.initializer)
    )
    graph = helper.make_graph(nodes, _NMS, [declared], model.graph.output, constants)
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _tell(model: onnx.ModelProto, processing: Processing) -> None:
    told = ModelMetadata.of(model).with_suppression(processing.suppression)
    entries = {key: value for key, value in told.entries.items() if key != "pixels"}
    if processing.pixels:
        entries["pixels"] = processing.pixels
    onnx.helper.set_model_props(model, entries)


def _attach_pixels(model: onnx.ModelProto, order: Pixels) -> None:
    graph = model.graph
    image = graph.input[0].type.tensor_type
    shape = sizes_of(graph.input[0])
    if len(graph.input) != 1 or len(shape) != 4 or shape[1] != 3:
        raise UserError(
            f"images in uint8 have three channels, and the model takes {graph.input[0].name} {[*shape]}",
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


def _detach_pixels(model: onnx.ModelProto, order: Pixels) -> None:
    graph = model.graph
    name, inner = graph.input[0].name, f"{_INPUT}/{graph.input[0].name}"
    ours = [node for node in graph.node if node.name.startswith(f"{_INPUT}/")]
    wrong = UserError(
        f"the metadata tell that {name} is pixels, and the nodes that make floats of them are not as they were",
        "Export the file from its checkpoint: acmix-deploy export --input uint8",
    )
    turned = any(node.op_type == "Gather" for node in ours)
    if not ours or ours[-1].output[0] != inner or turned != (order == "bgr"):
        raise wrong
    half = len(ours) > 1 and ours[-1].op_type == "Cast"
    batch, height, width, _ = sizes_of(graph.input[0])
    dtype = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    keep(graph.node, [node for node in graph.node if node not in ours])
    for tensors in (graph.initializer, graph.value_info):
        keep(tensors, [tensor for tensor in tensors if not tensor.name.startswith(f"{_INPUT}/")])
    keep(graph.input, [helper.make_tensor_value_info(name, dtype, [batch, 3, height, width])])
    _rename(graph, inner, name)
    if _reads(graph, _INPUT):
        raise wrong


def suppressible(metadata: ModelMetadata, outputs: Mapping[str, Dims]) -> Head:
    """What a network gives whose boxes can be suppressed in the file.

    Raises:
        UserError: why they cannot.
    """
    try:
        head = head_of(metadata, outputs)
    except NoHead as error:
        raise UserError(f"the network {error}, so there are no boxes to suppress", "Leave out --nms.") from error
    if head.selects:
        why = f"it gives {head.layout}, which the model has selected itself"
    elif head.task != "detect":
        why = f"its task is {head.task}, and the rows of a file hold a box, a score and a class alone"
    else:
        return head
    raise UserError(f"boxes of this model are not suppressed in the file: {why}", "Leave out --nms.")


def _attach_suppression(model: onnx.ModelProto, suppression: Suppression) -> None:
    graph = model.graph
    sizes = {output.name: sizes_of(output) for output in graph.output}
    head = suppressible(ModelMetadata.of(model), sizes)
    (output,) = graph.output
    name, inner = output.name, f"{_NMS}/{output.name}"
    float16 = output.type.tensor_type.elem_type == TensorProto.FLOAT16
    behind = graph_of(suppression, head, sizes[name], float16=float16).graph
    names = {behind.input[0].name: inner, behind.output[0].name: name}
    _rename(graph, name, inner)
    _rename_written(graph, name, inner)
    for index, node in enumerate(behind.node):
        node.name = f"{_NMS}/{node.op_type}_{index}"
        for tensors in (node.input, node.output):
            tensors[:] = [names.get(tensor, f"{_NMS}/{tensor}") for tensor in tensors]
    for tensor in behind.initializer:
        tensor.name = f"{_NMS}/{tensor.name}"
    graph.node.extend(behind.node)
    graph.initializer.extend(behind.initializer)
    output.name = inner
    graph.value_info.append(output)
    batch = sizes[name][0]
    keep(graph.output, [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, suppression.most, 6])])


def _detach_suppression(model: onnx.ModelProto, suppression: Suppression) -> None:
    graph = model.graph
    name = graph.output[0].name
    inner, declared = _behind_network(model)
    there = {tensor.name: tensor for tensor in graph.initializer}
    for setting in ("confidence", "iou", "most"):
        tensor = there.get(f"{_NMS}/{setting}")
        if tensor is None or not np.isclose(numpy_helper.to_array(tensor), getattr(suppression, setting)).all():
            raise _other_suppression(name)
    output = onnx.ValueInfoProto()
    output.CopyFrom(declared)
    output.name = name
    keep(graph.node, [node for node in graph.node if not node.name.startswith(f"{_NMS}/")])
    for tensors in (graph.initializer, graph.value_info):
        keep(tensors, [tensor for tensor in tensors if not tensor.name.startswith(f"{_NMS}/")])
    keep(graph.output, [output])
    _rename(graph, inner, name)
    _rename_written(graph, inner, name)
    if _reads(graph, _NMS):
        raise _other_suppression(name)


def _other_suppression(name: str) -> UserError:
    return UserError(
        f"the metadata tell that boxes of {name} are suppressed, and the nodes that do it are not as they were",
        "Export the file from its checkpoint: acmix-deploy export --nms",
    )


def _behind_network(model: onnx.ModelProto) -> tuple[str, onnx.ValueInfoProto]:
    """What the network's output is called in a file that suppresses boxes, and what is declared of it."""
    graph = model.graph
    name, inner = graph.output[0].name, f"{_NMS}/{graph.output[0].name}"
    declared = [value for value in graph.value_info if value.name == inner]
    written = [tensor for node in graph.node if not node.name.startswith(f"{_NMS}/") for tensor in node.output]
    if len(graph.output) != 1 or len(declared) != 1 or inner not in written or name in written:
        raise _other_suppression(name)
    return inner, declared[0]


def _reads(graph: onnx.GraphProto, prefix: str) -> bool:
    """Whether a node reads a tensor of ours, as where an optimizer has it share a constant."""
    return any(name.startswith(f"{prefix}/") for node in graph.node for name in names_read(node))


def _rename_written(graph: onnx.GraphProto, old: str, new: str) -> None:
    """What writes the tensor ``old`` writes ``new``."""
    for node in graph.node:
        node.output[:] = [new if written == old else written for written in node.output]


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """What reads the tensor ``old`` reads ``new``."""
    for node in graph.node:
        node.input[:] = [new if taken == old else taken for taken in node.input]
        for attribute in node.attribute:
            for inside in (attribute.g, *attribute.graphs):
                _rename(inside, old, new)
