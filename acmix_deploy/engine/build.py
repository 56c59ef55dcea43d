"""Build an engine from an ONNX file, see that the plugin is in it, and describe it in a manifest."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import onnx
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy import onnx_file
from acmix_deploy.artifacts import StageResult, check_output, replacing, sha256, write_artifact
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.engine.process import ask, find_backend
from acmix_deploy.engine_file import header_bytes
from acmix_deploy.errors import CheckFailed, MissingComponent, UserError
from acmix_deploy.forms import refused, to_form
from acmix_deploy.graph import name_nodes, read, with_weights
from acmix_deploy.manifest import KIND, Backend, Machine, Manifest, Plugin, Shape, this_machine
from acmix_deploy.runtime import hints
from acmix_deploy.runtime.inputs import Shapes, file_shape, image_shape
from acmix_deploy.runtime.onnxruntime import precision_of
from acmix_deploy.runtime.reason import out_of_memory
from acmix_deploy.targets import UNBUILT_BY_RTX, Form, Precision, Target, target_of

_RTX_AS_TENSORRT = (11, 0)  # what TensorRT-RTX reads and how it types is TensorRT 11's
_IMAGES = "images"  # the only input that Ultralytics feeds
_SHOWN = 3  # errors named in a message


class BuildReport(BaseModel):
    """An engine that was built."""

    model_config = ConfigDict(frozen=True)

    manifest: Manifest = Field(description="what the engine was built with and for")
    layers: int = Field(description="layers of the engine")
    plugin_layers: tuple[str, ...] = Field(description="nodes that the plugin computes")
    inlined: dict[str, str] = Field(description="nodes that the plugin refuses, and why; they are computed without it")
    notes: tuple[str, ...] = Field(description="what was left out, and why")


def build(
    source: Path,
    target: Path,
    *,
    plugin: Path | None = None,
    form: Form | None = None,
    level: int = 3,
    fp16: bool = False,
    timing_cache: Path | None = None,
    shapes: Shapes | None = None,
    tactic_sources: Sequence[str] = (),
    backend: Backend | None = None,
    ultralytics: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> StageResult[BuildReport]:
    """Build an engine and write its manifest beside it.

    Args:
        source: ONNX file, as the precision stage wrote it.
        target: where the engine goes. Nothing is left there unless the build and its checks succeed.
        plugin: library to compute the custom operators with; without one they are computed by their definitions.
        form: how the file is to carry custom operators; by default as this TensorRT and the plugin need it.
        level: builder optimization level, 0 to 5.
        fp16: permit half precision; for TensorRT 8, whose types do not come from the file.
        timing_cache: file of measured times, read where it exists and written afterwards.
        shapes: smallest, usual and largest [B, C, H, W], where axes are free.
        tactic_sources: TensorRT's TacticSource by name, its default without any. Where there is no cuDNN and no cuBLAS:
            EDGE_MASK_CONVOLUTIONS and JIT_CONVOLUTIONS.
        backend: which TensorRT; whichever can be imported by default.
        ultralytics: write the metadata before the engine, as Ultralytics does.
        progress: called with what is being done.

    Returns:
        The engine with its sidecar, and what was built.

    Raises:
        UserError: the file, the shapes, or the options do not fit each other or this TensorRT.
        CheckFailed: TensorRT does not build it, or does not use the plugin.
        MissingComponent: no TensorRT, no device, or too little memory.
    """
    for output in filter(None, (target, timing_cache)):
        check_output(output, *filter(None, (source, plugin)))
    if timing_cache and timing_cache.resolve() == target.resolve():
        raise UserError(f"{target} is to be both engine and timing cache", "Give one of them another name.")
    machine = this_machine(find_backend(backend))
    _check_device(machine)
    found = target_for(machine)
    model = read(source)
    name_nodes(model)
    found.check_opset(onnx_file.opset(model), str(source))
    if nodes := onnx_file.zero_points(model):
        raise UserError(
            f"{source} is quantised with zero points other than 0 ({onnx_file.some(nodes)}), for ONNX Runtime on a "
            "CPU; TensorRT reads none",
            "Quantise the float file again, without --for onnxruntime.",
        )
    if machine.backend == "tensorrt_rtx" and (unbuilt := {node.op_type for node in model.graph.node} & UNBUILT_BY_RTX):
        raise UserError(
            f"{source} has {', '.join(sorted(unbuilt))}, which TensorRT-RTX reads and cannot build",
            "Build it with TensorRT, --backend tensorrt, or export the file without --nms.",
        )
    if fp16 and found.strongly_typed:
        raise UserError(
            f"{machine.tensorrt} takes the types from the file, so half precision cannot be asked for here",
            "Make a file in half precision: acmix-deploy export --fp16",
        )
    form = _form(form, found, plugin)
    profiles = _profiles(model, source, shapes)
    precision = "float16" if fp16 and precision_of(model) == "float32" else precision_of(model)
    header = _header(model, source, profiles, precision) if ultralytics else b""
    try:
        ready = to_form(model, form)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"{source} is not valid ONNX: {' '.join(str(error).split())}") from error
    wanted = [node.name for node in onnx_file.fused_nodes(ready)] if plugin else []
    library = Plugin(path=plugin.resolve(), sha256=sha256(plugin)) if plugin else None
    flags = _flags(model, found, fp16)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = stack.enter_context(replacing(target))
        onnx.save(ready, folder / "model.onnx")
        times = timing_cache if machine.backend == "tensorrt" else None
        cache = stack.enter_context(replacing(times)) if times else None
        request = {
            "module": machine.backend,
            "onnx": str(folder / "model.onnx"),
            "engine": str(engine),
            "plugin": str(library.path) if library else None,
            "cache_read": str(times) if times and times.is_file() else None,
            "cache_write": str(cache) if cache else None,
            "level": level,
            "flags": flags,
            "tactic_sources": list(tactic_sources),
            "strongly_typed": found.strongly_typed,
            "profiles": profiles,
            "operators": list(onnx_file.operators(ready)),
        }
        answer, said = ask(request, progress)
        if "failure" in answer:
            raise _failure(answer, ready, source, machine, said)
        present = [name for name in wanted if name in answer["plugin_layers"]]
        if missing := [name for name in wanted if name not in present]:
            raise CheckFailed(
                f"the plugin does not compute {onnx_file.some(missing)} in the engine: {len(present)} of "
                f"{len(wanted)} layers of its kind are there{': ' + said if said else ''}",
                "Check that the plugin was built for this TensorRT: acmix-deploy plugin check",
            )
        if header:
            engine.write_bytes(header + engine.read_bytes())
    manifest = Manifest(
        machine=machine,
        plugin=library if wanted else None,
        form=form,
        precision=precision,
        strongly_typed=found.strongly_typed,
        flags=tuple(flags),
        level=level,
        profiles=profiles,
        compute_capabilities=tuple(answer["compute_capabilities"]),
        inputs=tuple(answer["inputs"]),
        outputs=tuple(answer["outputs"]),
        metadata=ModelMetadata.of(model),
    )
    report = BuildReport(
        manifest=manifest,
        layers=answer["layers"],
        plugin_layers=tuple(present),
        inlined=refused(model) if plugin else {},
        notes=(*answer["notes"], *_notes(machine, plugin, wanted, timing_cache, ultralytics)),
    )
    return StageResult(
        write_artifact(target, KIND, parents=with_weights(source), settings=manifest.model_dump(mode="json")), report
    )


def target_here() -> Target | None:
    """What TensorRT and the GPU of this machine take; None where there is none of either.

    Raises:
        MissingComponent: there is a TensorRT that cannot be imported, or nothing to ask for the device with.
    """
    if importlib.util.find_spec("tensorrt") is None:
        return None
    machine = this_machine("tensorrt")
    return target_for(machine) if machine.gpu else None


def _notes(
    machine: Machine, plugin: Path | None, wanted: Sequence[str], timing_cache: Path | None, ultralytics: bool
) -> list[str]:
    notes = []
    if ultralytics and machine.backend == "tensorrt_rtx":
        notes.append("Ultralytics deserialises engines with TensorRT alone, and this one is of TensorRT-RTX")
    elif ultralytics and wanted:
        notes.append("the engine calls a plugin: import acmix_deploy.ultralytics before YOLO(...), which loads it")
    if plugin and not wanted:
        notes.append("the file has no node that the plugin takes, so the engine does not use it")
    if timing_cache and machine.backend == "tensorrt_rtx":
        notes.append("TensorRT-RTX times nothing when it builds, so it has no timing cache")
    return notes


def _check_device(machine: Machine) -> None:
    if machine.backend == "tensorrt" and machine.gpu is None:
        raise MissingComponent(
            f"{machine.tensorrt} builds an engine on the device that it is for, and there is no GPU here",
            "Run the same command on the target, or use TensorRT-RTX: pip install 'acmix-deploy[rtx]', "
            "--backend tensorrt_rtx",
        )


def target_for(machine: Machine) -> Target:
    """What the TensorRT of a machine takes."""
    if machine.backend == "tensorrt_rtx":
        return target_of(_RTX_AS_TENSORRT)
    major, minor = machine.version.split(".")[:2]
    return target_of((int(major), int(minor)))


def _form(asked: Form | None, target: Target, plugin: Path | None) -> Form:
    """The form that is asked for or needed; one that contradicts the plugin is an error."""
    if asked == "plugin" and plugin is None:
        raise UserError("--target plugin leaves the attention to a plugin, and there is none", "Give --plugin FILE.")
    if asked == "plain" and plugin is not None:
        raise UserError("--target plain leaves nothing for a plugin to compute", "Leave out --plugin or --target.")
    form = asked or (target.form if plugin else "plain")
    target.check_form(form)
    return form


def _flags(model: onnx.ModelProto, target: Target, fp16: bool) -> list[str]:
    """What the builder has to be permitted where types do not come from the file alone."""
    if target.strongly_typed:
        return []
    found = precision_of(model)
    return ["FP16"] * (fp16 or found != "float32") + ["INT8"] * (found == "int8")


def _profiles(model: onnx.ModelProto, source: Path, shapes: Shapes | None) -> dict[str, tuple[Shape, Shape, Shape]]:
    """The three shapes of each input with free axes, as the file has them.

    Raises:
        UserError: an axis is free and there are no shapes, or the shapes do not fit the file or each other.
    """
    found: dict[str, tuple[Shape, Shape, Shape]] = {}
    fixed = []
    metadata = ModelMetadata.of(model)
    for value in onnx_file.inputs(model):
        declared = image_shape(onnx_file.shape(value), metadata.pixels)
        free = [f"{axis} ({size})" for axis, size in enumerate(declared) if not isinstance(size, int)]
        fixed += [f"{value.name} {list(declared)}"] * (not free)
        if not free:
            continue
        if shapes is None or len(declared) != len(shapes[0]):
            raise UserError(
                f"input {value.name} of {source} has free axes: {', '.join(free)}",
                hints.FREE_AXES,
            )
        for option, shape in zip(("--min", "--opt", "--max"), shapes, strict=True):
            if any(isinstance(size, int) and size != asked for size, asked in zip(declared, shape, strict=True)):
                raise UserError(f"{option} {list(shape)} does not fit input {value.name} {list(declared)} of {source}")
            if any(size % metadata.stride for size in shape[2:]):
                raise UserError(f"{option} {list(shape)} is no multiple of {metadata.stride}, the stride of {source}")
            metadata.check_size(f"{option} of {source}", shape)
        smallest, usual, largest = map(tuple, shapes)
        if not all(a <= b <= c for a, b, c in zip(smallest, usual, largest, strict=True)):
            raise UserError(f"--min {smallest}, --opt {usual} and --max {largest} do not grow from one to the next")
        smallest, usual, largest = (file_shape(shape, metadata.pixels) for shape in shapes)
        found[value.name] = (smallest, usual, largest)
    if shapes is not None and not found:
        raise UserError(
            f"{source} has no free axis: {', '.join(fixed)}", "Leave out --min, --opt and --max, or export --dynamic."
        )
    return found


def _header(
    model: onnx.ModelProto, source: Path, profiles: Mapping[str, tuple[Shape, Shape, Shape]], precision: Precision
) -> bytes:
    """What Ultralytics writes before an engine. Raises UserError: its releases would not load or not feed it."""
    names = {value.name: onnx_file.shape(value) for value in onnx_file.inputs(model)}
    if [*names] != [_IMAGES] or len(names[_IMAGES]) != 4:
        raise UserError(
            f"{source} takes {', '.join(f'{name} {list(shape)}' for name, shape in names.items())}, and Ultralytics "
            f"feeds one input {_IMAGES} of [B, C, H, W]",
            "Leave out --ultralytics, or export the file from its checkpoint: acmix-deploy export",
        )
    dims = names[_IMAGES]
    shape = profiles[_IMAGES][1] if _IMAGES in profiles else tuple(map(int, dims))
    try:
        return header_bytes(ModelMetadata.of(model).header(dims, shape, precision))
    except UserError as error:
        raise UserError(f"{source}: {error.message}", error.hint) from error


def _failure(
    answer: Mapping[str, Any], model: onnx.ModelProto, source: Path, machine: Machine, said: str
) -> UserError | CheckFailed | MissingComponent:
    """What a build that failed is told as."""
    step, errors = answer["failure"], answer["errors"]
    if step == "parse" and answer["unknown"]:
        nodes = onnx_file.operators(model)
        named = "; ".join(f"{operator} ({onnx_file.some(nodes[operator])})" for operator in answer["unknown"])
        by_plugin = f"; the plugin says: {said}" if said else ""
        return UserError(
            f"{source} has operators that {machine.tensorrt} does not know: {named}{by_plugin}",
            hints.UNKNOWN_OPERATORS,
        )
    if step == "plugin":
        return UserError(f"the plugin cannot be loaded: {errors[0]}", "Build it here: acmix-deploy plugin build")
    texts = [_parser_text(error) if isinstance(error, dict) else str(error).strip() for error in errors]
    text = "; ".join(dict.fromkeys(texts[:_SHOWN])) or "it gives no reason"
    if out_of_memory(" ".join(texts)):
        return MissingComponent(
            f"too little memory on {machine.device} for {machine.tensorrt} to build {source}: {text}",
            hints.TOO_LITTLE_MEMORY,
        )
    if step == "parse":
        return UserError(f"{machine.tensorrt} cannot read {source}: {text}")
    return CheckFailed(f"{machine.tensorrt} does not build {source}: {text}")


def _parser_text(error: Mapping[str, str]) -> str:
    place = f"node {error['node']} ({error['operator']}): " if error["node"] else ""
    return place + error["reason"]
