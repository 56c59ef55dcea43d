"""Detectors of a changed copy of Ultralytics, whose code stands in a folder of its own: ``--code``."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from acmix_deploy.checkpoint.pickles import importable
from acmix_deploy.checkpoint.source import load_source
from acmix_deploy.cli import main
from tests.untrained import enlivened

ultralytics = pytest.importorskip("ultralytics", reason="ultralytics is not installed")

WRAPPERS = {"C2f_ACmix": 2, "C3k2_ACmix": 1, "C2PSA_ACmix": 1}
"""Classes of fork_style.py, and blocks within each."""


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that holds ultralytics/ with blocks of its own; what is installed is back afterwards."""
    folder = tmp_path / "fork"
    shutil.copytree(
        Path(ultralytics.__file__).parent, folder / "ultralytics", ignore=shutil.ignore_patterns("__pycache__", "*.jpg")
    )
    own = Path(__file__).with_name("fork_style.py").read_text().replace("from __future__ import annotations\n", "")
    with (folder / "ultralytics/nn/modules/block.py").open("a") as file:
        file.write(own)
    for name in _imported():
        monkeypatch.delitem(sys.modules, name)
    yield folder
    _forget()


def _imported() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "ultralytics"]


def _forget() -> None:
    for name in _imported():
        del sys.modules[name]


def trained(fork: Path, path: Path) -> Path:
    """A detector with each wrapper once, saved as the copy's trainer does; the copy is not imported any more."""
    with importable(fork):
        tasks: Any = importlib.import_module("ultralytics.nn.tasks")
        block: Any = importlib.import_module("ultralytics.nn.modules.block")
    assert Path(tasks.__file__).is_relative_to(fork)
    layers: list[Any] = [[-1, 1, "Conv", [16, 3, 2]] for _ in range(3)] + [[-1, 1, "Conv", [16, 1]] for _ in WRAPPERS]
    layout = {"backbone": layers, "head": [[[len(layers) - 1], 1, "Detect", ["nc"]]], "nc": 2}
    model: Any = tasks.DetectionModel(layout, verbose=False)
    for index, (name, blocks) in enumerate(WRAPPERS.items(), 3):
        layer = getattr(block, name)(16, 16, *[blocks] * (blocks > 1))
        layer.i, layer.f, layer.type, layer.np = index, -1, name, 0
        model.model[index] = layer
    torch.save({"model": None, "ema": enlivened(model).half(), "train_args": {"imgsz": 64}, "version": "8.3.9"}, path)
    _forget()
    return path


def test_wrappers_of_a_fork_with_its_code(
    tmp_path: Path, fork: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trained(fork, tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "model.pt"]) == 2
    said = capsys.readouterr().err
    for name in WRAPPERS:
        assert f"ultralytics.nn.modules.block.{name}" in said
    assert "name the folder that holds ultralytics/ of the changed copy that it was trained with: --code DIR" in said
    _forget()
    source = load_source(path, trust=True, code=fork)
    assert [(block.class_name, block.status) for block in source.blocks] == [("ACmix", "replaced")] * 4
    assert source.reference.report.as_loaded
    assert source.metadata.task == "detect"
    assert Path(sys.modules["ultralytics"].__file__ or "").is_relative_to(fork)
