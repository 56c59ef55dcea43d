"""Open whatever can be run, by its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from polygraphy.backend.base import BaseRunner

from acmix_deploy.artifacts import sidecar
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import UserError
from acmix_deploy.files import expect
from acmix_deploy.manifest import Shape, read_manifest
from acmix_deploy.options import Provider, channels_last
from acmix_deploy.runtime import tensorrt
from acmix_deploy.runtime.inputs import Input, as_images, file_shape, image_shape
from acmix_deploy.runtime.onnxruntime import inputs_of, metadata_of, onnx_runner, open_session, precision_of
from acmix_deploy.runtime.tensorrt import EngineRunner
from acmix_deploy.targets import Precision


class Model(NamedTuple):
    """A file that can be run."""

    runner: BaseRunner
    """Takes and gives arrays by name while it is active; nothing is held before and after."""
    inputs: tuple[Input, ...]
    """What the runner takes; of a file that takes pixels images in floats, which it turns to these."""
    precision: Precision | None
    """None of an engine of which nobody knows."""
    metadata: ModelMetadata
    """What the file tells of the model, such as class names and stride."""
    profiles: Mapping[str, tuple[Shape, Shape, Shape]]
    """Smallest, usual and largest shape of an engine's inputs with free axes, images as [B, C, H, W]; ONNX files have
    no such limits."""

    def usual_shape(self, name: str) -> Shape:
        """The shape to run an image input at where nobody says: what the engine is built for, else what the
        metadata tell. Only its free axes take their sizes from there."""
        if profile := self.profiles.get(name):
            return profile[1]
        last = any(channels_last(node.dims) for node in self.inputs if node.name == name)
        return file_shape(self.metadata.usual_shape, "rgb" if last else None)


def open_model(
    path: Path,
    name: str = "",
    *,
    provider: Provider = "cpu",
    plugin: Path | None = None,
    engines: Path | None = None,
) -> Model:
    """What is needed to run a file. An engine is only read here; what it needs is looked for when its runner starts.

    Args:
        path: an ONNX file, or an engine with its manifest beside it.
        name: how reports call it; the file's name by default.
        provider: what ONNX Runtime runs ONNX files on.
        plugin: the plugin library, for engines that use it (where the manifest says, by default) and for ONNX files on
            provider "tensorrt".
        engines: folder in which provider "tensorrt" keeps what it builds, for another run of the same file.

    Returns:
        A runner, and what the file takes.

    Raises:
        UserError: the file does not exist, is neither, or cannot be run here, with the reason.
        MissingComponent: ONNX Runtime has no such provider here.
    """
    if expect(path, "onnx", "engine") == "onnx":
        session = open_session(path, provider=provider, plugin=plugin, engines=engines)
        metadata = metadata_of(session)
        return Model(
            runner=onnx_runner(path, name or path.name, provider=provider, plugin=plugin),
            inputs=tuple(as_images(node, metadata.pixels) for node in inputs_of(session)),
            precision=precision_of(path),
            metadata=metadata,
            profiles={},
        )
    if not sidecar(path).is_file():
        raise UserError(
            f"{path} is an engine without its manifest {sidecar(path).name}",
            "The manifest of acmix-deploy build moves along with its engine. For one that trtexec, polygraphy or "
            f"Ultralytics built, on the machine that it fits: acmix-deploy adopt {path}",
        )
    manifest = read_manifest(path)
    order = manifest.metadata.pixels
    return Model(
        runner=EngineRunner(path, plugin, name),
        inputs=tuple(as_images(node, order) for node in tensorrt.inputs_of(manifest)),
        precision=manifest.precision,
        metadata=manifest.metadata,
        profiles={
            name: (image_shape(low, order), image_shape(usual, order), image_shape(high, order))
            for name, (low, usual, high) in manifest.profiles.items()
        },
    )
