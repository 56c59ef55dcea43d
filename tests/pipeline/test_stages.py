"""The contract of the stages: each writes a file and its sidecar, and one kind of file has one kind of sidecar."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from acmix_deploy.artifacts import Artifact, read_artifact
from acmix_deploy.cli import main
from acmix_deploy.errors import UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.plan import Plan

cv2 = pytest.importorskip("cv2", reason="no OpenCV: pip install opencv-python-headless")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Every file that ``export`` makes of a model for images of 32x48 pixels, and in the folder verbs those of the
    verbs that make one file each."""
    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
    torch.save(nn.Sequential(stem, nn.SiLU(), ACmix(16, 16, head=2), nn.Conv2d(16, 8, 1)).eval(), folder / "model.pt")
    (folder / "photos").mkdir()
    for seed in range(2):
        photo = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), np.uint8)
        cv2.imwrite(str(folder / "photos" / f"{seed}.png"), photo)
    photos = ["--calibration", str(folder / "photos")]
    made, verbs = folder / "export", folder / "verbs"
    options = ["--fp16", "--int8", *photos, "--for", "jetpack-6.2", "--seconds", "0.1", "--input-shape", "1,3,32,48"]
    for command in (
        ["export", folder / "model.pt", *options, "--out", made],
        ["fuse", made / "model.onnx", "-o", verbs / "fused.onnx", "--for", "jetpack-6.2"],
        ["fp16", made / "model.fused.onnx", "-o", verbs / "fp16.onnx", "--images", folder / "photos"],
        ["quantize", made / "model.fused.onnx", *photos, "-o", verbs / "int8.onnx"],
    ):
        assert main([*map(str, command)]) == 0
    return folder


def artifact(files: Path, name: str) -> Artifact:
    return read_artifact(files / name)


@pytest.mark.parametrize(
    ("kind", "by_export", "by_verb"),
    [
        ("fused", "export/model.fused.onnx", "verbs/fused.onnx"),
        ("fp16", "export/model.fp16.onnx", "verbs/fp16.onnx"),
        ("int8", "export/model.int8.onnx", "verbs/int8.onnx"),
        ("target", "export/model.int8.jetpack-6.2.onnx", "verbs/fused.jetpack-6.2.onnx"),
    ],
)
def test_one_kind_of_file_has_the_same_settings_whichever_verb_made_it(files, kind, by_export, by_verb):
    first, second = artifact(files, by_export), artifact(files, by_verb)
    assert first.kind == second.kind == kind
    assert first.settings.keys() == second.settings.keys()
    assert {key for key in first.settings if first.settings[key] != second.settings[key]} <= {"fp16"}
    assert len(first.parents) == len(second.parents) == 1


def test_the_verb_writes_the_file_that_export_writes(files):
    """Half precision of the fused file alone, with ranges seen on the same images."""
    left, right = (onnx.load(files / name) for name in ("export/model.fp16.onnx", "verbs/fp16.onnx"))
    assert left == right


def test_every_file_has_a_sidecar_and_parents_that_are_there(files):
    for folder in (files / "export", files / "verbs"):
        for path in folder.glob("*.onnx"):
            (parent,) = read_artifact(path).parents
            assert any((files / place / parent.name).is_file() for place in ("", "export", "verbs"))


def test_fp16_tells_what_stays_in_float32(files, tmp_path, capsys):
    source, target = str(files / "export/model.fused.onnx"), tmp_path / "half.onnx"
    assert main(["fp16", source, "-o", str(target), "--float32", "softmax,acmix_0.*", "--fp16-io", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["artifact"] == json.loads((tmp_path / "half.onnx.json").read_text()) | {"path": str(target)}
    assert set(document["float32_nodes"].values()) == {"acmix_0.*", "constant", "softmax"}
    model = onnx.load(target)
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {
        onnx.TensorProto.FLOAT16
    }
    assert main(["fp16", source, "-o", str(target)]) == 0
    assert "softmax" in capsys.readouterr().out


def test_fp16_of_a_file_that_is_not_run_on_images(tmp_path, capsys):
    """It takes two inputs: ranges are those of its stored tensors, which is said."""
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in "abc"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["a", "b"], ["c"])], "g", values[:2], values[2:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "two.onnx")
    command = ["fp16", str(tmp_path / "two.onnx"), "-o", str(tmp_path / "half.onnx")]
    assert main(command) == 0
    assert "ranges are those of stored tensors" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["model.fp16.onnx", "-o", "out.onnx"], "is in float16, float32 is expected"),
        (["model.int8.onnx", "-o", "out.onnx"], "is quantised already"),
        (["model.fused.onnx", "-o", "model.fused.onnx"], "would be overwritten"),
        (["model.fused.onnx", "-o", "out.onnx", "--float32", "nothing.*"], "fits the name of no node"),
        (["model.fused.onnx", "-o", "out.onnx", "--images", "nowhere"], "nowhere is not a folder"),
        (["model.fused.onnx", "-o", "out.onnx", "--float32", "none", "--images", "."], "range is not among --float32"),
        (["model.onnx.json", "-o", "out.onnx"], "model.onnx.json"),
    ],
)
def test_fp16_refuses(files, monkeypatch, capsys, options, said):
    monkeypatch.chdir(files / "export")
    before = sorted(Path().iterdir())
    assert main(["fp16", *options]) == 2
    assert said in capsys.readouterr().err
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"int8": True}, "--int8 and --calibration go together"),
        ({"image_size": 64, "input_shape": (1, 3, 64, 64)}, "--image-size and --input-shape"),
        ({"batch": 2, "input_shape": (1, 3, 64, 64)}, "--batch and --input-shape"),
        ({"dynamic": ("depth",)}, "unknown dynamic axis depth"),
        ({"opset": 12}, "17 to 21"),
        ({"form": "any"}, "none is named"),
        ({"target": "openvino", "form": "any"}, "openvino reads no file of the form any"),
        ({"target": "jetpack-6.2", "form": "any"}, "Use --target plugin"),
        ({"target": "jetpack-9"}, "there is no target 'jetpack-9'"),
        ({"target": "jetpack-6.0", "opset": 18}, "reads 17 at most"),
        ({"plugin": Path("a.so"), "no_engine": True}, "none is asked for"),
        ({"image_size": -3}, "the plan's image_size.0 is -3"),
        ({"image_size": 64, "input_shape": (1, 3, -32, 48)}, "the plan's input_shape.2 is -32"),
        ({"seconds": float("nan")}, "the plan's seconds is nan"),
        ({"expect": -1}, "the plan's expect is -1"),
        ({"conv_branch": "wide"}, "the plan's conv_branch is 'wide'"),
        ({"fp61": True}, "the plan's fp61 is True"),
        ({"out": Path(__file__)}, "is no folder"),
    ],
)
def test_a_plan_is_checked_before_anything_is_done(tmp_path, options, said):
    """The checkpoint, which is not there, has not been looked for."""
    with pytest.raises(UserError) as caught:
        Plan(checkpoint=tmp_path / "model.pt", **options)
    assert said in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_a_plan_does_not_change():
    plan = Plan(checkpoint=Path("folder/model.pt"), no_engine=True)
    assert (plan.out, plan.path("fp16")) == (Path("model-deploy"), Path("model-deploy/model.fp16.onnx"))
    with pytest.raises(ValueError, match="frozen"):
        plan.out = Path("elsewhere")
