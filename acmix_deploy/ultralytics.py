"""``import acmix_deploy.ultralytics``: Ultralytics trains models whose YAML names ACmix, and its own predict and val
run the files that are made here. ``python -m acmix_deploy.ultralytics`` is its command ``yolo`` with that.

One name is added to the installed package and two are replaced, for this process; nothing else happens on import:

- ``ACmix`` where model YAML files are read.
- ``open`` where Ultralytics reads engines. For one with a manifest beside it the manifest is checked against this
  machine and the plugin is loaded, before TensorRT deserialises the engine; and the metadata of the manifest are read
  as if they stood before the engine, as they do in Ultralytics' own. All other files are opened as ever.
- ``guess_model_task`` where ``YOLO(...)`` asks what a file is for: older releases look at its name alone. A file's
  metadata tell it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from acmix_deploy.artifacts import sidecar
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.engine_file import header_bytes, read_engine_file
from acmix_deploy.errors import AcmixDeployError, UserError
from acmix_deploy.manifest import KIND, HeaderManifest, Manifest, read_any_manifest, read_fitting
from acmix_deploy.yolo import register, ultralytics

_DESERIALISE = ("nn.autobackend", "nn.backends.tensorrt")
"""Modules that read an engine for TensorRT: the first up to 8.3, the second since."""

_OPEN = open
_READ_HEADER = "nn.backends.base"
"""That which reads what stands before one, since 8.4."""


def _install() -> None:
    register()
    ultralytics("nn.autobackend")
    for name in filter(_exists, _DESERIALISE):
        vars(ultralytics(name))["open"] = _open_engine
    if _exists(_READ_HEADER):
        vars(ultralytics(_READ_HEADER))["open"] = _open_header
    model = ultralytics("engine.model")
    vars(model)["guess_model_task"] = _by_metadata(vars(model)["guess_model_task"])


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(f"ultralytics.{module}") is not None
    except ModuleNotFoundError:  # nor its package
        return False


def _open_engine(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
    """``open`` for what TensorRT deserialises."""
    manifest = _manifest(file) if mode == "rb" else None
    if manifest is None:
        return _OPEN(file, mode, *rest, **named)
    path = Path(file)
    if manifest.machine.backend != "tensorrt":
        raise UserError(
            f"{path} is an engine of {manifest.machine.tensorrt}, and Ultralytics runs those of TensorRT",
            "Build it with TensorRT: acmix-deploy build --backend tensorrt",
        )
    if manifest.metadata.pixels:
        raise UserError(
            f"{path} takes images in uint8, and Ultralytics feeds floats", "Export the file again, without --input."
        )
    read_fitting(path)
    if manifest.plugin:
        from acmix_deploy.runtime.tensorrt import load_plugin

        load_plugin(manifest.plugin.path)
    header = _header(path, manifest)
    return BytesIO(header + path.read_bytes()) if header else _OPEN(file, mode, *rest, **named)


def _open_header(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
    """``open`` for the metadata of an engine alone."""
    manifest = _manifest(file) if mode == "rb" else None
    header = _header(Path(file), manifest) if manifest else b""
    return BytesIO(header) if header else _OPEN(file, mode, *rest, **named)


def _manifest(file: Any) -> Manifest | None:
    """That of an engine, whether or not it fits; None of all else and where it tells nothing.

    Raises:
        UserError: the engine has changed since.
    """
    if not isinstance(file, (str, os.PathLike)):
        return None
    path = Path(file)
    try:
        told = json.loads(sidecar(path).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict) or told.get("kind") != KIND:
        return None
    manifest = read_any_manifest(path)
    return None if isinstance(manifest, HeaderManifest) else manifest


def _header(path: Path, manifest: Manifest) -> bytes:
    """What Ultralytics would have written before an engine; nothing where it stands there, or cannot be told."""
    if read_engine_file(path).header is not None or len(manifest.inputs) != 1 or len(manifest.inputs[0].shape) != 4:
        return b""
    (image,) = manifest.inputs
    shape = manifest.profiles.get(image.name, (image.shape,) * 3)[1]
    try:
        return header_bytes(manifest.metadata.header(image.shape, shape, manifest.precision))
    except UserError:
        return b""


def _by_metadata(guess: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(guess)
    def guess_model_task(model: Any) -> Any:
        return _told_task(model) or guess(model)

    return guess_model_task


def _told_task(model: Any) -> str | None:
    """Of an ONNX file or engine, if it is one that Ultralytics knows."""
    if not isinstance(model, (str, os.PathLike)):
        return None
    path = Path(model)
    metadata = ModelMetadata()
    try:
        if path.suffix == ".onnx":
            import onnx

            metadata = ModelMetadata.of(onnx.load_model(path, load_external_data=False))
        elif path.suffix == ".engine":
            manifest = _manifest(path)
            metadata = manifest.metadata if manifest else ModelMetadata.of_header(read_engine_file(path).header or {})
    except Exception:  # what is wrong with a file says whoever opens it
        return None
    return metadata.task if metadata.detects else None


if __name__ != "__main__":
    _install()
else:
    try:
        _install()
    except AcmixDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    ultralytics("cfg").entrypoint()
