"""The tutorial is followed, step by step: with few images here, as it stands with soak."""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from acmix_deploy import ACmix, cli
from acmix_deploy.checkpoint import load
from acmix_deploy.gate import worker
from acmix_deploy.plan import Plan
from scripts import tutorial
from scripts.train_shapes import CHECKPOINT
from tests.scripts.test_docs import blocks, lines_without_figures

pytest.importorskip("ultralytics", reason="needs ultralytics")
if not shutil.which("curl"):
    pytest.skip("needs curl", allow_module_level=True)

PAGE = tutorial.PAGE.read_text(encoding="utf-8")
FEW = {
    "shapes.py shapes": "shapes.py shapes --train 8 --val 4",
    "imgsz=160 epochs=6": "imgsz=128 epochs=1 plots=False",
    "best.pt --fp16": "best.pt --no-profile --image-size 128 --fp16",
    "gate run": "gate run --rounds 1 --seconds 0.1",
    " --rounds 6": "",
}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics' own folder, with a font in it, which would be downloaded otherwise."""
    import matplotlib

    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "settings"))
    (tmp_path / "settings/Ultralytics").mkdir(parents=True)
    font = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    shutil.copy(font, tmp_path / "settings/Ultralytics/Arial.ttf")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs a command on few images, ours and the turns of a gate in this process; the trained detector replaces what
    was trained."""
    monkeypatch.setattr("acmix_deploy.gate.measure._ask", worker.measure)
    monkeypatch.setattr(import_module("acmix_deploy.export"), "_dynamo", Mock(side_effect=NotImplementedError))
    monkeypatch.setattr(Plan.model_fields["seconds"], "default", 0.1)

    def run(command: str, folder: Path) -> str:
        for usual, small in FEW.items():
            command = command.replace(usual, small)
        words = shlex.split(command)
        if words[0] == "python" and words[1] in ("model.py", "block.py"):
            monkeypatch.chdir(folder)
            runpy.run_path(words[1])
            return ""
        if words[0] == "acmix-deploy":
            monkeypatch.chdir(folder)
            capfd.readouterr()
            code = cli.main(words[1:])
            printed = capfd.readouterr()
            allowed = (0, 4) if command.startswith(tutorial.MAY_TELL_NOTHING) else (0,)
            assert code in allowed, f"{command}\n{printed.out}\n{printed.err}"
            return printed.out
        printed_there = tutorial.shell(command, folder)
        if " detect train " in command:
            saved = folder / "runs/shapes/weights/best.pt"
            assert [type(module) for module in load(saved).module.modules()].count(ACmix) == 3
            shutil.copy(CHECKPOINT, saved)
        return printed_there

    return run


def test_the_page_is_followed_with_few_images(tmp_path: Path, settings: None, quick) -> None:
    check(tmp_path, quick)


@pytest.mark.soak
def test_the_page_is_followed_as_it_stands(tmp_path: Path, settings: None) -> None:
    check(tmp_path, tutorial.shell)
    assert tutorial.trained(tmp_path)["mAP50"] > 0.35


def check(folder: Path, run) -> None:
    answer = {}
    for step, printed in tutorial.follow(folder, run):
        assert lines_without_figures(step.shown) <= lines_without_figures(printed), step.text
        if step.text.startswith("curl"):
            answer = json.loads(printed)
    (shown,) = (json.loads(content) for _, content in blocks(tutorial.PAGE, "json"))
    for one in (answer, shown):
        assert one["model"] == "new"
        ((image,), found) = one["images"], one["images"][0]["detections"]
        assert (image["width"], image["height"]) == (160, 160)
        assert {"name", "score", "box"} == set(found[0])
    layers = yaml.safe_load((folder / "yolov8n-acmix.yaml").read_text(encoding="utf-8"))["head"]
    assert [-1, 1, "ACmix", [256]] in layers
    assert str(layers[-1][0]) in PAGE
    check_workflow(folder, run)


def check_workflow(folder: Path, run) -> None:
    """Its commands, in a repository as the page wants it."""
    repository = folder / "repository"
    (repository / "base").mkdir(parents=True)
    shutil.copytree(folder / "shapes/val/images", repository / "photos")
    shutil.copy(folder / "today.onnx", repository / "base/model.onnx")
    shutil.copy(folder / "new.onnx", repository / "model.onnx")
    ((name, content),) = ((step.file, step.text) for step in tutorial.steps(PAGE) if step.language == "yaml")
    assert name == ".github/workflows/detector.yml"
    assert yaml.safe_load((folder / name).read_text(encoding="utf-8")) == yaml.safe_load(content)
    (job,) = yaml.safe_load(content)["jobs"].values()
    assert [step["uses"] for step in job["steps"] if "uses" in step][1:2] == ["actions/checkout@v4"]
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands[0] == 'pip install "$ACMIX_DEPLOY"'
    summary = repository / "summary.md"
    for command in commands[1:]:
        alone, _, tolerated = command.replace("$GITHUB_STEP_SUMMARY", str(summary)).partition(" || ")
        run(alone, repository)
        assert tolerated in ("", "test $? = 4")
    assert "model" in summary.read_text(encoding="utf-8")
