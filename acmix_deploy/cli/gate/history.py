"""Show how latency went over all measurements in a folder: by time, with steps, trends and what changed.

example:
  acmix-deploy gate history measurements
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=Path, help="folder of what `gate run` wrote, a file for each run")


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.gate.history import read_history
    from acmix_deploy.report.documents import HistoryDocument
    from acmix_deploy.report.show_samples import show_histories

    histories, notes = read_history(options.dir)
    show(options, HistoryDocument(histories=histories, notes=notes), show_histories)
    return 0
