"""Command lines as those write them who know other tools: taken as they are meant, or told how they are written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from acmix_deploy.cli import commands, main, parser
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.plan import Plan
from acmix_deploy.report.model import ExportReport
from acmix_deploy.targets import target_named


def parsed(*arguments: str) -> dict[str, object]:
    return vars(parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("other", "own"),
    [
        ("export m.pt --imgsz 320,640 --half", "export m.pt --image-size 320,640 --fp16"),
        ("export m.pt --int8 --data photos", "export m.pt --int8 --calibration photos"),
        ("quantize m.onnx -o q --half --imgsz 64 --data d", "quantize m.onnx -o q --fp16 --image-size 64 --cal d"),
        ("verify a.onnx b.onnx --data photos --device 0", "verify a.onnx b.onnx --images photos --provider cuda"),
        ("detect m.onnx photos --device cpu", "detect m.onnx photos --provider cpu"),
        ("profile m.onnx --device 0", "profile m.onnx --provider cuda"),
        ("serve m.onnx --device cuda:0", "serve m.onnx --provider cuda"),
        ("export m.pt -o made", "export m.pt --out made"),
        ("export m.pt --output made", "export m.pt --out made"),
        ("export m.pt --dynamic", "export m.pt --dynamic batch,height,width"),
        ("export m.pt --dynamic --half", "export m.pt --fp16 --dynamic batch,height,width"),
    ],
)  # fmt: skip
def test_other_names(other: str, own: str) -> None:
    first, second = (parsed(*line.split()) for line in (other, own))
    del first["command"], second["command"]
    assert first == second


def test_other_names_clutter_no_help() -> None:
    text = "".join(command.format_help() for command in commands().values())
    for alias in ("--imgsz", "--half", "--data", "--device"):
        assert alias not in text


def test_sizes_of_a_plan(tmp_path) -> None:
    plan = Plan(checkpoint=tmp_path / "m.pt", image_size=(320, 640), batch=2)
    assert plan.image_size == (320, 640)
    assert Plan(checkpoint=tmp_path / "m.pt", image_size=320).image_size == (320, 320)


SAID = {
    "exprot m.pt": "Did you mean export?",
    "predict m.onnx a.png": "Did you mean detect?",
    "version": "Did you mean --version?",
    "plugin biuld": "Did you mean build?",
    "export m.pt --imgz 640": "unrecognized arguments: --imgz 640. Did you mean --imgsz?",
    "export m.pt --dynamik": "Did you mean --dynamic?",
    "export m.pt --conv-branch denze": "Did you mean dense?",
    "export m.pt --device 0": "An engine runs on the GPU that is there, everything else on the CPU.",
    "profile m.onnx --imgsz 320 --batch 4": "arguments: --imgsz 320 --batch 4. Sizes of free axes are given by "
    "--input-shape B,C,H,W.",
    "export --dynamic m.pt": "'m.pt' is not names by commas such as batch,height; where it is to mean all axes, "
    "--dynamic stands at the end",
    "export model=x.pt imgsz=640 half=True int8=False format=onnx": "options are not written key=value: model=x.pt "
    "imgsz=640 half=True int8=False format=onnx. Write: acmix-deploy export x.pt --image-size 640 --fp16; format=onnx "
    "has no counterpart",
    "export m.pt --for-target x --format onnx": "ONNX files are always written",
    "export --weights m.pt": "Files are named without an option.",
    "export m.pt --target jetpack-6.2": "Did you mean --for jetpack-6.2?",
    "export m.pt --target tensorrt": "Did you mean --for tensorrt-",
    "detect m.onnx a.png --save out": "Drawn pictures go to -o OUT.",
    "verify a.onnx b.onnx .": "unrecognized arguments: .. Did you mean --images .?",
    "plugin build arch=87": "Write: acmix-deploy plugin build --arch 87",
    "detect m.onnx source=a.png --confidence 0.5": "Write: acmix-deploy detect a.png m.onnx --confidence 0.5",
}


@pytest.mark.parametrize("line", SAID)
def test_what_is_no_argument_is_told_what_it_may_mean(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        main(line.split())
    assert refusal.value.code == 2
    assert SAID[line] in capsys.readouterr().err


def test_a_file_may_be_called_so(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.onnx").write_text("nothing")
    assert main(["inspect", "a=b.onnx"]) == 2
    assert main(["fuse", "a=b.onnx", "-o", "x=y.onnx"]) == 2
    assert "key=value" not in capsys.readouterr().err


def test_a_long_message_in_the_place_of_a_file(capsys) -> None:
    assert main(["doctor", "Error Code 9: " + "x" * 300]) == 2
    assert "run: acmix-deploy doctor --error TEXT" in capsys.readouterr().err


def test_targets_that_are_nearly_right(tmp_path, capsys) -> None:
    assert main(["export", str(tmp_path / "m.pt"), "--for", "jetpak-6.2"]) == 2
    assert "Did you mean jetpack-6.2? Targets: " in capsys.readouterr().err
    assert target_named("jetpack-6.2").name == "jetpack-6.2"
    assert main(["export", str(tmp_path / "m.pt"), "--for", "orin"]) == 2
    assert "A board is named by its JetPack" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "m.pt"), "--for", "openvina"]) == 2
    assert "A board" not in capsys.readouterr().err


def test_what_is_wrong_is_not_hidden_by_options(capsys: pytest.CaptureFixture[str]) -> None:
    """An example in the place of fifteen lines of usage; where nothing was asked for, what there is."""
    with pytest.raises(SystemExit):
        main(["fuse", "model.onnx"])
    assert capsys.readouterr().err == (
        "error: the following arguments are required: -o/--output\n"
        "Example: acmix-deploy fuse model.onnx -o model.fused.onnx --expect 3\n"
        "More: acmix-deploy fuse --help\n"
    )
    for words, verb in (([], "quantize"), (["plugin"], "check")):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert f"\n    {verb} " in capsys.readouterr().err


def test_export_without_latencies_in_a_batch(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), ACmix(8, 8, head=2)).eval(), "model.pt")
    assert (
        main(
            [
                "export",
                "model.pt",
                "--no-profile",
                "--opset",
                "17",
                "--imgsz",
                "12,16",
                "--batch",
                "2",
                "--target",
                "plain",
            ]
        )
        == 0
    )
    assert "latency on" not in capsys.readouterr().out
    report = ExportReport.model_validate_json((tmp_path / "model-deploy/report.json").read_text())
    assert report.export.inputs[0].shape == (2, 3, 12, 16)
    assert not [file for file in report.files.values() if file.profile]
    assert "profile" not in report.seconds
    assert (report.target.name, report.target.form, report.target.file) == ("plain", "plain", "model.fused.plain.onnx")
    assert report.next_steps[0].startswith("Carry model.fused.plain.onnx")
    assert main(["report", "model-deploy", "-o", "report.html"]) == 0
