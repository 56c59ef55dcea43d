"""Non-maximum suppression as a graph of standard operators, in the ways that TensorRT reads from 8.5 on.

Before 10.0 its parser passes over start and end of Shape, and before 8.6 it takes a constant K of TopK alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper, parser

from acmix_deploy.detection.heads import Head
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.graph import keep

OPSET = 17
"""Of the graph, which holds in later ones as well."""

CONSIDERED = 3840
"""Boxes of an image among which overlaps are looked for, those of the highest scores: the most that TensorRT ranks."""

_GRAPH = """
<ir_version: 8, opset_import: ["": {opset}]>
suppression ({element}[{dims}] predictions) => (float[batch, {most}, 6] rows)
<
    float zero = {{0}}, float half = {{0.5}}, float largest = {{3.4e38}}, float beyond = {{{considered}}},
    int64 first = {{0}}, int64 second = {{2}}, int64 step = {{1}},
    int64[1] zeroth = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}},
    int64[1] four = {{4}}, int64[1] five = {{5}},
    int64[1] end = {{{end}}}, int64[1] last = {{-1}}, int64[4] border = {{0, 0, 0, {border}}},
    int64[1] considered = {{{considered}}}, int64[1] lowest = {{{lowest}}},
    int64[1] most = {{{most}}}, float[1] iou = {{{iou:.9g}}}, float[1] confidence = {{{confidence:.9g}}}
>
{{
    output = Cast <to = 1> (predictions)
    {scores}
    class = ArgMax <axis = 1> (scores)
    best = GatherElements <axis = 1> (scores, class)
    above = Greater (best, confidence)
    sizes = Shape (values)
    batch = Slice (sizes, zeroth, one)
    height = Slice (sizes, one, two)
    row = Concat <axis = 0> (one, height)
    ones = ConstantOfShape <value = float[1] {{1}}> (row)
    sums = MatMul (ones, values)
    size_of_sums = Abs (sums)
    finite = Less (size_of_sums, largest)
    is_counted = And (above, finite)
    sums_of_scores = ReduceSum (scores, one)
    size_of_scores = Abs (sums_of_scores)
    finite_scores = Less (size_of_scores, largest)
    below = LessOrEqual (best, confidence)
    harmless = And (finite_scores, below)
    sound = Or (finite, harmless)
    spoilt = Where (sound, zero, sums)
    nan_where_spoilt = Mul (spoilt, zero)
    nan_or_nothing = ReduceSum (nan_where_spoilt, two)
    counted = Where (is_counted, best, zero)
    by_anchor = Squeeze (counted, one)
    enough = Pad (by_anchor, border, zero)
    ranked, anchor = TopK <axis = 1> (enough, considered)

    anchors = Slice (sizes, two, three)
    last_anchor = Sub (anchors, one)
    there = Min (anchor, last_anchor)
    which = Unsqueeze (there, last)
    extent = Slice (values, zeroth, four, one)
    boxes = Transpose <perm = [0, 2, 1]> (extent)
    box = GatherND <batch_dims = 1> (boxes, which)
    kinds = Transpose <perm = [0, 2, 1]> (class)
    kind = GatherND <batch_dims = 1> (kinds, which)
    score = Unsqueeze (ranked, last)
    centre = Slice (box, zeroth, two, two)
    size = Slice (box, two, four, two)
    reach = Mul (size, half)
    low = Sub (centre, reach)
    high = Add (centre, reach)
    corners = Concat <axis = 2> (low, high)

    ranking = Unsqueeze (ranked, one)
    {classes}
    selected = NonMaxSuppression (corners, candidates, most, iou, confidence)
    filled = Concat <axis = 0> (selected, none)
    image = Gather <axis = 1> (filled, first)
    place = Gather <axis = 1> (filled, second)
    images = Squeeze (batch, zeroth)
    range = Range (first, images, step)
    own_image = Unsqueeze (range, one)
    is_own = Equal (image, own_image)
    rank = Cast <to = 1> (place)
    ranks = Where (is_own, rank, beyond)
    lowest_ranks, order = TopK <axis = 1, largest = 0> (ranks, most)
    kept_shape = Concat <axis = 0> (batch, most)
    kept = Reshape (lowest_ranks, kept_shape)

    told = Less (kept, beyond)
    is_told = Unsqueeze (told, last)
    index = Cast <to = 7> (kept)
    within = Min (index, lowest)
    place_told = Unsqueeze (within, last)
    kind_told = Cast <to = 1> (kind)
    table = Concat <axis = 2> (corners, score, kind_told)
    taken = GatherND <batch_dims = 1> (table, place_told)
    rows_told = Where (is_told, taken, zero)
    rows = Add (rows_told, nan_or_nothing)
}}
"""

_AXES = ("batch", "axis1", "axis2")

_SCORES = {
    "anchors": """
    values = Identity (output)
    scores = Slice (values, four, end, one)
    """,
    "objectness": """
    values = Transpose <perm = [0, 2, 1]> (output)
    objectness = Slice (values, four, five, one)
    shares = Slice (values, five, end, one)
    scores = Mul (shares, objectness)
    """,
}

_BY_CLASS = """
    sizes_of_scores = Shape (scores)
    classes = Slice (sizes_of_scores, one, two)
    count = Squeeze (classes, zeroth)
    indices = Range (first, count, step)
    every_class = Unsqueeze (indices, one)
    own_kind = Transpose <perm = [0, 2, 1]> (kind)
    is_class = Equal (own_kind, every_class)
    candidates = Where (is_class, ranking, zero)
    """
_AGNOSTIC = "candidates = Identity (ranking)"


def graph_of(
    suppression: Suppression, head: Head, dims: Sequence[int | str | None], *, float16: bool
) -> onnx.ModelProto:
    """A graph from ``predictions`` to ``rows`` [B, N, 6] float32: (x1, y1, x2, y2, score, class), corners in pixels of
    the network's input, the highest score first, then zeros.

    They are what :func:`acmix_deploy.detection.boxes.suppressed` gives, as long as no more than :data:`CONSIDERED`
    boxes of an image are above the confidence, or those hold enough. Values are finite where their sum is; the product
    of another sum and 0 is NaN, which is added to the rows of the image. Selected are places in the ranking by score,
    so the lowest of them come first; places behind the last fill up what is missing, for the number of selected ones
    depends on the image.

    Args:
        suppression: thresholds and sizes, which become initializers.
        head: what the predictions are, in the layout "anchors" or "objectness".
        dims: their axes; not whole numbers where they are free.
        float16: they are in half precision, else float32.
    """
    anchors = dims[2 if head.axis == 1 else 1]
    considered = min(anchors, CONSIDERED) if isinstance(anchors, int) else CONSIDERED
    text = _GRAPH.format(
        opset=OPSET,
        element="float16" if float16 else "float",
        dims=", ".join(str(dim) if isinstance(dim, int) else name for dim, name in zip(dims, _AXES, strict=True)),
        scores=_SCORES[head.layout],
        classes=_BY_CLASS if suppression.by_class else _AGNOSTIC,
        considered=considered,
        lowest=considered - 1,
        border=0 if isinstance(anchors, int) else considered,
        end=2**63 - 1,
        most=suppression.most,
        iou=suppression.iou,
        confidence=suppression.confidence,
    )
    model = parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.full((suppression.most, 3), -1), "none"))
    read = {name for node in model.graph.node for name in node.input}
    keep(model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in read])
    return model
