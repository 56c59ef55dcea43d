"""Write a manifest for an engine of trtexec, polygraphy or Ultralytics, so that the other verbs take it.

example:
  acmix-deploy adopt model.engine --metadata model.onnx
  acmix-deploy adopt model.engine --metadata model.fused.onnx --plugin libacmix_plugin.so
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import progress, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="engine, on the machine that it was built for")
    parser.add_argument(
        "--metadata",
        type=Path,
        metavar="FILE",
        help="ONNX file that it was built from, for class names, stride and task (default: what Ultralytics wrote "
        "before the engine)",
    )
    parser.add_argument("--plugin", type=Path, metavar="FILE", help="library with custom layers of the engine")


def run(options: argparse.Namespace) -> int:
    from acmix_deploy.engine.adopt import adopt
    from acmix_deploy.report.documents import AdoptDocument
    from acmix_deploy.report.show_stages import show_adopted

    with progress() as report_progress:
        made = adopt(options.model, metadata=options.metadata, plugin=options.plugin, progress=report_progress)
    show(options, AdoptDocument.of(made), show_adopted)
    return 0
