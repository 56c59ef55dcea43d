"""Pre- and postprocessing around a network: what it computes, and that it comes off as it went on."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from acmix_deploy.detection.images import tensor
from acmix_deploy.detection.metadata import ModelMetadata, Pixels
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
