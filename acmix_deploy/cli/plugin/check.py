"""Load a built plugin and print its creators, versions, architectures and kernels.

example:
  acmix-deploy plugin check libacmix_plugin.so
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("library", type=Path, help="libacmix_plugin.so")


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.plugin.library import check
    from acmix_deploy.report.documents import PluginDocument
    from acmix_deploy.report.show_stages import show_library

    show(options, PluginDocument(**check(options.library).model_dump()), show_library)
    return 0
