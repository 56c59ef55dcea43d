"""Compile the TensorRT plugin for this machine, with the CUDA toolkit and the TensorRT headers that are found.

example:
  acmix-deploy plugin build
  acmix-deploy plugin build --tensorrt /opt/tensorrt --arch 87,110 --out plugin
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import progress, show
from acmix_deploy.options import parses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tensorrt", type=Path, metavar="DIR", help="folder of TensorRT or its headers (default: search)"
    )
    parser.add_argument(
        "--arch",
        type=architectures,
        action="extend",
        default=[],
        metavar="SM",
        help="architectures, e.g. 87 or 87,110 (default: the device's own, else all that are supported)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="folder for libacmix_plugin.so (default: this one)"
    )


@parses("numbers of architectures by commas, such as 87,110")
def architectures(text: str) -> list[int]:
    """``87,sm_110`` as [87, 110]."""
    return [int(name.removeprefix("sm_")) for name in text.split(",")]


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.plugin.build import build
    from acmix_deploy.plugin.library import check
    from acmix_deploy.report.documents import PluginDocument
    from acmix_deploy.report.show_stages import show_library

    with progress() as report_progress:
        library = build(options.out, tensorrt=options.tensorrt, architectures=options.arch, progress=report_progress)
    show(options, PluginDocument(**library.model_dump()), show_library)
    if not options.tensorrt:
        check(library.path)
    return 0
