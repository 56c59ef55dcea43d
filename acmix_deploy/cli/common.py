"""What the verbs share: options, progress on stderr, types of arguments."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, get_args

from acmix_deploy.artifacts import writing
from acmix_deploy.document import D
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.options import Provider, add_options, bchw, not_negative, positive, provider, share
from acmix_deploy.plan import Plan
from acmix_deploy.runtime import hints

if TYPE_CHECKING:
    from rich.console import Console


FILES = {
    "bash": "_shtab_compgen_files",
    "zsh": "_files",
    "tcsh": "f",
    "fish": "(__fish_complete_path (commandline -ct))",
    "powershell": "_shtab_powershell_compgen_files",
}
"""The attribute ``complete`` of an argument that is a file, as ``shtab.FILE``, which is not imported for it."""

_stderr = argparse.Namespace(quiet=False)


def be_quiet(quiet: bool) -> None:
    """Whether :func:`tell` and :func:`progress` are silent from now on."""
    _stderr.quiet = quiet


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every verb."""
    parser.add_argument("--json", action="store_true", help="print JSON on stdout instead of tables")
    parser.add_argument(
        "--quiet", action="store_true", help="tell neither progress nor notes on stderr; results and errors stay"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback when something fails")


def add_input_shape(parser: argparse.ArgumentParser) -> None:
    """The option of the verbs that run files whose axes may be free."""
    parser.add_argument(
        "--input-shape",
        type=bchw,
        metavar="B,C,H,W",
        help="sizes for axes that are free (default: the engine's usual ones, else of the metadata, else 1,3,640,640)",
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs that time models: fields of :class:`acmix_deploy.profile.subjects.RunSettings`."""
    parser.add_argument("--threads", type=positive, metavar="N", help="threads within an operator (default: all cores)")
    add_provider(parser)
    parser.add_argument(
        "--plugin",
        type=Path,
        metavar="FILE",
        help="plugin of the engines (default: where they were built with it), and for --provider tensorrt",
    )
    add_input_shape(parser)
    add_options(parser, Plan, "arch", "trust", "code")


def add_provider(parser: argparse.ArgumentParser) -> None:
    """The option of the verbs that run ONNX files."""
    parser.add_argument(
        "--provider",
        type=provider,
        choices=get_args(Provider),
        default="cpu",
        help="what ONNX Runtime runs an ONNX file on (default: cpu)",
    )


def add_detector(parser: argparse.ArgumentParser) -> None:
    """Options of the verbs that open a detector: arguments of :meth:`acmix_deploy.serving.detector.Detector.load`."""
    parser.add_argument(
        "--confidence", type=share, default=0.25, metavar="X", help="score above which there is one (default: 0.25)"
    )
    add_provider(parser)
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


def console(*, stderr: bool = False) -> Console:
    """Standard output or error, for text in which brackets mean nothing; wide where nobody sees its edge."""
    from rich.console import Console

    seen = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, markup=False, highlight=False, width=None if seen else 160)


def show(options: argparse.Namespace, document: D, tables: Callable[[D, Console], None]) -> None:
    """Print a document on stdout: as JSON where that is asked for, else as ``tables`` shows it to a person."""
    with _printing():
        if options.json:
            print(document.model_dump_json(by_alias=True, indent=2))
        else:
            tables(document, console())


def print_line(text: str) -> None:
    """Print a line on stdout at once. Raises UserError: the disk that it goes to is full."""
    with _printing():
        print(text)


@contextmanager
def _printing() -> Iterator[None]:
    """Send on what is printed within when the block ends. Raises UserError: the disk that it goes to is full."""
    try:
        with writing("the output"):
            yield
            sys.stdout.flush()
    except (UserError, BrokenPipeError):  # nor can what is left be written when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def tell(text: object) -> None:
    """A note on stderr, which ``--quiet`` leaves out."""
    if not _stderr.quiet:
        print(text, file=sys.stderr)


def print_step(step: str) -> None:
    """Tell on stderr what is being done, in a line that stays."""
    tell(f"{step} ...")


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Show what is being done on stderr: a spinner in a terminal, a line for each step elsewhere; see be_quiet."""
    if _stderr.quiet or not sys.stderr.isatty():
        yield print_step
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("starting") as status:
        yield lambda step: status.update(escape(step))


def needs_torch(module: str) -> ModuleType:
    """Import a module that needs PyTorch.

    Raises:
        MissingComponent: PyTorch is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("torch", "onnxscript"):
            raise
        raise MissingComponent(
            f"{package} is needed here and is not installed",
            hints.NO_TORCH,
        ) from error
