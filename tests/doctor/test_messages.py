"""Messages as people post them: which are known, which are not, and what is said of them."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

import acmix_deploy
from acmix_deploy import cli
from acmix_deploy.cli import doctor
from acmix_deploy.doctor import pasted
from acmix_deploy.doctor.faults import FAULTS
from acmix_deploy.doctor.messages import MESSAGES
from acmix_deploy.doctor.pasted import PastedDocument, compiled, explain, groups_in
from tests import ROOT

OTHER_WORDS = {
    "engine-without-plugin": (
        "3: getPluginCreator could not find plugin: SomeLayer version: 1\n1: [pluginV2Runner.cpp::load::308] Error "
        "Code 1: "
        "Serialization (Serialization assertion creator failed.Cannot deserialize plugin since",
    ),
    "no-acmix-plugin": (
        "getPluginCreator could not find plugin: AcmixOutlookAttention version: 1",
        "IPluginRegistry::getCreator: Error Code 4: API Usage Error (Cannot find plugin: AcmixLocalAttention, "
        "version: 1, "
        "namespace:.)",
    ),
    "no-col2im": (
        "3: getPluginCreator could not find plugin: Col2Im version: 1",
        "Error Code 4: API Usage Error (Cannot find plugin: Col2Im, version: 1, namespace:.)",
    ),
    "no-importer": (
        "ERROR: INVALID_ARGUMENT: getPluginCreator could not find plugin ScatterND version 1",
        "[TRT] No importer registered for op: Round. Attempting to import as plugin.",
        "[E] IPluginRegistry::getCreator: Error Code 4: API Usage Error (Cannot find plugin: Round, version: 1, "
        "namespace:.)",
        '[8] Assertion failed: creator && "Plugin not found, are the plugin name, version, and namespace correct?"',
    ),
    "uint8-input": ("Assertion failed: false: Found unsupported input type of UINT8",),
    "computed-pads": (
        "IShuffleLayer applied to shape tensor must have 0 or 1 reshape dimensions: dimensions were [-1,2]",
    ),
    "tactic-memory": (
        "Skipping tactic 0 due to insuficient memory on requested size of 2218 detected for tactic 4.",
        "UNSUPPORTED_STATE: Skipping tactic 28 due to insufficient memory on requested size of 2833252352 detected",
        "Tactic Device request: 2218MB Available: 2189MB. Device memory is insufficient to use tactic.",
    ),
    "build-memory": ("Error Code 2: OutOfMemory (Requested size was 2833252352 bytes.)",),
    "no-profile": ("images: dynamic input is missing dimensions in profile 0.",),
    "engine-of-another-release": (
        "Serialization assertion stdVersionRead == serializationVersion failed.Version tag does not match. Note: "
        "Current "
        "Version: 213, Serialized Engine Version: 232)",
        "Version tag does not match.",
    ),
    "engine-of-another-gpu": ("The engine plan file is generated on an incompatible device",),
    "engine-of-another-model": (
        "Using an engine plan file across different models of devices is not supported and is likely to affect "
        "performance",
    ),
    "no-engine": (
        "Serialization (Serialization assertion magicTagRead == magicTag failed.Magic tag does not match)",
        "Serialization assertion plan->header.magicTag == rt::kPLAN_MAGIC_TAG failed.",
    ),
    "out-of-profile": (
        "Static dimension mismatch while setting input shape for images. Set dimensions are [3,3,640,640]. Expected "
        "dimensions are [1,3,640,640].",
        "Parameter check failed at: runtime/api/executionContext.cpp::setInputShape::2037, condition: "
        "engineDims.d[i] == "
        "dims.d[i] Static dimension mismatch while setting input shape.",
        "Parameter check failed at: engine.cpp::setBindingDimensions::1137, condition: profileMinDims.d[i] <= "
        "dimensions.d[i]",
    ),
    "half-weights": (
        "[TRT] [W] weights [name=Conv_0 + PWN(Mul_1).weight] had the following issues when converted to FP16:",
    ),
    "old-trtexec-option": ("Unknown option: --explicitBatch", "Unknown option: --workspace 2048"),
    "no-operator-of-type": ("Could not find an implementation for the node Resize_7:Resize(13)",),
    "no-conv-of-type": ("Could not find an implementation for the node Conv_7:Conv(11)",),
    "no-provider": ("EP Error Unknown Provider Type: FooExecutionProvider when using ['FooExecutionProvider']",),
    "provider-does-not-start": ("Failed to create TensorrtExecutionProvider. Please reference",),
    "other-size": ("Got invalid dimensions for input: images",),
    "other-name": ("Invalid Feed Input Name:input", "INVALID_ARGUMENT : Invalid input name: input"),
    "sizes-inside": (
        "Non-zero status code returned while running Reshape node. Name:'/r/Reshape' Status Message: "
        "reshape_helper.h:91 "
        "The input tensor cannot be reshaped to the requested shape. Input shape:{9}, requested shape:{2,4}",
        "Non-zero status code returned while running Add node. Name:'/a/Add' Status Message: math.h:63 Attempting to "
        "broadcast an axis by a dimension other than 1. 40 by 41",
    ),
    "two-gigabytes": (
        "ModelProto exceeded maximum protobuf size of 2GB",
        "This protobuf of onnx model is too large (>2GB). Call check_model with model path instead.",
    ),
    "configuration-beside": ("Unsupported class argparse.Namespace",),
    "weights-only": (
        "Weights only load failed. This file can still be loaded, to do so you have two "
        "options.\n\tWeightsUnpickler error: "
        "Unsupported global: GLOBAL mine.blocks.Block was not an allowed global by default.",
        "Weights only load failed. In PyTorch 2.6, we changed the default value",
    ),
    "no-class": (
        "ModuleNotFoundError: No module named 'models'",
        "ModuleNotFoundError: No module named 'models.yolo'",
        "No module named 'ultralytics.nn.Addmodules'",
    ),
    "no-archive": ("_pickle.UnpicklingError: invalid load key, '<'.", "invalid load key, 'v'."),
    "no-dep-bias": (
        'Error(s) in loading state_dict for Net:\n\tUnexpected key(s) in state_dict: "a.weight", "b.dep_conv.bias". ',
    ),
    "scalar-rate": ("Error(s) in loading state_dict for Net:\n\tsize mismatch for rate2: copying a param with shape",),
    "no-gpu": ("Torch not compiled with CUDA enabled", "RuntimeError: Found no NVIDIA driver on your system."),
    "input-type": ("RuntimeError: expected scalar type Half but found Float",),
    "devices": ("Expected all tensors to be on the same device",),
    "torch-memory": ("RuntimeError: CUDA out of memory.",),
    "maps-differ": ("Sizes of tensors must match except in dimension 1. Got 40 and 41 in dimension 2",),
    "fold-export": ("TypeError: 'NoneType' object is not subscriptable\n(Occurred when translating col2im).",),
    "unfold-export": (
        "Unsupported: ONNX export of operator im2col",
        "(Occurred when translating im2col).",
        "Exporting the operator im2col to ONNX opset version 9 is not supported.",
    ),
    "operator-export": (
        "Exporting the operator silu to ONNX opset version 11 is not supported. Please open a bug",
        "Exporting the operator 'aten::glu' to ONNX opset version 9 is not supported. Support for this operator was "
        "added "
        "in version 13, try exporting with this version",
        "Unsupported: ONNX export of operator adaptive_avg_pool2d, output size that are not factor of input size",
    ),
    "yaml-acmix": (
        "  File \"tasks.py\", line 1640, in parse_model\n    else globals()[m]\n         ~~~^^^\nKeyError: 'ACmix'",
        "NameError: name 'ACmix' is not defined",
    ),
    "other-release": ("AttributeError: 'Detect' object has no attribute 'grid'",),
    "engine-size": ("input size torch.Size([2, 3, 640, 640]) > max model size (1, 3, 640, 640)",),
    "libgl": ("ImportError: libgthread-2.0.so.0: cannot open shared object file",),
    "no-image": ("(-215:Assertion failed) !ssize.empty() in function 'resize'",),
    "numpy-2": (
        "AttributeError: _ARRAY_API not found",
        "ImportError: numpy.core.multiarray failed to import",
        "ValueError: numpy.dtype size changed, may indicate binary incompatibility.",
    ),
    "numpy-1": ("No module named 'numpy._core.multiarray'",),
    "numpy-names": (
        "`np.float_` was removed in the NumPy 2.0 release.",
        "`np.int` was a deprecated alias for the builtin",
    ),
    "protobuf-descriptors": ("TypeError: Descriptors cannot not be created directly.",),
    "old-driver": ("The NVIDIA driver on your system is too old (found version 11040).",),
    "no-device": ("[E] [TRT] 6: CUDA initialization failure with error: 35",),
    "no-cuda-library": ("Could not load library libcudnn_cnn_infer.so.8. Error: libcuda.so: cannot open",),
    "newer-system": ("version `GLIBCXX_3.4.32' not found",),
    "illegal-instruction": ("Illegal instruction",),
    "no-tensorrt": ("ERROR: No matching distribution found for tensorrt==8.6.1",),
    "no-wheel": (
        "onnxruntime_gpu-1.18.0-cp38-cp38-linux_aarch64.whl is not a supported wheel on this platform.",
        "ERROR: No matching distribution found for onnxruntime-gpu",
    ),
}
"""Other wordings of messages, and the same in other places."""

ALIKE = {
    "engine-without-plugin": "Cannot deserialize engine since the file was not found",
    "no-acmix-plugin": "No importer registered for op: AcmixLocalAttention. Attempting to import as plugin.\n[I] "
    "Searching for "
    "plugin: AcmixLocalAttention, plugin_version: 1\n[I] Successfully created plugin: AcmixLocalAttention",
    "no-col2im": "No importer registered for op: Im2Col. Attempting to import as plugin.",
    "no-importer": "No importer registered for op: EfficientNMS_TRT. Attempting to import as plugin.\nSearching for "
    "plugin: "
    "EfficientNMS_TRT, plugin_version: 1\nSuccessfully created plugin: EfficientNMS_TRT",
    "float64-tensor": "Unsupported ONNX data type: STRING (8)",
    "uint8-input": "Unsupported ONNX data type: DOUBLE (11)",
    "computed-pads": "Invalid Node - Pad_7\nthe mode is not supported",
    "computed-weights": "The tensor is required to be on the GPU",
    "invalid-node": "Invalid Argument - Reshape_12",
    "foreign-node": "Could not find any implementation for node /model.0/conv/Conv.",
    "no-implementation": "Could not find any implementation for node {ForeignNode[a...b]}.",
    "no-runners": "Assertion !layerImpls.empty() failed. In getSupportedFormats",
    "tactic-memory": "Skipping tactic 0 due to exception Assertion failed",
    "build-memory": "Cuda Runtime (invalid argument)",
    "no-profile": "3 optimization profiles have been defined",
    "wrong-count": "bias weights has a count of 64, as was expected",
    "engine-of-another-release": "Magic tag does not match",
    "engine-of-another-gpu": "Engine generated on a compatible device with compute 8.7",
    "engine-of-another-model": "Using an engine plan file on the same device",
    "no-engine": "Serialization assertion stdVersionRead == serializationVersion failed.",
    "out-of-profile": "executionContext.cpp::enqueueV3::2666, condition: allInputShapesSpecified(routine)",
    "int64-weights": "Your ONNX model has been generated with INT32 weights",
    "int32-clamped": "weights outside the range of FP16 were clamped",
    "type-at-build-time": "Tensor DataType is determined by the file",
    "half-weights": "Weights [name=a] were converted to FP16 without issues",
    "old-trtexec-option": "Unknown option: --onxx model.onnx",
    "old-trtexec": "Unknown option: --staticPlugin a.so",
    "ir-version": "ONNX IR version: 0.0.8",
    "opset": "Opset version: 18",
    "no-definition": "Fatal error: acme:Attention(-1) is not a registered function/op",
    "no-such-operator": "Fatal error: acmix:AcmixLocalAttention(-1) is not a registered function/op",
    "no-opset-import": 'In Node, ("n7", Gelu, "", -1), Error No Op registered for Gelu with domain_version of 17',
    "operator-of-another-opset": "No Op registered for Gelu in this build",
    "types": "TypeError: unsupported operand type(s) for +: 'int' and 'str'",
    "no-conv-of-type": "Could not find an implementation for ConvInteger(10) node with name 'n7'",
    "no-operator-of-type": "Could not find an implementation for this backend",
    "no-weights": "FileNotFoundError: [Errno 2] No such file or directory: 'bus.jpg'",
    "short-weights": "Initializer conv.weight is out of bounds of the tensor",
    "no-protobuf": "protobuf parsing took 3 s",
    "invalid-model": "ValueError: This is an invalid modelling choice",
    "no-provider": "Available providers: 'CUDAExecutionProvider, CPUExecutionProvider'",
    "empty-onnxruntime": "module 'onnxruntime.quantization' has no attribute 'foo'",
    "provider-does-not-start": "Failed to create MyExecutionProvider",
    "other-size": "Got valid dimensions for input: images",
    "other-rank": "Invalid rank for tensor a",
    "other-type": "Unexpected input data. Actual: 3, expected: 4",
    "other-name": "Required inputs are there",
    "sizes-inside": "Non-zero status code returned while running Concat node. Name:'/c/Concat' Status Message: out "
    "of memory",
    "affinity": "pthread_create failed",
    "device-discovery": "GPU device discovery took 3 ms",
    "unused-initializer": "Removing initializer 'a' since it was folded",
    "two-gigabytes": "the file of 2GB was copied",
    "old-graphsurgeon": "module 'onnx.helper' has no attribute 'make_foo'",
    "openvino-operators": "OpenVINO supports the following ONNX operations: Add",
    "ncnn-layer": "layer conv1 exists and is registered",
    "configuration-beside": "Unsupported global: GLOBAL mine.blocks.Block was not an allowed global by default",
    "weights-only": "weights_only=True loads tensors alone",
    "no-class": "Can't get attribute of a closed file",
    "no-archive": "zip archive was read",
    "no-dep-bias": 'Missing key(s) in state_dict: "dep_conv.weight".',
    "scalar-rate": "size mismatch for separate1: copying a param",
    "module-prefix": 'Missing key(s) in state_dict: "a.module.weight".',
    "state-dict": "loading state_dict for Net",
    "no-gpu": "torch.cuda.is_available() is True",
    "position-type": "Input type (float) and bias type (c10::Half) should be the same",
    "position-device": "self.conv(x)\nExpected all tensors to be on the same device",
    "input-type": "Input type (float) is not supported",
    "devices": "all tensors are on the same device, cuda:0",
    "half-on-cpu": "\"slow_conv2d_cpu\" not implemented for 'Long'",
    "torch-memory": "out of memory",
    "deterministic": "scatter_add does have a deterministic implementation",
    "small-map": "Padding size should be a tuple",
    "maps-differ": "Sizes of tensors must match",
    "channels": "Given groups=1, expected weight to be at least 1 at dimension 0",
    "view": "view size is 12",
    "fold-export": "Exporting the operator 'aten::im2col' to ONNX opset version 9 is not supported",
    "unfold-export": "Unsupported: ONNX export of operator adaptive_avg_pool2d",
    "operator-export": "Exporting the operator 'aten::add' to ONNX opset version 17",
    "tracer-warning": "TracerWarning: torch.tensor results are registered as constants in the trace.",
    "yaml-acmix": "KeyError: 'acm'",
    "yaml-module": "in load_state\nKeyError: 'SomeBlock'",
    "other-release": "'dict' object has no attribute 'model'",
    "yolov5-checkpoint": "best.pt is an Ultralytics YOLOv8 model",
    "engine-size": "input size torch.Size([1, 3, 640, 640]) fits",
    "no-task": "task=detect",
    "image-size-rounded": "imgsz=[640] is a multiple of stride 32",
    "no-ultralytics": "No module named 'ultralytics_thop'",
    "libgl": "libGLX.so.0: cannot open shared object file",
    "no-window": "The function is not implemented",
    "no-image": "!_src.empty() was checked",
    "numpy-2": "compiled using NumPy 2.x",
    "numpy-1": "No module named 'numpy'",
    "numpy-names": "module 'numpy.linalg' has no attribute 'foo'",
    "protobuf-descriptors": "Descriptors are created",
    "old-protobuf": "cannot import name 'builder' from 'mine'",
    "no-kernel-image": "the kernel image is available",
    "old-driver": "CUDA driver version is 12.4",
    "no-device": "CUDA-capable device is detected: 1",
    "no-libnvinfer": "libnvidia-ml.so.1: cannot open shared object file",
    "no-cuda-library": "libcuda.so.1: cannot open shared object file",
    "plugin-of-another-tensorrt": "libother.so: undefined symbol: foo",
    "newer-system": "version `OPENSSL_3.0.0' not found",
    "illegal-instruction": "Illegal instructions were removed",
    "static-tls": "cannot allocate memory",
    "no-tensorrt": "No module named 'tensorrt_llm'",
    "no-wheel": "torch-2.3.0-cp310-cp310-linux_aarch64.whl is a supported wheel",
    "managed-environment": "the environment is managed externally",
}
"""For each message a text that is like it and something else."""


def names(text: str) -> list[str]:
    return [found.message for found in explain(text)]


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_every_example_is_explained_by_its_message_alone() -> None:
    assert len(MESSAGES) >= 40
    for name, message in MESSAGES.items():
        for text in (message.example, *OTHER_WORDS.get(name, ())):
            assert names(text) == [name], text
            coloured = f"{text[:9]}\x1b[1;31m{text[9:]}\x1b[0m"
            assert names(f"2026-01-02 03:04:05.678 [E] {coloured}\r\n") == [name], text
            assert names(re.sub("(?<=.{20}) ", "\n    ", text, count=1)) == [name], text
    assert set(OTHER_WORDS) <= set(MESSAGES)


def test_no_message_is_taken_for_another() -> None:
    assert set(ALIKE) == set(MESSAGES)
    for name, text in ALIKE.items():
        assert name not in names(text), text


def test_every_wording_has_an_example() -> None:
    for name, message in MESSAGES.items():
        for words in compiled(message):
            assert any(words.search(text) for text in (message.example, *OTHER_WORDS.get(name, ()))), words.pattern


def test_the_sentences() -> None:
    for name, message in MESSAGES.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        assert not message.means.endswith("."), name
        assert message.remedy[0].isupper() or message.remedy.startswith(("acmix-deploy ", "docs/")), name
        last = message.remedy.rpartition(". ")[2]
        commands = ("Run: ", "Update ", "It needs ", "On a Jetson ", "Of the plugin", "Of PyTorch", "Install ")
        assert message.remedy.endswith(".") or last.startswith(commands) or message.remedy.startswith(commands), name
        if message.harmless:
            assert message.remedy.startswith(("Do nothing", "Set the number")), name
        for group in (*groups_in(message.means), *groups_in(message.remedy)):
            assert all(group in words.groupindex for words in compiled(message)), (name, group)


def test_what_the_sentences_name_is_there() -> None:
    """Verbs and options of this command line, functions, and pages with their anchors."""
    options = {
        name: {option for action in command._actions for option in action.option_strings}
        for name, command in cli.commands().items()
    }
    for name, message in MESSAGES.items():
        text = f"{message.means}. {message.remedy}"
        for part in re.split(r"(?=acmix-deploy )", text)[1:]:
            words = part.split()
            verb = next((verb for verb in (" ".join(words[1:3]), words[1]) if verb.strip(".,;:`") in options), None)
            if verb is None:
                assert words[1] == "loads", (name, part)  # of the program as such
                continue
            own = re.split(r"(?<=\w)[.;:](?:\s|$)| trtexec | or ", part)[0]
            for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", own):
                assert option in options[verb.strip(".,;:`")], (name, verb, option)
        for page, anchor in re.findall(r"(docs/\w+\.md)(?:#(\w+))?", text):
            headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.M)
            assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], (name, page)
    assert callable(acmix_deploy.register_acmix)
    assert "acmix_deploy.register_acmix()" in MESSAGES["yaml-acmix"].remedy


def test_known_faults_keep_their_words() -> None:
    by_fault = {"no-dep-bias": "no-bias", "fold-export": "col2im", "no-class": "missing-class"}
    for name, fault in by_fault.items():
        assert MESSAGES[name].remedy == FAULTS[fault].remedy  # type: ignore[index]


# ---------------------------------------------------------------------------------------------------------------------
# Whole texts


def test_a_log_is_explained_in_its_order_and_each_message_once() -> None:
    node = "/model.{}/cv2/conv/Conv"
    log = "\n".join(
        [
            "[01/02/2026-03:04:05] [I] === Model Options ===",
            "[01/02/2026-03:04:05] [W] [TRT] Your ONNX model has been generated with INT64 weights, while TensorRT",
            "[01/02/2026-03:04:05] [W] [TRT] does not natively support INT64. Attempting to cast down to INT32.",
            *(
                f"[W] [TRT] Skipping tactic {n} due to insufficient memory on requested size of {n}00 detected"
                for n in (1, 2)
            ),
            f"[E] Error[10]: Could not find any implementation for node {node.format(3)} + PWN(a, b).",
            f"[E] Error[10]: [optimizer.cpp::computeCosts::2011] Error Code 10: Internal Error (Could not find any "
            f"implementation for node {node.format(3)}.)",
            "&&&& FAILED TensorRT.trtexec [TensorRT v8601] # trtexec --onnx=/home/me/model.onnx",
        ]
    )
    found = explain(log)
    assert [entry.message for entry in found] == ["int64-weights", "tactic-memory", "no-implementation"]
    assert [entry.line for entry in found] == [2, 4, 6]
    assert [entry.times for entry in found] == [1, 2, 2]
    assert [entry.harmless for entry in found] == [True, False, False]
    assert found[1].named == {"bytes": ("100", "200")}
    assert found[2].named == {"node": ("/model.3/cv2/conv/Conv",)}


def test_what_a_message_names_is_told() -> None:
    (found,) = explain("Unsupported model IR version: 11, max supported IR version: 10")
    assert "its IR version, that of the file format, is 11, and that ONNX Runtime reads 10 at most" in found.means
    assert "model.ir_version = 10" in found.remedy
    (found,) = explain(
        "Could not find any implementation for node {ForeignNode[/model.7/Reshape.../model.7/Transpose + a]}."
    )
    assert found.named == {"node": ("/model.7/Reshape.../model.7/Transpose + a",)}
    (found,) = explain("OSError: /home/me/lib/libnvinfer_plugin.so.8: cannot open shared object file")
    assert found.named == {"library": ("libnvinfer_plugin.so.8",)}
    (found,) = explain('External data path does not exist: "/home/me/models/model.onnx.data"')
    assert found.named == {"file": ("model.onnx.data",)}
    assert "/home" not in found.model_dump_json()
    (found,) = explain(f"Unsupported: ONNX export of operator {'x' * 900}")
    assert len(found.quoted) == 300


def test_the_position_of_a_published_block_is_told_from_other_types_and_devices() -> None:
    trace = (
        "    pe = self.conv_p(position(h, w, x.is_cuda))\n" + 7 * '  File "conv.py", line 3, in forward\n    return y\n'
    )
    types = "RuntimeError: Input type (float) and bias type (c10::Half) should be the same"
    devices = (
        "RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
    )
    assert explain(trace + types)[0].remedy == FAULTS["float32-position"].remedy
    assert explain(trace + devices)[0].remedy == FAULTS["cuda-position"].remedy
    assert (names(trace + types), names(trace + devices)) == (["position-type"], ["position-device"])
    assert (names(types), names(devices)) == (["input-type"], ["devices"])


def test_what_libraries_say_here_is_known(tmp_path: Path) -> None:
    def relu(domain: int = 17, ir_version: int = 8, operator: str = "Relu", other: int = TensorProto.FLOAT) -> bytes:
        x, z = (helper.make_tensor_value_info(name, kind, [1, 3]) for name, kind in (("x", 1), ("z", other)))
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])
        inputs = ["x", "z"] if operator == "Add" else ["x"]
        graph = helper.make_graph(
            [helper.make_node(operator, inputs, ["y"], name="n")], "g", [x, z][: len(inputs)], [y]
        )
        opset = helper.make_opsetid("", domain)
        return bytes(helper.make_model(graph, opset_imports=[opset], ir_version=ir_version).SerializeToString())

    def session(model: bytes) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    run = session(relu()).run
    torch.save({"a": SimpleNamespace(b=1)}, tmp_path / "a.pt")
    torch.save(tmp_path, tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:99])
    said: dict[str, Callable[[], object]] = {
        "ir-version": lambda: session(relu(ir_version=99)),
        "opset": lambda: session(relu(99)),
        "operator-of-another-opset": lambda: session(relu(operator="Rolu")),
        "types": lambda: session(relu(operator="Add", other=TensorProto.FLOAT16)),
        "no-protobuf": lambda: session(b"hello"),
        "other-size": lambda: run(None, {"x": np.zeros((1, 4), np.float32)}),
        "other-rank": lambda: run(None, {"x": np.zeros(3, np.float32)}),
        "other-type": lambda: run(None, {"x": np.zeros((1, 3), np.float64)}),
        "other-name": lambda: run(None, {"z": np.zeros((1, 3), np.float32)}),
        "weights-only": lambda: torch.load(tmp_path / "b.pt", weights_only=True),
        "no-archive": lambda: torch.load(tmp_path / "c.pt", weights_only=True),
        "view": lambda: torch.rand(2, 3).t().view(-1),
        "input-type": lambda: torch.nn.Conv2d(1, 1, 1)(torch.rand(1, 1, 2, 2).half()),
        "small-map": lambda: F.pad(torch.rand(1, 1, 2, 2), (3, 3, 3, 3), mode="reflect"),
        "maps-differ": lambda: torch.cat([torch.rand(1, 1, 4), torch.rand(1, 1, 5)], 1),
        "channels": lambda: torch.nn.Conv2d(3, 4, 1)(torch.rand(1, 2, 2, 2)),
        "state-dict": lambda: torch.nn.Linear(2, 2).load_state_dict({"weight": torch.rand(3, 2)}),
        "numpy-names": lambda: np.float,  # type: ignore[attr-defined]
    }
    for name, provoke in said.items():
        with pytest.raises(Exception) as caught:  # noqa: PT011
            provoke()
        assert names(f"Traceback (most recent call last):\n{caught.typename}: {caught.value}") == [name], caught.value


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def test_a_message_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--error", "KeyError: 'ACmix'"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Ultralytics, yaml-acmix KeyError: 'ACmix' name: ACmix A model YAML names ACmix" in said
    assert "Call acmix_deploy.register_acmix()" in said


def test_a_log_on_stdin_as_json(stdin: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]) -> None:
    stdin(
        "\ufeffTensorDock: [W] imgsz=[641] must be multiple of max stride 32, updating to [672]\r\n".encode("utf-16-le")
    )
    assert cli.main(["doctor", "--error", "-", "--json"]) == 0
    document = PastedDocument.model_validate(json.loads(capsys.readouterr().out))
    (found,) = document.messages
    assert (found.message, found.harmless, document.cut) == ("image-size-rounded", True, False)
    assert found.means == "images are taken larger, [672], since the model needs multiples of 32"


def test_an_unknown_message_is_said_to_be_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--error", "RuntimeError: the moon is full"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("No message in this text is known")
    assert "acmix-deploy doctor FILE" in said
    assert cli.main(["doctor", "--error", "RuntimeError: the moon is full", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "document": "doctor error",
        "schema": 1,
        "messages": [],
        "cut": False,
    }


def test_of_a_long_log_the_end_is_read(
    stdin: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pasted, "LONGEST", 1000)
    stdin(b"KeyError: 'ACmix'\n" + 100 * b"[I] nothing here\n" + b"Illegal instruction (core dumped)\n")
    assert cli.main(["doctor", "--error", "-"]) == 0
    said = capsys.readouterr().out
    assert "its beginning was left out" in said
    assert "illegal-instruction" in said
    assert "ACmix" not in said
    assert len(doctor._stdin(10)[0]) == 0  # at its end
    assert names(f"{'x' * 5000} KeyError: 'ACmix'") == ["yaml-acmix"]


def test_what_is_no_message_is_refused(
    stdin: Callable[[bytes], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "build.log").write_text("KeyError: 'ACmix'")
    stdin(b" \n")
    for text, said in (
        ("", "there is no text to explain"),
        ("-", "there is no text to explain"),
        (str(tmp_path / "build.log"), f"acmix-deploy doctor --error - < {tmp_path / 'build.log'}"),
    ):
        assert cli.main(["doctor", "--error", text]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "model.onnx", "--error", "KeyError: 'ACmix'"])
    assert ended.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_it_works_where_packages_are_broken() -> None:
    """Which is when it is asked."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(('onnx', 'onnxruntime', 'torch', 'cv2', 'tensorrt')));"
        "from acmix_deploy.cli import main; sys.exit(main(['doctor', '--error', 'libGL.so.1: cannot open shared "
        "object file']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "opencv-python-headless" in done.stdout
