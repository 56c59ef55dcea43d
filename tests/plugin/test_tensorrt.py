"""The plugin as TensorRT meets it, without a GPU: headers of six releases, TensorRT-RTX's builder, 8.6's registry.

What is not at hand is skipped and named. To have all of it:

    ACMIX_TENSORRT_HEADERS    folder with one folder of headers a release, e.g. 8.5.2, v8.6.1, v10.13.0, v11.1
    ACMIX_TENSORRT86_PYTHON   a Python 3.10 with `pip install tensorrt==8.6.0 'nvidia-cudnn-cu12<9'`
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.axes import shapes
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.neighborhood_attention import NEIGHBORHOOD_ATTENTION, Border
from acmix_deploy.operators.outlook_attention import OUTLOOK_ATTENTION
from acmix_deploy.operators.reassembly import REASSEMBLY
from acmix_deploy.operators.spec import Operator
from acmix_deploy.plugin.library import describe
from acmix_deploy.runtime.metrics import deviation
from tests import ROOT
from tests.operators.parts import attributes_of, every_operator, example_of, oracle
from tests.plugin import kernels
from tests.plugin.kernels import Array
from tests.plugin.parts import header_sets, newest_headers, run

PLUGINS = ROOT / "plugins"
WARNINGS = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror")
FLOAT, HALF = 0, 1  # DataType
LINEAR, HWC8 = 0, 2  # TensorFormat
ENQUEUED = {"num_heads": 2, "groups": 2, "kernel_size": 5, "stride": 2, "upsampling": 1, "dilation": 2}
ENQUEUED |= {"border": Border.MASKED}
PLAN = {"num_heads": 4, "groups": 3, "kernel_size": 5, "stride": 2, "upsampling": 1, "dilation": 3}
PLAN |= {"border": Border.SHIFTED}
"""What operators have of it are their attributes in what is enqueued, and written to engine files."""


@pytest.mark.parametrize("headers", header_sets() or [None], ids=lambda path: path.name if path else "none")
def test_wrappers_compile_without_warnings(cuda, headers):
    if headers is None:
        pytest.skip("no headers of TensorRT: name a folder of header sets in ACMIX_TENSORRT_HEADERS")
    system = [flag for folder in (headers, *cuda.includes) for flag in ("-isystem", folder)]
    include = ["-I", PLUGINS / "include"]
    sources = sorted((PLUGINS / "tensorrt").glob("*.cpp"))
    assert sources
    run(["g++", "-std=c++17", "-fsyntax-only", "-fvisibility=hidden", *WARNINGS, *system, *include, *sources])


@functools.cache
def compiled(major: int, output: Path, *command: object) -> Path:
    """``output`` of the C++ compiler, with the headers of a TensorRT and no CUDA but the emulated one."""
    headers = ["-isystem", newest_headers(major), "-I", kernels.EMULATOR, "-I", PLUGINS / "include"]
    run(["g++", "-std=c++17", "-Wall", "-Wextra", *headers, *command, "-ldl", "-o", output])
    return output


@pytest.fixture(scope="session")
def ask(tmp_path_factory):
    """Run tensorrt_formats.cpp, compiled for a major version, on a library for that version: what it prints."""
    folder = tmp_path_factory.mktemp("formats")

    def answer(major: int, library: Path, verb: str, operator: Operator, *arguments: object) -> Any:
        program = compiled(major, folder / f"formats{major}", PLUGINS / "tests" / "tensorrt_formats.cpp")
        return run([program, verb, library, operator.op_type, *map(str, arguments)])

    return answer


FORMATS = {
    "local": ("num_heads=2,kernel_size=7,stride=1", "1,96,8,8 16,2 1,32,8,8", True),
    "local, dynamic": ("num_heads=2,kernel_size=7,stride=2", "-1,96,-1,-1 16,2 -1,32,-1,-1", True),
    "local, head_dim 20": ("num_heads=2,kernel_size=7,stride=1", "1,120,8,8 20,2 1,40,8,8", False),
    "local, weight of another head_dim": ("num_heads=2,kernel_size=7,stride=1", "1,96,8,8 8,2 1,32,8,8", False),
    "local, channels": ("num_heads=2,kernel_size=7,stride=1", "1,97,8,8 16,2 1,32,8,8", False),
    "local, odd with stride": ("num_heads=2,kernel_size=7,stride=2", "1,96,9,8 16,2 1,32,4,4", False),
    "local, smaller than window": ("num_heads=2,kernel_size=9,stride=1", "1,96,4,8 16,2 1,32,4,8", False),
    "outlook": ("num_heads=1,kernel_size=3,stride=2", "1,81,4,3 1,16,8,5 1,16,8,5", True),
    "outlook, other windows": ("num_heads=1,kernel_size=3,stride=1", "1,81,8,6 1,16,8,5 1,16,8,5", False),
    "neighborhood": ("num_heads=2,kernel_size=3,border=3,dilation=2", "-1,96,6,-1 16,2 2,5,5 -1,32,6,-1", True),
    "neighborhood, smaller than window": (
        "num_heads=2,kernel_size=7,border=3",
        "1,96,6,9 16,2 2,13,13 1,32,6,9",
        False,
    ),
    "neighborhood, zeros": ("num_heads=2,kernel_size=7,border=1", "1,96,1,2 16,2 2,13,13 1,32,1,2", True),
    "reassembly": ("groups=2,kernel_size=3,stride=2", "-1,8,-1,6 -1,18,-1,3 -1,8,-1,3", True),
    "reassembly, upsampling": ("kernel_size=5,upsampling=2,dilation=3", "1,5,4,6 1,25,8,12 1,5,8,12", True),
    "reassembly, other weights": ("groups=2,kernel_size=3", "1,8,4,6 1,9,4,6 1,8,4,6", False),
    "reassembly, other size": ("kernel_size=3,upsampling=2", "1,8,4,6 1,9,8,6 1,8,8,12", False),
    "reassembly, odd with stride": ("kernel_size=3,stride=2", "1,8,5,6 1,9,2,3 1,8,2,3", False),
    "neighborhood, other bias": ("num_heads=2,kernel_size=7,border=1", "1,96,8,8 16,2 2,7,7 1,32,8,8", False),
}


@pytest.mark.parametrize("major", [8, 11])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(ask, libraries, major, name):
    """The accepted combinations, and no others, out of all types and formats of all tensors."""
    attributes, shapes, accepted = FORMATS[name]
    operator = next(operator for operator in OPERATORS if operator.name.startswith(name.partition(",")[0]))
    images = [shape.count(",") == 3 for shape in shapes.split()]  # others have no channels
    wanted = [
        " ".join(f"{FLOAT}:{LINEAR}" for _ in images),
        " ".join(f"{HALF}:{LINEAR}" for _ in images),
        " ".join(f"{HALF}:{HWC8 if image else LINEAR}" for image in images),
    ]
    got = ask(major, libraries(major), "formats", operator, attributes, *shapes.split())
    assert got.stdout.splitlines() == wanted * accepted


def spelt(operator: Operator, sizes: Mapping[str, int]) -> list[str]:
    """The attributes as ``name=value``, scale being 0.3."""
    return [f"{name}={value:g}" for name, value in attributes_of(operator, sizes, scale=0.3).items()]


@every_operator
def test_plan(ask, libraries, operator):
    """What an engine of TensorRT 10 or 11 keeps is read as it was written, and never where a part is another."""
    attributes = spelt(operator, PLAN)
    lines = ask(11, libraries(11), "plan", operator, ",".join(attributes)).stdout.splitlines()
    answers = dict(line.split(": ") for line in lines)
    written = f"acmix_plan=1 {' '.join(attributes)} "
    fields = [field.partition("=")[0] for field in written.split()]
    assert answers == {
        **dict.fromkeys(("plan", "clone", "read"), written),
        **{f"without {name}": "refused" for name in fields},
        "another version": "refused",
    }


@every_operator
def test_plan_of_tensorrt_8(ask, libraries, operator):
    """The magic number, the version and the attributes in words of 32 bits."""
    lines = ask(8, libraries(8), "plan", operator, ",".join(spelt(operator, PLAN))).stdout.splitlines()
    values = attributes_of(operator, PLAN, scale=0.3)
    words = ("3e99999a" if name == "scale" else f"{value:x}" for name, value in values.items())
    written = f"584d4341 1 {' '.join(words)} "  # ACMX first
    assert dict(line.split(": ") for line in lines) == {
        **dict.fromkeys(("plan", "clone", "read"), written),
        **dict.fromkeys(("cut off", "another version"), "refused"),
    }


LOCAL_PLAN = ",".join(spelt(LOCAL_ATTENTION, PLAN))


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The plugin for the newest headers of a major version, its kernels compiled for the CPU."""
    if kernels.missing_compiler():
        pytest.skip(kernels.missing_compiler())
    folder = tmp_path_factory.mktemp("emulated")
    sources = sorted((PLUGINS / "tensorrt").glob("*.cpp"))
    flags = ("-shared", "-fPIC", "-fvisibility=hidden")
    return lambda major: compiled(major, folder / f"acmix{major}.so", *flags, *sources, kernels.library())


@pytest.mark.parametrize("major", [8, 11])
def test_errors_go_where_the_finder_says_each_time(ask, emulated, major):
    done = ask(major, emulated(major), "log", LOCAL_ATTENTION)
    sentence = "AcmixLocalAttention: num_heads = 0 is below 1"
    assert done.stdout.splitlines() == [f"first 1 {sentence}", f"second 1 {sentence}"]
    assert done.stderr.splitlines() == [sentence, "AcmixLocalAttention: stride = 0 is below 1"]


def test_no_namespace_is_an_empty_one(ask, emulated):
    assert ask(8, emulated(8), "namespace", LOCAL_ATTENTION, LOCAL_PLAN).stdout.splitlines() == [
        "'ours' 'ours'",
        "'' ''",
    ]


def test_timing_cache_id_has_the_kernels_and_the_attributes(ask, emulated):
    attributes = "4_5_2_0x1.333334p-2"
    assert ask(11, emulated(11), "timing_cache_id", LOCAL_ATTENTION, LOCAL_PLAN).stdout == f"development_{attributes}\n"


def test_timing_cache_id_of_a_build_by_cmake(ask, libraries):
    sources = describe(libraries(11)).sources
    assert re.fullmatch("[0-9a-f]{12}", sources)
    assert ask(11, libraries(11), "timing_cache_id", LOCAL_ATTENTION, LOCAL_PLAN).stdout.startswith(f"{sources}_4_5_2_")


def test_rtx_registers_one_copy(rtx, emulated, tmp_path, monkeypatch):
    """Of two, by whatever way the second is loaded; and none by itself where that is switched off."""
    library = emulated(11)
    copy = shutil.copy(library, tmp_path / "copy.so")
    both = sorted(operator.op_type for operator in OPERATORS)
    answer, _ = rtx("copies", library, copy)
    assert (answer["steps"], answer["taken"]) == ([both, both, both], False)
    (warning,) = answer["warnings"]
    assert warning.startswith("acmix: not registered when loaded: this process has another copy of this library")
    monkeypatch.setenv("ACMIX_REGISTER", "0")
    answer, stderr = rtx("copies", library, copy)
    assert answer == {"steps": [[], [], both], "taken": True, "warnings": []}
    assert "acmix" not in stderr.lower()


def test_rtx_finds_the_plugin_that_deepstreams_library_brings(rtx, emulated, tmp_path):
    """As nvinfer loads it: with TensorRT in the process, before it reads an engine."""
    from acmix_deploy.serving.deepstream.folder import package
    from tests.serving.deepstream.parts import build as build_parser
    from tests.serving.deepstream.parts import need_headers
    from tests.serving.parts import tiny  # here, since a machine for GPU tests may lack what it imports

    need_headers()
    package(tiny(tmp_path / "tiny.onnx"), tmp_path / "ds", plugin=emulated(11))
    parser = build_parser(tmp_path / "ds")
    plugin = tmp_path / "ds/library" / emulated(11).name
    answer, stderr = rtx("copies", parser.library, plugin)
    both = sorted(operator.op_type for operator in OPERATORS)
    assert answer["steps"][0] == both
    assert "acmix:" not in stderr
    plugin.unlink()
    answer, stderr = rtx("copies", parser.library, emulated(11))
    assert answer["steps"][:2] == [[], both]
    assert "acmix: the plugin cannot be loaded" in stderr


@pytest.fixture(scope="session")
def enqueue(ask, emulated, tmp_path_factory):
    """Run a node of the plugin, its kernels compiled for the CPU: the result of each step, what it logged, and y."""
    folder = tmp_path_factory.mktemp("enqueue")

    def answer(major: int, layout: str, operator: Operator, tensors: list[Array]) -> tuple[dict[str, str], str, Array]:
        files = [folder / str(index) for index in range(len(tensors))]
        stored = [kernels.to_memory(tensor, layout) for tensor in tensors]
        for file, array in zip(files, stored, strict=True):
            file.write_bytes(array.tobytes())
        shapes = [",".join(map(str, tensor.shape)) for tensor in tensors]
        kind = (kernels.DTYPES.index(tensors[0].dtype.name), {"NCHW": LINEAR, "NHWC": HWC8}[layout])
        attributes = ",".join(spelt(operator, ENQUEUED))
        done = ask(major, emulated(major), "enqueue", operator, attributes, *kind, *shapes, *files)
        y = np.fromfile(files[-1], stored[-1].dtype).reshape(stored[-1].shape)
        results = dict(line.split() for line in done.stdout.splitlines())
        return results, done.stderr, kernels.from_memory(y, layout, tensors[-1].shape)

    return answer


def tensors_of(operator: Operator, dtype: str, batch: int, height: int, width: int) -> list[Array]:
    """Inputs and an output of NaN for a node with the attributes ENQUEUED, heads or groups of 16 channels."""
    parts = {"head_dim": 16, "group_channels": 16}
    size = example_of(operator, batch=batch, height=height, width=width, **parts, **ENQUEUED)
    random = np.random.default_rng(0)
    *inputs, y = (random.standard_normal(shape).astype(dtype) for shape in shapes(operator, size))
    return [*inputs, np.full_like(y, np.nan)]


@every_operator
@pytest.mark.parametrize(("dtype", "layout"), [("float32", "NCHW"), ("float16", "NCHW"), ("float16", "NHWC")])
@pytest.mark.parametrize("major", [8, 11])
def test_enqueue(enqueue, major, operator, dtype, layout):
    tensors = tensors_of(operator, dtype, 2, 6, 10)
    results, _, y = enqueue(major, layout, operator, tensors)
    assert set(results.values()) == {"0"}
    found = deviation(oracle(operator, tensors[:-1], attributes_of(operator, ENQUEUED, scale=0.3)), y)
    assert not found.problem
    assert found.relative_l2 <= operator.tolerances[dtype].limit(2**-11 if dtype == "float16" else 0)


@pytest.mark.parametrize("major", [8, 11])
def test_enqueue_of_nothing_and_of_too_little(enqueue, major):
    empty = tensors_of(LOCAL_ATTENTION, "float16", 0, 6, 10)
    results, log, _ = enqueue(major, "NHWC", LOCAL_ATTENTION, empty)
    assert set(results.values()) == {"0"}, log
    for height, reason in ((2, "unsupported: got height 2"), (0, "unsupported: got a size that is not positive")):
        small = tensors_of(LOCAL_ATTENTION, "float16", 1, height, 10)
        results, log, y = enqueue(major, "NCHW", LOCAL_ATTENTION, small)
        assert results["enqueue"] == "-1"
        if height > 0:  # a builder is told by the ends of the profile's ranges; what is not positive is not known yet
            assert log.count(f"AcmixLocalAttention: {reason}") > 1
            assert results.get("configurePlugin", "-1") == "-1"
        assert f"AcmixLocalAttention: {reason}" in log
        assert np.isnan(y).all()


@pytest.fixture(scope="session")
def detectors(tmp_path_factory):
    """Fused YOLOv8n-ACmix, by name: (file, blocks, Datatype of their tensors)."""
    pytest.importorskip("ultralytics", reason="ultralytics is not installed")
    from acmix_deploy import families, yolo
    from acmix_deploy.checkpoint import load
    from acmix_deploy.export import export
    from acmix_deploy.fusion import fuse
    from acmix_deploy.precision import to_fp16
    from tests.untrained import make_checkpoint

    folder = tmp_path_factory.mktemp("detectors")
    found = {}
    for name, variant, blocks, dynamic in (
        ("static", "p3p4p5", 3, ()),
        ("dynamic", "p5", 1, ("batch", "height", "width")),
    ):
        plain, fused, half = (folder / f"{name}{suffix}.onnx" for suffix in ("", ".fused", ".fp16"))
        make_checkpoint(folder / f"{name}.pt", variant)
        model = load(folder / f"{name}.pt")
        module = yolo.prepare_for_export(families.canonicalise(model.module)[0])
        export(module, plain, input_shape=(1, 3, 128, 128), opset=17, dynamic=dynamic, divisor=32)
        fuse(plain, fused, expect=blocks)
        to_fp16(fused, half)
        found[f"{name} float32"] = (fused, blocks, "Float")
        found[f"{name} float16"] = (half, blocks, "Half")
    return found


def test_rtx_builds_detectors_with_the_plugin(rtx, libraries, request):
    library = libraries(11)  # first, since without it there is nothing to make detectors for
    detectors = request.getfixturevalue("detectors")
    answers, _ = rtx("build", library, *(path for path, _, _ in detectors.values()))
    for (name, (_, blocks, dtype)), answer in zip(detectors.items(), answers, strict=True):
        assert answer["parsed"], (name, answer)
        assert answer["built"], (name, answer)
        assert answer["errors"] == [], name
        assert sorted(answer["plugins"]) == [f"acmix_{block}.attention" for block in range(blocks)], name
        assert answer["types"] == [dtype], name
        assert answer["plans"] >= blocks, name


def test_rtx_without_the_library_builds_the_body(rtx, detectors):
    """So the layers of the test above are there because of the library."""
    answers, _ = rtx("build", "-", detectors["static float32"][0])
    assert answers[0]["built"], answers
    assert answers[0]["layers"] > 50
    assert answers[0]["plugins"] == []


def node_file(path: Path, operator: Any, inputs: list[tuple[object, ...]], **attributes: Any) -> Path:
    """One node without a body, so that only the plugin can take it."""
    names = [tensor.name for tensor in operator.inputs][: len(inputs)]
    node = helper.make_node(
        operator.op_type, names, ["y"], domain=operator.domain, plugin_version="1", plugin_namespace="", **attributes
    )
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in zip(names, inputs, strict=True)
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(operator.domain, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def test_rtx_infers_shapes(rtx, libraries, tmp_path):
    shifted = {"kernel_size": 3, "border": int(Border.SHIFTED)}
    good = [
        (LOCAL_ATTENTION, [("B", 48, 160, "W"), (8, 2)], {"num_heads": 2, "stride": 2}, [-1, 16, 80, -1]),
        (LOCAL_ATTENTION, [(3, 96, 7, 6), (32, 2)], {"kernel_size": 3}, [3, 32, 7, 6]),
        (OUTLOOK_ATTENTION, [(2, 162, 4, 3), (2, 16, 7, 5)], {"num_heads": 2, "stride": 2}, [2, 16, 7, 5]),
        (NEIGHBORHOOD_ATTENTION, [("B", 48, 9, "W"), (16, 2), (1, 5, 5)], {**shifted, "dilation": 3}, [-1, 16, 9, -1]),
        (REASSEMBLY, [(2, 64, 8, 6), (2, 98, 4, 3)], {"groups": 2, "stride": 2}, [2, 64, 4, 3]),
        (REASSEMBLY, [("B", 6, "H", 5), ("B", 25, "h", 15)], {"kernel_size": 5, "upsampling": 3}, [-1, 6, -1, 15]),
    ]
    bad = [
        (LOCAL_ATTENTION, [(1, 60, 8, 8), (20, 2)], {}, "head_dim 20"),
        (LOCAL_ATTENTION, [(1, 50, 8, 8), (16, 2)], {}, "qkv has size 50 at axis 1, not a multiple of 3"),
        (LOCAL_ATTENTION, [(1, 48, 8, 8), (2, 16)], {}, "position_weight has size 2 at axis 0, not 16"),
        (LOCAL_ATTENTION, [(1, 48, 8, 8), (1, 1, 16, 2)], {}, "position_weight has 4 dimensions, not 2"),
        (LOCAL_ATTENTION, [(1, 48, 8, 8)], {}, "got 1 inputs, not 2"),
        (LOCAL_ATTENTION, [(1, 48, 9, 8), (16, 2)], {"stride": 2}, "height / stride = 9 / 2"),
        (OUTLOOK_ATTENTION, [(1, 81, 4, 4), (1, 16, 7, 5)], {"stride": 2}, "logits has size 4 at axis 3, not 3"),
        (LOCAL_ATTENTION, [(1, 48, 8, 8), (16, 2)], {"kernel_size": 4}, "kernel_size 4"),
        (NEIGHBORHOOD_ATTENTION, [(1, 48, 8, 8), (16, 2), (1, 5, 5)], {**shifted, "dilation": 3}, "at least 9"),
        (NEIGHBORHOOD_ATTENTION, [(1, 48, 8, 8), (16, 2), (1, 3, 5)], shifted, "bias has size 3 at axis 1, not 5"),
        (NEIGHBORHOOD_ATTENTION, [(1, 48, 8, 8), (16, 2)], shifted, "got 2 inputs, not 3"),
        (REASSEMBLY, [(1, 6, 8, 8), (1, 49, 8, 4)], {}, "w has size 4 at axis 3, not 8"),
    ]
    files = [
        node_file(tmp_path / f"{index}.onnx", operator, inputs, **attributes)
        for index, (operator, inputs, attributes, _) in enumerate([*good, *bad])
    ]
    answers, _ = rtx("build", libraries(11), *files)
    for case, answer in zip(good, answers, strict=False):
        assert (answer["built"], answer["errors"], len(answer["plugins"])) == (True, [], 1), (case, answer)
        assert answer["output"] == case[-1], case
    for case, answer in zip(bad, answers[len(good) :], strict=True):
        assert not answer.get("built"), case
        assert any(case[-1] in error for error in answer["errors"]), (case, answer["errors"])


def test_rtx_creator_refuses_nonsense(rtx, libraries):
    plan = {"acmix_plan": [1], **{name: [value] for name, value in PLAN.items()}, "scale": [0.25]}
    good = [("BUILD", {}), ("BUILD", {"num_heads": [8], "scale": [-0.5]}), ("RUNTIME", plan)]
    bad = [
        ("BUILD", {"num_heads": [0]}, "num_heads = 0 is below 1"),
        ("BUILD", {"num_heads": [1.0]}, "num_heads must be one INT32"),
        ("BUILD", {"num_heads": [1, 2]}, "num_heads must be one INT32, got 2"),
        ("BUILD", {"kernel_size": [4]}, "unsupported: got kernel_size 4, supported 3, 5, 7"),
        ("BUILD", {"stride": [3]}, "unsupported: got stride 3, supported 1, 2"),
        ("BUILD", {"border": [4]}, "unsupported: got border 4, supported 1, 2, 3"),
        ("BUILD", {"dilation": [0]}, "dilation = 0 is below 1"),
        ("BUILD", {"dilation": [65536]}, "unsupported: got dilation 65536, supported at most 65535"),
        ("BUILD", {"scale": [float("inf")]}, "scale = inf is not a finite number"),
        ("BUILD", {"scale": [1]}, "scale must be one FLOAT32"),
        ("RUNTIME", {}, "acmix_plan is missing"),
        ("RUNTIME", {**plan, "acmix_plan": [2]}, "acmix_plan = 2, this library reads 1"),
    ]
    for operator in OPERATORS:
        known = {"acmix_plan", *(attribute.name for attribute in operator.attributes)}
        wrong = [case for case in bad if case[1].keys() <= known or case[0] == "RUNTIME"]
        cases = [
            (operator.op_type, phase, {name: value for name, value in fields.items() if name in known})
            for phase, fields, *_ in [*good, *wrong]
        ]
        answers, _ = rtx("create", libraries(11), json.dumps(cases))
        assert answers[: len(good)] == [[]] * len(good)
        for case, errors in zip(wrong, answers[len(good) :], strict=True):
            assert len(errors) == 1, case
            assert errors[0].startswith(f"{operator.op_type}: {case[-1]}"), case


def test_rtx_loads_the_library_in_both_ways(rtx, libraries):
    both = sorted(operator.op_type for operator in OPERATORS)
    answer, stderr = rtx("load", libraries(11))
    assert answer == {"steps": [[], both, both, [], both, []], "errors": []}
    assert "acmix" not in stderr.lower()


def test_library_for_another_tensorrt_registers_nothing(rtx, libraries, tmp_path):
    file = node_file(tmp_path / "node.onnx", LOCAL_ATTENTION, [(1, 48, 8, 8), (16, 2)])
    answers, stderr = rtx("build", libraries(8), file)
    assert not answers[0]["parsed"]
    assert "acmix: not registered: built for TensorRT 8, but this process has TensorRT 11" in stderr


@every_operator
def test_tensorrt_86(libraries, operator):
    python = os.environ.get("ACMIX_TENSORRT86_PYTHON")
    if not python:
        pytest.skip("no TensorRT 8.6: name a Python 3.10 that has it in ACMIX_TENSORRT86_PYTHON")
    script = Path(__file__).with_name("tensorrt_86_plugin.py")
    attributes = attributes_of(operator, PLAN, scale=0.25)
    command = [python, script, libraries(8), operator.op_type, json.dumps(attributes)]
    answer = json.loads(run(command).stdout.splitlines()[-1])
    defaults = {attribute.name: attribute.default for attribute in operator.attributes if attribute.kind != "string"}
    assert answer.pop("version").startswith("8.6.")
    assert answer == {
        "registered before": False,
        "fields": list(defaults),
        "type": [operator.op_type, "1", "", 1],
        "plan": [1, *attributes.values()],
        "clone equal": True,
        "read equal": True,
        "defaults": list(defaults.values()),
        "bad plans accepted": [],
        "bad attributes accepted": [],
    }
