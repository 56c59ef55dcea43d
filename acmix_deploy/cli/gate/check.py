"""Judge stored samples: pass, fail, inconclusive or not comparable, by the interval of the ratio of latencies.

example:
  acmix-deploy gate check gate.json
  acmix-deploy gate check baseline.json candidate.json --tolerance 3% --metric p50,p99
  acmix-deploy gate check old/ new/ --allow driver --junit gate.xml --summary summary.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acmix_deploy.cli.common import show
from acmix_deploy.errors import CheckFailed, Inconclusive
from acmix_deploy.options import parses

_CODES = {"pass": 0, "fail": 1, "inconclusive": 4, "not comparable": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "samples",
        type=Path,
        nargs="+",
        help="what `gate run` wrote; or a baseline and a candidate: that, .json of `profile --json` or of trtexec "
        "--exportTimes, or a folder of those, each file a round",
    )
    parser.add_argument(
        "--tolerance", type=tolerance, default=0.03, metavar="X", help="how much slower is accepted (default: 0.03)"
    )
    parser.add_argument(
        "--metric", type=metrics, default=("p50",), metavar="LIST", help="percentiles by commas (default: p50)"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FIELD",
        help="what may differ between the two, such as driver; again for another (docs/gate.md#not-comparable)",
    )
    parser.add_argument("--strict", action="store_true", help="fail unless it passes: exit code 1 in place of 4")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write the verdict as JUnit XML")
    parser.add_argument(
        "--summary", type=Path, metavar="FILE", help="also append it as Markdown, as to $GITHUB_STEP_SUMMARY"
    )


@parses("a share below 1, such as 3% or 0.03")
def tolerance(text: str) -> float:
    """``3%`` or ``0.03``."""
    value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= value < 1:
        raise ValueError(text)
    return value


def metrics(text: str) -> tuple[str, ...]:
    """``p50,p99`` as its parts."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def run(options: argparse.Namespace) -> int:
    try:
        code = _check(options)
    except Inconclusive as error:
        if options.strict:
            raise CheckFailed(error.message, error.hint) from error
        raise
    return 1 if options.strict and code else code


def _check(options: argparse.Namespace) -> int:
    from acmix_deploy.gate.read import read_pairs
    from acmix_deploy.gate.verdict import judge
    from acmix_deploy.report.documents import GateDocument
    from acmix_deploy.report.show_gate import show_verdict, write_junit, write_summary

    verdict = judge(read_pairs(options.samples), options.metric, options.tolerance, options.allow)
    if options.junit:
        write_junit(verdict, options.junit, strict=options.strict)
    if options.summary:
        write_summary(verdict, options.summary)
    show(options, GateDocument(**verdict.model_dump()), show_verdict)
    return _CODES[verdict.outcome]
