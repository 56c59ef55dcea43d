"""Module -> plain ONNX file: made by one of PyTorch's exporters, run against the module, only then called a success."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx.version_converter
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from torch.export import Dim, ExportedProgram

from acmix_deploy.artifacts import StageResult, is_full, replacing, write_artifact
from acmix_deploy.checkpoint.interpreter import ModelElsewhere
from acmix_deploy.checkpoint.reference import run
from acmix_deploy.detection.matching import NEAR
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.detection.parts import known_head
from acmix_deploy.detection.rows import paired
from acmix_deploy.errors import CheckFailed, UserError
from acmix_deploy.exported import Exporter, ExportResult, TensorInfo
from acmix_deploy.graph import sizes_of, tidied
from acmix_deploy.network import NetworkRunner, check_suppression
from acmix_deploy.operators.spec import TOLERANCES
from acmix_deploy.processing import NOTHING, Processing, attach, suppressible
from acmix_deploy.runtime.inputs import AXES, Shape, checked_shapes, random_images
from acmix_deploy.runtime.metrics import Array, Deviation, deviation
from acmix_deploy.runtime.onnxruntime import ir_version, open_session
from acmix_deploy.runtime.reason import reason
from acmix_deploy.runtime.torch import quiet
from acmix_deploy.targets import check_opset

INPUT = "images"
_LARGEST_FILE = 1_900_000_000  # bytes; protobuf ends at 2 GiB


def export(
    module: nn.Module | ExportedProgram,
    path: Path,
    *,
    checkpoint: Path | None = None,
    input_shape: Sequence[int] = (1, 3, 640, 640),
    opset: int = 18,
    dynamic: Collection[str] = (),
    divisor: int = 1,
    metadata: ModelMetadata | None = None,
    reference: nn.Module | None = None,
    processing: Processing = NOTHING,
    progress: Callable[[str], None] = lambda step: None,
) -> StageResult[ExportResult]:
    """Export a float32 module of one image input to an ONNX file that computes the same.

    Opset 18 and above come from the dynamo exporter, whose operators are written for 18; below, from the TorchScript
    exporter, since nothing converts a newer Pad down. Where one fails or its file is wrong, the other is tried. A file
    is right when ONNX Runtime runs it at the example and, for dynamic axes, at two more sizes and another batch, and
    every output is as close to the module's as the operators ask of float32: by a floor, or, where that is not
    enough, by the module's own distance from itself in float64.

    Args:
        module: put into eval mode here and otherwise left as it is; or a program captured by ``torch.export``: its free
            axes become free in the file.
        path: the file to write. Input ``images``, outputs ``output0``, ``output1``, ...; opset 17 and 18 in IR version
            8, later ones in 10, without the stack traces of the machine it was made on.
        checkpoint: the file that the module comes from, for the sidecar.
        input_shape: [B, C, H, W] of the example, and of a file with static axes.
        opset: 17 to 21.
        dynamic: axes to leave free, out of ``batch``, ``height`` and ``width``.
        divisor: H and W must be multiples of it, the model's total stride.
        metadata: goes into the file's ``metadata_props``, with what they tell of a file; ``source.metadata`` of a
            :class:`Source`.
        reference: what the file has to compute, where ``module`` was made of another; by default that is ``module``.
        processing: what is put around the network, once its file is proven; nothing by default.
        progress: told what is about to be done.

    Returns:
        The file with its sidecar, and what was exported.

    Raises:
        UserError: the request cannot be met by this model, or the file cannot be written.
        CheckFailed: no exporter gave a file that computes what the module does, or an axis came out frozen; or other
            boxes are suppressed than outside the file.
    """
    metadata = metadata or ModelMetadata()
    shapes = checked_shapes(input_shape, dynamic, divisor)
    check_opset(opset)
    if isinstance(module, ExportedProgram):
        dynamic = _free_axes(module, dynamic)
        shapes = checked_shapes(input_shape, dynamic, divisor)
        reference = reference or _callable(module)
    else:
        # Detectors keep what depends on the last image's size; a copy is traced, so that runs and traces do not mix.
        reference, module = reference or module.eval(), copy.deepcopy(module).eval()
    example = shapes[0]
    metadata = metadata.for_file(example, dynamic)
    # Traced at a batch of 2 where it is free: the exporters take an axis of length 1 for one that broadcasts.
    traced = (max(example[0], 2), *example[1:]) if "batch" in dynamic else example
    progress("running the model")
    expected = {shape: run(reference, shape) for shape in shapes}
    names = [f"output{index}" for index in range(len(expected[example]))]
    if processing.suppression:
        suppressible(metadata, {name: output.shape for name, output in zip(names, expected[example], strict=True)})
    image = torch.zeros(traced)

    exporters: dict[Exporter, Callable[[], onnx.ModelProto]] = {
        "dynamo": lambda: _dynamo(module, image, names, opset, dynamic),
        "torchscript": lambda: _torchscript(module, image, names, opset, dynamic, expected),
    }
    order: list[Exporter] = ["dynamo", "torchscript"] if opset >= 18 else ["torchscript", "dynamo"]
    if isinstance(module, ModelElsewhere):
        order = ["torchscript"]
    notes: list[str] = []
    reordered = False
    with replacing(path) as temporary:
        for exporter in order:
            progress(f"exporting with the {exporter} exporter")
            try:
                with quiet(), torch.no_grad():
                    model = _finish(exporters[exporter](), opset, metadata)
                    onnx.save_model(model, temporary)
            except Exception as error:  # whatever an exporter stumbles over
                if is_full(error):
                    raise
                notes.append(f"the {exporter} exporter failed: {reason(error)}")
                continue
            progress("checking the file")
            try:
                relative_l2 = _check(temporary, reference, expected, traced, dynamic, metadata)
                smallest = _smallest(temporary, reference, shapes, dynamic, divisor, metadata)
            except CheckFailed as error:
                notes.append(f"the {exporter} exporter's file is wrong: {error.message}")
                reordered |= isinstance(error, _Reordered)
                continue
            if smallest:
                onnx.helper.set_model_props(model, metadata.updated(min_size=[*smallest]).entries)
                notes.append(
                    f"below {smallest[0]}x{smallest[1]} the file computes something else than the model, as where its "
                    "code asks for the size: smaller images are refused"
                )
            attach(model, processing)
            onnx.save_model(model, temporary)
            if processing.suppression:
                progress("checking what is suppressed")
                check_suppression(model, path.name)
                with NetworkRunner(temporary, path.name) as runner:
                    for shape in expected:
                        runner.infer({INPUT: random_images(shape)})
            found = ExportResult(
                exporter=exporter,
                opset=opset,
                ir_version=model.ir_version,
                inputs=_describe(model.graph.input),
                outputs=_describe(model.graph.output),
                checked_shapes=tuple(expected),
                relative_l2=relative_l2,
                suppression=processing.suppression,
                notes=tuple(notes),
            )
            break
        else:
            axes = sorted(dynamic) if not reordered else []
            ways = [f"without dynamic {', '.join(axes)}"] * bool(axes) + ["with opset 18"] * (opset < 18)
            if newer := _newer_operators("; ".join(notes)):
                ways = [f"with opset {max(newer.values())}, which has {' and '.join(newer)}"]
            raise CheckFailed("; ".join(notes), f"It may work {' or '.join(ways)}." if ways else "")
    settings = {
        "input_shape": list(example),
        "dynamic": sorted(dynamic),
        "opset": opset,
        "pixels": processing.pixels,
        "suppression": processing.suppression and processing.suppression.model_dump(),
    }
    return StageResult(
        write_artifact(path, "plain", parents=[checkpoint] if checkpoint else [], settings=settings), found
    )


def _newer_operators(notes: str) -> dict[str, int]:
    """The standard operators that the opset of a file lacks, by what was said of it, and the first opset of each."""
    first: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if not schema.domain:
            first[schema.name] = min(schema.since_version, first.get(schema.name, schema.since_version))
    return {
        name: first[name]
        for name in re.findall(r"the operator (\w+), which opset \d+ does not", notes)
        if name in first
    }


def _free_axes(program: ExportedProgram, dynamic: Collection[str]) -> set[str]:
    """The axes that a captured program left free; all that are wanted must be among them."""
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    if len(inputs) != 1 or inputs[0].meta["val"].dim() != 4:
        raise UserError(f"the program takes {len(inputs)} inputs; one image [B, C, H, W] is expected")
    free = {name for name, axis in AXES.items() if not isinstance(inputs[0].meta["val"].shape[axis], int)}
    if fixed := set(dynamic) - free:
        raise UserError(
            f"the program was captured with a fixed {' and '.join(sorted(fixed))}",
            "Capture it again with dynamic_shapes, or export without these dynamic axes.",
        )
    return free


def _callable(program: ExportedProgram) -> nn.Module:
    """A captured program as a module that the TorchScript exporter accepts."""
    module = program.module()
    for method in ("train", "eval"):  # replaced there by methods that only raise
        vars(module).pop(method, None)
    return module


def _dynamo(
    module: nn.Module | ExportedProgram, image: torch.Tensor, names: list[str], opset: int, dynamic: Collection[str]
) -> onnx.ModelProto:
    axes = {AXES[name]: name for name in dynamic}
    if isinstance(module, nn.Module):
        free = (dict.fromkeys(axes, Dim.DYNAMIC),) if axes else None
        module = torch.export.export(module, (image,), dynamic_shapes=free, strict=False)
    program = torch.onnx.export(
        module,
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=[INPUT],
        output_names=names,
        dynamic_shapes=(axes,) if axes else None,
    )
    assert program is not None
    return program.model_proto


def _torchscript(
    module: nn.Module | ExportedProgram,
    image: torch.Tensor,
    names: list[str],
    opset: int,
    dynamic: Collection[str],
    expected: Mapping[Shape, list[Array]],
) -> onnx.ModelProto:
    free = {INPUT: {AXES[name]: name for name in dynamic}}
    known = {tuple(shape[AXES[name]] for shape in expected): name for name in dynamic}
    for index, output in enumerate(names):
        sizes = zip(*(outputs[index].shape for outputs in expected.values()), strict=True)
        free[output] = {
            axis: known.get(seen, f"{output}_{axis}") for axis, seen in enumerate(sizes) if len(set(seen)) > 1
        }
    with TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        if isinstance(module, ModelElsewhere):
            module.export(file, image.shape, names, free, opset)
        else:
            torch.onnx.export(
                _callable(module) if isinstance(module, ExportedProgram) else module,
                (image,),
                file,
                dynamo=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=names,
                dynamic_axes=free,
            )
        model = onnx.load_model(file)
    for index, output in enumerate(model.graph.output):
        for axis, size in enumerate(expected[next(iter(expected))][index].shape):
            if axis not in free[output.name]:  # where the exporter could not follow the sizes
                output.type.tensor_type.shape.dim[axis].dim_value = size
    return model


def _finish(model: onnx.ModelProto, opset: int, metadata: ModelMetadata) -> onnx.ModelProto:
    """The model in the opset asked for, freed of what the exporter noted about the machine it ran on."""
    if any(entry.domain == "" and entry.version != opset for entry in model.opset_import):
        model = onnx.version_converter.convert_version(model, opset)
    model = tidied(model, ClearMetadataAndDocStringPass())
    model.ir_version = ir_version(opset)
    onnx.helper.set_model_props(model, metadata.entries)
    if (size := model.ByteSize()) > _LARGEST_FILE:
        raise ValueError(f"the model takes {size / 1e9:.1f} GB, an ONNX file holds {_LARGEST_FILE / 1e9:.1f}")
    return model


def _check(
    file: Path,
    module: nn.Module,
    expected: Mapping[Shape, list[Array]],
    traced: Shape,
    dynamic: Collection[str],
    metadata: ModelMetadata,
) -> float:
    """Run the file at every shape. The largest relative L2 distance; raises CheckFailed for a wrong file."""
    try:
        session = open_session(file)
    except UserError as error:
        raise CheckFailed(error.message, error.hint) from error
    (node,) = session.get_inputs()
    for name in dynamic:
        if isinstance(size := node.shape[AXES[name]], int):
            raise CheckFailed(f"the {name} came out frozen at {size}")
    names = [output.name for output in session.get_outputs()]
    declared = [output.shape for output in session.get_outputs()]

    def distance(shape: Shape, outputs: list[Array]) -> float:
        try:
            actual = session.run(None, {INPUT: random_images(shape)})
        except Exception as error:  # ONNX Runtime's error types share no base of their own
            raise CheckFailed(f"ONNX Runtime fails on {list(shape)}: {reason(error)}") from error
        worst = 0.0
        judged = _judged(module, shape, names, outputs, actual, metadata)
        for output, array, dims, wanted, (found, limit) in zip(
            session.get_outputs(), actual, declared, outputs, judged, strict=True
        ):
            if found.relative_l2 is None or found.relative_l2 > limit:
                what = found.problem or f"relative L2 {found.relative_l2:.1e}, at most {limit:.1e} is accepted"
                if same := _same_rows(wanted, array, 10 * limit):
                    raise _Reordered(
                        f"{output.name} has {same} of the module's in another order on {list(shape)}: {what}"
                    )
                raise CheckFailed(f"{output.name} is not the module's on {list(shape)}: {what}")
            if any(isinstance(dim, int) and dim != size for dim, size in zip(dims, array.shape, strict=True)):
                raise CheckFailed(f"{output.name} is declared as {dims} and is {list(array.shape)} on {list(shape)}")
            worst = max(worst, found.relative_l2)
        return worst

    def right(shape: Shape) -> bool:
        try:
            distance(shape, run(module, shape))
        except CheckFailed:
            return False
        return True

    worst = 0.0
    for shape, outputs in expected.items():
        try:
            worst = max(worst, distance(shape, outputs))
        except _Reordered:
            raise
        except CheckFailed as error:
            changed = [name for name in dynamic if shape[AXES[name]] != traced[AXES[name]]]
            alone = {
                name: tuple(shape[i] if i == AXES[name] else size for i, size in enumerate(traced)) for name in changed
            }
            frozen = [name for name in changed if not right(alone[name])] or changed
            if not right(traced):  # nor is it another size that makes it wrong
                frozen = []
            raise CheckFailed(
                f"the {' and '.join(frozen)} came out frozen: {error.message}" if frozen else error.message
            ) from error
    return worst


def _judged(
    module: nn.Module,
    shape: Shape,
    names: Sequence[str],
    expected: Sequence[Array],
    actual: Sequence[Array],
    metadata: ModelMetadata,
) -> list[tuple[Deviation, float]]:
    """How far each output is, and the largest relative L2 accepted: more where the module's own, which is in float32,
    is far from what it computes in float64."""
    tolerance = TOLERANCES["float32"]
    found = _deviations(names, expected, actual, metadata)
    if all(one.relative_l2 is not None and one.relative_l2 <= tolerance.floor for one in found):
        return [(one, tolerance.floor) for one in found]
    try:
        exact = run(copy.deepcopy(module).double(), shape, torch.float64)
        own = [one.relative_l2 or 0.0 for one in _deviations(names, exact, expected, metadata)]
    except Exception:  # code that asks for float32
        own = [0.0] * len(found)
    return [(one, tolerance.limit(error)) for one, error in zip(found, own, strict=True)]


def _deviations(
    names: Sequence[str], expected: Sequence[Array], actual: Sequence[Array], metadata: ModelMetadata
) -> list[Deviation]:
    """Of each output; of rows that a model selects itself, as sets."""
    wanted, got = (dict(zip(names, arrays, strict=True)) for arrays in (expected, actual))
    wanted, got = paired(known_head(metadata, wanted), wanted, got, NEAR["float32"])
    return [deviation(wanted[name], got[name]) for name in names]


def _smallest(
    file: Path,
    module: nn.Module,
    shapes: Sequence[Shape],
    dynamic: Collection[str],
    divisor: int,
    metadata: ModelMetadata,
) -> tuple[int, int] | None:
    """The smallest [H, W] from which on file and module agree; None where they do at all sizes that were tried.

    Traces hold for the size of the example, and the module's code may take another way on small images. Tried are
    sides up to those of ``shapes``, as far as the module takes them: all at first, then in steps of an eighth.
    """
    free = [AXES[name] for name in ("height", "width") if name in dynamic]
    if not free:
        return None
    example, session = shapes[0], open_session(file)
    names = [output.name for output in session.get_outputs()]
    checked = min(shape[axis] for shape in shapes for axis in free)
    wrong, least = False, 0
    side = divisor
    while side < checked:
        shape = tuple(side if axis in free else size for axis, size in enumerate(example))
        try:
            expected = run(module, shape)
            actual = session.run(None, {INPUT: random_images(shape)})
        except Exception:  # one of the two refuses it, so that nobody gets a wrong answer
            pass
        else:
            judged = _judged(module, shape, names, expected, actual, metadata)
            if any(found.relative_l2 is None or found.relative_l2 > limit for found, limit in judged):
                wrong, least = True, 0
            elif not least:
                least = side
        side += max(divisor, side // 8 // divisor * divisor)
    if not wrong:
        return None
    height, width = (least or checked if axis in free else example[axis] for axis in (2, 3))
    return height, width


class _Reordered(CheckFailed):
    """Rows that tie come in another order, which no axis is to blame for."""


def _same_rows(expected: Array, actual: Array, limit: float) -> str:
    """How many rows [B, N, C] are there, some in other places, within a relative L2; empty where none has moved or
    fewer than half are there. Of rows that tie at the end of a ranking others may be in it."""
    if expected.ndim != 3 or expected.shape != actual.shape or expected.shape[1] > 1000:
        return ""
    same = moved = 0
    for wanted, rows in zip(expected.astype(np.float64), actual.astype(np.float64), strict=True):
        left = [*range(len(rows))]
        for place, row in enumerate(wanted):
            distances = np.nan_to_num(np.linalg.norm(rows[left] - row, axis=1), nan=np.inf)
            nearest = int(distances.argmin())
            near = limit * np.linalg.norm(row)
            if distances[nearest] <= near:
                same += 1
                moved += np.linalg.norm(rows[place] - row) > near
                del left[nearest]
    total = len(expected) * expected.shape[1]
    return f"{same} of {total} rows" if moved and same >= total / 2 else ""


def _describe(values: Sequence[onnx.ValueInfoProto]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(
            name=value.name,
            dtype=onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            shape=sizes_of(value),
        )
        for value in values
    )
