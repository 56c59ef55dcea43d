"""Measure the latency of ONNX files on ONNX Runtime, in turn when there are several.

example:
  acmix-deploy profile model.onnx
  acmix-deploy profile model.onnx model.fused.onnx --samples 100
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import add_input_shape, console, positive, print_json, progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, nargs="+", help="ONNX file; the first is what others are compared with")
    parser.add_argument("--samples", type=positive, default=50, metavar="N", help="runs to count (default: 50)")
    parser.add_argument("--seconds", type=float, default=30.0, metavar="S", help="time for each file (default: 30)")
    parser.add_argument("--threads", type=positive, metavar="N", help="threads within an operator (default: all cores)")
    add_input_shape(parser)


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.profile import profile

    with progress() as report_progress:
        report_progress("measuring")
        profiles = profile(
            options.model,
            input_shape=options.input_shape,
            samples=options.samples,
            seconds=options.seconds,
            threads=options.threads,
        )
    if options.json:
        from acmix_deploy.report.documents import ProfileDocument

        print_json(ProfileDocument(profiles=profiles))
    else:
        from acmix_deploy.report.tables import latencies

        out = console()
        out.print(latencies(profiles))
        machine = profiles[0].machine
        out.print(f"{profiles[0].provider}, {profiles[0].threads} threads, {machine.cpu}", style="dim")
        for note in dict.fromkeys(profile.note for profile in profiles if profile.note):
            out.print(f"Note: {note}", style="yellow")
    return 0
