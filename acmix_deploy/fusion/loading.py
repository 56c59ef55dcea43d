"""Whether ONNX Runtime loads a fused file, and which images it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.errors import CheckFailed
from acmix_deploy.fusion.sizes import Need, Source, smallest_image
from acmix_deploy.graph import keep
from acmix_deploy.runtime.onnxruntime import why_refused


def note_smallest_image(model: onnx.ModelProto, needs: list[Need]) -> None:
    """Write into the metadata for which images all fused blocks are defined, those of an earlier run among them."""
    metadata = ModelMetadata.of(model)
    found = smallest_image(model, needs, metadata.stride)
    smallest = [max(pair) for pair in zip(found, metadata.min_size, strict=True)]
    if smallest != [1, 1]:
        onnx.helper.set_model_props(model, metadata.updated(min_size=smallest).entries)


def by_operator(inputs: Sequence[Source]) -> dict[str, list[str]]:
    """Names of the nodes that ONNX Runtime does not know, by their operator."""
    found: dict[str, list[str]] = {}
    for source in inputs:
        if source.operator and (name := source.tensor.inputs[0].name) not in found.setdefault(source.operator, []):
            found[source.operator].append(name)
    return found


def refusal(fused: onnx.ModelProto, model: onnx.ModelProto, source: Path, inputs: Sequence[Source]) -> str:
    """Why ONNX Runtime refuses a fused file whose source it refuses too; nothing where it loads it.

    Where that is for operators that it does not know, what is left without them has to load as it did before.

    Raises:
        CheckFailed: it loaded what it now refuses.
    """
    refused = why_refused(fused)
    if not refused:
        return ""
    rest = [_without_unknown(one, inputs) for one in (fused, model)]
    for after, before in ((refused, why_refused(model)), (refused, why_refused(source)), [*map(why_refused, rest)]):
        if after and not before:
            raise CheckFailed(f"the fused file cannot be used: {after}")
    return refused


def _without_unknown(model: onnx.ModelProto, inputs: Sequence[Source]) -> onnx.ModelProto:
    """The model with inputs in the place of nodes that ONNX Runtime does not know."""
    unknown = {source.tensor.name: source for source in inputs if source.operator}
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    keep(rest.graph.node, [node for node in rest.graph.node if not unknown.keys() & set(node.output)])
    keep(rest.graph.output, [value for value in rest.graph.output if value.name not in unknown])
    keep(rest.graph.value_info, [value for value in rest.graph.value_info if value.name not in unknown])
    for name, source in unknown.items():
        dtype = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(source.tensor.dtype or np.float32))
        rest.graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, source.shape))
    return rest
