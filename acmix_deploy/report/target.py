"""The file to carry to a target, and what to run there."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from acmix_deploy import onnx_file
from acmix_deploy.forms import TargetReport
from acmix_deploy.runtime.inputs import Shapes, file_shape
from acmix_deploy.targets import RUNTIMES, Precision, Target, target_named


def plugin_notes(target: TargetReport) -> list[str]:
    """Which nodes the plugin does not take."""
    return [
        f"{name} has {what}, which the plugin does not take: standard operators in {target.file}"
        for name, what in target.inlined.items()
    ]


def target_steps(
    made: TargetReport,
    reference: str,
    precision: Precision,
    shapes: Shapes | None,
    image: str,
    *,
    pixels: bool = False,
    detector: bool,
) -> tuple[str, ...]:
    """What to run on the machine that a file was made for or, in its place, what keeps it from being read there.

    Args:
        made: the file.
        reference: name of the file to compare the engine with.
        precision: what the engine is to compute in.
        shapes: to build for, where axes are free.
        image: name of the input.
        pixels: whether that takes images [B, H, W, 3] in uint8.
        detector: whether detections can be compared.
    """
    if made.unread:
        return obstacles(made.file, made.unread)
    if not made.tensorrt:
        return _elsewhere(made, reference)
    target = target_named(made.name)
    plugin = made.form != "plain"
    carried = [made.file, reference] if target.package else [made.file]
    taken = [file_shape(shape, "rgb" if pixels else None) for shape in shapes] if shapes else None
    by_trtexec = _trtexec(made.file, target, precision, taken, image, plugin=plugin)
    if target.package:
        permitted = " --fp16" * (precision != "float32" and not target.strongly_typed)
        commands = [*engine_steps(made.file, reference, shapes, options=permitted, plugin=plugin, detector=detector)]
        commands.append(f"or {by_trtexec}")
    else:
        carried += ["the folder plugins of acmix-deploy"] * plugin
        commands = ["cmake -S plugins -B build && cmake --build build"] * plugin + [by_trtexec]
    if made.form == "plugin":
        commands.append(f"without the plugin: export again with --for {target.name} --target plain")
    return carry(carried, f"{target.name}, TensorRT {target.version}", commands)


def _elsewhere(made: TargetReport, reference: str) -> tuple[str, ...]:
    """What to run where another runtime reads a file."""
    command = RUNTIMES[made.name].command if made.name in RUNTIMES else ""
    commands = [f"{command} {shlex.quote(made.file)}"] * bool(command)
    if made.name == "onnxruntime":
        commands.insert(0, f"acmix-deploy verify {shlex.quote(reference)} {shlex.quote(made.file)}")
    return carry([made.file, reference], made.name, commands)


_LIBRARY = "libacmix_plugin.so"


def obstacles(file: str, unread: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """One sentence for each operator that the TensorRT of a target does not read, by :func:`onnx_file.unread`."""
    return tuple(f"{file} has {onnx_file.unread_note(operator, nodes)}" for operator, nodes in unread.items())


def carry(files: Iterable[str], where: str, commands: Sequence[str]) -> tuple[str, ...]:
    """Which files go where, each once, and below it the commands to run there."""
    names = " and ".join(dict.fromkeys(files))
    ours = any(command.startswith("acmix-deploy ") for command in commands)
    return (
        f"Carry {names} to the target ({where}){', install acmix-deploy there,' * ours} and run there:",
        *(f"  {line}" for line in commands),
    )


def engine_steps(
    file: str, reference: str, shapes: Shapes | None, *, options: str = "", plugin: bool, detector: bool
) -> tuple[str, ...]:
    """The commands that make an engine of a file, compare it with another file and time it."""
    engine = shlex.quote(_engine(file))
    if shapes:
        options += "".join(f" --{name} {','.join(map(str, shape))}" for name, shape in _named(shapes))
    library = f" --plugin {_LIBRARY}" * plugin
    return (
        *("acmix-deploy plugin build",) * plugin,
        f"acmix-deploy build {shlex.quote(file)}{options}{library} -o {engine}",
        f"acmix-deploy verify {shlex.quote(reference)} {engine}{' --images PHOTOS' * detector}",
        f"acmix-deploy profile {engine}",
    )


def _trtexec(
    file: str,
    target: Target,
    precision: Precision,
    shapes: Sequence[Sequence[int]] | None,
    image: str,
    *,
    plugin: bool,
) -> str:
    words = ["trtexec", *target.trtexec(file, _engine(file), precision, shapes, image)]
    if plugin:
        words.append(target.load(f"{'.' if target.package else './build'}/{_LIBRARY}"))
    return shlex.join(words)


def _named(shapes: Shapes) -> Iterable[tuple[str, Sequence[int]]]:
    return zip(("min", "opt", "max"), shapes, strict=True)


def _engine(file: str) -> str:
    return f"{Path(file).stem}.engine"
