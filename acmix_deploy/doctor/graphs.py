"""Known faults of ONNX files."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from acmix_deploy import onnx_file
from acmix_deploy.detection.boxes import unlike_detector
from acmix_deploy.detection.heads import unlike_told
from acmix_deploy.detection.matching import NEAR
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.detection.parts import known_head
from acmix_deploy.detection.rows import paired
from acmix_deploy.doctor.diagnosis import Examination, Finding
from acmix_deploy.errors import AcmixDeployError, UserError
from acmix_deploy.fusion import FusedBlock, fuse
from acmix_deploy.graph import check, read
from acmix_deploy.processing import SAY_PIXELS, network_of, untold_pixels
from acmix_deploy.runtime.inputs import Input
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import inputs_of, metadata_of, open_session
from acmix_deploy.runtime.reason import reason
from acmix_deploy.targets import NEWEST, UNBUILT_BY_RTX

_FLOAT64 = re.compile(r"Could not find an implementation for Conv\(\d+\) node with name '([^']*)'")
_SIDES = (64, 160, 320, 640, 224, 416, 512, 256, 384, 448, 768, 1024, 1280)
"""Of images to begin with where axes are free. A frozen file takes one of them at most, and which is not told."""
_STEP = 64  # pixels to another size; a multiple of every usual stride
_AXES = {0: "batch", 2: "height", 3: "width"}
_BATCH_LIMIT = 1e-3  # relative L2 between an image alone and the same in a batch; rounding is 1e-6, float16's 1e-3

Run = Callable[[Mapping[int, int]], list[NDArray[Any]]]


def examine_onnx(path: Path, progress: Callable[[str], None]) -> Examination:
    """What an ONNX file holds and which faults it has. Raises UserError where it is none."""
    model = read(path)
    told = onnx_file.describe(model)
    contents = {
        "opset": str(told.opset),
        "written by": told.producer or "unknown",
        "precision": told.precision,
        "form": told.form,
        **{f"input {tensor.name}": f"{tensor.dtype} {list(tensor.shape)}" for tensor in told.inputs},
        "fused blocks": ", ".join(node.name for node in told.fused) or "none",
    }
    blocks: list[FusedBlock] = []
    try:
        check(model, path)
    except UserError as error:
        return Examination(
            path=path, kind="onnx", contents=contents, findings=(Finding.of("refused-file", error.message),)
        )
    notes = [f"it has {onnx_file.unread_note(*found)}" for found in onnx_file.unread(model, NEWEST).items()]
    notes += [
        f"it has {operator}, which TensorRT-RTX reads and cannot build: TensorRT can"
        for operator in sorted({node.op_type for node in model.graph.node} & UNBUILT_BY_RTX)
    ]
    if untold := untold_pixels(model):
        notes.append(f"it {untold}: fuse and build take it, fp16, quantize, detect and serve do not. {SAY_PIXELS}")
    findings = [*_folded(model)]
    if told.form == "plugin":
        notes.append("its operators have no definitions, so it cannot be run here: TensorRT with the plugin runs it")
    else:
        findings += _of_session(path, progress, sizes=not untold)
        progress("looking for blocks")
        try:
            with tempfile.TemporaryDirectory() as folder:
                fusion = fuse(path, Path(folder, "fused.onnx"), progress=progress).found
            blocks = fusion.blocks
            if fusion.hidden:
                findings.append(Finding.of("hidden-block", fusion.why_hidden))
                blocks = [block for block in blocks if block.fused]  # what hides a block is no near miss
            elif fusion.why_hidden:
                notes.append(fusion.why_hidden)
        except AcmixDeployError as error:
            notes.append(f"blocks cannot be looked for: {reason(error)}")
    findings += [
        Finding.of("no-block", f"not fused: {block.reason}", block.name) for block in blocks if not block.fused
    ]
    return Examination(
        path=path,
        kind="onnx",
        contents=contents,
        graph_blocks=tuple(blocks),
        findings=tuple(findings),
        notes=tuple(notes),
    )


def _of_session(path: Path, progress: Callable[[str], None], sizes: bool) -> Iterator[Finding]:
    """What ONNX Runtime makes of the file, at other ``sizes`` too where these can be told."""
    try:
        session = open_session(network_of(path))
    except UserError as error:
        if found := _FLOAT64.search(error.message):
            yield Finding.of("float64-position", f"ONNX Runtime: {found[0]}", found[1])
        else:
            yield Finding.of("refused-file", error.message)
        return
    metadata = metadata_of(session)
    if metadata.detects and (unlike := _unlike_detector(session, metadata)):
        yield Finding.of("other-outputs", f"it {unlike}")
    if sizes:
        progress("running it at other sizes")
        yield from _frozen(session)


def _unlike_detector(session: onnxruntime.InferenceSession, metadata: ModelMetadata) -> str:
    """What tells the outputs from a detector's, as declared, then on noise; empty where it does not run."""
    try:
        shapes = {node.name: node.shape for node in session.get_outputs()}
        if found := unlike_told(metadata, shapes):
            return found
        (first,) = inputs_of(session)
        image = _image(first, dict(enumerate(metadata.usual_shape)))
    except UserError as error:
        return f"cannot be decoded: {error.message}"
    except ValueError:
        return "takes more than one input"
    try:
        outputs = session.run(None, {first.name: image})
    except Exception:  # ONNX Runtime's error types share no base of their own; what does not run is told elsewhere
        return ""
    return unlike_detector(metadata, dict(zip(shapes, outputs, strict=True)))


def _frozen(session: onnxruntime.InferenceSession) -> Iterator[Finding]:
    """Axes that are declared free and are not."""
    (first, *others) = inputs_of(session)
    free = [axis for axis in _AXES if axis < len(first.dims) and not isinstance(first.dims[axis], int)]
    if others or not free:
        return

    def run(sizes: Mapping[int, int]) -> list[NDArray[Any]]:
        results: list[NDArray[Any]] = session.run(None, {first.name: _image(first, sizes)})
        return results

    base = next((sizes for side in _SIDES if _runs(run, sizes := {0: 1, 2: side, 3: side})), None)
    if base is None:
        yield Finding.of("frozen-size", f"it runs at none of {', '.join(map(str, sorted(_SIDES)))} pixels")
        return
    size = "x".join(str(base[axis] if axis in free else first.dims[axis]) for axis in (2, 3) if axis < len(first.dims))
    for axis in (axis for axis in free if axis > 0):
        if not _runs(run, base | {axis: base[axis] + _STEP}):
            yield Finding.of("frozen-size", f"it runs at {size} and not with another {_AXES[axis]}", _AXES[axis])
    if 0 in free and (problem := _mixed(session, run, base)):
        yield Finding.of("frozen-batch", problem, "batch")


def _runs(run: Run, sizes: Mapping[int, int]) -> bool:
    try:
        run(sizes)
    except Exception:  # ONNX Runtime's error types share no base of their own
        return False
    return True


def _mixed(session: onnxruntime.InferenceSession, run: Run, base: dict[int, int]) -> str:
    """What is wrong with a batch of two, the first of which is the image of batch one; empty where nothing is."""
    alone = run(base)
    try:
        both = run(base | {0: 2})
    except Exception:
        return "it runs at batch 1 and not at batch 2"
    for one, two in zip(alone, both, strict=True):
        if two.shape[:1] != (2,) or one.shape[:1] != (1,):
            return f"an output is {list(two.shape)} for a batch of 2"
    names = [node.name for node in session.get_outputs()]
    expected, actual = dict(zip(names, alone, strict=True)), dict(zip(names, (two[:1] for two in both), strict=True))
    head = known_head(metadata_of(session), expected)
    expected, actual = paired(head, expected, actual, NEAR["float16"])
    for name in names:
        found = deviation(expected[name], actual[name])
        if found.relative_l2 is None or found.relative_l2 > _BATCH_LIMIT:
            return "an image has another result alone than in a batch of 2"
    return ""


def _image(node: Input, sizes: Mapping[int, int]) -> NDArray[Any]:
    """Random numbers; the first image is the same in every batch."""
    shape = [dim if isinstance(dim, int) else sizes.get(axis, 1) for axis, dim in enumerate(node.dims)]
    return np.random.default_rng(0).random(shape, dtype=np.float32).astype(node.dtype)


def _folded(model: onnx.ModelProto) -> Iterator[Finding]:
    """Constants with a number for every pixel, neighbour and channel, which meet keys or queries before a Softmax."""
    constants = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = next((list(entry.t.dims) for entry in node.attribute), [])
    softmaxes = [node for node in model.graph.node if node.op_type == "Softmax"]
    shapes = _shapes(model) if softmaxes else {}
    logits = {}  # how many there are, by the number of neighbours
    for node in softmaxes:
        if (shape := shapes.get(node.input[0])) and min(shape) > 0:
            axis = next((entry.i for entry in node.attribute if entry.name == "axis"), -1)
            logits[shape[axis]] = prod(shape)
    for node in model.graph.node:
        made = prod(shapes.get(node.output[0], [0])) if node.output else 0
        for name in node.input if node.op_type in ("Add", "Sub", "Mul") else ():
            dims = constants.get(name, [])
            if any(taps > 1 and taps in dims and made > number for taps, number in logits.items()):
                size = 4e-6 * prod(dims)
                yield Finding.of("folded-position", f"{name} {dims} holds {size:.2f} MB", node.name or node.output[0])


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Sizes of tensors, as far as they follow from the graph; 0 for a free axis."""
    inferred = onnx.shape_inference.infer_shapes(model)
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.graph.value_info, *inferred.graph.output)
    }
