"""Turn the convolutions and matrix products of an ONNX file into INT8, calibrated on images.

example:
  acmix-deploy quantize model.fused.onnx --calibration photos -o model.int8.onnx
  acmix-deploy quantize model.fused.onnx --calibration photos -o model.int8.onnx --exclude 'acmix_0.*'
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from acmix_deploy.cli.common import add_max_pixels, limit_pixels, progress, show
from acmix_deploy.options import Method, add_options, positive, sides
from acmix_deploy.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file in float32, as `fuse` or `export` wrote it")
    parser.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="DIR|YAML",
        help="images like those to be seen: a folder, or a data set's YAML",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the INT8 file goes")
    parser.add_argument(
        "--method",
        choices=get_args(Method),
        default="percentile",
        help="how the range of an activation follows from its values (default: percentile)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave the layers whose name, or whose weight's name, fits the pattern in floating point; may be repeated",
    )
    parser.add_argument("--quantize-head", action="store_true", help="quantise the detection head too")
    parser.add_argument("--fp16", action="store_true", help="what is not INT8 becomes float16; needs opset 19")
    add_options(parser, Plan, "float32")
    parser.add_argument(
        "--image-size",
        type=sides,
        metavar="N|H,W",
        help="image size where the file leaves it free (default: that of its metadata, else 640)",
    )
    parser.add_argument("--limit", type=positive, default=256, metavar="N", help="read at most N images (default: 256)")
    add_max_pixels(parser)


def run(options: argparse.Namespace) -> int:
    limit_pixels(options)
    from acmix_deploy.precision import quantize
    from acmix_deploy.report.documents import QuantizeDocument
    from acmix_deploy.report.show_stages import show_int8

    with progress() as report_progress:
        made = quantize(
            options.model,
            options.output,
            options.calibration,
            method=options.method,
            exclude=options.exclude,
            quantize_head=options.quantize_head,
            fp16=options.fp16,
            float32=options.float32,
            image_size=options.image_size,
            limit=options.limit,
            progress=report_progress,
        )
    show(options, QuantizeDocument.of(made), show_int8)
    return 0
