"""Bring a foreign ONNX file to the form that recognition starts from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import inliner, shape_inference, version_converter

from acmix_deploy.errors import UserError
from acmix_deploy.graph import DOUBLE, Array, Feeds, as_float32, check, keep, name_nodes, names_read, read
from acmix_deploy.operators import OPERATORS
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import inputs_of, ir_version, metadata_of, open_session, why_refused
from acmix_deploy.runtime.reason import reason
from acmix_deploy.targets import OPSETS

_STANDARD = ("", "ai.onnx")
_OURS = {(operator.domain, operator.op_type) for operator in OPERATORS}
_SAME = 1e-6  # relative L2 of a model and the same in another opset
_SIDES = (64, 160, 224, 320, 640)  # of images to begin with where axes are free


def load(path: Path) -> tuple[onnx.ModelProto, list[str]]:
    """Read an ONNX file at an opset that the operators' bodies are valid in, converting older and newer ones.

    Local functions, all but those of our own operators, are put in place of their calls, so that a block within one is
    seen; one that cannot be stays a call. float64 becomes float32 throughout: it is an accident of exporters
    (``torch.linspace``), which spreads from the position term to everything behind it, and neither ONNX Runtime nor
    TensorRT can convolve in it. What is converted down counts only after both were run and gave the same.

    Returns:
        The model, and the names of the functions that are no more.

    Raises:
        UserError: there is no such file, it is no ONNX file, not a valid one, or of an opset that it cannot be
            converted from.
    """
    model = read(path)
    opset = next((entry.version for entry in model.opset_import if entry.domain in _STANDARD), None)
    if opset is None:
        raise UserError(f"{path} holds no ONNX graph", "Give the file that an exporter wrote.")
    if model.functions:
        check(model, path)  # the inliner takes its word for what the checker looks at
    functions = _ids(model)
    model = _without_calls(model)
    inlined = [f"{domain}::{name}" for domain, name in functions if (domain, name) not in _ids(model)]
    nearest = min(max(opset, OPSETS[0]), OPSETS[-1])
    original = model
    if opset != nearest:
        try:
            model = _converted(model, nearest)
            if opset > nearest:
                onnx.checker.check_model(model)  # the converter keeps operators that the lower opset does not have
        except Exception as error:  # the converter raises RuntimeError and its own types
            raise _not_converted(path, opset, nearest, reason(error)) from error
    model.ir_version = ir_version(nearest)
    check(model, path)
    as_float32(model, DOUBLE)
    if opset > nearest and (unlike := _unlike(as_float32(original, DOUBLE), model)):
        raise _not_converted(path, opset, nearest, unlike)
    name_nodes(model)
    return model, inlined


def _not_converted(path: Path, opset: int, nearest: int, why: str) -> UserError:
    hint = f"Export it with --opset {nearest}."
    if opset > nearest:
        hint = f"Export it with --opset {nearest} or below. As it is, " + (
            why_refused(path) or f"ONNX Runtime {onnxruntime.__version__} runs it, without fused blocks."
        )
    return UserError(f"{path} has opset {opset} and cannot be converted to {nearest}: {why}", hint)


def _unlike(original: onnx.ModelProto, converted: onnx.ModelProto) -> str:
    """In what the two differ, run node by node as they are written on random input; nothing where they do not."""
    try:
        before, after = (open_session(model, optimize=False) for model in (original, converted))
    except UserError as error:
        return error.message
    feeds, expected = _first_run(before)
    if not expected:
        return "it cannot be run at any size that was tried, so nothing shows that it stays the same"
    try:
        found = after.run(None, feeds)
    except Exception as error:  # ONNX Runtime's error types share no base of their own
        return reason(error)
    for output, wanted, got in zip(before.get_outputs(), expected, found, strict=True):
        distance = deviation(wanted, got)
        if distance.relative_l2 is None or distance.relative_l2 > _SAME:
            return f"{output.name} differs: {distance.problem or f'relative L2 {distance.relative_l2:.1e}'}"
    return ""


def _first_run(session: onnxruntime.InferenceSession) -> tuple[Feeds, list[Array]]:
    """Random input of the first size that a model takes, where axes are free, and its outputs; empty if of none."""
    height, width = metadata_of(session).imgsz
    random = np.random.default_rng(0)
    for free in ({2: height, 3: width}, *({2: side, 3: side} for side in _SIDES)):
        feeds = {}
        for node in inputs_of(session):
            shape = [dim if isinstance(dim, int) else free.get(axis, 1) for axis, dim in enumerate(node.dims)]
            feeds[node.name] = random.random(shape).astype(node.dtype)
        try:
            return feeds, session.run(None, feeds)
        except Exception:  # ONNX Runtime's error types share no base of their own
            continue
    return {}, []


def _ids(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(function.domain, function.name) for function in model.functions]


def _without_calls(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with foreign functions in place of their calls, as far as that can be done."""
    foreign = [function for function in model.functions if (function.domain, function.name) not in _OURS]
    if not foreign:
        return model
    ours = [function for function in model.functions if (function.domain, function.name) in _OURS]
    inlined = onnx.ModelProto()
    inlined.CopyFrom(model)
    del inlined.functions[:]
    inlined.functions.extend(foreign)
    # The inliner does not know the defaults of attributes (onnx 1.23): each call gets them.
    defaults = {(function.domain, function.name): function.attribute_proto for function in foreign}
    for node in [node for part in (inlined.graph, *inlined.functions) for node in _nodes(part)]:
        given = {attribute.name for attribute in node.attribute}
        known = defaults.get((node.domain, node.op_type), ())
        node.attribute.extend(attribute for attribute in known if attribute.name not in given)
    # Functions of another opset than the model's are converted; where the converter fails, they stay calls.
    for convert_version in (True, False):
        with suppress(Exception):  # its errors share no base of their own
            inlined = inliner.inline_local_functions(inlined, convert_version)
            break
    inlined.functions.extend(ours)
    # The inliner leaves out what only functions import, and leaves in what nobody calls any more.
    versions = {entry.domain: entry for function in foreign for entry in function.opset_import}
    versions = {domain: entry for domain, entry in versions.items() if domain not in _STANDARD}
    versions |= {entry.domain: entry for entry in model.opset_import}
    called = {*_STANDARD, *(node.domain for part in (inlined.graph, *inlined.functions) for node in _nodes(part))}
    del inlined.opset_import[:]
    inlined.opset_import.extend(entry for domain, entry in versions.items() if domain in called)
    return inlined


def _nodes(part: onnx.GraphProto | onnx.FunctionProto) -> list[onnx.NodeProto]:
    """The nodes of a graph and of the graphs within them."""
    inner = [attribute.g for node in part.node for attribute in node.attribute if attribute.HasField("g")]
    return [*part.node, *(node for graph in inner for node in _nodes(graph))]


def _converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model at another opset. onnx's converter gives nodes and constants; the rest it drops, so it stays here."""
    dense = onnx.ModelProto()
    dense.CopyFrom(model)
    for tensor in dense.graph.sparse_initializer:  # which the converter does not look at
        stored = np.zeros(tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.values.data_type))
        dense.graph.initializer.append(onnx.numpy_helper.from_array(stored, tensor.values.name))
    del dense.graph.sparse_initializer[:]
    new = version_converter.convert_version(dense, opset)
    if any(entry.version < 13 and entry.domain in _STANDARD for entry in model.opset_import):
        _unflatten(new)
    told = {node.output[0]: node for node in model.graph.node if node.output}
    for node in new.graph.node:
        if before := told.get(node.output[0] if node.output else ""):
            node.metadata_props.extend(before.metadata_props)
    converted = onnx.ModelProto()
    converted.CopyFrom(model)
    del converted.graph.node[:]
    converted.graph.node.extend(new.graph.node)
    known = {tensor.name for tensor in dense.graph.initializer}
    converted.graph.initializer.extend(tensor for tensor in new.graph.initializer if tensor.name not in known)
    ours = [function for function in converted.functions if (function.domain, function.name) in _OURS]
    for part in (converted, *ours):  # our definitions hold in all opsets from 17 on
        for entry in part.opset_import:
            entry.version = opset if entry.domain in _STANDARD else entry.version
    return converted


def _unflatten(model: onnx.ModelProto) -> None:
    """Take away, in place, what the converter puts around a Softmax of an opset below 13 that is over the last axis.

    There a Softmax takes all axes from one on together. Where the converter does not know how many there are, it makes
    a matrix of them; here shapes are inferred, and of one axis no matrix is needed.
    """
    found = [*_matrices(model)]
    if not found:
        return
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*inferred.input, *inferred.value_info)}
    whole: dict[str, onnx.NodeProto] = {}
    gone: set[str] = set()
    for flatten, softmax, shape, reshape in found:
        axes = [[attribute.i for attribute in node.attribute] for node in (flatten, softmax)]
        if axes == [[ranks.get(flatten.input[0], 0) - 1], [-1]]:
            gone.update((flatten.output[0], softmax.output[0], shape.output[0]))
            alone = whole[reshape.output[0]] = onnx.NodeProto()
            alone.CopyFrom(softmax)
            alone.input[0], alone.output[0] = flatten.input[0], reshape.output[0]
    nodes = [node for node in model.graph.node if gone.isdisjoint(node.output)]
    keep(model.graph.node, [whole.get(node.output[0] if node.output else "", node) for node in nodes])


def _matrices(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, ...]]:
    """Flatten, Softmax or its like, Shape and Reshape wherever a tensor is a matrix for that one operator alone."""
    made = {name: node for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in names_read(node))
    readers.update(value.name for value in model.graph.output)
    for reshape in model.graph.node:
        softmax, shape = (made.get(name) for name in [*reshape.input, "", ""][:2])
        if softmax is None or shape is None or softmax.op_type not in ("Softmax", "LogSoftmax", "Hardmax"):
            continue
        flatten = made.get(softmax.input[0])
        if flatten is None or [reshape.op_type, flatten.op_type, shape.op_type] != ["Reshape", "Flatten", "Shape"]:
            continue
        parts = (flatten, softmax, shape)
        if flatten.input[0] == shape.input[0] and all(readers[part.output[0]] == 1 for part in parts):
            yield *parts, reshape
