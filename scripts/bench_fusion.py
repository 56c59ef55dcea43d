"""What fusing costs against the number of nodes: chains of ACmix blocks, each in a process of its own."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import onnx
from onnx import compose

from acmix_deploy.fusion import fuse
from scripts import measured

Result = TypeVar("Result")
DYNAMIC = ("batch", "height", "width")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("blocks", type=int, nargs="*", default=[1, 10, 100], help="lengths of chains to fuse")
    measured.add_folder(parser)
    options = parser.parse_args()
    rows: list[list[measured.Value]] = []
    with tempfile.TemporaryDirectory() as folder:
        for sizes, dynamic in {"static": (), "dynamic": DYNAMIC}.items():
            source = Path(folder, f"{sizes}.onnx")
            alone(write_block, source, dynamic)
            for blocks in options.blocks:
                print(f"fusing {blocks} blocks of {sizes} sizes ...", file=sys.stderr)
                path = source.with_name("chain.onnx")
                alone(write_chain, source, blocks, path)
                nodes, seconds, memory = alone(cost, path, blocks)
                rows.append([sizes, blocks, nodes, seconds, memory])
    columns = {"sizes": None, "blocks": 0, "nodes": 0, "CPU s": 1, "more memory, MB": 0}
    measured.write(options.into, "fusing", "One run each", columns, rows)


def write_block(path: Path, dynamic: tuple[str, ...]) -> None:
    """An ACmix of 16 channels at 20x20 pixels, at opset 17: its sizes and positions are nodes where axes are free."""
    from acmix_deploy.export import export
    from acmix_deploy.families.acmix.module import ACmix

    export(ACmix(16, 16).eval(), path, input_shape=(1, 16, 20, 20), opset=17, dynamic=dynamic)


def chain(block: onnx.ModelProto, length: int) -> onnx.ModelProto:
    """``length`` copies of a model of one input and one output, one behind the other."""
    (first,), (last,) = block.graph.input, block.graph.output
    model = compose.add_prefix(block, "0.")
    for index in range(1, length):
        joint = (f"{index - 1}.{last.name}", f"{index}.{first.name}")
        model = compose.merge_models(model, compose.add_prefix(block, f"{index}."), io_map=[joint])
    return model


def write_chain(source: Path, length: int, path: Path) -> None:
    onnx.save(chain(onnx.load(source), length), path)


def cost(path: Path, blocks: int) -> tuple[int, float, float]:
    """Nodes, seconds of CPU and how many MB more than before the process had at most, of fusing a file."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    report = fuse(path, path.with_name("fused.onnx"), expect=blocks).found
    seconds = time.process_time() - start
    return report.nodes_before, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def alone(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function returns in a fresh process, whose peak of memory begins at that of this one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    main()
