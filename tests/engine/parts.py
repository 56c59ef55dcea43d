"""Engines that run without a GPU: stand-ins for CUDA and TensorRT, and engines for them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from acmix_deploy.artifacts import sha256, write_artifact
from acmix_deploy.engine_file import header_bytes
from acmix_deploy.manifest import KIND, EngineTensor, Machine, Manifest, Plugin

FAKE = Path(__file__).parent / "fake_tensorrt"
ORIN = Machine(backend="tensorrt", version="8.6.0", gpu="Orin", sm=87)
TYPES = {1: "FLOAT", 2: "UINT8", 10: "HALF", 6: "INT32", 7: "INT64", 9: "BOOL", 16: "BF16"}

Profiles = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]


def make_engine(
    path: Path, model: onnx.ModelProto, profiles: Profiles | None = None, plugin: Path | None = None, **changed: Any
) -> Path:
    """An engine with its manifest, for the stand-ins. It computes ``model``, which ONNX Runtime has to be able to.

    Args:
        path: where it goes.
        model: of any number of inputs and outputs.
        profiles: smallest, usual and largest shape of each input with free axes.
        plugin: the library that it pretends to use.
        changed: other fields of the manifest.
    """
    plan = {"onnx": base64.b64encode(model.SerializeToString()).decode(), "profiles": dict(profiles or {})}
    path.write_text(json.dumps(plan))
    fields = {
        "machine": ORIN, "compute_capabilities": (), "form": "plain", "precision": "float32", "strongly_typed": False,
        "flags": (), "level": 3, "profiles": dict(profiles or {}), "metadata": {},
        "plugin": Plugin(path=plugin, sha256=sha256(plugin)) if plugin else None,
        "inputs": tuple(map(_tensor, model.graph.input)), "outputs": tuple(map(_tensor, model.graph.output)),
    }  # fmt: skip
    write_artifact(path, KIND, settings=Manifest(**{**fields, **changed}).model_dump(mode="json"))
    return path


def make_plan(
    path: Path, model: onnx.ModelProto, profiles: Profiles | None = None, version: str = "8.6.0.12", **described: Any
) -> Path:
    """An engine for the stand-ins as trtexec leaves it: without a manifest.

    Args:
        path: where it goes.
        model: what it computes.
        profiles: see :func:`make_engine`.
        version: release of TensorRT that it says to be of.
        described: ``plugin``, part of the path of a library that it does not load without; ``refused``, what TensorRT
            says in the place of loading it; ``formats`` and ``locations`` of tensors; ``hardware``; ``profile_count``;
            ``names_only``; ``header``, what Ultralytics writes before it.
    """
    header = described.pop("header", None)
    plan = {"onnx": base64.b64encode(model.SerializeToString()).decode(), "profiles": dict(profiles or {})}
    beginning = b"ftrt" + bytes(20) + bytes(map(int, version.split(".")))
    path.write_bytes((header_bytes(header) if header else b"") + beginning + json.dumps(plan | described).encode())
    return path


def _tensor(value: onnx.ValueInfoProto) -> EngineTensor:
    kind = value.type.tensor_type
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
    return EngineTensor(name=value.name, dtype=TYPES[kind.elem_type], shape=shape)
