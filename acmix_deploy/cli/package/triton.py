"""Add a detector to a model repository of NVIDIA's Triton Inference Server.

example:
  acmix-deploy package triton model.engine -o repository
  acmix-deploy package triton model.engine --backend python -o repository
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import add_batching, add_detector, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file, or engine with its manifest")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="the repository; other models in it stay"
    )
    parser.add_argument(
        "--backend",
        choices=["native", "python"],
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
    if options.json:
        print_json(document)
    else:
        print(f"{document.repository} holds {document.model}:", *document.files, sep="\n  ")
        for need in document.needs:
            print(f"Triton's container needs {need}")
        print(f"Start: {document.start}")
    return 0
