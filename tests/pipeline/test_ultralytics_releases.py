"""Ultralytics older than the one here, on the path and in checkpoints; and whose fault it is where neither fits.

The newest release is all that is installed, so older ones are stood in for by what they lack. The releases themselves
are tried where they are:

    ACMIX_ULTRALYTICS    folder with one folder a release, e.g. 8.0.200, and what they import beside it in packages
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from acmix_deploy import checkpoint, yolo
from acmix_deploy.cli import main
from acmix_deploy.detection.images import Letterbox
from acmix_deploy.doctor import machine
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.runtime.reason import place, raised
from tests import ROOT

pytest.importorskip("ultralytics", reason="needs ultralytics")


def saved(path: Path, model: nn.Module, version: str = "8.3.63") -> Path:
    """As Ultralytics saves one."""
    torch.save({"model": model, "train_args": {"imgsz": 64}, "version": version}, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# What older releases lack


class OldLetterBox:
    """As it was before 8.3.200 or so: the border is grey 114, and nothing says so."""

    def __init__(
        self, new_shape=(640, 640), auto=False, scaleFill=False, scaleup=False, center=True, stride=32
    ) -> None:  # type: ignore[no-untyped-def]
        pass


def test_a_letterbox_whose_border_is_no_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yolo.ultralytics("data.augment"), "LetterBox", OldLetterBox)
    loaded = checkpoint.load(saved(tmp_path / "a.pt", yolo.smallest()))
    assert json.loads(loaded.metadata.entries["letterbox"]) == Letterbox(scaleup=False).model_dump()


def test_utilities_without_the_class_for_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    utils: Any = yolo.ultralytics("utils")
    expected, load = yolo.model_yaml("p5"), utils.YAML.load
    monkeypatch.delattr(utils, "YAML")
    monkeypatch.setattr(utils, "yaml_load", load, raising=False)
    assert yolo.model_yaml("p5") == expected


def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    """An Ultralytics whose package begins with ``content``, in the place of the one here."""
    (tmp_path / "ultralytics").mkdir()
    (tmp_path / "ultralytics" / "__init__.py").write_text(content)
    for name in [name for name in sys.modules if name.split(".")[0] == "ultralytics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        ("import no_such_package", MissingComponent, "lacks what it imports: No module named 'no_such_package'"),
        ("tqdm = missing", UserError, r"cannot be imported: NameError: name 'missing' is not defined \(.*, line 1, in"),
        ("__version__ = '8.0.1'", UserError, "the Ultralytics that is found has no ultralytics.nn"),
    ],
)
def test_an_ultralytics_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, error: type[Exception], said: str
) -> None:
    path = saved(tmp_path / "a.pt", yolo.smallest())
    older(tmp_path, monkeypatch, content)
    with pytest.raises(error, match=said):
        checkpoint.load(path)
    for name in [name for name in sys.modules if name.split(".")[0] == "ultralytics"]:
        del sys.modules[name]


def test_doctor_tries_it() -> None:
    found = machine._package("ultralytics", "Ultralytics", "its checkpoints", "ultralytics")
    assert (found.state, found.advice) == ("ok", "")


def test_doctor_names_what_every_load_fails_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(yolo.ultralytics("data.augment"), "LetterBox")
    found = machine._package("ultralytics", "Ultralytics", "its checkpoints", "ultralytics")
    assert found.state == "fault"
    assert "a checkpoint that it makes does not load" in found.found
    assert "LetterBox" in found.found


# ---------------------------------------------------------------------------------------------------------------------
# Classes older or newer than the checkpoint


def without_act() -> nn.Module:
    """A detector whose convolution was saved before, or after, its class had an activation."""
    model: Any = yolo.smallest()
    del model.model[0]._modules["act"]
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("verb", ["export", "profile"])
def test_a_class_that_reads_what_the_checkpoint_does_not_hold(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a.pt", without_act())
    assert main([verb, "a.pt"]) == 2
    said = capsys.readouterr().err
    here = sys.modules["ultralytics"].__version__  # type: ignore[attr-defined]
    assert f"ultralytics.nn.modules.conv.Conv of ultralytics {here} reads the attribute 'act'" in said
    assert "the one in the checkpoint, which ultralytics 8.3.63 saved, has none" in said
    assert "pip install ultralytics==8.3.63" in said
    assert "input shape" not in said


def test_a_class_of_pytorch_that_reads_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As GELU does of checkpoints that are older than its approximate."""
    layer = nn.GELU()
    del layer.approximate
    torch.save(nn.Sequential(layer), tmp_path / "a.pt")
    assert main(["export", str(tmp_path / "a.pt"), "--out", str(tmp_path / "out"), "--image-size", "16"]) == 2
    said = capsys.readouterr().err
    assert f"torch.nn.modules.activation.GELU of torch {torch.__version__} reads the attribute 'approximate'" in said


def test_an_input_that_does_not_fit_is_still_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(nn.Sequential(nn.Conv2d(4, 4, 1)), tmp_path / "a.pt")
    assert main(["export", str(tmp_path / "a.pt"), "--out", str(tmp_path / "out"), "--image-size", "16"]) == 2
    said = capsys.readouterr().err
    assert "does not run on an input of [1, 3, 16, 16]" in said
    assert "Check the input shape" in said


def test_classes_of_another_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = yolo.smallest()
    newer = types.new_class("NewestConv", (nn.Module,), {})
    newer.__module__ = "ultralytics.nn.modules.block"
    block: Any = yolo.ultralytics("nn.modules.block")
    with monkeypatch.context() as patch:
        patch.setattr(block, "NewestConv", newer, raising=False)
        model.model.append(newer())
        path = saved(tmp_path / "a.pt", model, "8.9.1")
    with pytest.raises(
        UserError, match=r"imported here: ultralytics\S+NewestConv; ultralytics 8\.9\.1 saved it"
    ) as caught:
        checkpoint.load(path)
    assert "pip install ultralytics==8.9.1" in caught.value.hint
    here = sys.modules["ultralytics"].__version__
    with monkeypatch.context() as patch:
        patch.setattr(block, "NewestConv", newer, raising=False)
        path = saved(tmp_path / "a.pt", model, here)
    with pytest.raises(UserError, match=f"ultralytics {here} saved it") as caught:
        checkpoint.load(path)
    assert "pip install" not in caught.value.hint, "this very release is here; the class is of somebody's copy"
    assert "holds ultralytics/ of the changed copy that it was trained with: --code DIR --trust" in caught.value.hint


def test_a_version_that_is_none_is_not_repeated(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", without_act(), "8.3; rm -rf .")
    module: Any = checkpoint.load(path).module
    assert not hasattr(module, "saved_by")


# ---------------------------------------------------------------------------------------------------------------------
# What the user's own code raises

OWN = {
    "__setstate__": "    def __setstate__(self, state):\n        self.depth = deeper\n",
    "forward": "    def forward(self, x):\n        return deeper(x)\n",
    "state_dict": "    def state_dict(self, *_, **__):\n        return deeper\n",
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Saves a module of a file of the user's, which then gets a method that fails."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_code.py").write_text("from torch import nn\n\nclass Own(nn.Module):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    own_code: Any = __import__("own_code")
    torch.save(nn.Sequential(own_code.Own()), tmp_path / "a.pt")
    sys.modules.pop("own_code")

    def failing(method: str) -> Path:
        (tmp_path / "own_code.py").write_text(
            f"from torch import nn\n\nclass Own(nn.Module):\n{OWN[method]}# changed\n"
        )
        return tmp_path / "own_code.py"

    yield failing
    sys.modules.pop("own_code", None)


@pytest.mark.parametrize("method", OWN)
def test_an_error_in_the_users_code_is_told_with_its_line(
    own: Any, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = own(method)
    assert main(["export", "a.pt", "--trust", "--image-size", "16"]) == 2
    said = capsys.readouterr().err
    assert f"NameError: name 'deeper' is not defined ({code}, line 5, in {method})" in said
    assert "makes no sense" not in said
    assert "Copy or download" not in said
    assert "input shape" not in said


def test_an_error_in_a_property_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.pt", yolo.smallest())
    names = property(lambda self: undefined)  # type: ignore[name-defined]  # noqa: F821
    monkeypatch.setattr(yolo.ultralytics("nn.tasks").DetectionModel, "names", names, raising=False)
    with pytest.raises(
        UserError, match=r"NameError: name 'undefined' is not defined \(.*test_ultralytics_releases\.py"
    ):
        checkpoint.load(path)


def test_the_line_is_that_of_other_code() -> None:
    """PyTorch's own lines below it are not meant."""

    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(x, x)

    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(Wrong())(torch.ones(1, 3))
    assert place(caught.value).endswith("in forward")
    assert raised(caught.value).startswith("RuntimeError: ")
    with pytest.raises(RuntimeError) as alone:
        nn.Conv2d(1, 1, 1).to("nowhere")
    assert "test_ultralytics_releases.py" in place(alone.value)


# ---------------------------------------------------------------------------------------------------------------------
# The releases themselves

FOLDER = os.environ.get("ACMIX_ULTRALYTICS")
RELEASES = [path.name for path in sorted(Path(FOLDER).iterdir()) if (path / "ultralytics").is_dir()] if FOLDER else []

MAKE = """
import sys, torch, ultralytics
from acmix_deploy import yolo
model = yolo.build("p5", num_classes=2)
model.names = {0: "cat", 1: "dog"}
torch.save({"model": model.half(), "train_args": {"imgsz": 128}, "version": ultralytics.__version__}, sys.argv[1])
"""
LOAD = """
import json, sys, torch
from acmix_deploy import yolo
from acmix_deploy.checkpoint import load
loaded = load(sys.argv[1])
x = torch.linspace(0, 1, 3 * 128 * 128).reshape(1, 3, 128, 128)
with torch.no_grad():
    own, prepared = loaded.module(x)[0], yolo.prepare_for_export(loaded.module)(x)
print(json.dumps([loaded.metadata.entries, float((own - prepared).norm() / own.norm()), own.double().sum().item()]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each release, and one of the release that is installed."""
    if not RELEASES:
        pytest.skip("no older Ultralytics: name a folder of releases in ACMIX_ULTRALYTICS")
    folder = tmp_path_factory.mktemp("releases")
    for release in (*RELEASES, "installed"):
        with_release(release, "-c", MAKE, str(folder / f"{release}.pt"))
    return folder


def with_release(release: str, *command: str) -> str:
    """What Python prints where that release is the first on the path."""
    folder = Path(FOLDER or "")
    paths = [folder / release] if release != "installed" else []
    paths += [ROOT, folder / "packages"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("release", RELEASES or ["none"])
def test_a_release_loads_its_own_and_the_newest_checkpoint_and_is_loaded_by_the_newest(
    made: Path, release: str
) -> None:
    sums = set()
    for loader, file in ((release, release), (release, "installed"), ("installed", release)):
        lines = with_release(loader, "-c", LOAD, str(made / f"{file}.pt")).splitlines()
        metadata, distance, total = json.loads(lines[-1])
        assert distance < 1e-5
        assert (metadata["task"], metadata["stride"], metadata["imgsz"]) == ("detect", "32", "[128, 128]")
        assert metadata["names"] == "{0: 'cat', 1: 'dog'}"
        assert json.loads(metadata["letterbox"]) == {"center": True, "scaleup": True, "padding_value": 114}
        sums |= {round(total, 1)} if file == release else set()
    assert len(sums) == 1, "the checkpoint of a release computes the same with that release and the newest"


@pytest.mark.parametrize("release", RELEASES or ["none"])
def test_the_whole_road_with_a_release(made: Path, release: str) -> None:
    out = made / f"{release}-out"
    with_release(
        release, "-m", "acmix_deploy.cli", "export", str(made / f"{release}.pt"), "--out", str(out), "--expect", "1"
    )
    report = json.loads((out / "report.json").read_text())
    assert report["verification"]["passed"]
    assert [block["family"] for block in report["blocks"]] == ["acmix"]
    assert ACmix.__name__ == report["blocks"][0]["class_name"]
