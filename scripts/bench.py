"""Time blocks on ONNX Runtime: fused against the plain export, in turn and in one run."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

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
from scripts import measured

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
    measured.add_folder(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    cells = (
        f"Median [10th to 90th percentile] of {options.samples} runs in {options.rounds} turns, and the ratio of "
        "medians [over the turns]; float32, batch 1"
    )
    others: list[list[measured.Value]] = []
    for name, (block, side) in relatives().items():
        print(f"measuring {name} ...", file=sys.stderr)
        plain, fused = measure(block, CHANNELS, side, options.samples, options.rounds, ("auto",))
        spreads = map(measured.percentiles, (plain, fused))
        others.append([f"{name}, {side}x{side}", *spreads, measured.times_faster(plain, fused)])
    columns = {f"{CHANNELS} ch": None, "plain ms": 2, "fused ms": 2, "times faster": 1}
    measured.write(options.into, "other-blocks", cells, columns, others, threads=plain.threads)
    found: list[list[measured.Value]] = []
    for channels, side in SHAPES:
        print(f"measuring {channels} channels, {side}x{side} ...", file=sys.stderr)
        block, branches = ACmix(channels, channels), ("dense", "grouped")
        plain, *forms = measure(block, channels, side, options.samples, options.rounds, branches)
        ratios = (measured.times_faster(plain, form) for form in forms)
        found.append([f"{channels} ch, {side}x{side}", *map(measured.percentiles, (plain, *forms)), *ratios])
    columns = {
        "block": None,
        **dict.fromkeys(("plain ms", "dense ms", "grouped ms"), 2),
        **dict.fromkeys(("dense, times faster", "grouped, times faster"), 1),
    }
    measured.write(options.into, "acmix-blocks", cells, columns, found, threads=plain.threads)


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


if __name__ == "__main__":
    main()
