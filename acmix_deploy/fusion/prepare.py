"""Bring a foreign ONNX file to the form that recognition starts from."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import version_converter

from acmix_deploy.errors import UserError
from acmix_deploy.graph import DOUBLE, as_float32, check, name_nodes, read
from acmix_deploy.operators.function_builder import OPSETS
from acmix_deploy.runtime.onnxruntime import ir_version


def load(path: Path) -> onnx.ModelProto:
    """Read an ONNX file at an opset that the operators' bodies are valid in, converting older ones.

    Conversion comes before fusion because onnx's converter drops functions. float64 becomes float32 throughout: it is
    an accident of exporters (``torch.linspace``), which spreads from the position term to everything behind it, and
    neither ONNX Runtime nor TensorRT can convolve in it.

    Raises:
        UserError: there is no such file, it is no ONNX file, not a valid one, or its opset is out of range.
    """
    model = read(path)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is None:
        raise UserError(f"{path} holds no ONNX graph", "Give the file that an exporter wrote.")
    if opset > OPSETS[-1]:
        raise UserError(
            f"{path} has opset {opset}; {OPSETS[0]} to {OPSETS[-1]} are supported, and 13 to 16 are converted",
            f"Export it with --opset {OPSETS[-1]} or below.",
        )
    if opset < OPSETS[0]:
        try:
            model = version_converter.convert_version(model, OPSETS[0])
        except Exception as error:  # the converter raises RuntimeError and its own types
            raise UserError(
                f"{path} has opset {opset} and cannot be converted to {OPSETS[0]}: {str(error).splitlines()[0]}",
                f"Export it with --opset {OPSETS[0]}.",
            ) from error
    model.ir_version = ir_version(max(opset, OPSETS[0]))
    check(model, path)
    as_float32(model, DOUBLE)
    name_nodes(model)
    return model
