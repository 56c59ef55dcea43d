"""Compare two files output by output, and detectors by what they detect in images.

example:
  acmix-deploy verify model.onnx model.fused.onnx --random 5
  acmix-deploy verify model.onnx model.fused.onnx --images photos -o verify.json
  acmix-deploy verify model.fused.onnx model.fp16.onnx --images photos --layers
  acmix-deploy verify detector.onnx --images photos --pad 0
  acmix-deploy verify --from verify.json --max-relative 0.02
  acmix-deploy verify model.fused.onnx model.engine --images photos --on jetson.local
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from acmix_deploy.cli.common import add_input_shape, add_max_pixels, limit_pixels, progress, show
from acmix_deploy.cli.on import add_on, run_on
from acmix_deploy.errors import UserError
from acmix_deploy.options import Provider, grey, not_negative, positive, provider, share

if TYPE_CHECKING:
    from acmix_deploy.verify import Verification


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", type=Path, nargs="?", help="file that is right, ONNX or an engine")
    parser.add_argument("candidate", type=Path, nargs="?", help="file to compare with it, ONNX or an engine")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--images",
        type=Path,
        metavar="DIR|YAML",
        help="take inputs from the images in a folder or a data set, and compare detections",
    )
    source.add_argument("--random", type=positive, metavar="N", help="take N random inputs (default: 3)")
    source.add_argument(
        "--from",
        dest="findings",
        type=Path,
        metavar="FILE",
        help="run nothing; judge what -o, --json or `export` wrote before",
    )
    add_input_shape(parser)
    parser.add_argument(
        "--provider",
        type=provider,
        choices=get_args(Provider),
        help="what ONNX Runtime runs the candidate on (default: cpu)",
    )
    parser.add_argument("--plugin", type=Path, metavar="FILE", help="library with custom layers of either")
    parser.add_argument(
        "--confidence",
        type=share,
        metavar="X",
        help="score above which there is a detection (default: 0.25)",
    )
    parser.add_argument(
        "--max-relative",
        type=not_negative,
        metavar="X",
        help="largest relative L2 of an output (default: by the candidate's type, docs/verify.md)",
    )
    parser.add_argument(
        "--max-lost",
        type=share,
        metavar="X",
        help="largest share of detections lost, and of such added (default: by the candidate's type, docs/verify.md)",
    )
    parser.add_argument(
        "--max-score-change",
        type=share,
        metavar="X",
        help="largest mean change of a detection's score (default: by the candidate's type, docs/verify.md)",
    )
    parser.add_argument(
        "--min-iou",
        type=share,
        metavar="X",
        help="smallest mean overlap of matching boxes (default: by the candidate's type, docs/verify.md)",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        default=None,
        help="also compare all tensors inside that both ONNX files have, and tell where the error begins",
    )
    parser.add_argument(
        "--pad",
        type=grey,
        metavar="GREY",
        help="put a border of this grey, 0 to 255, around the candidate's images, and compare detections alone; "
        "without a candidate it is the reference's own (DeepStream has 0; default: of the metadata, for both)",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="also write what --json prints to a file")
    parser.add_argument("--worst", type=Path, metavar="FILE", help="draw the worst image, both detectors side by side")
    add_max_pixels(parser)
    add_on(parser, "output", "worst")


def run(options: argparse.Namespace) -> int:
    limit_pixels(options)
    from acmix_deploy.document import write_document
    from acmix_deploy.report.documents import VerifyDocument
    from acmix_deploy.report.show_verification import show_verification

    if options.on:
        document = run_on(options, VerifyDocument)
        show(options, document, show_verification)
        document.check()
        return 0
    from acmix_deploy.verify.limits import relative_at_most
    from acmix_deploy.verify.picture import check_name, draw

    if options.worst:
        check_name(options.worst)
        if not options.images and not options.findings:
            raise UserError("--worst draws one of the images, and there are none", "Add --images DIR.")
    verification = _found(options)
    if options.max_relative is not None:
        verification = verification.judged_by(relative_at_most(options.max_relative))
    limits = {"lost": options.max_lost, "score_change": options.max_score_change, "iou": options.min_iou}
    verification = verification.judged_by(**{name: limit for name, limit in limits.items() if limit is not None})
    document = VerifyDocument(**verification.model_dump())
    if options.output:
        write_document(document, options.output)
    show(options, document, show_verification)
    if options.worst:
        worst = verification.worst_image
        if worst is None:
            raise UserError("no detections were compared, so there is no worst image", "Compare detectors on --images.")
        draw(worst, options.worst)
    verification.check()
    return 0


def _found(options: argparse.Namespace) -> Verification:
    names = ("images", "random", "input_shape", "confidence", "provider", "plugin", "layers", "pad")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.findings:
        if options.reference:
            raise UserError(f"--from judges {options.findings}, and {options.reference} is given too", "Give one.")
        if given:
            what = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"--from runs nothing, so that {what} would change nothing", "Leave out one or the other.")
        from acmix_deploy.verify import read_verification

        return read_verification(options.findings)
    if options.pad is not None:
        return _bordered(options, given)
    if not options.candidate:
        raise UserError("two files are compared", "Name the one that is right, then the other.")
    from acmix_deploy.verify import compare_files

    with progress() as report_progress:
        report_progress("comparing, tensor by tensor" if options.layers else "comparing")
        return compare_files(options.reference, options.candidate, **given)


def _bordered(options: argparse.Namespace, given: dict[str, Any]) -> Verification:
    """What another border costs."""
    if not options.images:
        raise UserError("--pad is the border around images, and there are none", "Add --images DIR.")
    if options.layers:
        raise UserError("--pad compares detections alone, and --layers tensors", "Leave out one or the other.")
    if not options.reference:
        raise UserError("no file is given", "Name the model.")
    from acmix_deploy.verify import compare_borders

    with progress() as report_progress:
        report_progress("comparing")
        return compare_borders(options.reference, options.candidate or options.reference, **given)
