"""Running the network of a file that suppresses boxes, and proving that it suppresses them as it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from acmix_deploy.detection.boxes import suppressed
from acmix_deploy.detection.heads import Head, head_of
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.detection.rows import paired
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.errors import CheckFailed
from acmix_deploy.half import faithful
from acmix_deploy.options import Provider
from acmix_deploy.processing import suppression_alone, with_network_output
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.runtime.onnxruntime import OnnxRunner, metadata_of, open_session

_DRAWN = 40  # boxes in an image
_ROUNDING = 1e-5
"""By which overlaps of boxes in float32 are off."""


class NetworkRunner(OnnxRunner):
    """Gives what the network gives within a file that suppresses boxes. The file's own rows have to be those that
    :func:`acmix_deploy.detection.boxes.suppressed` keeps of that, else CheckFailed is raised.

    Args:
        model: the file; where it holds float16 and runs on a CPU, it is rounded as it says.
        name: how reports call it.
        provider, plugin: see :func:`acmix_deploy.runtime.onnxruntime.open_session`.
    """

    _model: Path | onnx.ModelProto

    def __init__(
        self, model: Path | onnx.ModelProto, name: str, *, provider: Provider = "cpu", plugin: Path | None = None
    ) -> None:
        # First, since what raises below leaves an object that polygraphy looks at when it goes.
        super().__init__(lambda: open_session(self._model, provider=provider, plugin=plugin), name=name)
        both, self._inner = with_network_output(model)
        self._model, self.unrounded = faithful(both) if provider == "cpu" else (both, "")
        self.rounded = self._model is not both
        self.suppression = ModelMetadata.of(both).suppression
        """How the file suppresses boxes."""
        self.boxes = 0
        """How many were kept up to now."""

    @property
    def told(self) -> str:
        """What was compared, as a sentence."""
        compared = f"{self.name} suppresses boxes: the network in it was compared"
        if not self.boxes:
            return f"{compared}; it kept none in these inputs, which shows nothing of what it keeps: give images"
        return f"{compared}, and its boxes, {self.boxes} in all inputs, are those that suppression outside it keeps"

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of the network by name, which are called as the file calls its own."""
        outputs = super().infer_impl(feed_dict)
        predictions = outputs.pop(self._inner)
        ((name, rows),) = outputs.items()
        metadata, suppression = metadata_of(self.sess), self.suppression
        assert suppression
        given = {name: predictions}
        head = head_of(metadata.with_suppression(None), {name: predictions.shape})
        if not _same(head, given, rows, suppression):
            shape = ", ".join(f"{key} {list(array.shape)}" for key, array in feed_dict.items())
            raise CheckFailed(f"{self.name} keeps other boxes than suppression outside the file, on {shape}")
        self.boxes += int(np.count_nonzero(rows[..., 4]))
        return given


def check_suppression(model: onnx.ModelProto, name: str) -> None:
    """Run what is behind the network of a file that suppresses boxes by itself, on drawn boxes most of which overlap:
    on noise a detector finds none.

    Args:
        model: the file.
        name: how an error calls it.

    Raises:
        CheckFailed: it keeps others than :func:`acmix_deploy.detection.boxes.suppressed`.
    """
    metadata = ModelMetadata.of(model)
    alone = suppression_alone(model)
    (node,), (output,) = alone.graph.input, alone.graph.output
    dims = [dim.dim_value or None for dim in node.type.tensor_type.shape.dim]
    head = head_of(metadata.with_suppression(None), {output.name: dims})
    free = {0: 2, 3 - head.axis: _DRAWN}
    rng = np.random.default_rng(0)
    drawn = rng.random([size or free[axis] for axis, size in enumerate(dims)])
    boxes = drawn if head.axis == 2 else drawn.swapaxes(1, 2)
    boxes[..., :4] = 30 + boxes[..., :4] * (80, 80, 40, 40)
    boxes[..., 4:] *= rng.random((*boxes.shape[:2], 1))  # best scores of all heights, however many classes there are
    boxes[:, _DRAWN:, 4:] = 0
    predictions = drawn.astype(helper.tensor_dtype_to_np_dtype(node.type.tensor_type.elem_type))
    (rows,) = open_session(alone).run(None, {node.name: predictions})
    assert metadata.suppression
    if not _same(head, {output.name: predictions}, rows, metadata.suppression):
        raise CheckFailed(f"{name} keeps other boxes than suppression outside the file, of drawn ones")


def _same(head: Head, given: Mapping[str, Array], rows: Array, suppression: Suppression) -> bool:
    """Whether rows are what is kept of predictions, by an overlap that rounding may have moved; which of equal scores
    comes first is left open."""
    name, told = head.output, Head("detect", "rows", head.output, head.classes)
    for change in (0, -_ROUNDING, _ROUNDING):
        moved = min(max(suppression.iou + change, 0.0), 1.0)
        wanted = suppressed(head, given, suppression.model_copy(update={"iou": moved}))
        if wanted.shape != rows.shape:
            return False
        if _near(wanted, rows):
            return True
        right, other = paired(told, {name: wanted}, {name: rows}, 0)
        if _near(right[name], other[name]):
            return True
    return False


def _near(expected: Array, actual: Array) -> bool:
    return np.allclose(expected, actual, rtol=1e-5, atol=1e-3, equal_nan=True)
