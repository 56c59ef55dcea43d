"""Serve a detector over HTTP: pictures in, boxes out.

example:
  acmix-deploy serve model.fused.onnx
  acmix-deploy serve model.engine --host 0.0.0.0 --token-file token.txt
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from acmix_deploy.cli.common import add_batching, add_detector, print_line
from acmix_deploy.errors import MissingComponent, UserError
from acmix_deploy.options import duration, port, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file, or engine with its manifest")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, for this machine alone)"
    )
    parser.add_argument("--port", type=port, default=8000, metavar="N", help="0 for a free one (default: 8000)")
    add_batching(parser)
    parser.add_argument(
        "--max-queue",
        type=positive,
        default=64,
        metavar="N",
        help="images that wait or run at most; others are answered with 429 (default: 64)",
    )
    parser.add_argument(
        "--deadline-ms",
        type=duration,
        default=10_000.0,
        metavar="MS",
        help="for a request to arrive, and for its answer; a model that takes longer is started again (default: 10000)",
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="holds the token that clients bring; also allows reloading"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="of ONNX Runtime on the CPU (default: all cores)")
    add_detector(parser)


def run(options: argparse.Namespace) -> int:
    if options.quiet:
        logging.disable(logging.INFO)
    try:
        from acmix_deploy.detection import pictures

        pictures.limit_opencv(pictures.max_pixels())
        from acmix_deploy.serving.batching import Limits
        from acmix_deploy.serving.server import ServeDocument, serve
        from acmix_deploy.serving.worker import Setup
    except ModuleNotFoundError as error:
        raise MissingComponent(
            f"serving needs {error.name}, which is not installed", "Run: pip install 'acmix-deploy[serve]'"
        ) from error

    def started(document: ServeDocument) -> None:
        print_line(document.model_dump_json(by_alias=True) if options.json else f"{document.model} at {document.url}")

    arguments = {name: getattr(options, name) for name in ("plugin", "confidence", "threads", "provider")}
    serve(
        Setup(options.model, arguments, options.max_batch),
        Limits(options.max_delay_ms / 1e3, options.max_queue, options.deadline_ms / 1e3),
        host=options.host,
        port=options.port,
        token=_token(options.token_file) if options.token_file else None,
        started=started,
    )
    return 0


def _token(path: Path) -> str:
    """What a file holds, without white space around it. Raises UserError where it is no token."""
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if len(token) < 16 or not token.isprintable() or " " in token:
        raise UserError(
            f"{path} holds no token: 16 printable characters or more without spaces",
            f"Run: openssl rand -hex 32 > {path}",
        )
    return token
