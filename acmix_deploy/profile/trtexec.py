"""Latencies that ``trtexec --exportTimes FILE`` wrote.

A JSON list with an object for each inference, times in ms; the same in TensorRT 8.5 to 11. Source of the form:
TensorRT's samples/common/sampleReporting.cpp, ``exportJSONTrace``.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from acmix_deploy.errors import UserError
from acmix_deploy.profile.timing import Profile

NOTE = "times of trtexec: what machine, precision and shapes they belong to is not in the file"


class _Inference(BaseModel):
    """What is used of one entry."""

    compute: float = Field(alias="computeMs", ge=0, allow_inf_nan=False)
    upload: float = Field(alias="h2dMs", ge=0, allow_inf_nan=False)
    download: float = Field(alias="d2hMs", ge=0, allow_inf_nan=False)
    latency: float = Field(alias="latencyMs", ge=0, allow_inf_nan=False)


def read_times(file: Path) -> Profile:
    """A profile of trtexec's times: ``computeMs`` as the GPU's own, ``latencyMs`` as those with transfers.

    trtexec leaves its warm-up out of the file. Without transfers (``--noDataTransfers``) both are the same and
    ``with_transfers_ms`` is None.

    Raises:
        UserError: the file does not exist or is of another form.
    """
    try:
        inferences = TypeAdapter(list[_Inference]).validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file} holds no times of trtexec: {f'{place}: ' if place else ''}{first['msg']}",
            "Give an ONNX file, an engine, or what trtexec --exportTimes wrote.",
        ) from error
    if not inferences:
        raise UserError(f"{file} holds no times: the list is empty", "Run trtexec with more --iterations.")
    transfers = any(inference.upload or inference.download for inference in inferences)
    return Profile(
        file=file.name,
        provider="trtexec",
        samples_ms=tuple(inference.compute for inference in inferences),
        with_transfers_ms=tuple(inference.latency for inference in inferences) if transfers else None,
        notes=(NOTE,),
    )
