"""Checkpoints of the repositories of YOLOv5, YOLOv7 and YOLOv9, whose models are modules of a package ``models``."""

from __future__ import annotations

import copy
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from acmix_deploy import yolo
from acmix_deploy.checkpoint.elsewhere import Elsewhere, tensors_of
from acmix_deploy.checkpoint.interpreter import metadata_of
from acmix_deploy.checkpoint.pickles import importable
from acmix_deploy.checkpoint.source import load_source
from acmix_deploy.detection.heads import head_of
from acmix_deploy.export import export
from acmix_deploy.runtime.inputs import random_images
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session
from tests.pipeline.parts import deployed
from tests.untrained import settled

STYLE = Path(__file__).with_name("yolov5_style")  # a folder with the package models, as those repositories have it
ANCHORS = [[10, 13, 16, 30], [30, 61, 62, 45], [116, 90, 156, 198]]
SIZES = {"nc": 3, "depth_multiple": 0.33, "width_multiple": 0.25, "anchors": ANCHORS}
STYLES = {
    "yolov5": {
        **SIZES,
        "backbone": [
            [-1, 1, "Conv", [32, 3, 2]],
            [-1, 1, "Conv", [64, 3, 2]],
            [-1, 3, "C3", [64]],
            [-1, 1, "Conv", [128, 3, 2]],
            [-1, 6, "C3", [128]],
            [-1, 1, "Conv", [128, 3, 2]],
            [-1, 3, "C3", [128]],
            [-1, 1, "Conv", [256, 3, 2]],
            [-1, 1, "ACmix", [256]],
            [-1, 1, "SPPF", [256, 5]],
        ],
        "head": [
            [-1, 1, "Conv", [128, 1, 1]],
            [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
            [[-1, 6], 1, "Concat", [1]],
            [-1, 3, "C3", [128, False]],
            [-1, 1, "ACmix", [128, 7, 2]],
            [[4, 14, 9], 1, "Detect", ["nc", "anchors"]],
        ],
    },
    "yolov7": {
        **SIZES,
        "backbone": [
            [-1, 1, "Conv", [32, 3, 2]],
            [-1, 1, "Conv", [64, 3, 2]],
            [-1, 1, "Conv", [32, 1, 1]],
            [-2, 1, "Conv", [32, 1, 1]],
            [-1, 1, "Conv", [32, 3, 1]],
            [[-1, -2, -3], 1, "Concat", [1]],
            [-1, 1, "Conv", [64, 1, 1]],
            [-1, 1, "MP", []],
            [-1, 1, "Conv", [64, 1, 1]],
            [-3, 1, "Conv", [64, 3, 2]],
            [[-1, -2], 1, "Concat", [1]],
            [-1, 1, "MP", []],
            [-1, 1, "Conv", [128, 3, 1]],
            [-1, 1, "MP", []],
            [-1, 1, "Conv", [256, 1, 1]],
            [-1, 1, "ACmix", [256]],
        ],
        "head": [
            [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
            [[-1, 12], 1, "Concat", [1]],
            [-1, 1, "RepConv", [128]],
            [10, 1, "RepConv", [128]],
            [15, 1, "RepConv", [256]],
            [[19, 18, 20], 1, "IDetect", ["nc", "anchors"]],
        ],
    },
}


@pytest.fixture
def repository():
    """The module models.yolo, of the folder of its code; gone afterwards."""
    _forget_models()  # any folder of that name on the path becomes the package as soon as someone imports it
    with importable(STYLE):
        yolo_module = import_module("models.yolo")
    yield yolo_module
    _forget_models()


def _forget_models():
    for name in [name for name in sys.modules if name.partition(".")[0] == "models"]:
        del sys.modules[name]


def saved(path, model, **entries):
    """As their trainers do; their code is not imported any more."""
    half = copy.deepcopy(model).half()
    beside = {"epoch": -1, "best_fitness": np.array([0.4]), "updates": 7, "optimizer": None, "git": None}
    torch.save({**beside, "model": copy.deepcopy(half), "ema": half, **entries}, path)
    _forget_models()
    return path


@pytest.mark.parametrize(
    ("style", "blocks", "opset"),
    [("yolov5", 2, 17), ("yolov7", 1, 17), pytest.param("yolov7", 1, 18, marks=pytest.mark.soak)],
)
def test_checkpoints_of_repositories_with_a_package_models(tmp_path, repository, style, blocks, opset):
    """With the folder of their code; the block is somebody's port, and boxes have anchors."""
    torch.manual_seed(0)
    model = settled(repository.Model(STYLES[style]))
    path = saved(tmp_path / "model.pt", model, opt={"imgsz": 128})
    options = {"trust": True, "code": STYLE, "fp16": True, "opset": opset, "expect": blocks}
    report = deployed(path, tmp_path, input_shape=(1, 3, 128, 160), **options)
    assert report.passed
    assert report.notes[0] == "took 'ema' from the checkpoint"
    assert [block.class_name for block in report.blocks] == ["ACmix"] * blocks
    assert [output.shape for output in report.export.outputs] == [(1, 2 * (16 * 20 + 8 * 10 + 4 * 5), 8)]
    (output,) = open_session(tmp_path / "model.fused.onnx").run(None, {"images": random_images((1, 3, 128, 160))})
    with torch.no_grad():
        expected = model.half().float()(torch.from_numpy(random_images((1, 3, 128, 160))))[0].numpy()
    assert deviation(expected, output).relative_l2 < 1e-5
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.fused.onnx").metadata_props}
    assert metadata["names"] == "{0: '0', 1: '1', 2: '2'}"
    assert (metadata["task"], metadata["stride"]) == ("detect", "32")
    assert metadata["imgsz"] == "[128, 160]", "that of the file, not of training"


# ---------------------------------------------------------------------------------------------------------------------
# Heads

HEADS = {
    "Detect": ([2, 3], ["nc", "anchors"]),
    "IDetect": ([2, 3], ["nc", "anchors"]),
    "Segment": ([2, 3], ["nc", "anchors", 6]),
    "DualDetect": ([2, 3, 2, 3], ["nc"]),
    "DualSegment": ([2, 3, 2, 3], ["nc", 6]),
    "Panoptic": ([2, 3, 2, 3], ["nc", 6]),
}
DECODED = {
    "Detect": lambda given: [given[0]],
    "IDetect": lambda given: [given[0]],
    "Segment": lambda given: [given[0], given[1]],
    "DualDetect": lambda given: [given[0][1]],
    "DualSegment": lambda given: [given[0], given[1][2]],
}
X = torch.rand(2, 3, 64, 96)


def small(repository, head):
    """Four convolutions and a head at strides of 8 and 16."""
    sources, arguments = HEADS[head]
    layout = {
        **SIZES,
        "anchors": ANCHORS[:2],
        "backbone": [[-1, 1, "Conv", [32, 3, 2]] for _ in range(4)],
        "head": [[sources, 1, head, arguments]],
    }
    return settled(repository.Model(layout))


def own(model, x=X):
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("head", DECODED)
def test_what_is_decoded_is_exported_alone(tmp_path, repository, head):
    """As the model itself gives it, with all axes free."""
    model = small(repository, head)
    model.names = {0: "a", 1: "b", 2: "c"}
    path = saved(tmp_path / "a.pt", model)
    source = load_source(path, image_size=64, dynamic=("batch", "height", "width"), trust=True, code=STYLE)
    wanted = DECODED[head](own(model.half().float()))
    for given in (own(source.reference), own(source.module)):
        for tensor, expected in zip(given, wanted, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)
    told = source.metadata
    assert (told.task, told.stride, told.names) == ("segment" if len(wanted) > 1 else "detect", 16, model.names)
    options = {"input_shape": source.shape, "opset": 17, "dynamic": ("batch", "height", "width"), "divisor": 16}
    made = export(source.module, tmp_path / "a.onnx", reference=source.reference, **options)
    axis = 1 if head.startswith("Dual") else 2
    first, *others = (output.shape for output in made.found.outputs)
    layout = head_of(told, {output.name: output.shape for output in made.found.outputs}).layout
    assert layout == ("anchors" if axis == 1 else "objectness")
    assert first[axis] == wanted[0].shape[axis]
    assert first[0] == "batch"
    assert [shape[1] for shape in others] == [6] * (len(wanted) - 1)


@pytest.mark.parametrize("head", HEADS)
def test_another_python_tells_the_same_of_a_head(tmp_path, repository, monkeypatch, head):
    model = small(repository, head)
    path = saved(tmp_path / "a.pt", model, opt={"imgsz": 64})
    monkeypatch.setattr(sys, "path", [*sys.path])
    there = Elsewhere()
    told = there.load(str(path), str(STYLE))
    facts = told["head"]
    assert told["told"] == {"imgsz": [64, 64]}
    assert (facts is None) == (head == "Panoptic")
    if facts:
        rows = yolo.rows_of(len(facts["names"]), *facts["numbers"], anchors=facts["anchors"])
        told = yolo.told_of(rows, facts["names"], facts["stride"], facts["channels"])
        assert metadata_of(told) == yolo.detection_metadata(model)
    for given, expected in zip(tensors_of(own(there.prepared)), tensors_of(own(there.model)), strict=True):
        torch.testing.assert_close(given, expected)


def unlike_names(model):
    model.names = ["a", "b"]


def with_more_values(model):
    model.model[-1].no += 1  # as where there are keypoints


def without_names(model):
    del model.names


@pytest.mark.parametrize("change", [unlike_names, with_more_values, without_names])
def test_a_head_of_another_kind_is_left_as_it_is(repository, change):
    model = small(repository, "Detect")
    change(model)
    assert yolo.prepare_for_export(model) is model
    assert yolo.detection_metadata(model).entries == {}
    assert yolo.exported(model, X, [torch.zeros(1)] * 3) == [0, 1, 2]


def test_a_head_that_gives_more_is_left_as_it_is(repository):
    model = small(repository, "Panoptic")
    assert yolo.prepare_for_export(model) is model
    assert yolo.detection_metadata(model).entries == {}


def test_nothing_is_left_out_that_may_be_of_use(repository):
    model = small(repository, "Segment")
    decoded, prototypes, maps = own(model)
    outputs = [decoded, prototypes, *maps]
    assert yolo.exported(model, X, outputs) == [0, 1]
    assert yolo.exported(model, X, [*outputs, prototypes[:, :1]]) == [0, 1, 2, 3, 4]
    assert yolo.exported(model, X, [*outputs, decoded[0]]) == [0, 1, 2, 3, 4]
    assert yolo.exported(model, X, [decoded, *maps]) == [0, 1, 2]


@pytest.mark.parametrize("fuse", ["right", "wrong", "raises"])
def test_their_own_fuse_is_taken_where_it_changes_nothing(repository, monkeypatch, fuse):
    model = small(repository, "Detect")

    def fused(self):
        assert fuse != "raises"
        self.was_fused = True
        if fuse == "wrong":
            self.model[-1].m[0].weight.data[5] *= 2  # one class, in one of two maps

    monkeypatch.setattr(repository.Model, "fuse", fused, raising=False)
    prepared = yolo.prepare_for_export(model)
    assert hasattr(prepared.model, "was_fused") is (fuse == "right")
    assert not hasattr(model, "was_fused")
    torch.testing.assert_close(own(prepared)[0], own(model)[0], rtol=1e-5, atol=1e-5)


def test_a_grid_of_another_image_is_not_kept(repository):
    model = small(repository, "IDetect")
    own(model)
    assert own(yolo.prepare_for_export(model))[0].shape == own(model)[0].shape
    assert all(grid.numel() == 1 for grid in yolo.prepare_for_export(model).model.model[-1].grid)
