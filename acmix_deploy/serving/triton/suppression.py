"""What follows a network that detects, as a graph of standard operators for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import compose, parser

from acmix_deploy.detection.heads import Head
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.nms import OPSET, graph_of

_TOLD = """
<ir_version: 8, opset_import: ["": {opset}]>
told (float[batch, {most}, 6] rows) => (
    int32[batch, 1] num_detections, float[batch, {most}, 4] detection_boxes,
    float[batch, {most}] detection_scores, int32[batch, {most}] detection_classes
)
<
    float nothing_told = {{0}}, float[1] threshold = {{{confidence:.9g}}},
    int64[1] from_0 = {{0}}, int64[1] from_1 = {{1}}, int64[1] from_2 = {{2}},
    int64[1] from_4 = {{4}}, int64[1] from_5 = {{5}}, int64[1] from_6 = {{6}}
>
{{
    boxes_of_rows = Slice (rows, from_0, from_4, from_2)
    scores_of_rows = Slice (rows, from_4, from_5, from_2)
    classes_of_rows = Slice (rows, from_5, from_6, from_2)
    is_none = LessOrEqual (scores_of_rows, threshold)
    is_detection = Not (is_none)
    ones_and_zeros = Cast <to = 6> (is_detection)
    num_detections = ReduceSum <keepdims = 0> (ones_and_zeros, from_1)
    detection_boxes = Where (is_detection, boxes_of_rows, nothing_told)
    scores_left = Where (is_detection, scores_of_rows, nothing_told)
    detection_scores = Squeeze (scores_left, from_2)
    classes_left = Where (is_detection, classes_of_rows, nothing_told)
    whole_classes = Cast <to = 6> (classes_left)
    detection_classes = Squeeze (whole_classes, from_2)
}}
"""

_RANKED = """
<ir_version: 8, opset_import: ["": {opset}]>
ranked ({kind}[batch, {count}, 6] predictions) => (float[batch, {most}, 6] rows)
<int64[1] score = {{4}}, int64[1] behind_score = {{5}}, int64[1] values = {{2}}, int64[1] most = {{{most}}}>
{{
    floats = Cast <to = 1> (predictions)
    scores_as_given = Slice (floats, score, behind_score, values)
    best, order = TopK <axis = 1> (scores_as_given, most)
    rows = GatherND <batch_dims = 1> (floats, order)
}}
"""


def suppression(
    head: Head, dims: Sequence[int | str | None], confidence: float, most: int, *, float16: bool = False
) -> onnx.ModelProto:
    """A graph that finds what :func:`acmix_deploy.detection.boxes.decode` finds, with as many rows for each image.

    It takes ``predictions`` and gives what is in an image, the highest score first, then zeros: ``num_detections``
    [B, 1] int32, ``detection_boxes`` [B, N, 4] float32, corners in pixels of the network's input, ``detection_scores``
    [B, N] float32 and ``detection_classes`` [B, N] int32. Of an image that the network gives NaN for, N detections are
    NaN.

    Args:
        head: what the network gives, of the task "detect": predictions in the layout "anchors" or "objectness"; or
            "rows" of a file that suppresses boxes.
        dims: their axes; not whole numbers where they are free. Of rows the second is fixed.
        confidence: scores have to be above it.
        most: N; no more than the rows of the file, where it gives rows.
        float16: ``predictions`` are in half precision, else float32.
    """
    told = parser.parse_model(_TOLD.format(opset=OPSET, most=most, confidence=confidence))
    if head.layout == "rows":
        kind = "float16" if float16 else "float"
        behind = parser.parse_model(_RANKED.format(opset=OPSET, most=most, count=dims[1], kind=kind))
    else:
        behind = graph_of(Suppression(confidence=confidence, most=most), head, dims, float16=float16)
    model = compose.merge_models(behind, told, io_map=[("rows", "rows")])
    onnx.checker.check_model(model, full_check=True)
    return model
