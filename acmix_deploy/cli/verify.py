"""Compare two ONNX files output by output on ONNX Runtime, at several sizes where their axes are free.

example:
  acmix-deploy verify model.onnx model.fused.onnx --random 5
  acmix-deploy verify model.onnx model.fused.onnx --images photos
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import add_input_shape, console, positive, print_json, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", type=Path, help="ONNX file that is right")
    parser.add_argument("candidate", type=Path, help="ONNX file to compare with it")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, metavar="DIR", help="take inputs from the images in a folder")
    source.add_argument("--random", type=positive, default=3, metavar="N", help="take N random inputs (default: 3)")
    add_input_shape(parser)


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.verify import compare_files

    with progress() as report_progress:
        report_progress("comparing")
        verification = compare_files(
            options.reference,
            options.candidate,
            images=options.images,
            random=options.random,
            input_shape=options.input_shape,
        )
    if options.json:
        from acmix_deploy.report.documents import VerifyDocument

        print_json(VerifyDocument(**verification.model_dump()))
    else:
        from acmix_deploy.report.tables import errors

        out = console()
        out.print(errors(verification))
        for note in verification.notes:
            out.print(f"Note: {note}", style="yellow")
    verification.check()
    return 0
