"""Build a TensorRT engine from an ONNX file, see that the plugin is in it, and write its manifest beside it.

example:
  acmix-deploy build model.fp16.onnx --plugin libacmix_plugin.so -o model.engine
  acmix-deploy build model.fp16.onnx --min 1,3,320,320 --opt 1,3,640,640 --max 4,3,640,640 -o model.engine
  acmix-deploy build model.fused.onnx --ultralytics -o model.engine
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from acmix_deploy.cli.common import progress, show
from acmix_deploy.errors import UserError
from acmix_deploy.manifest import Backend
from acmix_deploy.options import bchw
from acmix_deploy.targets import Form


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file, fused and in the types that the engine is to have")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the engine goes")
    parser.add_argument("--plugin", type=Path, metavar="FILE", help="library that computes the attention")
    parser.add_argument(
        "--target",
        choices=get_args(Form),
        help="how the attention is spelt for TensorRT: as a node with its definition, as a node alone, or in standard "
        "operators (default: as the TensorRT found and the plugin need it)",
    )
    for name, meaning in (("min", "smallest"), ("opt", "usual"), ("max", "largest")):
        parser.add_argument(
            f"--{name}", type=bchw, metavar="B,C,H,W", help=f"{meaning} input, where the file has free axes"
        )
    parser.add_argument(
        "--level", type=int, choices=range(6), default=3, help="optimization level; lower builds sooner (default: 3)"
    )
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="keep measured times here and use them again")
    parser.add_argument(
        "--fp16", action="store_true", help="permit half precision for a file in float32; TensorRT 8 only"
    )
    parser.add_argument(
        "--ultralytics",
        action="store_true",
        help="write the metadata before the engine, as Ultralytics' exporter does, so that YOLO('FILE') takes it",
    )
    parser.add_argument(
        "--backend", choices=get_args(Backend), help="which TensorRT (default: the first that is installed)"
    )


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.engine.build import build
    from acmix_deploy.report.documents import BuildDocument
    from acmix_deploy.report.show_stages import show_engine

    shapes = (options.min, options.opt, options.max)
    if any(shapes) and not all(shapes):
        raise UserError("--min, --opt and --max go together", "Give all three, or none where no axis is free.")
    with progress() as report_progress:
        made = build(
            options.model,
            options.output,
            plugin=options.plugin,
            form=options.target,
            level=options.level,
            fp16=options.fp16,
            timing_cache=options.timing_cache,
            shapes=shapes if all(shapes) else None,
            backend=options.backend,
            ultralytics=options.ultralytics,
            progress=report_progress,
        )
    show(options, BuildDocument.of(made), show_engine)
    return 0
