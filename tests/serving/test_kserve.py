"""The KServe v2 protocol: what a request is read as, what it is answered with, and Triton's own client."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from acmix_deploy.detection.metadata import Pixels
from acmix_deploy.errors import UserError
from acmix_deploy.processing import Processing, attach
from acmix_deploy.runtime.inputs import Input
from acmix_deploy.serving import kserve
from acmix_deploy.serving.detector import Detector
from acmix_deploy.serving.worker import Served, tried
from scripts import shapes
from tests.serving.parts import Server, serving

pytest.importorskip("uvicorn", reason="uvicorn is not installed")

SERVED = Served(
    "a",
    {0: "thing"},
    (Input("images", ("batch", 2), np.dtype(np.float32)),),
    (Input("output0", ("batch", 2), np.dtype(np.float16)),),
    (1, 2),
    8,
    "detect",
    0.25,
    "",
)
ROW = np.array([[0.5, -2]], np.float32)


@pytest.fixture(scope="module")
def server(shapes_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(shapes_model, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    scenes = [scene.image for scene in shapes.images(9, 2)]
    return (np.stack(scenes)[..., ::-1].transpose(0, 3, 1, 2) / np.float32(255)).astype(np.float32)


@pytest.fixture(scope="module")
def right(shapes_model: Path, images: np.ndarray) -> np.ndarray:
    with Detector.load(shapes_model, threads=1) as detector:
        return detector.infer({"images": images})["output0"]


def request(*inputs: dict[str, Any], **other: Any) -> bytes:
    return json.dumps({"inputs": inputs, **other}).encode()


def tensor(**changed: Any) -> dict[str, Any]:
    return {"name": "images", "shape": [1, 2], "datatype": "FP32", "data": [0.5, -2], **changed}


@pytest.mark.parametrize("data", [[0.5, -2], [[0.5, -2]]], ids=["flat", "nested"])
def test_json_tensors(data: list[Any]) -> None:
    read = kserve.parse(request(tensor(data=data), id="7"), None, SERVED)
    assert (read.id, read.outputs) == ("7", {"output0": False})
    np.testing.assert_array_equal(read.feed["images"], ROW)
    assert read.feed["images"].dtype == np.float32


def test_binary_tensors() -> None:
    given = tensor(parameters={"binary_data_size": 8})
    del given["data"]
    head = request(given, outputs=[{"name": "output0", "parameters": {"binary_data": True}}])
    read = kserve.parse(head + ROW.tobytes(), str(len(head)), SERVED)
    np.testing.assert_array_equal(read.feed["images"], ROW)
    assert read.outputs == {"output0": True}
    assert kserve.parse(request(tensor(), parameters={"binary_data_output": True}), None, SERVED).outputs["output0"]

    content, headers = kserve.answer(read, {"output0": ROW.astype(np.float16)}, SERVED)
    length = int(headers[kserve.HEADER_LENGTH])
    (output,) = json.loads(content[:length])["outputs"]
    assert output == {
        "name": "output0", "datatype": "FP16", "shape": [1, 2], "parameters": {"binary_data_size": 4}
    }  # fmt: skip
    np.testing.assert_array_equal(np.frombuffer(content[length:], np.float16), ROW[0])


def test_what_is_not_finite_is_no_json() -> None:
    outputs = {"output0": np.array([[np.nan, np.inf]], np.float16)}
    with pytest.raises(UserError, match="output0 is not finite; ask for it in binary form"):
        kserve.answer(kserve.parse(request(tensor()), None, SERVED), outputs, SERVED)
    binary = kserve.parse(request(tensor(), parameters={"binary_data_output": True}), None, SERVED)
    content, _ = kserve.answer(binary, outputs, SERVED)
    assert content.endswith(outputs["output0"].tobytes())


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_a_file_of_bytes_is_asked_with_bytes(shapes_model: Path, tmp_path: Path, order: Pixels) -> None:
    model = onnx.load(shapes_model)
    attach(model, Processing(order))
    onnx.save(model, tmp_path / "bytes.onnx")
    bgr = np.stack([scene.image for scene in shapes.images(9, 2)])
    given = bgr if order == "bgr" else np.ascontiguousarray(bgr[..., ::-1])
    with Detector.load(shapes_model) as floats, Detector.load(tmp_path / "bytes.onnx") as detector:
        served = tried(detector, 2)
        assert served.input_shape[2:] == (160, 160)  # as GET /v1/model tells it
        told = {"name": "images", "datatype": "UINT8", "shape": [-1, 160, 160, 3]}
        assert kserve.model_metadata(served)["inputs"] == [told]
        told |= {"shape": [*given.shape], "parameters": {"binary_data_size": given.nbytes}}
        head = request(told)
        read = kserve.parse(head + given.tobytes(), str(len(head)), served)
        expected = floats.infer({"images": (bgr[..., ::-1].transpose(0, 3, 1, 2) / np.float32(255))})["output0"]
        np.testing.assert_array_equal(detector.infer(read.feed)["output0"], expected)
        with pytest.raises(
            UserError, match=r"takes images \[batch, 160, 160, 3\] uint8, and is given \[2, 3, 160, 160\]"
        ):
            detector.infer({"images": np.zeros((2, 3, 160, 160), np.float32)})


BINARY = tensor(parameters={"binary_data_size": 8})


@pytest.mark.parametrize(
    ("body", "length", "why"),
    [
        (b"", None, "not a KServe v2 request: the body"),
        (b"[]", None, "not a KServe v2 request"),
        (b"{}", None, "inputs: Field required"),
        (b"[" * 100_000, None, "not a KServe v2 request"),
        (request(tensor(shape=[-1, 2])), None, r"inputs.0.shape.0"),
        (request(tensor(shape=[2**31, 2**31])), None, r"inputs.0.shape.0"),
        (request(tensor(shape=[2**30, 2**30, 2**30])), None, "has 2 elements, and its shape is"),
        (request(tensor(shape=[1] * 100, data=[1])), None, "inputs.0.shape: List should have at most 32 items"),
        (b" " * (1 << 25) + request(tensor()), None, "bytes of JSON, and at most 33554432 are taken"),
        (request(tensor(shape=[1, 3])), None, r"images has 2 elements, and its shape is \[1, 3\]"),
        (request(tensor(data=[[1], [2, 3]])), None, "the data of images are not FP32"),
        (request(tensor(data=["x", "y"])), None, "the data of images are not FP32"),
        (request(tensor(data=[{}, None])), None, "the data of images are not FP32"),
        (request(tensor(datatype="BYTES")), None, "images is of type BYTES; known are BOOL"),
        (request(tensor(datatype="INT8", data=[300, 2])), None, "the data of images are not INT8"),
        (request(tensor(datatype="UINT8", data=[0.5, 2])), None, "are not UINT8: they are no whole numbers"),
        (request(tensor(), tensor()), None, "input images is given twice"),
        (request(tensor(), outputs=[{"name": "x"}]), None, "a gives output0, and x is asked for"),
        (request(tensor()), "x", "is 'x', and the body has"),
        (request(tensor()), "-1", "is '-1', and the body has"),
        (request(tensor()), "9" * 5000, "is '9999"),
        (request(tensor()), "999999", "is '999999', and the body has"),
        (request(tensor()) + b"more", str(len(request(tensor()))), "4 bytes are left after the last tensor"),
        (request(BINARY), None, "binary_data_size of images is 8, and 0 bytes are left"),
        (request(tensor(parameters={"binary_data_size": "8"})), None, "binary_data_size of images is '8'"),
        (request(tensor(parameters={"binary_data_size": True})) + b"x", None, "not a KServe v2 request"),
        (request(BINARY) + b"0123456", str(len(request(BINARY))), "and 7 bytes are left"),
    ],
)
def test_what_is_no_request_is_told(body: bytes, length: str | None, why: str) -> None:
    with pytest.raises(UserError, match=why):
        kserve.parse(body, length, SERVED)


@pytest.mark.parametrize(
    "body",
    [
        request(tensor(shape=[2**31 - 1] * 200_000)),
        b'{"inputs":[' + b"1," * 1_000_000 + b"1]}",
        request(tensor(), outputs=[1] * 1_000_000),
    ],
    ids=["dimensions", "inputs", "outputs"],
)
def test_long_lists_cost_nothing(body: bytes) -> None:
    """A product of many sizes took minutes, a million faults took gigabytes."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError, match="at most 32 items") as refusal:
        kserve.parse(body, None, SERVED)
    assert time.process_time() - start < 2
    assert len(str(refusal.value)) < 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300e3  # kB


def test_a_run_has_no_more_images_than_are_allowed(server: Server) -> None:
    many = request(tensor(shape=[9, 3, 160, 160], parameters={"binary_data_size": 9 * 3 * 160 * 160 * 4}, data=None))
    answer = server.client.post(
        f"/v2/models/{server.document['model']}/infer",
        content=many + bytes(9 * 3 * 160 * 160 * 4),
        headers={kserve.HEADER_LENGTH: str(len(many))},
    )
    assert (answer.status_code, answer.json()["error"]) == (413, "at most 8 images are taken in a run")


def test_metadata_and_health(server: Server) -> None:
    name = "/v2/models/shapes.fused"
    assert server.client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/health/live", "/v2/health/ready", f"{name}/ready", f"{name}/versions/1/ready"):
        assert server.client.get(path).status_code == 200
    for path in ("/v2/models/other", f"{name}/versions/2", "/v2/models/other/ready"):
        assert "there is the model shapes.fused" in server.client.get(path).json()["error"]
    metadata = server.client.get(name).json()
    assert metadata["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 160, 160]}]
    (output,) = metadata["outputs"]
    assert (output["name"], output["datatype"], output["shape"][0]) == ("output0", "FP32", -1)


def test_arrays_in_arrays_out(server: Server, images: np.ndarray, right: np.ndarray) -> None:
    path = "/v2/models/shapes.fused/infer"
    body = request(
        {"name": "images", "shape": [1, 3, 160, 160], "datatype": "FP32", "data": images[0].ravel().tolist()}
    )
    (output,) = server.client.post(path, content=body).json()["outputs"]
    np.testing.assert_allclose(np.reshape(output["data"], output["shape"]), right[:1], rtol=1e-4, atol=1e-3)

    for wrong, why in (
        (tensor(), "takes images"),
        (tensor(name="x", shape=[1, 3, 160, 160], data=[0] * 76800), "takes images"),
        (tensor(shape=[0, 3, 160, 160], data=[]), "inputs.0.shape.0"),
    ):
        response = server.client.post(path, content=request(wrong))
        assert response.status_code == 400, response.text
        assert why in response.json()["error"]


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client(server: Server, images: np.ndarray, right: np.ndarray, binary: bool) -> None:
    http = pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    with http.InferenceServerClient("{}:{}".format(*server.address), concurrency=4) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("shapes.fused")
        assert client.get_server_metadata()["name"] == "acmix_deploy"
        (node,) = client.get_model_metadata("shapes.fused", "1")["inputs"]
        given = http.InferInput(node["name"], list(images.shape), node["datatype"])
        given.set_data_from_numpy(images, binary_data=binary)
        wanted = http.InferRequestedOutput("output0", binary_data=binary)
        for outputs in ([wanted], None):
            result = client.infer("shapes.fused", [given], outputs=outputs, request_id="9")
            assert result.get_response()["id"] == "9"
            np.testing.assert_allclose(result.as_numpy("output0"), right, rtol=1e-4, atol=1e-3)
        waiting = [client.async_infer("shapes.fused", [given]) for _ in range(8)]
        for one in waiting:
            np.testing.assert_allclose(one.get_result().as_numpy("output0"), right, rtol=1e-4, atol=1e-3)
        with pytest.raises(Exception, match="there is the model"):
            client.infer("other", [given])
        small = http.InferInput("images", [1, 3, 8, 8], "FP32")
        small.set_data_from_numpy(images[:1, :, :8, :8], binary_data=binary)
        with pytest.raises(Exception, match="takes images"):
            client.infer("shapes.fused", [small])
