"""What the verbs share: options, progress on stderr, types of arguments."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import get_args

from pydantic import BaseModel
from rich.console import Console

from acmix_deploy.artifacts import writing
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.targets import Form, Target, target_named


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every verb."""
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of tables")
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")


def add_fusion(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs that fuse."""
    parser.add_argument(
        "--conv-branch",
        choices=["auto", "dense", "grouped"],
        default="auto",
        help="form of the convolution branch: dense is fast on a GPU, grouped on a CPU (auto: dense)",
    )
    parser.add_argument("--expect", type=count, metavar="N", help="fail unless exactly N blocks fuse")


def add_float32(parser: argparse.ArgumentParser) -> None:
    """The option of the verbs that convert to float16."""
    parser.add_argument(
        "--float32",
        type=float32_list,
        default="decode,softmax,range",
        metavar="LIST",
        help="what stays in float32 beside float16: decode, softmax, range (docs/pipeline.md#half-precision) and "
        "patterns of names of nodes or weights, by commas; none for nothing (default: decode,softmax,range)",
    )


def float32_list(text: str) -> tuple[str, ...]:
    """``decode,model.22.*`` as its parts, ``none`` as nothing."""
    parts = tuple(text.split(","))
    if parts == ("none",):
        return ()
    if "none" in parts or "" in parts:
        raise ValueError(text)
    return parts


def add_target(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs that also write the file to carry to a target."""
    parser.add_argument(
        "--for",
        dest="made_for",
        metavar="TARGET",
        help="also write the file for a target, e.g. jetpack-6.2 (docs/targets.md)",
    )
    parser.add_argument(
        "--target",
        choices=get_args(Form),
        help="form of that file, not the device (default: the form in which the target takes the plugin)",
    )


def target_of(options: argparse.Namespace) -> Target | None:
    """The target that ``--for`` names. Raises UserError for an unknown one, and for a form that does not fit it."""
    if options.target and not options.made_for:
        raise UserError("--target is the form of the file for a target, and none is named", "Add --for TARGET.")
    target = target_named(options.made_for) if options.made_for else None
    if target and options.target:
        target.check_form(options.target)
    return target


def add_input_shape(parser: argparse.ArgumentParser) -> None:
    """The option of the verbs that run files whose axes may be free."""
    parser.add_argument(
        "--input-shape",
        type=input_shape,
        metavar="B,C,H,W",
        help="sizes for axes that are free (default: the engine's usual ones, else of training, else 1,3,640,640)",
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs that time models: fields of :class:`acmix_deploy.profile.subjects.Setup`."""
    parser.add_argument("--threads", type=positive, metavar="N", help="threads within an operator (default: all cores)")
    parser.add_argument(
        "--plugin", type=Path, metavar="FILE", help="plugin of the engines (default: where they were built with it)"
    )
    add_input_shape(parser)
    add_checkpoint(parser)


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs that open a detector: arguments of :meth:`acmix_deploy.serving.detector.Detector.load`."""
    parser.add_argument(
        "--confidence", type=share, default=0.25, metavar="X", help="score above which there is one (default: 0.25)"
    )
    parser.add_argument(
        "--provider",
        choices=["cpu", "cuda", "tensorrt"],
        default="cpu",
        help="what ONNX Runtime runs an ONNX file on (default: cpu)",
    )
    parser.add_argument("--plugin", type=Path, metavar="FILE", help="library with custom layers of the model")


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """The option of the verbs that read images from files; see :func:`limit_pixels`."""
    parser.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="leave out images of more pixels (default: OPENCV_IO_MAX_IMAGE_PIXELS, else 33554432 as in 8K video)",
    )


def limit_pixels(options: argparse.Namespace) -> None:
    """Have larger images than ``--max-pixels`` left out. To be called before anything imports OpenCV."""
    from acmix_deploy.detection.pictures import limit_opencv, max_pixels

    limit_opencv(options.max_pixels or max_pixels())


def add_batching(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs by which images that come one by one are run together."""
    parser.add_argument(
        "--max-batch", type=positive, default=8, metavar="N", help="images in a run at most (default: 8)"
    )
    parser.add_argument(
        "--max-delay-ms",
        type=not_negative,
        default=5.0,
        metavar="MS",
        help="how long an image waits for others at most (default: 5)",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs that load checkpoints."""
    parser.add_argument("--arch", metavar="PACKAGE.MODULE:FACTORY", help="makes the model for a bare state dict")
    parser.add_argument("--trust", action="store_true", help="let the checkpoint run code; only for files you trust")


def input_shape(text: str) -> tuple[int, int, int, int]:
    """``1,3,640,640`` as [B, C, H, W]."""
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(text)
    return sizes


def count(text: str) -> int:
    """An integer of at least 0."""
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = not_negative(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to 1")
    return value


def not_negative(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def duration(text: str) -> float:
    """Seconds, more than 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def console() -> Console:
    """Standard output, for text in which brackets mean nothing; wide where nobody sees its edge."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160)


def print_json(document: BaseModel) -> None:
    """Print a document of :mod:`acmix_deploy.report` on stdout."""
    print(document.model_dump_json(by_alias=True, indent=2))


def print_line(text: str) -> None:
    """Print a line on stdout at once. Raises UserError: the disk that it goes to is full."""
    try:
        with writing("the output"):
            print(text, flush=True)
    except (UserError, BrokenPipeError):  # nor can what is left be written when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show what is being done on stderr: a spinner in a terminal, a line for each step elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step: print(f"{step} ...", file=sys.stderr)
        return
    with Console(stderr=True).status("starting") as status:
        yield status.update


def needs_torch(module: str) -> ModuleType:
    """Import a module that needs PyTorch.

    Raises:
        MissingComponent: PyTorch is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "onnxscript"):
            raise
        raise MissingComponent(
            f"{error.name} is needed here and is not installed", "Run: pip install 'acmix-deploy[export]'"
        ) from error
