"""Pre- and postprocessing around a network: what it computes, and that it comes off as it went on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from acmix_deploy.detection.boxes import suppressed
from acmix_deploy.detection.heads import head_of
from acmix_deploy.detection.images import tensor
from acmix_deploy.detection.metadata import ModelMetadata, Pixels
from acmix_deploy.detection.suppression import Suppression
from acmix_deploy.errors import UserError
from acmix_deploy.processing import Processing, attach, detach
from acmix_deploy.runtime.inputs import as_pixels, random_images

_NETWORK = """
<ir_version: 8, opset_import: ["": 18]>
network ({element}[batch, {channels}, height, 8] images) => ({element}[batch, {channels}, height, 8] output0)
{{
    doubled = Add (images, images)
    output0 = Sigmoid (doubled)
}}
"""


def network(element: str = "float", channels: int = 3) -> onnx.ModelProto:
    model = parser.parse_model(_NETWORK.format(element=element, channels=channels))
    onnx.helper.set_model_props(model, {"task": "detect"})
    return model


def run(model: onnx.ModelProto, images: Any) -> Any:
    onnx.checker.check_model(model, full_check=True)
    return ReferenceEvaluator(model).run(None, {"images": images})[0]  # ONNX Runtime leaves out casts to float16


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("element", ["float", "float16"])
def test_pixels_give_what_floats_give_bit_by_bit(order: Pixels, element: str) -> None:
    bgr = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 3), np.uint8)
    floats = np.stack([tensor(image) for image in bgr])
    model = network(element)
    plain = run(model, floats.astype(np.float16 if element == "float16" else np.float32))
    attach(model, Processing(order))
    np.testing.assert_array_equal(run(model, bgr if order == "bgr" else bgr[..., ::-1].copy()), plain)
    assert model.graph.node[0].op_type == "Cast", "TensorRT takes uint8 from a Cast alone"
    assert ModelMetadata.of(model).pixels == order
    np.testing.assert_array_equal(as_pixels(floats, order), bgr if order == "bgr" else bgr[..., ::-1])


@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("element", ["float", "float16"])
def test_what_went_on_comes_off(order: Pixels, element: str) -> None:
    model = network(element)
    before = model.SerializeToString(deterministic=True)
    attach(model, Processing(order))
    assert detach(model) == Processing(order)
    assert model.SerializeToString(deterministic=True) == before
    assert detach(model) == Processing()
    assert model.SerializeToString(deterministic=True) == before


def test_a_front_that_is_not_as_it_was_is_told() -> None:
    model = network()
    attach(model, Processing("rgb"))
    del model.graph.node[2]
    with pytest.raises(UserError, match="not as they were"):
        detach(model)


_DETECTOR = """
<ir_version: 8, opset_import: ["": {opset}]>
network ({element}[batch, 3, 7, width] images) => ({element}[batch, 7, anchors] output0)
<int64[3] shape = {{0, 7, -1}}>
{{
    rows = Transpose <perm = [0, 2, 1, 3]> (images)
    whole = Identity (rows)
    output0 = Reshape (whole, shape)
}}
"""
_NAMES = {"task": "detect", "names": "{0: 'a', 1: 'b', 2: 'c'}"}


def detector(element: str = "float", opset: int = 18, **metadata: str) -> onnx.ModelProto:
    model = parser.parse_model(_DETECTOR.format(element=element, opset=opset))
    told = {**_NAMES, "args": str({"batch": 1, "dynamic": True, "nms": False}), **metadata}
    onnx.helper.set_model_props(model, told)
    return model


BOTH = Processing("bgr", Suppression(confidence=0.4, iou=0.5, most=20, by_class=False))


@pytest.mark.parametrize("opset", [17, 18, 21])
@pytest.mark.parametrize("element", ["float", "float16"])
def test_suppression_goes_on_and_comes_off(element: str, opset: int) -> None:
    model = detector(element, opset)
    before = model.SerializeToString(deterministic=True)
    bgr = np.random.default_rng(0).integers(0, 256, (3, 7, 16, 3), np.uint8)
    floats = np.stack([tensor(image) for image in bgr]).astype(np.float16 if element == "float16" else np.float32)
    head = head_of(ModelMetadata.of(model), {"output0": (3, 7, 48)})
    attach(model, BOTH)
    metadata = ModelMetadata.of(model)
    assert (metadata.pixels, metadata.suppression, metadata.nms) == (*BOTH, True)
    assert head_of(metadata, {"output0": (3, 20, 6)}).layout == "rows"
    onnx.checker.check_model(model, full_check=True)
    (rows,) = ReferenceEvaluator(model).run(None, {"images": bgr})
    predictions = floats.transpose(0, 2, 1, 3).reshape(3, 7, 48)
    assert BOTH.suppression
    right = suppressed(head, {"output0": predictions}, BOTH.suppression)
    assert np.count_nonzero(right[..., 4]) > 10
    np.testing.assert_array_equal(rows, right)
    assert detach(model) == BOTH
    assert model.SerializeToString(deterministic=True) == before


def test_suppression_comes_off_and_on_a_network_in_another_type() -> None:
    model = detector()
    attach(model, BOTH)
    around = detach(model)
    half = detector("float16")
    attach(half, around)
    again = onnx.load_model_from_string(half.SerializeToString())
    detach(again)
    assert again.SerializeToString(deterministic=True) == detector("float16").SerializeToString(deterministic=True)


def test_a_suppression_that_is_not_as_it_was_is_told() -> None:
    for spoil in (_lose_the_shape, _rename_the_network):
        model = detector()
        attach(model, BOTH)
        spoil(model)
        with pytest.raises(UserError, match="not as they were"):
            detach(model)


@pytest.mark.parametrize(("mine", "prefix"), [(Processing("bgr"), "acmix_input"), (BOTH, "acmix_nms")])
def test_a_network_that_shares_a_constant_with_what_is_around_it_is_told(mine: Processing, prefix: str) -> None:
    """As ONNX Runtime writes an optimized file."""
    model = detector()
    attach(model, mine)
    shared = next(tensor for tensor in model.graph.initializer if tensor.name.startswith(prefix))
    model.graph.node.append(onnx.helper.make_node("Identity", [shared.name], ["other"]))
    with pytest.raises(UserError, match="not as they were"):
        detach(model)


def _lose_the_shape(model: onnx.ModelProto) -> None:
    del model.graph.value_info[:]


def _rename_the_network(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if "acmix_nms/output0" in node.output)
    node.output[0] = "other"


def test_suppression_of_others_stays() -> None:
    """Ultralytics' own, which its metadata tell, and names that begin as ours."""
    model = detector(args=str({"nms": True}))
    model.graph.node[0].name = "acmix_nms/Transpose"
    before = model.SerializeToString(deterministic=True)
    assert detach(model) == Processing()
    assert model.SerializeToString(deterministic=True) == before


def test_entries_that_nobody_needs_are_not_read() -> None:
    model = detector(args="[")
    before = model.SerializeToString(deterministic=True)
    assert detach(model) == Processing()
    assert model.SerializeToString(deterministic=True) == before
    with pytest.raises(UserError, match="metadata tell the args"):
        attach(model, BOTH)
    model = detector(suppression='{"confidence": 2}')
    with pytest.raises(UserError, match=r"the suppression .* expected are confidence, iou, most, by_class"):
        detach(model)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"task": "segment"}, "which is not an output"),
        ({"task": "pose", "kpt_shape": "[1, 2]", "names": "{0: 'a'}"}, "its task is pose"),
        ({"task": "obb", "names": "{0: 'a', 1: 'b'}"}, "its task is obb"),
        ({"end2end": "True"}, "which is not one output|selected itself"),
        ({"head": "RTDETRDecoder"}, "selected itself|which is not one output"),
        ({"task": "depth"}, "its task is depth"),
        ({"names": "{0: 'a'}"}, "for 1 classes"),
    ],
)
def test_heads_without_boxes_to_suppress_are_refused(metadata: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        attach(detector(**metadata), BOTH)


def test_pixels_have_three_channels() -> None:
    with pytest.raises(UserError, match="three channels"):
        attach(network(channels=1), Processing("rgb"))


def test_noise_is_of_pixels_and_other_floats_are_refused() -> None:
    noise = random_images((1, 3, 64, 64))
    assert noise.min() == 0
    assert noise.max() == 1
    assert len(np.unique(noise)) == 256
    with pytest.raises(UserError, match="no levels"):
        as_pixels(noise + np.float32(1e-3), "rgb")
    with pytest.raises(UserError, match="no levels"):
        as_pixels(noise * np.float32(2), "rgb")


@pytest.mark.parametrize("changed", [Processing("rgb", Suppression()), Processing("bgr", Suppression(confidence=0.6))])
def test_metadata_that_tell_something_else_than_the_nodes_are_told(changed: Processing) -> None:
    model, other = detector(), detector()
    attach(model, Processing("bgr", Suppression()))
    attach(other, changed)
    onnx.helper.set_model_props(model, ModelMetadata.of(other).entries)
    with pytest.raises(UserError, match="not as they were"):
        detach(model)
