"""What ONNX Runtime and ONNX say of a file that they do not take, as what is wrong with it and what to do."""

from __future__ import annotations

import re
from dataclasses import dataclass

from acmix_deploy.errors import UserError
from acmix_deploy.runtime.reason import reason

_PLACE = re.compile(r"Load model from .*? failed:\s*|/\S+:\d+ .*?\) (?=[A-Z])|\w+\.cc:\d+ \w+ ")
"""What ONNX Runtime says of the file's name and of places in its own source."""


@dataclass(frozen=True)
class Refusal:
    """One message, and what it means. The two sentences name groups of the words in braces."""

    example: str
    words: str
    """Regular expression of what is said."""
    wrong: str
    """What is wrong; ``{runtime}`` is the ONNX Runtime that says so."""
    hint: str
    """What to do; a sentence."""
    quoted: bool = False
    """Whether the words themselves say more than ``wrong``."""
    ambiguous: bool = False
    """Whether others than ONNX and ONNX Runtime say the same of other things."""


REFUSALS: dict[str, Refusal] = {
    "ir-version": Refusal(
        "Unsupported model IR version: 11, max supported IR version: 10",
        r"Unsupported model IR version: (?P<version>\d+), max supported IR version: (?P<newest>\d+)",
        "its IR version, that of the file format, is {version}, and {runtime} reads {newest} at most",
        "Update ONNX Runtime, or export it with an older onnx; where nothing newer is used, model.ir_version = "
        "{newest} and onnx.save are enough.",
    ),
    "opset": Refusal(
        "Opset 23 is under development and support for this is limited. Current official support for domain "
        "ai.onnx is till opset 21.",
        r"Opset (?P<opset>\d+) is under development.*domain (?P<domain>\S+) is till opset (?P<newest>\d+)",
        "its opset of {domain} is {opset}, and {runtime} knows {newest} at most",
        "Export it again with opset {newest} or below, or update ONNX Runtime.",
    ),
    "no-definition": Refusal(
        "Fatal error: acmix:AcmixAttention(-1) is not a registered function/op",
        r"Fatal error: (?P<domain>acmix):(?P<operator>[^\s(]+)\(-?\d+\) is not a registered function/op",
        "{domain}::{operator} has no definition in it, as in files for TensorRT with the plugin",
        "Take the file with definitions or in standard operators, as export and fuse write them.",
    ),
    "no-such-operator": Refusal(
        "Fatal error: mmdeploy:TRTBatchedNMS(-1) is not a registered function/op",
        r"Fatal error: (?P<domain>[^\s:]+):(?P<operator>[^\s(]+)\(-?\d+\) is not a registered function/op",
        "{domain}::{operator} is no operator of {runtime}, and the file does not define it",
        "Only a program with the library of {domain} runs it. Export the model without that operator.",
    ),
    "no-opset-import": Refusal(
        'In Node, ("n7", Gelu, "com.microsoft", -1) : ("x": tensor(float),) -> '
        "(\"y\": tensor(float),) , Error No opset import for domain 'com.microsoft'",
        r"\(\"(?P<node>[^\"]*)\", (?P<operator>\w+), .*No opset import for domain '?(?P<domain>[^'\s]*)'?",
        "node '{node}' is of the operator {domain}::{operator}, and the file does not say of which version "
        "that domain is",
        "What wrote the file left it out of opset_import: export it again.",
    ),
    "operator-of-another-opset": Refusal(
        'In Node, ("n7", Gelu, "", -1) : ("x": tensor(float),) -> ("y": '
        "tensor(float),) , Error No Op registered for Gelu with domain_version of 17",
        r"\(\"(?P<node>[^\"]*)\", .*No Op registered for (?P<operator>\S+) with domain_version of (?P<opset>\d+)",
        "node '{node}' is of the operator {operator}, which opset {opset} does not have",
        "Export it with the opset that has it, or with standard operators in its place.",
    ),
    "types": Refusal(
        "Type Error: Type parameter (T) of Optype (Add) bound to different types (tensor(float16) and "
        "tensor(float) in node (n7).",
        r"bound to different types|Type Error: ",
        "element types do not fit each other there",
        "Export the model in float32; acmix-deploy export --fp16 and quantize make smaller types of it.",
        quoted=True,
    ),
    "no-conv-of-type": Refusal(
        "NOT_IMPLEMENTED : Could not find an implementation for Conv(11) node with name '/model.4/conv_p/Conv'",
        r"Could not find an implementation for (?:the node \S+:)?Conv\(\d+\)",
        "{runtime} has no Conv of that type",
        "Where an exporter made the position term of a block float64, `acmix-deploy fuse` repairs it; else export the "
        "model in float32.",
        quoted=True,
    ),
    "no-operator-of-type": Refusal(
        "NOT_IMPLEMENTED : Could not find an implementation for Trilu(14) node with name '/model.4/Trilu'",
        r"Could not find an implementation for (?:the node \S+:)?(?P<operator>\w+)\(\d+\)",
        "{runtime} has no {operator} of the type that it has there",
        "Export the model in float32.",
        quoted=True,
    ),
    "no-weights": Refusal(
        'External data path does not exist: "model.onnx.data"',
        r"(?:External data path does not exist: \"|TensorProto .*should be stored in )(?P<file>[^\"',]+)",
        "its weights are in {file}, which is not there",
        "Copy that file along, and keep its name.",
    ),
    "no-weights-file": Refusal(
        "No such file or directory: 'model.onnx.data'",
        r"No such file or directory: '(?P<file>[^\"',]+)",
        "its weights are in {file}, which is not there",
        "Copy that file along, and keep its name.",
        ambiguous=True,
    ),
    "short-weights": Refusal(
        "External initializer: conv.weight offset: 0 size to read: 4096 given file_length: 12 are out of "
        "bounds or can not be read in full.",
        r"External initializer: (?P<tensor>\S+) .*file_length: (?P<bytes>\d+) are out of bounds",
        "the file of its weights has {bytes} bytes, too few for {tensor}",
        "Copy both files again.",
    ),
    "no-protobuf": Refusal(
        "INVALID_PROTOBUF : Load model from model.onnx failed:Protobuf parsing failed.",
        r"[Pp]rotobuf parsing failed|Error parsing message|Wire format was corrupt",
        "its content is not what ONNX files hold",
        "Export, copy or download it again.",
    ),
    "invalid-model": Refusal(
        "INVALID_GRAPH : This is an invalid model. Error: the graph is not acyclic.",
        r"This is an invalid model\b|Invalid model\.|ShapeInferenceError|No graph was found",
        "it is not as ONNX defines models",
        "Export it again; what changed it since has to be mended.",
        quoted=True,
    ),
}


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
    for refusal in REFUSALS.values():
        if found := re.search(refusal.words, text):
            named = {**found.groupdict(), "runtime": _here()}
            wrong, hint = refusal.wrong.format_map(named), refusal.hint.format_map(named)
            if refusal.quoted:
                return reason(RuntimeError(text)), f"{wrong[0].upper()}{wrong[1:]}. {hint}"
            return wrong, hint
    return reason(RuntimeError(text)) if text else type(error).__name__, ""


def _here() -> str:
    import onnxruntime

    return f"ONNX Runtime {onnxruntime.__version__}"
