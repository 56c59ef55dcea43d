"""Measure a model, or two in turn, each turn in a fresh process, and keep every sample.

example:
  acmix-deploy gate run --baseline model.onnx --candidate model.fused.onnx -o gate.json
  acmix-deploy gate run --baseline old.engine --candidate new.engine --rounds 20 --parity verify.json -o gate.json
  acmix-deploy gate run --candidate model.fused.onnx --images photos -o baseline.json
  acmix-deploy gate run --baseline old.onnx --candidate new.onnx --on jetson.local -o gate.json
  acmix-deploy gate run --baseline old.onnx --candidate new.onnx --provider cuda -o gate.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acmix_deploy.cli.common import add_max_pixels, add_running, limit_pixels, progress, show
from acmix_deploy.cli.on import add_on, run_on
from acmix_deploy.options import duration, positive

if TYPE_CHECKING:
    from acmix_deploy.gate.samples import GateSamples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--candidate", type=Path, required=True, metavar="FILE", help="ONNX file, engine or checkpoint to judge"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="the one before it (default: the candidate is measured alone)"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="where every sample goes, round by round"
    )
    parser.add_argument("--rounds", type=positive, default=12, metavar="N", help="rounds of two turns (default: 12)")
    parser.add_argument(
        "--samples",
        type=positive,
        metavar="N",
        help="runs to count in a turn (default: 1000 on a GPU, 100 on a CPU)",
    )
    parser.add_argument("--seconds", type=duration, default=2.0, metavar="S", help="time for each turn (default: 2)")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR|YAML",
        help="take the input from images in a folder or a data set (default: noise)",
    )
    parser.add_argument(
        "--parity",
        type=Path,
        metavar="FILE",
        help="what `verify -o` wrote of the candidate (default: the report of `export` beside it, if there is one)",
    )
    add_running(parser)
    add_max_pixels(parser)
    add_on(parser, "output")


def run(options: argparse.Namespace) -> int:
    limit_pixels(options)
    from acmix_deploy.gate.samples import GateSamples
    from acmix_deploy.report.show_samples import show_samples

    samples = run_on(options, GateSamples) if options.on else _measure(options)
    show(options, samples, lambda found, console: show_samples(found, options.output, console))
    return 0


def _measure(options: argparse.Namespace) -> GateSamples:
    from acmix_deploy.gate.measure import measure
    from acmix_deploy.profile.run import keeping_engines
    from acmix_deploy.profile.subjects import RunSettings

    setup = RunSettings(**{name: value for name, value in vars(options).items() if name in RunSettings.model_fields})
    with progress() as report_progress, keeping_engines(setup) as setup:
        return measure(
            options.candidate,
            options.output,
            baseline=options.baseline,
            rounds=options.rounds,
            samples=options.samples,
            seconds=options.seconds,
            setup=setup,
            parity=options.parity,
            progress=report_progress,
        )
