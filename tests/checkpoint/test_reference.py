"""Every comparison is with the model as it was loaded, at every size that is asked for."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy import yolo
from acmix_deploy.cli import main
from acmix_deploy.families import canonicalise
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.proof import keep_proven
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session


class GlobalOnSmallMaps(ACmix):
    """An ACmix whose attention is over all pixels where the map is lower than its window."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] >= self.kernel_att:
            return super()._attend(q, k, v)
        q, k, v = (part.flatten(2) for part in (q, k, v))
        weights = (q.transpose(1, 2) @ k * self.head_dim**-0.5).softmax(1)
        return (v @ weights).view(len(q), self.out_planes, *self._map)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.conv1(x), self.conv2(x), self.conv3(x)
        self._map = q.shape[2:]
        return self.rate1 * self._attend(q, k, v) + self.rate2 * self._convolve(q, k, v)


class DoubledOnOneSize(ACmix):
    """A near miss: it differs on maps of a single width."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y if x.shape[3] == 5 else y


class OnCuda(ACmix):
    """Its position is moved to a GPU that may not be there."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.zeros(1, device="cuda")
        return super()._attend(q, k.cuda(), v)


def net(block: type[ACmix]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), block(32, 32, head=4)).eval()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = ["--seconds", "0.1", "--opset", "17"]  # the smaller opset has the faster exporter


def exported(capsys, block: type[ACmix], *options: str) -> dict:
    torch.save(net(block), "model.pt")
    assert main(["export", "model.pt", "--trust", "--json", *QUICK, *options]) == 0
    return json.loads(capsys.readouterr().out)


def error_of(name: str, block: type[ACmix], height: int, width: int) -> float:
    """Of a file against the module that was saved."""
    image = np.random.default_rng(9).random((1, 3, height, width), np.float32)
    (actual,) = open_session(Path(f"model-deploy/{name}.onnx")).run(None, {"images": image})
    with torch.no_grad():
        return deviation(net(block)(torch.from_numpy(image)).numpy(), actual).relative_l2


@pytest.mark.parametrize("side", [6, 10])
def test_a_block_that_is_another_one_at_the_size_asked_for_is_left_alone(folder, capsys, side):
    found = exported(capsys, GlobalOnSmallMaps, "--image-size", str(side))
    assert error_of("model", GlobalOnSmallMaps, side, side) < 1e-5
    assert error_of("model.fused", GlobalOnSmallMaps, side, side) < 1e-5
    (block,) = found["blocks"]
    assert block["status"] == "left alone"
    assert f"[1, 32, {side // 2}, {side // 2}]" in block["reason"]
    assert found["reference"] == {"repaired": [], "uncompared": [], "as_loaded": True}


def test_the_same_block_is_replaced_at_a_size_at_which_it_is_one(folder, capsys):
    found = exported(capsys, GlobalOnSmallMaps, "--image-size", "32")
    assert found["blocks"][0]["status"] == "replaced"
    assert found["fusion"]["blocks"][0]["fused"]
    assert error_of("model.fused", GlobalOnSmallMaps, 32, 32) < 1e-5


@pytest.mark.parametrize("block", [GlobalOnSmallMaps, DoubledOnOneSize])
def test_where_any_size_may_come_small_maps_are_compared_too(block):
    original = net(block)
    model, reports = canonicalise(copy.deepcopy(original))

    def run() -> None:
        for size in ((32, 32), (32, 64), (64, 32)):
            original(torch.rand(1, 3, *size))

    model, (report,) = keep_proven(original, model, reports, run, any_size=True)
    assert report.status == "left alone"
    assert type(model[1]) is block
    model, reports = canonicalise(copy.deepcopy(original))
    _, (report,) = keep_proven(original, model, reports, run)
    assert report.status == "replaced"


def test_an_honest_block_stays_replaced_at_any_size(folder, capsys):
    class Copy(ACmix):
        pass

    original = net(Copy)
    model, reports = canonicalise(copy.deepcopy(original))
    model, (report,) = keep_proven(
        original, model, reports, lambda: [original(torch.rand(1, 3, n, 32)) for n in (32, 48)], any_size=True
    )
    assert (report.status, type(model[1])) == ("replaced", ACmix)


def test_a_dynamic_file_says_below_which_size_it_is_not_the_model(folder, capsys):
    """It holds the way that the code took at the size of the example, and blocks are fused for that."""
    found = exported(capsys, GlobalOnSmallMaps, "--image-size", "32", "--dynamic", "height,width")
    assert found["blocks"][0]["status"] == "left alone"
    assert any("below 13x13 the file computes something else" in note for note in found["export"]["notes"])
    for name in ("model", "model.fused"):
        told = open_session(Path(f"model-deploy/{name}.onnx")).get_modelmeta().custom_metadata_map
        assert told["min_size"] == "[13, 13]"
        assert error_of(name, GlobalOnSmallMaps, 13, 14) < 1e-5
        assert error_of(name, GlobalOnSmallMaps, 12, 14) > 0.1
    assert (
        main(["verify", "model-deploy/model.onnx", "model-deploy/model.fused.onnx", "--input-shape", "1,3,12,12"]) == 2
    )
    assert "13" in capsys.readouterr().err


def test_a_dynamic_file_that_is_the_model_everywhere_says_nothing(folder, capsys):
    class Copy(ACmix):
        pass

    globals()["Copy"] = Copy
    Copy.__qualname__ = "Copy"
    exported(capsys, Copy, "--image-size", "32", "--dynamic", "height,width")
    told = open_session(Path("model-deploy/model.onnx")).get_modelmeta().custom_metadata_map
    assert "min_size" not in told


class CalledByForward(nn.Module):
    """No hook of a module sees such a call."""

    def __init__(self, block: nn.Module, by_keyword: bool) -> None:
        super().__init__()
        self.block, self.by_keyword = block, by_keyword

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x=x) if self.by_keyword else self.block.forward(x)


@pytest.mark.parametrize(("by_keyword", "status"), [(False, "left alone"), (True, "replaced")])
def test_blocks_that_are_called_in_other_ways(by_keyword, status):
    original = CalledByForward(net(GlobalOnSmallMaps)[1], by_keyword)
    model, reports = canonicalise(copy.deepcopy(original))
    _, (report,) = keep_proven(original, model, reports, lambda: original(torch.rand(1, 32, 16, 16)))
    assert report.status == status


def test_what_was_repaired_to_run_is_told(folder, capsys):
    found = exported(capsys, OnCuda, "--image-size", "32")
    assert not found["reference"]["as_loaded"]
    assert found["reference"]["repaired"] == ["cuda-position"]
    assert found["verification"]["reference"] == "the model as it was repaired"
    assert main(["export", "model.pt", "--trust", "--image-size", "32", *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "Passed: every file computes what the model as it was repaired does" in printed
    assert "repaired, so that the model runs here: tensors moved to CUDA" in printed


def test_a_block_known_by_its_parts_alone_was_not_compared(folder, capsys, monkeypatch):
    """Its code is not here, so that nothing tells what it computes."""
    module = ModuleType("somebody")
    published = type("ACmix", (ACmix,), {"__module__": "somebody"})
    module.ACmix = published
    monkeypatch.setitem(sys.modules, "somebody", module)
    torch.save(net(published), "model.pt")
    monkeypatch.delitem(sys.modules, "somebody")
    assert main(["export", "model.pt", "--image-size", "32", "--json", *QUICK]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == {"repaired": [], "uncompared": ["1"], "as_loaded": False}
    assert found["verification"]["reference"] == "the model as it was loaded (except 1)"
    assert main(["export", "model.pt", "--image-size", "32", *QUICK]) == 0
    assert "taken for acmix by its parts; its own code was not run to prove it" in capsys.readouterr().out


class Distorted(nn.Module):
    """What an export prepares, and what it is made of, are two modules here."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.avg_pool2d(x, 2)


def test_a_fault_of_the_preparation_is_found(folder, capsys, monkeypatch):
    """Whatever stands between loading and exporting is compared too."""

    def prepare(model: nn.Module) -> nn.Module:
        prepared = copy.deepcopy(model)
        prepared.scale.data *= 1.01
        return prepared

    monkeypatch.setattr(yolo, "prepare_for_export", prepare)
    torch.save(Distorted().eval(), "model.pt")
    assert main(["export", "model.pt", "--trust", "--image-size", "32"]) == 1
    assert "output0 is not the module's" in capsys.readouterr().err
