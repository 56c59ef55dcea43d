"""Every kind of checkpoint loads to the same weights, hostile ones run nothing, broken ones are named."""

from __future__ import annotations

import argparse
import builtins
import copy
import functools
import importlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from acmix_deploy import yolo
from acmix_deploy.checkpoint import load
from acmix_deploy.cli import main
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.plan import Plan

ARCH = "arch_of_test:build"


class Local(nn.Module):
    """A module of a user's own code."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), ACmix(8, 8, 3, 2))


@pytest.fixture
def arch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A factory in the current directory, which is not on the import path."""
    (tmp_path / "arch_of_test.py").write_text(
        "from torch import nn\n"
        "from acmix_deploy.families.acmix.module import ACmix\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), ACmix(8, 8, 3, 2))\n"
        "def number():\n"
        "    return 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "arch_of_test", raising=False)
    importlib.invalidate_caches()
    return ARCH


def saved(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def agree(module: Any, reference: nn.Module) -> bool:
    x = torch.rand(2, 3, 8, 9)
    assert not module.training
    return torch.equal(module(x), reference.eval()(x))


# ---------------------------------------------------------------------------------------------------------------------
# What loads


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: {"model": model, "epoch": 3},
        lambda model: {"ema": model, "model": nn.ReLU()},
        lambda model: {"ema": None, "model": model},
        lambda model: {"state_dict": model},
        nn.DataParallel,
    ],
    ids=["module", "model", "ema first", "no ema", "state_dict", "data parallel"],
)
def test_a_pickled_module(tmp_path: Path, wrap: Callable[[nn.Module], object]) -> None:
    model = network()
    loaded = load(saved(tmp_path / "a.pt", wrap(model)))
    assert agree(loaded.module, model)
    assert loaded.metadata.entries == {}


def test_files_of_the_old_format(tmp_path: Path, arch: str) -> None:
    """Those of whole modules contain source code as well, which no restricted load takes."""
    model = network()
    weights = saved(tmp_path / "a.pt", model.state_dict(), _use_new_zipfile_serialization=False)
    assert agree(load(weights, arch=arch).module, model)
    whole = saved(tmp_path / "b.pt", model, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="restricted load"):
        load(whole)
    assert agree(load(whole, trust=True).module, model)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "wrap",
    [lambda s: s, lambda s: {"state_dict": s, "epoch": 1}, lambda s: {"model": s, "optimizer": {"state": {}}}],
    ids=["bare", "state_dict", "model"],
)
def test_a_state_dict(tmp_path: Path, arch: str, prefix: str, wrap: Callable[[object], object]) -> None:
    model = network()
    state = OrderedDict((prefix + name, tensor) for name, tensor in model.state_dict().items())
    assert agree(load(saved(tmp_path / "a.pth", wrap(state)), arch=arch).module, model)
    assert str(tmp_path) not in sys.path


def test_half_precision_is_widened_and_told(tmp_path: Path) -> None:
    model = network().half()
    loaded = load(saved(tmp_path / "a.pt", model))
    assert {tensor.dtype for tensor in loaded.module.parameters()} == {torch.float32}
    assert agree(loaded.module, model.float())
    assert loaded.notes == ("weights converted from float16 to float32",)


def test_a_layer_that_an_older_pytorch_saved(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Upsample(scale_factor=2))
    del model[0].recompute_scale_factor
    assert agree(load(saved(tmp_path / "a.pt", model)).module, nn.Upsample(scale_factor=2))


def test_an_ultralytics_checkpoint(tmp_path: Path) -> None:
    """With what a training run leaves in it beside the weights."""
    pytest.importorskip("ultralytics", reason="needs ultralytics")
    model: Any = yolo.build("p5", num_classes=2)
    model.names = {0: "cat", 1: "dog"}
    average = copy.deepcopy(model).half()
    average.args = yolo.ultralytics("utils").DEFAULT_CFG
    checkpoint = {
        "epoch": 1,
        "best_fitness": np.float64(0.5),
        "model": None,
        "ema": average,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1).state_dict(),
        "train_args": {"imgsz": 160, "save_dir": Path("runs")},
        "options": argparse.Namespace(lr=0.1),
    }
    loaded = load(saved(tmp_path / "a.pt", checkpoint))
    x = torch.rand(1, 3, 128, 128)
    module: Any = loaded.module
    assert torch.equal(module(x)[0], average.float().eval()(x)[0])
    assert loaded.notes == ("took 'ema' from the checkpoint", "weights converted from float16 to float32")
    assert loaded.metadata.entries["names"] == "{0: 'cat', 1: 'dog'}"
    assert loaded.metadata.entries["imgsz"] == "[160, 160]"


@pytest.mark.parametrize("trust", [False, True], ids=["restricted", "trusted"])
def test_a_classifier_of_ultralytics(tmp_path: Path, trust: bool) -> None:
    """Its images are prepared by objects of torchvision, which its trainer leaves on the model."""
    tasks = pytest.importorskip("ultralytics.nn.tasks", reason="needs ultralytics")
    augment: Any = yolo.ultralytics("data.augment")
    model = tasks.ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False).eval()
    model.transforms = augment.classify_transforms(64)
    older = [kind() for kind in (augment.CenterCrop, augment.ToTensor, augment.ClassifyLetterBox)]
    model.transforms.transforms += older  # as 8.0 has them
    path = saved(tmp_path / "a.pt", {"ema": copy.deepcopy(model).half(), "train_args": {"imgsz": 64}})
    loaded: Any = load(path, trust=trust)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(x)[0], model.half().float()(x)[0])
    assert loaded.metadata.task == "classify"
    copy.deepcopy(loaded.module)  # what an export does first


def test_arrays_beside_a_model(tmp_path: Path) -> None:
    """As those who train YOLOv5, YOLOv7 and YOLOv9 save the best fitness."""
    model = network().half()
    entries = {"epoch": 9, "best_fitness": np.array([0.5]), "last": np.float32(0.5), "names": np.array(["a", "b"])}
    loaded = load(saved(tmp_path / "a.pt", {"ema": model, **entries}))
    assert agree(loaded.module, model.float())


class CfgNode(dict):  # type: ignore[type-arg]
    """As yacs has it: a dict with attributes, from a package that need not be installed."""


CfgNode.__module__ = "yacs.config"


def test_a_configuration_beside_a_state_dict(tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = network(), CfgNode(depth=CfgNode(stages=[2, 2]))
    config.immutable = True  # type: ignore[attr-defined]
    yacs = ModuleType("yacs.config")
    yacs.CfgNode = CfgNode  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", yacs)
        path = saved(tmp_path / "a.pth", {"model": model.state_dict(), "config": config})
    assert agree(load(path, arch=arch).module, model)


def test_an_exported_program(tmp_path: Path) -> None:
    model = network().eval()
    axes = {0: torch.export.Dim("b"), 2: torch.export.Dim("h", min=6), 3: torch.export.Dim("w", min=6)}
    program = torch.export.export(model, (torch.rand(2, 3, 8, 9),), dynamic_shapes=({**axes},))
    torch.export.save(program, tmp_path / "a.pt2")
    loaded: Any = load(tmp_path / "a.pt2").module
    x = torch.rand(1, 3, 7, 11)
    torch.testing.assert_close(loaded.module()(x), model(x))
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_class_of_ones_own_needs_trust(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"model": nn.Sequential(Local())})
    with pytest.raises(UserError, match=rf"{__name__}\.Local") as caught:
        load(path)
    assert "--trust" in caught.value.hint
    assert "runs code" in caught.value.hint
    assert agree(load(path, trust=True).module, Local())


# ---------------------------------------------------------------------------------------------------------------------
# Classes that cannot be imported


class Published(nn.Module):
    """The parts and the geometry that published blocks have."""

    def __init__(self, planes: int = 8, kernel_att: int = 3, head: int = 2, stride: int = 1) -> None:
        super().__init__()
        self.in_planes = self.out_planes = planes
        self.kernel_att, self.head, self.stride, self.dilation = kernel_att, head, stride, 1
        self.head_dim = planes // head
        self.rate1, self.rate2 = nn.Parameter(torch.tensor([0.6])), nn.Parameter(torch.tensor([0.3]))
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(planes, planes, 1) for _ in range(3))
        self.conv_p = nn.Conv2d(2, self.head_dim, 1)
        self.pad_att: nn.Module = nn.ReflectionPad2d(kernel_att // 2)
        self.unfold = nn.Unfold(kernel_att, stride=stride)
        self.softmax = nn.Softmax(1)
        self.fc = nn.Conv2d(3 * head, 9, 1, bias=False)
        self.dep_conv = nn.Conv2d(9 * self.head_dim, planes, 3, stride, 1, groups=self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        block = ACmix(self.in_planes, self.out_planes, self.kernel_att, self.head, stride=self.stride)
        block.load_state_dict(self.state_dict())
        return block(x)


class Neck(nn.Module):
    """Some other module with a block in it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block


ABSENT = ["models.common.ACmix", "__main__.ACmix", "ultralytics.nn.modules.ACmix", "ultralytics.nn.extra.acmix.ACmix"]


def saved_as(path: Path, value: object, kind: type, name: str) -> Path:
    """Save ``value`` so that the file calls the class ``kind`` by ``name``, which cannot be imported afterwards."""
    package, _, attribute = name.rpartition(".")
    parts = package.split(".")
    before = kind.__module__, kind.__qualname__
    with pytest.MonkeyPatch.context() as patch:
        for end in range(1, len(parts) + 1):
            if (part := ".".join(parts[:end])) not in sys.modules:
                patch.setitem(sys.modules, part, ModuleType(part))
        patch.setattr(sys.modules[package], attribute, kind, raising=False)
        kind.__module__, kind.__qualname__ = package, attribute
        try:
            return saved(path, value)
        finally:
            kind.__module__, kind.__qualname__ = before


@pytest.mark.parametrize("trust", [False, True], ids=["restricted", "trusted"])
@pytest.mark.parametrize("name", ABSENT)
def test_a_block_whose_class_is_gone_is_known_by_its_parts(tmp_path: Path, name: str, trust: bool) -> None:
    if name.startswith("ultralytics."):
        pytest.importorskip("ultralytics.nn.modules", reason="needs ultralytics")
    block = Published()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), block, nn.SiLU(), block).half().train()
    block.i, block.f, block.type, block.np = 1, -1, name, 9  # type: ignore[assignment]
    before = {package: set(vars(sys.modules[package])) for package in ("__main__", "torch.nn")}
    loaded: Any = load(saved_as(tmp_path / "a.pt", {"ema": model}, Published, name), trust=trust)
    assert type(loaded.module[1]) is ACmix
    assert loaded.module[3] is loaded.module[1]
    assert agree(loaded.module, model.float())
    assert (loaded.module[1].i, loaded.module[1].f, loaded.module[1].type) == (1, -1, name)
    assert loaded.notes[0] == "took 'ema' from the checkpoint"
    assert re.fullmatch(
        rf"1: {re.escape(name)} is not here, taken for acmix by its parts; .* prove it", loaded.notes[1]
    )
    # nothing is left behind
    assert {package: set(vars(sys.modules[package])) for package in before} == before
    package = name.rpartition(".")[0]
    assert package in ("__main__", "ultralytics.nn.modules") or package not in sys.modules


def test_a_model_that_is_itself_a_block_whose_class_is_gone(tmp_path: Path) -> None:
    block = Published(stride=2)
    module: Any = load(saved_as(tmp_path / "a.pt", block, Published, "models.common.ACmix")).module
    assert (module.kernel_att, module.stride) == (3, 2)
    x = torch.rand(1, 8, 6, 8)
    assert torch.equal(module(x), block.eval()(x))


def test_an_ultralytics_model_with_a_class_of_its_own_code(tmp_path: Path) -> None:
    """The usual case: somebody put ACmix into their copy of Ultralytics and sends the checkpoint."""
    pytest.importorskip("ultralytics", reason="needs ultralytics")
    model: Any = yolo.build("p5", num_classes=2)
    (index,) = (index for index, layer in enumerate(model.model) if type(layer) is ACmix)
    own = model.model[index]
    theirs = Published(own.in_planes, own.kernel_att, own.head)
    theirs.dep_conv.bias = None
    theirs.load_state_dict(own.state_dict())
    theirs.i, theirs.f, theirs.type, theirs.np = own.i, own.f, own.type, own.np
    x = torch.rand(1, 3, 256, 256)
    expected = model.eval()(x)[0]
    model.model[index] = theirs
    path = saved_as(tmp_path / "a.pt", {"model": model}, Published, "ultralytics.nn.modules.conv.ACmix")
    loaded: Any = load(path)
    assert type(loaded.module.model[index]) is ACmix
    assert torch.equal(loaded.module(x)[0], expected)


@pytest.fixture
def fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of blocks that somebody put into the installed Ultralytics; its models are made of those in ACmix.py."""
    nn_package: Any = pytest.importorskip("ultralytics.nn", reason="needs ultralytics")
    folder = tmp_path / "fork" / "Addmodules"
    folder.mkdir(parents=True)
    (folder / "ACmix.py").write_text(
        "from tests.checkpoint.test_load import Published\n\n"
        "class Settings:\n"
        "    pass\n\n"
        "class ACmix(Published):\n"
        "    def __init__(self, *arguments):\n"
        "        raise SystemExit('a constructor ran')\n\n"
        "class C2f_ACmix(ACmix):\n"
        "    def forward(self, x):\n"
        "        return 2 * super().forward(x)\n"
    )
    (folder / "unused.py").write_text("raise SystemExit('was imported')\n")
    monkeypatch.setattr(nn_package, "__path__", [*nn_package.__path__, str(folder.parent)])
    before = set(sys.modules)
    for name in ("Addmodules", "Addmodules.ACmix"):  # as its nn.tasks does
        importlib.import_module(f"ultralytics.nn.{name}")
    yield folder
    for name in set(sys.modules) - before:
        del sys.modules[name]
    vars(nn_package).pop("Addmodules", None)


@pytest.mark.parametrize("kind", ["ACmix", "C2f_ACmix"])
def test_a_block_in_a_package_of_a_fork_that_is_installed(tmp_path: Path, fork: Path, kind: str) -> None:
    """No constructor runs, and what the block computes is what its own code says, not its parts."""
    block: Any = Published()
    path = tmp_path / "a.pt"
    theirs = getattr(sys.modules["ultralytics.nn.Addmodules.ACmix"], kind)
    block.__class__ = theirs
    loaded: Any = load(saved(path, {"ema": nn.Sequential(nn.Conv2d(3, 8, 1), block).half()}))
    assert type(loaded.module[1]) is theirs
    assert loaded.by_parts == ()
    x = torch.rand(1, 8, 6, 8)
    assert torch.equal(loaded.module[1](x), block.float().eval()(x))


@pytest.mark.parametrize(
    "name",
    [
        "ultralytics.nn.Addmodules.unused.ACmix",  # nothing says that it may be imported
        "ultralytics.nn.autobackend.AutoBackend",  # a module that opens files
        "ultralytics.nn.Addmodules.ACmix.Settings",
        "ultralytics.engine.model.Model",
    ],
)
def test_what_else_is_in_a_fork_is_refused(tmp_path: Path, fork: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"restricted load refuses: {re.escape(name)}\n") as caught:
        load(saved_as(tmp_path / "a.pt", nn.Sequential(Published()), Published, name))
    assert "--trust" in caught.value.hint
    assert "ultralytics.nn.Addmodules.unused" not in sys.modules


def no_published_block(change: str) -> nn.Module:
    block: Any = Published()
    if change == "no window":
        del block.kernel_att
    elif change == "another window":
        block.kernel_att = 5.5
    elif change == "zero padding":
        block.pad_att = nn.ZeroPad2d(1)
    elif change == "one more layer":
        block.gate = nn.Linear(8, 8)
    elif change == "one more parameter":
        block.rate3 = nn.Parameter(torch.ones(3))
    elif change == "other names":
        block.q, block.k = block.conv1, block.conv2
        del block.conv1, block.conv2
    elif change == "names swapped":  # the parts in another order
        convs = [block._modules.pop(name) for name in ("conv1", "conv2", "conv3")]
        for name, conv in zip(("conv2", "conv1", "conv3"), convs, strict=True):
            block._modules[name] = conv
    return block  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "change",
    [
        "no window",
        "another window",
        "zero padding",
        "one more layer",
        "one more parameter",
        "other names",
        "names swapped",
    ],
)
def test_what_its_parts_leave_open_is_not_guessed(tmp_path: Path, change: str) -> None:
    model = nn.Sequential(no_published_block(change))
    with pytest.raises(UserError, match=r"cannot be imported here: models\.common\.ACmix\n") as caught:
        load(saved_as(tmp_path / "a.pt", model, Published, "models.common.ACmix"))
    assert "--arch" in caught.value.hint


@pytest.mark.parametrize("trust", [False, True], ids=["restricted", "trusted"])
def test_the_weights_of_classes_that_are_gone_are_of_use(tmp_path: Path, arch: str, trust: bool) -> None:
    """Without their code nothing says what such modules compute, but whoever has it needs no more than the weights."""
    state = network().state_dict()
    model = Neck(network())
    path = saved_as(tmp_path / "a.pt", {"model": model.half()}, Neck, "__main__.Neck")
    with pytest.raises(UserError, match=r"__main__\.Neck") as caught:
        load(path, trust=trust)
    assert caught.value.hint.startswith("Name what builds a module that takes the weights: --arch ")
    (tmp_path / "arch_of_neck.py").write_text(
        "import arch_of_test\nfrom torch import nn\n"
        "def build():\n    neck = nn.Module()\n    neck.block = arch_of_test.build()\n    return neck\n"
    )
    loaded: Any = load(path, arch="arch_of_neck:build", trust=trust)
    assert loaded.module.state_dict().keys() == {f"block.{name}" for name in state}
    torch.testing.assert_close(loaded.module.state_dict(), model.float().state_dict())
    assert loaded.notes[-1] == "weights converted from float16 to float32"
    sys.modules.pop("arch_of_neck")


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("models.yolo.Model", "Name the folder that holds models/yolo.py, a repository such as those of YOLOv5, "),
        ("theirs.net.Neck", "Name the folder that holds theirs/net.py: --code DIR --trust, which runs code"),
        ("ultralytics.nn.modules.block.C2f_ACmix", "Name the folder that holds ultralytics/ of the changed copy "),
    ],
)
def test_where_missing_code_usually_stands(tmp_path: Path, name: str, folder: str) -> None:
    path = saved_as(tmp_path / "a.pt", {"model": Neck(nn.ReLU())}, Neck, name)
    with pytest.raises(UserError, match=rf"imported here: {re.escape(name)}\n") as caught:
        load(path)
    assert caught.value.hint.startswith(folder)
    with pytest.raises(UserError, match=rf"imported here: {re.escape(name)} \(") as caught:
        load(path, trust=True, code=tmp_path)
    assert f"whether --code {tmp_path} is the folder that holds " in caught.value.hint


@pytest.fixture
def their_code(tmp_path: Path) -> Iterator[Path]:
    """A folder with the module their_net, which makes a block of its own; gone afterwards."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "their_parts.py").write_text("FACTOR = 3\n")
    (folder / "their_net.py").write_text(
        "import their_parts\nfrom torch import nn\n\n"
        "class Triple(nn.Module):\n    def forward(self, x):\n        return their_parts.FACTOR * x\n\n"
        "def build():\n    return nn.Sequential(Triple())\n"
    )
    yield folder
    for name in ("their_net", "their_parts"):
        sys.modules.pop(name, None)


class Triple(nn.Module):
    """Stands for theirs until it is saved."""


def test_code_that_stands_in_another_folder(tmp_path: Path, their_code: Path) -> None:
    path = saved_as(tmp_path / "a.pt", nn.Sequential(Triple()), Triple, "their_net.Triple")
    before = list(sys.path)
    with pytest.raises(UserError, match=r"imported here: their_net\.Triple"):
        load(path, trust=True)
    loaded: Any = load(path, trust=True, code=their_code).module
    assert torch.equal(loaded(torch.ones(2)), torch.full((2,), 3.0))
    assert sys.path == before
    weights = saved(tmp_path / "b.pt", {"0.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"do not fit their_net:build: .*0\.weight"):
        load(weights, arch="their_net:build", trust=True, code=their_code)


@pytest.mark.parametrize("verb", ["profile", "doctor"])
def test_the_verbs_that_load_take_the_folder(
    tmp_path: Path, their_code: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved_as(tmp_path / "a.pt", nn.Sequential(Triple()), Triple, "their_net.Triple")
    options = ["--seconds", "0.1", "--input-shape", "1,3,8,8"] if verb == "profile" else []
    main([verb, str(path), "--trust", "--code", str(their_code), "--json", *options])
    assert "their_net" in sys.modules
    printed = json.loads(capsys.readouterr().out)
    assert printed["profiles"] if verb == "profile" else not printed["file"]["findings"]


def test_code_of_another_folder_is_not_taken_for_it(tmp_path: Path, their_code: Path) -> None:
    """Where a module of that name is there already, importing gives that one."""
    path = saved_as(tmp_path / "a.pt", nn.Sequential(Triple()), Triple, "their_net.Triple")
    load(path, trust=True, code=their_code)
    other = tmp_path / "other"
    other.mkdir()
    (other / "their_net.py").write_text((their_code / "their_net.py").read_text())
    with pytest.raises(UserError, match=f"their_net is to come from {other}, and one of {their_code}") as caught:
        load(path, trust=True, code=other)
    assert "processes of their own" in caught.value.hint


@pytest.mark.parametrize(("trust", "folder", "said"), [(False, "repository", "--trust"), (True, "none", "no folder")])
def test_code_that_cannot_be_asked_for(tmp_path: Path, their_code: Path, trust: bool, folder: str, said: str) -> None:
    path = saved(tmp_path / "a.pt", nn.Sequential(nn.ReLU()))
    with pytest.raises(UserError, match=f"--code {tmp_path / folder} (.|\n)*{said}"):
        load(path, trust=trust, code=tmp_path / folder)
    with pytest.raises(UserError, match=f"--code {tmp_path / folder} (.|\n)*{said}"):
        Plan(checkpoint=path, trust=trust, code=tmp_path / folder)
    assert "their_net" not in sys.modules


def test_a_class_that_is_there_is_not_replaced_by_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its code is at hand, what it computes can be proven, and --trust is the way to that."""
    path = saved_as(tmp_path / "a.pt", nn.Sequential(Published()), Published, "models.common.ACmix")
    folder = tmp_path / "models"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    assert load(path).notes  # a folder of that name is no package with that class
    (folder / "common.py").write_text("raise SystemExit('was imported')\n")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"restricted load refuses: models\.common\.ACmix"):
        load(path)


def test_a_tree_of_inert_attributes_beside_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of a program that is not here: objects of its classes and argparse's."""
    model = nn.Sequential(nn.ReLU())
    options = argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=[1, {"b": None}]))
    model.options = options  # type: ignore[assignment]

    class Settings:
        def __init__(self) -> None:
            self.depth = 3

    path = saved_as(tmp_path / "a.pt", {"model": model, "settings": Settings()}, Settings, "theirs.config.Settings")
    module: Any = load(path).module
    assert vars(module.options.nested) == {"a": [1, {"b": None}]}


# ---------------------------------------------------------------------------------------------------------------------
# What must not run


class Call:
    """Pickled as a call of ``function``; may itself be the function of another."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        raise AssertionError("only an unpickler calls")


def tasks() -> Any:
    return yolo.ultralytics("nn.tasks")


def touch(canary: Path) -> Call:
    return Call(os.system, f"touch {canary}")


def writing(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def with_child(child: Any) -> nn.Module:
    module = nn.Sequential(nn.ReLU())
    module._modules["1"] = child
    return module


def definition(canary: Path) -> dict[str, Any]:
    """A model whose activation Ultralytics' constructor evaluates."""
    layers = {"backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]], "nc": 1}
    return layers | {"activation": f"[nn.SiLU(), {writing(canary)}][0]"}


ATTACKS: dict[str, Callable[[Path], object]] = {
    "os.system": touch,
    "subprocess": lambda canary: Call(subprocess.call, ["touch", str(canary)]),
    "eval": lambda canary: Call(builtins.eval, writing(canary)),
    "exec": lambda canary: Call(builtins.exec, writing(canary)),
    "getattr": lambda canary: Call(Call(getattr, Call(builtins.__import__, "os"), "system"), f"touch {canary}"),
    "partial": lambda canary: Call(functools.partial(os.system, f"touch {canary}")),
    "method": lambda canary: Call(Path.touch, canary),
    "nested pickle": lambda canary: Call(pickle.loads, pickle.dumps(touch(canary))),
    "nested checkpoint": lambda canary: Call(
        functools.partial(torch.load, weights_only=False), str(saved(canary.with_name("inner.pt"), touch(canary)))
    ),
    "beside a state dict": lambda canary: {"state_dict": {"weight": torch.ones(1)}, "config": touch(canary)},
    "child of a module": lambda canary: {"model": with_child(touch(canary))},
    "argument of an allowed class": lambda canary: Call(nn.Identity, touch(canary)),
    "function of an allowed package": lambda canary: Call(tasks().parse_model, definition(canary), 3, False),
    "class seen through an allowed package": lambda canary: Call(tasks().Path, Call(str, touch(canary))),
    "constructor of an allowed class": lambda canary: Call(tasks().DetectionModel, definition(canary)),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_runs_nothing(tmp_path: Path, name: str) -> None:
    pytest.importorskip("ultralytics", reason="needs ultralytics")
    canary = tmp_path / "canary"
    path = saved(tmp_path / "a.pt", ATTACKS[name](canary))
    with pytest.raises(UserError, match="restricted load"):
        load(path)
    assert not canary.exists()
    with suppress(UserError):
        load(path, trust=True)
    assert canary.exists(), "not an attack: an ordinary load does not set it off"


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_an_attack_in_any_format_is_named(tmp_path: Path, form: str, protocol: int) -> None:
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(touch(canary), protocol))
    else:
        saved(path, touch(canary), pickle_protocol=protocol, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"(posix|nt)\.system"):
        load(path)
    assert not canary.exists()


def test_an_allowed_class_in_the_place_of_an_object_cannot_be_called(tmp_path: Path) -> None:
    """Such a class would run its constructor in the middle of the model, on arguments from the file."""
    model = nn.Sequential(nn.ReLU())
    model.__dict__["forward"] = nn.Linear
    loaded: Any = load(saved(tmp_path / "a.pt", model)).module
    with pytest.raises(pickle.UnpicklingError, match="constructor of Linear"):
        loaded(torch.ones(1))


def program_with(path: Path, canary: Path, tampering: str) -> Path:
    """A saved program with one thing in it that PyTorch's loader, or the program's first run, would execute."""
    axis = torch.export.Dim("n", min=2)
    program = torch.export.export(nn.AvgPool1d(2), (torch.rand(1, 2, 8),), dynamic_shapes=({2: 2 * axis},))
    torch.export.save(program, path)
    command = f"__import__('os').system('touch {canary}')"
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (model,) = (name for name in files if name.endswith("models/model.json"))
    (inputs,) = (name for name in files if name.endswith("sample_inputs/model.pt"))
    content = json.loads(files[model])
    if tampering == "size":
        text = json.dumps(content)
        size = re.search(r'"expr_str": ("(?:[^"\\]|\\.)*")', text)
        assert size
        content = json.loads(text.replace(size[1], json.dumps(f"{json.loads(size[1])} + {command}")))
    elif tampering == "guard":
        content["guards_code"] = [f"{command} == 0"]
    elif tampering == "inputs":
        buffer = io.BytesIO()
        torch.save(touch(canary), buffer)
        files[inputs] = buffer.getvalue()
    elif tampering == "library":
        files[f"{model.partition('/')[0]}/data/aotinductor/model/a.so"] = b""
    files[model] = json.dumps(content).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("tampering", ["size", "guard", "inputs"])
def test_a_program_with_code_in_it_runs_nothing(tmp_path: Path, tampering: str) -> None:
    canary = tmp_path / "canary"
    path = program_with(tmp_path / "a.pt2", canary, tampering)
    with pytest.raises(UserError):
        load(path)
    assert not canary.exists()
    with suppress(Exception):
        program: Any = load(path, trust=True).module
        program.module()(torch.rand(1, 2, 8))
    assert canary.exists(), "not an attack: an ordinary load does not set it off"


def test_a_program_with_a_library_is_refused_by_name(tmp_path: Path) -> None:
    path = program_with(tmp_path / "a.pt2", tmp_path / "canary", "library")
    with pytest.raises(UserError, match=r"aotinductor/model/a\.so"):
        load(path)


# ---------------------------------------------------------------------------------------------------------------------
# What does not load


def broken(path: Path) -> dict[str, Callable[[], object]]:
    def write(content: bytes) -> Callable[[], object]:
        return lambda: path.write_bytes(content)

    whole = saved(path.with_name("whole.pt"), network()).read_bytes()
    return {
        "empty": write(b""),
        "truncated": write(whole[: len(whole) // 2]),
        "zeros inside": write(whole[:200] + bytes(500) + whole[700:]),
        "text": write(b"hello world\n" * 20),
        "random": write(bytes(range(256)) * 10),
        "list": lambda: saved(path, [1, 2]),
        "tensor": lambda: saved(path, torch.ones(2)),
        "empty dict": lambda: saved(path, {}),
        "dict of numbers": lambda: saved(path, {"epoch": 1, "loss": torch.ones(1)} | {"x": 2}),
        "directory": path.mkdir,
        "missing": lambda: None,
    }


BROKEN = {
    "empty": "is empty",
    "truncated": "whose end is missing",
    "zeros inside": "cannot be read",
    "text": "is a text file that begins with 'hello world'; a PyTorch checkpoint",
    "random": "cannot be read",
    "list": "holds a list and no model",
    "tensor": "holds a Tensor and no model",
    "empty dict": "holds a dict and no model",
    "dict of numbers": "a dict with 'epoch', 'loss', 'x' and no model",
    "directory": "is a folder",
    "missing": "does not exist",
}


@pytest.mark.parametrize("trust", [False, True], ids=["restricted", "trusted"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, name: str, trust: bool) -> None:
    path = tmp_path / "a.pt"
    broken(path)[name]()
    with pytest.raises(UserError, match=BROKEN[name]) as caught:
        load(path, trust=trust)
    assert str(path) in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"text", "is a text file"),
        (b"PK\x03\x04 and no end", "cannot be read.*whose end is missing"),
    ],
)
def test_a_file_that_is_no_program(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.pt2"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        load(path)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_torchscript_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.ones(1)), path)
    with pytest.raises(UserError, match="TorchScript"):
        load(path)


def test_weights_alone_need_arch(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", network().state_dict())
    with pytest.raises(UserError, match=r"weights only: \d+ tensors") as caught:
        load(path)
    assert "--arch package.module:factory" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere:build", "No module named 'nowhere'"),
        ("arch_of_test:absent", "no attribute 'absent'"),
        ("arch_of_test", "cannot be built"),
        ("arch_of_test:number", "makes <class 'int'>"),
    ],
)
def test_an_arch_that_is_none(tmp_path: Path, arch: str, name: str, reason: str) -> None:
    path = saved(tmp_path / "a.pt", network().state_dict())
    with pytest.raises(UserError, match=reason):
        load(path, arch=name)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"0.weight": torch.zeros(8, 3, 5, 5)}, r"0\.weight.*\[8, 3, 5, 5\]"),
        ({"9.bias": torch.zeros(1)}, r"Unexpected key.*9\.bias"),
        ({"0.bias": None}, r"Missing key.*0\.bias"),
        ({name: None for name in network().state_dict() if name.startswith("3.")}, r"Missing key.*3\.rate1.*\.\.\."),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, arch: str, changed: dict[str, Tensor | None], reason: str) -> None:
    state = {name: tensor for name, tensor in (network().state_dict() | changed).items() if tensor is not None}
    with pytest.raises(UserError, match=reason) as caught:
        load(saved(tmp_path / "a.pt", state), arch=arch)
    assert len(caught.value.message) < 1000


def test_an_unneeded_arch_is_told(tmp_path: Path) -> None:
    assert "not needed" in load(saved(tmp_path / "a.pt", network()), arch=ARCH).notes[0]


def test_a_class_that_cannot_be_imported_even_with_trust(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gone", ModuleType("gone"))
        patch.setattr(Local, "__module__", "gone")
        patch.setattr(sys.modules["gone"], "Local", Local, raising=False)
        path = saved(tmp_path / "a.pt", Local())
    with pytest.raises(UserError, match=r"gone\.Local \(No module named 'gone'\)"):
        load(path, trust=True)


@pytest.mark.parametrize("package", ["torch", "ultralytics"])
def test_without_the_package(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ultralytics", reason="needs ultralytics")
    path = saved(tmp_path / "a.pt", yolo.build("p5"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingComponent, match="pip install"):
        load(path)
