"""Running engines without a GPU: on stand-ins for CUDA and TensorRT, which hold what the real ones ask.

Nothing that is put on a stream happens before it is synchronized, new and freed memory is NaN, what is not given back
is counted, and objects of TensorRT say when they are dropped in a wrong order. Expected values are NumPy's.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from polygraphy.comparator import Comparator

from acmix_deploy import driver, manifest
from acmix_deploy.engine.build import build
from acmix_deploy.errors import CheckFailed, MissingComponent, UserError
from acmix_deploy.profile import monitor
from acmix_deploy.runtime import cuda as runtime_cuda
from acmix_deploy.runtime.inputs import Input
from acmix_deploy.runtime.models import open_model
from acmix_deploy.runtime.tensorrt import EngineRunner, Layer
from tests.engine import fake_cuda
from tests.engine.parts import FAKE, ORIN, make_engine
from tests.plugin.parts import rtx_libraries

SHAPES = ((1, 3, 2, 2), (1, 3, 4, 4), (4, 3, 8, 8))
FREE = ["batch", 3, "height", "width"]


def model_of(elements: int = TensorProto.FLOAT, dims=FREE, op_type: str = "Abs", to: int | None = None):
    """y = |images| + |images|, and most: [B, H, W], where the largest channel is."""
    to = to or elements
    nodes = [
        helper.make_node(op_type, ["images"], ["abs"], name="abs"),
        helper.make_node("Add", ["abs", "abs"], ["sum"], name="add"),
        helper.make_node("Cast", ["sum"], ["y"], name="cast", to=to),
        helper.make_node("ArgMax", ["images"], ["index"], name="argmax", axis=1, keepdims=0),
        helper.make_node("Cast", ["index"], ["most"], name="narrow", to=TensorProto.INT32),
    ]
    images, y = (helper.make_tensor_value_info(name, kind, dims) for name, kind in (("images", elements), ("y", to)))
    most = helper.make_tensor_value_info("most", TensorProto.INT32, [dims[0], *dims[2:]])
    graph = helper.make_graph(nodes, "graph", [images], [y, most])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def images(*shape: int, seed: int = 0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_right(outputs, array) -> None:
    assert list(outputs) == ["y", "most"]
    np.testing.assert_array_equal(outputs["y"], np.abs(array) * 2)
    np.testing.assert_array_equal(outputs["most"], array.argmax(1))
    assert outputs["most"].dtype == np.int32


@pytest.fixture
def engine(tmp_path):
    return make_engine(tmp_path / "model.plan", model_of(), {"images": SHAPES})


@pytest.fixture
def runner(gpu, engine):
    with EngineRunner(engine) as active:
        yield active


def events() -> list[str]:
    return sys.modules["tensorrt"]._events


def test_outputs_are_right_and_their_own(gpu, runner):
    first = images(1, 3, 4, 4)
    outputs = runner.infer({"images": first})
    assert_right(outputs, first)
    assert runner.last_inference_time() > 0
    runner.infer({"images": images(1, 3, 4, 4, seed=1)})
    assert_right(outputs, first)


def test_shapes_in_a_row_share_no_memory(gpu, runner):
    for seed, shape in enumerate([(1, 3, 4, 4), (4, 3, 8, 8), (1, 3, 2, 8), (4, 3, 8, 8)]):
        array = images(*shape, seed=seed)
        assert_right(runner.infer({"images": array}), array)
        assert gpu.live["device"] == gpu.live["host"] == 3
    allotted = gpu.calls["cuMemAlloc_v2"]
    runner.infer({"images": images(4, 3, 8, 8, seed=9)})
    assert gpu.calls["cuMemAlloc_v2"] == allotted, "memory is allotted once for a shape"


def test_steps_put_work_on_the_stream_and_wait_for_nothing(gpu, runner):
    array = images(2, 3, 4, 4)
    runner.prepare({"images": array})
    for step in (runner.upload, runner.launch, runner.download):
        step()
        assert np.isnan(runner.outputs["y"]).all()
    runner.stream.synchronize()
    assert_right(runner.outputs, array)


def test_the_next_inputs_wait_for_the_last(gpu, runner):
    array = images(2, 3, 4, 4)
    runner.prepare({"images": array})
    runner.upload()
    runner.launch()
    runner.download()
    runner.prepare({"images": images(2, 3, 4, 4, seed=1)})
    runner.stream.synchronize()
    assert_right(runner.outputs, array)


def test_inputs_that_are_not_contiguous(gpu, runner):
    array = images(2, 4, 4, 3).transpose(0, 3, 1, 2)
    assert_right(runner.infer({"images": array}), array)


def test_half_precision_inputs_take_float32(gpu, tmp_path):
    path = make_engine(tmp_path / "half.engine", model_of(TensorProto.FLOAT16), {"images": SHAPES})
    array = images(1, 3, 4, 4)
    with EngineRunner(path) as runner:
        for given in (array, array.astype(np.float16)):
            outputs = runner.infer({"images": given})
            assert outputs["y"].dtype == np.float16
            np.testing.assert_array_equal(outputs["y"], np.abs(array.astype(np.float16)) * 2)


@pytest.mark.parametrize(
    ("feed", "said"),
    [
        ({}, "model.plan takes images, and is given nothing"),
        ({"images": images(1, 3, 4, 4), "more": images(1)}, "takes images, and is given images, more"),
        (
            {"images": images(1, 3, 4, 4, dtype=np.float64)},
            "input images of model.plan is float32, and is given float64",
        ),
        ({"images": images(1, 3, 4, 4, dtype=np.float16)}, "is float32, and is given float16"),
        ({"images": images(1, 3, 4, 9)}, r"built for \[1, 3, 2, 2\] to \[4, 3, 8, 8\], and is given \[1, 3, 4, 9\]"),
        ({"images": images(1, 3, 1, 4)}, "and is given"),
        ({"images": images(1, 4, 4, 4)}, "and is given"),
        ({"images": images(3, 4, 4)}, r"and is given \[3, 4, 4\]"),
    ],
)
def test_inputs_that_do_not_fit(gpu, runner, feed, said):
    with pytest.raises(UserError, match=said) as caught:
        runner.infer(feed)
    assert "\n" not in caught.value.message
    array = images(1, 3, 4, 4)
    assert_right(runner.infer({"images": array}), array)


def test_fixed_shapes(gpu, tmp_path):
    path = make_engine(tmp_path / "model.engine", model_of(dims=[1, 3, 4, 4]))
    with EngineRunner(path) as runner:
        array = images(1, 3, 4, 4)
        assert_right(runner.infer({"images": array}), array)
        with pytest.raises(UserError, match=r"is built for \[1, 3, 4, 4\] alone, and is given \[2, 3, 4, 4\]"):
            runner.infer({"images": images(2, 3, 4, 4)})


def test_outputs_whose_shape_depends_on_the_data(gpu, tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.INT64, [1, "found"])
    graph = helper.make_graph([helper.make_node("NonZero", ["x"], ["y"])], "graph", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with (
        EngineRunner(make_engine(tmp_path / "e", model)) as runner,
        pytest.raises(UserError, match=r"the shape of output y of e depends on the data: \[1, -1\]"),
    ):
        runner.infer({"x": images(4)})


@pytest.mark.parametrize(
    ("elements", "dtype"), [(TensorProto.INT64, np.int64), (TensorProto.INT32, np.int32), (TensorProto.BOOL, np.bool_)]
)
def test_outputs_of_other_types(gpu, tmp_path, elements, dtype):
    array = images(1, 3, 4, 4) * 9
    with EngineRunner(make_engine(tmp_path / "e", model_of(to=elements), {"images": SHAPES})) as runner:
        found = runner.infer({"images": array})["y"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, (np.abs(array) * 2).astype(dtype))


def test_outputs_that_numpy_does_not_know(gpu, tmp_path):
    path = make_engine(tmp_path / "e", model_of(to=TensorProto.BFLOAT16), {"images": SHAPES})
    with EngineRunner(path) as runner, pytest.raises(UserError, match="output y is of type BF16, which NumPy does not"):
        runner.infer({"images": images(1, 3, 4, 4)})


def test_a_graph_computes_from_new_inputs(gpu, runner):
    runner.prepare({"images": images(1, 3, 4, 4)})
    graph = runner.capture()
    runner.upload()
    runner.stream.synchronize()
    for seed in (1, 2):
        array = images(1, 3, 4, 4, seed=seed)
        runner.prepare({"images": array})
        runner.upload()
        graph.launch(runner.stream)
        runner.download()
        runner.stream.synchronize()
        assert_right(runner.outputs, array)
    runner.prepare({"images": images(2, 3, 4, 4)})
    with pytest.raises(ValueError, match="gone"):
        graph.launch(runner.stream)


def test_a_capture_that_fails_leaves_a_stream_that_works(gpu, runner):
    def work() -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        runner.stream.capture(work)
    array = images(1, 3, 4, 4)
    assert_right(runner.infer({"images": array}), array)


def test_events_measure_what_lies_between_them(gpu, runner):
    runner.prepare({"images": images(1, 3, 4, 4)})
    with runtime_cuda.Event() as start, runtime_cuda.Event() as end:
        start.record(runner.stream)
        runner.upload()
        runner.launch()
        runner.download()
        end.record(runner.stream)
        with pytest.raises(CheckFailed, match="cuEventElapsedTime failed"):
            end.ms_since(start)
        end.synchronize()
        assert end.ms_since(start) == 4, "a copy in, a launch, two copies out, a millisecond each"


def test_layers(gpu, runner):
    form = ("Row major linear FP32",)
    layers = runner.layers()
    assert layers[0] == Layer("my_abs", "Abs", ("abs",), form, form)
    assert [layer.name for layer in layers] == ["my_abs", "my_add", "my_cast", "my_argmax", "my_narrow"]


def test_layers_are_timed_in_a_context_of_their_own(gpu, runner):
    runner.prepare({"images": images(1, 3, 4, 4)})
    graph = runner.capture()
    times = runner.profile_layers(3)
    assert times == {f"my_{name}": [ms] * 3 for ms, name in enumerate(["abs", "add", "cast", "argmax", "narrow"], 1)}
    with pytest.raises(ValueError, match="gone"):
        graph.launch(runner.stream)
    array = images(1, 3, 4, 4)
    runner.prepare({"images": array})
    runner.capture().launch(runner.stream)  # refused while a profiler is attached
    assert_right(runner.infer({"images": array}), array)


def test_launch_without_shapes(gpu, runner):
    with pytest.raises(CheckFailed, match=r"TensorRT 8.6.0 does not run for model.plan: not ready"):
        runner.launch()


def test_everything_is_dropped_in_order(gpu, engine):
    with EngineRunner(engine) as runner:
        runner.infer({"images": images(1, 3, 4, 4)})
        runner.launch()  # still on the stream when the block ends
    assert events() == ["deserialized", "context dropped", "engine dropped", "runtime dropped"]
    assert gpu.live == {}
    with runner:
        array = images(1, 3, 4, 4)
        assert_right(runner.infer({"images": array}), array)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": "8.6.1"}, "built with TensorRT 8.6.1, here is TensorRT 8.6.0"),
        ({"gpu": "Xavier", "sm": 72}, r"built for Xavier \(sm_72\), here is Orin \(sm_87\)"),
    ],
)
def test_engines_of_others_are_refused_before_they_are_read(gpu, tmp_path, changed, said):
    machine = ORIN.model_copy(update=changed)
    path = make_engine(tmp_path / "e", model_of(), {"images": SHAPES}, machine=machine)
    with pytest.raises(UserError, match=said):
        EngineRunner(path).activate()
    assert events() == []
    assert gpu.live == {}


def test_changed_engines_are_refused_before_they_are_read(gpu, engine):
    engine.write_bytes(engine.read_bytes() + b" ")
    with pytest.raises(UserError, match="has changed since"):
        EngineRunner(engine).activate()
    assert gpu.live == {}


def test_an_engine_that_tensorrt_refuses(gpu, engine, monkeypatch):
    monkeypatch.setattr(
        Path, "read_bytes", lambda path, read=Path.read_bytes: b"broken" if path == engine else read(path)
    )
    with pytest.raises(CheckFailed, match=r"TensorRT 8.6.0 does not make an engine for model.plan: the plan is broken"):
        EngineRunner(engine).activate()
    assert events() == ["deserialized", "runtime dropped"]


def test_no_runtime(gpu, fake, engine):
    fake("driver")
    with pytest.raises(CheckFailed, match=r"does not make a runtime for model.plan: the driver is too old"):
        EngineRunner(engine).activate()


@pytest.fixture
def library(tmp_path):
    """A library that leaves a file when it is loaded."""
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler")
    trace = tmp_path / "loaded"
    source = f'#include <stdio.h>\n__attribute__((constructor)) void f(void) {{ fclose(fopen("{trace}", "w")); }}\n'
    command = [compiler, "-shared", "-fPIC", "-o", tmp_path / "plugin.so", "-x", "c", "-"]
    subprocess.run(command, input=source, text=True, check=True)
    return tmp_path / "plugin.so"


@pytest.mark.parametrize("moved", [False, True])
def test_the_plugin_of_the_manifest_is_loaded(gpu, tmp_path, library, moved):
    path = make_engine(tmp_path / "e", model_of(), {"images": SHAPES}, plugin=library)
    if moved:
        library = library.rename(tmp_path / "moved.so")
        with pytest.raises(UserError, match="there is none here"):
            EngineRunner(path).activate()
    assert not (tmp_path / "loaded").exists()
    with EngineRunner(path, library if moved else None):
        assert (tmp_path / "loaded").exists()


def test_another_plugin_is_not_loaded(gpu, tmp_path, library):
    path = make_engine(tmp_path / "e", model_of(), {"images": SHAPES}, plugin=library)
    library.write_bytes(library.read_bytes() + b"more")
    with pytest.raises(UserError, match="the one here has"):
        EngineRunner(path).activate()
    assert not (tmp_path / "loaded").exists()
    assert events() == []


def test_a_plugin_that_does_not_load(gpu, tmp_path):
    (tmp_path / "plugin.so").write_text("no library")
    path = make_engine(tmp_path / "e", model_of(), {"images": SHAPES}, plugin=tmp_path / "plugin.so")
    with pytest.raises(UserError, match=r"the plugin cannot be loaded: .*plugin.so"):
        EngineRunner(path).activate()
    assert events() == []


def test_too_little_memory_for_buffers(gpu, runner):
    gpu.memory = 600  # enough for the input and one output
    with pytest.raises(MissingComponent, match=r"too little device memory: cuMemAlloc_v2 of \d+ bytes failed"):
        runner.infer({"images": images(1, 3, 5, 5)})
    array = images(1, 3, 2, 2)
    assert_right(runner.infer({"images": array}), array)


def test_too_little_memory_for_the_context(gpu, fake, engine):
    fake("memory")
    with pytest.raises(
        MissingComponent, match=r"too little device memory on Orin \(sm_87\) for TensorRT 8.6.0 to make a"
    ):
        EngineRunner(engine).activate()
    assert events() == ["deserialized", "engine dropped", "runtime dropped"]


def test_failures_on_the_device_name_the_call(gpu, runner):
    runner.prepare({"images": images(1, 3, 4, 4)})
    gpu.error = fake_cuda.ILLEGAL_ADDRESS
    with pytest.raises(CheckFailed, match=r"cuStreamSynchronize failed: it is 700 \(CUDA_ERROR_ILLEGAL_ADDRESS\)"):
        runner.stream.synchronize()
    gpu.error = fake_cuda.SUCCESS


def test_another_thread(gpu, runner):
    """A thread has no device at first."""
    array = images(1, 3, 4, 4)
    with ThreadPoolExecutor(1) as pool:
        assert_right(pool.submit(runner.infer, {"images": array}).result(), array)


def test_no_driver(fake, engine, monkeypatch):
    monkeypatch.setattr(runtime_cuda, "_thread", threading.local())

    def missing():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(driver, "library", missing)
    with pytest.raises(MissingComponent, match="CUDA's driver, which cannot be loaded: libcuda"):
        EngineRunner(engine).activate()


def test_no_device(gpu, engine, monkeypatch):
    monkeypatch.setattr(gpu, "cuDeviceGet", lambda *arguments: fake_cuda.NO_DEVICE)
    with pytest.raises(MissingComponent, match="no device to run an engine on: cuDeviceGet failed: it is 100"):
        EngineRunner(engine).activate()


def test_open_model_opens_engines_without_tensorrt(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    metadata = {"stride": "32", "names": "{0: 'cat'}"}
    given = {"precision": "float16", "metadata": metadata}
    path = make_engine(tmp_path / "a.plan", model_of(TensorProto.FLOAT16), {"images": SHAPES}, **given)
    found = open_model(path)
    assert found.inputs == (Input("images", (None, 3, None, None), np.dtype(np.float16)),)
    assert (found.precision, found.metadata.entries, found.profiles) == ("float16", metadata, {"images": SHAPES})
    assert (found.runner.name, open_model(path, "mine").runner.name) == ("a.plan", "mine")
    with pytest.raises(MissingComponent, match="TensorRT cannot be imported"):
        found.runner.activate()


def test_open_model_refuses_other_files(tmp_path):
    (tmp_path / "alone.engine").write_bytes(b"ftrt")
    for name, said in (
        ("alone.engine", "is an engine without its manifest alone.engine.json"),
        ("missing.engine", "does not exist"),
        (".", "is a folder"),
    ):
        with pytest.raises(UserError, match=said):
            open_model(tmp_path / name)


def test_the_same_interface_as_onnx_runtime(gpu, engine, tmp_path):
    onnx.save(model_of(), tmp_path / "model.onnx")
    pair = [open_model(path).runner for path in (tmp_path / "model.onnx", engine)]
    feeds = [{"images": images(*shape)} for shape in SHAPES]
    results = Comparator.run(pair, data_loader=feeds)
    for one, other in zip(*(iterations for _, iterations in results.items()), strict=True):
        np.testing.assert_array_equal(one["y"], other["y"])
        np.testing.assert_array_equal(one["most"], other["most"])


def test_the_runner_needs_neither_torch_nor_onnx():
    script = "import sys, acmix_deploy.runtime.tensorrt; print(*{'torch', 'onnx', 'onnxruntime'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_what_the_driver_tells_of_the_device(gpu, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(driver, "library", lambda: gpu)
    monkeypatch.setattr(manifest, "_driver_release", lambda: None)
    assert manifest.gpu_here() == {"cuda": "12.6", "driver": None, "gpu": "Orin", "sm": 87}
    assert monitor._bus_id() == b"0000:01:00.0"


def test_names_of_the_driver(cuda):
    """CUDA's header has the functions of the stand-in, with as many parameters, and its numbers."""
    (header,) = {path for folder in cuda.includes if (path := folder / "cuda.h").is_file()}
    now, before = header.read_text().split("#if defined(__CUDA_API_VERSION_INTERNAL)\n")
    prototypes = [
        {name: parameters.split(",") for name, parameters in re.findall(r"CUDAAPI (cu\w+)\((.*?)\);", part, re.S)}
        for part in (now, before)
    ]
    names = dict(re.findall(r"^#define (cu\w+) +(?:__CUDA_API_PT\w+\()?(cu\w+)", now, re.M))
    exported = {names.get(name, name): parameters for name, parameters in prototypes[0].items()} | prototypes[1]
    functions = {name: value for name, value in vars(fake_cuda.Cuda).items() if name.startswith("cu")}
    assert len(functions) > 20
    for name, function in functions.items():
        assert len(inspect.signature(function).parameters) - 1 == len(exported[name]), name
    numbers = {name: int(value, 0) for name, value in re.findall(r"\b(CU\w+)\s*=\s*(0x\w+|\d+)\b", now)}
    assert {name: numbers[name] for name in NUMBERS} == NUMBERS


NUMBERS = {
    "CUDA_ERROR_OUT_OF_MEMORY": driver.OUT_OF_MEMORY,
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": manifest._COMPUTE_CAPABILITY[0],
    "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": manifest._COMPUTE_CAPABILITY[1],
    "CU_STREAM_NON_BLOCKING": runtime_cuda._NON_BLOCKING,
    "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL": runtime_cuda._CAPTURE_OF_THIS_THREAD,
}


def test_names_of_tensorrt_rtx():
    """The real TensorRT-RTX has the names that the runner uses of it."""
    environment = {**os.environ, "PYTHONPATH": str(rtx_libraries().parent)}
    script = (
        "import sys, json, tensorrt_rtx; from operator import attrgetter\n"
        "def has(name):\n"
        "    try: return bool(attrgetter(name)(tensorrt_rtx)) or True\n"
        "    except AttributeError: return False\n"
        "print(json.dumps([name for name in json.load(sys.stdin) if not has(name)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, input=json.dumps(names_of_the_runner()), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == []


def test_tensorrt_rtx_comes_as_far_as_the_device(monkeypatch, tmp_path):
    """The real TensorRT-RTX: built, opened, refused; and past the manifest, what it says of a missing driver."""
    monkeypatch.syspath_prepend(str(rtx_libraries().parent))
    if manifest.gpu_here():
        pytest.skip("there is a GPU")
    onnx.save(model_of(), tmp_path / "model.onnx")
    build(tmp_path / "model.onnx", tmp_path / "e", shapes=SHAPES, backend="tensorrt_rtx")
    found = open_model(tmp_path / "e")
    assert found.inputs == (Input("images", (None, 3, None, None), np.dtype(np.float32)),)
    assert found.profiles == {"images": SHAPES}
    with pytest.raises(MissingComponent, match=r"here is no GPU\nRun it on the device that it was built for"):
        found.runner.activate()
    monkeypatch.setattr(manifest, "gpu_here", lambda: {"gpu": "a card", "sm": 86})
    stand_in = fake_cuda.Cuda()
    monkeypatch.setattr(driver, "library", lambda: stand_in)
    monkeypatch.setattr(runtime_cuda, "_thread", threading.local())
    with pytest.raises(CheckFailed, match=r"TensorRT-RTX \S+ does not make an engine for e: .*cudaError 35"):
        found.runner.activate()
    assert stand_in.live == {}


def names_of_the_runner() -> list[str]:
    """Of the stand-in: no other can be used in the tests above. That TensorRT 8.6 has them test_engine.py tries."""
    sys.path.insert(0, str(FAKE))
    sys.modules.pop("tensorrt", None)
    try:
        trt = importlib.import_module("tensorrt")
    finally:
        sys.path.remove(str(FAKE))
        sys.modules.pop("tensorrt", None)
    classes = ("Runtime", "ICudaEngine", "IExecutionContext", "EngineInspector", "IProfiler", "ILogger", "TensorIOMode")
    members = [f"{name}.{member}" for name in classes for member in vars(getattr(trt, name)) if member[0] != "_"]
    return [*members, "LayerInformationFormat.JSON", "init_libnvinfer_plugins", "__version__"]
