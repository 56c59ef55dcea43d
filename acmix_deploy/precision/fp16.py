"""Fused ONNX to half precision: the types stand in the file, so that every runtime computes in the same ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper, shape_inference
from onnxruntime.transformers.float16 import convert_float_to_float16
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.artifacts import StageResult, check_output, replacing, write_artifact
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.forms import owner, to_form
from acmix_deploy.graph import Feeds, fed, name_nodes, names_read, read, tidied, with_weights
from acmix_deploy.options import FLOAT32
from acmix_deploy.processing import SAY_PIXELS, attach, detach, untold_pixels
from acmix_deploy.runtime.magnitudes import LARGEST_HALF, SMALLEST_HALF, largest, largest_magnitudes
from acmix_deploy.runtime.onnxruntime import precision_of, why_refused

_COMPUTE = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"})
_DECODE_WEIGHTS = 32  # at most; the fixed kernel in a YOLOv8 head's decode has 16, the bins of its integral


class Fp16Report(BaseModel):
    """What :func:`to_fp16` kept as it was."""

    model_config = ConfigDict(frozen=True)

    float32_nodes: dict[str, str] = Field(
        description="nodes that still compute in float32, with the group or the pattern that they fit; constant where "
        "they do not see the image"
    )
    out_of_range: dict[str, float] = Field(
        description="nodes that read or write what float16 cannot hold, with the largest magnitude of that"
    )
    clipped: dict[str, float] = Field(
        default={},
        description="stored tensors that became float16 and were clipped to its 65504, with what they held",
    )
    float32_io: bool = Field(description="whether inputs and outputs of the file are float32")
    samples: int = Field(default=0, description="inputs that ranges were seen on; those of stored tensors alone with 0")


def to_fp16(
    source: Path,
    target: Path,
    *,
    fp16_io: bool = False,
    float32: Sequence[str] = FLOAT32,
    samples: Iterable[Feeds] = (),
) -> StageResult[Fp16Report]:
    """Write a float32 ONNX file as one whose weights and activations are float16, but for its sensitive parts.

    Args:
        source: ONNX file in float32.
        target: where the float16 file goes.
        fp16_io: make inputs and outputs float16 too.
        float32: what stays in float32. Groups: "decode", what follows the last learnt layers; "softmax", in the graph
            and in function bodies; "range", the nodes that read or write what float16 cannot hold. All else
            is a pattern (``*``, ``?``, ``[]``) of names of nodes or of the weights that they read. Layers that do not
            see the image always do.
        samples: inputs by name, float32, that the ranges of activations are seen on; without any, weights alone count.

    Returns:
        The file with its sidecar, and what stays in float32.

    Raises:
        UserError: the source is no file in float32, a pattern fits no node, or the target cannot be written.
        CheckFailed: ONNX Runtime refuses the result, and does not refuse the source; nothing is written then.
    """
    check_output(target, source)
    model = read(source)
    check_float32(model, source)
    around = detach(model)
    typed, report = halved(model, fp16_io=fp16_io, float32=float32, samples=samples)
    attach(typed, around)
    with replacing(target) as temporary:
        onnx.save(typed, temporary)
        if (refused := why_refused(temporary)) and not why_refused(source):
            raise CheckFailed(f"the file in half precision cannot be used: {refused}")
    settings = {"fp16_io": fp16_io, "float32": list(float32)}
    return StageResult(write_artifact(target, "fp16", parents=with_weights(source), settings=settings), report)


def halved(
    model: onnx.ModelProto, *, fp16_io: bool = False, float32: Sequence[str] = FLOAT32, samples: Iterable[Feeds] = ()
) -> tuple[onnx.ModelProto, Fp16Report]:
    """The model in half precision, see :func:`to_fp16`; ``model`` itself is used up."""
    weights = {tensor.name for tensor in model.graph.initializer}
    declared = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(declared)  # the converter changes the types of weights, but not their declarations
    name_nodes(model)  # the converter leaves nodes in float32 by name
    choices = kept_by_pattern(model, float32)
    seen = list(samples) if "range" in float32 else []
    beyond = out_of_range(model, seen) if "range" in float32 else {}
    choices |= {"decode": tail(model), "softmax": _softmax(model), "range": list(beyond)}
    stored = {name: largest(numpy_helper.to_array(tensor)) for name, tensor in _stored(model).items()}
    kept = dict.fromkeys(_unfed(model), "constant")
    for choice in float32:
        kept |= {name: choice for name in choices[choice] if name not in kept}
    if "softmax" not in float32:
        for function in model.functions:
            halve_softmax(function)
    converted = convert_float_to_float16(model, keep_io_types=not fp16_io, node_block_list=list(kept))
    _join_casts(converted.graph)
    typed = tidied(converted)  # the converter appends casts at the end
    onnx.checker.check_model(typed)
    half = {name for name, tensor in _stored(typed).items() if tensor.data_type == TensorProto.FLOAT16}
    clipped = {name: size for name, size in stored.items() if name in half and size > LARGEST_HALF}
    return typed, Fp16Report(
        float32_nodes=kept, out_of_range=beyond, clipped=clipped, float32_io=not fp16_io, samples=len(seen)
    )


def _unfed(model: onnx.ModelProto) -> list[str]:
    """Names of the layers that do not see the image, such as the border map of a block: ONNX Runtime computes them when
    it loads the file, and has no float16 kernel for that on a CPU (1.32)."""
    seen = fed(model)
    return [node.name for node in model.graph.node if node.op_type in _COMPUTE and seen.isdisjoint(node.input)]


def check_float32(model: onnx.ModelProto, source: Path) -> None:
    """Raises UserError where a file is converted already, or takes pixels of which nothing is told."""
    if untold := untold_pixels(model):
        raise UserError(f"{source} {untold}", SAY_PIXELS)
    quantized = next((node for node in model.graph.node if node.op_type in _QUANTIZED), None)
    if quantized is not None:
        raise UserError(f"{source} is quantised already: it has a {quantized.op_type}", "Give the float32 file.")
    if precision_of(model) != "float32":
        raise UserError(f"{source} is in float16, float32 is expected", "Give the file that `acmix-deploy fuse` wrote.")


def tail(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes behind the last learnt layers: convolutions, products, custom operators, and
    weighted sums of these.

    A detection head's decode is there: it holds pixel coordinates up to the image size, where float16 has steps of
    half a pixel.
    """
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in model.graph.initializer}
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


def out_of_range(model: onnx.ModelProto, samples: Iterable[Feeds] = ()) -> dict[str, float]:
    """The nodes that read or write a tensor that float16 cannot hold, with the largest magnitude of that tensor.

    Infinities left out, it is above 65504, or not zero and below 6e-8, the smallest number that float16 has. A custom
    operator is judged by the tensors inside its body too.

    Args:
        model: every node named.
        samples: inputs by name to see activations on; without any, stored tensors alone count.
    """
    plain = to_form(model, "plain")
    graph = shape_inference.infer_shapes(plain).graph
    magnitudes = {
        name: largest(numpy_helper.to_array(tensor))
        for name, tensor in _stored(plain).items()
        if tensor.data_type == TensorProto.FLOAT
    }
    values = (*graph.input, *graph.value_info, *graph.output)
    seen = [value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    magnitudes |= largest_magnitudes(plain, seen, samples)
    beyond = {name: m for name, m in magnitudes.items() if m > LARGEST_HALF or 0 < m < SMALLEST_HALF}
    owners = {node.name for node in model.graph.node}
    found: dict[str, float] = {}
    for node in plain.graph.node:
        for name in beyond.keys() & {*node.input, *node.output}:
            writer = owner(node.name, owners)
            if writer in owners:
                found[writer] = max(found.get(writer, 0), beyond[name])
    return found


def _stored(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """The tensors that a graph stores, as initializers or in Constant nodes."""
    constants = [node for node in model.graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]
    return {tensor.name: tensor for tensor in model.graph.initializer} | {
        node.output[0]: node.attribute[0].t for node in constants
    }


def halve_softmax(function: onnx.FunctionProto) -> None:
    """Let a function body compute its Softmax in the type of the node, in place."""
    for node, cast in _widened(function):
        node.input[0] = cast.input[0]
        function.node.remove(cast)


def fits(node: onnx.NodeProto, pattern: str, weights: Collection[str]) -> bool:
    """Whether a pattern (``*``, ``?``, ``[]``) fits the name of a node or of one of its ``weights``."""
    return any(fnmatchcase(name, pattern) for name in (node.name, *(name for name in node.input if name in weights)))


def kept_by_pattern(model: onnx.ModelProto, float32: Sequence[str]) -> dict[str, list[str]]:
    """Names of the nodes that each pattern among ``float32`` fits. Raises UserError where one fits none."""
    weights = {tensor.name for tensor in model.graph.initializer}
    found = {
        pattern: [node.name for node in model.graph.node if fits(node, pattern, weights)]
        for pattern in float32
        if pattern not in FLOAT32
    }
    for pattern, names in found.items():
        if not names:
            raise UserError(
                f"{pattern}, to be kept in float32, fits the name of no node and of no weight",
                f"Give a pattern of names as in the fused file, or one of {', '.join(FLOAT32)}.",
            )
    return found


def _softmax(model: onnx.ModelProto) -> list[str]:
    """Names of the Softmax nodes; in function bodies of those that compute in float32 whatever the node's type is."""
    inside = [f"{function.name}/{node.op_type}" for function in model.functions for node, _ in _widened(function)]
    return [node.name for node in model.graph.node if node.op_type == "Softmax"] + inside


def _widened(function: onnx.FunctionProto) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """Every Softmax of a function body that reads a Cast, with that Cast."""
    casts = {node.output[0]: node for node in function.node if node.op_type == "Cast"}
    return [
        (node, casts[node.input[0]]) for node in function.node if node.op_type == "Softmax" and node.input[0] in casts
    ]


def _join_casts(graph: onnx.GraphProto) -> None:
    """Mend what the converter leaves: a cast for each float32 node that reads a tensor, casts to float16 and back
    between two of these, and casts to the type that a tensor has, but those of tensors that branches and loops read."""
    casts: dict[str, onnx.NodeProto] = {}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if node.op_type == "Cast" and casts.setdefault(node.output[0], node) is not node:
            del graph.node[index]
    for node in casts.values():
        while (before := casts.get(node.input[0])) and before.attribute[0].i == TensorProto.FLOAT16:
            node.input[0] = before.input[0]
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    fixed = {value.name for value in (*graph.input, *graph.output)}
    inner = {name for node in graph.node for name in {*names_read(node)} - {*node.input}}
    for node in casts.values():
        source, result = node.input[0], node.output[0]
        useless = types.get(source) == node.attribute[0].i and inner.isdisjoint((source, result))
        if useless and not {source, result} <= fixed:
            graph.node.remove(node)
            _rename(graph, *((source, result) if result in fixed else (result, source)))
            types[result] = types[source]


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Call a tensor otherwise where nodes read and write it."""
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
