"""Run a reference and its candidates on the same inputs, by polygraphy's comparator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator, IterationResult, RunResults

from acmix_deploy.artifacts import read_artifact
from acmix_deploy.detection.boxes import no_detector, suppressed, unlike_detector
from acmix_deploy.detection.heads import Head
from acmix_deploy.detection.images import find
from acmix_deploy.detection.matching import NEAR
from acmix_deploy.detection.metadata import ModelMetadata, Pixels
from acmix_deploy.detection.parts import known_head, parts_of
from acmix_deploy.detection.suppression import CONFIDENCE, Suppression
from acmix_deploy.errors import AcmixDeployError, CheckFailed, MissingComponent, UserError
from acmix_deploy.half import faithful
from acmix_deploy.network import NetworkRunner
from acmix_deploy.operators.spec import Tolerance
from acmix_deploy.options import FLOAT32, Provider, channels_last
from acmix_deploy.process import polygraphy_unlogged
from acmix_deploy.runtime.inputs import Input, Shape, Shapes, file_shape, image_shape, noise, trial_shapes
from acmix_deploy.runtime.metrics import Array, Deviation
from acmix_deploy.runtime.models import Model, open_model
from acmix_deploy.runtime.onnxruntime import onnx_runner, precision_of
from acmix_deploy.runtime.reason import reason
from acmix_deploy.verify.accuracy import Accuracy, labelled, measure, read_truth
from acmix_deploy.verify.detections import DetectionComparison, Scenes, compare_detections
from acmix_deploy.verify.distances import Part, distances
from acmix_deploy.verify.half import HalfRange, half_range
from acmix_deploy.verify.layers import LayerErrors, compare_layers
from acmix_deploy.verify.limits import DETECTION_LIMITS, FILE_TOLERANCES, TOLERANCES, UNKNOWN, limits_for
from acmix_deploy.verify.verification import Comparison, Verification

Feed = dict[str, Array]
_FLOAT32 = np.dtype(np.float32)
_IMAGES = 32  # of a folder, at most: their outputs are all held until they are compared


class Candidate(NamedTuple):
    """Something to compare with the reference."""

    runner: BaseRunner
    """What gives its outputs."""
    precision: str = "float32"
    """Element type that it computes in: "float32", "float16", "int8", or "unknown"."""
    file: Path | onnx.ModelProto | None = None
    """The ONNX file that it runs, to look into; None where it runs something else."""
    rounded: bool = False
    """Whether float16 of the file is rounded on a machine that computes in float32."""
    unrounded: str = ""
    """Why that cannot be done; empty where it is, or need not be."""
    suppression: Suppression | None = None
    """What it suppresses boxes by, where it gives the rows that are left; the reference's are then suppressed too."""

    @property
    def note(self) -> str:
        """What is to be said of how it is run."""
        if not self.unrounded:
            return ""
        return f"{self.runner.name} was run with its float16 tensors in float32, without rounding: {self.unrounded}"

    @classmethod
    def of(cls, model: Path | onnx.ModelProto, name: str) -> Candidate:
        """What is made of a file or a model in memory. Raises what :func:`open_model` does."""
        if isinstance(model, Path):
            return _open(model, name)[1]
        if ModelMetadata.of(model).suppression:
            runner = NetworkRunner(model, name)
            return cls(runner, precision_of(model), model, runner.rounded, runner.unrounded)
        run, why = faithful(model)
        return cls(onnx_runner(run, name), precision_of(model), model, run is not model, why)


def _open(
    path: Path, name: str = "", *, provider: Provider = "cpu", plugin: Path | None = None
) -> tuple[Model, Candidate]:
    """What :func:`open_model` opens; on a CPU a file in float16 as it says, see :mod:`acmix_deploy.half`; of an ONNX
    file that suppresses boxes the network."""
    model = open_model(path, name, provider=provider, plugin=plugin)
    if path.suffix != ".onnx":
        return model, Candidate(model.runner, model.precision or UNKNOWN, suppression=model.metadata.suppression)
    name = model.runner.name
    if model.metadata.suppression:
        runner = NetworkRunner(path, name, provider=provider, plugin=plugin)
        model = model._replace(
            runner=runner,
            inputs=_widened(model.inputs) if runner.rounded else model.inputs,
            metadata=model.metadata.with_suppression(None),
        )
        return model, Candidate(runner, model.precision or UNKNOWN, path, runner.rounded, runner.unrounded)
    run, why = faithful(path) if provider == "cpu" and model.precision != "float32" else (path, "")
    if run is not path:
        model = model._replace(runner=onnx_runner(run, name), inputs=_widened(model.inputs))
    return model, Candidate(model.runner, model.precision or UNKNOWN, path, run is not path, why)


def _widened(inputs: Sequence[Input]) -> tuple[Input, ...]:
    """Inputs as a file takes them once it is rounded."""
    return tuple(node._replace(dtype=_FLOAT32) if node.dtype == np.float16 else node for node in inputs)


def verify(
    reference: BaseRunner,
    candidates: Sequence[Candidate],
    inputs: Scenes | Iterable[Feed],
    *,
    metadata: ModelMetadata | None = None,
    eager: Mapping[str, Callable[[], BaseRunner]] | None = None,
    tolerances: Mapping[str, Tolerance | None] = TOLERANCES,
) -> Verification:
    """Compare every output of every candidate with the reference's on every input, as relative L2.

    Outputs are compared by their parts, such as boxes and scores, in images detections too, and of ONNX files it is
    looked at whether float16 holds what they keep in it. Runners are active one after another, so at most one ONNX
    Runtime session lives at a time.

    Args:
        reference: what is right; outputs are matched by name.
        candidates: what is compared with it; all names differ.
        inputs: arrays by input name, float32, converted where a runner wants another type; or images, in which
            detections are compared too.
        metadata: what the exporter left in the file, such as :func:`open_model` reads; says what the outputs are.
        eager: makes PyTorch's own model in a reduced type, by the name of the type; of float32 in a wider one. It is
            run once a candidate of that type is beyond a limit, and its error on an input widens that candidate's
            limits on the same input. One that fails is noted and widens nothing.
        tolerances: by precision.

    Returns:
        All distances, and whether each is within its limit.

    Raises:
        CheckFailed: a runner fails on an input.
        UserError: there is no input; or images are given, and the reference says that it is a detector and gives
            something else than boxes and scores.
    """
    metadata = metadata or ModelMetadata()
    scenes = inputs if isinstance(inputs, Scenes) else None
    feeds = inputs.feeds if isinstance(inputs, Scenes) else [dict(feed) for feed in inputs]
    if not feeds:
        raise UserError("there is no input to compare on")
    names = [reference.name, *(candidate.runner.name for candidate in candidates)]
    if len(set(names)) < len(names):
        raise ValueError(f"runners share a name: {names}")

    notes = [candidate.note for candidate in candidates if candidate.note]
    comparisons: list[Comparison] = []
    detections: list[DetectionComparison] = []
    half: list[HalfRange] = []
    confidence = scenes.confidence if scenes else CONFIDENCE
    # Polygraphy computes statistics for its log.
    with polygraphy_unlogged(), np.errstate(all="ignore"):
        expected = _run(reference, feeds)
        if isinstance(reference, NetworkRunner):
            notes.append(reference.told)
        rights = _outputs(expected)
        head = known_head(metadata, rights[0])
        unlike = next(filter(None, (unlike_detector(metadata, outputs) for outputs in rights)), "")
        if unlike:
            if scenes and metadata.detects:
                raise no_detector(reference.name, unlike)
            head = None
            if metadata.detects:
                notes.append(f"boxes and scores are not told apart: {reference.name} {unlike}")
            elif scenes:
                notes.append(f"detections were not compared: {reference.name} {unlike}")
        makers, eager_runs = dict(eager or {}), dict[str, RunResults]()
        for candidate in candidates:
            name, precision = candidate.runner.name, candidate.precision
            limits = DETECTION_LIMITS[limits_for(precision)]
            found = _run(candidate.runner, feeds)
            if isinstance(candidate.runner, NetworkRunner):
                notes.append(candidate.runner.told)
                if isinstance(reference, NetworkRunner) and candidate.runner.suppression != reference.suppression:
                    notes.append(f"{name} suppresses boxes by other settings than {reference.name}, and gives others")
            others = _outputs(found)
            wanted, own_head, least = expected, head, confidence
            if (suppression := candidate.suppression) and head:
                wanted = _suppressed(expected, head, suppression)
                own_head = replace(head, layout="rows")
                least = max(confidence, suppression.confidence + limits.near)
                notes.append(
                    f"{name} suppresses boxes: its rows were compared with those that suppression outside it keeps of "
                    f"what {reference.name} gives"
                )
            rights = _outputs(wanted)
            in_images = scenes and suppression  # rounding decides which of two boxes is left
            by_parts = [] if in_images else _distances(wanted, found, own_head, limits.near)
            compared: list[dict[Part, Comparison]] = [{} for _ in by_parts]
            for index, by_part in enumerate(by_parts):
                right, other = rights[index], others[index]
                empty = _fit(right, other) and _nothing_in(right, own_head, confidence)
                empty = empty and _nothing_in(other, own_head, confidence + limits.near)
                for part, distance in by_part.items():
                    comparison = Comparison(
                        **distance.model_dump(),
                        candidate=name,
                        precision=precision,
                        output=part.name,
                        input_shapes={key: array.shape for key, array in feeds[index].items()},
                        empty=empty,
                        limit=None,
                    )
                    compared[index][part] = comparison.judged_by(tolerances)
            if any(one.passed is False for ones in compared for one in ones.values()):
                if precision in makers:
                    try:
                        eager_runs[precision] = _run(makers.pop(precision)(), feeds)
                    except CheckFailed as error:
                        notes.append(f"{error.message}; without it the limit for {precision} is the smallest")
                if eager_run := eager_runs.get(precision):
                    if suppression and head:
                        eager_run = _suppressed(eager_run, head, suppression)
                    own = _distances(wanted, eager_run, own_head, NEAR[precision])
                    for ones, errors in zip(compared, own, strict=True):
                        for part in ones.keys() & errors.keys():
                            told = {"eager_error": errors[part].relative_l2}
                            ones[part] = ones[part].model_copy(update=told).judged_by(tolerances)
            comparisons += (one for ones in compared for one in ones.values())
            outputs = [*zip(rights, others, strict=True)]
            if scenes and own_head and all(_fit(right, other) for right, other in outputs):
                detections.append(
                    DetectionComparison(
                        candidate=name,
                        precision=precision,
                        confidence=0.0 if own_head.layout == "classes" else least,
                        images=compare_detections(scenes._replace(confidence=least), own_head, outputs, limits.near),
                        limits=limits,
                    )
                )
            if candidate.file is None:
                if precision != "float32":
                    notes.append(f"{name} is no ONNX file: whether float16 holds what it computes was not looked at")
                continue
            try:
                looked = half_range(name, candidate.file, feeds)
            except Exception as error:  # whatever rewriting a file stumbles over
                notes.append(f"whether float16 holds what {name} computes could not be looked at: {reason(error)}")
            else:
                half += [looked] if looked else []

    if any(found.passed is None for found in detections):
        notes.append("too little was detected in the images, so that detections show nothing; an untrained model?")
    return Verification(
        reference=reference.name,
        notes=tuple(notes),
        comparisons=tuple(comparisons),
        detections=tuple(detections),
        half=tuple(half),
        rounded=tuple(candidate.runner.name for candidate in candidates if candidate.rounded),
    )


def compare_files(
    reference: Path,
    candidate: Path,
    *,
    images: Path | None = None,
    random: int = 3,
    seed: int = 0,
    input_shape: Sequence[int] | None = None,
    confidence: float = CONFIDENCE,
    provider: Provider = "cpu",
    plugin: Path | None = None,
    layers: bool = False,
) -> Verification:
    """Compare two files of one image input, at several batch and image sizes where both leave them free.

    Args:
        reference, candidate: ONNX files or engines; the limits follow from the type that the candidate computes in.
        images: folder or data set to take inputs from, at most 32; random ones without it. In images the detections of
            a detector are compared as well, and where images have labels the mean average precision of both files is
            measured on all of these.
        random: how many random inputs; raised to the number of shapes tried.
        seed: of the first random input; the next ones count up.
        input_shape: sizes for the axes that are free in both files, by default the candidate's own; sides are multiples
            of the stride that the metadata names, and so are others that are tried.
        confidence: score above which there is a detection.
        provider: what ONNX Runtime runs the candidate on.
        plugin: library with the custom layers of either.
        layers: also compare the tensors inside, see :func:`compare_layers`.

    Returns:
        All distances, and whether each is within its limit.

    Raises:
        UserError: a file cannot be used, the two take different inputs, a size that is free is no multiple of the
            stride, or there is no readable image, or a detector's output cannot be decoded in images.
        CheckFailed: a file fails on an input.
        MissingComponent: what runs the candidate is not here.
    """
    if reference.resolve() == candidate.resolve() and provider == "cpu":
        raise UserError(f"{reference} is compared with itself", "Name two files.")
    labels = [path.name if reference.name != candidate.name else str(path) for path in (reference, candidate)]
    right, expected = _open(reference, labels[0], plugin=plugin)
    other, compared = _open(
        candidate, labels[1] if provider == "cpu" else f"{labels[1]} on {provider}", provider=provider, plugin=plugin
    )
    inside = right.metadata.suppression
    if inside and inside != other.metadata.suppression:
        raise UserError(
            f"{labels[0]} is an engine that suppresses boxes, and {labels[1]} does not, or by other settings",
            "Name the ONNX file as the reference: the network in it is compared.",
        )
    if inside:
        compared = compared._replace(suppression=None)
    metadata = other.metadata.updated(**right.metadata.entries)
    if not inside:
        metadata = metadata.with_suppression(None)
    name, shapes = _tried(right, other, metadata, input_shape)
    inputs = (
        Scenes.read(name, images, shapes, metadata, limit=_IMAGES, confidence=confidence)
        if images
        else noise(name, shapes, seed, random, levels=_takes_levels(right))
    )
    result = verify(
        right.runner,
        [compared],
        inputs,
        metadata=metadata,
        tolerances=FILE_TOLERANCES,
    )
    skipped = inputs.skipped if isinstance(inputs, Scenes) else {}
    notes = (*(f"{image} could not be read: {why}" for image, why in skipped.items()), *result.notes)
    notes += (expected.note,) if expected.note else ()
    if images is None and other.precision == "int8":
        notes += ("an INT8 file is calibrated on images, and on noise only nonsense fails: compare it on images",)
    if compared.precision == UNKNOWN:
        notes += (
            f"nothing tells what type {other.runner.name} computes in, so it has the limits of float32; "
            "--max-relative, --max-lost, --max-score-change and --min-iou set others",
        )
    found, more = _accuracy([right, other], shapes[0], images, metadata) if images else ((), ())
    along: tuple[LayerErrors, ...] = ()
    if layers:
        feeds = inputs.feeds if isinstance(inputs, Scenes) else inputs
        along, why = _along(reference, candidate, other.runner.name, failing_first(result, feeds), provider)
        more = (*more, *why)
    return result.model_copy(update={"notes": (*notes, *more), "accuracy": found, "layers": along})


def compare_borders(
    reference: Path,
    candidate: Path,
    images: Path,
    pad: int,
    *,
    input_shape: Sequence[int] | None = None,
    confidence: float = CONFIDENCE,
    provider: Provider = "cpu",
    plugin: Path | None = None,
) -> Verification:
    """What another border around the images costs: detections of the candidate with it against those of the reference
    with the border that the metadata tell, and both files' mean average precision where images have labels.

    Nothing else is compared, since both see other pixels. The limits are those of int8, the widest.

    Args:
        reference, candidate: ONNX files or engines; they may be the same file.
        images: folder or data set to take inputs from, at most 32, at one size.
        pad: grey of the candidate's border, 0 to 255.
        input_shape, confidence, provider, plugin: see :func:`compare_files`.

    Raises:
        UserError: the images have no border, or that very one; else see :func:`compare_files`.
        CheckFailed: a file fails on an input.
        MissingComponent: what runs the candidate is not here.
    """
    right, expected = _open(reference, reference.name, plugin=plugin)
    name = f"{candidate.name} on a border of {pad}"
    other, compared = _open(candidate, name, provider=provider, plugin=plugin)
    if right.metadata.suppression != other.metadata.suppression:
        raise UserError(f"{reference} and {candidate} give other outputs", "Compare a file with itself.")
    metadata = other.metadata.updated(**right.metadata.entries)
    letterbox = metadata.letterbox
    if letterbox.fit != "pad":
        raise UserError(f"{reference} takes images without a border (fit: {letterbox.fit})", "Leave out --pad.")
    if letterbox.padding_value == pad:
        raise UserError(f"{pad} is the border of {reference} anyway", "Give --pad another grey.")
    with_border = metadata.updated(letterbox=letterbox.model_copy(update={"padding_value": pad}))
    node, shapes = _tried(right, other, metadata, input_shape)
    scenes, others = (
        Scenes.read(node, images, shapes[:1], told, limit=_IMAGES, confidence=confidence)
        for told in (metadata, with_border)
    )
    differ = [
        not np.array_equal(*pair)
        for batches in zip(scenes.batches, others.batches, strict=True)
        for pair in zip(*(batch.images for batch in batches), strict=True)
    ]
    if not any(differ):
        raise UserError(
            f"no image of {images} has a border at {shapes[0][2]}x{shapes[0][3]}, so another grey changes nothing",
            "Give images of another aspect ratio, such as frames of the source.",
        )
    with polygraphy_unlogged(), np.errstate(all="ignore"):  # as in verify
        rights = _outputs(_run(right.runner, scenes.feeds))
        head = known_head(metadata, rights[0])
        unlike = next(filter(None, (unlike_detector(metadata, outputs) for outputs in rights)), "")
        if unlike or head is None:
            raise no_detector(reference.name, unlike or "does not tell its task")
        found = _outputs(_run(other.runner, others.feeds))
    pairs = [*zip(rights, found, strict=True)]
    if not all(_fit(*pair) for pair in pairs):
        raise UserError(f"{candidate} gives other outputs than {reference}", "Compare them without --pad first.")
    limits = DETECTION_LIMITS["int8"]
    detections = DetectionComparison(
        candidate=name,
        precision=compared.precision,
        confidence=0.0 if head.layout == "classes" else confidence,
        images=compare_detections(scenes, head, pairs, limits.near),
        limits=limits,
    )
    suppresses = [right.runner.told] if isinstance(right.runner, NetworkRunner) else []  # of these images alone
    first, notes = _accuracy([right], shapes[0], images, metadata)
    second, _ = _accuracy([other], shapes[0], images, with_border)
    return Verification(
        reference=reference.name,
        comparisons=(),
        detections=(detections,),
        accuracy=(*first, *second),
        rounded=(name,) if compared.rounded else (),
        notes=(
            *(f"{image} could not be read: {why}" for image, why in scenes.skipped.items()),
            f"the candidate's images have a border of {pad} in place of {letterbox.padding_value}, {sum(differ)} of "
            f"{len(differ)} have one: detections alone were compared, by the limits of int8",
            *filter(None, (expected.note, compared.note)),
            *suppresses,
            *notes,
        ),
    )


def failing_first(found: Verification, feeds: Sequence[Feed]) -> list[Feed]:
    """Inputs, those of shapes at which something failed before the others."""
    failed = [one.input_shapes for one in found.failures]
    failed += [one.input_shapes for half in found.half for one in half.overflows]
    return sorted(feeds, key=lambda feed: {name: array.shape for name, array in feed.items()} not in failed)


def _along(
    reference: Path, candidate: Path, name: str, feeds: Sequence[Feed], provider: Provider
) -> tuple[tuple[LayerErrors, ...], tuple[str, ...]]:
    """The error along the graph, and what to say where it cannot be told."""
    engines = [path.name for path in (reference, candidate) if path.suffix != ".onnx"]
    if engines or provider == "tensorrt":
        what = " and ".join(engines) or f"what TensorRT builds of {candidate.name}"
        return (), (f"tensors inside {what} cannot be fetched once it is built: the outputs alone were compared",)
    try:
        settings = read_artifact(candidate).settings
    except UserError:  # it is from elsewhere
        settings = {}
    float32 = settings.get("float32", FLOAT32)
    try:
        return (compare_layers(name, reference, candidate, feeds, float32=float32, provider=provider),), ()
    except (CheckFailed, UserError) as error:
        return (), (f"the error along the graph cannot be told: {error.message}",)


def _accuracy(
    models: Sequence[Model], shape: Shape, images: Path, metadata: ModelMetadata
) -> tuple[tuple[Accuracy, ...], tuple[str, ...]]:
    """The mean average precision of files on the images that have labels, and what to say where there is none."""
    photos = labelled(find(images).paths)
    if not photos or not metadata.detects or metadata.task in ("classify", "obb"):
        return (), ()
    for model in models:
        if suppression := model.metadata.suppression:
            why = f"{model.runner.name} tells no box of a score up to {suppression.confidence:g}"
            return (), (f"mean average precision was not measured: {why}",)
    try:
        truth = read_truth(photos, metadata)
    except UserError as error:  # of files that may be something else
        return (), (f"mean average precision was not measured: {error.message}",)
    try:
        with polygraphy_unlogged():
            return tuple(measure(model, shape, truth, metadata) for model in models), truth.notes
    except MissingComponent as error:
        return (), (f"{error.message}: {error.hint}",)


def inputs_for(file: Path, images: Path | None = None, input_shape: Sequence[int] | None = None) -> list[Feed]:
    """Inputs of one file, of every size that :func:`compare_files` tries.

    Args:
        file: an ONNX file or an engine.
        images: folder or data set to take them from; random ones without it.
        input_shape: sizes for the axes that are free, by default the file's own.

    Returns:
        Arrays by the name of the input, float32; uint8 where the file takes that and does not tell its pixels.

    Raises:
        UserError: the file cannot be used, a size does not fit it, or there is no readable image.
        MissingComponent: OpenCV, for images, is not installed.
    """
    model = open_model(file)
    name, shapes = _tried(model, model, model.metadata, input_shape)
    if images is None:
        return noise(name, shapes, levels=_takes_levels(model))
    return [*Scenes.read(name, images, shapes, model.metadata, limit=_IMAGES).feeds]


def _tried(
    right: Model, other: Model, metadata: ModelMetadata, input_shape: Sequence[int] | None
) -> tuple[str, list[Shape]]:
    """Name of the input that two files share, and the shapes at which they are compared."""
    name, dims = _common_input(right, other)
    wanted = input_shape or other.usual_shape(name)
    example = [dim if isinstance(dim, int) else size for dim, size in zip(dims, wanted, strict=True)]
    stride = metadata.stride
    order: Pixels | None = "rgb" if channels_last(dims) else None
    free, whole = image_shape(dims, order), image_shape(example, order)
    for dim, size in zip(free[2:], whole[2:], strict=True):
        if size % stride and not isinstance(dim, int):
            raise UserError(
                f"the input shape {example} has a side of {size}, and sides are multiples of the stride {stride}",
                f"Give --input-shape a side of {max(1, round(size / stride)) * stride}.",
            )
    for model in (right, other):
        model.metadata.check_size(model.runner.name, example)
    profiles = [model.profiles[name] for model in (right, other) if name in model.profiles]
    smallest = [max(pair) for pair in zip(right.metadata.min_size, other.metadata.min_size, strict=True)]
    trials = [file_shape(shape, order) for shape in trial_shapes(free, whole, stride)]
    return name, _shapes(trials, dims, profiles, file_shape((1, 1, *smallest), order))


def _takes_levels(model: Model) -> bool:
    """Whether images are to be given in uint8."""
    return model.inputs[0].dtype == np.uint8


def _common_input(reference: Model, candidate: Model) -> tuple[str, tuple[int | str | None, ...]]:
    """Name and axes of the one input that both files take, free where they are in both."""
    first, second = reference.inputs, candidate.inputs
    names = reference.runner.name, candidate.runner.name
    differ = f"the files take different inputs: {names[0]} {_text(first)}, {names[1]} {_text(second)}"
    if [(node.name, len(node.dims)) for node in first] != [(node.name, len(node.dims)) for node in second]:
        raise UserError(differ)
    if len({node.dtype == np.uint8 for node in (*first, *second)}) > 1:
        raise UserError(differ, "Of a file in uint8 the metadata tell the order of its pixels: acmix-deploy export.")
    if len(first) != 1 or len(first[0].dims) != 4:
        raise UserError(f"one image input [B, C, H, W] is expected; {names[0]} takes {_text(first)}")
    pairs = list(zip(first[0].dims, second[0].dims, strict=True))
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        raise UserError(differ, "Export both with the same input shape, or one of them with dynamic axes.")
    return first[0].name, tuple(a if isinstance(a, int) else b for a, b in pairs)


def _shapes(
    trials: Sequence[Shape], dims: Sequence[int | str | None], profiles: Sequence[Shapes], smallest: Sequence[int]
) -> list[Shape]:
    """The shapes that are tried: of engines those that their profiles name, and what lies within all of them; none with
    an axis below ``smallest``.

    Raises:
        UserError: there is none.
    """

    def fits(shape: Shape) -> bool:
        fixed = all(size == dim for size, dim in zip(shape, dims, strict=True) if isinstance(dim, int))
        large = all(size >= least for size, least in zip(shape, smallest, strict=True))
        return (
            fixed
            and large
            and all(
                least <= size <= most
                for low, _, high in profiles
                for least, size, most in zip(low, shape, high, strict=True)
            )
        )

    named = [shape for low, usual, high in profiles for shape in (usual, low, high)]
    shapes = [shape for shape in dict.fromkeys((*named, *trials)) if fits(shape)]
    if not shapes:
        ranges = " and ".join(f"{list(low)} to {list(high)}" for low, _, high in profiles)
        raise UserError(f"there is no shape that both files take; engines take {ranges}", "Build it for other sizes.")
    return shapes


def _text(inputs: Sequence[Input]) -> str:
    return ", ".join(map(str, inputs))


def _run(runner: BaseRunner, feeds: list[dict[str, Array]]) -> RunResults:
    try:
        return Comparator.run([runner], data_loader=feeds)
    except AcmixDeployError:
        raise
    except Exception as error:  # whatever the runtime raises
        raise CheckFailed(f"{runner.name} fails on the inputs: {reason(error)}") from error


def _suppressed(results: RunResults, head: Head, suppression: Suppression) -> RunResults:
    """What a file with the suppression inside gives in place of these outputs."""
    ((name, iterations),) = results
    rows = [
        IterationResult({head.output: suppressed(head, dict(found.items()), suppression)}, runner_name=name)
        for found in iterations
    ]
    return RunResults([(name, rows)])


def _outputs(results: RunResults) -> list[Feed]:
    """The outputs of the one runner, by name, for each input."""
    ((_, iterations),) = results
    return [{name: found[name] for name in found} for found in iterations]


def _nothing_in(outputs: Feed, head: Head | None, confidence: float) -> bool:
    """Whether there are boxes, and no score of theirs is above ``confidence``."""
    if head is None or head.layout == "classes":
        return False
    scores = outputs[head.output][parts_of(head, outputs)[head.output]["scores"]]
    return bool((scores <= confidence).all())


def _fit(expected: Feed, actual: Feed) -> bool:
    return all(name in actual and actual[name].shape == array.shape for name, array in expected.items())


def _distances(expected: RunResults, actual: RunResults, head: Head | None, near: float) -> list[dict[Part, Deviation]]:
    """For each input the distance of each part."""
    found: list[dict[Part, Deviation]] = []

    def compare(wanted: IterationResult, got: IterationResult) -> dict[Part, Deviation]:
        found.append(distances(dict(wanted.items()), dict(got.items()), head, near))
        return found[-1]

    Comparator.compare_accuracy(RunResults([*expected, *actual]), compare_func=compare)
    return found
