"""Checkpoints that another Python loads, runs and exports: ``--python``.

The other Python is mostly this one. One with an older PyTorch and an older Ultralytics is tried where it is:

    ACMIX_OLD_PYTHON    an interpreter with torch 1.13.1, NumPy below 2 and ultralytics 8.0.200
"""

from __future__ import annotations

import ast
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from acmix_deploy import yolo
from acmix_deploy.checkpoint import elsewhere, load
from acmix_deploy.checkpoint.interpreter import load_elsewhere, metadata_of
from acmix_deploy.checkpoint.pickles import importable
from acmix_deploy.errors import AcmixDeployError, MissingComponent, UserError
from acmix_deploy.plan import Plan
from acmix_deploy.runtime.inputs import random_images
from acmix_deploy.runtime.onnxruntime import open_session
from tests import ROOT
from tests.pipeline.parts import deployed

HERE = Path(sys.executable)
CODE = ROOT / "tests/pipeline/old_style"


def saved(path: Path) -> tuple[nn.Module, Path]:
    """A model of their code, in half precision; the code is not imported any more."""
    torch.manual_seed(0)
    with importable(CODE):
        from their_acmix import ACmix  # type: ignore[import-not-found]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), ACmix(8, 2, 3)).half()
    torch.save({"ema": model, "opt": {"imgsz": 16}}, path)
    del sys.modules["their_acmix"]
    return copy.deepcopy(model).float().eval(), path


def test_a_checkpoint_to_files_by_another_python(tmp_path: Path) -> None:
    """Its code is not imported here; blocks are known in the graph."""
    model, path = saved(tmp_path / "a.pt")
    options = {"python": HERE, "code": CODE, "trust": True, "opset": 18, "expect": 1}
    report = deployed(path, tmp_path / "out", dynamic=("batch", "height"), **options)
    assert report.passed
    assert "their_acmix" not in sys.modules
    assert (report.export.exporter, report.export.opset, report.blocks) == ("torchscript", 18, ())
    assert report.export.checked_shapes[0] == (1, 3, 16, 16)
    assert f"loaded, run and exported by {HERE} with Python" in report.notes[2]
    assert report.notes[:2] == ("took 'ema' from the checkpoint", "weights converted from float16 to float32")
    x = random_images((2, 3, 12, 16))
    (y,) = open_session(tmp_path / "out/a.fused.onnx").run(None, {"images": x})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), model(torch.from_numpy(x)))


@pytest.mark.parametrize("name", ["yolov8n.yaml", "yolov10n.yaml", "yolov8n-pose.yaml", "yolov8n-cls.yaml"])
def test_what_is_told_of_a_model_of_ultralytics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same as here, where the same release is installed; so is the form that is exported."""
    tasks = pytest.importorskip("ultralytics.nn.tasks", reason="needs ultralytics")
    kinds = {"pose": tasks.PoseModel, "cls": tasks.ClassificationModel}
    kind = kinds.get(name.removesuffix(".yaml").rpartition("-")[2], tasks.DetectionModel)
    torch.save({"ema": kind(name, verbose=False).half(), "train_args": {"imgsz": 64}}, tmp_path / "a.pt")
    monkeypatch.setattr(sys, "path", [*sys.path])
    there = elsewhere.Elsewhere()
    told = there.load(str(tmp_path / "a.pt"), None)["told"]
    here = load(tmp_path / "a.pt")
    assert metadata_of(told) == here.metadata
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for given, expected in zip(
            elsewhere.tensors_of(there.prepared(x)),
            elsewhere.tensors_of(yolo.prepare_for_export(here.module)(x)),
            strict=True,
        ):
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_what_goes_wrong_there_is_told(tmp_path: Path) -> None:
    _, path = saved(tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"cannot be loaded by {HERE}: ModuleNotFoundError: .*their_acmix") as caught:
        load_elsewhere(path, HERE, trust=True)
    assert "--code names the folder" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"python": Path("/bin/false")}, UserError, "/bin/false ended with exit code 1"),
        ({"python": Path("/nowhere/python")}, MissingComponent, "--python /nowhere/python does not run"),
        ({"python": HERE, "trust": False}, UserError, "would run code from the checkpoint"),
        ({"python": HERE, "code": Path("/nowhere")}, UserError, "--code /nowhere is no folder"),
    ],
)
def test_what_cannot_be_asked_for(
    tmp_path: Path, options: dict[str, object], error: type[AcmixDeployError], said: str
) -> None:
    path = tmp_path / "a.pt"
    torch.save(nn.ReLU(), path)
    with pytest.raises(error, match=said):
        load_elsewhere(path, **{"trust": True, **options})  # type: ignore[arg-type]


def test_the_plan_refuses_it_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would run code from the checkpoint"):
        Plan(checkpoint=tmp_path / "a.pt", python=HERE)
    with pytest.raises(UserError, match="--arch is for a model that is loaded here"):
        Plan(checkpoint=tmp_path / "a.pt", python=HERE, trust=True, arch="a:b")


def test_the_script_is_of_python_3_8_and_needs_no_package_of_ours() -> None:
    tree = ast.parse(Path(elsewhere.__file__).read_text(), feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
        assert not isinstance(node, (ast.Match, ast.TryStar if hasattr(ast, "TryStar") else ast.Match))
    assert imported - set(sys.stdlib_module_names) == {"torch", "numpy", "ultralytics"}


# ---------------------------------------------------------------------------------------------------------------------
# An older environment

OLD = os.environ.get("ACMIX_OLD_PYTHON")
MAKE = """
import copy, sys
sys.path.insert(0, sys.argv[2])
import torch, ultralytics
from their_acmix import ACmix
from ultralytics.nn import tasks
from ultralytics.utils import ROOT, yaml_load

torch.manual_seed(0)
segments = sys.argv[3] == "segment"
name = "yolov8-seg" if segments else "yolov8"
model = (tasks.SegmentationModel if segments else tasks.DetectionModel)(
    {**yaml_load(ROOT / "cfg/models/v8" / (name + ".yaml")), "scale": "n", "nc": 2}, verbose=False
)
last = model.model[9]
layer = torch.nn.Sequential(last, ACmix(256))
layer.i, layer.f, layer.type, layer.np = last.i, last.f, "ACmix", 0
model.model[9] = layer
for module in model.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
        module.momentum = None
for _ in range(2):
    model.train()(torch.rand(2, 3, 128, 128))
for branch in model.model[-1].cv3:
    branch[-1].bias.data.fill_(-2)
model.names = {0: "cat", 1: "dog"}
saved = {"ema": copy.deepcopy(model).half(), "train_args": {"imgsz": 256}, "version": ultralytics.__version__}
torch.save(saved, sys.argv[1])
"""


@pytest.mark.soak
@pytest.mark.skipif(not OLD, reason="no older environment: name its interpreter in ACMIX_OLD_PYTHON")
@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_fork_on_an_older_ultralytics(tmp_path: Path, task: str) -> None:
    path = tmp_path / "model.pt"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(OLD), "-c", MAKE, str(path), str(CODE), task], env=environment, check=True)
    axes = ("batch", "height", "width") if task == "detect" else ()
    options = {"python": Path(str(OLD)), "code": CODE, "trust": True, "fp16": True, "expect": 1, "dynamic": axes}
    report = deployed(path, tmp_path / "out", opset=17 if axes else 18, **options)
    assert report.passed
    assert "torch 1.13.1" in report.notes[-1]
    assert "ultralytics 8.0.200" in report.notes[-1]
    assert [output.shape[1] for output in report.export.outputs] == ([6] if axes else [38, 32])
