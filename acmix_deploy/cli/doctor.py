"""Say what this machine has, lacks or has wrong, what is in a file, which known faults it has, and what mends each.

example:
  acmix-deploy doctor
  acmix-deploy doctor model.pt
  acmix-deploy doctor model.onnx --json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import progress, show
from acmix_deploy.options import add_options
from acmix_deploy.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, nargs="?", help="checkpoint, ONNX file, engine or plugin (default: none)")
    parser.add_argument(
        "--plugin", type=Path, metavar="FILE", help="library to look into (default: libacmix_plugin.so, if there)"
    )
    add_options(parser, Plan, "trust", "code")


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.doctor import environment, examine
    from acmix_deploy.report.documents import DoctorDocument
    from acmix_deploy.report.show_doctor import show_diagnosis

    with progress() as report_progress:
        file = None
        if options.file:  # before this machine, so that nothing is imported in the place of --code
            file = examine(
                options.file, trust=options.trust, code=options.code, plugin=options.plugin, progress=report_progress
            )
        report_progress("looking at this machine")
        here = environment(options.plugin)
    document = DoctorDocument(environment=here, file=file)
    show(options, document, show_diagnosis)
    return 0 if document.healthy else 1
