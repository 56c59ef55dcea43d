"""What stands for DeepStream: NVIDIA's headers, a program that calls a parser, and nvinfer's clustering in NumPy."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests import ROOT
from tests.plugin.parts import header_sets

CUDA_STAND_IN = ROOT / "plugins/tests/cpu"
"""What NvInfer.h includes of CUDA, as it is declared there."""


def deepstream_sets() -> list[Path]:
    """Folders with DeepStream's headers, the oldest release first."""
    folder = os.environ.get("ACMIX_DEEPSTREAM_HEADERS")
    return sorted(path.parent for path in Path(folder).glob("*/nvdsinfer_custom_impl.h")) if folder else []


def tensorrt_sets() -> list[Path]:
    """Folders with TensorRT's headers that have the ONNX parser's beside them."""
    return [folder for folder in header_sets() if (folder / "NvOnnxParser.h").is_file()]


def need_headers() -> tuple[Path, Path]:
    """The newest of both. Skips where there are none, or no compiler."""
    if not deepstream_sets():
        pytest.skip("no headers of DeepStream: name a folder of header sets in ACMIX_DEEPSTREAM_HEADERS")
    if not tensorrt_sets():
        pytest.skip(
            "no headers of TensorRT with NvOnnxParser.h: name a folder of header sets in ACMIX_TENSORRT_HEADERS"
        )
    if not shutil.which("g++"):
        pytest.skip("no g++")
    return deepstream_sets()[-1], tensorrt_sets()[-1]


def includes(deepstream: Path, tensorrt: Path) -> list[str]:
    return [word for folder in (deepstream, tensorrt, CUDA_STAND_IN) for word in ("-isystem", str(folder))]


def like_sdk(folder: Path, deepstream: Path) -> dict[str, str]:
    """Variables of the Makefile by which it finds headers as the SDK and CUDA have them, in ``folder``."""
    (folder / "sdk/sources").mkdir(parents=True)
    (folder / "sdk/sources/includes").symlink_to(deepstream)
    (folder / "cuda").mkdir()
    (folder / "cuda/include").symlink_to(CUDA_STAND_IN)
    return {"DEEPSTREAM": str(folder / "sdk"), "CUDA": str(folder / "cuda")}


class Object(NamedTuple):
    """What a parser gives."""

    kind: int
    box: np.ndarray
    """[4], corners in pixels of the network."""
    score: float
    mask: np.ndarray | None = None
    """[h, w], 0 to 1."""


class Layer(NamedTuple):
    """An output as nvinfer hands it over."""

    name: str | None
    array: np.ndarray
    type: int = 0
    has_buffer: bool = True
    dims: tuple[int, ...] | None = None


class Answer(NamedTuple):
    taken: bool
    objects: list[Object]
    log: str


class Parser(NamedTuple):
    """A library and the program that calls it."""

    library: Path
    program: Path

    def __call__(
        self,
        layers: list[Layer],
        size: tuple[int, int],
        classes: int,
        thresholds: list[float],
        function: str = "NvDsInferParseAcmix",
    ) -> Answer:
        """What the parser makes of one frame's layers, whose ``size`` is (height, width)."""
        folder = self.program.parent
        lines = []
        for index, layer in enumerate(layers):
            file = folder / f"layer{index}"
            file.write_bytes(layer.array.tobytes())
            dims = ",".join(map(str, layer.array.shape if layer.dims is None else layer.dims))
            lines.append(f"{layer.name or '-'} {layer.type} {dims} {file if layer.has_buffer else '-'}\n")
        form = "masks" if function.endswith("Masks") else "boxes"
        numbers = [size[1], size[0], classes, ",".join(map(str, thresholds))]
        done = subprocess.run(
            [self.program, self.library, function, form, *map(str, numbers)],
            input="".join(lines), capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode in (0, 3), done.stdout[-1000:] + done.stderr
        return Answer(done.returncode == 0, [_object(line) for line in done.stdout.splitlines()], done.stderr)


def _object(line: str) -> Object:
    kind, left, top, width, height, score, *mask = line.split()
    start = np.array([float(left), float(top)])
    box = np.concatenate((start, start + np.array([float(width), float(height)]))).astype(np.float32)
    pixels = np.array(mask[2:], np.float32).reshape(int(mask[0]), int(mask[1])) if mask else None
    return Object(int(kind), box, float(score), pixels)


def build(folder: Path, *flags: str, program: Path | None = None) -> Parser:
    """The library of a package, and the program that calls it where none is given, with the newest headers."""
    deepstream, tensorrt = need_headers()
    compiler = ["g++", "-std=c++14", "-Wall", "-Wextra", "-Werror", *flags, *includes(deepstream, tensorrt)]
    parser = Parser(folder / "library/libacmix_parser.so", program or folder / "harness")
    source = folder / "library/parser.cpp"
    commands = [[*compiler, "-fPIC", "-shared", "-o", parser.library, source, "-ldl"]]
    if not program:
        commands.append([*compiler, "-o", parser.program, Path(__file__).with_name("harness.cpp"), "-ldl"])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return parser


def read_config(path: Path) -> configparser.ConfigParser:
    """A file of GLib's key-file format."""
    config = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",), strict=True)
    config.optionxform = str  # type: ignore[method-assign,assignment]
    assert config.read(path) == [str(path)]
    return config


def clustered(objects: list[Object], config: configparser.ConfigParser) -> list[Object]:
    """What nvinfer keeps, by class: cluster-mode 2 is non-maximum suppression, 4 is nothing; then the topk best.

    Source: https://docs.nvidia.com/metropolis/deepstream/dev-guide/text/DS_plugin_gst-nvinfer.html, "Clustering
    algorithms supported by nvinfer".
    """
    attributes = config["class-attrs-all"]
    mode, most = config["property"]["cluster-mode"], int(attributes.get("topk", "-1"))
    assert mode in ("2", "4")
    kept: list[Object] = []
    for kind in range(int(config["property"]["num-detected-classes"])):
        of_kind = [
            one for one in objects if one.kind == kind and one.score >= float(attributes["pre-cluster-threshold"])
        ]
        of_kind.sort(key=lambda one: -one.score)
        if mode == "2":
            best: list[Object] = []
            for one in of_kind:
                if all(overlap(one.box, other.box) <= float(attributes["nms-iou-threshold"]) for other in best):
                    best.append(one)
            of_kind = best
        kept += of_kind[: most if most >= 0 else None]
    return sorted(kept, key=lambda one: -one.score)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = float(np.prod(sides.clip(0)))
    areas = [float(np.prod(box[2:] - box[:2])) for box in (one, other)]
    return shared / (sum(areas) - shared) if sum(areas) > shared else 0.0


def fixed(
    path: Path,
    outputs: Mapping[str, np.ndarray],
    *,
    size: tuple[int, int] = (32, 32),
    element: int = TensorProto.FLOAT,
    batch: int | str = "batch",
    **metadata: str,
) -> Path:
    """A file that gives the same arrays [1, ...] for every image."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Cast", ["mean"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "nothing"], ["zero"]),
    ]
    initializers = [numpy_helper.from_array(np.array(0, np.float32), "nothing")]
    for name, array in outputs.items():
        initializers.append(numpy_helper.from_array(np.array([0, *[1] * (array.ndim - 1)]), f"{name}.shape"))
        initializers.append(numpy_helper.from_array(array, f"{name}.values"))
        nodes.append(helper.make_node("Reshape", ["zero", f"{name}.shape"], [f"{name}.zero"]))
        nodes.append(helper.make_node("Add", [f"{name}.zero", f"{name}.values"], [name]))
    graph = helper.make_graph(
        nodes,
        "fixed",
        [helper.make_tensor_value_info("images", element, [batch, 3, *size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *a.shape[1:]]) for name, a in outputs.items()],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {"imgsz": str(list(size)), **metadata})
    onnx.save(model, path)
    return path
