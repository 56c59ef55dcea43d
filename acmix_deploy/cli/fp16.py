"""Turn an ONNX file into one that computes in half precision, but for its sensitive parts.

example:
  acmix-deploy fp16 model.fused.onnx -o model.fp16.onnx
  acmix-deploy fp16 model.fused.onnx -o model.fp16.onnx --images photos --float32 decode,softmax,range,acmix_0.*
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import add_input_shape, add_max_pixels, limit_pixels, progress, show
from acmix_deploy.errors import UserError
from acmix_deploy.options import add_options
from acmix_deploy.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file in float32, as `fuse` or `export` wrote it")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the new file goes")
    add_options(parser, Plan, "fp16_io", "float32")
    parser.add_argument(
        "--images", type=Path, metavar="DIR|YAML", help="images to see ranges of activations on (default: random ones)"
    )
    add_input_shape(parser)
    add_max_pixels(parser)


def run(options: argparse.Namespace) -> int:
    limit_pixels(options)
    from acmix_deploy.files import expect
    from acmix_deploy.precision import to_fp16
    from acmix_deploy.report.documents import Fp16Document
    from acmix_deploy.report.show_stages import show_fp16
    from acmix_deploy.verify import inputs_for

    if options.images and "range" not in options.float32:
        raise UserError("--images shows ranges, and range is not among --float32", "Leave out one or the other.")
    expect(options.model, "onnx")
    with progress() as report_progress:
        samples = []
        if "range" in options.float32:
            report_progress("making inputs")
            try:
                samples = inputs_for(options.model, options.images, options.input_shape)
            except UserError:
                if options.images or options.input_shape:
                    raise  # else ranges are seen on weights alone, which is said
        report_progress("converting to half precision")
        made = to_fp16(options.model, options.output, fp16_io=options.fp16_io, float32=options.float32, samples=samples)
    show(options, Fp16Document.of(made), show_fp16)
    return 0
