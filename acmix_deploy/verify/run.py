"""Run a reference and its candidates on the same inputs, by polygraphy's comparator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator, IterationResult, RunResults
from polygraphy.logger import G_LOGGER

from acmix_deploy.detection.images import batches, find
from acmix_deploy.errors import AcmixDeployError, CheckFailed, UserError
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.spec import Tolerance
from acmix_deploy.runtime.inputs import random_images, trial_shapes
from acmix_deploy.runtime.metrics import Array, Deviation, deviation
from acmix_deploy.runtime.onnxruntime import element_type, inputs_of, onnx_runner, open_session
from acmix_deploy.runtime.reason import reason
from acmix_deploy.verify.verification import Comparison, Verification

Feed = Mapping[str, Array]

_SILENT = G_LOGGER.CRITICAL + 1
_IMAGES = 32  # of a folder, at most: their outputs are all held until they are compared


class Candidate(NamedTuple):
    """Something to compare with the reference: a runner and the element type that it computes in."""

    runner: BaseRunner
    precision: str = "float32"


def verify(
    reference: BaseRunner,
    candidates: Sequence[Candidate],
    inputs: Iterable[Feed],
    *,
    eager: Mapping[str, BaseRunner] | None = None,
    tolerances: Mapping[str, Tolerance] = LOCAL_ATTENTION.tolerances,
) -> Verification:
    """Compare every output of every candidate with the reference's on every input, as relative L2.

    Runners are active one after another, so at most one ONNX Runtime session lives at a time.

    Args:
        reference: what is right; outputs are matched by name.
        candidates: what is compared with it; all names differ.
        inputs: arrays by input name, float32; converted where a runner wants another type.
        eager: PyTorch's own model in a reduced type, by the name of the type. Its error on an input widens the limit
            of the candidates of that type on the same input. One that fails is noted and widens nothing.
        tolerances: by precision; the limit is ``tolerance.limit(eager error)``.

    Raises:
        CheckFailed: a runner fails on an input.
        UserError: there is no input.
    """
    feeds = [dict(feed) for feed in inputs]
    if not feeds:
        raise UserError("there is no input to compare on")
    names = [reference.name, *(candidate.runner.name for candidate in candidates)]
    if len(set(names)) < len(names):
        raise ValueError(f"runners share a name: {names}")

    with G_LOGGER.verbosity(_SILENT), np.errstate(all="ignore"):  # polygraphy computes statistics for its log
        expected = _run(reference, feeds)
        eager_errors: dict[str, list[dict[str, Deviation]]] = {}
        notes: list[str] = []
        for precision, runner in (eager or {}).items():
            try:
                eager_errors[precision] = _distances(expected, _run(runner, feeds))
            except CheckFailed as error:
                notes.append(f"{error.message}; without it the limit for {precision} is the smallest")
        found = {candidate: _distances(expected, _run(candidate.runner, feeds)) for candidate in candidates}

    def comparison(candidate: Candidate, index: int, output: str, distance: Deviation) -> Comparison:
        own = eager_errors[candidate.precision][index].get(output) if candidate.precision in eager_errors else None
        eager_error = own.relative_l2 if own else None
        return Comparison(
            **distance.model_dump(),
            candidate=candidate.runner.name,
            precision=candidate.precision,
            output=output,
            input_shapes={name: array.shape for name, array in feeds[index].items()},
            eager_error=eager_error,
            limit=tolerances[candidate.precision].limit(eager_error or 0.0),
        )

    return Verification(
        reference=reference.name,
        notes=tuple(notes),
        comparisons=tuple(
            comparison(candidate, index, output, distance)
            for candidate, iterations in found.items()
            for index, distances in enumerate(iterations)
            for output, distance in distances.items()
        ),
    )


def compare_files(
    reference: Path,
    candidate: Path,
    *,
    images: Path | None = None,
    random: int = 3,
    seed: int = 0,
    input_shape: Sequence[int] = (1, 3, 640, 640),
    tolerances: Mapping[str, Tolerance] = LOCAL_ATTENTION.tolerances,
) -> Verification:
    """Compare two ONNX files of one input on ONNX Runtime, at several batch and image sizes where both leave them free.

    Args:
        reference, candidate: the files; the limit follows from the type that the candidate computes in.
        images: folder to take inputs from; random ones without it.
        random: how many random inputs; raised to the number of shapes tried.
        seed: of the first random input; the next ones count up.
        input_shape: sizes for the axes that are free in both files; others that are tried are multiples of the
            stride that the reference's metadata names.
        tolerances: by precision.

    Raises:
        UserError: a file cannot be used, the two take different inputs, or there is no readable image.
        CheckFailed: a file fails on an input.
    """
    name, dims, divisor = _common_input(reference, candidate)
    example = [dim if isinstance(dim, int) else size for dim, size in zip(dims, input_shape, strict=True)]
    shapes = trial_shapes(dims, example, divisor)
    skipped: list[str] = []
    if images is None:
        count = max(random, len(shapes))
        arrays = [random_images(shapes[index % len(shapes)], seed + index) for index in range(count)]
    else:
        photos = find(images, limit=_IMAGES)
        arrays, skipped = list(batches(photos.paths, shapes)), photos.skipped
    labels = [path.name if reference.name != candidate.name else str(path) for path in (reference, candidate)]
    if labels[0] == labels[1]:
        raise UserError(f"{reference} is compared with itself", "Name two files.")
    result = verify(
        onnx_runner(reference, labels[0]),
        [Candidate(onnx_runner(candidate, labels[1]), element_type(candidate))],
        [{name: array} for array in arrays],
        tolerances=tolerances,
    )
    return result.model_copy(update={"notes": tuple(f"{image} could not be read" for image in skipped)})


def _common_input(reference: Path, candidate: Path) -> tuple[str, tuple[int | str | None, ...], int]:
    """Name and axes of the one input that both files take, free where they are in both, and the stride, where known."""
    session = open_session(reference)
    first, second = inputs_of(session), inputs_of(open_session(candidate))
    differ = f"the files take different inputs: {reference.name} {_text(first)}, {candidate.name} {_text(second)}"
    if [(node.name, len(node.dims)) for node in first] != [(node.name, len(node.dims)) for node in second]:
        raise UserError(differ)
    if len(first) != 1 or len(first[0].dims) != 4:
        raise UserError(f"one image input [B, C, H, W] is expected; {reference.name} takes {_text(first)}")
    pairs = list(zip(first[0].dims, second[0].dims, strict=True))
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        raise UserError(differ, "Export both with the same input shape, or one of them with dynamic axes.")
    stride = int(session.get_modelmeta().custom_metadata_map.get("stride", 1))
    return first[0].name, tuple(a if isinstance(a, int) else b for a, b in pairs), stride


def _text(inputs: Sequence[tuple[str, Sequence[int | str | None], object]]) -> str:
    return ", ".join(f"{name} [{', '.join(map(str, dims))}]" for name, dims, _ in inputs)


def _run(runner: BaseRunner, feeds: list[dict[str, Array]]) -> RunResults:
    try:
        return Comparator.run([runner], data_loader=feeds)
    except AcmixDeployError:
        raise
    except Exception as error:  # whatever the runtime raises
        raise CheckFailed(f"{runner.name} fails on the inputs: {reason(error)}") from error


def _distances(expected: RunResults, actual: RunResults) -> list[dict[str, Deviation]]:
    """For each input the distance of each output; one that ``actual`` lacks is a problem."""
    found: list[dict[str, Deviation]] = []

    def compare(wanted: IterationResult, got: IterationResult) -> dict[str, Deviation]:
        missing = Deviation(problem="the output is missing")
        found.append({name: deviation(array, got[name]) if name in got else missing for name, array in wanted.items()})
        return found[-1]

    Comparator.compare_accuracy(RunResults([*expected, *actual]), compare_func=compare)
    return found
