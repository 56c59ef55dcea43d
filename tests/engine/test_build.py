"""Engines, without a GPU: real builds by TensorRT-RTX, their manifests, and what a user gets wrong.

What TensorRT itself does is tried on tests/engine/fake_tensorrt; that the real one has those names, on TensorRT 8.6.
"""

from __future__ import annotations

import importlib.util
import inspect as inspect_module
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from acmix_deploy import manifest as manifests
from acmix_deploy import onnx_file
from acmix_deploy.artifacts import Artifact, sha256, sidecar, write_artifact
from acmix_deploy.cli import main
from acmix_deploy.engine import backend
from acmix_deploy.engine.build import build
from acmix_deploy.errors import CheckFailed, MissingComponent, UserError
from acmix_deploy.manifest import EngineTensor, Machine, Manifest, Plugin, check, read_fitting, read_manifest
from acmix_deploy.report.inspection import inspect
from tests.engine.parts import FAKE
from tests.plugin import parts as tensorrt_parts

SHAPES = ((1, 3, 32, 32), (1, 3, 32, 48), (2, 3, 64, 64))
ORIN = Machine(backend="tensorrt", version="10.3.0.30", cuda="12.6", driver=None, gpu="Orin", sm=87)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """One ACmix block behind a convolution: plain and, by axes and type, fused; each with its sidecar."""
    torch = pytest.importorskip("torch")
    from acmix_deploy.export import export
    from acmix_deploy.families.acmix.module import ACmix
    from acmix_deploy.fusion import fuse
    from acmix_deploy.precision import to_fp16

    folder = tmp_path_factory.mktemp("files")
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), ACmix(16, 16, head=2)).eval()
    for axes, dynamic in (("static", ()), ("dynamic", ("batch", "height", "width"))):
        plain, fused, half = (folder / f"{axes}.{kind}.onnx" for kind in ("plain", "float32", "float16"))
        export(block, plain, input_shape=(1, 3, 32, 32), opset=17, dynamic=dynamic, divisor=2)
        fuse(plain, fused, expect=1)
        to_fp16(fused, half)
        for path, kind, parents in ((plain, "plain", []), (fused, "fused", [plain]), (half, "fp16", [fused])):
            write_artifact(path, kind, parents=parents)
    return folder


@pytest.fixture
def rtx():
    tensorrt_parts.rtx_libraries()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("axes", "precision"),
    [
        ("static", "float16"),
        ("dynamic", "float32"),
        pytest.param("static", "float32", marks=pytest.mark.soak),
        pytest.param("dynamic", "float16", marks=pytest.mark.soak),
    ],
)
@pytest.mark.parametrize(("form", "with_plugin"), [("any", False), ("plain", False), ("any", True), ("plugin", True)])
def test_rtx_builds(rtx, request, files, tmp_path, axes, precision, form, with_plugin):
    library = request.getfixturevalue("libraries")(11) if with_plugin else None
    source, target = files / f"{axes}.{precision}.onnx", tmp_path / "model.engine"
    shapes = SHAPES if axes == "dynamic" else None
    made = build(source, target, form=form, plugin=library, shapes=shapes)
    report = made.found

    assert report.plugin_layers == (("acmix_0.attention",) if with_plugin else ())
    assert (b"acmix_plan" in target.read_bytes()) == with_plugin, "what the plugin itself writes into an engine"
    assert report.layers > (8 if with_plugin else 15)
    size = (-1, 3, -1, -1) if axes == "dynamic" else (1, 3, 32, 32)
    assert report.manifest.inputs == (EngineTensor(name="images", dtype="FLOAT", shape=size),)
    assert [tensor.shape[1] for tensor in report.manifest.outputs] == [16]
    assert report.manifest.profiles == ({"images": SHAPES} if shapes else {})
    assert report.manifest.strongly_typed
    assert (report.manifest.form, report.inlined) == (form, {})
    assert left(tmp_path) == ["model.engine", "model.engine.json"]
    assert made.artifact.sha256 == sha256(target)
    assert [parent.sha256 for parent in made.artifact.parents] == [sha256(source)]

    here = report.manifest.machine.model_copy(update={"gpu": "a card", "sm": 86})
    assert read_fitting(target, here) == report.manifest
    with pytest.raises(UserError, match=r"built for sm_80, sm_86, sm_89, sm_120 and later, here is a card \(sm_90\)"):
        read_fitting(target, here.model_copy(update={"sm": 90}))


def test_default_form(rtx, files, tmp_path):
    assert build(files / "static.float32.onnx", tmp_path / "e").found.manifest.form == "plain"


def test_plugin_that_is_not_used(rtx, files, tmp_path, empty_library):
    source, target = files / "static.float32.onnx", tmp_path / "folder" / "model.engine"
    with pytest.raises(CheckFailed, match=r"does not compute acmix_0.attention in the engine: 0 of 1 layers"):
        build(source, target, plugin=empty_library)
    with pytest.raises(UserError, match=r"does not know: AcmixLocalAttention \(acmix_0.attention\)"):
        build(source, target, plugin=empty_library, form="plugin")
    assert left(target.parent) == []


def test_plugin_that_is_no_library(rtx, files, tmp_path):
    with pytest.raises(UserError, match=r"the plugin cannot be loaded: .*static.plain.onnx"):
        build(files / "static.float32.onnx", tmp_path / "e", plugin=files / "static.plain.onnx")


def test_unknown_operators_are_named(rtx, tmp_path, capsys):
    def node(op_type, x, y, name, domain=""):
        return helper.make_node(op_type, [x], [y], name=name, domain=domain)

    nodes = [node("Relu", "x", "a", "relu"), node("Frob", "a", "b", "one", "mine"), node("Det", "b", "c", "two")]
    nodes += [node("Frob", "c", f"y{i}", f"frob{i}", "mine") for i in range(3)]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 4]) for name in ("x", "y2"))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=opsets, ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    assert main(["build", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "model.engine")]) == 2
    said = capsys.readouterr().err
    assert "does not know: Frob (one, frob0, frob1 and 1 more); Det (two)\n" in said
    assert "Relu" not in said
    assert left(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize(
    ("axes", "shapes", "said"),
    [
        ("dynamic", None, r"input images of .* has free axes: 0 \(batch\), 2 \(height\), 3 \(width\)"),
        ("dynamic", ((1, 3, 32, 32),) * 2 + ((1, 4, 32, 32),), r"--max \[1, 4, 32, 32\] does not fit input images"),
        ("dynamic", SHAPES[::-1], "do not grow"),
        ("static", SHAPES, r"has no free axis: images \[1, 3, 32, 32\]"),
    ],
)
def test_shapes_that_do_not_fit(rtx, files, tmp_path, axes, shapes, said):
    with pytest.raises(UserError, match=said):
        build(files / f"{axes}.float32.onnx", tmp_path / "e", shapes=shapes)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--min", "1,3,32,32"], "--min, --opt and --max go together"),
        (["--target", "plugin"], "there is none"),
        (["--target", "plain", "--plugin", "x.so"], "leaves nothing for a plugin"),
        (["--plugin", "missing.so"], "cannot read missing.so"),
        (["--fp16"], "takes the types from the file"),
    ],
)
def test_options_that_contradict(rtx, files, tmp_path, capsys, options, said):
    assert main(["build", str(files / "static.float32.onnx"), "-o", str(tmp_path / "e"), *options]) == 2
    assert said in capsys.readouterr().err
    assert left(tmp_path) == []


def test_files_that_are_no_onnx(rtx, tmp_path):
    (tmp_path / "text.onnx").write_text("nothing")
    for name in ("missing.onnx", "text.onnx"):
        with pytest.raises(UserError, match=name):
            build(tmp_path / name, tmp_path / "e")


def test_outputs_that_are_inputs(fake, files, tmp_path, empty_library):
    source = tmp_path / "model.onnx"
    source.write_bytes((files / "static.float32.onnx").read_bytes())
    with pytest.raises(UserError, match=r"model.onnx is to be read, and would be overwritten"):
        build(source, source)
    with pytest.raises(UserError, match=r"model.onnx is to be read, and would be overwritten"):
        build(source, tmp_path / "e", timing_cache=source)
    with pytest.raises(UserError, match="both engine and timing cache"):
        build(source, tmp_path / "e", timing_cache=tmp_path / "e")
    assert onnx.load(source).graph.node


def test_modules_in_the_folder_stand_in_for_none(fake, files, tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    assert build(files / "static.float32.onnx", tmp_path / "e").artifact.kind == "engine"


def test_no_tensorrt(monkeypatch, files, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["build", str(files / "static.float32.onnx"), "-o", str(tmp_path / "e")]) == 3
    assert "no TensorRT and no TensorRT-RTX for" in capsys.readouterr().err


def test_no_gpu(fake, monkeypatch, files, tmp_path):
    monkeypatch.setattr(manifests, "gpu_here", dict)
    with pytest.raises(MissingComponent, match=r"TensorRT 8.6.0 builds an engine on the device .* no GPU here"):
        build(files / "static.float32.onnx", tmp_path / "e")


def test_what_tensorrt_8_is_asked_for(fake, files, tmp_path, empty_library):
    cache, target = tmp_path / "times", tmp_path / "e"
    source = files / "static.float32.onnx"
    report = build(source, target, plugin=empty_library, fp16=True, level=1, timing_cache=cache).found
    assert json.loads(target.read_bytes())["asked"] == {
        "network": 1, "level": 1, "verbosity": 1, "flags": ["FP16"], "sources": None
    }  # fmt: skip
    assert report.plugin_layers == ("acmix_0.attention",)
    assert (report.manifest.form, report.manifest.flags) == ("plugin", ("FP16",))
    assert report.manifest.machine == Machine(backend="tensorrt", version="8.6.0", gpu="Orin", sm=87)
    assert read_fitting(target, report.manifest.machine) == report.manifest
    build(source, target, timing_cache=cache)
    assert cache.read_bytes() == b"++", "the second build read what the first one wrote"
    cache.write_bytes(b"other machine's")
    assert "started anew" in build(source, target, timing_cache=cache).found.notes[0]
    assert cache.read_bytes() == b"+"


def test_flags_follow_the_types_of_the_file(fake, files, tmp_path):
    build(files / "dynamic.float16.onnx", tmp_path / "e", shapes=SHAPES)
    plan = json.loads((tmp_path / "e").read_bytes())
    assert (plan["asked"]["flags"], plan["profiles"]) == (["FP16"], {"images": [list(shape) for shape in SHAPES]})


def test_nodes_that_the_plugin_refuses_are_named(fake, files, tmp_path, empty_library):
    """A head_dim of 4 is computed without it."""
    model = onnx.load(files / "static.float32.onnx")
    (node,) = onnx_file.fused_nodes(model)
    heads = next(attribute for attribute in node.attribute if attribute.name == "num_heads")
    position = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    head_dim = position.dims[0]
    heads.i *= head_dim // 4
    position.CopyFrom(onnx.numpy_helper.from_array(np.zeros((4, 2), np.float32), position.name))
    onnx.save(model, tmp_path / "small.onnx")
    report = build(tmp_path / "small.onnx", tmp_path / "e", plugin=empty_library).found
    assert report.inlined == {node.name: "head_dim 4"}
    assert (report.plugin_layers, report.manifest.plugin) == ((), None)


def test_sizes_off_the_stride(fake, files, tmp_path):
    model = onnx.load(files / "dynamic.float16.onnx")
    onnx.helper.set_model_props(model, {"stride": "32"})
    onnx.save(model, tmp_path / "strided.onnx")
    shapes = ((1, 3, 32, 32), (1, 3, 64, 64), (1, 3, 100, 100))
    with pytest.raises(UserError, match=r"--max \[1, 3, 100, 100\] is no multiple of 32, the stride of"):
        build(tmp_path / "strided.onnx", tmp_path / "e", shapes=shapes)


def test_tactic_sources(fake, files, tmp_path):
    build(files / "static.float32.onnx", tmp_path / "e", tactic_sources=["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"])
    assert json.loads((tmp_path / "e").read_bytes())["asked"]["sources"] == 0b11000


def test_opset_that_tensorrt_8_does_not_read(fake, files, tmp_path):
    model = onnx.load(files / "static.plain.onnx")
    model.opset_import[0].version = 18
    onnx.save(model, tmp_path / "18.onnx")
    with pytest.raises(UserError, match=r"has opset 18; TensorRT 8.6 reads 17 at most\nExport with --opset 17"):
        build(tmp_path / "18.onnx", tmp_path / "e")


@pytest.mark.parametrize(
    ("mode", "error", "said"),
    [
        ("memory", MissingComponent, r"too little memory on Orin \(sm_87\) for TensorRT 8.6.0 to build .*: Requested"),
        ("SIGKILL", MissingComponent, "the system ended the build"),
        ("SIGSEGV", CheckFailed, r"ended in the middle of the build \(SIGSEGV\)"),
    ],
)
def test_build_that_fails(fake, files, tmp_path, mode, error, said):
    fake(mode)
    with pytest.raises(error, match=said):
        build(files / "static.float32.onnx", tmp_path / "e", timing_cache=tmp_path / "times")
    assert left(tmp_path) == []


def test_cancelled_build_leaves_nothing(files, tmp_path):
    """Ctrl-C in the middle of a build; the former engine stays."""
    (tmp_path / "model.engine").write_text("former")
    # Whoever runs the tests in the background may have left SIGINT ignored.
    start = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from acmix_deploy import cli, manifest; manifest.gpu_here = lambda: {'gpu': 'Orin', 'sm': 87};"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start, "build", files / "static.float32.onnx", "-o", tmp_path / "model.engine"],
        env={**os.environ, "PYTHONPATH": str(FAKE), "FAKE_TENSORRT": "wait"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stderr:
        if line.startswith("building"):
            break
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130, said
    assert said.endswith("interrupted\n")
    assert left(tmp_path) == ["model.engine"]
    assert (tmp_path / "model.engine").read_text() == "former"
    time.sleep(0.2)
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("version", "known", "strongly_typed", "flags"),
    [
        ("8.5.2.2", {"EXPLICIT_BATCH": 0, "EXPLICIT_PRECISION": 1}, False, 0b1),
        ("10.3.0", {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, True, 0b10),
        ("11.1.0", {"STRONGLY_TYPED": 1}, True, 0b10),
        ("12.0.0", {}, True, 0),
    ],
)
def test_network_flags(version, known, strongly_typed, flags):
    creation = SimpleNamespace(__members__=known)
    trt = SimpleNamespace(__version__=version, NetworkDefinitionCreationFlag=creation)
    assert backend._network_flags(trt, strongly_typed) == flags


def test_names_of_tensorrt_86():
    """The real TensorRT 8.6 has the names that backend.py uses of it, and the backend comes as far as the device."""
    python = os.environ.get("ACMIX_TENSORRT86_PYTHON")
    if not python:
        pytest.skip("no TensorRT 8.6: name a Python 3.10 that has it in ACMIX_TENSORRT86_PYTHON")
    names = [name for name, value in vars(fake_tensorrt()).items() if name[0] != "_" and inspect_module.isclass(value)]
    names = [
        f"{name}.{member}" for name in names for member in vars(getattr(fake_tensorrt(), name)) if member[0] != "_"
    ]
    names += ["init_libnvinfer_plugins", "OnnxParser.supports_operator", "OnnxParser.get_error", "ParserError.desc"]
    names += ["ICudaEngine.create_engine_inspector", "EngineInspector.get_engine_information"]
    script = f"""
import sys, json, tensorrt
from operator import attrgetter
sys.path.insert(0, {str(Path(backend.__file__).parent)!r})
import backend
missing = []
for name in {names!r}:
    try: attrgetter(name)(tensorrt)
    except AttributeError: missing.append(name)
creators = [creator.name for creator in backend._creators(tensorrt)]
flags = [backend._network_flags(tensorrt, typed) for typed in (False, True)]
print(json.dumps([missing, len(creators) > 9, flags, backend._monitor(tensorrt, print)]))
"""
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[], True, [1, 1], None]


def fake_tensorrt():
    spec = importlib.util.spec_from_file_location("fake_tensorrt", FAKE / "tensorrt" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def manifest(**changed) -> Manifest:
    plugin = Plugin(path=Path("libacmix_plugin.so"), sha256="a" * 64)
    tensor = EngineTensor(name="images", dtype="FLOAT", shape=(1, 3, 32, 32))
    whole = {
        "machine": ORIN, "compute_capabilities": (), "plugin": plugin, "form": "plugin", "strongly_typed": True,
        "precision": "float16", "metadata": {},
        "flags": (), "level": 3, "profiles": {}, "inputs": (tensor,), "outputs": (tensor,),
    }  # fmt: skip
    return Manifest(**{**whole, **changed})


def test_manifest_that_fits():
    check(manifest(), ORIN, "a" * 64)
    check(manifest(), ORIN.model_copy(update={"version": "10.3.0.26", "driver": "540.4", "cuda": "12.8"}), "a" * 64)
    check(manifest(plugin=None), ORIN, None)
    check(manifest(plugin=None), ORIN, "b" * 64)
    rtx = Machine(backend="tensorrt_rtx", version="1.7.1.116")
    for sm in (80, 86, 120, 121):
        here = rtx.model_copy(update={"gpu": "a card", "sm": sm})
        check(manifest(machine=rtx, plugin=None, compute_capabilities=(80, 86, 120)), here)


@pytest.mark.parametrize(
    ("here", "plugin", "said"),
    [
        ({"version": "10.3.1"}, "a", "built with TensorRT 10.3.0, here is TensorRT 10.3.1"),
        ({"version": "8.6.2"}, "a", "built with TensorRT 10.3.0, here is TensorRT 8.6.2"),
        ({"backend": "tensorrt_rtx"}, "a", "built with TensorRT 10.3.0, here is TensorRT-RTX 10.3.0"),
        ({"gpu": "Thor", "sm": 110}, "a", r"built for Orin \(sm_87\), here is Thor \(sm_110\)"),
        ({"gpu": "Another Orin"}, "a", r"built for Orin \(sm_87\), here is Another Orin \(sm_87\)"),
        ({"gpu": None, "sm": None}, "a", "here is no GPU"),
        ({}, "b", "SHA-256 aaaaaaaaaaaa..., the one here has bbbbbbbbbbbb..."),
        ({}, "", "SHA-256 aaaaaaaaaaaa..., there is none here"),
    ],
)
def test_manifest_that_does_not_fit(here, plugin, said):
    with pytest.raises(MissingComponent if here.get("gpu", "") is None else UserError, match=said):
        check(manifest(), ORIN.model_copy(update=here), plugin * 64 or None)


def test_changed_engine_is_refused(tmp_path):
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"plan")
    with pytest.raises(UserError, match="no sidecar"):
        read_manifest(engine)
    write_artifact(engine, "engine", settings=manifest().model_dump(mode="json"))
    assert read_manifest(engine) == manifest()
    engine.write_bytes(b"plaN")
    with pytest.raises(UserError, match="has changed since"):
        read_manifest(engine)
    write_artifact(engine, "fused", settings=manifest().model_dump(mode="json"))
    with pytest.raises(UserError, match="is no engine: its sidecar says fused"):
        read_manifest(engine)
    write_artifact(engine, "engine", settings={"level": 3})
    with pytest.raises(UserError, match="cannot be read: machine: Field required"):
        read_manifest(engine)


def test_plugin_that_moved_or_changed(tmp_path):
    engine, library = tmp_path / "model.engine", tmp_path / "plugin.so"
    engine.write_bytes(b"plan")
    library.write_bytes(b"code")
    plugin = Plugin(path=library, sha256=sha256(library))
    write_artifact(engine, "engine", settings=manifest(plugin=plugin).model_dump(mode="json"))
    read_fitting(engine, ORIN)
    moved = library.rename(tmp_path / "moved.so")
    with pytest.raises(UserError, match="there is none here"):
        read_fitting(engine, ORIN)
    read_fitting(engine, ORIN, moved)
    moved.write_bytes(b"other")
    with pytest.raises(UserError, match="the one here has"):
        read_fitting(engine, ORIN, moved)


def test_inspect_onnx(files, capsys):
    found = inspect(files / "dynamic.float16.onnx")
    assert (found.kind, found.unchanged, found.onnx.opset, found.onnx.ir_version) == ("fp16", True, 17, 8)
    assert (found.onnx.form, found.onnx.precision) == ("any", "float16")
    assert [node.name for node in found.onnx.fused] == ["acmix_0.attention"]
    assert found.onnx.fused[0].attributes["num_heads"] == 2
    assert found.onnx.inputs[0].shape == ("batch", 3, "height", "width")
    assert found.onnx.operators["AcmixLocalAttention"] == 1
    assert [(a.name, a.kind, a.made, a.state) for a in found.ancestors] == [
        ("dynamic.float32.onnx", "fused", "dynamic.float16.onnx", "unchanged"),
        ("dynamic.plain.onnx", "plain", "dynamic.float32.onnx", "unchanged"),
    ]
    assert inspect(sidecar(files / "dynamic.float16.onnx")) == found
    assert main(["inspect", str(files / "dynamic.float16.onnx")]) == 0
    shown = capsys.readouterr().out
    for word in ("float16", "num_heads=2", "dynamic.plain.onnx", "unchanged", "images", "[batch, 3, height, width]"):
        assert word in shown


def test_form_and_precision(files):
    model = onnx.load(files / "static.float32.onnx")
    assert onnx_file.describe(model).precision == "float32"
    del model.functions[:]
    assert onnx_file.describe(model).form == "plugin"
    model.graph.node.append(helper.make_node("DequantizeLinear", ["a", "b"], ["c"]))
    assert onnx_file.describe(model).precision == "int8"
    assert onnx_file.describe(onnx.load(files / "static.plain.onnx")).form == "plain"


def test_inspect_notices_changes(files, tmp_path, capsys):
    for path in files.glob("static.*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "static.float32.onnx").write_bytes((tmp_path / "static.plain.onnx").read_bytes())
    (tmp_path / "static.plain.onnx").unlink()
    states = [ancestor.state for ancestor in inspect(tmp_path / "static.float16.onnx").ancestors]
    assert states == ["changed", "not here"]
    assert main(["inspect", "--json", str(tmp_path / "static.float32.onnx")]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["unchanged"] is False
    assert "has changed since its sidecar was written" in printed.err
    sidecar(tmp_path / "static.float32.onnx").write_text("{")
    assert main(["inspect", str(tmp_path / "static.float32.onnx")]) == 2
    assert "is no sidecar of this version" in capsys.readouterr().err


def test_inspect_engines_and_others(files, tmp_path, capsys):
    engine = tmp_path / "model.engine"
    engine.write_bytes(b"ftrt...")
    assert "no manifest" in inspect(engine).notes[0]
    write_artifact(
        engine, "engine", parents=[files / "static.float16.onnx"], settings=manifest().model_dump(mode="json")
    )
    assert inspect(engine).manifest == manifest()
    assert main(["inspect", str(engine)]) == 0
    assert "TensorRT 10.3.0" in capsys.readouterr().out
    assert Artifact.model_validate_json(sidecar(engine).read_text()).kind == "engine"
    for name, content in (("text.txt", "text"), ("list.json", "[]"), ("broken.json", "{")):
        (tmp_path / name).write_text(content)
        assert main(["inspect", str(tmp_path / name)]) == 2, name
    assert main(["inspect", str(tmp_path / "missing")]) == 2
