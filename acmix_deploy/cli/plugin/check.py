"""Load a built plugin and print its creators, versions, architectures and kernels.

example:
  acmix-deploy plugin check libacmix_plugin.so
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acmix_deploy.cli.common import console, print_json

if TYPE_CHECKING:
    from acmix_deploy.plugin.library import Library


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("library", type=Path, help="libacmix_plugin.so")


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.plugin.library import check

    library = check(options.library)
    if options.json:
        from acmix_deploy.report.documents import PluginDocument

        print_json(PluginDocument(**library.model_dump()))
    else:
        show(library)
    return 0


def show(library: Library) -> None:
    """Print what a library holds as tables."""
    from acmix_deploy.report.tables import creators, kernels

    out = console()
    out.print(creators(library))
    out.print(kernels(library), "")
    out.print(f"{library.path}: version {library.version}, TensorRT {library.tensorrt}, CUDA {library.cuda}")
    out.print(f"Architectures: {library.architectures}")
