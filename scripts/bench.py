"""Blocks on ONNX Runtime: fused against the plain export, in turn and in one run, as Markdown tables."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from acmix_deploy.export import export
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.carafe.examples import nearest_first
from acmix_deploy.families.carafe.module import Carafe
from acmix_deploy.families.involution.module import Involution
from acmix_deploy.families.local_attention.module import LocalAttention
from acmix_deploy.fusion import fuse
from acmix_deploy.operators.neighborhood_attention import Border
from acmix_deploy.options import ConvBranchChoice
from acmix_deploy.profile import Profile, profile

SHAPES = ((64, 80), (128, 40), (256, 20))
"""Channels and side of the map: what P3, P4 and P5 of a YOLOv8n see at 640 pixels."""

CHANNELS = 64


def relatives() -> dict[str, tuple[nn.Module, int]]:
    """Blocks of other families with ``CHANNELS`` channels, and the side of the map."""
    spelt_otherwise = Carafe(CHANNELS)
    spelt_otherwise._reassemble = partial(nearest_first, k_up=5)  # type: ignore[method-assign]
    return {
        "Involution": (Involution(CHANNELS), 80),
        "CARAFE, unfolded first": (Carafe(CHANNELS), 40),
        "CARAFE, nearest first": (spelt_otherwise, 40),
        "local attention, zeros": (LocalAttention(CHANNELS, border=Border.ZEROS), 80),
        "local attention, shifted": (LocalAttention(CHANNELS, bias=True), 80),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=120, help="runs of each file (default: 120)")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each file (default: 6)")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"| {CHANNELS} ch | plain ms | fused ms | times faster |\n|---|---|---|---|")
    for name, (block, side) in relatives().items():
        print(f"measuring {name} ...", file=sys.stderr)
        plain, fused = measure(block, CHANNELS, side, options.samples, options.rounds, ("auto",))
        print(f"| {name}, {side}x{side} | {_spread(plain)} | {_spread(fused)} | {_ratio(plain, fused)} |", flush=True)
    print("\n| block | plain ms | dense ms | grouped ms | dense, times faster | grouped, times faster |")
    print("|---|---|---|---|---|---|")
    for channels, side in SHAPES:
        print(f"measuring {channels} channels, {side}x{side} ...", file=sys.stderr)
        block, branches = ACmix(channels, channels), ("dense", "grouped")
        plain, dense, grouped = measure(block, channels, side, options.samples, options.rounds, branches)
        cells = [f"{channels} ch, {side}x{side}", *(_spread(p) for p in (plain, dense, grouped))]
        print("|", " | ".join([*cells, *(_ratio(plain, p) for p in (dense, grouped))]), "|", flush=True)
    machine = plain.machine
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine.versions.items()))
    print(f"\nMedian [10th to 90th percentile] of {options.samples} runs in {options.rounds} turns, float32, batch 1.")
    print(f"{plain.provider}, {plain.threads} threads, {machine.cpu}, {machine.system}; {versions}")


def measure(
    block: nn.Module, channels: int, side: int, samples: int, rounds: int, branches: Sequence[ConvBranchChoice]
) -> list[Profile]:
    """The block as it is exported, and fused with each form of the convolution branch."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "plain.onnx")
        export(block.eval(), plain, input_shape=(1, channels, side, side))
        files = [plain]
        for branch in branches:
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
