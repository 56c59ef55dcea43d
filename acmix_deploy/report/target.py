"""The file to carry to a target, and what to run there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.artifacts import Artifact
from acmix_deploy.targets import Form, Precision, Target, target_named

Shapes = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Smallest, usual and largest [B, C, H, W]."""


class TargetReport(BaseModel):
    """The file to carry to a target."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="the target, as in docs/targets.md")
    tensorrt: str = Field(description="its TensorRT, major and minor version")
    form: Form = Field(description="any: nodes and definitions; plugin: nodes alone; plain: standard operators")
    file: str = Field(description="name of the file")
    inlined: dict[str, str] = Field(
        description="nodes that the plugin refuses, and why; standard operators in the file"
    )

    @classmethod
    def of(cls, target: Target, artifact: Artifact, inlined: dict[str, str]) -> TargetReport:
        """What was written for ``target``."""
        return cls(
            name=target.name,
            tensorrt=target.version,
            form=artifact.settings["form"],
            file=artifact.path.name,
            inlined=inlined,
        )

    @property
    def notes(self) -> list[str]:
        """What a person has to know about the file."""
        notes = [
            f"{name} has {what}, which the plugin does not take: standard operators in {self.file}"
            for name, what in self.inlined.items()
        ]
        if self.form == "plugin":
            notes.append(
                f"{self.file} needs the plugin, so ONNX Runtime verified it with the definitions that were taken out"
            )
        return notes

    def steps(
        self, reference: str, precision: Precision, shapes: Shapes | None, image: str, *, detector: bool
    ) -> tuple[str, ...]:
        """What to run on the machine that the file was made for.

        Args:
            reference: name of the file to compare the engine with.
            precision: what the engine is to compute in.
            shapes: to build for, where axes are free.
            image: name of the input.
            detector: whether detections can be compared.
        """
        target = target_named(self.name)
        plugin = self.form != "plain"
        by_trtexec = _trtexec(self.file, target, precision, shapes, image, plugin=plugin)
        if target.package:
            permitted = " --fp16" * (precision != "float32" and not target.strongly_typed)
            commands = [
                *engine_steps(self.file, reference, shapes, options=permitted, plugin=plugin, detector=detector)
            ]
            commands.append(f"or {by_trtexec}")
        else:
            commands = ["cmake -S plugins -B build && cmake --build build"] * plugin + [by_trtexec]
        if self.form == "plugin":
            commands.append("without the plugin: export again with --target plain")
        return carry(self.file, reference, f"{target.name}, TensorRT {target.version}", commands)


_LIBRARY = "libacmix_plugin.so"


def carry(file: str, reference: str, where: str, commands: Sequence[str]) -> tuple[str, ...]:
    """Which files go where, and below it the commands to run there."""
    return (f"Carry {file} and {reference} to the target ({where}) and run there:", *(f"  {line}" for line in commands))


def engine_steps(
    file: str, reference: str, shapes: Shapes | None, *, options: str = "", plugin: bool = True, detector: bool
) -> tuple[str, ...]:
    """The commands that make an engine of a file, compare it with another file and time it."""
    if shapes:
        options += "".join(f" --{name} {','.join(map(str, shape))}" for name, shape in _named(shapes))
    library = f" --plugin {_LIBRARY}" * plugin
    return (
        *("acmix-deploy plugin build",) * plugin,
        f"acmix-deploy build {file}{options}{library} -o {_engine(file)}",
        f"acmix-deploy verify {reference} {_engine(file)}{' --images PHOTOS' * detector}",
        f"acmix-deploy profile {_engine(file)}",
    )


def _trtexec(
    file: str, target: Target, precision: Precision, shapes: Shapes | None, image: str, *, plugin: bool
) -> str:
    options = ""
    if precision != "float32":
        by_flags = " --fp16" + " --int8" * (precision == "int8")
        typed = " --stronglyTyped" * (target.tensorrt < (11, 0))  # from 11 on there is nothing else
        options = typed if target.strongly_typed else by_flags
    if shapes:
        options += "".join(f" --{name}Shapes={image}:{'x'.join(map(str, shape))}" for name, shape in _named(shapes))
    if plugin:
        folder = "." if target.package else "./build"
        options += f" {'--plugins' if target.tensorrt < (8, 6) else '--staticPlugins'}={folder}/{_LIBRARY}"
    return f"trtexec --onnx={file}{options} --saveEngine={_engine(file)}"


def _named(shapes: Shapes) -> Iterable[tuple[str, Sequence[int]]]:
    return zip(("min", "opt", "max"), shapes, strict=True)


def _engine(file: str) -> str:
    return f"{Path(file).stem}.engine"
