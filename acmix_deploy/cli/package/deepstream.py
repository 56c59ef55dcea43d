"""Write a folder with which NVIDIA's DeepStream runs a detector.

example:
  acmix-deploy package deepstream model.engine -o deepstream
  acmix-deploy package deepstream detector.onnx -o deepstream --source rtsp://camera/stream
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acmix_deploy.cli.common import show
from acmix_deploy.options import share

if TYPE_CHECKING:
    from rich.console import Console

    from acmix_deploy.serving.deepstream.folder import DeepStreamDocument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file, or engine with its manifest")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="the folder, which is made")
    parser.add_argument(
        "--source",
        metavar="URI|FILE",
        help="what it looks at: rtsp://..., http://..., or a video on the device (default: a video of DeepStream)",
    )
    parser.add_argument(
        "--confidence", type=share, default=0.25, metavar="X", help="score above which there is one (default: 0.25)"
    )
    parser.add_argument("--plugin", type=Path, metavar="FILE", help="library with custom layers of the model")


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.serving.deepstream.folder import SAMPLE, package

    document = package(
        options.model,
        options.output,
        source=SAMPLE if options.source is None else options.source,
        plugin=options.plugin,
        confidence=options.confidence,
    )
    show(options, document, _tell)
    return 0


def _tell(packaged: DeepStreamDocument, console: Console) -> None:
    lines = (f"{packaged.folder} holds:", *(f"  {file}" for file in packaged.files))
    notes = (f"Note: {note}" for note in packaged.notes)
    for line in (*lines, *notes, "On the device, in that folder:", *(f"  {command}" for command in packaged.commands)):
        console.print(line, soft_wrap=True)
