"""The parser's library against NVIDIA's headers, and what it finds against :class:`Detector`.

Headers are named by two variables, see CONTRIBUTING.md:

    ACMIX_DEEPSTREAM_HEADERS    folder with one folder of headers a release, e.g. v9.0.0, v9.1.0
    ACMIX_TENSORRT_HEADERS      the same of TensorRT, with NvOnnxParser.h in the folders
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from acmix_deploy.detection.images import Letterbox, Placement, tensor
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.processing import Processing, attach
from acmix_deploy.serving.deepstream.folder import package
from acmix_deploy.serving.detector import Detector
from scripts import shapes
from tests.serving.deepstream.parts import (
    Layer,
    Object,
    Parser,
    build,
    clustered,
    deepstream_sets,
    fixed,
    includes,
    like_sdk,
    need_headers,
    overlap,
    read_config,
    tensorrt_sets,
)
from tests.serving.parts import tiny

cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")

NAMES = {"names": "{0: 'a', 1: 'b', 2: 'c'}"}
WIDTH, HEIGHT = 96, 64


def anchors(seed: int = 0, *, extra: int = 0, count: int = 200) -> np.ndarray:
    """[1, 4 + 3 + extra, count] of boxes in clusters, none beyond the edges, where detect measures overlaps before it
    cuts boxes off, and nvinfer afterwards. No two scores are equal."""
    random = np.random.default_rng(seed)
    centres = random.uniform((20, 20), (WIDTH - 20, HEIGHT - 20), (count // 6 + 1, 2))[
        random.integers(0, count // 6 + 1, count)
    ]
    boxes = np.hstack((centres, np.full((count, 2), 20.0))) + random.normal(0, 2, (count, 4)).clip(-6, 6)
    scores = random.permutation(3 * count).reshape(count, 3) / (3 * count)
    return np.hstack((boxes, scores, random.normal(0, 2, (count, extra)))).T[None].astype(np.float32)


def rows_of(boxes: np.ndarray) -> np.ndarray:
    """Anchors as rows [1, 20, 6 + extra] of corners, score and class, of boxes that do not touch each other."""
    values = boxes[0].T[:20].copy()
    values[:, :2] = np.stack(np.meshgrid(np.arange(5) * 18 + 9, np.arange(4) * 15 + 8), -1).reshape(-1, 2)
    values[:, 2:4] = 10
    corners = np.hstack((values[:, :2] - 5, values[:, :2] + 5))
    kinds = values[:, 4:7].argmax(axis=1)[:, None]
    return np.hstack((corners, values[:, 4:7].max(axis=1)[:, None], kinds, values[:, 7:]))[None].astype(np.float32)


def heads() -> dict[str, tuple[dict[str, np.ndarray], dict[str, str]]]:
    """Outputs and metadata of a file of every layout that is parsed."""
    plain = anchors()
    values = plain[0].T
    shares = values[:20].copy()
    shares[:, :2] = rows_of(plain)[0, :, :2] + 5
    shares[:, 2:4] = 10
    shares[:, :4] /= (WIDTH, HEIGHT, WIDTH, HEIGHT)
    ranked = np.hstack((shares[:, :4], rows_of(plain)[0, :, 4:]))
    presence = np.random.default_rng(1).uniform(0.3, 1, (len(values), 1))
    points = anchors(3, extra=6)
    masks, waves = anchors(5, extra=5), np.random.default_rng(4).uniform(0, 0.6, (5, 3))
    rows, columns = np.mgrid[:16, :24]
    prototypes = np.stack([np.cos(wave[0] * rows + wave[1] * columns + 9 * wave[2]) for wave in waves])[None]
    prototypes[:, 0] = 1
    masks[:, 7] = 2  # none is empty
    masks[:, 8:] = masks[:, 8:].clip(-1, 1)
    return {
        "anchors": ({"output0": plain}, {"task": "detect"}),
        "rows": ({"output0": rows_of(plain)}, {"task": "detect", "end2end": "True"}),
        "queries": ({"output0": shares[None]}, {"task": "detect", "head": "RTDETRDecoder"}),
        "ranked queries": ({"output0": ranked[None]}, {"task": "detect", "layout": "ranked queries"}),
        "objectness": (
            {"output0": np.hstack((values[:, :4], presence, values[:, 4:]))[None]},
            {"task": "detect", "layout": "objectness"},
        ),
        "pose": ({"output0": points}, {"task": "pose", "kpt_shape": "[2, 3]"}),
        "segment": ({"output0": masks, "output1": prototypes}, {"task": "segment"}),
        "segment rows": (
            {"output0": rows_of(masks), "output1": prototypes},
            {"task": "segment", "end2end": "True"},
        ),
    }


@pytest.fixture(scope="module")
def parsers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Parser]]:
    """By the name of a head: its file, the package, and the parser that was built there, by sanitizers watched."""
    need_headers()
    built: dict[str, tuple[Path, Path, Parser]] = {}

    def parser_of(name: str) -> tuple[Path, Path, Parser]:
        if name not in built:
            base = tmp_path_factory.mktemp(name.replace(" ", "_"))
            outputs, metadata = heads()[name]
            arrays = {key: array.astype(np.float32) for key, array in outputs.items()}
            model = fixed(base / "model.onnx", arrays, size=(HEIGHT, WIDTH), **metadata, **NAMES)
            package(model, base / "ds", confidence=0.5)
            program = next((parser.program for _, _, parser in built.values()), None)
            parser = build(base / "ds", "-fsanitize=address,undefined", program=program)
            built[name] = model, base / "ds", parser
        return built[name]

    return parser_of


def layers_of(outputs: dict[str, np.ndarray]) -> list[Layer]:
    """As nvinfer gives those of one frame: without the batch, in any order."""
    return [Layer(name, array[0].astype(np.float32)) for name, array in reversed(outputs.items())]


def thresholds(folder: Path) -> list[float]:
    config = read_config(folder / "config_infer_primary.txt")
    classes = int(config["property"]["num-detected-classes"])
    return [float(config["class-attrs-all"]["pre-cluster-threshold"])] * classes


def found_by(folder: Path, parser: Parser, outputs: dict[str, np.ndarray]) -> list[Object]:
    """What DeepStream has after clustering."""
    config = read_config(folder / "config_infer_primary.txt")
    _, height, width = map(int, config["property"]["infer-dims"].split(";"))
    limits = thresholds(folder)
    names = [key for key in config["property"] if key.startswith("parse-bbox")]
    (function,) = (config["property"][key] for key in names)
    answer = parser(layers_of(outputs), (height, width), len(limits), limits, function)
    assert (answer.taken, answer.log) == (True, "")
    return clustered(answer.objects, config)


def assert_same(objects: list[Object], right: Any, placement: Placement) -> None:
    assert [one.kind for one in objects] == right.classes.tolist()
    np.testing.assert_allclose([one.score for one in objects], right.scores, atol=1e-5)
    boxes = placement.undo(np.array([one.box for one in objects], np.float32))
    np.testing.assert_allclose(boxes, right.boxes, atol=1)


@pytest.mark.parametrize("name", heads())
def test_every_head_is_read_as_detect_reads_it(name: str, parsers: Any) -> None:
    model, folder, parser = parsers(name)
    session = onnxruntime.InferenceSession(model)
    image = np.zeros((1, 3, HEIGHT, WIDTH), np.float32)
    outputs = dict(
        zip([node.name for node in session.get_outputs()], session.run(None, {"images": image}), strict=True)
    )
    objects = found_by(folder, parser, outputs)
    with Detector.load(model, confidence=0.5) as detector:
        (right,) = detector([np.zeros((HEIGHT, WIDTH, 3), np.uint8)])
    whole = Placement((HEIGHT, WIDTH), (HEIGHT, WIDTH), 0, 0, (HEIGHT, WIDTH))
    assert len(objects) > 3
    assert_same(objects, right, whole)
    for one, mask in zip(objects, right.masks or (), strict=False):
        assert one.mask is not None
        drawn = np.zeros((HEIGHT, WIDTH), bool)
        drawn[mask.top : mask.top + mask.pixels.shape[0], mask.left : mask.left + mask.pixels.shape[1]] = mask.pixels
        left, top, right_, bottom = np.round(one.box).astype(int)
        shown = cv2.resize(one.mask, (max(right_ - left, 1), max(bottom - top, 1))) > 0.5
        part = drawn[top : top + shown.shape[0], left : left + shown.shape[1]]
        assert (shown[: part.shape[0], : part.shape[1]] == part).mean() > 0.85


@pytest.mark.parametrize("suppresses", [False, True])
def test_shapes_are_found_as_detect_finds_them(suppresses: bool, shapes_model: Path, tmp_path: Path) -> None:
    """By nvinfer's suppression, and by the file's own."""
    need_headers()
    model = onnx.load(shapes_model)
    if suppresses:
        attach(model, Processing(suppression=Suppression()))
    onnx.save(model, tmp_path / "model.onnx")
    package(tmp_path / "model.onnx", tmp_path / "ds")
    parser = build(tmp_path / "ds", "-O2")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    letterbox = Letterbox()
    found = 0
    with Detector.load(tmp_path / "model.onnx") as detector:
        for scene, (height, width) in zip(shapes.images(4, 6), [(160, 160), (120, 210), (300, 180)] * 2, strict=True):
            image = cv2.resize(scene.image, (width, height))
            (output,) = session.run(None, {"images": tensor(letterbox(image, 160, 160))[None]})
            (right,) = detector([image])
            objects = found_by(tmp_path / "ds", parser, {session.get_outputs()[0].name: output})
            assert_same(objects, right, letterbox.place(image.shape, 160, 160))
            found += len(objects)
    assert found > 20


def test_thresholds_are_of_classes(parsers: Any) -> None:
    _, _, parser = parsers("anchors")
    output = anchors()[0]
    best, kinds = output[4:].max(axis=0), output[4:].argmax(axis=0)
    limits = [0.3, 0.95, 0.6]
    answer = parser([Layer("output0", output)], (HEIGHT, WIDTH), 3, limits)
    assert len(answer.objects) == (best > np.array(limits)[kinds]).sum()
    assert {one.kind for one in answer.objects} == {0, 1, 2}


def test_boxes_end_at_the_edges(parsers: Any) -> None:
    _, _, parser = parsers("anchors")
    output = np.zeros((7, 4), np.float32)
    output[:5] = np.array(
        [[2, 30, 20, 20, 0.9], [90, 60, 20, 20, 0.8], [48, 32, 500, 500, 0.7], [200, 200, 20, 20, 0.6]], np.float32
    ).T
    answer = parser([Layer("output0", output)], (HEIGHT, WIDTH), 3, [0.5] * 3)
    boxes = [one.box.tolist() for one in answer.objects]
    assert boxes == [[0, 20, 12, 40], [80, 50, 96, 64], [0, 0, 96, 64], [96, 64, 96, 64]]


def changed(array: np.ndarray, place: Any, value: float) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


GOOD = anchors()[0]
BEST = int(GOOD[4:].max(axis=0).argmax())
WORST = int(GOOD[4:].max(axis=0).argmin())
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([], "no output output0"),
        ([Layer("output", GOOD), Layer(None, GOOD)], "no output output0, but output, one without a name"),
        ([Layer("output0", GOOD.astype(np.float16), 1)], "not in float32"),
        ([Layer("output0", GOOD.astype(np.int8), 2)], "not in float32"),
        ([Layer("output0", GOOD, has_buffer=False)], "no buffer"),
        ([Layer("output0", GOOD[:-1])], r"output0 is \[6, 200\], and a box of 3 classes has 7 values"),
        ([Layer("output0", GOOD.T)], r"output0 is \[200, 7\]"),
        ([Layer("output0", GOOD[None])], r"output0 is \[1, 7, 200\], and 2 axes are expected"),
        ([Layer("output0", GOOD, dims=(1,) * 8)], "2 axes are expected"),
        ([Layer("output0", GOOD.ravel())], "2 axes are expected"),
        ([Layer("output0", changed(GOOD, (0, BEST), NAN))], "a box that is not finite"),
        ([Layer("output0", changed(GOOD, (3, BEST), INF))], "a box that is not finite"),
        ([Layer("output0", changed(GOOD, (5, WORST), NAN))], "scores that are not finite"),
        ([Layer("output0", changed(GOOD, (4, WORST), NAN))], "scores that are not finite"),
        ([Layer("output0", changed(GOOD, (4, WORST), INF))], "the score inf"),
        ([Layer("output0", changed(GOOD, (5, WORST), 37))], "the score 37.0"),
        ([Layer("output0", changed(GOOD, (slice(4, 7), WORST), -3))], "the score -3.0"),
    ],
)
def test_outputs_that_no_model_gives(layers: list[Layer], said: str, parsers: Any) -> None:
    _, _, parser = parsers("anchors")
    answer = parser(layers, (HEIGHT, WIDTH), 3, [0.5] * 3)
    assert (answer.taken, answer.objects) == (False, [])
    (line,) = answer.log.splitlines()
    assert re.search(f"^acmix: .*{said}", line)


@pytest.mark.parametrize(("classes", "limits"), [(0, [0.0]), (2, [0.5] * 2), (4, [0.5] * 4), (3, [0.5] * 2)])
def test_other_numbers_of_classes(classes: int, limits: list[float], parsers: Any) -> None:
    _, _, parser = parsers("anchors")
    answer = parser([Layer("output0", GOOD)], (HEIGHT, WIDTH), classes, limits)
    assert not answer.taken
    assert answer.log.startswith(f"acmix: num-detected-classes is {classes} ")
    assert answer.log.count("\n") == 1


def test_what_does_not_count_spoils_nothing(parsers: Any) -> None:
    _, _, parser = parsers("anchors")
    right = parser([Layer("output0", GOOD)], (HEIGHT, WIDTH), 3, [0.5] * 3)
    answer = parser([Layer("output0", changed(GOOD, (0, WORST), NAN))], (HEIGHT, WIDTH), 3, [0.5] * 3)
    assert (answer.taken, answer.log) == (True, "")
    assert len(answer.objects) == len(right.objects) > 3
    empty = parser([Layer("output0", np.zeros((7, 0), np.float32))], (HEIGHT, WIDTH), 3, [0.5] * 3)
    assert (empty.taken, empty.objects) == (True, [])


def test_rows_of_no_class(parsers: Any) -> None:
    _, _, parser = parsers("rows")
    good = rows_of(anchors())[0]
    for kind in (3, -1, 0.5, NAN, 1e30):
        answer = parser([Layer("output0", changed(good, (0, 5), kind) * 1)], (HEIGHT, WIDTH), 3, [0.0] * 3)
        assert not answer.taken
        assert "has the class" in answer.log
    padded = np.vstack((good, np.zeros((5, 6), np.float32)))
    assert len(parser([Layer("output0", padded)], (HEIGHT, WIDTH), 3, [0.0] * 3).objects) == len(good)


def test_masks_that_no_model_gives(parsers: Any) -> None:
    _, _, parser = parsers("segment")
    outputs, _ = heads()["segment"]
    prototypes, rows = layers_of(outputs)
    for other, said in (
        (prototypes._replace(name="output2"), "no output output1"),
        (prototypes._replace(array=prototypes.array[:4]), r"5 masks are expected"),
        (prototypes._replace(array=prototypes.array[:, :0]), r"5 masks are expected"),
        (prototypes._replace(array=changed(prototypes.array, (1, 2, 2), NAN)), "not finite"),
        (prototypes._replace(has_buffer=False), "no buffer"),
        (prototypes._replace(array=prototypes.array.astype(np.float16), type=1), "not in float32"),
    ):
        answer = parser([rows, other], (HEIGHT, WIDTH), 3, [0.5] * 3, "NvDsInferParseAcmixMasks")
        assert (answer.taken, answer.objects) == (False, [])
        assert re.search(said, answer.log)
        assert answer.log.count("\n") == 1
    answer = parser([rows, prototypes], (HEIGHT, WIDTH), 3, [0.1] * 3, "NvDsInferParseAcmixMasks")
    boxes = [(one.kind, one.box) for one in answer.objects]
    assert len(boxes) > 10
    for place, (kind, box) in enumerate(boxes):
        assert all(overlap(box, other) <= 0.7 + 1e-5 for same, other in boxes[:place] if same == kind)


def test_masks_at_the_edges(parsers: Any) -> None:
    """Of boxes that reach beyond the network, and of one that lies outside, no value is read that is not there."""
    _, _, parser = parsers("segment")
    rows = np.zeros((4 + 3 + 5, 5), np.float32)
    rows[:5] = np.array(
        [
            [0, 0, 20, 20, 0.9],
            [96, 64, 20, 20, 0.8],
            [48, 32, 500, 500, 0.7],
            [300, 300, 2, 2, 0.6],
            [48, 32, 0, 0, 0.55],
        ]
    ).T
    rows[7] = [3, -3, 3, 3, 3]
    prototypes = np.zeros((5, 16, 24), np.float32)
    prototypes[0] = 1
    layers = [Layer("output1", prototypes), Layer("output0", rows)]
    answer = parser(layers, (HEIGHT, WIDTH), 3, [0.5] * 3, "NvDsInferParseAcmixMasks")
    assert (answer.taken, answer.log) == (True, "")
    assert [one.mask.shape for one in answer.objects if one.mask is not None] == [
        (5, 5),
        (5, 5),
        (32, 48),
        (1, 1),
        (1, 1),
    ]
    for one, sign in zip(answer.objects, (1, -1, 1, 1, 1), strict=True):
        np.testing.assert_allclose(one.mask, 1 / (1 + np.exp(-3 * sign)), atol=1e-5)


@pytest.mark.soak
def test_the_library_compiles_with_all_headers(tmp_path: Path) -> None:
    check_compiles([(one, other) for one in deepstream_sets() for other in tensorrt_sets()], tmp_path)


def test_the_library_compiles_with_each_header(tmp_path: Path) -> None:
    newest = need_headers()
    pairs = [(one, newest[1]) for one in deepstream_sets()] + [(newest[0], one) for one in tensorrt_sets()]
    check_compiles(list(dict.fromkeys(pairs)), tmp_path)


def check_compiles(pairs: list[tuple[Path, Path]], folder: Path) -> None:
    """Without a warning. The prototypes are checked by NVIDIA's macros, which the source ends with."""
    need_headers()
    package(tiny(folder / "tiny.onnx"), folder / "ds")
    source = folder / "ds/library/parser.cpp"
    text = source.read_text()
    assert "CHECK_CUSTOM_PARSE_FUNC_PROTOTYPE(NvDsInferParseAcmix);" in text
    assert "CHECK_CUSTOM_INSTANCE_MASK_PARSE_FUNC_PROTOTYPE(NvDsInferParseAcmixMasks);" in text
    for deepstream, tensorrt in pairs:
        command = ["g++", "-std=c++14", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        done = subprocess.run(
            [*command, *includes(deepstream, tensorrt), source], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), (deepstream, tensorrt)
    changed_source = source.with_name("changed.cpp")
    changed_source.write_text(text.replace("std::vector<NvDsInferObjectDetectionInfo>& objects", "int"))
    done = subprocess.run([*command, *includes(*pairs[0]), changed_source], capture_output=True, text=True, check=False)
    assert "checkFunc_NvDsInferParseAcmix" in done.stderr


def test_it_needs_nothing_that_older_releases_lack(tmp_path: Path) -> None:
    """The documentation of 6.2, 7.0 and 8.0 has no rotation_angle in NvDsInferObjectDetectionInfo, nor has that of 6.2
    the types INT64 and UINT8."""
    deepstream, tensorrt = need_headers()
    older = tmp_path / "older"
    older.mkdir()
    for name in ("nvdsinfer.h", "nvdsinfer_custom_impl.h"):
        shutil.copy(deepstream / name, older)
    text = (older / "nvdsinfer.h").read_text()
    for line in (r"float rotation_angle;", r"INT64 = 4,", r"UINT8 = 5"):
        assert re.search(line, text)
        text = re.sub(line, "", text)
    (older / "nvdsinfer.h").write_text(text)
    check_compiles([(older, tensorrt)], tmp_path)


def test_make_and_cmake_build_it(tmp_path: Path) -> None:
    deepstream, tensorrt = need_headers()
    package(tiny(tmp_path / "tiny.onnx"), tmp_path / "ds")
    built = tmp_path / "ds/library/libacmix_parser.so"
    variables = like_sdk(tmp_path / "like", deepstream) | {"TENSORRT": str(tensorrt)}
    tools = {
        "make": [["make", "-C", tmp_path / "ds/library", *(f"{name}={value}" for name, value in variables.items())]],
        "cmake": [
            ["cmake", "-S", tmp_path / "ds/library", "-B", tmp_path / "build"]
            + [f"-D{name}={value}" for name, value in variables.items()],
            ["cmake", "--build", tmp_path / "build"],
        ],
    }
    tried = [name for name in tools if shutil.which(name)]
    if not tried:
        pytest.skip("neither make nor cmake is installed")
    for name in tried:
        for command in tools[name]:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "warning" not in done.stderr
        assert built.is_file()
        built.unlink()


@pytest.mark.parametrize("there", [True, False])
def test_the_plugin_is_loaded_from_beside_the_library(there: bool, tmp_path: Path) -> None:
    """As soon as the library is, wherever the program was started."""
    need_headers()
    plugin = tmp_path / "lib plug?in.so"
    code = '#include <cstdio>\nstatic struct Said { Said() { std::fprintf(stderr, "the plugin is here\\n"); } } said;\n'
    (tmp_path / "plugin.cpp").write_text(code)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", plugin, tmp_path / "plugin.cpp"], check=True)
    package(tiny(tmp_path / "tiny.onnx"), tmp_path / "ds", plugin=plugin)
    parser = build(tmp_path / "ds")
    if not there:
        (tmp_path / "ds/library" / plugin.name).unlink()
    answer = parser([Layer("output0", np.zeros((5, 4), np.float32))], (32, 32), 1, [0.5])
    assert answer.taken
    if there:
        assert answer.log == "the plugin is here\n"
    else:
        assert answer.log.startswith("acmix: the plugin cannot be loaded: ")
        assert answer.log.count(os.linesep) == 1
