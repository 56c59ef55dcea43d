"""What packages for other servers share: a detector's file as they have to know it, and folders that appear whole."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from acmix_deploy.artifacts import read_artifact, sha256, sidecar, writing
from acmix_deploy.detection.boxes import no_detector
from acmix_deploy.detection.heads import Head, NoHead, head_of
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.engine_file import read_engine, read_engine_file
from acmix_deploy.errors import UserError
from acmix_deploy.files import expect
from acmix_deploy.manifest import Manifest, check, read_manifest
from acmix_deploy.runtime import onnxruntime, tensorrt
from acmix_deploy.runtime.inputs import Input, as_images, file_shape, image_shape
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.serving.detector import Detector

Content = str | bytes | Path
"""Of a file: itself, or the file to copy."""


class Network(NamedTuple):
    """A detector's file, as it is described."""

    path: Path
    input: Input
    outputs: tuple[Input, ...]
    head: Head
    metadata: ModelMetadata
    shape: Sequence[int]
    """The usual one of the input."""
    batches: tuple[int, int | None] | None
    """Fewest and most images in a run, None where there is no limit; None where the number is fixed."""
    manifest: Manifest | None
    """Of an engine."""
    library: Path | None
    """The plugin to take along."""

    @property
    def output(self) -> Input:
        """The first one."""
        return self.outputs[0]


def read(path: Path, plugin: Path | None, server: str, *, feeds_pixels: bool = True) -> Network:
    """What a file is to another server.

    Args:
        path: an ONNX file with its custom operators defined or replaced (form "any" or "plain"), or an engine with its
            manifest.
        plugin: library that an engine was built with; where the manifest says, by default.
        server: who runs it, by name.
        feeds_pixels: whether that gives images in uint8 to a file that takes them.

    Raises:
        UserError: the file is not a detector, takes uint8 where that is not given to it, or is an engine of
            TensorRT-RTX; the plugin is not the engine's.
        MissingComponent: ONNX Runtime is not here.
    """
    manifest, library, profile = None, None, None
    if expect(path, "onnx", "engine") == "onnx":
        if plugin:
            raise UserError(f"{plugin} is for engines, and {path} is an ONNX file", "Leave out --plugin.")
        session = open_session(path)
        inputs, outputs = onnxruntime.inputs_of(session), onnxruntime.outputs_of(session)
        metadata = onnxruntime.metadata_of(session)
    else:
        manifest = read_manifest(path)
        if manifest.machine.backend != "tensorrt":
            raise UserError(
                f"{path} is an engine of {manifest.machine.tensorrt}, and {server} runs those of TensorRT",
                "Build it with TensorRT, or package the ONNX file.",
            )
        if manifest.plugin:
            library = plugin or manifest.plugin.path
            check(manifest, manifest.machine, sha256(library) if library.is_file() else None)
        inputs, outputs = [*tensorrt.inputs_of(manifest)], [*tensorrt.outputs_of(manifest)]
        metadata = manifest.metadata
        profile = manifest.profiles.get(inputs[0].name)
    if metadata.pixels and not feeds_pixels:
        raise UserError(
            f"{path} takes {', '.join(map(str, inputs))}, and {server} feeds images [B, 3, H, W] in float32 alone",
            "Export it without --input uint8.",
        )
    images = [as_images(node, metadata.pixels) for node in inputs]
    if (
        [len(node.dims) for node in inputs] != [4]
        or images[0].dims[1] != 3
        or {node.dtype.kind for node in (*images, *outputs)} != {"f"}
    ):
        given = f"takes {', '.join(map(str, inputs))} and gives {', '.join(map(str, outputs))}"
        raise no_detector(path.stem, given)
    try:
        head = head_of(metadata, {node.name: node.dims for node in outputs})
    except NoHead as error:
        raise no_detector(path.stem, str(error)) from error
    if not manifest:
        Detector.load(path).close()
    usual = file_shape(metadata.usual_shape, metadata.pixels)
    wanted = profile[1] if profile else usual
    shape = [dim if isinstance(dim, int) else size for dim, size in zip(inputs[0].dims, wanted, strict=True)]
    metadata.check_size(str(path), image_shape(shape, metadata.pixels))
    batch = inputs[0].dims[0]
    return Network(
        path=path,
        input=inputs[0],
        outputs=tuple(outputs),
        head=head,
        metadata=metadata,
        shape=shape,
        batches=None if isinstance(batch, int) else (profile[0][0], profile[2][0]) if profile else (1, None),
        manifest=manifest,
        library=library,
    )


def taken_along(network: Network, folder: str) -> dict[str, Content]:
    """The file, its sidecar and its plugin."""
    files = (network.path, sidecar(network.path), network.library)
    return {f"{folder}/{file.name}": file for file in files if file and file.is_file()}


def without_header(network: Network, folder: str) -> dict[str, Content]:
    """The engine that TensorRT deserialises, and its sidecar, where more than that stands in the file."""
    if not network.manifest or not read_engine_file(network.path).offset:
        return {}
    engine, name = read_engine(network.path), network.path.name
    digest = hashlib.sha256(engine).hexdigest()
    artifact = read_artifact(network.path).model_copy(update={"path": Path(name), "sha256": digest})
    return {
        f"{folder}/{name}": engine,
        f"{folder}/{sidecar(Path(name)).name}": artifact.model_dump_json(by_alias=True, indent=2),
    }


def write(files: Mapping[str, Content], out: Path) -> None:
    """Write all folders of ``files``, FOLDER/NAME, into ``out``, or nothing: who runs them may be watching it.

    Raises:
        UserError: one is there already, or cannot be written.
    """
    folders = sorted({file.partition("/")[0] for file in files})
    out = out.resolve()
    for name in folders:
        if (out / name).exists():
            raise UserError(f"{out / name} exists already", "Remove it, or name another folder.")
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
                for name, content in files.items():
                    target = Path(beside, name)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if isinstance(content, Path):
                        shutil.copyfile(content, target)
                    else:
                        target.write_bytes(content.encode() if isinstance(content, str) else content)
                for name in folders:
                    Path(beside, name).rename(out / name)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}", "Choose a folder that you may write to.") from error
