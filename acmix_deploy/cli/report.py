"""Write all that a folder tells about a deployment as one HTML file: fusion, errors, detections, latency, layers, gate.

example:
  acmix-deploy report deploy
  acmix-deploy report deploy -o report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from acmix_deploy.cli.common import progress, show
from acmix_deploy.errors import MissingComponent

if TYPE_CHECKING:
    from rich.console import Console

    from acmix_deploy.report.documents import HtmlDocument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        help="holds report.json of `export`, or what `verify`, `profile`, `gate run` and so on wrote",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the HTML file (default: FOLDER/report.html)")


def run(options: argparse.Namespace) -> int:
    try:
        from acmix_deploy.report.html import write_html
    except ModuleNotFoundError as error:
        if error.name not in ("jinja2", "matplotlib"):
            raise
        raise MissingComponent(
            f"{error.name} is needed here and is not installed", "Run: pip install 'acmix-deploy[report]'"
        ) from error

    with progress() as report_progress:
        report_progress("drawing")
        written = write_html(options.folder, options.output or options.folder / "report.html")
    show(options, written, _tell)
    return 0


def _tell(written: HtmlDocument, console: Console) -> None:
    console.print(f"{written.file} tells what is in {', '.join(written.documents)}", soft_wrap=True)
    for note in written.notes:
        console.print(f"Left out: {note}", soft_wrap=True)
