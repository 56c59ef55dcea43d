"""Take a checkpoint to plain, fused and typed ONNX files and, where there is TensorRT and a GPU, to an engine, all
verified against PyTorch and timed.

example:
  acmix-deploy export model.pt --fp16 --image-size 640 --for jetpack-6.2 --out deploy
  acmix-deploy export model.pt --int8 --calibration photos
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import (
    add_checkpoint,
    add_float32,
    add_fusion,
    add_max_pixels,
    add_target,
    console,
    input_shape,
    limit_pixels,
    needs_torch,
    positive,
    print_json,
    progress,
    target_of,
)
from acmix_deploy.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="checkpoint of PyTorch or Ultralytics (.pt, .pth) or program (.pt2)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: MODEL-deploy)")
    parser.add_argument("--fp16", action="store_true", help="also write a file that computes in half precision")
    parser.add_argument(
        "--fp16-io", action="store_true", help="the same, with inputs and outputs in half precision too"
    )
    add_float32(parser)
    parser.add_argument("--int8", action="store_true", help="also write a file whose layers are INT8; --calibration")
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="folder of images for --int8, like those to be seen"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--image-size", type=positive, metavar="N", help="side of the image (default: the model's own)")
    size.add_argument("--input-shape", type=input_shape, metavar="B,C,H,W", help="e.g. 1,3,384,640")
    parser.add_argument(
        "--dynamic",
        type=lambda text: [axis for axis in text.split(",") if axis],
        default=[],
        metavar="AXES",
        help="axes to leave free: batch, height, width, separated by commas",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="17 to 21 (default: 18, or what the target reads)")
    add_target(parser)
    parser.add_argument(
        "--plugin", type=Path, metavar="FILE", help="library for the engine (default: made here, if it can be)"
    )
    parser.add_argument("--no-engine", action="store_true", help="write files alone, also where TensorRT is")
    add_fusion(parser)
    add_checkpoint(parser)
    add_max_pixels(parser)


def run(options: argparse.Namespace) -> int:
    limit_pixels(options)
    if options.int8 != (options.calibration is not None):
        raise UserError(
            "--int8 and --calibration go together", "Give both: --int8 --calibration DIR, a folder of images."
        )
    target = target_of(options)
    with progress() as report_progress:
        pipeline = needs_torch("acmix_deploy.pipeline")
        report = pipeline.deploy(
            options.model,
            options.out or Path(f"{options.model.stem}-deploy"),
            fp16=options.fp16,
            fp16_io=options.fp16_io,
            float32=options.float32,
            calibration=options.calibration,
            image_size=options.image_size,
            input_shape=options.input_shape,
            dynamic=options.dynamic,
            opset=options.opset,
            target=target,
            form=options.target,
            engine=not options.no_engine,
            plugin=options.plugin,
            conv_branch=options.conv_branch,
            expect=options.expect,
            arch=options.arch,
            trust=options.trust,
            progress=report_progress,
        )
    if options.json:
        print_json(report)
    else:
        from acmix_deploy.report.show import show_export

        show_export(report, console())
    report.verification.check()
    return 0
