"""The main job on the trained detector: to FP16 and INT8 as a user would take it, and a picture of what it finds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from acmix_deploy import cli
from scripts import shapes
from scripts.train_shapes import CHECKPOINT

FOLDER = Path("out/demo")


def main() -> int:
    calibration = shapes.write(FOLDER / "calibration", seed=11, count=64)
    unseen = shapes.write(FOLDER / "unseen", seed=12, count=32)
    plain, half, int8 = (FOLDER / f"{CHECKPOINT.stem}{suffix}.onnx" for suffix in ("", ".fp16", ".int8"))
    picture = FOLDER / "found.png"
    for command in (
        [
            "export",
            os.path.relpath(CHECKPOINT),
            "--fp16",
            "--int8",
            "--calibration",
            calibration,
            "--expect",
            3,
            "--out",
            FOLDER,
        ],
        ["verify", plain, half, "--images", unseen, "--layers", "-o", FOLDER / "half.json"],
        ["verify", plain, int8, "--images", unseen, "--layers", "--worst", picture, "-o", FOLDER / "int8.json"],
        ["report", FOLDER],
    ):
        arguments = [*map(str, command)]
        print(f"$ acmix-deploy {' '.join(arguments)}", flush=True)
        if code := cli.main(arguments):
            return code
    print(f"\n{FOLDER / 'report.html'} tells everything in a browser")
    print(f"{picture} shows what the float32 file finds (left) and the INT8 file (right), where they differ most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
