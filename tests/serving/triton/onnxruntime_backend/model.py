"""Stands for Triton's backend for ONNX files: takes what that one takes of a configuration, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            folder / (config["default_model_filename"] or "model.onnx"), options
        )
        self._input = self._session.get_inputs()[0].name
        self._outputs = [node.name for node in self._session.get_outputs()]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One run for all requests that Triton has put together."""
        arrays = [triton.get_input_tensor_by_name(request, self._input).as_numpy() for request in requests]
        values = self._session.run(self._outputs, {self._input: np.concatenate(arrays)})
        ends = np.cumsum([0, *map(len, arrays)])
        return [
            triton.InferenceResponse(
                [triton.Tensor(name, value[start:end]) for name, value in zip(self._outputs, values, strict=True)]
            )
            for start, end in pairwise(ends)
        ]
