"""From a checkpoint to an engine, on the stand-ins for TensorRT and CUDA, and to INT8."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from acmix_deploy import pipeline
from acmix_deploy.artifacts import sidecar
from acmix_deploy.cli import main
from acmix_deploy.errors import MissingComponent
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.manifest import read_manifest
from acmix_deploy.report.model import ExportReport
from acmix_deploy.runtime.tensorrt import EngineRunner

cv2 = pytest.importorskip("cv2", reason="no OpenCV: pip install opencv-python-headless")

SIZE = ["--input-shape", "1,3,32,48", "--seconds", "0.1"]
FAST = ["--opset", "17"]  # by the faster exporter, where no TensorRT 8.6 asks for it


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With model.pt and photos."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
    model = nn.Sequential(stem, nn.SiLU(), ACmix(16, 16, head=2), nn.Conv2d(16, 8, 1)).eval()
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        photo = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "photos" / f"{seed}.png"), photo)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report() -> ExportReport:
    return ExportReport.model_validate_json(Path("model-deploy/report.json").read_text())


def test_export_ends_with_an_engine(folder, gpu, empty_library, capsys):
    assert main(["export", "model.pt", "--fp16", *SIZE, "--plugin", str(empty_library)]) == 0
    printed = capsys.readouterr().out
    found = report()
    engine = Path("model-deploy/model.fp16.engine")
    manifest = read_manifest(engine)
    assert (found.export.opset, found.engines["fp16 engine"].manifest) == (17, manifest)
    assert (manifest.form, manifest.flags, manifest.precision) == ("plugin", ("FP16",), "float16")
    assert found.engines["fp16 engine"].plugin_layers == ("acmix_0.attention",)
    assert [parent.name for parent in found.files["fp16 engine"].artifact.parents] == ["model.fused.onnx"]
    assert "model.fp16.engine" in {comparison.candidate for comparison in found.verification.comparisons}
    assert found.files["fp16 engine"].profile.with_transfers_ms
    assert found.next_steps == ("acmix-deploy profile model-deploy/model.fp16.engine --layers --power",)
    assert "layers of model.fp16.engine are computed by the plugin" in printed
    assert main(["profile", str(engine), "--samples", "3"]) == 0
    assert Path("model-deploy/timing.cache").is_file()


def test_wrong_engine_fails(folder, gpu, empty_library, monkeypatch, capsys):
    outputs = EngineRunner.outputs.fget
    monkeypatch.setattr(
        EngineRunner, "outputs", property(lambda runner: {name: 1.1 * out for name, out in outputs(runner).items()})
    )
    assert main(["export", "model.pt", *SIZE, "--plugin", str(empty_library)]) == 1
    assert "model.fused.engine" in capsys.readouterr().err
    assert not report().passed


def test_int8_engine_on_photographs(folder, gpu, empty_library, capsys):
    options = ["--int8", "--calibration", "photos", "--plugin", str(empty_library), "--json"]
    assert main(["export", "model.pt", *SIZE, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["int8"]["skipped"] == ["broken.png: not a picture in one of JPEG, PNG, WEBP, BMP, TIFF"]
    manifest = found["engines"]["int8 engine"]["manifest"]
    assert (manifest["precision"], manifest["flags"]) == ("int8", ["FP16", "INT8"])
    assert {c["precision"] for c in found["verification"]["comparisons"]} == {"float32", "int8"}
    shapes = {tuple(c["input_shapes"]["images"]) for c in found["verification"]["comparisons"]}
    assert shapes == {(1, 3, 32, 48)}


def test_free_axes_are_built_for_what_was_checked(folder, gpu, empty_library):
    assert main(["export", "model.pt", *SIZE, "--dynamic", "batch", "--plugin", str(empty_library)]) == 0
    engine = Path("model-deploy/model.fused.engine")
    profiles = read_manifest(engine).profiles
    assert profiles == {"images": ((1, 3, 32, 48), (1, 3, 32, 48), (2, 3, 32, 48))}
    compared = [c.input_shapes["images"] for c in report().verification.comparisons if c.candidate == engine.name]
    assert list(dict.fromkeys(compared)) == [(1, 3, 32, 48), (2, 3, 32, 48)]
    (command,) = report().next_steps
    assert main(command.replace("--power", "--samples 3").split()[1:]) == 0


def test_plugin_is_done_without_where_it_cannot_be_made(folder, gpu, monkeypatch, capsys):
    def cannot(folder, progress):
        raise MissingComponent("nvcc was not found")

    monkeypatch.setattr(pipeline, "library_in", cannot)
    assert main(["export", "model.pt", *SIZE]) == 0
    assert "does without the plugin, so the attention is slower: nvcc was not found" in capsys.readouterr().out
    assert read_manifest(Path("model-deploy/model.fused.engine")).form == "plain"


def test_no_plugin_is_compiled_where_nothing_fused(folder, gpu, monkeypatch, capsys):
    monkeypatch.setattr(
        pipeline, "library_in", lambda folder, progress: pytest.fail("there is nothing to compute by it")
    )
    torch.save(nn.Conv2d(3, 8, 1), "model.pt")
    assert main(["export", "model.pt", *SIZE]) == 0
    assert "plugin" not in "".join(report().notes)


@pytest.mark.parametrize("options", [["--no-engine"], ["--for", "jetpack-6.2"]])
def test_no_engine_where_none_is_wanted(folder, gpu, options):
    assert main(["export", "model.pt", *SIZE, *options]) == 0
    assert not [*Path("model-deploy").glob("*.engine")]
    assert report().export.opset == 18
    assert any("acmix-deploy build" in step for step in report().next_steps)


def test_fp16_and_int8_engines_are_compared(folder, gpu, empty_library, capsys):
    options = ["--fp16", "--int8", "--calibration", "photos", "--plugin", str(empty_library)]
    assert main(["export", "model.pt", *SIZE, *options]) == 0
    assert list(report().engines) == ["fp16 engine", "int8 engine"]
    assert "model.int8.engine in INT8 is not faster than model.fp16.engine in FP16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "said"), [("9.3.0", "TensorRT 9.3 is not supported"), (None, "TensorRT cannot be imported")]
)
def test_a_tensorrt_of_no_use_is_a_note(folder, fake, monkeypatch, capsys, version, said):
    """A workstation's TensorRT is no reason to write no files."""
    if version:
        monkeypatch.setattr(importlib.import_module("tensorrt"), "__version__", version)
    else:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert main(["export", "model.pt", *SIZE, *FAST]) == 0
    assert f"no engine was built: {said}" in capsys.readouterr().out
    assert any("acmix-deploy build" in step for step in report().next_steps)


def test_stale_engine_is_removed(folder, gpu, empty_library):
    assert main(["export", "model.pt", *SIZE, "--plugin", str(empty_library)]) == 0
    assert main(["export", "model.pt", *SIZE, *FAST, "--no-engine"]) == 0
    assert not [*Path("model-deploy").glob("*.engine*")]


def test_what_the_user_made_is_kept(folder, gpu, empty_library, capsys):
    """Engines of `build`, also by the names that export gives to its own, and a file that was changed."""
    plugin, out = ["--plugin", str(empty_library)], Path("model-deploy")
    assert main(["export", "model.pt", *SIZE, "--fp16", *plugin]) == 0
    source, mine = out / "model.fused.onnx", [out / "model.engine", out / "model.fp16.engine"]
    for engine in mine:
        assert main(["build", str(source), *plugin, "-o", str(engine)]) == 0
    (out / "model.fp16.onnx").write_bytes(b"mine")
    kept = {path: path.read_bytes() for path in (*mine, *map(sidecar, mine), out / "model.fp16.onnx")}
    capsys.readouterr()
    assert main(["export", "model.pt", "--input-shape", "1,3,48,32", "--seconds", "0.1", *FAST, "--no-engine"]) == 0
    assert {path: path.read_bytes() for path in kept} == kept
    assert capsys.readouterr().out.count("is not of this run: it was made from a former model.fused.onnx") == 2


def test_a_run_that_is_not_possible_deletes_nothing(folder, capsys):
    assert main(["export", "model.pt", *SIZE, *FAST, "--fp16", "--for", "jetpack-6.2"]) == 0
    before = {path: path.read_bytes() for path in Path("model-deploy").iterdir()}
    assert main(["export", "model.pt", "--input-shape", "1,4,32,48"]) != 0
    Path("model.pt").write_bytes(b"no checkpoint")
    assert main(["export", "model.pt", *SIZE]) == 2
    assert {path: path.read_bytes() for path in Path("model-deploy").iterdir()} == before


def test_models_in_one_folder_leave_each_other_alone(folder):
    Path("other.pt").write_bytes(Path("model.pt").read_bytes())
    options = [*SIZE, *FAST, "--out", "out"]
    assert main(["export", "model.pt", *options, "--fp16"]) == 0
    of_model = {path.name for path in Path("out").iterdir()}
    assert main(["export", "other.pt", *options]) == 0
    assert {path.name for path in Path("out").iterdir()} > of_model
    assert main(["export", "model.pt", *options]) == 0
    found = {path.name for path in Path("out").glob("*.onnx")}
    assert found == {"model.onnx", "model.fused.onnx", "other.onnx", "other.fused.onnx"}


def test_int8_without_tensorrt(folder):
    """Scales are float16 where nothing asks for an older opset, float32 for TensorRT 8 and for ONNX Runtime."""
    for options, opset, rest, scheme in (
        ([], 19, "float16", "symmetric"),
        (["--for", "onnxruntime"], 19, "float32", "uint8"),
        (["--for", "jetpack-6.0"], 17, "float32", "symmetric"),
    ):
        assert main(["export", "model.pt", *SIZE, "--int8", "--calibration", "photos", *options]) == 0
        found = report()
        assert (found.export.opset, found.int8.rest, found.int8.scheme) == (opset, rest, scheme)
        assert onnx.load("model-deploy/model.int8.onnx").opset_import[0].version == opset
    assert found.target.file == "model.int8.jetpack-6.0.onnx"
    assert any("--fp16 --int8" in step for step in found.next_steps)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--int8"], 2, "--int8 and --calibration go together"),
        (["--calibration", "photos"], 2, "--int8 and --calibration go together"),
        (["--int8", "--calibration", "nowhere"], 2, "nowhere is not a folder"),
        (["--int8", "--calibration", "empty"], 2, "empty holds no readable image"),
        (["--plugin", "a.so"], 2, "a.so is for an engine, and none is built: there is no TensorRT with a GPU"),
        (["--plugin", "a.so", "--no-engine"], 2, "a.so is for an engine, and none is asked for"),
    ],
)
def test_bad_input(folder, capsys, options, code, said):
    (folder / "empty").mkdir()
    assert main(["export", "model.pt", *SIZE, *options]) == code
    assert said in capsys.readouterr().err
    assert not Path("model-deploy").exists()
