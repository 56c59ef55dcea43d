"""Draw each family's block before and after fusing, as docs/pictures.md; with ``--check`` only compare.

What is drawn is the ONNX file that PyTorch's exporter writes of the family's example and what `fuse` makes of it, from
the input on: without stored tensors and sizes, and without nodes that keep each value once. Nodes in a row that pad,
pick or join values are one box, and so are nodes of one type side by side.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import onnx_graphsurgeon as gs
import torch
from torch import nn

from acmix_deploy.export import export
from acmix_deploy.families import FAMILIES
from acmix_deploy.families.attention import MOVING
from acmix_deploy.families.examples import Examples
from acmix_deploy.fusion import fuse
from acmix_deploy.graph import RESHAPING, read

PAGE = Path(__file__).resolve().parents[1] / "docs" / "pictures.md"
_HEAD = """\
# Blocks before and after fusing

Each [family](families.md)'s block, as PyTorch's exporter writes it and as `fuse` rewrites it: what happens to
the input x, without stored tensors, sizes, and nodes that keep each value once. Round boxes compute; square ones pad,
pick and join. Written by `make docs`.
"""
CHANNELS, HEIGHT, WIDTH = 32, 16, 24

_MOVES = (MOVING | {"Concat", "Tile"}) - RESHAPING - {"Split"}


@dataclass(eq=False)
class _Box:
    """Nodes drawn as one."""

    types: Counter[str]
    sources: set[_Box] = field(default_factory=set)

    @property
    def moves(self) -> bool:
        """Whether they only move values."""
        return all(kind in _MOVES for kind in self.types)

    @property
    def text(self) -> str:
        return ", ".join(kind if count == 1 else f"{kind} x{count}" for kind, count in sorted(self.types.items()))


def picture(graph: gs.Graph) -> str:
    """A Mermaid flow chart of what the nodes of a graph do to its input, sizes and stored tensors left out."""
    boxes = _boxes(graph)
    while pair := _alike(boxes):
        _join(boxes, *pair)
    names = {box: f"n{index}" for index, box in enumerate(boxes)}
    lines = [f'  {names[box]}["{box.text}"]' if box.moves else f'  {names[box]}(["{box.text}"])' for box in boxes]
    for source in boxes[:-1]:
        readers = [names[box] for box in boxes if source in box.sources]
        lines.append(f"  {names[source]} --> {' & '.join(readers)}")
    return "\n".join(["```mermaid", "flowchart LR", *lines, "```"])


def _boxes(graph: gs.Graph) -> list[_Box]:
    """A box for the input and for each node that depends on more of it than its size, in order."""
    graph.toposort()
    made = {tensor.name: _Box(Counter(["x"])) for tensor in graph.inputs}
    boxes = [*made.values()]
    for node in graph.nodes:
        sources = {made[tensor.name] for tensor in node.inputs if tensor.name in made}
        if not sources or node.op == "Shape":
            continue
        if node.op in RESHAPING or node.op == "Split":
            (box,) = sources
        else:
            boxes.append(box := _Box(Counter([node.op]), sources))
        made.update((tensor.name, box) for tensor in node.outputs)
    boxes.append(_Box(Counter(["y"]), {made[tensor.name] for tensor in graph.outputs}))
    return boxes


def _alike(boxes: list[_Box]) -> tuple[_Box, _Box] | None:
    """Two boxes that can be one: moves in a row, a chain of additions, or the same beside each other."""
    readers = {box: {other for other in boxes if box in other.sources} for box in boxes}
    for box in boxes:
        for other in readers[box]:
            in_a_row = (box.moves and other.moves) or box.types.keys() == other.types.keys() == {"Add"}
            if in_a_row and len(readers[box]) == 1:
                return box, other
    for index, box in enumerate(boxes):
        for other in boxes[index + 1 :]:
            same = box.sources == other.sources and readers[box] == readers[other]
            if same and box.types.keys() == other.types.keys():
                return box, other
    return None


def _join(boxes: list[_Box], first: _Box, second: _Box) -> None:
    second.types += first.types
    second.sources = (second.sources | first.sources) - {first, second}
    boxes.remove(first)
    for box in boxes:
        if first in box.sources:
            box.sources = (box.sources - {first}) | {second}


def pictures(examples: Examples) -> tuple[str, str]:
    """The block as it is exported and as it is fused."""
    torch.manual_seed(0)
    block: nn.Module = examples.block(CHANNELS).eval()
    shape = (1, HEIGHT, WIDTH, CHANNELS) if examples.channels_last else (1, CHANNELS, HEIGHT, WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        plain, fused = Path(folder, "plain.onnx"), Path(folder, "fused.onnx")
        export(block, plain, input_shape=shape, opset=17)
        fuse(plain, fused, expect=1)
        before, after = (picture(gs.import_onnx(read(path))) for path in (plain, fused))
    return before, after


def page() -> str:
    """The page of all pictures."""
    parts = [_HEAD]
    for family in FAMILIES:
        variants: Iterable[Examples] = import_module(f"acmix_deploy.families.{family.name}.examples").EXAMPLES
        for examples in variants:
            name = ", ".join(filter(None, (family.name, examples.variant.replace("-", " "))))
            before, after = pictures(examples)
            parts.append(f"## {name}\n\nAs exported:\n\n{before}\n\nFused:\n\n{after}\n")
    return "\n".join(parts)


def main() -> int:
    """Write the page, or say whether it would change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page would change")
    text = page()
    if parser.parse_args().check:
        return int(text != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
