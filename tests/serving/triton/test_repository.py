"""Model repositories for Triton: what its protobuf makes of them, and what runs one after the other as they say."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from google.protobuf import text_format

from acmix_deploy import cli
from acmix_deploy.artifacts import read_artifact, write_artifact
from acmix_deploy.detection.boxes import Detections, decode, suppressed
from acmix_deploy.detection.heads import Head
from acmix_deploy.detection.images import Letterbox, Placement, tensor
from acmix_deploy.detection.metadata import Pixels
from acmix_deploy.detection.suppression import MOST, Suppression
from acmix_deploy.engine_file import header_bytes
from acmix_deploy.errors import UserError
from acmix_deploy.operators import OPERATORS
from acmix_deploy.processing import Processing, attach
from acmix_deploy.serving.detector import Detector
from acmix_deploy.serving.triton.repository import MOUNT, PackageDocument, package
from acmix_deploy.serving.triton.suppression import suppression
from scripts import shapes
from tests import ROOT
from tests.engine.parts import ORIN, make_engine
from tests.plugin.parts import run
from tests.serving.parts import constant, posed, selected, tiny
from tests.serving.triton.parts import assert_equal, found_in

pytest.importorskip("cv2", reason="OpenCV is not installed")

SUFFIXES = ("", ".network", ".boxes")


@pytest.fixture(scope="module")
def schema() -> Any:
    """Triton's own definition of a model configuration, which needs no more of its client than this file."""
    package_ = importlib.util.find_spec("tritonclient")
    if package_ is None or not package_.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    path = Path(package_.submodule_search_locations[0], "grpc/model_config_pb2.py")
    loader = importlib.machinery.SourceFileLoader("model_config_pb2", str(path))
    spec = importlib.util.spec_from_loader("model_config_pb2", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def config_of(schema: Any, folder: Path, name: str) -> Any:
    """Parsed as Triton does it: a field or value that it does not know is an error."""
    config = text_format.Parse((folder / name / "config.pbtxt").read_text(), schema.ModelConfig())
    assert config.name == name
    assert len(list((folder / name / "1").iterdir())) > 0
    return config


def tensors(schema: Any, nodes: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {node.name: (schema.DataType.Name(node.data_type), tuple(node.dims)) for node in nodes}


def outputs_of(batch: tuple[int, ...] = ()) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        "num_detections": ("TYPE_INT32", (*batch, 1)),
        "detection_boxes": ("TYPE_FP32", (*batch, 300, 4)),
        "detection_scores": ("TYPE_FP32", (*batch, 300)),
        "detection_classes": ("TYPE_INT32", (*batch, 300)),
    }


WHOLE = Placement((1 << 20, 1 << 20), (1 << 20, 1 << 20), 0, 0, (1 << 20, 1 << 20))


def predictions(seed: int, images: int, classes: int, anchors: int, dtype: Any = np.float32) -> np.ndarray:
    """Boxes in clusters, so that many overlap. No two scores are equal, whose order would be anybody's."""
    random = np.random.default_rng(seed)
    centres = random.uniform(40, 600, (images, 2, 1 + anchors // 6))
    which = random.integers(0, centres.shape[2], anchors)
    boxes = np.concatenate((centres[:, :, which], np.full((images, 2, anchors), 30.0)), axis=1)
    boxes += random.normal(0, 4, boxes.shape)
    count = images * classes * anchors
    scores = random.permutation(count).reshape(images, classes, anchors) / count
    return np.concatenate((boxes, scores), axis=1).astype(dtype)


@pytest.mark.parametrize(
    ("classes", "anchors", "confidence"), [(1, 1, 0.1), (3, 40, 0.25), (2, 900, 0.0), (5, 4000, 0.5), (80, 500, 0.9)]
)
def test_suppression_finds_what_decode_finds(classes: int, anchors: int, confidence: float) -> None:
    output = predictions(anchors, 3, classes, anchors)
    output[0, 4:] = 0
    output[1, 0, 0], output[1, 4:, 0] = np.inf, confidence / 2
    output[2, 4, -1] = np.nan
    head = Head("detect", "anchors", "predictions", classes)
    graph = suppression(head, ["batch", None, None], confidence, MOST)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    names = [node.name for node in session.get_outputs()]
    answer = dict(zip(names, session.run(None, {"predictions": output}), strict=True))
    right = decode(head, {"predictions": output}, [WHOLE] * 3, confidence=confidence)
    assert len(right[0].scores) == 0
    if anchors > 1:
        assert 0 < max(len(found.scores) for found in right) < anchors
    if anchors == 4000:
        assert len(right[1].scores) == MOST
    assert {name: (array.dtype, array.shape) for name, array in answer.items()} == {
        "num_detections": (np.int32, (3, 1)),
        "detection_boxes": (np.float32, (3, MOST, 4)),
        "detection_scores": (np.float32, (3, MOST)),
        "detection_classes": (np.int32, (3, MOST)),
    }
    assert answer["num_detections"][2] == MOST, "what is not finite does not look like nothing"
    assert np.isnan(answer["detection_scores"][2]).all()
    assert np.isnan(answer["detection_boxes"][2]).all()
    for image, found in enumerate(right[:2]):
        (count,) = answer["num_detections"][image]
        assert count == len(found.scores)
        np.testing.assert_array_equal(answer["detection_scores"][image, :count], found.scores)
        np.testing.assert_array_equal(answer["detection_classes"][image, :count], found.classes)
        # Boxes may leave the picture here: who asks cuts them off.
        corners = answer["detection_boxes"][image, :count]
        np.testing.assert_allclose(corners.clip(0), found.boxes, atol=1e-3)
        assert not any(answer[name][image, count:].any() for name in names[1:])


def test_suppression_of_half_precision() -> None:
    output = predictions(7, 1, 2, 50, np.float16)
    head = Head("detect", "anchors", "predictions", 2)
    graph = suppression(head, output.shape, 0.25, MOST, float16=True)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    answer = dict(zip((n.name for n in session.get_outputs()), session.run(None, {"predictions": output}), strict=True))
    (right,) = decode(head, {"predictions": output}, [WHOLE])
    assert len(right.scores) == answer["num_detections"].item() > 5
    np.testing.assert_array_equal(answer["detection_scores"][0, : len(right.scores)], right.scores)


def test_suppression_of_boxes_with_objectness() -> None:
    output = predictions(9, 2, 4, 60).transpose(0, 2, 1)
    head = Head("detect", "objectness", "predictions", 3)
    graph = suppression(head, ["batch", None, 8], 0.25, MOST)
    answer = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"predictions": output})
    for image, found in enumerate(decode(head, {"predictions": output}, [WHOLE] * 2)):
        assert answer[0][image].item() == len(found.scores) > 1
        np.testing.assert_array_equal(answer[2][image, : len(found.scores)], found.scores)


@pytest.mark.parametrize("confidence", [0.25, 0.6])
def test_rows_of_a_file_that_suppresses_boxes_are_told_apart(confidence: float) -> None:
    output = predictions(8, 2, 3, 60)
    output[1, 4:] = 0
    given = {"predictions": output}
    rows = suppressed(Head("detect", "anchors", "predictions", 3), given, Suppression(confidence=0.3, most=20))
    graph = suppression(Head("detect", "rows", "predictions", 3), ["batch", 20, 6], confidence, 20)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    counts, boxes, scores, kinds = session.run(None, {"predictions": rows})
    for image, left in enumerate(rows):
        right = left[left[:, 4] > confidence]
        count = counts[image].item()
        assert count == len(right)
        np.testing.assert_array_equal(np.column_stack((boxes[image], scores[image], kinds[image]))[:count], right)
        assert not any(array[image, count:].any() for array in (boxes, scores, kinds))
    assert counts[0] > 1


@pytest.mark.parametrize(("count", "dtype"), [(20, np.float32), (400, np.float32), (20, np.float16)])
def test_rows_of_others_in_any_order(count: int, dtype: type) -> None:
    rows = np.zeros((2, count, 6), dtype)
    rows[..., :4] = np.random.default_rng(0).integers(0, 600, (2, count, 4))
    rows[0, :, 4] = np.random.default_rng(1).permutation(count) / count
    rows[0, :, 5] = np.arange(count) % 3
    head, most = Head("detect", "rows", "predictions", 3), min(count, MOST)
    graph = suppression(head, ["batch", count, 6], 0.1, most, float16=dtype == np.float16)
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    counts, boxes, scores, kinds = session.run(None, {"predictions": rows})
    right, nothing = decode(head, {"predictions": rows}, [WHOLE] * 2, confidence=0.1)
    assert counts.ravel().tolist() == [len(right.scores), len(nothing.scores)] == [min(most, count * 9 // 10 - 1), 0]
    for got, wanted in ((boxes, right.boxes), (scores, right.scores), (kinds, right.classes)):
        np.testing.assert_array_equal(got[0, : len(wanted)], wanted)
        assert not got[0, len(wanted) :].any()
        assert not got[1].any()


def test_a_file_of_ultralytics_that_suppresses_boxes_becomes_an_ensemble(schema: Any, tmp_path: Path) -> None:
    package(selected(tmp_path / "told.onnx", args="{'nms': True}"), tmp_path / "repository", confidence=0.5)
    feed = {"images": np.zeros((2, 3, 32, 32), np.float32)}
    answer = run_ensemble(schema, tmp_path / "repository", "told", feed)
    assert answer["num_detections"].ravel().tolist() == [1, 1]
    assert answer["detection_boxes"][:, 0].tolist() == [[8, 8, 24, 24]] * 2
    assert answer["detection_classes"][:, 0].tolist() == [1, 1]


def test_a_file_that_suppresses_boxes_becomes_an_ensemble(schema: Any, shapes_model: Path, tmp_path: Path) -> None:
    model, path = onnx.load(shapes_model), tmp_path / "inside.onnx"
    attach(model, Processing(suppression=Suppression(confidence=0.3, most=40)))
    onnx.save(model, path)
    package(path, tmp_path / "repository")
    images = np.stack([scene.image for scene in shapes.images(3, 2)])[..., ::-1].transpose(0, 3, 1, 2) / np.float32(255)
    answer = run_ensemble(schema, tmp_path / "repository", "inside", {"images": np.ascontiguousarray(images)})
    with Detector.load(shapes_model, confidence=0.3) as detector:
        right = detector([scene.image for scene in shapes.images(3, 2)])
    assert answer["detection_boxes"].shape == (2, 40, 4)
    for image, found in enumerate(right):
        count = answer["num_detections"][image].item()
        assert count == len(found.scores) > 0
        np.testing.assert_allclose(answer["detection_scores"][image, :count], found.scores, rtol=1e-5)
        np.testing.assert_allclose(answer["detection_boxes"][image, :count].clip(0, 160), found.boxes, atol=1e-3)
    config = config_of(schema, tmp_path / "repository", "inside")
    assert config.parameters["confidence"].string_value == "0.3"


_KINDS = {"tensor(float)": "TYPE_FP32", "tensor(int32)": "TYPE_INT32", "tensor(uint8)": "TYPE_UINT8"}


def run_ensemble(schema: Any, folder: Path, name: str, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What Triton would answer, by ONNX Runtime: every step as its own configuration says, with what the file takes."""
    config = config_of(schema, folder, name)
    given = dict(feed)
    for step in config.ensemble_scheduling.step:
        model = config_of(schema, folder, step.model_name)
        assert (model.platform, model.max_batch_size) == ("onnxruntime_onnx", config.max_batch_size)
        file = folder / step.model_name / "1" / (model.default_model_filename or "model.onnx")
        session = onnxruntime.InferenceSession(file)
        for nodes, declared in ((session.get_inputs(), model.input), (session.get_outputs(), model.output)):
            sizes = tensors(schema, declared)
            assert {node.name for node in nodes} == set(sizes)
            for node in nodes:
                kind, dims = sizes[node.name]
                assert kind == _KINDS[node.type]
                shape = node.shape[1:] if model.max_batch_size else node.shape
                assert len(shape) == len(dims)
                assert all(size == dim for size, dim in zip(shape, dims, strict=True) if isinstance(size, int))
                if model.max_batch_size:  # what Triton's backend asks for
                    assert isinstance(node.shape[0], str)
        assert set(step.input_map) == {node.name for node in session.get_inputs()}
        assert set(step.output_map) == {node.name for node in session.get_outputs()}
        values = session.run([*step.output_map], {key: given[value] for key, value in step.input_map.items()})
        given |= dict(zip(step.output_map.values(), values, strict=True))
    for name_, (kind, dims) in tensors(schema, config.output).items():
        array = given[name_]
        assert kind == {"float32": "TYPE_FP32", "int32": "TYPE_INT32"}[array.dtype.name]
        assert array.shape[config.max_batch_size > 0 :] == dims
    return {node.name: given[node.name] for node in config.output}


def test_an_onnx_file_becomes_an_ensemble(schema: Any, shapes_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    document = package(shapes_model, folder, max_batch=6, max_delay_ms=2.5)
    name = "shapes.fused"
    assert (document.model, document.max_batch, document.needs) == (name, 6, [])
    assert document.start == f"tritonserver --model-repository={MOUNT}"
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == document.files
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]

    ensemble, network, boxes = (config_of(schema, folder, f"{name}{suffix}") for suffix in SUFFIXES)
    assert [config.max_batch_size for config in (ensemble, network, boxes)] == [6, 6, 6]
    assert tensors(schema, ensemble.input) == {"images": ("TYPE_FP32", (3, 160, 160))}
    assert tensors(schema, ensemble.output) == tensors(schema, boxes.output) == outputs_of()
    assert (network.platform, ensemble.platform) == ("onnxruntime_onnx", "ensemble")
    assert network.dynamic_batching.max_queue_delay_microseconds == 2500
    assert boxes.HasField("dynamic_batching")
    kinds = schema.ModelInstanceGroup.Kind
    for config in (network, boxes):
        assert [(kinds.Name(group.kind), group.count) for group in config.instance_group] == [("KIND_CPU", 1)]
    assert [warm.batch_size for warm in network.model_warmup] == [1, 6]
    for warm in network.model_warmup:
        (key, value), *rest = warm.inputs.items()
        assert (key, value.random_data, tuple(value.dims), rest) == ("images", True, (3, 160, 160), [])
    parameters = {key: value.string_value for key, value in ensemble.parameters.items()}
    assert json.loads(parameters["names"]) == {str(kind): name for kind, name in enumerate(shapes.NAMES)}
    letterbox = Letterbox(**json.loads(parameters["letterbox"]))

    images = [scene.image for scene in shapes.images(4, 3)]
    images[1] = images[1][20:150, 50:110]
    feed = np.stack([tensor(letterbox(image, 160, 160)) for image in images])
    answer = run_ensemble(schema, folder, name, {"images": feed})
    with Detector.load(shapes_model) as detector:
        right = detector(images)
    assert sum(len(found.scores) for found in right) > 5
    for index, (image, expected) in enumerate(zip(images, right, strict=True)):
        assert_equal(found_in(answer, index, letterbox.place(image.shape, 160, 160)), expected, score=1e-5)


def test_a_fixed_batch_makes_no_batches(schema: Any, tmp_path: Path) -> None:
    document = package(tiny(tmp_path / "one.onnx", batch=1), tmp_path / "repository")
    configs = [config_of(schema, tmp_path / "repository", f"one{suffix}") for suffix in SUFFIXES]
    assert document.max_batch == 0
    assert [(config.max_batch_size, config.HasField("dynamic_batching")) for config in configs] == [(0, False)] * 3
    assert [tuple(warm.inputs["images"].dims) for warm in configs[1].model_warmup] == [(1, 3, 32, 32)]
    assert tensors(schema, configs[0].output) == outputs_of((1,))
    answer = run_ensemble(schema, tmp_path / "repository", "one", {"images": np.zeros((1, 3, 32, 32), np.float32)})
    np.testing.assert_allclose(answer["detection_boxes"][0, 0], (12, 12, 20, 20))


def of_pixels(source: Path, path: Path, order: Pixels) -> Path:
    """The file as `export --input` writes it."""
    model = onnx.load(source)
    attach(model, Processing(order))
    onnx.save(model, path)
    return path


def test_a_file_of_bytes_is_asked_with_bytes(schema: Any, shapes_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    package(shapes_model, folder, max_batch=4)
    package(of_pixels(shapes_model, tmp_path / "bytes.onnx", "bgr"), folder, max_batch=4)
    configs = [config_of(schema, folder, f"bytes{suffix}") for suffix in ("", ".network")]
    assert [tensors(schema, config.input) for config in configs] == [{"images": ("TYPE_UINT8", (160, 160, 3))}] * 2
    for warm in configs[1].model_warmup:
        value = warm.inputs["images"]
        assert (schema.DataType.Name(value.data_type), tuple(value.dims)) == ("TYPE_UINT8", (160, 160, 3))
    assert json.loads(configs[0].parameters["pixels"].string_value) == "bgr"
    images = np.stack([scene.image for scene in shapes.images(4, 3)])
    expected = run_ensemble(schema, folder, "shapes.fused", {"images": np.stack([tensor(image) for image in images])})
    found = run_ensemble(schema, folder, "bytes", {"images": images})
    assert found["num_detections"].sum() > 5
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)

    package(of_pixels(tiny(tmp_path / "a.onnx", batch=1), tmp_path / "one.onnx", "rgb"), folder)
    (warm,) = config_of(schema, folder, "one.network").model_warmup
    assert tuple(warm.inputs["images"].dims) == (1, 32, 32, 3)
    answer = run_ensemble(schema, folder, "one", {"images": np.zeros((1, 32, 32, 3), np.uint8)})
    assert answer["detection_boxes"].shape == (1, MOST, 4)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_onnx_runtime_on_a_gpu(schema: Any, provider: Any, tmp_path: Path) -> None:
    package(tiny(tmp_path / "model.onnx"), tmp_path / "repository", provider=provider)
    config = config_of(schema, tmp_path / "repository", "model.network")
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.Kind.KIND_GPU
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [accelerator.name for accelerator in accelerators] == ["tensorrt"] * (provider == "tensorrt")


def engine(path: Path, model: Path, batches: tuple[int, int, int] = (1, 2, 4), **changed: Any) -> Path:
    profile = tuple((count, 3, 32, 32) for count in batches)
    metadata = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    return make_engine(path, onnx.load(model), {"images": profile}, metadata=metadata, **changed)


def test_what_ultralytics_writes_before_an_engine_is_left_out(schema: Any, tmp_path: Path) -> None:
    """Of Triton's own backend, which deserialises the whole file."""
    file = engine(tmp_path / "model.engine", tiny(tmp_path / "model.onnx"))
    plan, settings = file.read_bytes(), read_artifact(file).settings
    file.write_bytes(header_bytes({"stride": 32}) + b"ftrt" + plan)
    write_artifact(file, "engine", settings=settings)
    package(file, tmp_path / "native")
    inside = tmp_path / "native" / "model.network" / "1" / "model.engine"
    assert inside.read_bytes() == b"ftrt" + plan
    assert read_artifact(inside).settings == settings
    package(file, tmp_path / "python", backend="python")
    assert (tmp_path / "python" / "model" / "1" / "model.engine").read_bytes() == file.read_bytes()


def test_an_engine_goes_with_its_plugin(schema: Any, tmp_path: Path) -> None:
    library = tmp_path / "libacmix_plugin.so"
    library.write_bytes(b"machine code")
    file = engine(tmp_path / "model.engine", tiny(tmp_path / "model.onnx"), plugin=library)
    folder = tmp_path / "repository"
    document = package(file, folder)
    config = config_of(schema, folder, "model.network")
    assert (config.platform, config.max_batch_size, document.max_batch) == ("tensorrt_plan", 4, 4)
    assert [warm.batch_size for warm in config.model_warmup] == [1, 4]
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.Kind.KIND_GPU
    assert not config.optimization.execution_accelerators.gpu_execution_accelerator
    assert tensors(schema, config.input) == {"images": ("TYPE_FP32", (3, 32, 32))}
    read_artifact(folder / "model.network" / "1" / config.default_model_filename)
    assert document.needs == ["TensorRT 8.6.0 on Orin (sm_87)"]
    preload, *command = shlex.split(document.start)
    libraries = preload.removeprefix("LD_PRELOAD=").split(":")
    assert (folder / Path(libraries[0]).relative_to(MOUNT)).read_bytes() == library.read_bytes()
    assert libraries[1:] == ["libnvinfer.so.8"]
    assert command == ["tritonserver", f"--model-repository={MOUNT}"]
    config_of(schema, folder, "model")

    library.write_bytes(b"other machine code")
    with pytest.raises(UserError, match="built with the plugin of SHA-256"):
        package(file, tmp_path / "other")
    with pytest.raises(UserError, match="there is none here"):
        package(file, tmp_path / "other", plugin=tmp_path / "nowhere.so")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.op_type)
def test_the_plugin_registers_where_it_is_loaded_first(operator: Any, request: pytest.FixtureRequest) -> None:
    """As in the start line: LD_PRELOAD alone loads it before TensorRT, and it registers nowhere."""
    python = os.environ.get("ACMIX_TENSORRT86_PYTHON")
    if not python:
        pytest.skip("no TensorRT 8.6: name a Python 3.10 that has it in ACMIX_TENSORRT86_PYTHON")
    library = request.getfixturevalue("libraries")(8)
    site = Path(run([python, "-c", "import tensorrt; print(tensorrt.__file__)"]).stdout.strip()).parents[1]
    folders = ":".join(map(str, (site / "tensorrt", *site.glob("nvidia/*/lib"))))
    ask = f"import tensorrt; print(tensorrt.get_plugin_registry().get_plugin_creator('{operator.op_type}', '1', ''))"
    answers = []
    for preload in (f"{library}:libnvinfer.so.8", str(library)):
        environment = {**os.environ, "LD_LIBRARY_PATH": folders, "LD_PRELOAD": preload}
        answers.append(run([python, "-c", ask], env=environment).stdout.strip() != "None")
    assert answers == [True, False]


def test_the_python_backend_variant(schema: Any, tmp_path: Path) -> None:
    library = tmp_path / "libacmix_plugin.so"
    library.write_bytes(b"machine code")
    file = engine(tmp_path / "model.engine", tiny(tmp_path / "model.onnx"), (2, 3, 4), plugin=library)
    document = package(file, tmp_path / "repository", backend="python", confidence=0.4)
    config = config_of(schema, tmp_path / "repository", "model")
    assert (config.backend, config.max_batch_size) == ("python", 8)  # the detector splits and fills batches itself
    assert tensors(schema, config.input) == {"image": ("TYPE_STRING", (1,))}
    assert tensors(schema, config.output) == outputs_of()
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert parameters.pop("names") == '{"0": "thing"}'
    assert parameters.pop("letterbox")
    assert parameters == {
        "file": "model.engine", "plugin": "libacmix_plugin.so", "provider": "cpu", "confidence": "0.4"
    }  # fmt: skip
    for name in ("model.py", "model.engine", "model.engine.json", "libacmix_plugin.so"):
        assert f"model/1/{name}" in document.files
    assert "LD_PRELOAD" not in document.start
    assert [need.split()[0] for need in document.needs] == ["TensorRT", "acmix-deploy[serve]"]


def test_the_python_backend_gives_what_a_task_has(schema: Any, tmp_path: Path) -> None:
    file = posed(tmp_path / "pose.onnx")
    package(file, tmp_path / "repository", backend="python")
    config = config_of(schema, tmp_path / "repository", "pose")
    assert tensors(schema, config.output) == outputs_of() | {"detection_keypoints": ("TYPE_FP32", (MOST, 2, 3))}
    with pytest.raises(UserError, match=r"is of the task pose and gives output0 .*, which are anchors"):
        package(file, tmp_path / "native")


def test_the_python_backend_gives_as_many_as_the_file(
    schema: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.zeros((1, 400, 6), np.float32)
    told = Suppression(most=400).model_dump_json()
    file = constant(tmp_path / "rows.onnx", rows, task="detect", names="{0: 'a'}", suppression=told)
    package(file, tmp_path / "repository", backend="python")
    output = tensors(schema, config_of(schema, tmp_path / "repository", "rows").output)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    filled = importlib.import_module("acmix_deploy.serving.triton.model").filled
    found = Detections(np.ones((400, 4), np.float32), np.ones(400, np.float32), np.zeros(400, np.int64))
    arrays = filled([found], 400)
    assert {name: array.shape[1:] for name, array in arrays.items()} == {
        name: dims for name, (_, dims) in output.items()
    }
    assert (arrays["num_detections"][0, 0], arrays["detection_scores"].sum()) == (400, 400)


def test_the_python_backend_imports_neither_torch_nor_onnx() -> None:
    blocked = ("torch", "onnx", "ultralytics", "onnx_graphsurgeon")
    code = f"""
import sys, types
for name in {blocked}:
    sys.modules[name] = None
sys.modules["triton_python_backend_utils"] = types.ModuleType("triton_python_backend_utils")
from acmix_deploy.serving.triton.model import TritonPythonModel
"""
    run([sys.executable, "-c", code])


def test_names_of_any_kind_survive(schema: Any, tmp_path: Path) -> None:
    names = {0: 'a "quoted" \\ name', 1: "Füße\n", 2: "形"}
    path = tiny(tmp_path / "a b.onnx", names=str(names))
    package(path, tmp_path / "repository")
    parameters = config_of(schema, tmp_path / "repository", "a b").parameters
    assert json.loads(parameters["names"].string_value) == {str(kind): name for kind, name in names.items()}


def test_what_triton_cannot_serve_is_refused(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model.onnx")
    out = tmp_path / "repository"
    rtx = ORIN.model_copy(update={"backend": "tensorrt_rtx", "version": "1.7.0"})
    bare = tmp_path / "bare.onnx"
    graph = onnx.load(model)
    del graph.metadata_props[:]
    onnx.save(graph, bare)
    queries = selected(tmp_path / "queries.onnx", layout="ranked queries")
    untold = selected(tmp_path / "untold.onnx")
    alone = tmp_path / "alone.engine"
    alone.write_bytes(b"ftrt")
    for path, options, message in (
        (queries, {}, "queries.onnx is of the task detect and gives output0 .* are ranked queries, and the graph"),
        (engine(tmp_path / "told.engine", queries), {}, "told.engine is of the task detect and gives output0"),
        (untold, {}, "untold is not a detector: it gives output0 .* whose rows are a box, a score and a class"),
        (engine(tmp_path / "rtx.engine", model, machine=rtx), {}, "an engine of TensorRT-RTX 1.7.0, and Triton runs"),
        (engine(tmp_path / "two.engine", model, (2, 3, 4)), {}, "built for 2 images or more"),
        (bare, {}, "bare is not a detector: it gives output0 .* and its task is not told"),
        (model, {"plugin": tmp_path / "plugin.so"}, "is for engines"),
        (tmp_path / "missing.onnx", {}, "does not exist"),
        (tmp_path / "missing.engine", {}, "does not exist"),
        (alone, {}, "has no sidecar"),
    ):
        with pytest.raises(UserError, match=message):
            package(path, out, **options)
    assert not out.exists()


def test_other_models_stay_and_none_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "repository"
    (out / "mine").mkdir(parents=True)
    package(tiny(tmp_path / "model.onnx"), out)
    before = sorted(out.rglob("*"))
    (out / "other.boxes").mkdir()
    with pytest.raises(UserError, match=r"other\.boxes exists already"):
        package(tiny(tmp_path / "other.onnx"), out)
    (out / "other.boxes").rmdir()
    assert sorted(out.rglob("*")) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file"):
        package(tmp_path / "other.onnx", tmp_path / "file" / "repository")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    model = tiny(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="No space left"):
        package(model, tmp_path / "repository")
    assert [*(tmp_path / "repository").iterdir()] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "repository"]


def test_the_examples_start_what_is_packaged(tmp_path: Path) -> None:
    """Compose file and manifests are of one piece, and name the plugin where it is."""
    page = (ROOT / "docs/triton.md").read_text(encoding="utf-8")
    compose, manifests = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    (service,) = yaml.safe_load(compose)["services"].values()
    deployment, endpoint = yaml.safe_load_all(manifests)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]

    library = tmp_path / "libacmix_plugin.so"
    library.write_bytes(b"machine code")
    machine = ORIN.model_copy(update={"version": "10.9.0"})
    file = engine(tmp_path / "model.engine", tiny(tmp_path / "model.onnx"), plugin=library, machine=machine)
    start = package(file, tmp_path / "repository").start
    (environment,) = service["environment"].items()
    assert f"{'='.join(environment)} {service['command']}" == start
    assert start in page
    (variable,) = container["env"]
    assert f"{variable['name']}={variable['value']} {' '.join(container['args'])}" == start

    assert service["volumes"] == [f"./repository:{MOUNT}:ro"]
    assert [port.rpartition(":")[2] for port in service["ports"]] == ["8000", "8001", "8002"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"models": MOUNT, "shm": "/dev/shm"}
    assert {volume["name"] for volume in pod["spec"]["volumes"]} == set(mounts)
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == endpoint["spec"]["selector"]
    names = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in endpoint["spec"]["ports"]} <= names
    probes = [container[f"{probe}Probe"]["httpGet"] for probe in ("startup", "readiness", "liveness")]
    assert {probe["port"] for probe in probes} <= names
    assert [probe["path"].rpartition("/")[2] for probe in probes] == ["ready", "ready", "live"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny(tmp_path / "model.onnx")
    write_artifact(model, "fused")
    command = ["package", "triton", str(model), "-o", str(tmp_path / "repository")]
    assert cli.main([*command, "--json", "--max-batch", "2"]) == 0
    document = PackageDocument.model_validate_json(capsys.readouterr().out)
    assert (document.model, document.max_batch) == ("model", 2)
    assert "model.network/1/model.onnx.json" in document.files
    assert cli.main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*command[:-1], str(tmp_path / "python"), "--backend", "python"]) == 0
    printed = capsys.readouterr().out
    assert "needs acmix-deploy[serve]" in printed
    assert "Start: tritonserver" in printed
