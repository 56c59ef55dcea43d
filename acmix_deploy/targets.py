"""What a file is made for: the versions of TensorRT, what each takes, and the JetPack releases that carry them; and
other runtimes.

Pure data, the one place for it. A workstation cannot know what a Jetson runs, so a target is named (``--for``) or taken
from the TensorRT that was found (:func:`target_of`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from acmix_deploy.errors import UserError, did_you_mean

Form = Literal["any", "plugin", "plain"]
"""How a file carries the custom operators: "any" as nodes with their definitions, "plugin" as nodes alone, "plain" not
at all, their definitions in their place."""

Precision = Literal["float32", "float16", "int8"]
"""The lowest type that a file computes in; what int8 does not cover may be of either other type."""

Int8Scheme = Literal["symmetric", "uint8"]
"""How a file in INT8 is quantised: "symmetric" at inputs of layers, int8 with zero points of 0; "uint8" at inputs and
outputs with zero points, and at biases."""

Version = tuple[int, int]

OPSETS = range(17, 22)
"""Of the files that are written here. Function bodies use operators as opset 17 defines them, and hold in all of these.
"""

DEFAULT_OPSET = 18
"""Of exported files, where the target reads it: what PyTorch's exporter is written for."""

INT8_OPSET = 19
"""Of exported files that become INT8, where the target reads it: the first in which scales can be float16."""

_READ_SINCE: tuple[tuple[Version | None, str], ...] = (
    (
        None,
        "AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CausalConvWithState "
        "CenterCropPad Col2Im Compress ConcatFromSequence ConvInteger CumProd DFT Det DynamicQuantizeLinear "
        "ImageDecoder LinearAttention MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Multinomial "
        "NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul "
        "RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength "
        "SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit SwiGLU "
        "TfIdfVectorizer Unique",
    ),
    ((8, 6), "GroupNormalization IsInf LayerNormalization"),
    ((10, 0), "CastLike Gelu Hardmax Mish"),
    ((10, 1), "DeformConv"),
    ((10, 4), "BlackmanWindow HammingWindow HannWindow"),
    ((10, 5), "STFT"),
    ((10, 14), "Attention"),
    ((10, 15), "RMSNormalization RotaryEmbedding TensorScatter"),
    ((11, 1), "Swish"),
)
READ_SINCE = {operator: since for since, operators in _READ_SINCE for operator in operators.split()}
"""Standard operators that TensorRT 8.5 does not read: the first release that does, None where none is known to.

From onnx-tensorrt: the importers that are registered at 8.5 and 8.6 (builtin_op_importers.cpp) and at 10.0 and 10.1
(onnxOpImporters.cpp), docs/Changelog.md up to 10.15, and docs/operators.md at 8.5, 8.6, 10.0, 10.1, 10.15 and 11.1. At
8.5 the last is behind the importers: HardSwish, Mod and OneHot have one. Swish is in the list of 11.1 and not in that
of 10.15; what lies between was not seen. Operators of opset 25 and later are in no list. The parser of TensorRT-RTX
1.7.1 agrees up to opset 24, but for DeformConv, whose plugin it does not have."""


UNBUILT_BY_RTX = frozenset({"NonMaxSuppression"})
"""Standard operators of ours that TensorRT-RTX's parser reads and its builder has "no runners" for, seen at 1.7.1."""


@dataclass(frozen=True)
class Limit:
    """What a node of a standard operator has to be like for TensorRT to read it."""

    operators: str
    fact: str
    """An attribute; ``to.within``, where the result is no output of the file; ``type``, ``value`` or ``rank`` of an
    input, as in ``x.type``; ``operands`` or ``outputs``, their number."""
    read: Callable[[Any], bool]
    """Whether it is read. Types by ONNX's names; a value as a tuple, None where nodes compute it."""
    told: str
    """What the node has, where it is not; ``{}`` is the fact."""
    since: Version | None = None
    """The first release without this limit; None where none is known."""
    way: str = ""
    """What to do without it."""


_TYPES = {"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT32", "INT64", "INT8", "BOOL", "UINT8"}
_QUANTISED = {"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}
_MAPPINGS = {"half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"}
_QUANTIZE = "acmix-deploy quantize makes one of the float file"
_UNEVEN = "a zero point other than 0"
_LETTERS = "several of two operands each, with a letter for every axis"
_DIAGONAL = re.compile(r"([a-z])[^,]*\1")

LIMITS = (
    Limit("AveragePool LpPool MaxPool", "dilations", lambda sizes: set(sizes) <= {1}, "dilations {}"),
    Limit("LayerNormalization MaxPool", "outputs", lambda count: count == 1, "{} outputs"),
    Limit("BatchNormalization", "training_mode", lambda flag: not flag, "training_mode {}"),
    Limit("Cast", "to", lambda name: name in _TYPES, "the type {}"),
    Limit("Cast", "to.within", lambda name: name != "UINT8", "the type UINT8 elsewhere than at an output"),
    Limit("DeformConv", "pads", lambda pads: pads[: len(pads) // 2] == pads[len(pads) // 2 :], "pads {}"),
    Limit("DequantizeLinear", "x.type", lambda name: name in _QUANTISED, "x of {}", way=_QUANTIZE),
    Limit("DequantizeLinear", "x_zero_point.value", lambda zero: not any(zero or ()), _UNEVEN, way=_QUANTIZE),
    Limit("QuantizeLinear", "y_zero_point.type", lambda name: name in _QUANTISED, "y_zero_point of {}", way=_QUANTIZE),
    Limit("QuantizeLinear", "y_zero_point.value", lambda zero: not any(zero or ()), _UNEVEN, way=_QUANTIZE),
    Limit("Einsum", "equation", lambda text: "." not in text, "an ellipsis", (10, 0), _LETTERS),
    Limit("Einsum", "operands", lambda count: count <= 2, "{} operands", (10, 0), _LETTERS),
    Limit("Einsum", "equation", lambda text: not _DIAGONAL.search(text.split("->")[0]), "a diagonal", (10, 12)),
    Limit("Einsum", "equation", lambda text: text == text.lower(), "capital letters", way="small letters"),
    Limit("GridSample", "X.rank", lambda rank: rank == 4, "{} axes"),
    Limit("Resize", "antialias", lambda flag: not flag, "antialias {}"),
    Limit("Resize", "coordinate_transformation_mode", lambda mode: mode in _MAPPINGS, "the mapping {}"),
    Limit("Resize", "keep_aspect_ratio_policy", lambda policy: policy == "stretch", "the policy {}"),
    Limit("ScatterElements", "reduction", lambda name: name == "none", "reduction {}", (10, 0)),
    Limit(
        *("ScatterND", "reduction", lambda name: name == "none", "reduction {}"),
        way="scatter_add or scatter_reduce in place of index_add, from TensorRT 10.0 on",
    ),
    Limit(
        *("Transpose", "data.type", lambda name: name != "UINT8", "data of {}"),
        way="a Cast before it, as export --input uint8 writes",
    ),
    Limit("TopK", "K.value", lambda k: max(k or (0,)) <= 3840, "K {}"),
    Limit("TopK", "K.value", lambda k: k is not None, "a K that nodes compute", (8, 6), "an export at fixed sizes"),
)
"""Of the limits that onnx-tensorrt states, those that people meet and a file tells. Not looked at: other types,
broadcast axes of Einsum, and what lies within Loop, If and Scan.

From docs/operators.md at 8.5, 8.6, 10.0, 10.1, 10.15 and 11.1, and docs/Changelog.md (ScatterElements at 10.0, Einsum
at 10.12). Where the lists of 8 are silent, from the importers of 8.5, 8.6, 10.0 and 10.1: Einsum since 10.0, TopK since
8.6, and reductions, which those of 8 pass over. NvInfer.h of 8.5 has the 3840 of TopK and the four axes of GridSample.
Mode cubic of Resize is no limit: no list has it, but every importer that was read, at the last two axes. The parser of
TensorRT-RTX 1.7.1 agrees, but that it reads GridSample of five axes and has no plugin for ScatterElements."""

WAYS_OUT = {
    "AffineGrid": "an export at a fixed height and width stores it",
    "BitShift": "export with --opset 17",
    "BitwiseOr": "export with --opset 17, where it belongs to a shift",
    "Col2Im": "a transposed convolution with one-hot kernels in place of fold",
    "ConvInteger": _QUANTIZE,
    "DynamicQuantizeLinear": _QUANTIZE,
    "IsInf": "x.abs() == float('inf') in place of isinf",
    "LayerNormalization": "export with torch.onnx.export(dynamo=False, opset_version=16), then acmix-deploy fuse",
    "MatMulInteger": _QUANTIZE,
    "QLinearConv": _QUANTIZE,
    "QLinearMatMul": _QUANTIZE,
}
"""What to do where an operator is not read, other than a plugin of its name."""


@dataclass(frozen=True)
class Target:
    """What a file has to be like for a release of TensorRT, with the machines that it is on, or for another runtime."""

    name: str
    tensorrt: Version | None
    """Major and minor version; None where something else reads the file."""
    form: Form
    """The form in which this release takes the plugin once it is loaded, or that another runtime reads."""
    opset: int
    """The newest that its parser reads."""
    strongly_typed: bool
    """Whether types come from the file. Else they are permitted by flags of the builder, and the file is float32."""
    cuda: str = ""
    """Version that comes with JetPack; empty where the user chooses."""
    sm: tuple[int, ...] = ()
    """Architectures of the machines that JetPack runs on."""
    package: bool = True
    """Whether this package runs there; JetPack 5.1 has Python 3.8."""
    grouped: bool = False
    """Whether the grouped form of a convolution branch is the faster one there."""
    int8: Int8Scheme = "symmetric"
    """What its kernels in INT8 take."""
    command: str = ""
    """What reads a file there, where that is not TensorRT."""

    @property
    def version(self) -> str:
        """The version of TensorRT as it is written: "10.3"; empty where there is none."""
        return ".".join(map(str, self.tensorrt or ()))

    def reads(self, operator: str) -> bool:
        """Whether this release's parser reads a standard operator; of other runtimes none is known to be missing."""
        if self.tensorrt is None:
            return True
        since = READ_SINCE.get(operator, (8, 5))
        return since is not None and since <= self.tensorrt

    def trtexec(
        self, file: str, engine: str, precision: Precision, shapes: Sequence[Sequence[int]] | None, image: str
    ) -> list[str]:
        """What trtexec of this release is given to build an engine; :meth:`load` where it needs the plugin.

        Args:
            file: ONNX file, in the form that this release takes.
            engine: where the engine goes.
            precision: what it is to compute in.
            shapes: smallest, usual and largest [B, C, H, W], where axes are free.
            image: name of the input.
        """
        assert self.tensorrt
        options = [f"--onnx={file}"]
        if precision != "float32" and not self.strongly_typed:
            options += ["--fp16", *["--int8"] * (precision == "int8")]
        elif precision != "float32" and self.tensorrt < (11, 0):  # from there on there is nothing else
            options.append("--stronglyTyped")
        for name, shape in zip(("min", "opt", "max"), shapes or (), strict=False):
            options.append(f"--{name}Shapes={image}:{by_x(shape)}")
        return [*options, f"--saveEngine={engine}"]

    def load(self, library: str) -> str:
        """What loads a plugin library into trtexec of this release."""
        return f"{'--plugins' if self.tensorrt and self.tensorrt < (8, 6) else '--staticPlugins'}={library}"

    def check_form(self, form: Form) -> None:
        """Raise UserError if this release does not take the plugin, or nothing at all, from a file of that form."""
        if self.tensorrt is None and form not in ("plain", self.form):
            raise UserError(f"{self.name} reads no file of the form {form}", "Leave out --target.")
        if form == "any" and self.form == "plugin":
            raise UserError(
                f"TensorRT {self.version} passes over either the nodes or their definitions in a file of the form any",
                "Use --target plugin, or --target plain to do without the plugin.",
            )

    def check_opset(self, opset: int, what: str) -> None:
        """Raise UserError if this release does not read ``what``, which has that opset."""
        if opset > self.opset:
            raise UserError(
                f"{what} has opset {opset}; {f'TensorRT {self.version}'.strip()} reads {self.opset} at most",
                f"Export with --opset {min(self.opset, DEFAULT_OPSET)}.",
            )


# Releases from ``tensorrt`` up to the next entry. Opsets: docs/operators.md of onnx-tensorrt at 8.5, 8.6, 10.0, 10.1
# and 10.15, which reads up to 24; 21 is the newest that is exported here.
_RELEASES = (
    # IPluginV2DynamicExt. Functions in a file are passed over.
    Target("", (8, 5), "plugin", 17, strongly_typed=False),
    # IPluginV3. A function in the file wins over a loaded plugin.
    Target("", (10, 0), "plugin", 20, strongly_typed=True),
    # A loaded plugin wins.
    Target("", (10, 7), "any", 20, strongly_typed=True),
    # The function wins again, unless the node has the attribute plugin_namespace, which ours have.
    Target("", (10, 15), "any", 21, strongly_typed=True),
)
_NAMES: dict[str, tuple[Version, str, tuple[int, ...]]] = {
    "jetpack-5.1": ((8, 5), "11.4", (72, 87)),
    "jetpack-6.0": ((8, 6), "12.2", (87,)),
    "jetpack-6.1": ((10, 3), "12.6", (87,)),
    "jetpack-6.2": ((10, 3), "12.6", (87,)),
    "jetpack-7.0": ((10, 13), "13", (110,)),
    "jetpack-7.1": ((10, 13), "13", (110,)),
    "jetpack-7.2": ((10, 16), "13", (87, 110)),
    "tensorrt-8.5": ((8, 5), "", ()),
    "tensorrt-8.6": ((8, 6), "", ()),
    "tensorrt-10.3": ((10, 3), "", ()),
    "tensorrt-10.13": ((10, 13), "", ()),
    "tensorrt-11": ((11, 0), "", ()),
}


def by_x(shape: Sequence[int]) -> str:
    """A shape as trtexec spells it: ``1x3x640x640``."""
    return "x".join(map(str, shape))


def target_of(tensorrt: Version) -> Target:
    """The target for a TensorRT that was found, by major and minor version.

    Raises:
        UserError: that release is not supported: older than 8.5, or 9.
    """
    release = next((release for release in reversed(_RELEASES) if (release.tensorrt or tensorrt) <= tensorrt), None)
    version = ".".join(map(str, tensorrt))
    if release is None or tensorrt[0] == 9:
        raise UserError(f"TensorRT {version} is not supported", "Supported: 8.5, 8.6, and 10.0 and later.")
    return replace(release, name=f"tensorrt-{version}", tensorrt=tensorrt)


TARGETS: dict[str, Target] = {
    name: replace(target_of(version), name=name, cuda=cuda, sm=sm, package=name != "jetpack-5.1")
    for name, (version, cuda, sm) in _NAMES.items()
}
"""The targets that have a name."""

RUNTIMES: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            *("onnxruntime", None, "any", OPSETS[-1]),
            strongly_typed=True,
            grouped=True,
            int8="uint8",
            command="acmix-deploy profile",
        ),
        Target("openvino", None, "plain", OPSETS[-1], strongly_typed=True, command="ovc"),
    )
}
"""Targets without TensorRT: ONNX Runtime on a CPU, and OpenVINO, which reads no functions of a file."""

PLAIN = Target("plain", None, "plain", OPSETS[-1], strongly_typed=True)
"""Whatever reads standard operators."""

NEWEST = target_of((11, 1))
"""Reads whatever an older one does."""


def check_opset(opset: int) -> None:
    """Raises UserError where no file of this opset is written here."""
    if opset not in OPSETS:
        raise UserError(f"opset {opset} is not supported; it must be {OPSETS[0]} to {OPSETS[-1]}")


def target_named(name: str) -> Target:
    """The target called ``name``: one of TARGETS or RUNTIMES, or ``tensorrt-MAJOR.MINOR``.

    Raises:
        UserError: there is none of that name, or that TensorRT is not supported.
    """
    named = TARGETS | RUNTIMES
    if name in named:
        return named[name]
    if version := re.fullmatch(r"tensorrt-(\d+)\.(\d+)", name):
        return target_of((int(version[1]), int(version[2])))
    if name == "ncnn":
        raise UserError(
            "ncnn is no target: pnnx takes the first of several indices of a Gather, and what it writes computes "
            "something else, without a word",
            "docs/targets.md tells what was tried.",
        )
    hints = [did_you_mean(name, named), f"Targets: {', '.join(named)}, or tensorrt-MAJOR.MINOR for another version."]
    if re.search("jetson|orin|xavier|nano|agx|thor", name, re.IGNORECASE):
        hints.append("A board is named by its JetPack: apt show nvidia-jetpack, there, tells the release.")
    raise UserError(f"there is no target {name!r}", " ".join(filter(None, hints)))
