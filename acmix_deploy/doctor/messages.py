"""Messages of other programs as people post them, each with what it means and what mends it. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from acmix_deploy.doctor.faults import FAULTS, REPLACED
from acmix_deploy.faults import FaultId
from acmix_deploy.files import TOO_LARGE_HINT
from acmix_deploy.runtime import hints
from acmix_deploy.runtime.refusals import REFUSALS, Refusal

Speaker = Literal[
    "TensorRT",
    "trtexec",
    "ONNX Runtime",
    "ONNX",
    "OpenVINO",
    "ncnn",
    "PyTorch",
    "Ultralytics",
    "OpenCV",
    "NumPy",
    "protobuf",
    "CUDA",
    "Python",
    "pip",
    "Linux",
]


@dataclass(frozen=True)
class Message:
    """What a program says. The two sentences may name groups of the words in braces, where all wordings have them."""

    said_by: Speaker
    example: str
    """How it reads, with names of our own."""
    words: tuple[str, ...]
    """Regular expressions, one for each wording; a blank is any white space, since terminals break lines."""
    means: str
    remedy: str
    """What mends it; a sentence."""
    harmless: bool = False
    """Whether all goes on after it, and right."""


def _known(said_by: Speaker, fault: FaultId, example: str, *words: str) -> Message:
    """A message by which a known fault shows."""
    return Message(said_by, example, words, FAULTS[fault].what, FAULTS[fault].remedy)


def _refusal(refusal: Refusal) -> Message:
    wrong, hint = (text.replace("{runtime}", "that ONNX Runtime") for text in (refusal.wrong, refusal.hint))
    words = refusal.words.replace(".*", r"(?s:.){0,600}?")  # here the text has more than one line
    return Message("ONNX Runtime", refusal.example, (words,), wrong, hint)


_NO_PLUGIN = (
    r"No importer registered for op: {}(?!(?s:.){{0,2000}}?Successfully created plugin: (?P=operator))",
    r"getPluginCreator could not find plugin:? {}",
    r"Cannot find plugin: {}, version:",
)
_OPERATOR = r"(?P<operator>\w+)\b"
_OF_ACMIX = r"(?P<operator>Acmix\w+)"
_IN_POSITION = r"conv_p\(position\((?s:.){0,2000}?"  # line of a traceback: what published blocks call there
_STATE_DICT = r"(?:Error\(s\) in loading state_dict for (?P<model>\w+):(?s:.){0,1500}?)?"
_RUNNING = r"running (?P<operator>\w+) node\. Name:'(?P<node>[^'\n]*)'(?s:.){0,600}?"
_BUILD_AGAIN = FAULTS["other-machine"].remedy
_OTHER_TORCH = "Install the build of PyTorch for this machine's GPU and driver: https://pytorch.org/get-started/locally"
_NUMPY_2 = "Update the package that the traceback ends in, or install NumPy below 2: pip install 'numpy<2'"

MESSAGES: dict[str, Message] = {
    # -----------------------------------------------------------------------------------------------------------------
    # TensorRT: reading a file
    "engine-without-plugin": Message(
        "TensorRT",
        "Error Code 1: Serialization (Serialization assertion creator failed.Cannot deserialize plugin since "
        "corresponding IPluginCreator not found in Plugin Registry)",
        (
            r"(?:Cannot find plugin: |getPluginCreator could not find plugin:? )"
            r"(?P<operator>\w+),? version:? [^\n]*\n[^\n]*Cannot deserialize plugin",
            r"Cannot deserialize plugin since corresponding IPluginCreator not found in Plugin Registry",
        ),
        "the engine has a layer of a plugin whose library is not loaded",
        "Name the library: --plugin FILE of acmix-deploy verify, profile, detect and serve; trtexec takes it as "
        "--staticPlugins, before 8.6 as --plugins.",
    ),
    "no-acmix-plugin": Message(
        "TensorRT",
        "No importer registered for op: AcmixAttention. Attempting to import as plugin.",
        tuple(words.format(_OF_ACMIX) for words in _NO_PLUGIN),
        "the file leaves this operator to the plugin of this project, which is not loaded",
        "Name the library, acmix-deploy build --plugin FILE or trtexec --staticPlugins=FILE (before 8.6 --plugins), or "
        "write standard operators: acmix-deploy fuse --target plain.",
    ),
    "no-col2im": _known(
        "TensorRT",
        "col2im",
        "No importer registered for op: Col2Im. Attempting to import as plugin.",
        *(words.format("(?P<operator>Col2Im)") for words in _NO_PLUGIN),
    ),
    "no-importer": Message(
        "TensorRT",
        "3: getPluginCreator could not find plugin: GridSample version: 1",
        (
            *(words.format(_OPERATOR) for words in _NO_PLUGIN),
            r"Plugin not found, are the plugin name, version, and namespace correct",
        ),
        "this TensorRT has no operator of that name, and no library with a plugin of that name is loaded",
        f"{hints.UNKNOWN_OPERATORS} docs/targets.md#operators tells which release reads which.",
    ),
    "float64-tensor": _known(
        "TensorRT", "float64-position", "Unsupported ONNX data type: DOUBLE (11)", r"Unsupported ONNX data type: DOUBLE"
    ),
    "uint8-input": Message(
        "TensorRT",
        "Unsupported ONNX data type: UINT8 (2)",
        (
            r"Unsupported ONNX data type: (?P<type>U?INT8|U?INT16)\b",
            r"Found unsupported input type of (?P<type>\w+)",
        ),
        "an input of the file is of a type that this TensorRT takes no images in, or that another node than a Cast "
        "reads: uint8 is taken since 8.5, and a Cast has to read it",
        "Make the input float32 or float16, or take the file of acmix-deploy export --input uint8, whose first node "
        "is that Cast.",
    ),
    "computed-pads": Message(
        "TensorRT",
        "[6] Invalid Node - Pad_7 [shuffleNode.cpp::symbolicExecute::392] Error Code 4: Internal Error "
        "(Reshape_5: IShuffleLayer applied to shape tensor must have 0 or 1 reshape dimensions: dimensions "
        "were [-1,2])",
        (
            r"Invalid Node - (?P<node>Pad_?\S*)(?s:.){0,200}?IShuffleLayer applied to shape tensor",
            r"IShuffleLayer applied to shape tensor must have 0 or 1 reshape dimensions",
        ),
        "the file computes the widths of a padding from shapes, as TorchScript exports do, and this TensorRT wants "
        "them as constants",
        "Fold constants (polygraphy surgeon sanitize --fold-constants), or export the checkpoint again: acmix-deploy "
        "export.",
    ),
    "computed-weights": Message(
        "TensorRT",
        'Assertion failed: inputs.at(2).is_weights() && "The bias tensor is required to be an initializer '
        'for the Conv operator"',
        (r"The (?P<tensor>\w+) tensor is required to be an initializer",),
        "the file computes weights that this TensorRT wants as constants",
        "Fold constants: polygraphy surgeon sanitize --fold-constants. Weights that depend on the image need another "
        "TensorRT or another model.",
    ),
    "invalid-node": Message(
        "TensorRT",
        "[6] Invalid Node - Reshape_12",
        (r"Invalid Node - (?P<node>\S+)",),
        "the parser refuses this node; what follows in the log says why",
        "See what is wrong with the file itself: acmix-deploy doctor MODEL.",
    ),
    # TensorRT: building
    "foreign-node": Message(
        "TensorRT",
        "Error Code 10: Internal Error (Could not find any implementation for node "
        "{ForeignNode[onnx::Gather_7...ScatterND_9]}.)",
        (r"Could not find any implementation for node \{ForeignNode\[(?P<node>(?:(?!\]\}|\n).){1,200})",),
        "TensorRT compiles this part of the graph as one, and found no kernel for it that runs",
        "Where tactics were skipped for lack of memory before it, give it more. Else build with a newer TensorRT and "
        "driver, or a file of fewer nodes: acmix-deploy fuse.",
    ),
    "no-implementation": Message(
        "TensorRT",
        "10: Could not find any implementation for node /model.0/conv/Conv.",
        (r"Could not find any implementation for node (?P<node>(?!\{ForeignNode)[^\s).,]+(?:[.,][^\s).,]+)*)",),
        "TensorRT found no kernel for this layer that runs",
        "Where tactics were skipped for lack of memory before it, give it more. Else the layer is of a type that this "
        "TensorRT does not compute on this device: build without --fp16, or with a newer TensorRT.",
    ),
    "no-runners": Message(
        "TensorRT",
        "Error Code 2: Internal Error (Assertion !layerImpls.empty() failed. node_of_selected_167 has no runners that "
        "implement it In getSupportedFormats at /_src/optimizer/builder/tacticSupply.cpp:48)",
        (r"Assertion !layerImpls\.empty\(\) failed\. (?P<node>\S+) has no runners that implement it",),
        "this TensorRT, such as TensorRT-RTX for NonMaxSuppression, reads the operator and has nothing that runs it",
        "Build it with TensorRT. A file without suppression of boxes is exported without --nms.",
    ),
    "tactic-memory": Message(
        "TensorRT",
        "Skipping tactic 3 due to insufficient memory on requested size of 29147520 detected for tactic "
        "0x0000000000000004.",
        (
            r"Skipping tactic \S+ due to insuff?icient memory on requested size of (?P<bytes>\d+)",
            r"Tactic Device request: (?P<wanted>\d+\s*MB) Available: (?P<free>\d+\s*MB)",
        ),
        "a way to compute a layer is left out for lack of memory; the engine may become slower, or not be built at all",
        hints.TOO_LITTLE_MEMORY,
    ),
    "build-memory": Message(
        "TensorRT",
        "[defaultAllocator.cpp::allocate::19] Error Code 1: Cuda Runtime (out of memory)",
        (r"Cuda Runtime \(out of memory\)", r"Error Code \d+: OutOfMemory"),
        "the device has too little free memory for the engine or for its build",
        hints.TOO_LITTLE_MEMORY,
    ),
    "no-profile": Message(
        "TensorRT",
        "Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no optimization profile has "
        "been defined.)",
        (
            r"Network has dynamic or shape inputs, but no optimization profile has been defined",
            r"dynamic input is missing dimensions in profile",
        ),
        "the file has free axes, and the build was not told which sizes the engine has to take",
        f"{hints.FREE_AXES} These are options of acmix-deploy build; trtexec calls them --minShapes, --optShapes and "
        "--maxShapes.",
    ),
    "wrong-count": Message(
        "TensorRT",
        "(Unnamed Layer* 9) [Convolution]:kernel weights has count 192 but 15360 was expected",
        (r"kernel weights has count (?P<found>\d+) but (?P<expected>\d+) was expected",),
        "the weights are of another model than the code that builds the network: of another scale, or another number "
        "of classes",
        "Set both in that code as in the checkpoint, or build from the checkpoint: acmix-deploy export and "
        "acmix-deploy build.",
    ),
    # TensorRT: engines
    "engine-of-another-release": Message(
        "TensorRT",
        "6: The engine plan file is not compatible with this version of TensorRT, expecting library version "
        "8.5.2 got 8.6.1, please rebuild.",
        (
            r"engine plan file is not compatible with this version of TensorRT, expecting library version "
            r"(?P<here>\d[\d.]*\d) got (?P<built_with>\d[\d.]*\d)",
            r"Version tag does not match\. Note: Current Version: (?P<here>\d+), Serialized Engine Version: "
            r"(?P<built_with>\d+)",
            r"Version tag does not match",
        ),
        "the engine was built with another release of TensorRT than the one that loads it",
        _BUILD_AGAIN,
    ),
    "engine-of-another-gpu": Message(
        "TensorRT",
        "6: The engine plan file is generated on an incompatible device, expecting compute 8.7 got compute "
        "8.9, please rebuild.",
        (
            r"generated on an incompatible device, expecting compute (?P<here>[\d.]+\d) got compute "
            r"(?P<built_for>[\d.]+\d)",
            r"engine plan file is generated on an incompatible device",
        ),
        "the engine was built for a GPU of another compute capability",
        _BUILD_AGAIN,
    ),
    "engine-of-another-model": Message(
        "TensorRT",
        "Using an engine plan file across different models of devices is not recommended and is likely to "
        "affect performance or even cause errors.",
        (r"Using an engine plan file across different models of devices is not",),
        "the engine was built on another model of GPU, or in another power mode, of the same compute capability; it "
        "may be slow or fail",
        _BUILD_AGAIN,
    ),
    "no-engine": Message(
        "TensorRT",
        "Error Code 1: Serialization (Serialization assertion header.magicTag == kEXPECTED_MAGIC_TAG "
        "failed.Trying to load an engine created with incompatible serialization version (556 != 1953657958).",
        (
            r"[Mm]agic tag does not match",
            r"magicTag == \S+ failed",
            r"Trying to load an engine created with incompatible serialization version",
        ),
        "the file does not begin as an engine of this TensorRT does: it is of another release or system, is no engine, "
        "or was written by Ultralytics, which puts a length and JSON before it",
        "See what the file is: acmix-deploy inspect FILE. YOLO('model.engine') takes an engine of Ultralytics, and our "
        "verbs do after acmix-deploy adopt FILE. One of another release has to be built again: acmix-deploy build.",
    ),
    "out-of-profile": Message(
        "TensorRT",
        "Supplied binding dimension [1,3,576,768] for bindings[0] exceed min ~ max range at index 2, maximum "
        "dimension in profile is 800, minimum dimension in profile is 640, but supplied dimension is 576.",
        (
            r"maximum dimension in profile is (?P<largest>\d+), minimum dimension in profile is (?P<smallest>\d+), but "
            r"supplied dimension is (?P<given>\d+)",
            r"Static dimension mismatch while setting input shape for \S+ Set dimensions are (?P<given>\[[\d,]+\])\. "
            r"Expected dimensions are (?P<built_for>\[[-\d,]+\])",
            r"set(?:InputShape|BindingDimensions)\S*, condition: (?:profileM(?:in|ax)Dims|engineDims)\.d\[i\]",
        ),
        "the engine was built for other sizes than the input has",
        hints.OTHER_SHAPE,
    ),
    # TensorRT: warnings
    "int64-weights": Message(
        "TensorRT",
        "Your ONNX model has been generated with INT64 weights, while TensorRT does not natively support "
        "INT64. Attempting to cast down to INT32.",
        (r"generated with INT64 weights, while TensorRT does not natively support INT64",),
        "indices and shapes in the file are INT64, as ONNX wants them, and become INT32",
        "Do nothing: they fit.",
        harmless=True,
    ),
    "int32-clamped": Message(
        "TensorRT",
        "One or more weights outside the range of INT32 was clamped",
        (r"weights outside the range of INT32 was clamped",),
        "exporters write the largest INT64 for the end of a slice that goes to the end",
        "Do nothing: INT32's largest means the same.",
        harmless=True,
    ),
    "type-at-build-time": Message(
        "TensorRT",
        "Tensor DataType is determined at build time for tensors not marked as input or output.",
        (r"Tensor DataType is determined at build time for tensors not marked as input or output",),
        "a program sets the type of a tensor between layers, which TensorRT chooses by itself",
        "Do nothing.",
        harmless=True,
    ),
    "half-weights": Message(
        "TensorRT",
        "Weights [name=model.0.conv.weight] had the following issues when converted to FP16:",
        (r"[Ww]eights \[name=(?P<tensor>(?s:.){1,300}?)\] had the following issues when converted to FP16",),
        "weights are smaller or larger than half precision holds, so that the engine may be less exact",
        "Compare it with the model: acmix-deploy verify. A file whose types were chosen by what they hold: "
        "acmix-deploy export --fp16.",
    ),
    # trtexec
    "old-trtexec-option": Message(
        "trtexec",
        "Unknown option: --buildOnly",
        (r"Unknown option: (?P<option>--(?:buildOnly|explicitBatch|workspace|batch|maxBatch)\b)",),
        "newer releases of trtexec do not have this option",
        "Leave out --explicitBatch, --batch and --maxBatch; --skipInference is said for --buildOnly, and "
        "--memPoolSize=workspace:MIB for --workspace.",
    ),
    "old-trtexec": Message(
        "trtexec",
        "Unknown option: --staticPlugins ./libacmix_plugin.so",
        (r"Unknown option: (?P<option>--staticPlugins)\b",),
        "trtexec before TensorRT 8.6 has another name for this option",
        "Say --plugins=FILE for --staticPlugins=FILE.",
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # ONNX Runtime
    **{name: _refusal(refusal) for name, refusal in REFUSALS.items() if not refusal.ambiguous},
    "no-provider": Message(
        "ONNX Runtime",
        "UserWarning: Specified provider 'CUDAExecutionProvider' is not in available provider "
        "names.Available providers: 'AzureExecutionProvider, CPUExecutionProvider'",
        (
            r"Specified provider '(?P<provider>\w+)' is not in available provider names",
            r"Unknown Provider Type: (?P<provider>\w+)",
        ),
        "this ONNX Runtime was built without it, and runs on the CPU",
        hints.NO_PROVIDER,
    ),
    "empty-onnxruntime": Message(
        "ONNX Runtime",
        "AttributeError: module 'onnxruntime' has no attribute 'InferenceSession'",
        (r"module 'onnxruntime' has no attribute '(?P<name>\w+)'",),
        "the folder of ONNX Runtime is empty, as after uninstalling one of onnxruntime and onnxruntime-gpu, or a file "
        "onnxruntime.py hides it",
        "Uninstall both, then install one: pip install --force-reinstall onnxruntime, or onnxruntime-gpu.",
    ),
    "provider-does-not-start": Message(
        "ONNX Runtime",
        "Failed to create CUDAExecutionProvider. Require cuDNN 9.* and CUDA 12.*.",
        (r"Failed to create (?P<provider>CUDAExecutionProvider|TensorrtExecutionProvider)\b",),
        "ONNX Runtime has this provider, which does not start there, and runs on the CPU",
        hints.PROVIDER_NEEDS,
    ),
    "other-size": Message(
        "ONNX Runtime",
        "Got invalid dimensions for input: images for the following indices index: 2 Got: 160 Expected: 640 "
        "Please fix either the inputs/outputs or the model.",
        (
            r"Got invalid dimensions for input: (?P<input>\S+) for the following indices index: (?P<axis>\d+) Got: "
            r"(?P<given>\d+) Expected: (?P<expected>\d+)",
            r"Got invalid dimensions for input: (?P<input>\S+)",
        ),
        "the file is for another size or batch than the input has",
        "Give images of the size that the file tells (acmix-deploy inspect MODEL), or leave axes free: acmix-deploy "
        "export --dynamic batch,height,width.",
    ),
    "other-rank": Message(
        "ONNX Runtime",
        "Invalid rank for input: images Got: 3 Expected: 4 Please fix either the inputs/outputs or the model.",
        (r"Invalid rank for input: (?P<input>\S+) Got: (?P<given>\d+) Expected: (?P<expected>\d+)",),
        "the input has another number of axes than the file takes, as an image without its batch",
        "Give [B, C, H, W]: image[None] adds the batch.",
    ),
    "other-type": Message(
        "ONNX Runtime",
        "Unexpected input data type. Actual: (tensor(double)) , expected: (tensor(float))",
        (
            r"Unexpected input data type\. Actual: \(tensor\((?P<given>\w+)\)\)\s*, "
            r"expected: \(tensor\((?P<expected>\w+)\)",
        ),
        "the array is of type {given}, and the file takes {expected}",
        "Convert it, image.astype(np.float32) or np.float16; files of acmix-deploy fp16 take float32 unless --fp16-io "
        "was said.",
    ),
    "other-name": Message(
        "ONNX Runtime",
        "ValueError: Required inputs (['images']) are missing from input feed (['input']).",
        (
            r"Required inputs \(\[(?P<expected>[^\]\n]{1,200})\]\) are missing from input feed",
            r"Invalid (?:Feed Input Name|input name):\s*(?P<given>\S+)",
        ),
        "the input has another name than the one that is fed",
        "Take the name from the file: session.get_inputs()[0].name, or acmix-deploy inspect MODEL.",
    ),
    "sizes-inside": Message(
        "ONNX Runtime",
        "Non-zero status code returned while running Concat node. Name:'/model.12/Concat' Status Message: "
        "concat.cc:154 PrepareForCompute Non concat axis dimensions must match: Axis 2 has mismatched "
        "dimensions of 40 and 41",
        (
            _RUNNING + r"Non concat axis dimensions must match",
            _RUNNING + r"cannot be reshaped to the requested shape",
            _RUNNING + r"Attempting to broadcast an axis",
        ),
        "sizes inside the file do not fit the input: it was exported for one size and tells others are free, or the "
        "image is no multiple of the model's stride",
        "Let acmix-deploy doctor MODEL run it at other sizes, which tells the two apart.",
    ),
    "affinity": Message(
        "ONNX Runtime",
        "pthread_setaffinity_np failed for thread: 81, index: 18, mask: {73, }, error code: 22 error msg: "
        "Invalid argument. Specify the number of threads explicitly so the affinity is not set.",
        (r"pthread_setaffinity_np failed",),
        "ONNX Runtime sees more cores than this container or job may use, and cannot bind threads to those",
        "Set the number of threads: SessionOptions.intra_op_num_threads, or --threads of acmix-deploy serve, profile "
        "and gate run.",
        harmless=True,
    ),
    "device-discovery": Message(
        "ONNX Runtime",
        "GPU device discovery failed: device_discovery.cc:89 ReadFileContents Failed to open file: "
        '"/sys/class/drm/card0/device/vendor"',
        (r"GPU device discovery failed",),
        "ONNX Runtime looked for GPUs and found none that it knows",
        "Do nothing where it is to run on the CPU.",
        harmless=True,
    ),
    "unused-initializer": Message(
        "ONNX Runtime",
        "Removing initializer '/model.9/Constant_5_output_0'. It is not used by any node and should be "
        "removed from the model.",
        (r"Removing initializer '(?P<tensor>[^'\n]*)'\. It is not used by any node",),
        "the file holds weights that no node reads",
        "Do nothing.",
        harmless=True,
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # ONNX, OpenVINO, ncnn
    "two-gigabytes": Message(
        "ONNX",
        "ValueError: Message onnx.ModelProto exceeds maximum protobuf size of 2GB: 2593712456",
        (r"exceed(?:s|ed) maximum protobuf size of 2GB", r"This protobuf of onnx model is too large \(>2Gi?B\)"),
        "a model in one piece holds more than protobuf can",
        TOO_LARGE_HINT,
    ),
    "old-graphsurgeon": Message(
        "ONNX",
        "AttributeError: module 'onnx.helper' has no attribute 'float32_to_bfloat16'",
        (r"module 'onnx\.helper' has no attribute '(?P<name>float32_to_\w+)'",),
        "the installed onnx no longer has what older releases of onnx_graphsurgeon call",
        "Run: pip install --upgrade onnx_graphsurgeon",
    ),
    "openvino-operators": Message(
        "OpenVINO",
        "OpenVINO does not support the following ONNX operations: acmix.AcmixAttention",
        (r"OpenVINO does not support the following ONNX operations: (?P<operators>\w[\w.]*(?:, \w[\w.]*)*)",),
        "OpenVINO has no operators of these names, and reads no definitions that a file holds",
        "Write the file for it: acmix-deploy fuse --for openvino. Operators that are not of acmix have to be exported "
        "otherwise.",
    ),
    "ncnn-layer": Message(
        "ncnn",
        "layer torch.std not exists or registered",
        (r"layer (?P<layer>[\w.:]+) not exists or registered",),
        "pnnx wrote a layer that ncnn does not have",
        "Take another runtime: ncnn is no target, docs/targets.md tells what was tried.",
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # PyTorch: checkpoints
    "configuration-beside": _known(
        "PyTorch",
        "blocked-load",
        "WeightsUnpickler error: Unsupported global: GLOBAL yacs.config.CfgNode was not an allowed global by default.",
        r"(?:Weights only load failed(?s:.){0,1500}?)?Unsupported global: GLOBAL (?P<name>(?:yacs|argparse)\.[\w.]+\w)",
        r"Unsupported class (?P<name>(?:yacs|argparse)\.[\w.]+\w)",
    ),
    "weights-only": Message(
        "PyTorch",
        "WeightsUnpickler error: Unsupported global: GLOBAL ultralytics.nn.tasks.DetectionModel was not an "
        "allowed global by default.",
        (
            r"Weights only load failed(?s:.){0,1500}?Unsupported global: GLOBAL (?P<name>[\w.]+\w)",
            r"Unsupported global: GLOBAL (?P<name>[\w.]+\w)",
            r"Weights only load failed",
        ),
        "torch.load takes tensors alone unless told otherwise, from PyTorch 2.6 on, and the file names a class",
        f"acmix-deploy export reads it where it knows the classes. {hints.UNTRUSTED}",
    ),
    "no-class": _known(
        "PyTorch",
        "missing-class",
        "AttributeError: Can't get attribute 'C3k2' on <module 'ultralytics.nn.modules.block' from 'block.py'>",
        r"Can't get attribute '(?P<name>\w+)' on <module '(?P<module>[\w.]+)'",
        r"No module named '(?P<module>(?:models|utils)(?:\.[\w.]+)?|ultralytics\.[\w.]+)'",
    ),
    "no-archive": Message(
        "PyTorch",
        "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory",
        (
            r"PytorchStreamReader failed (?:reading zip archive|reading file|locating file)",
            r"invalid load key, '(?P<byte>[^'\n]{1,8})'",
        ),
        "the file is no whole checkpoint: it was cut off, or is a web page or a pointer of Git LFS in its place",
        hints.INCOMPLETE,
    ),
    "no-dep-bias": _known(
        "PyTorch",
        "no-bias",
        'Missing key(s) in state_dict: "model.4.dep_conv.bias".',
        _STATE_DICT + r"(?:Missing|Unexpected) key\(s\) in state_dict: [^\n]{0,2000}dep_conv\.bias",
    ),
    "scalar-rate": _known(
        "PyTorch",
        "scalar-rates",
        "size mismatch for model.4.rate1: copying a param with shape torch.Size([]) from checkpoint, the "
        "shape in current model is torch.Size([1]).",
        _STATE_DICT + r"size mismatch for (?P<tensor>(?:\w+\.)*rate[12])",
    ),
    "module-prefix": Message(
        "PyTorch",
        'Unexpected key(s) in state_dict: "module.conv.weight", "module.conv.bias".',
        (_STATE_DICT + r"(?:Missing|Unexpected) key\(s\) in state_dict: [^\n]{0,2000}\"module\.",),
        "names of weights begin with module., as DataParallel writes them",
        "acmix-deploy export drops the prefix; in code: name.removeprefix('module.').",
    ),
    "state-dict": Message(
        "PyTorch",
        "RuntimeError: Error(s) in loading state_dict for DetectionModel:",
        (r"Error\(s\) in loading state_dict for (?P<model>\w+)",),
        "weights and module are of different models, scales or numbers of classes",
        "See what the file holds: acmix-deploy doctor MODEL. What builds the module that takes it: acmix-deploy export "
        "--arch package.module:factory.",
    ),
    "no-gpu": Message(
        "PyTorch",
        "RuntimeError: Attempting to deserialize object on a CUDA device but torch.cuda.is_available() is False.",
        (
            r"Attempting to deserialize object on a CUDA device but torch\.cuda\.is_available\(\) is False",
            r"Torch not compiled with CUDA enabled",
            r"Found no NVIDIA driver on your system",
        ),
        "the code asks for a GPU that this PyTorch does not see",
        "Load with map_location='cpu', as acmix-deploy export does, or install PyTorch for CUDA and the driver.",
    ),
    # PyTorch: running
    "position-type": _known(
        "PyTorch",
        "float32-position",
        "pe = self.conv_p(position(h, w, x.is_cuda)) RuntimeError: Input type (float) and bias type "
        "(c10::Half) should be the same",
        _IN_POSITION + r"Input type \([\w.:]+\) and (?:weight|bias) type \([\w.:]+\) should be the same",
    ),
    "position-device": _known(
        "PyTorch",
        "cuda-position",
        "pe = self.conv_p(position(h, w, x.is_cuda)) RuntimeError: Expected all tensors to be on the same "
        "device, but found at least two devices, cuda:0 and cuda:1!",
        _IN_POSITION + r"Expected all tensors to be on the same device",
    ),
    "input-type": Message(
        "PyTorch",
        "RuntimeError: Input type (torch.cuda.FloatTensor) and weight type (torch.cuda.HalfTensor) should be the same",
        (
            r"Input type \((?P<input>[\w.:]+)\) and (?:weight|bias) type \((?P<weight>[\w.:]+)\) should be the same",
            r"expected scalar type (?P<weight>\w+) but found (?P<input>\w+)",
        ),
        "what comes in and the weights are of different types, or on different devices",
        "Convert the image: x.to(next(model.parameters())). A tensor that the model's code makes needs dtype=x.dtype, "
        "device=x.device.",
    ),
    "devices": Message(
        "PyTorch",
        "RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
        (
            r"Expected all tensors to be on the same device, but found at least two devices, (?P<one>[\w:]+) and "
            r"(?P<other>\w+(?::\d+)?)",
            r"Expected all tensors to be on the same device",
        ),
        "tensors of one operation are on different devices",
        "Move model and image to one, .to(device); a tensor that the model's code makes needs device=x.device.",
    ),
    "half-on-cpu": Message(
        "PyTorch",
        "RuntimeError: \"slow_conv2d_cpu\" not implemented for 'Half'",
        (r"\"(?P<kernel>\w+)\" not implemented for '(?:Half|BFloat16)'",),
        "this PyTorch does not compute that on a CPU in half precision",
        "Export in float32 and let the file be made smaller: acmix-deploy export --fp16.",
    ),
    "torch-memory": Message(
        "PyTorch",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
        (r"CUDA out of memory\. Tried to allocate (?P<wanted>[\d.]+ [KMG]iB)", r"CUDA out of memory"),
        "the GPU has too little free memory for this batch of images",
        "Take a smaller batch or image, or end other programs on the device.",
    ),
    "deterministic": Message(
        "PyTorch",
        "RuntimeError: reflection_pad2d_backward_cuda does not have a deterministic implementation, but you "
        "set 'torch.use_deterministic_algorithms(True)'.",
        (r"\b(?P<operator>\w{1,80}_cuda) does not have a deterministic implementation",),
        "deterministic training was asked for, and the gradient of this operation, of ACmix's reflection for one, "
        "depends on the order of threads",
        "Train with deterministic=False, or torch.use_deterministic_algorithms(True, warn_only=True).",
    ),
    "small-map": Message(
        "PyTorch",
        "RuntimeError: Argument #4: Padding size should be less than the corresponding input dimension, but "
        "got: padding (3, 3) at dimension 3 of input [1, 64, 2, 2]",
        (
            r"Padding size should be less than the corresponding input dimension, but got: "
            r"padding \((?P<padding>[\d, ]+)\)",
        ),
        "the map is too small to reflect half a window beyond its edge",
        "Take a larger image, or put the block at a larger map: ACmix needs height and width above kernel_att // 2.",
    ),
    "maps-differ": Message(
        "PyTorch",
        "RuntimeError: Sizes of tensors must match except in dimension 1. Expected size 40 but got size 41 "
        "for tensor number 1 in the list.",
        (
            r"Sizes of tensors must match except in dimension (?P<axis>\d+)\. Expected size (?P<expected>\d+) but got "
            r"size (?P<given>\d+)",
            r"Sizes of tensors must match except in dimension (?P<axis>\d+)\. Got (?P<expected>\d+) and (?P<given>\d+)",
        ),
        "maps that are joined differ in size: the image is no multiple of the model's stride, or a block in the YAML "
        "changes the size",
        "Take sizes that are multiples of the stride, mostly 32; a block between layers of one size needs stride 1.",
    ),
    "channels": Message(
        "PyTorch",
        "RuntimeError: Given groups=1, weight of size [64, 3, 1, 1], expected input[1, 128, 40, 40] to have "
        "3 channels, but got 128 channels instead",
        (
            r"Given groups=\d+, weight of size \[[\d, ]+\], expected input\[[\d, ]+\] to have "
            r"(?P<expected>\d+) channels, but got (?P<given>\d+) channels instead",
        ),
        "a layer was built for another number of channels than it gets, as blocks are to which parse_model does not "
        "give those of the layer before",
        "Blocks named ACmix in a YAML get them after acmix_deploy.register_acmix(): docs/checkpoints.md#ultralytics.",
    ),
    "view": Message(
        "PyTorch",
        "RuntimeError: view size is not compatible with input tensor's size and stride (at least one "
        "dimension spans across two contiguous subspaces). Use .reshape(...) instead.",
        (r"view size is not compatible with input tensor's size and stride",),
        "`view` was called on a tensor that is not contiguous in memory",
        "Say reshape for view in that line; acmix-deploy export replaces known blocks by its own.",
    ),
    # PyTorch: export
    "fold-export": _known(
        "PyTorch",
        "col2im",
        "UnsupportedOperatorError: Exporting the operator 'aten::col2im' to ONNX opset version 17 is not "
        "supported. Support for this operator was added in version 18, try exporting with this version",
        r"Exporting the operator '?(?P<operator>(?:aten::)?col2im)'? to ONNX opset version \d+ is not supported",
        r"Occurred when translating (?P<operator>col2im)",
    ),
    "unfold-export": Message(
        "PyTorch",
        "SymbolicValueError: Unsupported: ONNX export of operator Unfold, input size not accessible.",
        (
            r"ONNX export of operator (?P<operator>Unfold|im2col)\b",
            r"Occurred when translating (?P<operator>im2col)",
            r"Exporting the operator '?(?P<operator>(?:aten::)?im2col)'? to ONNX opset version \d+ is not supported",
        ),
        "the exporter writes `unfold` only where it knows the sizes",
        f"Of a known block, {REPLACED}; in code: export at fixed sizes.",
    ),
    "operator-export": Message(
        "PyTorch",
        "UnsupportedOperatorError: Exporting the operator 'aten::fft_fft2' to ONNX opset version 11 is not supported",
        (
            r"Exporting the operator '?(?P<operator>[\w:]+)'? to ONNX opset version (?P<opset>\d+) is not supported\. "
            r"Support for this operator was added in version (?P<needed>\d+)",
            r"Exporting the operator '?(?P<operator>[\w:]+)'? to ONNX opset version (?P<opset>\d+) is not supported",
            r"Unsupported: ONNX export of operator (?P<operator>\w+)",
        ),
        "the exporter does not write this operator in that opset",
        "Take a newer opset where the message names one, acmix-deploy export --opset N, or spell that line in other "
        "operations.",
    ),
    "tracer-warning": Message(
        "PyTorch",
        "TracerWarning: Converting a tensor to a Python boolean might cause the trace to be incorrect.",
        (r"TracerWarning: Converting a tensor to a Python (?P<type>\w+) might cause the trace to be incorrect",),
        "tracing keeps what that line computes as a constant, so the file may hold for the traced size and batch alone",
        "Do nothing where both stay fixed. acmix-deploy export --dynamic runs the file at others before it counts.",
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # Ultralytics
    "yaml-acmix": Message(
        "Ultralytics",
        "KeyError: 'ACmix'",
        (
            r"in parse_model\b(?s:.){0,1500}?KeyError: ['\"](?P<name>\w*A[Cc][Mm]ix\w*)['\"]",
            r"KeyError: ['\"](?P<name>A[Cc][Mm]ix\w*)['\"]",
            r"name '(?P<name>A[Cc][Mm]ix\w*)' is not defined",
        ),
        "a model YAML names ACmix, which Ultralytics does not know by itself",
        "Call acmix_deploy.register_acmix() before YOLO('model.yaml'): docs/checkpoints.md#ultralytics.",
    ),
    "yaml-module": Message(
        "Ultralytics",
        "in parse_model m = globals()[m] KeyError: 'SomeBlock'",
        (r"in parse_model\b(?s:.){0,1500}?(?:KeyError: ['\"]|name ')(?P<name>\w+)['\"]",),
        "a model YAML names a module that the installed Ultralytics does not know",
        "Install the release, or take the changed copy, that the YAML is of; own modules have to be set as attributes "
        "of ultralytics.nn.tasks before YOLO('model.yaml').",
    ),
    "other-release": Message(
        "Ultralytics",
        "AttributeError: 'Upsample' object has no attribute 'recompute_scale_factor'",
        (
            r"'(?P<module>Upsample|Detect|Segment|Pose|OBB|Conv|DWConv|RepConv|Bottleneck|C2f|C3k2?|C3|SPPF|C2PSA|Attention|"
            r"AAttn|A2C2f)' object has no attribute '(?P<attribute>\w+)'",
        ),
        "a checkpoint holds a {module} without the attribute {attribute}, which the installed code reads",
        f"{hints.OTHER_RELEASE}.",
    ),
    "yolov5-checkpoint": Message(
        "Ultralytics",
        "TypeError: best.pt appears to be an Ultralytics YOLOv5 model originally trained with "
        "https://github.com/ultralytics/yolov5.",
        (r"appears to be an Ultralytics YOLOv5 model originally trained",),
        "the checkpoint is of the repository of YOLOv5, which the package ultralytics does not load",
        "acmix-deploy export loads it with that repository: --code DIR --trust.",
    ),
    "engine-size": Message(
        "Ultralytics",
        "AssertionError: input size torch.Size([1, 3, 480, 640]) not equal to max model size (1, 3, 640, 640)",
        (
            r"input size torch\.Size\(\[(?P<given>[\d, ]+)\]\) (?:not equal to|>) max model size "
            r"\((?P<expected>[\d, ]+)\)",
        ),
        "the engine or file takes images of {expected}, and is given {given}",
        "Say imgsz= and batch= as at the export, or leave axes free: acmix-deploy export --dynamic.",
    ),
    "no-task": Message(
        "Ultralytics",
        "WARNING Unable to automatically guess model task, assuming 'task=detect'.",
        (r"Unable to automatically guess model task",),
        "the file does not tell its task, so Ultralytics takes it for a detector",
        "Say it, YOLO(path, task='segment'); files of acmix-deploy export tell it.",
    ),
    "image-size-rounded": Message(
        "Ultralytics",
        "WARNING imgsz=[641] must be multiple of max stride 32, updating to [672]",
        (
            r"imgsz=(?P<given>\[[\d, ]+\]) must be multiple of max stride (?P<stride>\d+), updating to "
            r"(?P<taken>\[[\d, ]+\])",
        ),
        "images are taken larger, {taken}, since the model needs multiples of {stride}",
        "Do nothing, or say that size.",
        harmless=True,
    ),
    "no-ultralytics": Message(
        "Ultralytics",
        "ModuleNotFoundError: No module named 'ultralytics'",
        (r"No module named 'ultralytics'",),
        "Ultralytics is not installed in this environment",
        hints.NO_ULTRALYTICS,
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # OpenCV, NumPy, protobuf
    "libgl": Message(
        "OpenCV",
        "ImportError: libGL.so.1: cannot open shared object file: No such file or directory",
        (r"(?P<library>lib(?:GL|gthread-2\.0|SM|Xext|Xrender|ICE)\.so\.\d+): cannot open shared object file",),
        "opencv-python needs libraries of a desktop, which a server or container has not",
        "Install opencv-python-headless in the place of opencv-python, or the libraries: apt-get install libgl1 "
        "libglib2.0-0.",
    ),
    "no-window": Message(
        "OpenCV",
        "error: (-2:Unspecified error) The function is not implemented. Rebuild the library with Windows, "
        "GTK+ 2.x or Cocoa support.",
        (r"The function is not implemented\. Rebuild the library with Windows, GTK",),
        "opencv-python-headless has no windows",
        "Write pictures, acmix-deploy detect MODEL SOURCE -o OUT, or install opencv-python in its place.",
    ),
    "no-image": Message(
        "OpenCV",
        "error: (-215:Assertion failed) !_src.empty() in function 'cvtColor'",
        (r"!_src\.empty\(\) in function '(?P<function>\w+)'", r"!ssize\.empty\(\) in function '(?P<function>\w+)'"),
        "there is no image: imread gave None, since the file is not there or is no picture",
        "Check the path; acmix-deploy detect names the files that it cannot read.",
    ),
    "numpy-2": Message(
        "NumPy",
        "A module that was compiled using NumPy 1.x cannot be run in NumPy 2.2.6 as it may crash.",
        (
            r"compiled using NumPy 1\.x cannot be run in NumPy (?P<version>\d[\w.]*\w)",
            r"_ARRAY_API not found",
            r"numpy\.core\.multiarray failed to import",
            r"numpy\.dtype size changed, may indicate binary incompatibility",
        ),
        "a package was compiled for another major release of NumPy than the one that is installed",
        _NUMPY_2,
    ),
    "numpy-1": Message(
        "NumPy",
        "ModuleNotFoundError: No module named 'numpy._core'",
        (r"No module named 'numpy\._core(?:\.\w+)*'",),
        "a file was written with NumPy 2 and is read with NumPy 1",
        "Run: pip install --upgrade numpy",
    ),
    "numpy-names": Message(
        "NumPy",
        "AttributeError: module 'numpy' has no attribute 'float'.",
        (
            r"module 'numpy' has no attribute '(?P<name>\w+)'",
            r"`?np\.(?P<name>\w+)`? was (?:removed in|a deprecated alias)",
        ),
        "a package uses a name that this NumPy no longer has",
        "Update the package that the traceback ends in, or install the NumPy of its time, below 2 or 1.24.",
    ),
    "protobuf-descriptors": Message(
        "protobuf",
        "TypeError: Descriptors cannot be created directly.",
        (r"Descriptors cannot (?:not )?be created directly",),
        "a package holds code that an older protobuf compiler generated",
        "Update that package, or install an older protobuf: pip install 'protobuf<3.21'",
    ),
    "old-protobuf": Message(
        "protobuf",
        "ImportError: cannot import name 'builder' from 'google.protobuf.internal'",
        (r"cannot import name '(?P<name>builder|runtime_version)' from 'google\.protobuf",),
        "a package holds code that a newer protobuf compiler generated",
        "Run: pip install --upgrade protobuf",
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # CUDA and its libraries
    "no-kernel-image": Message(
        "CUDA",
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        (r"no kernel image is available for execution on the device",),
        "the program was compiled for GPUs of other architectures",
        f"Of the plugin: acmix-deploy plugin build on this machine, or with its --arch. Of PyTorch: {_OTHER_TORCH}",
    ),
    "old-driver": Message(
        "CUDA",
        "CUDA driver version is insufficient for CUDA runtime version",
        (
            r"CUDA driver version is insufficient for CUDA runtime version",
            r"The NVIDIA driver on your system is too old \(found version (?P<found>\d+)\)",
        ),
        "the driver is older than the CUDA that the program was compiled with, or there is none",
        "Update the driver, or install a build for the CUDA that acmix-deploy doctor shows for the GPU.",
    ),
    "no-device": Message(
        "CUDA",
        "CUDA error: no CUDA-capable device is detected",
        (
            r"no CUDA-capable device is detected",
            r"CUDA initialization failure with error: (?P<code>\d+)",
        ),
        "CUDA finds no GPU here, or may not use it",
        "See whether nvidia-smi shows one; a container needs --gpus all or --runtime nvidia. acmix-deploy doctor says "
        "what is found.",
    ),
    "no-libnvinfer": Message(
        "CUDA",
        "ImportError: libnvinfer.so.8: cannot open shared object file: No such file or directory",
        (r"(?P<library>lib(?:nvinfer|nvonnxparser)\w*\.so[\w.]*): cannot open shared object file",),
        "the libraries of TensorRT, of that major release, are not where the system looks",
        "Add their folder to LD_LIBRARY_PATH, or install that release. acmix-deploy plugin build makes a plugin for "
        "the one that is here.",
    ),
    "no-cuda-library": Message(
        "CUDA",
        "OSError: libcudnn.so.8: cannot open shared object file: No such file or directory",
        (
            r"(?P<library>lib(?:cudnn|cublas|cublasLt|cudart|cufft|curand|cusolver|cusparse|nvrtc|cupti|nvJitLink)\w*"
            r"\.so[\w.]*): cannot open shared object file",
            r"Could not load library (?P<library>libcudnn\w*\.so[\w.]*)",
        ),
        "a library of CUDA or cuDNN, of that major release, is not where the system looks",
        "Install that release, or a build of the program for the one that is here; a folder of its own goes into "
        "LD_LIBRARY_PATH.",
    ),
    "plugin-of-another-tensorrt": Message(
        "Linux",
        "OSError: ./libacmix_plugin.so: undefined symbol: getPluginRegistry",
        (r"libacmix_plugin\.so: undefined symbol: (?P<symbol>\w+)",),
        "the plugin was compiled for another TensorRT",
        "Compile it here: acmix-deploy plugin build.",
    ),
    "newer-system": Message(
        "Linux",
        "/lib/libc.so.6: version `GLIBC_2.34' not found (required by ./libacmix_plugin.so)",
        (r"version [`'](?P<version>(?:GLIBC|GLIBCXX|CXXABI)_[\d.]+\d)' not found",),
        "the library was compiled on a newer system than this one",
        "Compile it here, the plugin with acmix-deploy plugin build, or take a build for this system.",
    ),
    "illegal-instruction": Message(
        "Linux",
        "Illegal instruction (core dumped)",
        (r"Illegal instruction\b(?: \(core dumped\))?",),
        "a library uses instructions that this processor does not have; on a Jetson Nano or TX2 it is the OpenBLAS of "
        "NumPy 1.19, which takes the processor for another",
        "There: export OPENBLAS_CORETYPE=ARMV8. Elsewhere install a build for this processor.",
    ),
    "static-tls": Message(
        "Linux",
        "ImportError: libgomp.so.1: cannot allocate memory in static TLS block",
        (r"(?P<library>lib[\w.+-]+): cannot allocate memory in static TLS block",),
        "the library needs memory of threads that others took before it, as on 64-bit ARM",
        "Import its package first, or name the whole path: export LD_PRELOAD=/path/of/that/library.",
    ),
    # -----------------------------------------------------------------------------------------------------------------
    # Python, pip
    "no-tensorrt": Message(
        "Python",
        "ModuleNotFoundError: No module named 'tensorrt'",
        (r"No module named 'tensorrt'", r"No matching distribution found for (?P<package>tensorrt[\w=.<>-]*)"),
        "TensorRT is not there for this Python",
        hints.NO_TENSORRT,
    ),
    "no-wheel": Message(
        "pip",
        "ERROR: torch-2.3.0-cp310-cp310-linux_aarch64.whl is not a supported wheel on this platform.",
        (
            r"ERROR: (?P<wheel>[\w.+-]+\.whl) is not a supported wheel on this platform",
            r"\.whl is not a supported wheel on this platform",
            r"No matching distribution found for (?P<package>(?:onnxruntime-gpu|torch|torchvision)\b[\w=.<>-]*)",
        ),
        "there is no such package for this Python and processor",
        "Take the Python that its file name tells (cp310 is 3.10), or NVIDIA's builds for Jetsons: docs/jetson.md.",
    ),
    "managed-environment": Message(
        "pip",
        "error: externally-managed-environment",
        (r"externally-managed-environment",),
        "the system's Python is left to its package manager",
        "Make an environment: python3 -m venv --system-site-packages venv, which sees the TensorRT of a Jetson.",
    ),
}
