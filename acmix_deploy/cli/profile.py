"""Measure the latency of ONNX files, engines and checkpoints, in turn when there are several.

With --end-to-end: of all that detection takes, from a picture or a frame to its boxes.

example:
  acmix-deploy profile model.onnx
  acmix-deploy profile model.onnx model.fused.onnx --layers
  acmix-deploy profile model.pt model.engine --input-shape 1,3,320,320
  acmix-deploy profile model.engine --layers --power
  acmix-deploy profile model.engine times.json
  acmix-deploy profile model.fp16.onnx model.int8.onnx --on jetson.local --power
  acmix-deploy profile model.fused.onnx model.engine --provider cuda
  acmix-deploy profile model.fused.onnx model.engine --end-to-end street.mp4
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acmix_deploy.cli.common import add_running, progress, show
from acmix_deploy.cli.on import add_on, run_on
from acmix_deploy.errors import UserError
from acmix_deploy.options import duration, positive

if TYPE_CHECKING:
    from acmix_deploy.profile import Profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        type=Path,
        nargs="+",
        help="ONNX file, engine, checkpoint, or .json of trtexec --exportTimes; the others are compared with the first",
    )
    parser.add_argument(
        "--samples", type=positive, metavar="N", help="runs to count (default: 1000 on a GPU, 50 on a CPU)"
    )
    parser.add_argument("--seconds", type=duration, default=30.0, metavar="S", help="time for each file (default: 30)")
    parser.add_argument("--layers", action="store_true", help="also time every layer, and sum them up by block")
    parser.add_argument("--power", action="store_true", help="also measure power, and energy per inference")
    parser.add_argument(
        "--end-to-end",
        metavar="IMAGES|VIDEO",
        help="time detection from this source to the boxes instead: decoding, fitting, the model and its boxes",
    )
    add_running(parser)
    add_on(parser)


_NOT_END_TO_END = {
    "samples": None,
    "layers": False,
    "power": False,
    "input_shape": None,
    "arch": None,
    "trust": False,
    "code": None,
    "on": None,
}
"""Options of the latency alone, and what they are where nobody gives them."""


def run(options: argparse.Namespace) -> int:
    if options.end_to_end is not None:
        return _end_to_end(options)
    from acmix_deploy.profile import ProfileDocument
    from acmix_deploy.report.show_profile import show_profiles

    found = run_on(options, ProfileDocument) if options.on else ProfileDocument(profiles=_profiles(options))
    show(options, found, show_profiles)
    return 0


def _end_to_end(options: argparse.Namespace) -> int:
    for name, default in _NOT_END_TO_END.items():
        if getattr(options, name) != default:
            raise UserError(f"--{name.replace('_', '-')} is not for --end-to-end", "Leave one of both out.")
    from acmix_deploy.report.show_path import show_end_to_end
    from acmix_deploy.serving.end_to_end import end_to_end

    with progress() as report_progress:
        report_progress("measuring")
        found = end_to_end(
            options.model,
            options.end_to_end,
            seconds=options.seconds,
            threads=options.threads,
            plugin=options.plugin,
            provider=options.provider,
        )
    show(options, found, show_end_to_end)
    return 0


def _profiles(options: argparse.Namespace) -> list[Profile]:
    from acmix_deploy.profile import profile

    with progress() as report_progress:
        report_progress("measuring")
        return profile(
            options.model,
            input_shape=options.input_shape,
            samples=options.samples,
            seconds=options.seconds,
            threads=options.threads,
            plugin=options.plugin,
            provider=options.provider,
            arch=options.arch,
            trust=options.trust,
            code=options.code,
            layers=options.layers,
            power=options.power,
        )
