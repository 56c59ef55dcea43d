"""Engines on a GPU in one run: ACmix blocks and a YOLOv8n as PyTorch exports them, tiled, and by the plugin, FP16.

What it takes from elsewhere is in tests/gpu/engines.py. All engines of a model take turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from acmix_deploy.errors import AcmixDeployError
from acmix_deploy.profile import Profile, profile
from tests.gpu import engines
from tests.gpu.engines import BLOCKS, DETECTOR, FORMS, LEVEL, WITHOUT, Variant

DETECTORS = (
    *(Variant(DETECTOR, form, "float16") for form in FORMS),
    Variant(DETECTOR, "plugin", "int8"),
    Variant(WITHOUT, "exported", "float16"),
)


def measure(variants: Sequence[Variant], samples: int) -> list[Profile]:
    """Build what is missing, then time all in turn."""
    for variant in variants:
        print(f"building {variant} ...", file=sys.stderr, flush=True)
        variant.engine()
    print("timing ...", file=sys.stderr, flush=True)
    return profile([variant.engine() for variant in variants], samples=samples, rounds=5, seconds=20)


def cell(found: Profile) -> str:
    """Median and, in brackets, the 10th and 90th percentile, in microseconds."""
    low, median, high = (1e3 * found.percentile(q) for q in (10, 50, 90))
    return f"{median:.1f} [{low:.1f} to {high:.1f}]" + (", not settled" if not found.stable else "")


def times(first: Profile, second: Profile) -> str:
    return f"{first.median_ms / second.median_ms:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000, help="samples of each engine (default: 1000)")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    if engines.missing():
        sys.exit(f"make bench-engines: {engines.missing()}")

    found: list[Profile] = []
    print("| | exported, us | tiled, us | plugin, us | exported / plugin |")
    print("|---|---|---|---|---|")
    for block in BLOCKS:
        timed = measure([Variant(block, form, "float16") for form in FORMS], options.samples)
        found += timed
        print(f"| {block} | {' | '.join(map(cell, timed))} | {times(timed[0], timed[-1])} |", flush=True)
    timed = measure(DETECTORS, options.samples)
    found += timed
    print("\n| | us | / without ACmix |\n|---|---|---|")
    for variant, each in zip(DETECTORS, timed, strict=True):
        print(f"| {variant} | {cell(each)} | {times(each, timed[-1])} |")
    print(
        f"\nMedian [10th to 90th percentile] of a CUDA graph between events, batch 1, float32 input and output, "
        f"builder optimization level {LEVEL}; {found[0].where}; "
        f"{datetime.date.today().isoformat()}; {shlex.join(sys.argv)}"
    )
    for note in dict.fromkeys(note for each in found for note in each.notes):
        print(f"Note: {note}")
    if options.json:
        options.json.write_text(json.dumps([each.model_dump(mode="json") for each in found]))


if __name__ == "__main__":
    try:
        main()
    except AcmixDeployError as error:
        sys.exit(f"error: {error}")
