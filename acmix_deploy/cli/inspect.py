"""Say what a file is, from what it was made and with which versions: ONNX, engine, plugin, report, sidecar.

example:
  acmix-deploy inspect model.fused.onnx
  acmix-deploy inspect model.fused.onnx --json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="any file that acmix-deploy reads or writes; a plugin is loaded")


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.report.documents import InspectDocument
    from acmix_deploy.report.inspection import inspect
    from acmix_deploy.report.show_inspection import show_inspection

    inspection = inspect(options.file)
    show(options, InspectDocument(**inspection.model_dump()), show_inspection)
    inspection.check()
    return 0
