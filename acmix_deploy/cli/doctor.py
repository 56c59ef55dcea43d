"""Say what this machine has, lacks or has wrong, what is in a file, or what a message means, and what mends each.

example:
  acmix-deploy doctor
  acmix-deploy doctor model.pt
  acmix-deploy doctor model.onnx --json
  acmix-deploy doctor --on jetson.local
  acmix-deploy doctor --error "KeyError: 'ACmix'"
  trtexec --onnx=model.onnx 2>&1 | acmix-deploy doctor --error -
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from acmix_deploy.cli.common import progress, show, tell
from acmix_deploy.cli.on import add_on, connected, run_on
from acmix_deploy.errors import UserError
from acmix_deploy.options import add_options
from acmix_deploy.plan import Plan

if TYPE_CHECKING:
    from acmix_deploy.report.documents import DoctorDocument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    looked_at = parser.add_mutually_exclusive_group()
    looked_at.add_argument("file", type=Path, nargs="?", help="checkpoint, ONNX file, engine or plugin (default: none)")
    looked_at.add_argument(
        "--error",
        metavar="TEXT",
        help="explain a message of TensorRT, ONNX Runtime, PyTorch, Ultralytics or others; - reads it, or a log, from "
        "stdin",
    )
    parser.add_argument(
        "--plugin", type=Path, metavar="FILE", help="library to look into (default: libacmix_plugin.so, if there)"
    )
    add_options(parser, Plan, "trust", "code")
    add_on(parser)


def run(options: argparse.Namespace) -> int:
    if options.error is not None:
        return _explain(options)
    if options.file and " " in str(options.file) and not _is_file(str(options.file)):
        raise UserError(
            f"there is no file {str(options.file)!r}", "For what a message means, run: acmix-deploy doctor --error TEXT"
        )
    from acmix_deploy.report.show_doctor import show_diagnosis

    document = _there(options) if options.on else _here(options)
    show(options, document, show_diagnosis)
    return 0 if document.healthy else 1


def _there(options: argparse.Namespace) -> DoctorDocument:
    """What stands before a device's own diagnosis, and that where this package is installed there."""
    from acmix_deploy.device.check import PACKAGE, components
    from acmix_deploy.report.documents import DoctorDocument

    with connected(options) as session:
        before = tuple(components(session))
        found = DoctorDocument(environment=())
        if any(component.name == PACKAGE and component.state == "ok" for component in before):
            found = run_on(options, DoctorDocument, session, alone=False)
    return found.model_copy(update={"machine": session.name, "environment": (*before, *found.environment)})


def _here(options: argparse.Namespace) -> DoctorDocument:
    from acmix_deploy.doctor.files import examine
    from acmix_deploy.doctor.machine import environment
    from acmix_deploy.report.documents import DoctorDocument

    with progress() as report_progress:
        file = None
        if options.file:  # before this machine, so that nothing is imported in the place of --code
            file = examine(
                options.file, trust=options.trust, code=options.code, plugin=options.plugin, progress=report_progress
            )
        report_progress("looking at this machine")
        return DoctorDocument(environment=environment(options.plugin), file=file)


def _explain(options: argparse.Namespace) -> int:
    from acmix_deploy.doctor.pasted import LONGEST, PastedDocument, explain
    from acmix_deploy.report.show_pasted import show_pasted

    text, cut = _stdin(LONGEST) if options.error == "-" else (options.error[-LONGEST:], len(options.error) > LONGEST)
    if not text.strip():
        raise UserError(
            "there is no text to explain",
            "Give the message, acmix-deploy doctor --error 'TEXT', or a log: acmix-deploy doctor --error - < build.log",
        )
    if options.error != "-" and _is_file(text):
        raise UserError(f"{text} is a file", f"Give what is in it: acmix-deploy doctor --error - < {text}")
    document = PastedDocument(messages=explain(text), cut=cut)
    show(options, document, show_pasted)
    return 0 if document.messages else 1


def _stdin(longest: int) -> tuple[str, bool]:
    """The last bytes of standard input as text, and whether there were more. Never holds much more than it gives."""
    if sys.stdin.isatty():
        tell("Paste it, then press Ctrl-D on a line of its own.")
    kept, cut = bytearray(), False
    while block := sys.stdin.buffer.read(1 << 20):
        kept += block
        if len(kept) > longest:
            del kept[:-longest]
            cut = True
    return kept.decode("utf-8", errors="replace"), cut


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name
        return False
