"""A file that detects, as one object: images in, boxes out; on ONNX Runtime or from an engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from acmix_deploy.detection.boxes import Detections, decode, no_detector, spoilt, unlike_detector
from acmix_deploy.detection.heads import Array, head_of
from acmix_deploy.detection.images import Fitter, Image, Placement
from acmix_deploy.detection.metadata import ModelMetadata
from acmix_deploy.detection.suppression import CONFIDENCE, IOU
from acmix_deploy.errors import AcmixDeployError, CheckFailed, UserError
from acmix_deploy.files import expect
from acmix_deploy.options import Provider
from acmix_deploy.runtime import onnxruntime, tensorrt
from acmix_deploy.runtime.inputs import Input, Shape, as_pixels, file_shape, image_shape, random_images
from acmix_deploy.runtime.models import open_model
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.runtime.reason import reason
from acmix_deploy.runtime.tensorrt import EngineRunner

if TYPE_CHECKING:
    from typing_extensions import Self

Feed = Mapping[str, Array]


class Fitted(NamedTuple):
    """Images as a model takes them."""

    batch: Array
    """May have more images than there are placements, of zeros, where the model takes no smaller batch."""
    placements: list[Placement]
    memory: Array
    """What the batch lies in."""


class Opened(NamedTuple):
    """A file that is ready to run."""

    run: Callable[[Feed], dict[str, Array]]
    inputs: tuple[Input, ...]
    outputs: tuple[Input, ...]
    metadata: ModelMetadata
    profiles: Mapping[str, tuple[Shape, Shape, Shape]]
    """Smallest, usual and largest shape of an engine's inputs with free axes."""
    close: Callable[[], None]
    """Frees what it holds of a device."""
    copied: Callable[[], float] | None = None
    """Seconds that the inputs of the last run took to the device, where that is told."""


class Detector:
    """A detector that is loaded and has run once, on noise. For one caller at a time, of any thread.

    A call is :meth:`fit`, :meth:`run` and :meth:`boxes`, each of which may be called by a thread of its own.
    Use it in a ``with`` statement, or call :meth:`close`: an engine holds memory of the device.
    """

    def __init__(self, name: str, opened: Opened, confidence: float, iou: float) -> None:
        self.name = name
        """Of the file, without its suffix."""
        self.inputs, self.outputs = opened.inputs, opened.outputs
        """What :meth:`infer` takes and gives; free axes are names or None."""
        self.names: Mapping[int, str] = opened.metadata.names
        """Of the classes, by their indices."""
        self.confidence, self.iou = confidence, iou
        self.most = opened.metadata.most
        """Detections of an image at most."""
        self._run, self._close, self._copied = opened.run, opened.close, opened.copied
        self._metadata = opened.metadata
        if len(self.inputs) != 1 or len(self.inputs[0].dims) != 4:
            raise no_detector(name, f"takes {', '.join(map(str, self.inputs))}")
        (self._input,) = self.inputs
        pixels = opened.metadata.pixels
        if (self._input.dtype == np.uint8) != bool(pixels):
            raise no_detector(name, f"takes {self._input}, and its metadata tell of {pixels or 'no'} pixels")
        profile = opened.profiles.get(self._input.name)
        wanted = image_shape(profile[1], pixels) if profile else opened.metadata.usual_shape
        self.input_shape: Shape = tuple(
            dim if isinstance(dim, int) else size
            for dim, size in zip(image_shape(self._input.dims, pixels), wanted, strict=True)
        )
        """[B, 3, H, W], whatever the order of the input: the size that images are letterboxed to, and the batch, the
        usual one where it is free."""
        batch = self._input.dims[0]
        fixed = batch if isinstance(batch, int) else None
        self.max_batch: int | None = profile[2][0] if profile else fixed
        """Images in one run at most; None where there is no limit."""
        self._min_batch = profile[0][0] if profile else fixed or 1
        if self.input_shape[1] != 3:
            raise no_detector(name, f"takes {self._input}")
        height, width = self.input_shape[2:]
        self._letterbox = opened.metadata.letterbox
        self._fitter = Fitter(self._letterbox, height, width, pixels)
        self._free: deque[Array] = deque()
        noise = random_images((self._min_batch, *self.input_shape[1:]))
        feed = as_pixels(noise, pixels) if pixels else noise.astype(self._input.dtype)
        outputs = self.infer({self._input.name: feed})
        if found := unlike_detector(opened.metadata, outputs):
            raise no_detector(name, found)
        self.head = head_of(opened.metadata, {key: output.shape for key, output in outputs.items()})
        """What it gives."""
        if problem := spoilt(self.head, outputs, confidence):
            raise CheckFailed(f"{name} gives {self.head.output} with {problem}, on noise {list(noise.shape)}")

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        plugin: Path | None = None,
        confidence: float = CONFIDENCE,
        iou: float = IOU,
        threads: int | None = None,
        provider: Provider = "cpu",
        engines: Path | None = None,
    ) -> Self:
        """Load a file and run it once.

        Args:
            path: an ONNX file or an engine with its manifest.
            plugin: library with custom layers, for engines (where the manifest says, by default) and provider
                "tensorrt".
            confidence: score above which there is a detection.
            iou: of two boxes of one class that overlap by more, as intersection over union, the better one stays.
            threads: of ONNX Runtime on the CPU; all cores by default.
            provider: what runs an ONNX file.
            engines: folder in which provider "tensorrt" keeps what it builds.

        Raises:
            UserError: the file cannot be used here, or is not a detector.
            MissingComponent: what runs it, or OpenCV, is not here.
            CheckFailed: it fails when it runs, or an output is not finite on noise.
        """
        kind = expect(path, "onnx", "engine")
        opened = _open_onnx(path, threads, provider, plugin, engines) if kind == "onnx" else _open_engine(path, plugin)
        try:
            return cls(path.stem, opened, confidence, iou)
        except BaseException:
            opened.close()
            raise

    def __call__(self, images: Sequence[Image]) -> list[Detections]:
        """What is in each of the images, which are taken in batches of at most :attr:`max_batch`.

        Args:
            images: each [h, w, 3], uint8 in BGR, as OpenCV reads them; of any size.

        Raises:
            UserError: an array is not such an image.
            CheckFailed: the model fails, or gives what is no box or score: NaN, infinities, scores outside [0, 1].
        """
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise UserError(f"an image is [h, w, 3] uint8, and {list(image.shape)} {image.dtype} is given")
        most = self.max_batch or max(len(images), 1)
        chunks = (self.fit(images[start : start + most]) for start in range(0, len(images), most))
        return [found for fitted in chunks for found in self.boxes(self.run(fitted), fitted.placements)]

    def fit(self, images: Sequence[Image]) -> Fitted:
        """Images as the model takes them, in memory that :meth:`run` gives back.

        Args:
            images: each [h, w, 3], uint8 in BGR; at most :attr:`max_batch`.
        """
        count = max(len(images), self._min_batch)
        memory = self._free.popleft() if self._free else self._empty(count)
        if len(memory) < count:
            memory = self._empty(count)
        batch = memory[:count]
        batch[len(images) :] = 0
        placements = [self._fitter(image, place) for image, place in zip(images, batch, strict=False)]
        return Fitted(batch, placements, memory)

    def run(self, fitted: Fitted) -> dict[str, Array]:
        """The raw outputs by name, in arrays of their own, of the images alone. Their batch is overwritten by a next
        :meth:`fit`.

        Raises:
            CheckFailed: the model fails.
        """
        outputs = self.infer({self._input.name: fitted.batch})
        self._free.append(fitted.memory)
        return {name: array[: len(fitted.placements)] for name, array in outputs.items()}

    def copy_seconds(self) -> float | None:
        """What the input of the last :meth:`run` took to the device; None where nothing tells."""
        return self._copied() if self._copied else None

    def boxes(self, outputs: Mapping[str, Array], placements: Sequence[Placement]) -> list[Detections]:
        """What is in each of the images of a run.

        Raises:
            CheckFailed: the outputs are no boxes or scores: NaN, infinities, scores outside [0, 1].
        """
        if problem := spoilt(self.head, outputs, self.confidence):
            raise CheckFailed(f"{self.name} gives {self.head.output} with {problem}")
        return decode(self.head, outputs, placements, confidence=self.confidence, iou=self.iou, most=self.most)

    def place(self, shape: Shape) -> Placement:
        """Where an image [h, w, ...] comes to lie in what the model sees."""
        return self._letterbox.place(shape, *self.input_shape[2:])

    def infer(self, feed: Feed) -> dict[str, Array]:
        """The raw outputs by name, in arrays of their own.

        Args:
            feed: an array for each of :attr:`inputs`.

        Raises:
            UserError: other inputs, types or shapes than the model takes, or smaller images than it is defined for.
            CheckFailed: the model fails.
        """
        self._check(feed)
        try:
            return self._run(feed)
        except AcmixDeployError:
            raise
        except Exception as error:  # ONNX Runtime's error types share no base of their own
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
            raise CheckFailed(f"{self.name} fails on {shapes}: {reason(error)}") from error

    @property
    def least(self) -> float:
        """Score that detections are above: :attr:`confidence`, or the file's own where it suppresses boxes; 0 for
        "classify", of which the best classes are told whatever their scores."""
        if self.head.task == "classify":
            return 0.0
        suppression = self._metadata.suppression
        return max(self.confidence, suppression.confidence) if suppression else self.confidence

    @property
    def note(self) -> str:
        """What is to be said of :attr:`confidence`; empty where there is nothing."""
        suppression = self._metadata.suppression
        return suppression.hidden(self.name, self.confidence) if suppression else ""

    def close(self) -> None:
        """Free what the model holds. It cannot run any more."""
        self._run = _closed
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _empty(self, count: int) -> Array:
        return np.zeros(file_shape((count, *self.input_shape[1:]), self._metadata.pixels), self._input.dtype)

    def _check(self, feed: Feed) -> None:
        if feed.keys() != {node.name for node in self.inputs}:
            raise UserError(
                f"{self.name} takes {', '.join(map(str, self.inputs))}, and is given {', '.join(feed) or 'nothing'}"
            )
        for node in self.inputs:
            array = feed[node.name]
            fits = len(array.shape) == len(node.dims) and all(
                size == dim for size, dim in zip(array.shape, node.dims, strict=True) if isinstance(dim, int)
            )
            if not fits or array.dtype != node.dtype:
                raise UserError(f"{self.name} takes {node}, and is given {list(array.shape)} {array.dtype}")
            self._metadata.check_size(self.name, image_shape(array.shape, self._metadata.pixels))


def _open_onnx(
    path: Path, threads: int | None, provider: Provider, plugin: Path | None, engines: Path | None
) -> Opened:
    """Polygraphy's runner is not taken: it imports PyTorch wherever that is installed. Threads do not spin, since
    others decode and fit meanwhile."""
    session = open_session(path, threads, spin=False, provider=provider, plugin=plugin, engines=engines)
    outputs = tuple(onnxruntime.outputs_of(session))
    names = [output.name for output in outputs]
    return Opened(
        run=lambda feed: dict(zip(names, session.run(None, feed), strict=True)),
        inputs=tuple(onnxruntime.inputs_of(session)),
        outputs=outputs,
        metadata=onnxruntime.metadata_of(session),
        profiles={},
        close=lambda: None,
    )


def _open_engine(path: Path, plugin: Path | None) -> Opened:
    model = open_model(path, plugin=plugin)
    held = ExitStack()
    runner: EngineRunner = held.enter_context(model.runner)
    return Opened(
        run=runner.infer,
        inputs=tensorrt.inputs_of(runner.manifest),
        outputs=tensorrt.outputs_of(runner.manifest),
        metadata=model.metadata,
        profiles=model.profiles,
        close=held.close,
        copied=lambda: runner.copy_time,
    )


def _closed(feed: Feed) -> dict[str, Array]:
    raise ValueError("the detector is closed")
