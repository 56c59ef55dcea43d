"""What fusing costs: time and memory linear in the number of nodes, counted in operations rather than in seconds."""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from family_parts import export, randomised
from onnx import TensorProto, helper

from acmix_deploy import graph
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.runtime.onnxruntime import ir_version, open_session

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from bench_fusion import chain


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


def test_a_session_that_runs_once_opens_in_linear_time():
    """ONNX Runtime plans which tensors share memory in a time that grows with the square of the number of nodes."""

    def seconds(length):
        ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("0", str(length))]
        nodes = [helper.make_node("Shape", [f"{i}"], [f"size{i}"]) for i in range(length)]
        nodes += [helper.make_node("Expand", [f"{i}", f"size{i}"], [f"{i + 1}"]) for i in range(length)]
        source = helper.make_model(
            helper.make_graph(nodes, "chain", ends[:1], ends[1:]),
            opset_imports=[helper.make_opsetid("", 17)],
            ir_version=ir_version(17),
        )
        start = time.process_time()
        open_session(source, optimize=False, once=True)
        return time.process_time() - start

    assert min(seconds(8000) for _ in range(3)) < 10 * min(seconds(2000) for _ in range(3))
