"""One ACmix block on ONNX Runtime: fused against the plain export, in turn and in one run, as a Markdown table."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from acmix_deploy.export import export
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.profile import Profile, profile

SHAPES = ((64, 80), (128, 40), (256, 20))
"""Channels and side of the map: what P3, P4 and P5 of a YOLOv8n see at 640 pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=120, help="runs of each file (default: 120)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each file (default: 6)")
    options = parser.parse_args()
    print("| block | plain ms | dense ms | grouped ms | dense, times faster | grouped, times faster |")
    print("|---|---|---|---|---|---|")
    for channels, side in SHAPES:
        print(f"measuring {channels} channels, {side}x{side} ...", file=sys.stderr)
        plain, dense, grouped = measure(channels, side, options.samples, options.rounds)
        cells = [f"{channels} ch, {side}x{side}", *(_spread(p) for p in (plain, dense, grouped))]
        print("|", " | ".join([*cells, *(_ratio(plain, p) for p in (dense, grouped))]), "|", flush=True)
    machine = plain.machine
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine.versions.items()))
    print(f"\nMedian [10th to 90th percentile] of {options.samples} runs in {options.rounds} turns, float32, batch 1.")
    print(f"{plain.provider}, {plain.threads} threads, {machine.cpu}, {machine.system}; {versions}")


def measure(channels: int, side: int, samples: int, rounds: int) -> list[Profile]:
    """Plain, fused with the dense branch, fused with the grouped one."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "plain.onnx")
        export(ACmix(channels, channels).eval(), plain, input_shape=(1, channels, side, side))
        files = [plain]
        for branch in ("dense", "grouped"):
            files.append(plain.with_name(f"{branch}.onnx"))
            fuse(plain, files[-1], conv_branch=branch, expect=1)
        return profile(files, samples=samples, rounds=rounds, seconds=120)


def _spread(found: Profile) -> str:
    return f"{found.median_ms:.2f} [{found.percentile(10):.2f} to {found.percentile(90):.2f}]"


def _ratio(plain: Profile, fused: Profile) -> str:
    """Ratio of the medians, and its range over the turns."""
    turns = zip(*(np.array_split(np.array(p.samples_ms), p.rounds) for p in (plain, fused)), strict=True)
    ratios = [float(np.median(slow) / np.median(fast)) for slow, fast in turns]
    return f"{plain.median_ms / fused.median_ms:.1f} [{min(ratios):.1f} to {max(ratios):.1f}]"


if __name__ == "__main__":
    main()
