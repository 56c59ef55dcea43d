"""A folder with all that DeepStream needs to run a detector: configuration, labels, and a library that reads outputs.

Source of the keys: https://docs.nvidia.com/metropolis/deepstream/dev-guide/text/DS_plugin_gst-nvinfer.html and
DS_ref_app_deepstream.html there; of what nvinfer makes of them: https://github.com/NVIDIA/DeepStream
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from acmix_deploy.detection.suppression import CONFIDENCE, IOU, MOST
from acmix_deploy.document import Document
from acmix_deploy.errors import UserError
from acmix_deploy.files import expect
from acmix_deploy.runtime.onnxruntime import precision_of
from acmix_deploy.serving.packaging import Content, Network, read, taken_along, without_header, write

SAMPLE = "file:///opt/nvidia/deepstream/deepstream/samples/streams/sample_1080p_h264.mp4"
"""A video that DeepStream comes with."""

CONFIG, APP, LABELS = "config_infer_primary.txt", "deepstream_app_config.txt", "labels.txt"
_LIBRARY = "library"
_SOURCES = ("parser.cpp", "Makefile", "CMakeLists.txt")
_BUILT = f"{_LIBRARY}/libacmix_parser.so"
_BLACK = 0  # what nvinfer pads with
_MODES = {"float32": 0, "int8": 1, "float16": 2}
_NONE, _NMS = 4, 2  # cluster-mode
_Groups = Mapping[str, Mapping[str, object]]
_SCHEMES = ("rtsp", "rtsps", "http", "https", "file")


class DeepStreamDocument(Document):
    """Result of ``acmix-deploy package deepstream``."""

    document: Literal["package deepstream"] = "package deepstream"
    folder: Path = Field(description="what was written")
    task: str = Field(description="of the model")
    function: str = Field(description="of the library, which reads the outputs")
    clustering: Literal["nms", "none"] = Field(description="what nvinfer does with boxes that overlap")
    files: list[str] = Field(description="what is in the folder")
    commands: list[str] = Field(description="what to run in the folder, on the device")
    notes: list[str] = Field(description="what differs from `detect`")


def package(
    model: Path,
    out: Path,
    *,
    source: str = SAMPLE,
    plugin: Path | None = None,
    confidence: float = CONFIDENCE,
) -> DeepStreamDocument:
    """Write a folder for DeepStream. Neither a GPU nor TensorRT nor DeepStream is needed.

    Args:
        model: an ONNX file of the form "any" or "plain", from which nvinfer builds an engine, or an engine with its
            manifest.
        out: the folder; there is none yet.
        source: what to look at: an address that begins with rtsp, http, https or file, or the path of a video.
        plugin: library with the model's custom layers; where an engine's manifest says, by default.
        confidence: score above which there is a detection.

    Returns:
        What was written, and what to run on the device.

    Raises:
        UserError: the file is not a detector, or DeepStream cannot run it; the plugin is not the engine's; the folder
            exists or cannot be written.
        MissingComponent: ONNX Runtime is not here.
    """
    folder = out.resolve()
    is_onnx = expect(model, "onnx", "engine") == "onnx"
    network = read(model, None if is_onnx else plugin, "DeepStream", feeds_pixels=False)
    if is_onnx and plugin:
        if not plugin.is_file():
            raise UserError(f"{plugin} is not a file", "Give the library: acmix-deploy plugin build.")
        network = network._replace(library=plugin)
    _check(network)
    labels = _labels(network)
    uri = _uri(source)
    function = "NvDsInferParseAcmixMasks" if network.head.task == "segment" else "NvDsInferParseAcmix"
    cluster = _NONE if network.head.selects or network.head.task == "segment" else _NMS
    notes = _notes(network, confidence)
    inference = _inference(network, function, cluster, confidence)
    commands = [f"make -C {_LIBRARY}", *_build(network, inference), f"deepstream-app -c {APP}"]
    files: dict[str, Content] = {
        CONFIG: _ini(inference),
        APP: _ini(_application(network, uri)),
        LABELS: "".join(f"{label}\n" for label in labels),
        "README.md": _readme(network, commands, notes),
        f"{_LIBRARY}/model.h": _header(network),
        **{f"{_LIBRARY}/{name}": _source(name) for name in _SOURCES},
    }
    model_files = taken_along(network._replace(library=None), "") | without_header(network, "")
    files |= {name.lstrip("/"): content for name, content in model_files.items()}
    if network.library:
        files[f"{_LIBRARY}/{network.library.name}"] = network.library
    write({f"{folder.name}/{name}": content for name, content in files.items()}, folder.parent)
    return DeepStreamDocument(
        folder=out,
        task=network.head.task,
        function=function,
        clustering="nms" if cluster == _NMS else "none",
        files=sorted(files),
        commands=commands,
        notes=notes,
    )


def _check(network: Network) -> None:
    """Raise UserError where nvinfer feeds or reads something else."""
    path, head = network.path, network.head
    if network.input.dtype != np.float32:
        raise UserError(
            f"{path} takes {network.input}, and DeepStream feeds images [B, 3, H, W] in float32 alone",
            "Export it with float32 at its input.",
        )
    for node in network.outputs:
        if node.dtype != np.float32:
            raise UserError(
                f"{path} gives {node}, and the library reads float32", "Export it with float32 at its outputs."
            )
    if head.task == "classify":
        raise UserError(
            f"{path} is of the task classify, whose images are cropped, and nvinfer crops none",
            "Use acmix-deploy serve or package triton --backend python.",
        )
    if head.task == "obb":
        raise UserError(
            f"{path} is of the task obb, and rotated boxes are not read for DeepStream",
            "Use acmix-deploy serve or package triton --backend python.",
        )
    if not head.classes:
        raise UserError(
            f"{path} tells no names of its classes, so that their number is not known", "Export it with its names."
        )
    if network.metadata.letterbox.fit == "crop":
        raise UserError(f"the images of {path} are cropped, and nvinfer crops none", "Use acmix-deploy serve.")
    if network.batches and network.batches[0] > 1:
        raise UserError(
            f"{path} is built for {network.batches[0]} images or more, and nvinfer runs single ones too",
            "Build it with --min 1,...",
        )
    if not network.manifest and precision_of(path) == "int8":
        raise UserError(
            f"{path} is quantised, and nvinfer builds engines in INT8 from calibration tables alone",
            "Build the engine, and package that: acmix-deploy build.",
        )


def _build(network: Network, inference: _Groups) -> list[str]:
    """The command that makes the engine of an ONNX file as nvinfer would."""
    if network.manifest:
        return []
    settings = inference["property"]
    words = ["trtexec", f"--onnx={network.path.name}", f"--saveEngine={settings['model-engine-file']}"]
    words += ["--fp16"] * (settings["network-mode"] == _MODES["float16"])
    if not all(isinstance(dim, int) for dim in network.input.dims):
        shape = "x".join(map(str, (settings["batch-size"], *network.shape[1:])))
        words += [f"--{which}Shapes={network.input.name}:{shape}" for which in ("min", "opt", "max")]
    if network.library:
        words.append(f"--staticPlugins={_LIBRARY}/{network.library.name}")
    return [shlex.join(words)]


def _labels(network: Network) -> list[str]:
    """Of every class. nvinfer reads a line as labels with semicolons between, and passes over empty lines."""
    labels = [network.metadata.names.get(kind, str(kind)) for kind in range(network.head.classes)]
    for kind, label in enumerate(labels):
        if not label.strip() or ";" in label or not label.isprintable():
            raise UserError(
                f"class {kind} is called {label!r:.60}, which cannot be a line of {LABELS}: nvinfer splits them at "
                "semicolons and passes over empty lines",
                "Rename the class in the model's names.",
            )
    return labels


def _uri(source: str) -> str:
    """Raises UserError: it cannot be written as a value, or is of another kind."""
    scheme, colon, _ = source.partition("://")
    if not source or not source.isprintable() or source != source.strip():
        raise UserError(f"the source is {source!r:.60}", "Give an address such as rtsp://..., or the path of a video.")
    is_camera = source.isdecimal() or source.startswith("/dev/")
    if is_camera or (colon and scheme not in _SCHEMES):
        raise UserError(
            f"the source is {source}, and sources are a video or begin with {', '.join(_SCHEMES)}",
            "For a camera of the device edit deepstream_app_config.txt: types 1 and 5 of [source0].",
        )
    return source if colon else Path(source).absolute().as_uri()


def _inference(network: Network, function: str, cluster: int, confidence: float) -> _Groups:
    head, letterbox = network.head, network.metadata.letterbox
    batch = _batch(network)
    precision = network.manifest.precision if network.manifest else precision_of(network.path)
    mode = _MODES.get(precision or "float32", 0)
    pads = letterbox.fit == "pad"
    masks = head.task == "segment"
    engine = network.path.name
    if not network.manifest:
        engine = f"{engine}_b{batch}_gpu0_{ {0: 'fp32', 2: 'fp16'}[mode] }.engine"
    name = "parse-bbox-instance-mask-func-name" if masks else "parse-bbox-func-name"
    attributes: dict[str, object] = {"pre-cluster-threshold": f"{confidence:.9g}"}
    if cluster == _NMS:
        attributes["nms-iou-threshold"] = IOU
    if not masks:  # it would leak the masks of those that it leaves out
        attributes["topk"] = network.metadata.most
    return {
        "property": {
            "gpu-id": 0,
            "gie-unique-id": 1,
            "process-mode": 1,
            "interval": 0,
            "network-type": 3 if masks else 0,
            "network-mode": mode,
            "batch-size": batch,
            **({} if network.manifest else {"onnx-file": network.path.name}),
            "model-engine-file": engine,
            "labelfile-path": LABELS,
            "num-detected-classes": head.classes,
            "infer-dims": ";".join(map(str, network.shape[1:])),
            "model-color-format": 0,
            "net-scale-factor": repr(1 / 255),
            "offsets": "0;0;0",
            "maintain-aspect-ratio": int(pads),
            "symmetric-padding": int(pads and letterbox.center),
            "scaling-filter": 1,
            "crop-objects-to-roi-boundary": 1,
            "cluster-mode": cluster,
            **({"output-instance-mask": 1, "segmentation-threshold": 0.5} if masks else {}),
            **({"output-tensor-meta": 1} if head.task == "pose" else {}),
            "custom-lib-path": _BUILT,
            name: function,
        },
        "class-attrs-all": attributes,
    }


def _batch(network: Network) -> int:
    """Images in a run at most."""
    if not network.batches:
        return network.shape[0]
    return network.batches[1] or 1


def _application(network: Network, uri: str) -> _Groups:
    live = uri.startswith(("rtsp://", "rtsps://"))
    camera = {"type": 4, "uri": uri, "latency": 200, "rtsp-reconnect-interval-sec": 10}
    return {
        "application": {"enable-perf-measurement": 1, "perf-measurement-interval-sec": 5},
        "tiled-display": {"enable": 1, "rows": 1, "columns": 1, "width": 1280, "height": 720},
        "source0": {"enable": 1, **(camera if live else {"type": 3, "uri": uri, "num-sources": 1})},
        "streammux": {
            "live-source": int(live),
            "batch-size": 1,
            "batched-push-timeout": 40000,
            "width": 1920,
            "height": 1080,
            "enable-padding": 1,
        },
        "primary-gie": {"enable": 1, "gie-unique-id": 1, "batch-size": _batch(network), "config-file": CONFIG},
        "osd": {
            "enable": 1,
            "border-width": 3,
            "text-size": 15,
            **({"display-mask": 1} if network.head.task == "segment" else {}),
        },
        "sink0": {"enable": 1, "type": 1, "sync": 0},
        "sink1": {"enable": 0, "type": 2, "sync": 0},
        "sink2": {"enable": 0, "type": 3, "sync": 0, "container": 1, "codec": 1, "output-file": "out.mp4"},
        "tests": {"file-loop": 0},
    }


def _ini(groups: _Groups) -> str:
    texts = (
        "\n".join((f"[{name}]", *(f"{key}={value}" for key, value in entries.items())))
        for name, entries in groups.items()
    )
    return "\n\n".join(texts) + "\n"


def _header(network: Network) -> str:
    """What the library is compiled for."""
    head = network.head
    prototypes = next((node for node in network.outputs if node.name == head.prototypes), None)
    extra = {"pose": head.keypoints[0] * head.keypoints[1], "segment": prototypes and prototypes.dims[1]}.get(head.task)
    return f"""// The outputs that the library reads.
#pragma once

#include <cstddef>

namespace acmix {{

enum class Layout {{ anchors, rows, queries, ranked_queries, objectness }};

constexpr Layout layout = Layout::{head.layout.replace(" ", "_")};
constexpr char output[] = {_quoted(head.output)};
constexpr char prototypes[] = {_quoted(head.prototypes)};
constexpr std::size_t classes = {head.classes};
// Values of a box behind its scores.
constexpr std::size_t extra = {extra or 0};
// Of boxes with masks the library keeps so many in a frame, none of which overlap by more.
constexpr std::size_t most = {MOST};
constexpr float iou = {IOU}f;
constexpr char plugin[] = {_quoted(network.library.name if network.library else "")};

}}  // namespace acmix
"""


def _quoted(text: str) -> str:
    """A string of C++, byte by byte."""
    return (
        '"'
        + "".join(
            chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}" for byte in text.encode()
        )
        + '"'
    )


def _source(name: str) -> str:
    return (
        resources.files("acmix_deploy.serving.deepstream").joinpath(_LIBRARY).joinpath(name).read_text(encoding="utf-8")
    )


def _notes(network: Network, confidence: float) -> list[str]:
    letterbox, suppressed = network.metadata.letterbox, network.metadata.suppression
    notes = []
    if suppressed and (hidden := suppressed.hidden("the file", confidence)):
        notes.append(hidden)
    if letterbox.fit == "pad" and letterbox.padding_value != _BLACK:
        notes.append(
            f"nvinfer pads with black, and the model was trained with {letterbox.padding_value}: measure what that "
            f"costs on your images with acmix-deploy verify {network.path.name} --images DIR --pad {_BLACK}"
        )
    if letterbox.fit == "pad" and not letterbox.scaleup:
        notes.append("the model's rule enlarges no small image, and nvinfer enlarges all")
    if network.head.task == "pose":
        notes.append(
            "keypoints are not drawn: they are in the tensor metadata (NvDsInferTensorMeta) of each frame, for an "
            "application of yours"
        )
    return notes


def _readme(network: Network, commands: list[str], notes: list[str]) -> str:
    manifest = network.manifest
    if manifest:
        engine = (
            f"`{network.path.name}` is an engine of {manifest.machine.tensorrt} for {manifest.machine.device}, and "
            "runs nowhere else. For another device build it there, and package that: `acmix-deploy build`."
        )
    else:
        engine = (
            f"The second makes an engine of `{network.path.name}`, in minutes. Left out, nvinfer makes the same one "
            "when it first starts. To have it compute in half precision set `network-mode=2` and the `fp32` of "
            "`model-engine-file` to `fp16`; for INT8 or strong types build the engine before, and "
            "package that: `acmix-deploy build`."
        )
    plugin = ""
    if network.library:
        plugin = (
            f"`{_LIBRARY}/{network.library.name}` has the model's TensorRT layers. The parser's library loads it from "
            "beside itself as soon as nvinfer loads that, which is before it reads the engine.\n\n"
        )
    lines = "\n".join(commands)
    most = f"- nvinfer keeps up to {MOST} boxes of each class where `detect` keeps {MOST} in all.\n"
    if network.head.task == "segment" or network.head.selects:
        most = ""
    differs = "".join(f"- {note}.\n" for note in notes)
    return f"""# {network.path.stem} on DeepStream

On the device, in this folder:

```
{lines}
```

The first needs DeepStream's headers (`DEEPSTREAM`, by default `/opt/nvidia/deepstream/deepstream`), those of CUDA
(`CUDA`, by default `/usr/local/cuda`) and of TensorRT with its ONNX parser (`TENSORRT`, by default where the compiler
looks). With CMake: `cmake -S {_LIBRARY} -B build && cmake --build build`.

{engine}

{plugin}`{CONFIG}` is for the element nvinfer of any application. In `{APP}`:

- `uri` of `[source0]` is what it looks at, and `width` and `height` of `[streammux]` the size that frames are brought
  to: that of the source keeps them sharp;
- nothing is shown: `[sink0]` counts images per second. `enable=1` in `[sink1]` opens a window, in `[sink2]` it writes a
  video, by the hardware's encoder (`enc-type=1` where there is none);
- the score above which there is a detection is `pre-cluster-threshold` in `{CONFIG}`; a group `[class-attrs-N]`
  with the same keys is for class N alone.

## What differs from acmix-deploy detect

{differs}- Images are scaled by DeepStream, with other rounding.
- A box that reaches beyond the left or upper edge of the frame is moved to that edge with its size, by nvinfer.
{most}"""
