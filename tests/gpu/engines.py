"""Engines for tests and figures on a GPU, built once by the package's own build. Needs neither PyTorch nor a detector.

ACMIX_GPU_MODELS          folder that make_models.py wrote; without it the models are made now
ACMIX_TENSORRT_HEADERS    folder with one folder of headers a release; without it they are searched for
ACMIX_PLUGIN              a built libacmix_plugin.so; without it one is built now
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from acmix_deploy.artifacts import read_artifact, sha256
from acmix_deploy.engine.build import build, target_here
from acmix_deploy.errors import AcmixDeployError, MissingComponent
from acmix_deploy.manifest import read_manifest
from acmix_deploy.plugin.toolchain import find_tensorrt
from acmix_deploy.targets import Target
from tests.gpu import device
from tests.plugin import kernels

BLOCKS = ("block-64x80", "block-128x40", "block-256x20")
DETECTOR, WITHOUT = "yolov8n-acmix", "yolov8n"
FORMS = ("exported", "tiled", "plugin")
"""As PyTorch exports the block; reduced, its attention in standard operators; reduced, its attention by the plugin."""
LEVEL = 1
"""Builder optimization level: at TensorRT's own default of 3 a YOLOv8n takes minutes."""
FOLDER = device.BUILD / "engines"

# All that a TensorRT 8 without cuDNN and cuBLAS can use. Later ones do without these anyway.
_TACTIC_SOURCES = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")


def missing() -> str:
    """Why no engine can be built and run here, or an empty string."""
    if device.missing():
        return device.missing()
    try:
        found = target_here()
    except MissingComponent as error:
        return error.message
    return "" if found else "no TensorRT for this Python"


@cache
def models() -> Path:
    """The folder with the files of all models.

    Raises:
        MissingComponent: it is not given, and what makes it is not here.
    """
    if given := os.environ.get("ACMIX_GPU_MODELS"):
        return Path(given)
    for package in ("torch", "ultralytics"):
        if importlib.util.find_spec(package) is None:
            raise MissingComponent(f"no {package} to make models with: name a folder in ACMIX_GPU_MODELS")
    import make_models

    folder = Path(tempfile.mkdtemp(prefix="acmix-models-"))
    for name, model in make_models.models().items():
        make_models.make(folder, name, *model)
    return folder


@cache
def plugin(target: Target) -> Path:
    """The plugin for a TensorRT.

    Raises:
        MissingComponent: there are no headers of it.
    """
    if given := os.environ.get("ACMIX_PLUGIN"):
        return Path(given)
    folder = os.environ.get("ACMIX_TENSORRT_HEADERS")
    sets = [find_tensorrt(path.parent) for path in sorted(Path(folder).glob("*/NvInfer.h"))] if folder else []
    headers = next((found for found in sets if found.version[:2] == target.tensorrt), None) or find_tensorrt()
    sources = [*kernels.SOURCES, *sorted((device.PLUGINS / "tensorrt").glob("*.cpp"))]
    return device.build(f"libacmix_plugin_{headers}.so", sources, headers.include)


@dataclass(frozen=True)
class Variant:
    """An engine to build: a model in one form and type."""

    model: str
    form: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.model}.{self.form}.{self.dtype}"

    def engine(self) -> Path:
        """The engine, built unless it is there, from the same file and with the same plugin."""
        target = target_here()
        assert target, missing()
        typed = {"float32": "", "float16": ".fp16" * target.strongly_typed, "int8": ".int8"}[self.dtype]
        source = models() / f"{self.model}.{'plain' if self.form == 'exported' else 'fused'}{typed}.onnx"
        library = plugin(target) if self.form == "plugin" else None
        path = FOLDER / f"{self}.{target.name}.engine"
        if not self._current(path, source, library):
            build(
                source,
                path,
                plugin=library,
                level=LEVEL,
                fp16=self.dtype != "float32" and not target.strongly_typed,
                timing_cache=FOLDER / f"{target.name}.cache",
                tactic_sources=() if target.strongly_typed else _TACTIC_SOURCES,
                backend="tensorrt",
            )
        return path

    def _current(self, path: Path, source: Path, library: Path | None) -> bool:
        try:
            manifest = read_manifest(path)
            made_of = [parent.sha256 for parent in read_artifact(path).parents]
        except AcmixDeployError:
            return False
        used = manifest.plugin.sha256 if manifest.plugin else None
        wanted = sha256(library) if library else None
        return made_of == [sha256(source)] and used == wanted and manifest.level == LEVEL
