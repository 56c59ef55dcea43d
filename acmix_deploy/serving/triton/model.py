"""What Triton's Python backend runs: pictures as bytes in, boxes out.

The module triton_python_backend_utils is Triton's own.
Source: https://github.com/triton-inference-server/python_backend
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from acmix_deploy.detection import pictures
from acmix_deploy.detection.boxes import Detections
from acmix_deploy.detection.heads import Array
from acmix_deploy.detection.images import Image, decode
from acmix_deploy.errors import AcmixDeployError, MissingComponent
from acmix_deploy.serving.detector import Detector


class TritonPythonModel:
    """A detector behind the tensors that :mod:`acmix_deploy.serving.triton.repository` names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the file that the configuration names, and run it once.

        Raises:
            AcmixDeployError: see :meth:`Detector.load`, or arrays do not get through; Triton then does not serve it.
        """
        _check_arrays()
        pictures.limit_opencv(pictures.max_pixels())
        parameters = json.loads(args["model_config"])["parameters"]
        options = {name: parameter["string_value"] for name, parameter in parameters.items()}
        folder = Path(args["model_repository"], args["model_version"])
        self._detector = Detector.load(
            folder / options["file"],
            plugin=folder / options["plugin"] if "plugin" in options else None,
            confidence=float(options["confidence"]),
            provider=options["provider"],
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """The answers to requests that Triton has put together; one with a broken picture spoils no other."""
        taken = [_taken(request) for request in requests]
        try:
            found = iter(self._detector([image for images in taken if isinstance(images, list) for image in images]))
        except AcmixDeployError as error:
            triton.Logger.log_error(str(error))
            return [_refusal("the model fails; the server's log tells more", "INTERNAL")] * len(requests)
        return [
            _answer(list(islice(found, len(images))), self._detector.most)
            if isinstance(images, list)
            else _refusal(images, "INVALID_ARG")
            for images in taken
        ]

    def finalize(self) -> None:
        """Free what the detector holds."""
        self._detector.close()


def filled(found: Sequence[Detections], most: int) -> dict[str, Array]:
    """Detections of B images as arrays [B, ``most``, ...], as a batch has to have one size: zeros follow what was
    found, and of masks, which are polygons as JSON, empty lists."""
    arrays: dict[str, Array] = {
        "num_detections": np.array([[len(detections.scores)] for detections in found], np.int32).reshape(-1, 1),
        "detection_boxes": np.zeros((len(found), most, 4), np.float32),
        "detection_scores": np.zeros((len(found), most), np.float32),
        "detection_classes": np.zeros((len(found), most), np.int32),
    }
    for index, detections in enumerate(found):
        values: dict[str, Any] = {
            "detection_boxes": detections.boxes,
            "detection_scores": detections.scores,
            "detection_classes": detections.classes,
            "detection_keypoints": detections.keypoints,
            "detection_corners": detections.corners,
        }
        for name, array in values.items():
            if array is not None:
                shape = (len(found), most, *array.shape[1:])
                arrays.setdefault(name, np.zeros(shape, np.float32))[index, : len(array)] = array
        if detections.masks is not None:
            texts = arrays.setdefault("detection_masks", np.full((len(found), most), b"[]", np.object_))
            for place, mask in enumerate(detections.masks):
                texts[index, place] = json.dumps(mask.polygons()).encode()
    return arrays


def _check_arrays() -> None:
    """Raise MissingComponent where the backend was built before NumPy 2 and meets it: it then reads garbage, silently.

    From Triton 24.11 on the backend is built with pybind11 2.12, which knows both.
    """
    sent = np.array([1, 2], np.float32)
    got = triton.Tensor.from_dlpack("got", triton.Tensor("sent", sent).to_dlpack()).as_numpy()
    if not np.array_equal(got, sent):
        raise MissingComponent(
            f"the Python backend of this Triton cannot read arrays of NumPy {np.__version__}",
            "Install numpy<2 in its environment, or use Triton 24.11 or newer.",
        )


def _taken(request: Any) -> list[Image] | str:
    """The pictures of a request, or why it has none."""
    files = triton.get_input_tensor_by_name(request, "image").as_numpy().ravel()
    try:
        for file in files:
            pictures.pixels(file)
        return [decode(file) for file in files]
    except pictures.Unreadable as error:
        return str(error)


def _answer(found: Sequence[Detections], most: int) -> Any:
    return triton.InferenceResponse([triton.Tensor(name, array) for name, array in filled(found, most).items()])


def _refusal(message: str, code: str) -> Any:
    return triton.InferenceResponse(error=triton.TritonError(message, getattr(triton.TritonError, code)))
