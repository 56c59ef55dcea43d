"""Add a detector to a model repository of NVIDIA's Triton Inference Server.

example:
  acmix-deploy package triton model.engine -o repository
  acmix-deploy package triton model.engine --backend python -o repository
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from acmix_deploy.cli.common import add_batching, add_detector, show
from acmix_deploy.serving.triton import Backend

if TYPE_CHECKING:
    from rich.console import Console

    from acmix_deploy.serving.triton.repository import PackageDocument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file, or engine with its manifest")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="the repository; other models in it stay"
    )
    parser.add_argument(
        "--backend",
        choices=get_args(Backend),
        default="native",
        help="native: Triton's own backends, image tensors in; python: pictures as bytes in, acmix-deploy has to be in "
        "the container (default: native)",
    )
    add_batching(parser)
    add_detector(parser)


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.serving.triton.repository import package

    document = package(
        options.model,
        options.output,
        backend=options.backend,
        plugin=options.plugin,
        confidence=options.confidence,
        provider=options.provider,
        max_batch=options.max_batch,
        max_delay_ms=options.max_delay_ms,
    )
    show(options, document, _tell)
    return 0


def _tell(packaged: PackageDocument, console: Console) -> None:
    needs = [f"Triton's container needs {need}" for need in packaged.needs]
    lines = (f"{packaged.repository} holds {packaged.model}:", *(f"  {file}" for file in packaged.files), *needs)
    for line in (*lines, f"Start: {packaged.start}"):
        console.print(line, soft_wrap=True)
