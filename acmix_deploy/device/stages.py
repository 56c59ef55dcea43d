"""The stages of ``export`` that run on a device: plugin, engines, what they give, and how long they take."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.artifacts import Artifact, StageResult, sidecar
from acmix_deploy.device.session import DeviceSession, Ended
from acmix_deploy.engine.build import BuildReport, target_for
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.graph import with_weights
from acmix_deploy.manifest import Machine, Manifest
from acmix_deploy.plugin.build import NAME
from acmix_deploy.profile import Profile, ProfileDocument
from acmix_deploy.runtime.inputs import Shapes
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.targets import Target
from acmix_deploy.verify import Candidate

Feeds = Sequence[Mapping[str, Array]]

LOG = "device.log"
"""What programs on the device said, in the folder of an export."""


class DeviceReport(BaseModel):
    """What of an export ran on another machine."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="what it is called here")
    host: str = Field(description="destination as ssh takes it")
    folder: str = Field(description="of the package there")
    board: str = Field(description="model of the board, or its architecture where it tells none")
    machine: Machine | None = Field(description="its TensorRT and GPU")
    ran: tuple[str, ...] = Field(description="what ran there; all else ran on the machine that wrote this")
    found: tuple[str, ...] = Field(description="of that what an earlier command had left there")
    files: dict[str, str] = Field(description="files that stay there: their paths, by name")
    commands: tuple[str, ...] = Field(description="what runs the engines there, where this package does not")
    notes: tuple[str, ...] = Field(description="what to know of the device")


class RemoteStages:
    """A device as the place of the last stages.

    Args:
        session: the device, connected.
        out: folder of the export here.
        fetch: bring the engines here, not their manifests alone.

    Raises:
        MissingComponent: this package is not installed there.
    """

    def __init__(self, session: DeviceSession, out: Path, *, fetch: bool = False) -> None:
        self.session, self.out, self.fetch = session, out, fetch
        self.commands: list[str] = []
        """What runs the engines there, where this package does not."""
        self._check()
        self.sizes: dict[str, int] = {}
        """Of the engines, in bytes, by name."""
        self.files: dict[str, str] = {}
        """Paths of what stays there, by name."""
        self._ran: list[str] = []
        self._found: list[str] = []
        self._log = ""

    def _check(self) -> None:
        """Raise MissingComponent where the device lacks what the stages need."""
        self.session.need_package()

    @property
    def machine(self) -> Machine | None:
        """TensorRT and the GPU there; None where no TensorRT can be imported."""
        return self.session.machine

    @property
    def target(self) -> Target:
        """What the device's TensorRT takes. Raises MissingComponent: there is none."""
        if self.machine is None:
            raise MissingComponent(
                f"there is no TensorRT on {self.session.name}",
                "Install it there, on a Jetson by apt-get install nvidia-jetpack python3-libnvinfer, then: "
                f"acmix-deploy device add {self.session.name} --install. Without an engine: --no-engine",
            )
        return target_for(self.machine)

    @property
    def runs_engines(self) -> bool:
        """Whether engines that are built there run there too."""
        return self.machine is not None and self.machine.gpu is not None

    @property
    def uncompared(self) -> str:
        """Why engines are not compared with the model; empty where they are."""
        return "" if self.runs_engines else f"{self.session.name} has no GPU"

    def library(self) -> Path:
        """The plugin, compiled there where it is not yet. Raises what ``plugin build`` does."""
        done = self._verb("plugin build", ["plugin", "build", "--json", "--out", "."], writes={NAME: None}, keep=True)
        self.files[NAME] = self.session.path(done.job, NAME)
        return Path(self.files[NAME])

    def build(
        self, source: Path, target: Path, *, plugin: Path | None, fp16: bool, shapes: Shapes | None
    ) -> StageResult[BuildReport | None]:
        """``build`` there; here its manifest arrives, and the engine where it is asked
        for. An engine that an earlier command built there of the same file is taken."""
        self._check_target(target)
        options = ["--fp16"] * fp16 + [f"--plugin={plugin}"] * bool(plugin)
        if shapes:
            for name, shape in zip(("min", "opt", "max"), shapes, strict=True):
                options.append(f"--{name}={','.join(map(str, shape))}")
        cache = PurePosixPath(self.session.facts.folder, "timing.cache")
        name, beside = target.name, sidecar(target)
        done = self._verb(
            f"build {name}",
            ["build", "--json", source.name, "-o", name, f"--timing-cache={cache}", *options],
            files={file.relative_to(source.parent).as_posix(): file for file in with_weights(source)},
            writes={name: target if self.fetch else None, beside.name: beside},
            keep=True,
        )
        self.files[name] = self.session.path(done.job, name)
        self.sizes[name] = done.sizes[name]
        found = json.loads(done.stdout)
        artifact = Artifact.model_validate(found["artifact"]).model_copy(update={"path": target})
        return StageResult(artifact, BuildReport.model_validate(found))

    def _check_target(self, target: Path) -> None:
        """Raise UserError where an engine that is here would lose its manifest to that of the one on the device."""
        if not self.fetch and target.exists():
            raise UserError(
                f"{target} is here, and the engine on {self.session.name} would have its manifest",
                "Add --fetch, move it, or give --out another folder.",
            )

    def candidate(self, engine: Artifact, feeds: Feeds) -> Candidate:
        """What an engine gives there for these inputs, float32 by name, to be compared here."""
        model = engine.path
        with tempfile.TemporaryDirectory() as folder:
            inputs = {f"in/{index:03d}.npz": Path(folder, f"in{index:03d}.npz") for index in range(len(feeds))}
            outputs = {f"out/{index:03d}.npz": Path(folder, f"out{index:03d}.npz") for index in range(len(feeds))}
            for path, feed in zip(inputs.values(), feeds, strict=True):
                np.savez(path, allow_pickle=False, **feed)
            self._programs(
                f"run {model.name}",
                [[self.session.python, "-m", "acmix_deploy.runtime.outputs", model.name, "in", "out"]],
                files={model.name: model, sidecar(model).name: sidecar(model), **inputs},
                writes={**outputs},
            )
            found = [dict(np.load(path)) for path in outputs.values()]
        manifest = Manifest.model_validate(engine.settings)
        assert manifest.precision  # of an engine that was built by this package
        runner = _Recorded(model.name, feeds, found)
        return Candidate(runner, manifest.precision, suppression=manifest.metadata.suppression)

    def profile(self, files: Sequence[Path], *, input_shape: Sequence[int], seconds: float) -> list[Profile]:
        """``profile`` there."""
        reads = {file.name: file for model in files for file in (model, sidecar(model))}
        shape = ",".join(map(str, input_shape))
        names = [file.name for file in files]
        options = ["--json", f"--seconds={seconds}", f"--input-shape={shape}"]
        done = self._verb("profile", ["profile", *options, "--", *names], files=reads)
        return ProfileDocument.model_validate_json(done.stdout).profiles

    def report(self) -> DeviceReport:
        """What ran there."""
        facts = self.session.facts
        return DeviceReport(
            name=self.session.name,
            host=self.session.device.host,
            folder=facts.folder,
            board=facts.jetson or facts.machine,
            machine=self.machine,
            ran=tuple(self._ran),
            found=tuple(self._found),
            files=self.files,
            commands=tuple(self.commands),
            notes=self.session.notes,
        )

    def _verb(self, what: str, arguments: Sequence[str], **options: Any) -> Ended:
        """A verb there, with its document on stdout."""
        return self._programs(what, [[*self.session.command, *arguments]], **options)

    def _programs(self, what: str, commands: Sequence[Sequence[str]], **options: Any) -> Ended:
        """:meth:`DeviceSession.run`, which is noted with what it said. Raises what it ended with, too."""
        done = self.session.run(what, commands, **options)
        printed = [] if done.stdout.startswith("{") else done.stdout.splitlines()  # what is no document
        self._log += f"{what}: exit code {done.code}\n" + "".join(f"    {line}\n" for line in (*printed, *done.said))
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / LOG).write_text(self._log, encoding="utf-8")
        self.session.check(done)
        self._ran.append(what)
        self._found += [what] * done.found
        return done


class _Recorded(BaseRunner):  # type: ignore[misc]
    """Gives outputs that were computed elsewhere."""

    def __init__(self, name: str, feeds: Feeds, outputs: Sequence[dict[str, Array]]) -> None:
        super().__init__(name=name)
        self._inputs = feeds[0]
        self._outputs = {_key(feed): found for feed, found in zip(feeds, outputs, strict=True)}

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name, array in self._inputs.items():
            metadata.add(name, dtype=array.dtype, shape=[None] * array.ndim)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        self.inference_time = 0.0  # Polygraphy adds it up
        return self._outputs[_key(feed_dict)]


def _key(feed: Mapping[str, Array]) -> tuple[tuple[str, tuple[int, ...], bytes], ...]:
    return tuple((name, array.shape, array.tobytes()) for name, array in sorted(feed.items()))
