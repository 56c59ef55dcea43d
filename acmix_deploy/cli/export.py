"""Take a checkpoint to plain, fused and typed ONNX files and, where there is TensorRT and a GPU, to an engine, all
verified against PyTorch and timed.

example:
  acmix-deploy export model.pt --fp16 --image-size 640 --for jetpack-6.2 --out deploy
  acmix-deploy export model.pt --int8 --calibration photos
  acmix-deploy export model.pt --fp16 --on jetson.local
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acmix_deploy.cli.common import add_max_pixels, limit_pixels, needs_torch, progress, show
from acmix_deploy.cli.on import add_on, connected
from acmix_deploy.options import add_options
from acmix_deploy.plan import Plan
from acmix_deploy.targets import NEWEST

if TYPE_CHECKING:
    from acmix_deploy.report.model import ExportReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, Plan)
    add_max_pixels(parser)
    add_on(parser)


def run(options: argparse.Namespace) -> int:
    limit_pixels(options)
    report = _there(options) if options.on else _here(options)
    from acmix_deploy.report.show import show_export

    show(options, report, show_export)
    report.verification.check()
    return 0


def _here(options: argparse.Namespace) -> ExportReport:
    plan = _plan(options)
    with progress() as report_progress:
        report: ExportReport = needs_torch("acmix_deploy.pipeline").deploy(plan, report_progress)
    return report


def _there(options: argparse.Namespace) -> ExportReport:
    from acmix_deploy.device.bare import Bare
    from acmix_deploy.device.stages import RemoteStages

    deploy = needs_torch("acmix_deploy.pipeline").deploy
    _plan(options, engine_target=None if options.no_engine else NEWEST)  # so that what is wrong is told at once
    with connected(options) as session:
        if options.no_engine:
            session.need_package()
        place = RemoteStages if session.runs_package else Bare
        there = place(session, _plan(options).out, fetch=options.fetch)
        plan = _plan(options, engine_target=None if options.no_engine else there.target)
        report: ExportReport = deploy(plan, session.progress, there)
    return report


def _plan(options: argparse.Namespace, **more: object) -> Plan:
    return Plan(**{name: value for name, value in vars(options).items() if name in Plan.model_fields}, **more)
