"""Model repositories: a detector as files that Triton serves, native or by its Python backend.

Native are three models: the network on the backend of its file, the suppression of boxes that overlap as an ONNX graph,
and an ensemble of both, which clients ask. Of a file that selects boxes itself that graph takes the rows apart.
Nothing but Triton's own container is needed there.

Source: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_configuration.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from acmix_deploy import __version__
from acmix_deploy.detection.heads import Head
from acmix_deploy.detection.suppression import CONFIDENCE
from acmix_deploy.document import Document
from acmix_deploy.errors import UserError
from acmix_deploy.options import Provider
from acmix_deploy.runtime.inputs import Input
from acmix_deploy.serving.packaging import Content, Network, read, taken_along, without_header, write
from acmix_deploy.serving.triton import Backend
from acmix_deploy.serving.triton.suppression import suppression

MOUNT = "/models"
"""Where the repository is in the container."""


def outputs_of(head: Head, most: int) -> tuple[Input, ...]:
    """What clients get of a task for an image, ``most`` detections, the highest score first, then zeros, or empty lists
    of polygons."""
    more = {
        "pose": [Input("detection_keypoints", (most, *head.keypoints), np.dtype(np.float32))],
        "obb": [Input("detection_corners", (most, 4, 2), np.dtype(np.float32))],
        "segment": [Input("detection_masks", (most,), np.dtype(np.object_))],
    }
    return (
        Input("num_detections", (1,), np.dtype(np.int32)),
        Input("detection_boxes", (most, 4), np.dtype(np.float32)),
        Input("detection_scores", (most,), np.dtype(np.float32)),
        Input("detection_classes", (most,), np.dtype(np.int32)),
        *more.get(head.task, []),
    )


_MODEL_PY = '''"""The detector beside this file. The code is that of the package acmix-deploy."""

from acmix_deploy.serving.triton.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


class PackageDocument(Document):
    """Result of ``acmix-deploy package triton``."""

    document: Literal["package triton"] = "package triton"
    repository: Path = Field(description="folder of the model repository")
    model: str = Field(description="the model that clients ask")
    max_batch: int = Field(description="images in a run at most; 0 where the file is made for one number of images")
    files: list[str] = Field(description="what was written, in that folder")
    needs: list[str] = Field(description="what has to be in Triton's container")
    start: str = Field(description=f"the command that serves the repository, which the container has as {MOUNT}")


def package(
    model: Path,
    out: Path,
    *,
    backend: Backend = "native",
    plugin: Path | None = None,
    confidence: float = CONFIDENCE,
    provider: Provider = "cpu",
    max_batch: int = 8,
    max_delay_ms: float = 5.0,
) -> PackageDocument:
    """Add a detector to a model repository, under the name of its file without suffix.

    Neither a GPU nor TensorRT is needed. The detector's file stays as it is, with its sidecar beside it.

    Args:
        model: an ONNX file with its custom operators defined or replaced (form "any" or "plain"), or an engine with its
            manifest.
        out: folder of the repository; made where it is missing.
        backend: what runs the detector.
        plugin: library that an engine was built with; where the manifest says, by default.
        confidence: score above which there is a detection.
        provider: what ONNX Runtime runs an ONNX file on.
        max_batch: images in a run at most; fewer where the engine takes fewer.
        max_delay_ms: how long a request waits for others, in milliseconds.

    Returns:
        What was written, and the command that serves it.

    Raises:
        UserError: the file is not a detector, or Triton cannot serve it; the plugin is not the engine's; the repository
            has such a model already, or cannot be written.
        MissingComponent: ONNX Runtime is not here.
    """
    network = read(model, plugin, "Triton")
    delay = round(max_delay_ms * 1000)
    if backend == "native":
        rows = network.head.layout == "rows" and isinstance(network.output.dims[1], int)
        if network.head.task != "detect" or not (rows or network.head.layout in ("anchors", "objectness")):
            raise UserError(
                f"{model} is of the task {network.head.task} and gives {network.output}, which are "
                f"{network.head.layout}, and the graph that follows it in Triton takes anchors, or a fixed number of "
                "rows, of the task detect alone",
                "Use --backend python.",
            )
        max_batch = _max_batch(network, max_batch)
        files = _native(network, confidence, provider, max_batch, delay)
    else:
        files = _python(network, confidence, provider, max_batch, delay)
    write(files, out)
    return PackageDocument(
        repository=out,
        model=model.stem,
        max_batch=max_batch,
        files=sorted(files),
        needs=_needs(network, backend),
        start=_start(network, backend),
    )


def _max_batch(network: Network, wanted: int) -> int:
    """``max_batch_size`` of the network in Triton: 0 where a batch has to have one size."""
    if not network.batches:
        return 0
    fewest, most = network.batches
    if fewest > 1:
        raise UserError(
            f"{network.path} is built for {fewest} images or more, and Triton sends single ones too",
            "Build it with --min 1,..., or use --backend python.",
        )
    return min(wanted, most or wanted)


def _native(network: Network, confidence: float, provider: Provider, max_batch: int, delay: int) -> dict[str, Content]:
    name, path = network.path.stem, network.path
    of_network, of_boxes = f"{name}.network", f"{name}.boxes"
    on_gpu = network.manifest is not None or provider != "cpu"

    def tensor(field: str, node: Input) -> str:
        """Without the batch, where Triton makes batches."""
        return _tensor(field, node._replace(dims=node.dims[1:] if max_batch else node.dims))

    rows = network.output.dims[1] if network.head.layout == "rows" else None
    most = min(network.metadata.most, rows) if isinstance(rows, int) else network.metadata.most
    boxes = outputs_of(network.head, most)
    outputs = [
        _tensor("output", node if max_batch else node._replace(dims=(network.shape[0], *node.dims))) for node in boxes
    ]
    predictions = network.output._replace(name="predictions")
    batching = f"dynamic_batching {{ max_queue_delay_microseconds: {delay} }}"
    config = {
        of_network: [
            f'platform: "{"tensorrt_plan" if network.manifest else "onnxruntime_onnx"}"',
            f"default_model_filename: {_quoted(path.name)}",
            tensor("input", network.input),
            tensor("output", network.output),
            *[batching] * (max_batch > 0),
            f"instance_group {{ kind: {'KIND_GPU' if on_gpu else 'KIND_CPU'} count: 1 }}",
            *[_TENSORRT_PROVIDER] * (network.manifest is None and provider == "tensorrt"),
            *(_warm_up(network, batch) for batch in sorted({1, max_batch or 1})),
        ],
        of_boxes: [
            'platform: "onnxruntime_onnx"',
            tensor("input", predictions),
            *outputs,
            *["dynamic_batching { }"] * (max_batch > 0),
            "instance_group { kind: KIND_CPU count: 1 }",
        ],
        name: [
            'platform: "ensemble"',
            tensor("input", network.input),
            *outputs,
            "ensemble_scheduling {",
            *_step(of_network, [network.input.name], {network.output.name: "predictions"}),
            *_step(of_boxes, ["predictions"], {node.name: node.name for node in boxes}),
            "}",
            *_described(network, confidence),
        ],
    }
    float16 = network.output.dtype == np.float16
    graph = suppression(network.head, network.output.dims, confidence, most, float16=float16)
    return {
        **{f"{key}/config.pbtxt": _config(key, max_batch, fields) for key, fields in config.items()},
        **taken_along(network, f"{of_network}/1"),
        **without_header(network, f"{of_network}/1"),
        f"{of_boxes}/1/model.onnx": graph.SerializeToString(),
        f"{name}/1/README": f"{name} is {of_network} and {of_boxes}, one after the other: see config.pbtxt\n",
    }


def _python(network: Network, confidence: float, provider: Provider, max_batch: int, delay: int) -> dict[str, Content]:
    name = network.path.stem
    options = {"file": network.path.name, "provider": provider}
    if network.library:
        options["plugin"] = network.library.name
    fields = [
        'backend: "python"',
        'input { name: "image" data_type: TYPE_STRING dims: [1] }',
        *(_tensor("output", node) for node in outputs_of(network.head, network.metadata.most)),
        f"dynamic_batching {{ max_queue_delay_microseconds: {delay} }}",
        "instance_group { kind: KIND_MODEL count: 1 }",
        *_parameters(options),
        *_described(network, confidence),
    ]
    return {
        f"{name}/config.pbtxt": _config(name, max_batch, fields),
        **taken_along(network, f"{name}/1"),
        f"{name}/1/model.py": _MODEL_PY,
    }


_TENSORRT_PROVIDER = 'optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }'


def _config(name: str, max_batch: int, fields: Sequence[str]) -> str:
    return "\n".join((f"name: {_quoted(name)}", f"max_batch_size: {max_batch}", *fields)) + "\n"


def _tensor(field: str, node: Input) -> str:
    return f"{field} {{ name: {_quoted(node.name)} data_type: {_type(node)} dims: {_dims(node.dims)} }}"


_KINDS = {"f": "FP", "i": "INT", "u": "UINT"}


def _type(node: Input) -> str:
    if node.dtype.kind == "O":
        return "TYPE_STRING"
    return f"TYPE_{_KINDS[node.dtype.kind]}{8 * node.dtype.itemsize}"


def _dims(dims: Sequence[int | str | None]) -> str:
    return f"[{', '.join(str(dim) if isinstance(dim, int) else '-1' for dim in dims)}]"


def _warm_up(network: Network, batch: int) -> str:
    dims = network.shape[1:] if network.batches else network.shape
    data = f"data_type: {_type(network.input)} dims: {_dims(dims)} random_data: true"
    value = f"inputs {{ key: {_quoted(network.input.name)} value {{ {data} }} }}"
    return f'model_warmup {{ name: "{batch}" batch_size: {batch} {value} }}'


def _step(model: str, inputs: Sequence[str], outputs: Mapping[str, str]) -> list[str]:
    """A step of an ensemble, by what the model calls its tensors and what they are called between the models."""
    maps = [("input_map", name, name) for name in inputs] + [("output_map", *pair) for pair in outputs.items()]
    return [
        f"  step {{ model_name: {_quoted(model)} model_version: -1",
        *(f"    {field} {{ key: {_quoted(key)} value: {_quoted(value)} }}" for field, key, value in maps),
        "  }",
    ]


def _described(network: Network, confidence: float) -> list[str]:
    """What clients need to know beside the tensors."""
    names, letterbox = network.metadata.names, network.metadata.letterbox
    if suppressed := network.metadata.suppression:
        confidence = max(confidence, suppressed.confidence)
    pixels = {"pixels": json.dumps(network.metadata.pixels)} if network.metadata.pixels else {}
    return _parameters(
        {"names": json.dumps(names), "letterbox": letterbox.model_dump_json(), "confidence": str(confidence), **pixels}
    )


def _parameters(values: Mapping[str, str]) -> list[str]:
    return [
        f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
        for key, value in values.items()
    ]


def _quoted(text: str) -> str:
    """A string as protobuf's text format has it."""
    return json.dumps(text, ensure_ascii=False)


def _needs(network: Network, backend: Backend) -> list[str]:
    needs = []
    if network.manifest:
        needs.append(f"{network.manifest.machine.tensorrt} on {network.manifest.machine.device}")
    if backend == "python":
        needs.append(f"acmix-deploy[serve] {__version__} for the Python of Triton's Python backend")
    return needs


def _start(network: Network, backend: Backend) -> str:
    command = f"tritonserver --model-repository={MOUNT}"
    if backend == "python" or not network.library or not network.manifest:
        return command
    library = f"{MOUNT}/{network.path.stem}.network/1/{network.library.name}"
    major = network.manifest.machine.version.partition(".")[0]
    return f"LD_PRELOAD={library}:libnvinfer.so.{major} {command}"
