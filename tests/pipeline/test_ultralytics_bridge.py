"""``import acmix_deploy.ultralytics``: the files that are made here in Ultralytics' own predict and val.

Engines run on stand-ins for TensorRT and CUDA (cpu_as_gpu.py); older releases where ACMIX_ULTRALYTICS names them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from acmix_deploy import manifest as manifests
from acmix_deploy import yolo
from acmix_deploy.artifacts import sha256, sidecar, write_artifact
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.engine_file import header_bytes, read_engine_file
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.manifest import EngineTensor, HeaderManifest, Machine, Manifest, Plugin
from acmix_deploy.serving.detector import Detector
from scripts import shapes
from scripts.train_shapes import CHECKPOINT, evaluate
from tests.pipeline import cpu_as_gpu
from tests.pipeline.test_ultralytics_releases import RELEASES, with_release

pytest.importorskip("ultralytics", reason="ultralytics is not installed")
bridge = pytest.importorskip("acmix_deploy.ultralytics")

ORIN = {"gpu": "Orin", "sm": 87}


def engine_of(path: Path, model: Path, library: Path | None = None, header: bool = False, **changed: Any) -> Path:
    """An engine for the stand-in, with its manifest."""
    metadata, (images,) = ModelMetadata.of(onnx.load(model)), onnx.load(model).graph.input
    sizes = [dim.dim_value or -1 for dim in images.type.tensor_type.shape.dim]
    shape = (1, *sizes[1:])
    told = header_bytes(metadata.header(sizes, shape)) if header else b""
    path.write_bytes(told + cpu_as_gpu.BEGINNING + model.read_bytes())
    fields: dict[str, Any] = {
        "machine": Machine(backend="tensorrt", version=cpu_as_gpu.VERSION, **ORIN), "compute_capabilities": (),
        "plugin": Plugin(path=library, sha256=sha256(library)) if library else None, "form": "any",
        "precision": "float32", "strongly_typed": True, "flags": (), "level": 3, "metadata": metadata,
        "profiles": {"images": (shape, shape, (cpu_as_gpu.LARGEST, *shape[1:]))},
        "inputs": (EngineTensor(name="images", dtype="FLOAT", shape=sizes),),
        "outputs": (EngineTensor(name="output0", dtype="FLOAT", shape=(-1, 10, -1)),),
    }  # fmt: skip
    write_artifact(path, "engine", settings=Manifest(**fields | changed).model_dump(mode="json"))
    return path


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "gpu_here", lambda: ORIN)


def read(file: Path) -> bytes:
    """What TensorRT would deserialise and what stands before it, as Ultralytics reads it."""
    with cpu_as_gpu.pretended(), bridge._open_engine(file, "rb") as opened:
        content: bytes = opened.read()
    return content


def check_same(results: list[Any], images: list[Any], model: Path) -> None:
    """The detections of Ultralytics are those of ``detect``."""
    found = 0
    with Detector.load(model) as detector:
        for result, right in zip(results, detector(images), strict=True):
            boxes = result.boxes.data.numpy()
            assert len(boxes) == len(right.boxes)
            for box, score, kind in zip(right.boxes, right.scores, right.classes, strict=True):
                near = boxes[np.abs(boxes[:, :4] - box).max(axis=1).argmin()]
                assert np.abs(near[:4] - box).max() < 0.01
                assert abs(near[4] - score) < 1e-4
                assert near[5] == kind
                found += 1
    assert found > 5


IMAGES = [scene.image for scene in shapes.images(5, 2)]
OPTIONS: dict[str, Any] = {"imgsz": shapes.SIZE, "rect": False, "verbose": False}


NAMED = """
import sys
{imported}
from ultralytics import YOLO
(block,) = [module for module in YOLO(sys.argv[1]).model.modules() if type(module).__name__ == "ACmix"]
print(type(block).__module__, block.in_planes, block.out_planes)
"""


@pytest.mark.parametrize("known", [True, False])
def test_a_yaml_file_names_the_block_once_this_is_imported(tmp_path: Path, known: bool) -> None:
    file = tmp_path / "mine.yaml"
    rows = ("[-1, 1, Conv, [16, 3, 2]]", "[-1, 1, ACmix, [32]]")
    file.write_text("nc: 2\nbackbone:\n" + "".join(f"  - {row}\n" for row in rows) + "head: [[[1], 1, Detect, [nc]]]\n")
    script = NAMED.format(imported="import acmix_deploy.ultralytics" if known else "")
    done = subprocess.run([sys.executable, "-c", script, str(file)], capture_output=True, text=True, check=False)
    if known:
        assert done.stdout.splitlines()[-1:] == ["acmix_deploy.families.acmix.module 16 32"], done.stderr
    else:
        assert "KeyError: 'ACmix'" in done.stderr, "else there is nothing to import it for"


def test_a_fused_file_predicts_what_detect_does(shapes_model: Path) -> None:
    detector = yolo.ultralytics("models").YOLO(shapes_model)
    assert detector.task == "detect"
    check_same(detector.predict(IMAGES, **OPTIONS), IMAGES, shapes_model)


@pytest.mark.soak
def test_a_fused_file_validates_as_its_checkpoint(shapes_model: Path) -> None:
    found, expected = evaluate(shapes_model, 8), evaluate(CHECKPOINT, 8)
    assert expected["metrics/mAP50(B)"] > 0.5
    assert found == pytest.approx(expected, abs=0.0005)


@pytest.mark.parametrize("header", [False, True])
def test_an_engine_predicts_what_detect_does(
    shapes_model: Path, tmp_path: Path, orin: None, empty_library: Path, header: bool
) -> None:
    engine = engine_of(tmp_path / "shapes.engine", shapes_model, empty_library, header)
    with cpu_as_gpu.pretended(str(empty_library)) as loaded:
        detector = yolo.ultralytics("models").YOLO(engine)
        results = [detector.predict(image, **OPTIONS)[0] for image in IMAGES]
        assert dict(results[0].names) == dict(enumerate(shapes.NAMES))
    check_same(results, IMAGES, shapes_model)
    assert [there for _, there in loaded] == [True], "the plugin is loaded before TensorRT deserialises"


def test_files_of_others_are_opened_as_ever(shapes_model: Path, tmp_path: Path, orin: None) -> None:
    engine = engine_of(tmp_path / "a.engine", shapes_model)
    content = engine.read_bytes()
    assert read(engine) != content
    write_artifact(engine, "engine", settings=HeaderManifest(backend=None, version=None, metadata={}).model_dump())
    assert read(engine) == content
    for beside in ("text", "[]", '{"kind": "fused"}'):
        sidecar(engine).write_text(beside)
        assert read(engine) == content
    sidecar(engine).unlink()
    assert read(engine) == content
    with bridge._open_engine(engine, "r", encoding="latin1") as text:
        assert text.read(4) == "ftrt"


def test_a_header_is_not_written_twice_nor_made_up(shapes_model: Path, tmp_path: Path, orin: None) -> None:
    engine = engine_of(tmp_path / "a.engine", shapes_model, header=True)
    assert read(engine) == engine.read_bytes()
    silent = engine_of(tmp_path / "b.engine", shapes_model, metadata={"stride": "32"})
    assert read(silent) == silent.read_bytes()
    told = engine_of(tmp_path / "c.engine", shapes_model)
    (tmp_path / "d.engine").write_bytes(read(told))
    header = read_engine_file(tmp_path / "d.engine").header or {}
    assert (header["task"], header["imgsz"], header["batch"], header["stride"]) == ("detect", [160, 160], 1, 32)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"machine": Machine(backend="tensorrt", version="10.2.0", **ORIN)}, "built with TensorRT 10.2.0, here is"),
        ({"machine": Machine(backend="tensorrt", version="10.3.0", gpu="Thor", sm=110)}, "built for Thor"),
        ({"machine": Machine(backend="tensorrt_rtx", version="1.7.1")}, "is an engine of TensorRT-RTX 1.7.1, and"),
        ({"plugin": Plugin(path=Path("nowhere.so"), sha256="a" * 64)}, "there is none here"),
        ({"metadata": {"pixels": "bgr"}}, "takes images in uint8, and Ultralytics feeds floats"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_before_it_is_read(
    shapes_model: Path, tmp_path: Path, orin: None, changed: Any, said: str
) -> None:
    engine = engine_of(tmp_path / "a.engine", shapes_model, **changed)
    with cpu_as_gpu.pretended() as loaded, pytest.raises(UserError, match=said):
        yolo.ultralytics("models").YOLO(engine).predict(IMAGES[0], **OPTIONS)
    assert loaded == []


def test_an_engine_that_has_changed(shapes_model: Path, tmp_path: Path, orin: None) -> None:
    engine = engine_of(tmp_path / "a.engine", shapes_model)
    with engine.open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match="has changed since"):
        read(engine)


def test_the_task_is_what_the_file_tells(shapes_model: Path, tmp_path: Path, orin: None) -> None:
    guess = bridge._by_metadata(lambda model: "guessed")
    model = onnx.load(shapes_model)
    onnx.helper.set_model_props(model, {"task": "segment", "stride": "32", "names": "{0: 'a'}"})
    onnx.save(model, tmp_path / "a.onnx")
    assert guess(tmp_path / "a.onnx") == guess(str(tmp_path / "a.onnx")) == "segment"
    assert guess(engine_of(tmp_path / "a.engine", tmp_path / "a.onnx")) == "segment"
    headed = engine_of(tmp_path / "b.engine", tmp_path / "a.onnx", header=True)
    sidecar(headed).unlink()
    assert guess(headed) == "segment"
    onnx.helper.set_model_props(model, {"task": "chess"})
    onnx.save(model, tmp_path / "b.onnx")
    (tmp_path / "text.engine").write_text("text")
    (tmp_path / "text.onnx").write_text("text")
    for other in (
        tmp_path / "b.onnx",
        tmp_path / "text.engine",
        tmp_path / "text.onnx",
        tmp_path / "none.onnx",
        "a.pt",
        {},
    ):
        assert guess(other) == "guessed"


def test_without_ultralytics_the_import_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise MissingComponent("Ultralytics is needed here and is not installed")

    monkeypatch.setattr(bridge, "ultralytics", missing)
    with pytest.raises(MissingComponent, match="is not installed"):
        bridge._install()


IMPORT = """
import builtins, sys
opened = builtins.open
import acmix_deploy.ultralytics
print(sorted({"tensorrt", "onnx", "onnxruntime", "polygraphy"} & {*sys.modules}), builtins.open is opened)
"""
RUN = """
import json, sys
from pathlib import Path
import acmix_deploy.ultralytics
import cv2
from acmix_deploy import manifest, yolo
from tests.pipeline import cpu_as_gpu
manifest.gpu_here = lambda: {"gpu": "Orin", "sm": 87}
model, engine, library, *photos = sys.argv[1:]
options = {"imgsz": 160, "rect": False, "verbose": False}
YOLO = yolo.ultralytics("models").YOLO
results = {"model": [YOLO(model).predict(photo, **options)[0].boxes.data.tolist() for photo in photos]}
with cpu_as_gpu.pretended(library) as loaded:
    try:
        results["engine"] = [YOLO(engine).predict(photo, **options)[0].boxes.data.tolist() for photo in photos[:1]]
    except AttributeError as error:
        results["error"] = str(error)
    results["loaded"] = [there for _, there in loaded]
print(json.dumps(results))
"""


@pytest.mark.soak
def test_the_import_brings_nothing_heavy() -> None:
    assert with_release("installed", "-c", IMPORT).splitlines()[-1] == "[] True"


@pytest.mark.soak
@pytest.mark.parametrize("release", RELEASES or ["none"])
def test_a_release_runs_a_fused_file_and_an_engine(
    shapes_model: Path, tmp_path: Path, empty_library: Path, release: str
) -> None:
    if not RELEASES:
        pytest.skip("no older Ultralytics: name a folder of releases in ACMIX_ULTRALYTICS")
    import cv2

    engine = engine_of(tmp_path / "shapes.engine", shapes_model, empty_library)
    photos = [tmp_path / f"{index}.png" for index in range(len(IMAGES))]
    for photo, image in zip(photos, IMAGES, strict=True):
        cv2.imwrite(str(photo), image)
    said = with_release(release, "-c", RUN, *map(str, (shapes_model, engine, empty_library, *photos)))
    found = json.loads(said.splitlines()[-1])
    with Detector.load(shapes_model) as detector:
        right = detector(IMAGES)
    assert sum(len(detections.boxes) for detections in right) > 5
    for kind in ("model", "engine"):
        for boxes, detections in zip(found.get(kind, ()), right, strict=False):
            assert len(boxes) == len(detections.boxes)
            for box in detections.boxes:
                assert np.abs(np.array(boxes)[:, :4] - box).max(axis=1).min() < 0.01
    assert found["loaded"] == [True]
    # Releases that know TensorRT 8 alone ask for names that the stand-in has not, once the engine is there.
    assert len(found.get("engine", ())) == 1 or "num_bindings" in found["error"]
