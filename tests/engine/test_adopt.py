"""Engines that others built: what is asked of them, what is left unknown, and what is refused. On the stand-in for
TensorRT, since TensorRT-RTX deserialises nothing without a GPU."""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from acmix_deploy.artifacts import sidecar, write_artifact
from acmix_deploy.cli import main
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.doctor.files import examine
from acmix_deploy.engine import adopt as adoption
from acmix_deploy.engine import backend
from acmix_deploy.engine.adopt import adopt
from acmix_deploy.engine.build import build
from acmix_deploy.engine_file import header_bytes, read_engine, read_engine_file
from acmix_deploy.errors import CheckFailed, MissingComponent, UserError
from acmix_deploy.files import kind_of
from acmix_deploy.gate import worker
from acmix_deploy.manifest import HeaderManifest, Manifest, check, read_any_manifest, read_manifest
from acmix_deploy.profile import profile
from acmix_deploy.profile.monitor import Conditions, Monitor
from acmix_deploy.profile.others import Processes
from acmix_deploy.profile.subjects import RunSettings
from acmix_deploy.report.inspection import inspect
from acmix_deploy.runtime.models import open_model
from acmix_deploy.runtime.tensorrt import EngineRunner
from tests.engine.parts import ORIN, make_engine, make_plan
from tests.plugin import parts as tensorrt_parts

SHAPES = ((1, 3, 32, 32), (1, 3, 64, 64), (2, 3, 64, 64))
TOLD = {"stride": "32", "task": "detect", "names": "{0: 'nut', 1: 'bolt'}", "channels": "3"}
HEADER = {"stride": 32, "task": "detect", "names": {"0": "nut", "1": "bolt"}, "batch": 1, "imgsz": [64, 64],
          "args": {"half": True, "int8": False, "dynamic": True}, "end2end": None}  # fmt: skip


def model_of(dims=("batch", 3, "height", "width"), name: str = "images", metadata: dict[str, str] | None = None):
    """output0 = |images|."""
    node = helper.make_node("Abs", [name], ["output0"], name="abs")
    values = [helper.make_tensor_value_info(tensor, TensorProto.FLOAT, dims) for tensor in (name, "output0")]
    graph = helper.make_graph([node], "graph", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, metadata or {})
    return model


@pytest.fixture
def here(gpu, monkeypatch):
    """TensorRT is asked in this process, which saves a second each time."""
    monkeypatch.setattr(adoption, "ask", lambda request, progress: (backend.describe(request, progress), ""))
    return gpu


@pytest.fixture
def plan(tmp_path) -> Path:
    return make_plan(tmp_path / "model.engine", model_of(), {"images": SHAPES})


def test_an_engine_of_trtexec_is_asked_for_what_it_takes(gpu, plan, tmp_path, capsys):
    onnx.save(model_of(metadata=TOLD), tmp_path / "model.onnx")
    before = plan.read_bytes()
    assert main(["adopt", str(plan), "--metadata", str(tmp_path / "model.onnx"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["document"], document["layers"], document["plugin_layers"]) == ("adopt", 1, [])
    manifest = read_manifest(plan)
    assert plan.read_bytes() == before
    assert (manifest.origin, manifest.machine, manifest.profiles) == ("adopted", ORIN, {"images": SHAPES})
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in (*manifest.inputs, *manifest.outputs)] == [
        ("images", "FLOAT", (-1, 3, -1, -1)),
        ("output0", "FLOAT", (-1, 3, -1, -1)),
    ]
    assert manifest.metadata.entries == TOLD
    unknown = (manifest.form, manifest.precision, manifest.strongly_typed, manifest.flags, manifest.level)
    assert unknown == (None,) * 5
    assert (manifest.plugin, manifest.compute_capabilities) == (None, ())
    array = np.random.default_rng(0).standard_normal((2, 3, 64, 32)).astype(np.float32)
    opened = open_model(plan)
    assert opened.usual_shape("images") == SHAPES[1]
    with opened.runner as runner:
        np.testing.assert_array_equal(runner.infer({"images": array})["output0"], np.abs(array))
    assert main(["inspect", str(plan)]) == 0
    shown = capsys.readouterr().out
    for words in ("built by something else, adopted", "adopted with", "TensorRT 8.6.0", "Orin (sm_87)", "unknown"):
        assert words in shown


def test_the_header_of_ultralytics_tells_the_metadata_and_the_type(here, tmp_path):
    plan = make_plan(tmp_path / "model.engine", model_of(), {"images": SHAPES}, header=HEADER)
    assert kind_of(plan) == "engine"
    found = adopt(plan).found
    assert found.notes == ()
    manifest = read_manifest(plan)
    assert manifest.metadata.names == {0: "nut", 1: "bolt"}
    assert (manifest.metadata.stride, manifest.metadata.task, manifest.metadata.end2end) == (32, "detect", False)
    assert manifest.precision == "float16"
    array = np.ones((1, 3, 32, 32), np.float32)
    with EngineRunner(plan) as runner:
        np.testing.assert_array_equal(runner.infer({"images": array})["output0"], array)


@pytest.mark.parametrize(
    ("args", "precision"),
    [
        ({"half": False, "int8": True}, "int8"),
        ({"half": False, "int8": False}, None),  # nothing tells whether what is float32 is computed in TF32
        ({"quantize": 16}, "float16"),
        ({"quantize": 8}, "int8"),
        ({"quantize": None}, None),
        ({}, None),
    ],
)
def test_precision_by_the_header(here, tmp_path, args, precision):
    plan = make_plan(tmp_path / "e.engine", model_of(), {"images": SHAPES}, header=HEADER | {"args": args})
    assert adopt(plan).found.manifest.precision == precision


def test_a_plugin_is_recorded_where_the_engine_needs_it(here, plan, tmp_path, empty_library):
    notes = adopt(plan, plugin=empty_library).found.notes
    assert any("takes model.engine without empty.so" in note for note in notes)
    assert read_manifest(plan).plugin is None
    other = make_plan(tmp_path / "other.engine", model_of(), {"images": SHAPES}, plugin=str(empty_library))
    with pytest.raises(UserError, match="has layers of a plugin that is not loaded: IPluginCreator not found"):
        adopt(other)
    assert not sidecar(other).exists()
    adopt(other, plugin=empty_library)
    assert read_manifest(other).plugin.path == empty_library
    shutil.copy(empty_library, moved := tmp_path / "moved.so")
    empty_library.write_bytes(b"another")
    with pytest.raises(UserError, match=r"was adopted with the plugin of SHA-256 .*, the one here has"):
        EngineRunner(other).activate()
    with pytest.raises(UserError, match="has layers of a plugin that the library has not"):
        adopt(make_plan(tmp_path / "third.engine", model_of(), {"images": SHAPES}, plugin="third.so"), plugin=moved)


def test_what_it_runs_on(here, plan, tmp_path):
    with_later = make_plan(tmp_path / "l.engine", model_of(), {"images": SHAPES}, hardware="AMPERE_PLUS")
    later, alone = (adopt(path).found.manifest for path in (with_later, plan))
    check(later, ORIN.model_copy(update={"gpu": "Thor", "sm": 110}))
    for manifest, changed, said in (
        (later, {"gpu": "Xavier", "sm": 72}, "adopted for sm_80 and later, here is Xavier"),
        (alone, {"gpu": "Thor", "sm": 110}, r"adopted for Orin \(sm_87\), here is Thor"),
        (alone, {"version": "8.6.2"}, "adopted with TensorRT 8.6.0, here is TensorRT 8.6.2"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            check(manifest, ORIN.model_copy(update=changed))
        assert "acmix-deploy adopt" in raised.value.hint


def test_layers_without_details_and_further_profiles_are_told(here, tmp_path):
    plan = make_plan(tmp_path / "e.engine", model_of(), {"images": SHAPES}, names_only=True, profile_count=3)
    found = adopt(plan).found
    assert (found.layers, found.plugin_layers) == (1, ())
    assert "of its 3 optimization profiles the first is used" in found.notes


def test_what_runs_engines_takes_it(here, plan, tmp_path, capsys, monkeypatch):
    """Its type is not known: it passes by the limits of float32, or by those that somebody gives."""
    onnx.save(model_of(), tmp_path / "model.onnx")
    adopt(plan)
    verify = ["verify", str(tmp_path / "model.onnx"), str(plan), "--json"]
    assert main(verify) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(one["precision"], one["passed"]) for one in found["comparisons"]} == {("unknown", True)}
    assert "nothing tells what type model.engine computes in" in " ".join(found["notes"])

    rounded = model_of()
    rounded.graph.node[0].output[0] = "exact"
    cast = [("to_half", "exact", "half", TensorProto.FLOAT16), ("back", "half", "output0", TensorProto.FLOAT)]
    rounded.graph.node.extend(helper.make_node("Cast", [a], [b], name=name, to=to) for name, a, b, to in cast)
    half = make_plan(tmp_path / "half.engine", rounded, {"images": SHAPES})
    adopt(half)
    verify[2] = str(half)
    assert main(verify) == 1, "what passes as float16 does not pass as nobody knows what"
    assert main([*verify, "--max-relative", "0.01"]) == 0

    monkeypatch.setattr(Monitor, "read", lambda self: Conditions())
    monkeypatch.setattr(Monitor, "processes", lambda self: Processes(time.monotonic(), {}))
    (timed,) = profile([plan], samples=3, seconds=600)
    assert (timed.precision, timed.samples_ms[:3]) == (None, (1.0,) * 3)
    turn = worker.measure(worker.Request(file=plan, setup=RunSettings(), samples=3, seconds=5))
    assert (turn.kind, turn.precision, turn.provider) == ("engine", None, "TensorRT 8.6.0")


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"formats": {"output0": "HWC8"}}, "output0 of .* has its values in the format HWC8"),
        ({"formats": {"images": "CHW2"}}, "images of .* has its values in the format CHW2"),
        ({"locations": {"images": "HOST"}}, "images of .* is a shape that TensorRT reads on the host"),
    ],
)
def test_what_would_be_run_wrongly_is_refused(here, tmp_path, described, said):
    plan = make_plan(tmp_path / "e.engine", model_of(), {"images": SHAPES}, **described)
    with pytest.raises(UserError, match=said):
        adopt(plan)
    assert not sidecar(plan).exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (model_of(name="image"), "has the tensors images, output0, and .* image, output0"),
        (
            model_of(dims=(1, 3, "height", "width")),
            r"images of .* is \[-1, 3, -1, -1\], and \[1, 3, 'height', 'width'\]",
        ),
        (model_of(dims=("batch", 4, "height", "width")), r"is \[-1, 3, -1, -1\], and"),
        (model_of(dims=("batch", 3, "height")), r"is \[-1, 3, -1, -1\], and"),
    ],
)
def test_metadata_of_another_file_are_refused(here, plan, tmp_path, other, said):
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(UserError, match=said):
        adopt(plan, metadata=tmp_path / "other.onnx")


def test_without_metadata_it_says_so(here, plan):
    assert any("--metadata" in note for note in adopt(plan).found.notes)
    assert read_manifest(plan).metadata.entries == {}


# ---------------------------------------------------------------------------------------------------------------------
# What Ultralytics reads before an engine


def test_a_build_for_ultralytics(gpu, tmp_path, capsys):
    onnx.save(model_of(metadata=TOLD | {"kpt_shape": "[4, 3]", "letterbox": "{}"}), tmp_path / "model.onnx")
    engine = tmp_path / "model.engine"
    shapes = [
        f"--{name}={','.join(map(str, shape))}" for name, shape in zip(("min", "opt", "max"), SHAPES, strict=True)
    ]
    assert main(["build", str(tmp_path / "model.onnx"), "--ultralytics", "--fp16", *shapes, "-o", str(engine)]) == 0
    found = read_engine_file(engine)
    assert engine.read_bytes()[:4] == struct.pack("<i", found.offset - 4)
    assert found.header == {
        "stride": 32, "task": "detect", "names": {"0": "nut", "1": "bolt"}, "channels": 3, "kpt_shape": [4, 3],
        "letterbox": "{}", "batch": 1, "imgsz": [64, 64],
        "args": {"batch": 1, "dynamic": True, "nms": False, "half": True, "int8": False},
    }  # fmt: skip
    assert json.loads(read_engine(engine))["asked"]["flags"] == ["FP16"]
    assert ModelMetadata.of_header(found.header).lowered == read_manifest(engine).precision == "float16"
    array = np.full((1, 3, 32, 32), -1, np.float32)
    with EngineRunner(engine) as runner:
        np.testing.assert_array_equal(runner.infer({"images": array})["output0"], -array)


def test_metadata_before_an_engine_are_those_of_the_file(tmp_path):
    metadata = ModelMetadata(TOLD | {"kpt_shape": "[4, 3]", "end2end": "True", "letterbox": "{}"})
    for dims, shape, dynamic in (
        ((2, 3, 32, 64), (2, 3, 32, 64), False),
        ((-1, 3, -1, -1), (2, 3, 32, 64), True),
        ((-1, 3, 32, 64), (2, 3, 32, 64), False),  # else a release sets other sizes, and does not see them refused
    ):
        header = json.loads(header_bytes(metadata.header(dims, shape))[4:])
        told = ModelMetadata.of_header(header)
        assert told == metadata.updated(batch=2, imgsz=[32, 64], args=header["args"])
        assert header["args"] == {"batch": 2, "dynamic": dynamic, "nms": False}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (model_of(dims=(1, 3, 32, 32), metadata={"stride": "32"}), "the metadata tell no task, no names, which"),
        (model_of(dims=(1, 3, 32, 32), metadata=TOLD | {"stride": "x"}), "the metadata tell the stride 'x'"),
        (model_of(dims=(1, 3, 32, 32), name="x", metadata=TOLD), r"takes x \[1, 3, 32, 32\], and Ultralytics feeds"),
        (
            model_of(dims=(1, 3, 32), metadata=TOLD),
            r"takes images \[1, 3, 32\], and Ultralytics feeds one input images",
        ),
    ],
)
def test_what_ultralytics_would_not_load_is_not_built(gpu, tmp_path, model, said):
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(UserError, match=said):
        build(tmp_path / "model.onnx", tmp_path / "model.engine", ultralytics=True)
    assert not (tmp_path / "model.engine").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What TensorRT does not take here


@pytest.mark.parametrize(
    ("version", "refused", "said"),
    [
        ("10.3.0.26", "Version tag does not match", "it was written by TensorRT 10.3.0.26, and TensorRT 8.6.0 here"),
        ("8.6.0.12", "The engine plan file is generated on an incompatible device", "TensorRT 8.6.0 on Orin"),
    ],
)
def test_an_engine_of_another_machine_is_adopted_by_its_header(here, tmp_path, capsys, version, refused, said):
    plan = make_plan(tmp_path / "e.engine", model_of(), {"images": SHAPES}, version, refused=refused, header=HEADER)
    assert any(said in note and "acmix-deploy adopt" in note for note in adopt(plan).found.notes)
    manifest = read_any_manifest(plan)
    assert isinstance(manifest, HeaderManifest)
    assert (manifest.backend, manifest.version, manifest.metadata.stride) == ("tensorrt", version, 32)
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.zeros((8, 8, 3), np.uint8))
    package = ["package", "triton", str(plan), "-o", str(tmp_path / "repository")]
    for arguments in (["profile", str(plan)], ["detect", str(plan), str(photo)], package):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "was adopted by its header alone" in error
        assert f"acmix-deploy adopt {plan}" in error
    assert "adopted by its header alone" in examine(plan, progress=print).notes[0]
    assert main(["inspect", str(plan)]) == 0
    assert "adopted by its header alone" in capsys.readouterr().out


def test_without_a_gpu_what_the_file_says(monkeypatch, here, plan, tmp_path):
    from acmix_deploy import manifest as manifests

    monkeypatch.setattr(manifests, "gpu_here", dict)
    found = adopt(plan).found
    assert found.manifest == HeaderManifest(backend="tensorrt", version="8.6.0.12", metadata=ModelMetadata())
    assert any("there is no GPU here for TensorRT 8.6.0" in note for note in found.notes)
    (silent := tmp_path / "silent.engine").write_bytes(b"ptrt" + bytes(60))
    with pytest.raises(MissingComponent, match="its beginning tells nothing: there is no GPU here"):
        adopt(silent)
    monkeypatch.setattr(manifests, "gpu_here", lambda: {"gpu": "Orin", "sm": 87})
    assert isinstance(adopt(plan).found.manifest, Manifest), "on the machine that it fits the header is replaced"


def test_an_engine_that_is_damaged(here, tmp_path):
    plan = make_plan(tmp_path / "e.engine", model_of(), {"images": SHAPES}, refused="the plan is broken")
    with pytest.raises(CheckFailed, match=r"TensorRT 8.6.0 does not take .*: the plan is broken"):
        adopt(plan)
    assert not sidecar(plan).exists()


# ---------------------------------------------------------------------------------------------------------------------
# Manifests that are there


def test_a_manifest_that_is_there_stays(here, plan, tmp_path):
    built = make_engine(tmp_path / "built.engine", model_of(), {"images": SHAPES})
    beside = sidecar(built).read_text()
    with pytest.raises(UserError, match=r"acmix-deploy built it with TensorRT .*, and it is unchanged") as raised:
        adopt(built)
    assert f"move {sidecar(built)} elsewhere" in raised.value.hint
    built.write_bytes(make_plan(tmp_path / "anew.engine", model_of(), {"images": SHAPES}).read_bytes())
    with pytest.raises(
        UserError, match="is the manifest of another engine: it was built by acmix-deploy with"
    ) as raised:
        adopt(built)
    assert f"rm {sidecar(built)}" in raised.value.hint
    assert sidecar(built).read_text() == beside

    adopt(plan)
    adopt(plan)  # of the same bytes it may be made again
    with plan.open("ab") as file:
        file.write(b" ")
    with pytest.raises(UserError, match="has changed since"):
        EngineRunner(plan).activate()
    with pytest.raises(UserError, match="is the manifest of another engine: it was adopted with"):
        adopt(plan)
    for content, said in (("{}", "no manifest that can be read"), ("text", "no manifest that can be read")):
        sidecar(plan).write_text(content)
        with pytest.raises(UserError, match=said):
            adopt(plan)
        assert sidecar(plan).read_text() == content
    write_artifact(plan, "fused")
    with pytest.raises(UserError, match="describes a file of the kind fused"):
        adopt(plan)


# ---------------------------------------------------------------------------------------------------------------------
# The beginning of a file

PLAN = b"ftrt" + bytes(20) + bytes((10, 3, 0, 26)) + b"rest"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (PLAN, (0, None, "tensorrt", "10.3.0.26")),
        (b"vtrt" + bytes(20) + bytes((1, 7, 1, 116)), (0, None, "tensorrt_rtx", "1.7.1.116")),
        (header_bytes({"stride": 32}) + PLAN, (18, {"stride": 32}, "tensorrt", "10.3.0.26")),
        (header_bytes({}) + PLAN, (6, {}, "tensorrt", "10.3.0.26")),
        (PLAN[:27], (0, None, "tensorrt", None)),
        (b"ftrt" + bytes((1,)) + PLAN[5:], (0, None, "tensorrt", None)),  # another form of plan
        (b"ftrt" + bytes(30), (0, None, "tensorrt", None)),
        (b"ptrt" + PLAN[4:], (0, None, "tensorrt", None)),  # older than what tells it
        (header_bytes({"stride": 32})[:9], (0, None, None, None)),  # cut off within the header
        (struct.pack("<i", 99) + b'{"stride": 32}' + PLAN, (0, None, None, None)),  # a length beyond the file
        (struct.pack("<i", 12) + b'{"stride": 32}' + PLAN, (0, None, None, None)),  # one that ends within the JSON
        (struct.pack("<i", 16) + b'{"stride": 32}' + PLAN, (0, None, None, None)),  # one that ends behind it
        (struct.pack("<i", -14) + b'{"stride": 32}' + PLAN, (0, None, None, None)),
        (struct.pack("<i", 5) + b"[1,2]" + PLAN, (0, None, None, None)),
        (struct.pack("<i", 2) + b"{\xff" + PLAN, (0, None, None, None)),
        (b"", (0, None, None, None)),
        (b"ftr", (0, None, None, None)),
        (b'{"a": "text"}', (0, None, None, None)),
    ],
)
def test_the_beginning_of_a_file(tmp_path, content, found):
    (path := tmp_path / "a.engine").write_bytes(content)
    assert read_engine_file(path) == found
    assert read_engine(path) == content[found[0] :]


def test_what_is_no_engine_is_not_adopted(here, tmp_path, capsys):
    for name, content, said in (
        ("text.engine", b"not an engine\n", "is a text file that begins with 'not an engine'; an engine is needed"),
        ("json.engine", b'{"stride": 32}', "is a JSON document that begins with"),
        ("cut.engine", header_bytes({"stride": 32})[:9], "; an engine is needed"),
        ("lie.engine", struct.pack("<i", 99) + b'{"stride": 32}' + PLAN, "; an engine is needed"),
        ("header.engine", header_bytes({"stride": 32}), "; an engine is needed"),
    ):
        (path := tmp_path / name).write_bytes(content)
        assert main(["adopt", str(path)]) == 2
        assert said in capsys.readouterr().err
        assert not sidecar(path).exists()


def test_a_header_that_is_no_metadata(here, tmp_path):
    """It is left out for TensorRT; what it says is asked for where it is needed, and is no fault before."""
    header = {"maker": "somebody", "stride": "many"}
    plan = make_plan(tmp_path / "e.engine", model_of(), {"images": SHAPES}, header=header)
    adopt(plan)
    assert read_manifest(plan).metadata.names == {}
    with pytest.raises(UserError, match="the metadata tell the stride 'many'"):
        _ = read_manifest(plan).metadata.stride


def test_an_engine_without_a_manifest_says_the_way_to_one(tmp_path, capsys):
    plan = make_plan(tmp_path / "e.engine", model_of(), {"images": SHAPES}, "10.3.0.26", header=HEADER)
    assert inspect(plan).notes == (
        "it has no manifest, so it cannot be checked before it runs; TensorRT 10.3.0.26 wrote it, Ultralytics' "
        "metadata stand before it, acmix-deploy adopt makes one on the machine that it fits",
    )
    assert main(["profile", str(plan)]) == 2
    assert f"acmix-deploy adopt {plan}" in capsys.readouterr().err
    assert f"acmix-deploy adopt {plan}" in examine(plan, progress=print).notes[0]


def test_the_release_of_a_real_engine(tmp_path):
    """Where trtexec reads it: checked on what TensorRT-RTX writes, whose version is known."""
    tensorrt_parts.rtx_libraries()
    import tensorrt_rtx

    onnx.save(model_of(dims=(1, 3, 8, 8)), tmp_path / "model.onnx")
    build(tmp_path / "model.onnx", tmp_path / "model.engine", backend="tensorrt_rtx")
    found = read_engine_file(tmp_path / "model.engine")
    assert (found.offset, found.header, found.backend) == (0, None, "tensorrt_rtx")
    assert found.version == tensorrt_rtx.__version__
