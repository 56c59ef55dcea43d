"""Asks a Triton server concurrently, over HTTP and gRPC, in a Python that has tritonclient.

python triton_client.py HTTP GRPC MODEL INPUT OUT FILE...   each FILE several times, alone; answers into OUT, an .npz

A FILE is an array [B, ...] (.npy), or goes as it is, as BYTES [1, 1].
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

TIMES = 3
OUTPUTS = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")

http, grpc, model, name, out, *files = sys.argv[1:]
KINDS = {"float32": "FP32", "uint8": "UINT8"}
ADDRESSES = {"http": http, "grpc": grpc}


def content(file: Path) -> Any:
    if file.suffix == ".npy":
        return np.load(file)
    array = np.empty((1, 1), object)
    array[0, 0] = file.read_bytes()
    return array


def ask(which: tuple[str, str, int]) -> dict[str, Any]:
    """The answer's outputs, or its error."""
    protocol, file, turn = which
    client = getattr(tritonclient, protocol)
    array = content(Path(file))
    tensor = client.InferInput(name, list(array.shape), KINDS.get(array.dtype.name, "BYTES"))
    tensor.set_data_from_numpy(array)
    server = client.InferenceServerClient(ADDRESSES[protocol])
    key = f"{Path(file).name}/{protocol}/{turn}"
    try:
        answer = server.infer(model, [tensor])
        return {f"{key}/{output}": answer.as_numpy(output) for output in OUTPUTS}
    except tritonclient.utils.InferenceServerException as error:
        return {f"{key}/error": np.array(str(error))}
    finally:
        server.close()


with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(ask, product(ADDRESSES, files, range(TIMES))))
np.savez(out, **{key: value for answer in answers for key, value in answer.items()})
