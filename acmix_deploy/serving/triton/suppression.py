"""What follows a network that has no non-maximum suppression, as a graph of standard operators for ONNX Runtime."""

from __future__ import annotations

import onnx
from onnx import parser

from acmix_deploy.detection.boxes import IOU, MOST

OPSET = 17

_GRAPH = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
suppression ({element}[batch, rows, anchors] predictions) => (
    int32[batch, 1] num_detections, float[batch, {most}, 4] detection_boxes,
    float[batch, {most}] detection_scores, int32[batch, {most}] detection_classes
)
<
    float zero = {{0}}, float half = {{0.5}}, int64[6] border = {{0, 0, 0, 0, 0, {most}}},
    int64[1] zeroth = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] four = {{4}},
    int64[1] end = {{{end}}}, int64[1] last = {{-1}}, int64[2] outer = {{0, 2}},
    int64 first = {{0}}, int64 step = {{1}},
    int64[1] most = {{{most}}}, float[1] iou = {{{iou:.9g}}}, float[1] confidence = {{{confidence:.9g}}}
>
{{
    output = Cast <to = 1> (predictions)
    filled = Pad (output, border, zero)
    centre = Slice (filled, zeroth, two, one)
    size = Slice (filled, two, four, one)
    scores = Slice (filled, four, end, one)

    nothing = Mul (filled, zero)
    sums = ReduceSum (nothing, one)
    broken = IsNaN (sums)
    finite = Not (broken)
    classes = Shape <start = 1, end = 2> (scores)
    count = Squeeze (classes, zeroth)
    indices = Range (first, count, step)
    every_class = Unsqueeze (indices, outer)
    kind = ArgMax <axis = 1> (scores)
    best = Equal (kind, every_class)
    counted = And (best, finite)
    candidates = Where (counted, scores, zero)

    boxes = Concat <axis = 1> (centre, size)
    by_anchor = Transpose <perm = [0, 2, 1]> (boxes)
    selected = NonMaxSuppression <center_point_box = 1> (by_anchor, candidates, most, iou, confidence)
    where = Gather <axis = 1> (selected, outer)
    best_scores = ReduceMax <axes = [1], keepdims = 0> (candidates)
    selected_scores = GatherND (best_scores, where)
    shape = Shape (best_scores)
    none = ConstantOfShape (shape)
    kept = ScatterND (none, where, selected_scores)
    detection_scores, anchor = TopK (kept, most)

    found = Greater (detection_scores, zero)
    ones = Cast <to = 6> (found)
    num_detections = ReduceSum (ones, one)
    flat_kind = Squeeze (kind, one)
    found_kind = GatherElements <axis = 1> (flat_kind, anchor)
    whole_kind = Cast <to = 6> (found_kind)
    detection_classes = Mul (whole_kind, ones)

    reach = Mul (size, half)
    low = Sub (centre, reach)
    high = Add (centre, reach)
    edges = Concat <axis = 1> (low, high)
    corners = Transpose <perm = [0, 2, 1]> (edges)
    which = Unsqueeze (anchor, last)
    found_corners = GatherND <batch_dims = 1> (corners, which)
    is_box = Unsqueeze (found, last)
    detection_boxes = Where (is_box, found_corners, zero)
}}
"""


def suppression(confidence: float, *, float16: bool = False) -> onnx.ModelProto:
    """A graph that finds what :func:`acmix_deploy.detection.boxes.decode` finds, with as many rows for each image.

    It takes ``predictions`` [B, 4 + classes, anchors] and gives what is in an image, the highest score first, then
    zeros: ``num_detections`` [B, 1] int32, ``detection_boxes`` [B, 300, 4] float32, corners in pixels of the network's
    input, ``detection_scores`` [B, 300] float32 and ``detection_classes`` [B, 300] int32.

    Anchors of zeros come first behind those that are given, so that there are 300 to choose from. What is not finite
    is NaN when it is multiplied by 0, which excludes its anchor.

    Args:
        confidence: scores have to be above it.
        float16: ``predictions`` are in half precision, else float32.
    """
    text = _GRAPH.format(
        ir_version=8,
        opset=OPSET,
        element="float16" if float16 else "float",
        most=MOST,
        end=2**63 - 1,
        iou=IOU,
        confidence=confidence,
    )
    model = parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return model
