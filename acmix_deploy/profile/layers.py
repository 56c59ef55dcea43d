"""How long each layer takes, and to which block of the model it belongs.

A fused block is known by the names of its nodes, ``acmix_0.attention``. In a file that was not fused it is found by its
structure, as fusion finds it. What belongs to no block is put together by module, as far as names tell.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from pydantic import BaseModel, ConfigDict, Field

from acmix_deploy.families import FAMILIES
from acmix_deploy.families.blocks import FUSED_NODE, find, free_names
from acmix_deploy.graph import NoMatch, name_nodes, read
from acmix_deploy.runtime.metrics import Array
from acmix_deploy.runtime.onnxruntime import PROVIDER, usable_cores
from acmix_deploy.runtime.tensorrt import PLUGIN_LAYER

OTHER = "other"
SHARED = "shared: "

Blocks = Mapping[str, str | None]
"""The block of a node by its name and by those of its outputs; None where it belongs to none."""

_KERNEL = "_kernel_time"
_WIDENED = "InsertedPrecisionFreeCast_"  # before the name of a node that ONNX Runtime computes in float32 instead
_PLANES_OF_HALVES = re.compile(r"Row major linear (FP16|Half)", re.IGNORECASE)
_WARMUP_RUNS = 3
_FATAL = 4


class Layer(BaseModel):
    """One layer of an engine, or one node as ONNX Runtime runs it."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="its name where it ran")
    kind: str = Field(description="type of layer or operator")
    nodes: tuple[str, ...] = Field(default=(), description="the ONNX nodes in it, where they are told")
    inputs: tuple[str, ...] = Field(default=(), description="type and format of each input, in TensorRT's words")
    block: str = Field(description="a block, a module, 'other', or 'shared: ' and several of them")
    median_ms: float = Field(description="median time in ms, with the profiler at work")


class BlockTime(BaseModel):
    """The layers of one block together."""

    model_config = ConfigDict(frozen=True)

    block: str = Field(description="as in its layers")
    layers: int = Field(description="how many there are")
    ms: float = Field(description="sum of their medians")
    share: float = Field(description="its part of the sum over all layers, 0 to 1")

    @property
    def family(self) -> str | None:
        """The family of a block; None for what is no block."""
        found = FUSED_NODE.fullmatch(f"{self.block}.")
        return found[2] if found else None


def times_by_block(layers: Sequence[Layer]) -> tuple[BlockTime, ...]:
    """The layers of each block together, in order of their first."""
    total = sum(layer.median_ms for layer in layers) or 1.0
    found = []
    for block in dict.fromkeys(layer.block for layer in layers):
        times = [layer.median_ms for layer in layers if layer.block == block]
        found.append(BlockTime(block=block, layers=len(times), ms=sum(times), share=sum(times) / total))
    return tuple(found)


def block_of(nodes: Collection[str], blocks: Blocks) -> str:
    """Where a layer with these nodes belongs.

    Args:
        nodes: names of ONNX nodes; ONNX Runtime's, and TensorRT's before version 8.6, have something appended.
        blocks: what :func:`blocks_of` knows.
    """
    found = sorted({_block_of_one(node, blocks) for node in nodes}) or [OTHER]
    return found[0] if len(found) == 1 else SHARED + " + ".join(found)


def blocks_of(model: onnx.ModelProto) -> Blocks:
    """The blocks of a model that was not fused, by their structure, numbered as fusion does."""
    graph = gs.import_onnx(model)
    found: dict[str, str | None] = {name: None for node in graph.nodes for name in _names(node)}
    for family in FAMILIES:
        matches = [match for _, match in find(family, graph) if not isinstance(match, NoMatch)]
        for name, match in zip(free_names(family, graph), matches, strict=False):
            for node in match.region.nodes:
                found |= dict.fromkeys(_names(node), name)
    return found


def onnx_layers(file: Path, feed: Mapping[str, Array], runs: int, threads: int | None = None) -> tuple[Layer, ...]:
    """Times of the nodes of an ONNX file by ONNX Runtime's profiler, on the CPU.

    Args:
        file: it runs on ``feed``.
        feed: inputs by name.
        runs: how often it is run.
        threads: threads within an operator; by default one for each core the process may use.
    """
    model = read(file)
    name_nodes(model)
    _name_bodies(model)
    blocks = blocks_of(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.log_severity_level = _FATAL
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDER])
        for _ in range(_WARMUP_RUNS + runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_bytes())
    kinds: dict[str, str] = {}
    times: dict[str, list[float]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(_KERNEL):
            name = event["name"].removesuffix(_KERNEL)
            kinds[name] = event["args"]["op_name"]
            times.setdefault(name, []).append(event["dur"] / 1e3)
    return tuple(
        Layer(name=name, kind=kinds[name], block=block_of([name], blocks), median_ms=median(samples[_WARMUP_RUNS:]))
        for name, samples in times.items()
    )


def between_conversions(layers: Sequence[Layer]) -> Iterator[str]:
    """In words: each plugin that TensorRT put a change of format or type before and behind."""
    for before, layer, behind in zip(layers, layers[1:], layers[2:], strict=False):
        if PLUGIN_LAYER.search(layer.kind) and _converts(before) and _converts(behind):
            yield (
                f"the plugin {layer.name} ({layer.median_ms:.3f} ms) runs between two format conversions "
                f"({before.median_ms:.3f} ms before, {behind.median_ms:.3f} ms behind)"
            )


def in_planes(layers: Sequence[Layer]) -> Iterator[str]:
    """In words: each plugin of a block that reads halves plane by plane, though it offers channels in groups of 8."""
    for layer in layers:
        ours = PLUGIN_LAYER.search(layer.kind) and any(map(FUSED_NODE.search, (layer.name, *layer.nodes)))
        if ours and layer.inputs and _PLANES_OF_HALVES.match(layer.inputs[0]):
            yield (
                f"the plugin {layer.name} ({layer.median_ms:.3f} ms) reads '{layer.inputs[0]}': for its neighbours "
                "TensorRT did not choose 'Channel major FP16 format where channel % 8 == 0', for which the plugin's "
                "kernel is made"
            )


def nodes_in(name: str) -> list[str]:
    """The ONNX nodes that the name of a TensorRT layer tells: ``/a/Conv + PWN(/a/Sigmoid, /a/Mul)`` has three."""
    words = [word for word in re.split(r"[\s+(),\[\]{}]+|\.{3}", name) if word]
    return [word for word in words if _block_of_one(word, {}) != OTHER] or words


def _converts(layer: Layer) -> bool:
    return layer.kind == "Reformat" or layer.name.startswith("Reformatting CopyNode")


def _block_of_one(node: str, blocks: Blocks) -> str:
    if found := FUSED_NODE.search(node):
        return found[1]
    known = node.removeprefix(_WIDENED)
    while known:
        if block := blocks.get(known):
            return block
        if known in blocks:
            break
        known = re.sub(r"(^|[_/])[^_/]*$", "", known)
    return _module(node)


def _module(node: str) -> str:
    """``/model.16`` of ``/model.16/conv/Conv``: down to the first part with a number, or the first part of all."""
    parts = node.split("/")[1:-1] if node.startswith("/") else []
    if not parts:
        return OTHER
    numbered = next((index for index, part in enumerate(parts) if re.search(r"\d", part)), 0)
    return "/" + "/".join(parts[: numbered + 1])


def _names(node: gs.Node) -> Iterator[str]:
    yield node.name
    yield from (tensor.name for tensor in node.outputs)


def _name_bodies(model: onnx.ModelProto) -> None:
    """Give each node that calls a function one of its own, whose nodes are named after it, in place.

    ONNX Runtime puts bodies in the place of nodes before it optimizes, and keeps only the names in the body.
    """
    functions = {(function.domain, function.name): function for function in model.functions}
    for node in model.graph.node:
        if body := functions.get((node.domain, node.op_type)):
            named = model.functions.add()
            named.CopyFrom(body)
            named.name = node.op_type = f"{body.name}/{node.name}"
            for index, inner in enumerate(named.node):
                inner.name = f"{node.name}/{inner.op_type}_{index}"
