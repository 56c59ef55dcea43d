"""Fused ONNX to INT8 by explicit QuantizeLinear and DequantizeLinear, which TensorRT follows to the letter."""

from __future__ import annotations

import shlex
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
from onnx import helper
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.artifacts import StageResult, check_output, replacing, write_artifact
from acmix_deploy.detection.boxes import no_detector, unlike_detector
from acmix_deploy.detection.heads import unlike_told
from acmix_deploy.detection.matching import NEAR
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.detection.parts import known_head, parts_of
from acmix_deploy.detection.rows import paired
from acmix_deploy.errors import UserError
from acmix_deploy.forms import custom_nodes
from acmix_deploy.graph import Feeds, fed, name_nodes, read, tidied, with_weights
from acmix_deploy.half import runnable
from acmix_deploy.onnx_file import opset as opset_of
from acmix_deploy.options import FLOAT32, Method
from acmix_deploy.precision.cost import multiply_adds
from acmix_deploy.precision.fp16 import Fp16Report, check_float32, fits, halved, kept_by_pattern, tail
from acmix_deploy.precision.pairs import RANK, between, ends, insert
from acmix_deploy.precision.ranges import bounds, calibrate
from acmix_deploy.precision.samples import Samples, doubts
from acmix_deploy.precision.search import Excluded, Goal, Judge, SearchReport, search
from acmix_deploy.processing import attach, detach, network_of
from acmix_deploy.runtime.inputs import as_images
from acmix_deploy.runtime.metrics import Deviation, deviation
from acmix_deploy.runtime.onnxruntime import inputs_of, metadata_of, open_session
from acmix_deploy.targets import Int8Scheme

Model = Path | onnx.ModelProto

_COMPUTE = (*RANK, "ConvTranspose")
_CHANNEL_SCALES, _FLOAT16_SCALES = 13, 19  # opsets from which scales can be so
_MEASURED = 8  # batches


class QuantizedLayer(BaseModel):
    """One layer in INT8."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="name of its node")
    weight: str = Field(description="name of its weight")
    relative_l2: float = Field(
        description="error of its output over the calibration images, if this layer alone were in INT8"
    )
    multiply_adds: int = Field(default=0, description="for a batch of the calibration")


class FloatLayer(BaseModel):
    """One convolution or matrix product that is not in INT8."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="name of its node")
    weight: str = Field(description="name of its second input")
    reason: str = Field(description="why it is not in INT8")
    multiply_adds: int = Field(default=0, description="for a batch of the calibration")


class Int8Report(BaseModel):
    """What :func:`quantize` did, and how far the result is from the float model on the calibration images."""

    model_config = ConfigDict(frozen=True)

    method: Method = Field(description="how ranges of activations were chosen")
    scheme: Int8Scheme = Field(
        default="symmetric",
        description="symmetric: inputs of layers in int8, without zero points; uint8: inputs and outputs with them, "
        "for ONNX Runtime's kernels on a CPU, which TensorRT does not read",
    )
    rest: Literal["float32", "float16"] = Field(description="type of what lies between the layers, and of scales")
    attention: dict[str, Literal["float32", "float16"]] = Field(
        default={}, description="nodes of the attention operators, and the type that each computes in"
    )
    fp16: Fp16Report | None = Field(description="what stays in float32 where the rest is float16")
    opset: int = Field(description="opset of the file")
    input_shape: tuple[int, ...] = Field(description="[B, C, H, W] of the calibration batches")
    images: int = Field(description="images calibrated with")
    measured: int = Field(description="images that errors were measured on, the first of those")
    skipped: list[str] = Field(description="images that could not be read, and why")
    layers: list[QuantizedLayer] = Field(description="layers in INT8, the one with the largest error first")
    float_layers: list[FloatLayer] = Field(description="layers that are not in INT8")
    outputs: dict[str, Deviation] = Field(description="error of each output; of boxes and scores, where they are known")
    bytes_before: int = Field(description="size of the float file")
    bytes_after: int = Field(description="size of the INT8 file")
    search: SearchReport | None = Field(default=None, description="how a target was met, where there is one")
    notes: list[str] = Field(
        default=[], description="why the calibration may be wrong, and where the error begins if it is large"
    )

    @property
    def int8_share(self) -> float:
        """The share of the multiply-adds that is in INT8, 0 to 1."""
        quantized = sum(layer.multiply_adds for layer in self.layers)
        return quantized / max(1, quantized + sum(layer.multiply_adds for layer in self.float_layers))


class Layers(NamedTuple):
    """The compute nodes of a graph by what becomes of them."""

    quantized: list[onnx.NodeProto]
    kept: list[FloatLayer]


def quantize(
    source: Path,
    target: Path,
    calibration: Path,
    *,
    method: Method = "percentile",
    exclude: Sequence[str] = (),
    quantize_head: bool = False,
    scheme: Int8Scheme = "symmetric",
    fp16: bool = False,
    float32: Sequence[str] = FLOAT32,
    image_size: tuple[int, int] | None = None,
    limit: int = 256,
    goal: Goal | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> StageResult[Int8Report]:
    """Write a float32 ONNX file as one whose convolutions and matrix products are INT8.

    Inputs of a layer are symmetric int8 per tensor, weights per output channel; biases and everything between the
    layers stay in floating point, custom operators and their function bodies among it. Inputs are quantised and
    outputs are not, so that TensorRT is free to fuse what follows.

    Args:
        source: ONNX file in float32 with one image input [B, 3, H, W].
        target: where the INT8 file goes, another path than ``source``.
        calibration: images like those that the model will see, as a folder or a data set's YAML file.
        method: how the range of an activation is chosen: "percentile", "entropy" or "minmax" (docs/int8.md).
        exclude: patterns (``*``, ``?``, ``[]``) of names of nodes or of their weights that are not quantised.
        quantize_head: quantise the detection head too: the layers between a detector's feature maps and its decode.
        scheme: ``uint8`` is for ONNX Runtime on a CPU, whose integer kernels need inputs and outputs quantised and are
            fast for activations in uint8 alone; TensorRT does not read its zero points.
        fp16: convert what is not quantised by :func:`to_fp16`; scales in float16 need opset 19.
        float32: what stays in float32 then; ranges are seen on the images that errors are measured on.
        image_size: height and width where the file leaves them free; by default what its metadata tell, else 640.
        limit: how many images to read at most.
        goal: leave more layers in floating point until the file meets it. Where none does, the best one is written
            beside ``target``, as ``NAME.best.onnx``.
        progress: told what is being done.

    Returns:
        The file with its sidecar, and the error that each layer adds.

    Raises:
        UserError: the file cannot be used, is quantised already or of too low an opset, or says that it is a detector
            and gives something else than boxes and scores; there is no readable image; a pattern fits nothing; the
            images of the goal cannot be used.
        MissingComponent: OpenCV, or what measures the goal, is not installed.
    """
    check_output(target, source)
    if fp16 and scheme == "uint8":
        raise UserError("a file for ONNX Runtime on a CPU keeps in float32 what is not INT8", "Leave out --fp16.")
    network = network_of(source)
    session = open_session(network)
    metadata = metadata_of(session)
    shapes = {node.name: node.shape for node in session.get_outputs()}
    if metadata.detects and (unlike := unlike_told(metadata, shapes)):
        raise no_detector(str(source), unlike)
    model = _load(source, opset=_FLOAT16_SCALES if fp16 else _CHANNEL_SCALES)
    around = detach(model)
    chosen = choose_layers(model, exclude, quantize_head=quantize_head)
    attention = [node.name for node in custom_nodes(model)]
    if fp16:
        kept_by_pattern(model, float32)  # before the long work
    shape = _shape(session, source, metadata, image_size)
    (name,) = (node.name for node in inputs_of(session))
    del session
    images = Samples.find(calibration, limit, name, shape, metadata)
    judge = None
    if goal:
        progress("measuring the float file")
        judge = goal.judge(source, shape)
    progress("looking at the calibration images")
    notes = doubts(images, network)
    progress(f"calibrating on {len(images.paths)} images")

    def integer(layers: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        return [*layers, *between(model, layers)] if scheme == "uint8" else layers

    largest = calibrate(model, dict.fromkeys(ends(integer(chosen.quantized), scheme)), images.feeds, method)
    if scheme == "uint8":
        ranges = bounds(model, largest, images.feeds())
    else:
        ranges = {name: (-magnitude, magnitude) for name, magnitude in largest.items()}
    progress("measuring each layer")
    samples = list(islice(images.feeds(), _MEASURED))
    costs = multiply_adds(model, compute_nodes(model), samples[0])
    measured = _measure(model, insert(model, chosen.quantized, ranges, scheme), chosen.quantized, samples)
    layers = [
        QuantizedLayer(name=node.name, weight=node.input[1], relative_l2=error, multiply_adds=costs[node.name])
        for node, error in sorted(measured, key=lambda found: found[1], reverse=True)
    ]
    half: Fp16Report | None = None

    def typed(excluded: Excluded = frozenset()) -> onnx.ModelProto:
        nonlocal half
        kept = [node for node in chosen.quantized if node.name not in excluded]
        quantized = insert(model, integer(kept), ranges, scheme)
        if fp16:
            quantized, half = halved(quantized, float32=float32, samples=samples)
        return quantized

    found = None
    if goal and judge:
        sensitive = {layer.name: layer.multiply_adds for layer in layers}
        found = search(sensitive, sum(costs.values()), typed, judge, goal, progress)
        notes += _of_the_search(found, judge, images)
        target = target if found.met else best_beside(target)
    progress("quantising")
    excluded = frozenset(found.excluded) if found else Excluded()
    try:
        with replacing(target) as temporary:
            quantized = typed(excluded)
            attach(quantized, around)
            onnx.save(quantized, temporary)
            progress("measuring the outputs")
            outputs = _compare(str(source), network, network_of(temporary), samples, metadata)
    except UserError as error:  # a full disk
        if excluded:
            again = " ".join(f"--exclude {shlex.quote(name)}" for name in sorted(excluded))
            error.hint += f" What the search found is made again, without a search, by {again}"
        raise
    rest: Literal["float32", "float16"] = "float16" if fp16 else "float32"
    left = [
        FloatLayer(name=layer.name, weight=layer.weight, reason="left by the search for the target")
        for layer in layers
        if layer.name in excluded
    ]
    report = Int8Report(
        method=method,
        scheme=scheme,
        rest=rest,
        attention={name: "float32" if half and name in half.float32_nodes else rest for name in attention},
        fp16=half,
        opset=opset_of(model),
        input_shape=shape,
        images=len(images.paths),
        measured=min(len(images.paths), len(samples) * shape[0]),
        skipped=images.skipped,
        layers=[layer for layer in layers if layer.name not in excluded],
        float_layers=[layer.model_copy(update={"multiply_adds": costs[layer.name]}) for layer in (*left, *chosen.kept)],
        outputs=outputs,
        bytes_before=source.stat().st_size,
        bytes_after=target.stat().st_size,
        search=found,
        notes=notes,
    )
    settings = {
        "method": method,
        "exclude": [*exclude, *(found.excluded if found else ())],
        "quantize_head": quantize_head,
        "scheme": scheme,
        "fp16": fp16,
        "float32": list(float32),
        "images": report.images,
        "input_shape": list(shape),
    }
    return StageResult(write_artifact(target, "int8", parents=with_weights(source), settings=settings), report)


def best_beside(target: Path) -> Path:
    """Where the best file goes that does not meet its goal."""
    return target.with_name(f"{target.stem}.best{target.suffix}")


def _of_the_search(found: SearchReport, judge: Judge, images: Samples) -> list[str]:
    """What to say of a search beside its steps."""
    notes = [*judge.notes]
    if shared := {path.resolve() for path in images.paths} & {path.resolve() for path in judge.images}:
        notes.append(f"{len(shared)} images were calibrated on and judged on: on others more may be lost")
    if found.stopped:
        notes.append(f"the search was stopped ({found.stopped}): fewer layers in floating point may do")
    return notes


def choose_layers(model: onnx.ModelProto, exclude: Sequence[str] = (), *, quantize_head: bool = False) -> Layers:
    """What becomes INT8 among the nodes of the main graph, and why the others do not; function bodies never do.

    Raises:
        UserError: a pattern fits no layer, or nothing is left.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    compute = compute_nodes(model)
    excluded = {pattern: [node for node in compute if fits(node, pattern, weights)] for pattern in exclude}
    for pattern, fitting in excluded.items():
        if not fitting:
            raise UserError(
                f"--exclude {pattern} fits the name of no layer and of no weight", "Look at the names in the report."
            )
    by_pattern = {id(node): f"excluded by {pattern}" for pattern, nodes in excluded.items() for node in nodes}
    behind = set(tail(model))
    seen = fed(model)
    in_head = set() if quantize_head else head(model)

    def reason(node: onnx.NodeProto) -> str:
        weight = weights.get(node.input[1])
        if weight is None:
            return "its second operand is computed"
        if node.op_type not in RANK or RANK[node.op_type] not in (None, len(weight.dims)):
            return f"{node.op_type} with a weight of rank {len(weight.dims)} is not quantised"
        if node.input[0] not in seen:
            return "it does not see the image"
        if node.name in behind:
            return "it decodes, behind the last learnt layer"
        return "detection head" if node.name in in_head else ""

    found = [(node, by_pattern.get(id(node)) or reason(node)) for node in compute]
    quantized = [node for node, why in found if not why]
    if not quantized:
        reasons = "; ".join(f"{node.name}: {why}" for node, why in found[:3])
        raise UserError(f"no layer is left to quantise ({reasons or 'the graph has none'})")
    return Layers(quantized, [FloatLayer(name=n.name, weight=n.input[1], reason=why) for n, why in found if why])


def compute_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The convolutions and matrix products of the main graph."""
    return [node for node in model.graph.node if node.op_type in _COMPUTE and node.domain in ("", "ai.onnx")]


def head(model: onnx.ModelProto) -> set[str]:
    """Names of the layers between a detector's feature maps and its decode, found by the graph's structure alone.

    These are the last layers, which no other layer reads; and where there are several, as for the boxes and the
    classes of every map, the layers before each of them that feed nothing else, back to what several branches read.
    In a model with one last layer, such as a classifier, the head is that layer.
    """
    custom = {(function.domain, function.name) for function in model.functions}
    behind = set(tail(model))
    layers = {
        node.name: node
        for node in model.graph.node
        if node.name not in behind and (node.op_type in _COMPUTE or (node.domain, node.op_type) in custom)
    }
    producers = {name: node for node in model.graph.node for name in node.output}
    before = {name: _layers_before(node, layers, producers) for name, node in layers.items()}
    after: dict[str, set[str]] = {name: set() for name in layers}
    for name, sources in before.items():
        for source in sources:
            after[source].add(name)
    last = [name for name, readers in after.items() if not readers and before[name]]
    found = set(last)
    for name in last if len(last) > 1 else ():
        while len(before[name]) == 1 and len(after[source := next(iter(before[name]))]) == 1 and before[source]:
            found.add(name := source)
    return found


def _layers_before(node: onnx.NodeProto, layers: Collection[str], producers: dict[str, onnx.NodeProto]) -> set[str]:
    """Names of the nearest layers that ``node`` is computed from, not looking behind a Shape."""
    found, seen = set(), set()
    queue = deque(node.input)
    while queue:
        source = producers.get(queue.popleft())
        if source is None or source.op_type == "Shape" or id(source) in seen:
            continue
        seen.add(id(source))
        if source.name in layers:
            found.add(source.name)
        else:
            queue.extend(source.input)
    return found


def _load(source: Path, opset: int) -> onnx.ModelProto:
    """The model, every node named, its Constant nodes stored as initializers, where quantisation looks for weights.

    Raises:
        UserError: it is quantised already, not in float32, or below ``opset``.
    """
    model = read(source)
    check_float32(model, source)
    if opset_of(model) < opset:
        raise UserError(
            f"{source} has opset {opset_of(model)}, at least {opset} is needed here", f"Export it with --opset {opset}."
        )
    name_nodes(model)
    return tidied(model, LiftConstantsToInitializersPass(size_limit=0))


def _shape(
    session: Any, source: Path, metadata: ModelMetadata, image_size: tuple[int, int] | None
) -> tuple[int, int, int, int]:
    """[B, 3, H, W] to calibrate with. Raises UserError where the file takes something else."""
    inputs = [as_images(node, metadata.pixels) for node in inputs_of(session)]
    if len(inputs) != 1 or len(inputs[0].dims) != 4:
        found = ", ".join(f"{node.name} {list(node.dims)}" for node in inputs)
        raise UserError(f"one image input [B, 3, H, W] is expected; {source} takes {found}")
    height, width = image_size or metadata.imgsz
    wanted = (1, 3, height, width)
    batch, channels, *size = (a if isinstance(a, int) else b for a, b in zip(inputs[0].dims, wanted, strict=True))
    if image_size and tuple(size) != image_size:
        raise UserError(f"{source} takes images of {size[0]}x{size[1]} alone, not of {height}x{width}")
    metadata.check_size(str(source), (batch, channels, *size))
    return batch, channels, size[0], size[1]


def _measure(
    model: onnx.ModelProto, typed: onnx.ModelProto, layers: Sequence[onnx.NodeProto], samples: Sequence[Feeds]
) -> list[tuple[onnx.NodeProto, float]]:
    """The error of each layer in a graph where what follows it reads its float twin, so that no two errors add up."""
    twins = {node.output[0]: node for node in layers}
    both = onnx.ModelProto()
    both.CopyFrom(typed)
    del both.graph.node[:], both.graph.output[:]
    order = []
    for node in typed.graph.node:
        both.graph.node.append(node)
        if (twin := twins.get(node.output[0])) is None:
            continue
        order.append(twin)
        exact, quantized, error = twin.output[0], f"{twin.name}/quantized", f"{twin.name}/error"
        both.graph.node[-1].output[0] = quantized
        both.graph.node.append(helper.make_node(twin.op_type, twin.input, [exact]))
        both.graph.node[-1].attribute.extend(twin.attribute)
        both.graph.node.append(helper.make_node("Sub", [quantized, exact], [error]))
        for tensor in (error, exact):
            both.graph.node.append(helper.make_node("ReduceSumSquare", [tensor], [f"{tensor}/power"], keepdims=0))
            both.graph.output.append(onnx.ValueInfoProto(name=f"{tensor}/power"))
    present = {tensor.name for tensor in both.graph.initializer}
    both.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in present)
    session = open_session(both, reduces=True)
    powers = np.sum([session.run(None, feed) for feed in samples], axis=0, dtype=np.float64).reshape(-1, 2)
    return [(node, float(np.sqrt(error / (power or 1)))) for node, (error, power) in zip(order, powers, strict=True)]


def _compare(
    name: str, source: Model, target: Model, samples: Sequence[Feeds], metadata: ModelMetadata
) -> dict[str, Deviation]:
    """The distance of every output from the float file's, and of the parts of those whose parts are known."""

    def outputs(model: Model) -> Feeds:
        session = open_session(runnable(model))
        runs = zip(*(session.run(None, feed) for feed in samples), strict=True)
        names = [value.name for value in session.get_outputs()]
        return {name: np.concatenate(arrays) for name, arrays in zip(names, runs, strict=True)}

    expected, actual = outputs(source), outputs(target)
    if metadata.detects and (unlike := unlike_detector(metadata, expected)):
        raise no_detector(name, unlike)
    head = known_head(metadata, expected)
    expected, actual = paired(head, expected, actual, NEAR["int8"])
    found = {name: deviation(array, actual[name]) for name, array in expected.items()}
    for name, parts in parts_of(head, expected).items():
        for part, index in parts.items():
            found[part] = deviation(expected[name][index], actual[name][index])
    return found
