"""What fusing costs: time and memory linear in the number of nodes, counted in operations rather than in seconds."""

from __future__ import annotations

import cProfile
import importlib
import pstats

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from acmix_deploy import graph
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.runtime.onnxruntime import open_session
from scripts.bench_fusion import chain
from tests.families.parts import export, randomised

sizes = importlib.import_module("acmix_deploy.fusion.sizes")


def test_work_grows_with_the_number_of_blocks_alone(tmp_path, monkeypatch):
    block = onnx.load(export(randomised(ACmix(2, 2, 3, head=1)), torch.randn(1, 2, 6, 6), tmp_path / "block.onnx"))
    opened = []

    def counting(model, **options):
        opened.append(len(model.graph.node))
        return open_session(model, **options)

    monkeypatch.setattr(graph, "open_session", counting)

    def work(length):
        """Calls of functions in Python, and nodes given to ONNX Runtime, while ``length`` blocks are fused."""
        onnx.save(chain(block, length), tmp_path / "plain.onnx")
        opened.clear()
        profiler = cProfile.Profile()
        profiler.runcall(fuse, tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=length)
        return np.array([pstats.Stats(profiler).total_calls, sum(opened)])

    work(1)  # imports
    few, more, many = (work(length) for length in (2, 4, 10))
    # From 4 to 10 blocks linear work grows by 3 times what it does from 2 to 4, quadratic work by 7 times.
    assert (many - more < 3.2 * (more - few)).all(), (few, more, many)


class Frozen(nn.Module):
    """A block behind a stride, as it is traced for one size."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3, stride=2, padding=1), block

    def forward(self, x):
        return self.block(self.stem(x))


def frozen(block, shape, path):
    """A file that declares free axes and holds for ``shape`` alone."""
    model = onnx.load(export(randomised(Frozen(block)), torch.randn(shape), path))
    for value in (*model.graph.input, *model.graph.output):
        for axis in (0, 2, 3):
            value.type.tensor_type.shape.dim[axis].dim_param = f"{value.name}_{axis}"
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("shape", [(1, 3, 60, 88), (3, 3, 36, 36), (1, 3, 416, 416)])
@pytest.mark.parametrize("near_miss", [False, True])
def test_the_size_that_a_graph_holds_for_is_found_without_running_others(tmp_path, monkeypatch, shape, near_miss):
    """Sizes up to 1280 x 1280 were run with the unfused graph, until none was left."""
    block = ACmix(4, 4, 3, head=1)
    if near_miss:
        block._neighbours = lambda x: nn.functional.unfold(x, 3, padding=1)
    source = frozen(block, shape, tmp_path / "plain.onnx")
    run = []

    def noting(of, outputs, feeds, functions=()):
        run.append(next(iter(feeds.values())).shape)
        return graph.evaluate(of, outputs, feeds, functions)

    monkeypatch.setattr(sizes, "evaluate", noting)
    report = fuse(source, tmp_path / "fused.onnx").found
    assert run == [(2, 3, 24, 32), shape, shape]  # drawn twice
    assert report.fused == (not near_miss)
    if near_miss:
        assert "linear in the coordinates" in report.blocks[0].reason


def test_sizes_are_tried_for_so_long_and_the_reason_says_so(tmp_path, monkeypatch):
    """Shapes do not tell why it does not run: its Gather reads beyond the end."""
    model = onnx.load(export(randomised(ACmix(2, 2, 3, head=1)), torch.randn(1, 2, 8, 8), tmp_path / "plain.onnx"))
    path = frozen_by_value(model, tmp_path / "frozen.onnx")
    assert "it runs at none of the sizes that were tried (2x24x32, 1x40x24, " in reason_of(path)
    monkeypatch.setattr(sizes.Patience, "__init__", lambda self: setattr(self, "seconds", 0.0))
    assert "(2x24x32, when time was up)" in reason_of(path)


def frozen_by_value(model, path):
    """With an index into the map in front of the block that no size makes valid."""
    name = model.graph.input[0].name
    for node in model.graph.node:
        for index, read in enumerate(node.input):
            if read == name:
                node.input[index] = "row"
    model.graph.initializer.append(numpy_helper.from_array(np.array([10**6]), "index"))
    model.graph.node.insert(0, helper.make_node("Gather", [name, "index"], ["row"], axis=3))
    for axis in (0, 2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"free{axis}"
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path


def reason_of(path):
    (block,) = fuse(path, path.with_name("fused.onnx")).found.blocks
    return block.reason
