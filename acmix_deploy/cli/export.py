"""Take a checkpoint to plain, fused and typed ONNX files and, where there is TensorRT and a GPU, to an engine, all
verified against PyTorch and timed.

example:
  acmix-deploy export model.pt --fp16 --image-size 640 --for jetpack-6.2 --out deploy
  acmix-deploy export model.pt --int8 --calibration photos
"""

from __future__ import annotations

import argparse

from acmix_deploy.cli.common import add_max_pixels, limit_pixels, needs_torch, progress, show
from acmix_deploy.options import add_options
from acmix_deploy.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, Plan)
    add_max_pixels(parser)


def run(options: argparse.Namespace) -> int:
    limit_pixels(options)
    plan = Plan(**{name: value for name, value in vars(options).items() if name in Plan.model_fields})
    with progress() as report_progress:
        report = needs_torch("acmix_deploy.pipeline").deploy(plan, report_progress)
    from acmix_deploy.report.show import show_export

    show(options, report, show_export)
    report.verification.check()
    return 0
