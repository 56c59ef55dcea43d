"""The stages of ``export`` on a device that this package does not run on, as JetPack 5 with its Python 3.8: the plugin
by CMake, the engine and its times by trtexec. What the engine computes is not compared."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from acmix_deploy.artifacts import StageResult, write_artifact
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.device.stages import RemoteStages
from acmix_deploy.engine.build import BuildReport
from acmix_deploy.errors import MissingComponent
from acmix_deploy.forms import to_form
from acmix_deploy.graph import read, with_weights
from acmix_deploy.manifest import KIND, HeaderManifest, Machine
from acmix_deploy.onnx_file import inputs
from acmix_deploy.plugin.build import NAME, SOURCES
from acmix_deploy.profile import Profile
from acmix_deploy.profile.trtexec import read_times
from acmix_deploy.runtime.inputs import Shapes, file_shape
from acmix_deploy.runtime.onnxruntime import precision_of
from acmix_deploy.targets import by_x

_LIBRARY = f"build/{NAME}"
_TIMES = "times.json"


class Bare(RemoteStages):
    """See the module; methods as those of :class:`RemoteStages`."""

    def _check(self) -> None:
        self._running: dict[str, list[str]] = {}  # options that an engine is run with, by its name
        self._trtexec = self._tool("trtexec", "it comes with TensorRT: apt-get install libnvinfer-bin")
        if not self.session.facts.tensorrt:
            raise MissingComponent(f"TensorRT's library was not found on {self.session.name}")

    @property
    def machine(self) -> Machine:
        facts = self.session.facts
        return Machine(backend="tensorrt", version=str(facts.tensorrt), cuda=facts.cuda, gpu=facts.jetson or None)

    @property
    def runs_engines(self) -> bool:
        return True

    @property
    def uncompared(self) -> str:
        return f"trtexec ran it, since {self.session.name} has Python {self.session.facts.python}"

    def library(self) -> Path:
        cmake = self._tool("cmake", "pip install cmake, as Ubuntu 20.04 has an older one than 3.18")
        compiler = self.session.facts.tools.get("nvcc")
        configure = [cmake, "-S", "plugins", "-B", "build"]
        configure += [f"-DCMAKE_CUDA_COMPILER={compiler}"] if compiler else []
        done = self._programs(
            "cmake",
            [configure, [cmake, "--build", "build", "--parallel", "2"]],
            files={f"plugins/{path.relative_to(SOURCES).as_posix()}": path for path in _sources()},
            writes={_LIBRARY: None},
            keep=True,
        )
        self.files[NAME] = self.session.path(done.job, _LIBRARY)
        return Path(self.files[NAME])

    def build(
        self, source: Path, target: Path, *, plugin: Path | None, fp16: bool, shapes: Shapes | None
    ) -> StageResult[BuildReport | None]:
        self._check_target(target)
        name, release, model = target.name, self.target, read(source)
        library = [release.load(str(plugin))] if plugin else []
        precision = "float16" if fp16 and precision_of(model) == "float32" else precision_of(model)
        image = inputs(model)[0].name
        if shapes:
            order = ModelMetadata.of(model).pixels
            smallest, usual, largest = shapes
            shapes = file_shape(smallest, order), file_shape(usual, order), file_shape(largest, order)
        self._running[name] = [*library, *([f"--shapes={image}:{by_x(shapes[1])}"] if shapes else [])]
        with tempfile.TemporaryDirectory() as folder:
            ready = Path(folder, source.name)
            onnx.save(to_form(model, release.form if plugin else "plain"), ready)
            options = release.trtexec(ready.name, name, precision, shapes, image)
            done = self._programs(
                f"trtexec {name}",
                [[self._trtexec, *options, *library]],
                files={ready.name: ready},
                writes={name: target if self.fetch else None},
                keep=True,
            )
        self.files[name], self.sizes[name] = self.session.path(done.job, name), done.sizes[name]
        manifest = HeaderManifest(
            origin="trtexec", backend="tensorrt", version=self.machine.version, metadata=ModelMetadata.of(model)
        )
        run = [self._trtexec, f"--loadEngine={self.files[name]}", *self._running[name]]
        self.commands.append(shlex.join(run))
        settings, digest = manifest.model_dump(mode="json"), done.digests[name]
        return StageResult(
            write_artifact(target, KIND, parents=with_weights(source), settings=settings, digest=digest), None
        )

    def profile(self, files: Sequence[Path], *, input_shape: Sequence[int], seconds: float) -> list[Profile]:
        found = []
        for file in files:
            timing = [f"--loadEngine={file.name}", f"--exportTimes={_TIMES}", f"--duration={seconds:g}"]
            with tempfile.TemporaryDirectory() as folder:
                times = Path(folder, _TIMES)
                self._programs(
                    f"time {file.name}",
                    [[self._trtexec, *timing, "--useCudaGraph", *self._running[file.name]]],
                    files={file.name: file},
                    writes={_TIMES: times},
                )
                found.append(read_times(times).model_copy(update={"file": file.name}))
        return found

    def _tool(self, name: str, hint: str) -> str:
        found = self.session.facts.tools.get(name)
        if not found:
            raise MissingComponent(f"{self.session.name} has no {name}", f"Install it there: {hint}")
        return found


def _sources() -> list[Path]:
    """What CMake builds the plugin from."""
    kept = ("CMakeLists.txt", "exports.map", "include", "src", "tensorrt")
    return [
        path for path in sorted(SOURCES.rglob("*")) if path.is_file() and path.relative_to(SOURCES).parts[0] in kept
    ]
