"""Turn the convolutions and matrix products of an ONNX file into INT8, calibrated on images.

example:
  acmix-deploy quantize model.fused.onnx --calibration photos -o model.int8.onnx
  acmix-deploy quantize model.fused.onnx --calibration photos -o model.int8.onnx --exclude 'acmix_0.*'
  acmix-deploy quantize model.onnx --calibration photos --validation labelled --max-map-drop 0.5 -o model.int8.onnx
  acmix-deploy quantize model.fused.onnx --calibration photos --for onnxruntime -o model.int8.onnx
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from acmix_deploy.cli.common import add_max_pixels, limit_pixels, progress, show
from acmix_deploy.errors import AcmixDeployError, CheckFailed, UserError
from acmix_deploy.options import Method, add_options, duration, not_negative, positive, share, sides
from acmix_deploy.plan import Plan
from acmix_deploy.targets import RUNTIMES

if TYPE_CHECKING:
    from acmix_deploy.artifacts import StageResult
    from acmix_deploy.precision import Goal, Int8Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="ONNX file in float32, as `fuse` or `export` wrote it")
    parser.add_argument(
        "--calibration",
        type=Path,
        required=True,
        metavar="DIR|YAML",
        help="images like those to be seen: a folder, or a data set's YAML",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="where the INT8 file goes")
    parser.add_argument(
        "--method",
        choices=get_args(Method),
        default="percentile",
        help="how the range of an activation follows from its values (default: percentile)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave the layers whose name, or whose weight's name, fits the pattern in floating point; may be repeated",
    )
    parser.add_argument("--quantize-head", action="store_true", help="quantise the detection head too")
    parser.add_argument(
        "--for",
        dest="target",
        choices=[name for name, target in RUNTIMES.items() if target.int8 == "uint8"],
        help="write it for ONNX Runtime's integer kernels on a CPU: uint8 with zero points, at outputs too, which no "
        "other target reads; the rest stays in float32",
    )
    parser.add_argument("--fp16", action="store_true", help="what is not INT8 becomes float16; needs opset 19")
    add_options(parser, Plan, "float32")
    parser.add_argument(
        "--image-size",
        type=sides,
        metavar="N|H,W",
        help="image size where the file leaves it free (default: that of its metadata, else 640)",
    )
    parser.add_argument("--limit", type=positive, default=256, metavar="N", help="read at most N images (default: 256)")
    parser.add_argument(
        "--validation",
        type=Path,
        metavar="DIR|YAML",
        help="leave layers in floating point until the file meets a target on these images, other ones than those of "
        "the calibration",
    )
    parser.add_argument(
        "--max-map-drop",
        type=not_negative,
        metavar="POINTS",
        help="largest drop in mAP50-95, in points of 100, on images with labels in YOLO's form",
    )
    parser.add_argument(
        "--max-lost",
        type=share,
        metavar="X",
        help="largest share of the float file's detections lost, and of such added; needs no labels (default: 0.05)",
    )
    parser.add_argument(
        "--max-score-change",
        type=share,
        metavar="X",
        help="largest mean change of a detection's score; needs no labels (default: 0.05)",
    )
    parser.add_argument(
        "--time-limit",
        type=duration,
        metavar="SECONDS",
        help="begin no further trial after this time; the best file so far is kept (default: none)",
    )
    add_max_pixels(parser)


def run(options: argparse.Namespace) -> int:
    limit_pixels(options)
    from acmix_deploy.precision import quantize
    from acmix_deploy.report.documents import QuantizeDocument
    from acmix_deploy.report.show_stages import show_int8

    goal = _goal(options)
    with progress() as report_progress:
        made = quantize(
            options.model,
            options.output,
            options.calibration,
            method=options.method,
            exclude=options.exclude,
            quantize_head=options.quantize_head,
            scheme=RUNTIMES[options.target].int8 if options.target else "symmetric",
            fp16=options.fp16,
            float32=options.float32,
            image_size=options.image_size,
            limit=options.limit,
            goal=goal,
            progress=report_progress,
        )
        made = _explained(made, options.model, options.calibration, report_progress)
    show(options, QuantizeDocument.of(made), show_int8)
    found = made.found.search
    if found and found.stopped == "interrupted":
        print(f"the best file so far is {made.artifact.path}", file=sys.stderr)
        raise KeyboardInterrupt
    if found and not found.met:
        figures = ", ".join(f"{name} {found.best.figures[name]:.3g}" for name in found.limits)
        limits = ", ".join(f"{name} {limit:g}" for name, limit in found.limits.items())
        ended = "in the time" if found.stopped else f"of {len(found.steps)}"
        raise CheckFailed(
            f"no set of layers {ended} meets the target: the best has {figures}, accepted are {limits}",
            f"It is {made.artifact.path}; try --method, --fp16 or more calibration images.",
        )
    return 0


def _explained(
    made: StageResult[Int8Report], source: Path, images: Path, progress: Callable[[str], None]
) -> StageResult[Int8Report]:
    """With a note of where the error begins, where an output is beyond what `verify` accepts."""
    from acmix_deploy.verify import compare_layers, inputs_for
    from acmix_deploy.verify.limits import FILE_TOLERANCES, tolerance_of

    for part, found in made.found.outputs.items():
        tolerance = tolerance_of(FILE_TOLERANCES, "int8", part)
        if tolerance and (found.relative_l2 is None or found.relative_l2 > tolerance.floor):
            break
    else:
        return made
    path = made.artifact.path
    progress(f"looking where the error of {path.name} begins")
    try:
        along = compare_layers(path.name, source, path, inputs_for(source, images, made.found.input_shape))
    except AcmixDeployError as error:
        note = f"where the error of {path.name} begins cannot be told: {error.message}"
    else:
        note = str(along)
    return replace(made, found=made.found.model_copy(update={"notes": [*made.found.notes, note]}))


def _goal(options: argparse.Namespace) -> Goal | None:
    """What the file has to reach; None where no target is given. Raises UserError where options do not fit."""
    drop, lost, change, images = (
        options.max_map_drop, options.max_lost, options.max_score_change, options.validation,
    )  # fmt: skip
    if images is None:
        given = {"--max-map-drop": drop, "--max-lost": lost, "--max-score-change": change}
        given["--time-limit"] = options.time_limit
        for name, value in given.items():
            if value is not None:
                raise UserError(f"{name} is about images to judge by, and there are none", "Add --validation DIR.")
        return None
    by_detections = lost is not None or change is not None
    if by_detections == (drop is not None):
        raise UserError(
            "--validation is judged by labels or by the float file's detections, and "
            + ("both are asked for" if by_detections else "neither is asked for"),
            "Give --max-map-drop for images with labels, else --max-lost and --max-score-change.",
        )
    from acmix_deploy.precision import Goal
    from acmix_deploy.verify.judges import ByDetections, ByLabels
    from acmix_deploy.verify.limits import DETECTION_LIMITS

    if drop is not None:
        limits = {"map_drop": drop}
        return Goal(limits, lambda source, shape: ByLabels(source, shape, images, drop), options.time_limit)
    usual = DETECTION_LIMITS["int8"]
    limits = {
        "lost": usual.lost if lost is None else lost,
        "score_change": usual.score_change if change is None else change,
    }
    return Goal(limits, lambda source, shape: ByDetections(source, shape, images, limits["lost"]), options.time_limit)
