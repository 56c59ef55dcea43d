"""ACmix in Ultralytics: named by YAML files, inserted into YOLOv8, ready for export."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from acmix_deploy import yolo
from acmix_deploy.checkpoint import load
from acmix_deploy.detection.images import Letterbox
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.families.acmix.module import ACmix

tasks: Any = pytest.importorskip("ultralytics.nn.tasks", reason="needs ultralytics")


def blocks(model: nn.Module) -> dict[str, ACmix]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ACmix)}


@pytest.mark.parametrize(
    ("variant", "scale", "expected"),
    [
        ("p3p4p5", "n", {"model.16": 64, "model.20": 128, "model.24": 256}),
        ("p3p4p5", "s", {"model.16": 128, "model.20": 256, "model.24": 512}),
        ("p5", "n", {"model.22": 256}),
        ("p5", "m", {"model.22": 576}),  # 768, this scale's maximum, times its width of 0.75
    ],
)
def test_blocks_sit_on_the_maps_that_are_detected_on(variant: Any, scale: Any, expected: dict[str, int]) -> None:
    model: Any = yolo.build(variant, scale, num_classes=3)
    assert {name: block.out_planes for name, block in blocks(model).items()} == expected
    assert all(
        (block.in_planes, block.kernel_att, block.head) == (block.out_planes, 7, 4) for block in blocks(model).values()
    )
    others = [f"model.{index}" for index in model.model[-1].f if type(model.model[index]).__name__ == "C2f"]
    assert [f"model.{index}" for index in model.model[-1].f] == others + list(expected)
    assert model.model[-1].nc == 3


@pytest.mark.parametrize("scale", ["n", "s", "m", "l", "x"])
@pytest.mark.parametrize("variant", ["p3p4p5", "p5"])
def test_without_its_blocks_the_model_is_the_packages_yolov8(variant: Any, scale: Any) -> None:
    """Every layer reads what it read before, or the block behind it."""
    model = yolo.model_yaml(variant, scale)
    plain = yolo.ultralytics("utils").YAML.load(Path(yolo.ultralytics("utils").ROOT) / "cfg/models/v8/yolov8.yaml")
    layers, kept = model["backbone"] + model["head"], []
    plain_layers = plain["backbone"] + plain["head"]
    origin: dict[int, int] = {}  # index with blocks -> index of the plain layer whose map it carries
    for index, layer in enumerate(layers):
        if layer[2] == "ACmix":
            assert layer[0] == -1
            origin[index] = origin[index - 1]
        else:
            origin[index] = len(kept)
            kept.append((index, layer))
    for (index, layer), plain_layer in zip(kept, plain_layers, strict=True):
        assert layer[1:] == plain_layer[1:]

        def absolute(source: int, at: int) -> int:
            return at + source if source < 0 else source

        sources, plain_sources = ([s] if isinstance(s, int) else s for s in (layer[0], plain_layer[0]))
        if index:
            assert [origin[absolute(source, index)] for source in sources] == [
                absolute(source, origin[index]) for source in plain_sources
            ]
    assert (model["scale"], model["scales"]) == (scale, plain["scales"])


def test_weights_of_the_plain_model_fit_the_layers_before_the_first_block() -> None:
    ours, plain = (
        model.state_dict() for model in (yolo.build("p3p4p5"), tasks.DetectionModel("yolov8n.yaml", verbose=False))
    )
    layers = {int(name.split(".")[1]) for name in plain if name in ours and ours[name].shape == plain[name].shape}
    assert layers == {*range(10), 12, 15}
    assert all(name in ours for name in plain if int(name.split(".")[1]) < 16)


def test_register_may_be_repeated_and_respects_an_existing_class(monkeypatch: pytest.MonkeyPatch) -> None:
    yolo.register()
    first = tasks.ACmix
    yolo.register()
    assert tasks.ACmix is first
    monkeypatch.setattr(tasks, "ACmix", nn.Identity)
    yolo.register()
    assert tasks.ACmix is nn.Identity


def test_a_users_yaml_file_names_the_block(tmp_path: Path) -> None:
    """Channels come from the layer read, wherever it is; the width scales what the file asks for."""
    yolo.register()
    file = tmp_path / "mine.yaml"
    file.write_text(
        """
nc: 2
width_multiple: 0.5
backbone:
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [1, 1, ACmix, [128, 3, 2]]
  - [-1, 2, ACmix, [128, 5]]
head:
  - [[4, 2], 1, Detect, [nc]]
"""
    )
    model = tasks.DetectionModel(str(file), verbose=False).eval()
    geometry = {name: (b.in_planes, b.out_planes, b.kernel_att, b.head) for name, b in blocks(model).items()}
    assert geometry == {"model.3": (32, 64, 3, 2), "model.4.0": (64, 64, 5, 4), "model.4.1": (64, 64, 5, 4)}
    assert model.model[3].type == "acmix_deploy.families.acmix.module.ACmix"
    assert type(model.model[3]) is ACmix
    model(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(("variant", "scale"), [("p4", "n"), ("p5", "t")])
def test_unknown_models_are_refused(variant: Any, scale: Any) -> None:
    with pytest.raises(UserError, match=r"p3p4p5, p5.*n, s, m, l, x"):
        yolo.model_yaml(variant, scale)


def with_statistics(model: Any) -> Any:
    """Batch normalisation that does something, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def test_an_exportable_copy_computes_the_same_and_leaves_the_model_alone() -> None:
    model = with_statistics(yolo.build("p3p4p5", num_classes=5)).eval()
    prepared = yolo.prepare_for_export(model.train())
    for shape in ((1, 3, 128, 160), (2, 3, 160, 128)):
        x = torch.rand(*shape)
        y = prepared(x)
        assert y.shape == (shape[0], 4 + 5, 20 * 16 + 10 * 8 + 5 * 4)
        torch.testing.assert_close(y, model.eval()(x)[0], rtol=1e-4, atol=1e-3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in prepared.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) > 50
    assert len(blocks(prepared)) == 3
    assert isinstance(model(x), tuple)


def test_the_output_is_one_tensor_of_all_anchors() -> None:
    assert yolo.prepare_for_export(yolo.build("p5"))(torch.zeros(1, 3, 640, 640)).shape == (1, 84, 8400)


@pytest.mark.filterwarnings("ignore:The tensor attributes .*anchors")
def test_captured_with_all_axes_dynamic() -> None:
    prepared = yolo.prepare_for_export(yolo.build("p5"))
    height, width = (32 * torch.export.Dim(axis, min=4) for axis in "hw")
    program = torch.export.export(
        prepared,
        (torch.rand(2, 3, 160, 128),),
        dynamic_shapes=({0: torch.export.Dim("b"), 2: height, 3: width},),
        strict=False,
    )
    x = torch.rand(1, 3, 128, 192)
    torch.testing.assert_close(program.module()(x), prepared(x))


def test_metadata_as_ultralytics_writes_it() -> None:
    model: Any = yolo.build("p5", num_classes=2)
    model.names = {0: "cat", 1: "dog"}
    metadata = yolo.detection_metadata(model).entries
    assert "imgsz" not in metadata
    assert (metadata["task"], metadata["stride"], metadata["channels"]) == ("detect", "32", "3")
    assert ast.literal_eval(metadata["names"]) == {0: "cat", 1: "dog"}
    assert json.loads(metadata["letterbox"]) == Letterbox().model_dump()


@pytest.mark.parametrize(("size", "expected"), [(320, "[320, 320]"), ([480, 640], "[480, 640]")])
def test_the_image_size_is_that_of_training(size: Any, expected: str) -> None:
    model: Any = yolo.build("p5")
    model.args = {"imgsz": size}
    assert yolo.detection_metadata(model).entries["imgsz"] == expected


TWO_HEADS = ("yolov10n.yaml", "yolo26n.yaml")
X = torch.rand(1, 3, 64, 64)


def saved(path: Path, model: Any, **entries: Any) -> Path:
    torch.save({"model": model, **entries}, path)
    return path


@pytest.mark.parametrize("name", TWO_HEADS)
@pytest.mark.parametrize(
    ("version", "told", "end_to_end"),
    [
        ("8.4.0", None, True),
        ("8.4.141", None, True),
        ("8.4.142", None, False),
        ("8.4.190", None, False),
        ("8.4.141", False, False),
        ("8.4.190", True, True),
        (None, True, True),
    ],
)
def test_the_head_is_the_one_that_ran_where_it_was_saved(
    tmp_path: Path, name: str, version: str | None, told: bool | None, end_to_end: bool
) -> None:
    model = tasks.DetectionModel(name, verbose=False).eval()
    if told is not None:
        model.end2end = told
    loaded = load(saved(tmp_path / "a.pt", model, **{"version": version} if version else {}))
    why = "the checkpoint sets it" if told is not None else f"Ultralytics {version}, which saved the file, runs it"
    head = "end-to-end" if end_to_end else "one-to-many"
    assert loaded.notes == (f"of its two heads the {head} one is taken: {why}",)
    assert loaded.metadata.entries["end2end"] == str(end_to_end)
    output = yolo.prepare_for_export(loaded.module)(X)
    assert output.shape == ((1, 84, 6) if end_to_end else (1, 84, 84))
    model.end2end = end_to_end
    torch.testing.assert_close(loaded.module(X)[0], model(X)[0])


@pytest.mark.parametrize("marked", ["model", "head", "version"])
def test_a_head_that_was_saved_before_it_was_a_setting(tmp_path: Path, marked: str) -> None:
    """Below 8.4 it is an attribute of the class, of which the model keeps a copy, or of the head itself."""
    model = tasks.DetectionModel("yolov10n.yaml", verbose=False).eval()
    if marked != "version":
        vars(model)["end2end"] = True
    if marked == "head":
        vars(model.model[-1])["end2end"] = False
    entries = {"version": "8.3.63"} if marked == "version" else {}
    loaded = load(saved(tmp_path / "a.pt", model, **entries))
    assert loaded.metadata.entries["end2end"] == str(marked != "head")


def test_a_head_of_which_nothing_is_told_is_told(tmp_path: Path) -> None:
    loaded = load(saved(tmp_path / "a.pt", tasks.DetectionModel("yolov10n.yaml", verbose=False)))
    (note,) = loaded.notes
    assert "the file tells none, and Ultralytics " in note
    assert ("end-to-end" in note) == (loaded.metadata.entries["end2end"] == "True")


def test_a_fused_checkpoint_has_the_head_that_is_left(tmp_path: Path) -> None:
    model = tasks.DetectionModel("yolo26n.yaml", verbose=False).eval()
    model.end2end = True
    loaded = load(saved(tmp_path / "a.pt", model.fuse(verbose=False), version="8.4.190"), trust=True)
    assert loaded.notes == ("of its two heads the end-to-end one is taken: the other one is not in the file",)
    assert loaded.metadata.entries["end2end"] == "True"


def test_models_of_one_head_say_nothing_of_it(tmp_path: Path) -> None:
    loaded = load(saved(tmp_path / "a.pt", yolo.build("p5"), version="8.3.63"))
    assert (loaded.notes, loaded.metadata.entries["end2end"]) == ((), "False")


@pytest.mark.parametrize(
    ("name", "here", "version", "said"),
    [
        # Below 8.4, where Detect has one head and the class of YOLOv10 says which it runs.
        ("yolo26n.yaml", False, "8.4.60", "saved by Ultralytics 8.4.60, has an end-to-end head, which the installed"),
        ("yolo26n.yaml", False, None, "the model has an end-to-end head, which the installed"),
        # In 8.4.0, where it cannot be chosen.
        ("yolo26n.yaml", property(lambda head: True), "8.4.190", "is to run its one-to-many head, and the installed"),
    ],
)
def test_a_head_that_the_installed_package_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, here: Any, version: str | None, said: str
) -> None:
    model = tasks.DetectionModel(name, verbose=False).eval()
    path = saved(tmp_path / "a.pt", model, **{"version": version} if version else {})
    monkeypatch.setattr(yolo.ultralytics("nn.modules.head").Detect, "end2end", here)
    with pytest.raises(UserError, match=said) as caught:
        load(path)
    assert yolo.ultralytics("utils").__version__ in caught.value.message


@pytest.mark.parametrize(("wanted", "shape"), [("end-to-end", (1, 84, 6)), ("anchors", (1, 84, 84))])
@pytest.mark.parametrize("name", TWO_HEADS)
@pytest.mark.parametrize("own", [True, False])
def test_the_other_head_can_be_taken(tmp_path: Path, name: str, own: bool, wanted: Any, shape: tuple[int, ...]) -> None:
    model = tasks.DetectionModel(name, verbose=False).eval()
    model.end2end = own
    loaded = load(saved(tmp_path / "a.pt", model), head=wanted)
    assert yolo.prepare_for_export(loaded.module)(X).shape == shape
    assert loaded.metadata.end2end == (wanted == "end-to-end")
    assert loaded.notes[0].endswith("one is taken: --head")


def test_a_class_attribute_says_which_head_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Ultralytics below 8.4."""
    path = saved(tmp_path / "a.pt", tasks.DetectionModel("yolov10n.yaml", verbose=False).eval(), version="8.4.190")
    monkeypatch.setattr(yolo.ultralytics("nn.modules.head").Detect, "end2end", True)
    assert yolo.prepare_for_export(load(path).module)(X).shape == (1, 84, 84)


def test_a_head_that_is_not_there_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no end-to-end head"):
        load(saved(tmp_path / "a.pt", yolo.build("p5")), head="end-to-end")
    model = tasks.DetectionModel("yolo26n.yaml", verbose=False).eval()
    model.end2end = True
    path = saved(tmp_path / "b.pt", model.fuse(verbose=False))
    with pytest.raises(UserError, match="one-to-many head is not in the file"):
        load(path, head="anchors", trust=True)


def test_other_modules_have_no_metadata_and_come_back_as_they_are() -> None:
    module = nn.Conv2d(3, 3, 1)
    assert yolo.detection_metadata(module).entries == {}
    assert yolo.prepare_for_export(module) is module


def test_without_ultralytics(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "ultralytics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(MissingComponent, match=r"pip install .*ultralytics.*AGPL-3\.0") as caught:
        yolo.build("p5")
    assert caught.value.exit_code == 3
    assert yolo.prepare_for_export(nn.ReLU()) is not None
