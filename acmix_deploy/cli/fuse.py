"""Fuse the ACmix blocks of an ONNX file that any exporter wrote.

example:
  acmix-deploy fuse model.onnx -o model.fused.onnx --expect 3
  acmix-deploy fuse model.onnx -o model.fused.onnx --for jetpack-7.2
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import progress, show
from acmix_deploy.options import add_options
from acmix_deploy.plan import Plan, chosen_branch, made_for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file, opset 11 or above")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the fused file goes")
    add_options(parser, Plan, "conv_branch", "expect", "target", "form")


def run(options: argparse.Namespace) -> int:
    from acmix_deploy import onnx_file
    from acmix_deploy.forms import write_for
    from acmix_deploy.fusion import fuse
    from acmix_deploy.graph import read
    from acmix_deploy.report.documents import FuseDocument
    from acmix_deploy.report.show_stages import show_fusion
    from acmix_deploy.targets import OPSETS, target_named

    target = made_for(target_named(options.target) if options.target else None, options.form)
    if target:
        opset = onnx_file.opset(read(options.model, weights=False))
        target.check_opset(min(opset, OPSETS[-1]), str(options.model))
    with progress() as report_progress:
        made = fuse(
            options.model,
            options.output,
            conv_branch=chosen_branch(options.conv_branch, target),
            expect=options.expect,
            progress=report_progress,
        )
    written = write_for(target, options.output, options.form).found if target else None
    show(options, FuseDocument.of(made, target=written), show_fusion)
    return 0
