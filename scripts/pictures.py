"""Draw blocks before and after fusing, docs/graphs/*.svg, and write what pages say of them; with ``--check`` compare.

What is drawn is the ONNX file that PyTorch's exporter writes of a block and what `fuse` makes of it, from the input
on: without stored tensors and sizes, and without nodes that keep each value once. Nodes in a row that pad, pick or join
values are one box, and so are nodes of one type side by side.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import igraph
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from torch import nn

from acmix_deploy.export import export
from acmix_deploy.families import FAMILIES
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.attention import MOVING
from acmix_deploy.families.examples import Examples
from acmix_deploy.families.local_attention.module import Border
from acmix_deploy.forms import to_form
from acmix_deploy.fusion import fuse
from acmix_deploy.graph import RESHAPING, count_nodes, evaluate, read

DOCS = Path(__file__).resolve().parents[1] / "docs"
_HEAD = """\
# Blocks before and after fusing

Each [family](families.md)'s block, as PyTorch's exporter writes it and as `fuse` rewrites it. How to read them is told
[where the first is explained](how-it-works.md#the-graph-before-and-after), by a larger block: the figures depend on the
settings, which stand above each picture. Written by `make docs`.
"""
CHANNELS, HEIGHT, WIDTH = 32, 16, 24
EXPLAINED = DOCS / "how-it-works.md"
SHAPE = (1, 64, 80, 80)
"""Of the input there."""
_BEGIN, _END = "<!-- costs:begin -->", "<!-- costs:end -->"

_MOVES = (MOVING | {"Concat", "Tile"}) - RESHAPING - {"Split"}
_MUCH = 10
"""Inputs that a box has to write to stand out."""


@dataclass(eq=False)
class Box:
    """Nodes drawn as one."""

    types: Counter[str]
    sources: set[Box] = field(default_factory=set)
    written: float = 0
    """How many inputs fit into what they write."""

    @property
    def moves(self) -> bool:
        """Whether they only move values."""
        return all(kind in _MOVES for kind in self.types)

    @property
    def text(self) -> list[str]:
        """Their types, line by line."""
        return [kind if count == 1 else f"{count} {kind}" for kind, count in sorted(self.types.items())]


class File(NamedTuple):
    """A block in a file."""

    boxes: Sequence[Box]
    nodes: int
    """All that are in the file."""
    written: float
    """How many inputs fit into what its nodes write, but for what is known without the image."""
    largest: float
    """The same of the node that writes most."""


def looked_into(model: onnx.ModelProto) -> File:
    """What the nodes of a model, with one image as its input, do to it."""
    graph = gs.import_onnx(model).toposort()
    (image,) = graph.inputs
    tensors = [tensor for node in graph.nodes for tensor in node.outputs if tensor.name]
    values = np.random.default_rng(0).random(image.shape, dtype=np.float32)
    results = evaluate(graph, tensors, {image.name: values}, model.functions)
    sizes = {tensor.name: result.nbytes / values.nbytes for tensor, result in zip(tensors, results, strict=True)}
    boxes = _boxes(graph, sizes)
    written = [box.written for box in boxes]
    while pair := _alike(boxes):
        _join(boxes, *pair)
    return File(boxes, count_nodes(model), sum(written), max(written))


def _boxes(graph: gs.Graph, sizes: Mapping[str, float]) -> list[Box]:
    """A box for the input and for each node that depends on more of it than its size, in order."""
    made = {tensor.name: Box(Counter(["x"])) for tensor in graph.inputs}
    boxes = [*made.values()]
    for node in graph.nodes:
        sources = {made[tensor.name] for tensor in node.inputs if tensor.name in made}
        if not sources or node.op == "Shape":
            continue
        if node.op in RESHAPING or node.op == "Split":
            (box,) = sources
        else:
            boxes.append(box := Box(Counter([node.op]), sources, sum(sizes[tensor.name] for tensor in node.outputs)))
        made.update((tensor.name, box) for tensor in node.outputs)
    boxes.append(Box(Counter(["y"]), {made[tensor.name] for tensor in graph.outputs}))
    return boxes


def _alike(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
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


def _join(boxes: list[Box], first: Box, second: Box) -> None:
    second.types += first.types
    second.written += first.written
    second.sources = (second.sources | first.sources) - {first, second}
    boxes.remove(first)
    for box in boxes:
        if first in box.sources:
            box.sources = (box.sources - {first}) | {second}


_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
.title { font-weight: 600; font-size: 15px } .note { font-size: 12px; fill: #59636e }
rect { fill: #ddebff; stroke: #4a78b5 } .moves { fill: #eceff2; stroke: #7a8590 }
.much { fill: #ffdfc7; stroke: #c4581a } .ours { fill: #d9f2dc; stroke: #2f8040 } .end { fill: none; stroke: none }
path { fill: none; stroke: #7a8590; stroke-width: 1.3 } marker path { fill: #7a8590; stroke: none }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .note { fill: #9aa5b1 }
rect { fill: #17304f; stroke: #5a8fd6 } .moves { fill: #2b3138; stroke: #8b949e }
.much { fill: #572a10; stroke: #e5834a } .ours { fill: #143d1f; stroke: #4fae62 } .end { fill: none; stroke: none }
}
"""
_TIP = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
_LINE, _BELOW, _BESIDE, _POINT = 17, 30, 22, 10
"""Pixels: a line of text, between layers, between boxes of a layer, the width of a way that passes one."""


class Place(NamedTuple):
    """Of a box, or of a point that a way passes: its middle and the rest in pixels."""

    x: float
    top: float
    width: float
    height: float

    @property
    def foot(self) -> float:
        """Its lower edge."""
        return self.top + self.height


def picture(title: str, files: Mapping[str, File]) -> str:
    """An SVG with each file's graph beside the others, from top to bottom, for light and for dark pages."""
    parts, left, bottom = [f"<title>{title}</title>", f"<style>{_STYLE}</style>"], 0.0, 0.0
    parts.append(f'<defs>{_TIP}<path d="M0 0 8 4 0 8z"/></marker></defs>')
    for name, file in files.items():
        width, height, drawing = _drawing(file.boxes)
        column = max(width, 200)
        parts.append(f'<g transform="translate({left + column / 2:g} 0)">')
        parts.append(f'<text class="title" y="16">{name}</text>')
        parts.append(f'<text class="note" y="34">{file.nodes} nodes write {_inputs(file.written)}</text>')
        parts += [f'<g transform="translate({-width / 2:g} 44)">', *drawing, "</g></g>"]
        left, bottom = left + column + 2 * _BESIDE, max(bottom, height + 44)
    box = f"{left - 2 * _BESIDE:g} {bottom:g}"
    root = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {box}" width="{box.split()[0]}" role="img">'
    return "\n".join([root, *parts, "</svg>\n"])


def _inputs(count: float) -> str:
    return "≈ 0" if count < 0.05 else f"{count:.1f} x" if count < _MUCH else f"{count:.0f} x"


def _drawing(boxes: Sequence[Box]) -> tuple[float, float, list[str]]:
    """Width and height of the boxes and the ways between them, and the elements that draw both."""
    layer: dict[Box, int] = {}
    for box in boxes:
        layer[box] = 1 + max((layer[source] for source in box.sources), default=-1)
    index = {box: number for number, box in enumerate(layer)}
    layers, ways = [*layer.values()], list[list[int]]()
    for box in layer:
        for source in sorted(box.sources, key=index.__getitem__):
            passed = range(layer[source] + 1, layer[box])
            ways.append([index[source], *range(len(layers), len(layers) + len(passed)), index[box]])
            layers += passed  # a point in each layer between both
    widths = [22 + 7.3 * max(map(len, box.text)) for box in layer] + [_POINT] * (len(layers) - len(layer))
    heights = [_LINE * (len(box.text) + bool(box.written)) + 8 for box in layer]
    graph = igraph.Graph(len(layers), [step for way in ways for step in pairwise(way)], directed=True)
    widest = ((width for width, own in zip(widths, layers, strict=True) if own == depth) for depth in set(layers))
    beside = max(sum(sorted(of_layer)[-2:]) / 2 for of_layer in widest)
    across = [place[0] for place in graph.layout_sugiyama(layers, hgap=beside + _BESIDE)]
    left = min(x - width / 2 for x, width in zip(across, widths, strict=True)) - 1
    right = max(x + width / 2 for x, width in zip(across, widths, strict=True)) + 1
    rows = [max(heights[index[box]] for box in layer if layer[box] == depth) for depth in range(max(layers) + 1)]
    tops = [0, *accumulate(row + _BELOW for row in rows)]
    heights += [rows[depth] for depth in layers[len(layer) :]]
    places = [
        Place(x - left, tops[depth], width, height)
        for x, depth, width, height in zip(across, layers, widths, heights, strict=True)
    ]
    elements = [_way([places[point] for point in way]) for way in ways]
    elements += [element for box, place in zip(layer, places, strict=False) for element in _drawn(box, place)]
    return right - left, tops[-1] - _BELOW, elements


def _way(points: Sequence[Place]) -> str:
    """From the foot of the first through those between to the head of the last."""
    path = f"M{points[0].x:g} {points[0].foot:g}"
    for place, then in pairwise(points):
        middle = (place.foot + then.top) / 2
        curve = f"C{place.x:g} {middle:g} {then.x:g} {middle:g} {then.x:g} {then.top:g}"
        path += f"V{place.foot:g}" + (f"V{then.top:g}" if place.x == then.x else curve)
    return f'<path d="{path}" marker-end="url(#tip)"/>'


def _drawn(box: Box, place: Place) -> Iterator[str]:
    kind = "end" if not box.written else "much" if box.written >= _MUCH else "moves" if box.moves else ""
    kind = "ours" if any(name.startswith("Acmix") for name in box.types) else kind
    size = f'width="{place.width:g}" height="{place.height:g}" rx="{3 if box.moves else 10}"'
    yield f'<rect class="{kind}" x="{place.x - place.width / 2:g}" y="{place.top:g}" {size}/>'
    for number, line in enumerate(box.text, 1):
        yield f'<text x="{place.x:g}" y="{place.top + number * _LINE:g}">{line}</text>'
    if box.written:
        yield f'<text class="note" x="{place.x:g}" y="{place.foot - 8:g}">{_inputs(box.written)}</text>'


def files(block: nn.Module, shape: Sequence[int]) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The block as it is exported and as it is fused."""
    with tempfile.TemporaryDirectory() as folder:
        plain, fused = Path(folder, "plain.onnx"), Path(folder, "fused.onnx")
        export(block.eval(), plain, input_shape=shape, opset=17)
        fuse(plain, fused, expect=1)
        return read(plain), read(fused)


def made(block: Callable[[int], nn.Module]) -> str:
    """The call that makes a block of CHANNELS."""
    kind = type(block(CHANNELS))
    with patch.object(kind, "__init__", autospec=True, side_effect=kind.__init__) as init:
        block(CHANNELS)
    told = inspect.signature(kind.__init__).bind(*init.call_args.args, **init.call_args.kwargs).arguments
    del told["self"]
    shown = {name: f"Border.{value.name}" if isinstance(value, Border) else value for name, value in told.items()}
    return f"{kind.__name__}({', '.join(f'{name}={value}' for name, value in shown.items() if value is not None)})"


def explained(shape: Sequence[int] = SHAPE) -> dict[str, File]:
    """The block of the page that explains one, as it is exported and in the forms of the fused file."""
    torch.manual_seed(0)
    plain, fused = files(ACmix(shape[1], shape[1]), shape)
    models = {"As exported": plain, "Fused": fused, "Fused, in standard operators": to_form(fused, "plain")}
    return {name: looked_into(model) for name, model in models.items()}


def costs(files: Mapping[str, File]) -> str:
    """A table of what each file does for one float32 input of SHAPE."""
    size = 4 * prod(SHAPE) / 1e6
    rows = {
        "": files,
        "---": ["---:" for _ in files],
        "nodes in the file": [str(file.nodes) for file in files.values()],
        "boxes in the picture": [str(sum(bool(box.written) for box in file.boxes)) for file in files.values()],
        "MB that its nodes write": [f"{file.written * size:.0f}" for file in files.values()],
        "MB that one node writes, at most": [f"{file.largest * size:.0f}" for file in files.values()],
    }
    return "\n".join(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items())


def generated() -> dict[Path, str]:
    """The pages and pictures."""
    written, page = {}, [_HEAD]
    for family in FAMILIES:
        variants: Sequence[Examples] = import_module(f"acmix_deploy.families.{family.name}.examples").EXAMPLES
        for examples in variants:
            name = ", ".join(filter(None, (family.name, examples.variant)))
            file = "graphs/" + name.replace(", ", "-").replace(" ", "-") + ".svg"
            torch.manual_seed(0)
            shape = (1, HEIGHT, WIDTH, CHANNELS) if examples.channels_last else (1, CHANNELS, HEIGHT, WIDTH)
            both = map(looked_into, files(examples.block(CHANNELS), shape))
            written[DOCS / file] = picture(name, dict(zip(("As exported", "Fused"), both, strict=True)))
            page.append(
                f"## {name}\n\n`{made(examples.block)}`, on a map of {HEIGHT}x{WIDTH} pixels.\n\n"
                f"![{name} as exported and fused]({file})\n"
            )
    written[DOCS / "pictures.md"] = "\n".join(page)
    looked = explained()
    written[DOCS / "graphs/how-it-works.svg"] = picture("An ACmix block as exported and as fused", looked)
    text = EXPLAINED.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    written[EXPLAINED] = f"{before}{_BEGIN}\n\n{costs(looked)}\n\n{_END}{rest.partition(_END)[2]}"
    return written


def main() -> int:
    """Write the files, or say whether one would change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file would change")
    check = parser.parse_args().check
    for path, text in generated().items():
        if check and not (path.is_file() and path.read_text(encoding="utf-8") == text):
            return 1
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
