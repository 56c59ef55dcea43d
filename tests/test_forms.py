"""Files in the form of their target: what is in them, that they compute the same, and what the command line makes."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional

from acmix_deploy.artifacts import read_artifact
from acmix_deploy.cli import main, parser
from acmix_deploy.errors import UserError
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.forms import TargetReport, refused, to_form, write_for
from acmix_deploy.fusion import fuse
from acmix_deploy.onnx_file import unread, unread_note
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.precision import to_fp16
from acmix_deploy.report.model import ExportReport
from acmix_deploy.report.target import target_steps
from acmix_deploy.runtime.inputs import AXES
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.targets import TARGETS, target_named, target_of
from tests.cli.test_cli import fails
from tests.families.parts import export, outputs, relative_l2
from tests.fusion.test_fuse import randomised

FLOAT32 = LOCAL_ATTENTION.tolerances["float32"].floor
SHAPES = [(1, 3, 12, 16), (3, 3, 16, 20)]


class Two(nn.Module):
    """A block that the plugin takes, with stride 2, and behind it one that it refuses for its head_dim of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = randomised(ACmix(3, 16, head=2, stride=2))
        self.refused = randomised(ACmix(16, 8, head=2))

    def forward(self, x):
        return self.refused(self.taken(x).relu())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Fused files of Two by (element type, whether the axes are free)."""
    folder = tmp_path_factory.mktemp("forms")
    found = {}
    for dynamic in (False, True):
        name = "dynamic" if dynamic else "static"
        plain, fused, half = (folder / f"{name}{suffix}.onnx" for suffix in ("", ".fused", ".fp16"))
        export(Two().eval(), torch.rand(SHAPES[0]), plain, dynamic=AXES if dynamic else ())
        model = onnx.load(plain)
        onnx.helper.set_model_props(model, {"stride": "2"})
        onnx.save(model, plain)
        fuse(plain, fused, expect=2)
        to_fp16(fused, half)
        found |= {("float32", dynamic): fused, ("float16", dynamic): half}
    return found


def custom(model):
    return [node.name for node in model.graph.node if node.domain == LOCAL_ATTENTION.domain]


def same(expected, actual, dynamic, limit):
    """Both models give the same on every shape that they take."""
    sessions = [open_session(model) for model in (expected, actual)]
    for shape in SHAPES if dynamic else SHAPES[:1]:
        x = np.random.default_rng(0).random(shape, np.float32)
        first, second = (session.run(None, {"x": x})[0] for session in sessions)
        found = deviation(first, second)
        assert not found.problem
        assert found.relative_l2 <= limit


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", ["plain", "any"])
def test_computes_the_same(files, dtype, dynamic, form):
    model = onnx.load(files[dtype, dynamic])
    before = model.SerializeToString()
    formed = to_form(model, form)
    assert model.SerializeToString() == before
    same(model, formed, dynamic, LOCAL_ATTENTION.tolerances[dtype].floor)
    assert custom(formed) == (["acmix_0.attention"] if form == "any" else [])
    assert any(node.name.startswith("acmix_1.attention/MatMul_") for node in formed.graph.node)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plain_has_standard_operators_alone(files, dtype, dynamic):
    source = onnx.load(files[dtype, dynamic])
    model = to_form(source, "plain")
    assert not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    assert {entry.key for entry in model.metadata_props} == ({"stride", "min_size"} if dynamic else {"stride"})
    assert {node.domain for node in model.graph.node} == {""}
    assert "CastLike" not in {node.op_type for node in model.graph.node}
    attributes = {attribute.name for node in model.graph.node for attribute in node.attribute}
    assert not attributes & {"value_int", "value_ints", "value_float", "value_floats"}
    assert "DOUBLE" not in {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    names = [node.name for node in model.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    if not dynamic:
        left = {node.op_type for node in model.graph.node if "/" in node.name}
        assert not left & {"Shape", "Range", "Mod", "Where", "Min", "Max"}, "index arithmetic is computed beforehand"
    known = {tensor.name for tensor in (*model.graph.initializer, *model.graph.input)}
    for node in model.graph.node:
        assert known.issuperset(name for name in node.input if name), f"{node.name} stands before what it reads"
        known.update(node.output)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_plugin_has_nodes_without_definitions(files, dynamic):
    source = onnx.load(files["float32", dynamic])
    assert refused(source) == {"acmix_1.attention": "head_dim 4"}
    model = to_form(source, "plugin")
    assert not model.functions
    assert custom(model) == ["acmix_0.attention"]
    assert {entry.domain for entry in model.opset_import} == {"", LOCAL_ATTENTION.domain}
    (node,) = (node for node in model.graph.node if node.domain)
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert {name: attributes[name] for name in ("num_heads", "kernel_size", "stride")} == {
        "num_heads": 2,
        "kernel_size": 7,
        "stride": 2,
    }
    model.functions.extend(source.functions)  # with them it is the file that it was cut from
    onnx.checker.check_model(model, full_check=True)
    same(source, model, dynamic, LOCAL_ATTENTION.tolerances["float32"].floor)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, {}),
        ({"kernel_size": 11}, {"acmix_0.attention": "kernel_size 11"}),
        ({"stride": 3, "kernel_size": 13}, {"acmix_0.attention": "kernel_size 13, stride 3"}),
    ],
)
def test_limits_of_the_plugin(files, changes, reason):
    model = onnx.load(files["float32", False])
    for attribute in next(node for node in model.graph.node if node.name == "acmix_0.attention").attribute:
        attribute.i = changes.get(attribute.name, attribute.i)
    assert refused(model) == {**reason, "acmix_1.attention": "head_dim 4"}


def test_large_position_terms_stay_computed(tmp_path):
    """P*l of this map takes 1.8 MB, of a detector's first map far more."""
    block, x = randomised(ACmix(3, 32, head=2)), torch.rand(1, 3, 64, 72)
    fuse(export(block, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx", expect=1)
    model = to_form(onnx.load(tmp_path / "fused.onnx"), "plain")
    assert max(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer) <= 1 << 20
    assert not refused(onnx.load(tmp_path / "fused.onnx"))


def test_definition_is_missing(files, tmp_path):
    stripped = to_form(onnx.load(files["float32", False]), "plugin")
    onnx.save(stripped, tmp_path / "plugin.onnx")
    with pytest.raises(UserError, match="without its definition"):
        write_for(target_of((10, 3)), tmp_path / "plugin.onnx", "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plugin.onnx"]


def test_file_without_a_node_for_the_plugin_is_plain(tmp_path):
    block, x = randomised(ACmix(3, 8, head=2)), torch.rand(1, 3, 10, 12)
    fuse(export(block, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx", expect=1)
    made = write_for(target_of((10, 3)), tmp_path / "fused.onnx")
    assert made.artifact.settings == {"target": "tensorrt-10.3", "tensorrt": "10.3", "form": "plain"}
    assert made.found.inlined == {"acmix_0.attention": "head_dim 4"}
    assert not custom(onnx.load(made.artifact.path))


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), randomised(ACmix(8, 16, head=2))).eval(), "model.pt")
    return tmp_path


QUICK = ["--seconds", "0.1"]
EXPORT = ["export", "model.pt", "--fp16", "--input-shape", "1,3,12,16", "--out", "deploy", *QUICK]


def exported(folder):
    return ExportReport.model_validate_json((folder / "deploy" / "report.json").read_text())


def test_export_for_targets(checkpoint, faster_exporter, capsys):
    """Opset, parent, form and command of each, and nothing left of the target before."""
    expected = {
        "jetpack-5.1": ("fused", 17, "plugin", "--fp16 ", "--plugins=./build/libacmix_plugin.so"),
        "jetpack-6.2": ("fp16", 18, "plugin", "--stronglyTyped ", "--staticPlugins=./libacmix_plugin.so"),
        "tensorrt-11": ("fp16", 18, "any", "", "--staticPlugins=./libacmix_plugin.so"),
    }
    for name, (parent, opset, form, options, plugin) in expected.items():
        file = f"model.{parent}.{name}.onnx"
        assert main([*EXPORT, "--for", name]) == 0
        engine = file.replace(".onnx", ".engine")
        assert f"trtexec --onnx={file} {options}--saveEngine={engine} {plugin}\n" in capsys.readouterr().out
        written = {"model.onnx", "model.fused.onnx", "model.fp16.onnx", file}
        found = {path.name for path in (checkpoint / "deploy").glob("*.onnx")}
        assert found == written
        assert len([*(checkpoint / "deploy").iterdir()]) == 2 * len(written) + 1
        report = exported(checkpoint)
        assert report.passed
        assert (report.target.form, report.target.file, report.export.opset) == (form, file, opset)
        assert {comparison.candidate for comparison in report.verification.comparisons} == written
        assert (report.files["target"].profile is None) == (form == "plugin")
        assert [p.name for p in read_artifact(checkpoint / "deploy" / file).parents] == [f"model.{parent}.onnx"]
        model = onnx.load(checkpoint / "deploy" / file)
        assert (len(custom(model)), len(model.functions)) == (1, form == "any")
    assert "TensorRT 11.0" in report.next_steps[0]
    assert "  acmix-deploy plugin build" in report.next_steps
    engine = "model.fp16.tensorrt-11.engine"
    build = f"  acmix-deploy build model.fp16.tensorrt-11.onnx --plugin libacmix_plugin.so -o {engine}"
    assert build in report.next_steps
    assert f"  acmix-deploy verify model.fused.onnx {engine}" in report.next_steps
    assert main([*EXPORT, "--opset", "17", "--for", "jetpack-6.2", "--target", "plain", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["target"]["form"] == "plain"
    assert not any("plugin" in step for step in report["next_steps"])


class Halved(nn.Module):
    """An operator that no TensorRT reads, and one that it reads otherwise."""

    def forward(self, x):
        folded = functional.fold(x.flatten(2).repeat(1, 4, 1), (6, 8), 2, stride=2)
        return functional.interpolate(folded, scale_factor=0.5, mode="bilinear", antialias=True)


def test_operators_that_the_target_does_not_read(tmp_path, monkeypatch, capsys):
    """They are told before the file is carried, with the way out: by export, with --for and without, by fuse, and by
    doctor; as fields too."""
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(nn.Conv2d(3, 3, 1), Halved()), "model.pt")
    lacking = ["Col2Im", "Resize with antialias 1"]
    said = (
        r"has Col2Im \(\S+\), which TensorRT does not read: a plugin called Col2Im is needed there, or a model "
        "without it; a transposed convolution with one-hot kernels in place of fold",
        r"has Resize with antialias 1 \(\S+\), which TensorRT does not read: a model without it is needed there",
    )
    command = ["export", "model.pt", "--trust", "--input-shape", "1,3,3,4", "--out", "deploy"]
    for options in ([], ["--for", "jetpack-6.2"], ["--for", "tensorrt-11", "--target", "plain"]):
        assert main([*command, *QUICK, *options]) == 0
        steps = exported(tmp_path).next_steps
        printed = capsys.readouterr().out
        for step, words in zip(steps, said, strict=True):
            assert re.fullmatch(rf"model\S*.onnx {words}", step)
            assert step in printed
    assert list(exported(tmp_path).target.unread) == lacking
    command = ["fuse", "deploy/model.onnx", "-o", "model.fused.onnx", "--for", "jetpack-7.2"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert all(re.search(words, printed) for words in said)
    assert main([*command, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["target"]["unread"]) == lacking
    main(["doctor", "deploy/model.onnx"])
    told = " ".join(capsys.readouterr().out.split())
    assert all(re.search(words, told) for words in said)


def test_unread_operators_are_found_everywhere():
    """In branches and functions, of other domains; by the release, and not among what is newer than the file."""

    def node(operator, domain="", **attributes):
        return onnx.helper.make_node(operator, ["x"], ["y"], f"the_{operator}", domain=domain, **attributes)

    branch = onnx.helper.make_graph([node("Col2Im")], "then", [], [])
    function = onnx.helper.make_function(
        "theirs", "Block", ["x"], ["y"], [node("LayerNormalization")], [onnx.helper.make_opsetid("", 17)]
    )
    nodes = [
        *(node("Relu"), node("If", then_branch=branch), node("Block", "theirs"), node("DCN", "mmdeploy")),
        *(node("Attention", "com.microsoft"), node(LOCAL_ATTENTION.op_type, LOCAL_ATTENTION.domain), node("Gelu", "a")),
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [], []),
        functions=[function],
        opset_imports=[onnx.helper.make_opsetid("", 20)],
    )
    always = {name: (f"the_{name}",) for name in ("Col2Im", "DCN", "Attention")}
    newer = {name: (f"the_{name}",) for name in ("LayerNormalization", "Gelu")}
    assert unread(model, target_of((8, 5))) == always | newer
    assert unread(model, target_of((8, 6))) == always | {"Gelu": ("the_Gelu",)}
    assert unread(model, target_of((11, 0))) == always
    assert "which TensorRT before 8.6 does not read" in unread_note("LayerNormalization", ["a"])
    assert "DCN (a, b, c and 2 more), which TensorRT does not read" in unread_note("DCN", [*"abcde"])


NEXT = {
    "no block": nn.Conv2d(3, 8, 3),
    "refused": randomised(ACmix(3, 8, head=2)),
    "fused": randomised(ACmix(3, 16, head=2)),
}


def typed(step):
    """A line of Next as a command."""
    if again := re.search(r"export again with .*?(--for [a-z]\S+( --target \S+)?)$", step):
        return f"acmix-deploy export model.pt {again[1]}"
    return step.removeprefix("  ").removeprefix("or ")


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        pytest.param(name, axes, id=f"{name}-{'dynamic' if axes else 'static'}", marks=marks)
        for name in NEXT
        for axes in ("batch,height,width", "")
        for marks in [() if name == "no block" or (name == "fused" and axes) else pytest.mark.soak]
    ],
)
def test_next_can_be_typed(tmp_path, monkeypatch, name, axes):
    """Every command parses, no file is named twice, and the plugin is there where a node of the file is for it."""
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Sequential(NEXT[name], nn.ReLU()).eval(), "my model.pt")
    command = ["export", "my model.pt", "--input-shape", "1,3,12,16", "--out", "deploy", "--opset", "17"]
    assert main([*command, *QUICK, "--dynamic", axes]) == 0
    report = exported(tmp_path)
    assert ("plugin" in " ".join(report.next_steps)) == (name == "fused")
    found = [report.next_steps]
    fused = tmp_path / "deploy" / "my model.fused.onnx"
    for target in TARGETS.values():
        for form in (None, "plain"):
            made_for = write_for(target, fused, form).found
            shapes = report.export.shapes_to_build
            found.append(target_steps(made_for, fused.name, "float32", shapes, "images", detector=True))
            assert ("plugin" in " ".join(found[-1])) == (name == "fused" and not form)
            assert (fused.name in found[-1][0]) == target.package
    for first, *steps in found:
        carried = first.removeprefix("Carry ").split(" to the target")[0].split(" and ")
        assert len(carried) == len({*carried})
        commands = [shlex.split(typed(step)) for step in steps]
        assert {words[0] for words in commands} <= {"acmix-deploy", "trtexec", "cmake"}
        read = [parser().parse_args(words[1:]) for words in commands if words[0] == "acmix-deploy"]
        assert {str(options.model) for options in read if "level" in options} <= {*carried}
        assert read or "jetpack-5.1" in first


def test_files_for_other_runtimes(files, tmp_path, capsys):
    """Fused anew from the plain file, with the branch that is faster there; each runs as it is."""
    source = tmp_path / "model.onnx"
    x = torch.rand(1, 3, 10, 12)
    expected = outputs(export(randomised(ACmix(3, 16, head=2)), x, source), x)
    for name, form, convolutions in (("onnxruntime", "any", 2), ("openvino", "plain", 3)):
        command = ["fuse", str(source), "-o", str(tmp_path / f"{name}.onnx"), "--for", name, "--json"]
        assert main(command) == 0
        found = json.loads(capsys.readouterr().out)["target"]
        assert (found["name"], found["tensorrt"], found["form"], found["unread"]) == (name, "", form, {})
        assert found["file"] == f"{name}.{name}.onnx"
        model = onnx.load(tmp_path / found["file"])
        assert [node.op_type for node in model.graph.node].count("Conv") == convolutions
        assert bool(model.functions) == (form == "any")
        assert relative_l2(outputs(tmp_path / found["file"], x), expected) < FLOAT32
        report = TargetReport.model_validate(found)
        first, *steps = target_steps(report, "model.onnx", "float32", None, "images", detector=False)
        ours = ", install acmix-deploy there," * (name == "onnxruntime")
        assert first == f"Carry {name}.{name}.onnx and model.onnx to the target ({name}){ours} and run there:"
        assert steps[-1].split() == [*target_named(name).command.split(), f"{name}.{name}.onnx"]


def test_a_wrong_target_file_fails(checkpoint, monkeypatch, capsys):
    """The file for the target is verified, not taken for granted."""

    def broken(model, form):
        formed = to_form(model, form)
        weight = next(tensor for tensor in formed.graph.initializer if tensor.name.endswith("qkv.weight"))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
        return formed

    monkeypatch.setattr("acmix_deploy.forms.to_form", broken)
    assert "model.fp16.tensorrt-11.onnx" in fails(capsys, 1, *EXPORT, "--opset", "17", "--for", "tensorrt-11")
    assert not exported(checkpoint).passed


def test_fuse_for_a_target(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export(Two().eval(), torch.rand(SHAPES[0]), tmp_path / "plain.onnx")
    assert main(["fuse", "plain.onnx", "-o", "fused.onnx", "--for", "jetpack-5.1"]) == 0
    printed = capsys.readouterr().out
    assert "For jetpack-5.1, form plugin: fused.jetpack-5.1.onnx" in printed
    assert "acmix_1.attention has head_dim 4" in printed
    assert read_artifact(tmp_path / "fused.jetpack-5.1.onnx").settings["form"] == "plugin"
    assert len(custom(onnx.load("fused.onnx"))) == 2
    assert main(["fuse", "plain.onnx", "-o", "fused.onnx", "--for", "jetpack-5.1", "--json"]) == 0
    target = json.loads(capsys.readouterr().out)["target"]
    assert (target["form"], target["file"]) == ("plugin", "fused.jetpack-5.1.onnx")
    assert list(target["inlined"]) == ["acmix_1.attention"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["export", "model.pt", "--for", "jetpack-9"], "jetpack-6.2"),
        (["export", "model.pt", "--target", "any"], "--for TARGET"),
        (["export", "model.pt", "--for", "tensorrt-9.1"], "TensorRT 9.1 is not supported"),
        (
            ["export", "model.pt", "--for", "jetpack-6.0", "--opset", "18"],
            "has opset 18; TensorRT 8.6 reads 17 at most",
        ),
        (["fuse", "new.onnx", "-o", "x.onnx", "--for", "jetpack-6.0"], "has opset 18; TensorRT 8.6 reads 17 at most"),
        (["fuse", "new.onnx", "-o", "x.onnx", "--for", "jetpack-6.2", "--target", "any"], "Use --target plugin"),
    ],
)
def test_bad_input(checkpoint, capsys, command, words):
    if "new.onnx" in command:
        x = torch.rand(1, 3, 10, 12)
        export(randomised(ACmix(3, 16, head=2)), x, checkpoint / "new.onnx", opset=18)
    assert words in fails(capsys, 2, *command)
    assert not [*checkpoint.glob("*jetpack*"), *checkpoint.glob("x.onnx")]


def test_rtx_builds_any_and_plain(rtx, files, tmp_path):
    """A parser and builder of TensorRT takes both without the plugin."""
    paths = []
    for (dtype, dynamic), source in files.items():
        if not dynamic or dtype == "float32":
            for form in ("any", "plain"):
                paths.append(tmp_path / f"{source.stem}.{form}.onnx")
                onnx.save(to_form(onnx.load(source), form), paths[-1])
    answers, _ = rtx("build", "-", *paths)
    for path, answer in zip(paths, answers, strict=True):
        assert (answer.get("built"), answer["errors"]) == (True, []), (path.name, answer)
