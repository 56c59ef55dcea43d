"""What ONNX Runtime and ONNX say of a file that they do not take, as what is wrong with it and what to do."""

from __future__ import annotations

import re

import onnxruntime

from acmix_deploy.errors import UserError
from acmix_deploy.runtime.reason import reason

_HERE = f"ONNX Runtime {onnxruntime.__version__}"
_PLACE = re.compile(r"Load model from .*? failed:\s*|/\S+:\d+ .*?\) (?=[A-Z])|\w+\.cc:\d+ \w+ ")
"""What ONNX Runtime says of the file's name and of places in its own source."""

_REFUSALS = (
    # what is said; what is wrong, empty where the words are kept; what to do
    (
        r"Unsupported model IR version: (\d+), max supported IR version: (\d+)",
        rf"its IR version, that of the file format, is \1, and {_HERE} reads \2 at most",
        r"Update ONNX Runtime, or export it with an older onnx; where nothing newer is used, model.ir_version = \2 and "
        "onnx.save are enough.",
    ),
    (
        r"Opset (\d+) is under development.*domain (\S+) is till opset (\d+)",
        rf"its opset of \2 is \1, and {_HERE} knows \3 at most",
        r"Export it again with opset \3 or below, or update ONNX Runtime.",
    ),
    (
        r"Fatal error: (acmix):([^\s(]+)\(-?\d+\) is not a registered function/op",
        r"\1::\2 has no definition in it, as in files for TensorRT with the plugin",
        "Take the file with definitions or in standard operators, as export and fuse write them.",
    ),
    (
        r"Fatal error: ([^\s:]+):([^\s(]+)\(-?\d+\) is not a registered function/op",
        rf"\1::\2 is no operator of {_HERE}, and the file does not define it",
        r"Only a program with the library of \1 runs it. Export the model without that operator.",
    ),
    (
        r"\(\"(.*?)\", (\w+), .*No opset import for domain '?([^'\s]*)'?",
        r"node '\1' is of the operator \3::\2, and the file does not say of which version that domain is",
        "What wrote the file left it out of opset_import: export it again.",
    ),
    (
        r"\(\"(.*?)\", .*No Op registered for (\S+) with domain_version of (\d+)",
        r"node '\1' is of the operator \2, which opset \3 does not have",
        "Export it with the opset that has it, or with standard operators in its place.",
    ),
    (
        r"bound to different types|Type Error",
        "",
        "Element types do not fit each other there. Export the model in float32; acmix-deploy export --fp16 and "
        "quantize make smaller types of it.",
    ),
    (
        r"Could not find an implementation for Conv\(\d+\)",
        "",
        f"{_HERE} has no Conv of that type. Where an exporter made the position term of a block float64, `acmix-deploy "
        "fuse` repairs it; else export the model in float32.",
    ),
    (
        r"Could not find an implementation for (\S+?)\(\d+\)",
        "",
        rf"{_HERE} has no \1 of the type that it has there. Export the model in float32.",
    ),
    (
        r"(?:External data path does not exist: \"|should be stored in |No such file or directory: ')([^\"',]+)",
        r"its weights are in \1, which is not there",
        "Copy that file along, and keep its name.",
    ),
    (
        r"External initializer: (\S+) .*file_length: (\d+) are out of bounds",
        r"the file of its weights has \2 bytes, too few for \1",
        "Copy both files again.",
    ),
    (
        r"Protobuf parsing failed|Error parsing message|Wire format was corrupt",
        "its content is not what ONNX files hold",
        "Export, copy or download it again.",
    ),
    (
        r"This is an invalid model|Invalid model\.|ShapeInferenceError|No graph was found",
        "",
        "It is not as ONNX defines models: export it again; what changed it since has to be mended.",
    ),
)


def refused(name: str, error: BaseException) -> UserError:
    """For a model called ``name`` that ONNX Runtime does not open."""
    said, hint = _told(error)
    return UserError(f"ONNX Runtime refuses {name}: {said}", hint)


def unreadable(name: object, error: BaseException) -> UserError:
    """For a file that ONNX does not read."""
    said, hint = _told(error)
    return UserError(f"{name} cannot be read as an ONNX file: {said}", hint)


def _told(error: BaseException) -> tuple[str, str]:
    """What is wrong, and what to do: empty where nothing is known that is true."""
    text = _PLACE.sub("", " ".join(str(error).split()))
    for pattern, wrong, hint in _REFUSALS:
        if found := re.search(pattern, text):
            return found.expand(wrong) or reason(RuntimeError(text)), found.expand(hint)
    return reason(RuntimeError(text)) if text else type(error).__name__, ""
