"""The KServe v2 inference protocol, https://github.com/kserve/open-inference-protocol, with Triton's binary tensors.

Bytes and numbers alone; routes are in :mod:`acmix_deploy.serving.app`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from acmix_deploy import __version__
from acmix_deploy.detection.heads import Array
from acmix_deploy.errors import UserError
from acmix_deploy.runtime.inputs import Input
from acmix_deploy.serving.worker import Served

HEADER_LENGTH = "inference-header-content-length"
"""The HTTP header that says how many bytes of JSON stand before binary tensors."""

PLATFORM = "acmix_deploy"

MAX_JSON = 1 << 25
"""Bytes of JSON in a request: 32 MiB. Read, `[],[],...` took 35 times as many."""

_MOST = 32
"""Dimensions of a tensor, inputs and outputs in a request. Of longer lists nothing is kept, not even what is wrong."""

_DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int8": "INT8", "int32": "INT32", "int64": "INT64", "float16": "FP16",
    "float32": "FP32", "float64": "FP64",
}  # fmt: skip


class Tensor(BaseModel):
    """An input of a request."""

    name: str
    shape: list[Annotated[int, Field(gt=0, lt=2**31)]] = Field(max_length=_MOST)
    datatype: str
    parameters: dict[str, Any] = {}
    data: list[Any] | None = None


class Wanted(BaseModel):
    """An output that a request asks for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(BaseModel):
    """What stands before the binary tensors of a request."""

    id: str = ""
    parameters: dict[str, Any] = {}
    inputs: list[Tensor] = Field(max_length=_MOST)
    outputs: list[Wanted] = Field(default=[], max_length=_MOST)


class Request(NamedTuple):
    """A request that was read."""

    id: str
    feed: dict[str, Array]
    outputs: dict[str, bool]
    """What is asked for, and whether in binary form."""


def server_metadata() -> dict[str, Any]:
    """What ``GET /v2`` tells."""
    return {"name": PLATFORM, "version": __version__, "extensions": ["binary_tensor_data"]}


def model_metadata(served: Served) -> dict[str, Any]:
    """What ``GET /v2/models/NAME`` tells."""
    return {
        "name": served.name,
        "versions": ["1"],
        "platform": PLATFORM,
        "inputs": [*map(_described, served.inputs)],
        "outputs": [*map(_described, served.outputs)],
    }


def parse(body: bytes, header_length: str | None, served: Served) -> Request:
    """Read the body of ``POST /v2/models/NAME/infer``.

    Args:
        body: JSON, and binary tensors after it where there is a ``header_length``.
        header_length: the header of this name, see :data:`HEADER_LENGTH`.
        served: the model that is asked.

    Raises:
        UserError: the body is not such a request, or a tensor is not what it says.
    """
    length = len(body)
    if header_length is not None:
        if not re.fullmatch("[0-9]{1,18}", header_length) or int(header_length) > length:
            raise UserError(f"{HEADER_LENGTH} is {header_length!r:.40}, and the body has {length} bytes")
        length = int(header_length)
    if length > MAX_JSON:
        raise UserError(f"{length} bytes of JSON, and at most {MAX_JSON} are taken; send tensors in binary form")
    try:
        request = InferRequest.model_validate_json(body[:length])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise UserError(f"not a KServe v2 request: {place}: {first['msg']}") from error
    binary, feed = memoryview(body)[length:], {}
    for tensor in request.inputs:
        if tensor.name in feed:
            raise UserError(f"input {tensor.name} is given twice")
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            feed[tensor.name] = _from_json(tensor)
            continue
        if type(size) is not int or not 0 <= size <= len(binary):
            raise UserError(f"binary_data_size of {tensor.name} is {size!r:.40}, and {len(binary)} bytes are left")
        feed[tensor.name], binary = _from_bytes(tensor, binary[:size]), binary[size:]
    if binary:
        raise UserError(f"{len(binary)} bytes are left after the last tensor")
    names = [output.name for output in served.outputs]
    in_binary = request.parameters.get("binary_data_output") is True
    wanted = {output.name: output.parameters.get("binary_data", in_binary) is True for output in request.outputs}
    if unknown := wanted.keys() - set(names):
        raise UserError(f"{served.name} gives {', '.join(names)}, and {', '.join(sorted(unknown))} is asked for")
    return Request(request.id, feed, wanted or dict.fromkeys(names, in_binary))


def answer(request: Request, outputs: Mapping[str, Array], served: Served) -> tuple[bytes, dict[str, str]]:
    """The body of the response and the headers that belong to it.

    Raises:
        UserError: an output is asked for as JSON, which has no words for what is not finite.
    """
    tensors, parts = [], []
    for name, binary in request.outputs.items():
        array = np.ascontiguousarray(outputs[name])
        tensor: dict[str, Any] = {
            "name": name, "datatype": _DATATYPES[array.dtype.name], "shape": list(array.shape)
        }  # fmt: skip
        if binary:
            parts.append(array.tobytes())
            tensor["parameters"] = {"binary_data_size": array.nbytes}
        else:
            if not np.isfinite(array).all():
                raise UserError(f"{name} is not finite; ask for it in binary form")
            tensor["data"] = array.ravel().tolist()
        tensors.append(tensor)
    document = {"model_name": served.name, "model_version": "1", "id": request.id, "outputs": tensors}
    head = json.dumps(document, separators=(",", ":")).encode()
    if not parts:
        return head, {"content-type": "application/json"}
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}
    return b"".join((head, *parts)), headers


def _described(node: Input) -> dict[str, Any]:
    shape = [dim if isinstance(dim, int) else -1 for dim in node.dims]
    return {"name": node.name, "datatype": _DATATYPES[node.dtype.name], "shape": shape}


def _dtype(tensor: Tensor) -> np.dtype[Any]:
    for name, datatype in _DATATYPES.items():
        if datatype == tensor.datatype:
            return np.dtype(name)
    raise UserError(f"{tensor.name} is of type {tensor.datatype:.40}; known are {', '.join(_DATATYPES.values())}")


def _from_json(tensor: Tensor) -> Array:
    """An array from its elements in row-major order, nested or flat."""
    try:
        array = np.array(tensor.data if tensor.data is not None else [], _dtype(tensor))
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"the data of {tensor.name} are not {tensor.datatype}: {error}") from error
    if array.dtype.kind in "iu" and not np.array_equal(array, np.array(tensor.data or [], np.float64)):
        raise UserError(f"the data of {tensor.name} are not {tensor.datatype}: they are no whole numbers")
    return _shaped(tensor, array)


def _from_bytes(tensor: Tensor, data: memoryview) -> Array:
    dtype = _dtype(tensor)
    if len(data) % dtype.itemsize:
        raise UserError(f"{tensor.name} has {len(data)} bytes, which are no whole elements of {tensor.datatype}")
    return _shaped(tensor, np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype, copy=False))


def _shaped(tensor: Tensor, array: Array) -> Array:
    if array.size != math.prod(tensor.shape):
        raise UserError(f"{tensor.name} has {array.size} elements, and its shape is {tensor.shape}")
    return array.reshape(tensor.shape)
