"""Layers are put to the block that they belong to, and what stands out between them is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from acmix_deploy.export import export
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.forms import to_form
from acmix_deploy.fusion import fuse
from acmix_deploy.precision import to_fp16
from acmix_deploy.profile import layers as profile_layers
from acmix_deploy.profile.layers import (
    Layer,
    between_conversions,
    block_of,
    blocks_of,
    in_planes,
    nodes_in,
    onnx_layers,
    times_by_block,
)


@pytest.mark.parametrize(
    ("nodes", "block"),
    [
        (["acmix_0.attention"], "acmix_0"),
        (["acmix_12.attention/MatMul_91__1"], "acmix_12"),
        (["acmix_0.qkv", "acmix_0.convolution"], "acmix_0"),
        (["acmix_0.y", "/model.17/conv/Conv"], "shared: /model.17 + acmix_0"),
        (["/model.16/m.0/cv1/conv/Conv", "/model.16/cv2/act/Mul"], "/model.16"),
        (["/model/model.16/conv/Conv"], "/model/model.16"),
        (["/backbone/layer1/0/conv1/Conv"], "/backbone/layer1"),
        (["/head/cls/Conv"], "/head"),
        (["/Conv"], "other"),
        (["node_conv2d_3"], "other"),
        (["acmix_0"], "other"),
        ([], "other"),
    ],
)
def test_blocks_by_name(nodes: list[str], block: str) -> None:
    assert block_of(nodes, {}) == block


def test_blocks_that_are_known_go_before_names_and_through_what_is_appended() -> None:
    known = {"node_view": "acmix_0", "node_view_1": None, "conv2d_2": "acmix_1", "/model.3/Conv": "acmix_2"}
    for name, block in {
        "node_view": "acmix_0",
        "node_view_1": "other",
        "node_view/QuickGeluFusion/": "acmix_0",
        "conv2d_2_nchwc": "acmix_1",
        "InsertedPrecisionFreeCast_conv2d_2_nchwc": "acmix_1",
        "conv2d_nchwc": "other",
        "/model.3/Conv": "acmix_2",
        "ReorderOutput_token_2": "other",
    }.items():
        assert block_of([name], known) == block, name


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("/model.0/conv/Conv + PWN(PWN(/model.0/act/Sigmoid), /model.0/act/Mul)", "/model.0"),
        ("acmix_0.qkv + acmix_0.convolution", "acmix_0"),
        ("Reformatting CopyNode for Input Tensor 0 to acmix_0.attention", "acmix_0"),
        ("{ForeignNode[acmix_0.attention/Reshape_70...acmix_0.y]}", "acmix_0"),
        ("{ForeignNode[/model.2/Conv.../model.4/Mul]}", "shared: /model.2 + /model.4"),
        ("(Unnamed Layer* 12) [Shuffle]", "other"),
    ],
)
def test_blocks_by_the_names_of_tensorrt(name: str, block: str) -> None:
    assert block_of(nodes_in(name), {}) == block


@given(st.lists(st.tuples(st.sampled_from(["acmix_0", "acmix_1", "other"]), st.floats(0.001, 100)), max_size=12))
@settings(deadline=None, max_examples=30)
def test_nothing_is_lost_between_the_blocks(entries: list[tuple[str, float]]) -> None:
    found = times_by_block([Layer(name="l", kind="", block=block, median_ms=ms) for block, ms in entries])
    assert sum(block.layers for block in found) == len(entries)
    assert sum(block.ms for block in found) == pytest.approx(sum(ms for _, ms in entries))
    assert sum(block.share for block in found) == pytest.approx(1 if entries else 0)
    assert [block.family for block in found] == [None if b.block == "other" else "acmix" for b in found]


def layer(name: str, kind: str, ms: float = 0.0) -> Layer:
    return Layer(name=name, kind=kind, block="other", median_ms=ms)


def test_a_plugin_between_conversions_is_named() -> None:
    before = layer("Reformatting CopyNode for Input Tensor 0 to acmix_0.attention", "Reformat", 0.0124)
    behind = layer("Reformatting CopyNode for Input Tensor 0 to acmix_0.y", "Reformat", 0.0101)
    conv = layer("acmix_0.qkv", "CaskConvolution", 1.0)
    for kind in ("PluginV2", "PluginV3"):
        plugin = layer("acmix_0.attention", kind, 0.034)
        assert list(between_conversions([conv, before, plugin, behind, conv])) == [
            "the plugin acmix_0.attention (0.034 ms) runs between two format conversions "
            "(0.012 ms before, 0.010 ms behind)"
        ]
        for fine in (
            [before, plugin, conv],
            [conv, plugin, behind],
            [before, plugin],
            [plugin, behind],
            [before, conv],
        ):
            assert list(between_conversions(fine)) == []
    assert list(between_conversions([before, conv, behind])) == []


def test_a_plugin_that_reads_planes_of_halves_is_named() -> None:
    plugin = layer("acmix_0.attention", "PluginV3", 0.034)
    planes, groups = "Row major linear FP16 format", "Channel major FP16 format where channel % 8 == 0"
    (found,) = in_planes([plugin.model_copy(update={"inputs": (planes, planes)})])
    assert found.startswith(f"the plugin acmix_0.attention (0.034 ms) reads '{planes}'")
    for fine in (groups, "Row major linear FP32"):
        assert list(in_planes([plugin.model_copy(update={"inputs": (fine, planes)})])) == []
    others = [layer("acmix_0.qkv", "CaskConvolution"), layer("EfficientNMS_0", "PluginV2")]
    others = [other.model_copy(update={"inputs": (planes,)}) for other in others]
    assert list(in_planes([*others, plugin])) == []


SHAPE = (1, 3, 64, 64)
FEED = {"images": np.random.default_rng(0).random(SHAPE, dtype=np.float32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks with and without biases between other layers, as exported, fused, in half precision, and inlined."""
    folder = tmp_path_factory.mktemp("layers")
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, stride=4, padding=1)
    model = nn.Sequential(stem, ACmix(8, 8), nn.SiLU(), ACmix(8, 8), nn.Conv2d(8, 4, 1)).eval()
    export(model, folder / "plain.onnx", input_shape=SHAPE)
    fuse(folder / "plain.onnx", folder / "fused.onnx", expect=2)
    to_fp16(folder / "fused.onnx", folder / "fp16.onnx")
    onnx.save(to_form(onnx.load(folder / "fused.onnx"), "plain"), folder / "inlined.onnx")
    return folder


@pytest.mark.parametrize("name", ["plain", "fused", "fp16", "inlined"])
def test_the_attention_of_every_file_is_in_its_block(folder: Path, name: str) -> None:
    found = onnx_layers(folder / f"{name}.onnx", FEED, runs=3, threads=1)
    softmax = [layer.block for layer in found if layer.kind == "Softmax"]
    assert softmax == ["acmix_0", "acmix_1"]
    products = {layer.block for layer in found if layer.kind in ("MatMul", "FusedMatMul", "ReduceSum")}
    assert products == {"acmix_0", "acmix_1"}
    convolutions = [layer.block for layer in found if layer.kind == "Conv"]
    assert {"acmix_0", "acmix_1"} < set(convolutions)
    assert convolutions.count("other") == 2  # the first and the last layer of the model
    gelu = [layer.block for layer in found if layer.kind in ("QuickGelu", "Sigmoid")]
    assert set(gelu) <= {"other"}
    assert all(layer.median_ms >= 0 for layer in found)
    assert len({layer.name for layer in found}) == len(found)
    assert max(times_by_block(found), key=lambda block: block.ms).family == "acmix"


def test_blocks_of_a_plain_file_are_those_that_fusion_replaces(folder: Path) -> None:
    plain, fused = (onnx.load(folder / f"{name}.onnx") for name in ("plain", "fused"))
    known = blocks_of(plain)
    kept = {node.name for node in fused.graph.node}
    replaced = {node.name for node in plain.graph.node} - kept
    of_the_image = {"images"}
    for node in plain.graph.node:
        if of_the_image.intersection(node.input):
            of_the_image.update(node.output)
    # What is left of the replaced nodes is the position term, which no image takes part in.
    inside = {node.name for node in plain.graph.node if known[node.name]}
    assert inside == {
        node.name for node in plain.graph.node if node.name in replaced and set(node.output) & of_the_image
    }
    assert {known[name] for name in inside} == {"acmix_0", "acmix_1"}


def test_a_block_beside_fused_ones_has_a_name_of_its_own(tmp_path: Path) -> None:
    """acmix_0 only looks like a block, so that acmix_1 alone is fused."""
    near_miss = ACmix(4, 4, 3, head=2)
    near_miss._neighbours = lambda x: nn.functional.unfold(x, 3, padding=1)  # type: ignore[method-assign]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), near_miss, ACmix(4, 4, 3, head=2)).eval()
    export(model, tmp_path / "plain.onnx", input_shape=(1, 3, 8, 8))
    fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=1)
    fused = onnx.load(tmp_path / "fused.onnx")
    assert {name.partition(".")[0] for node in fused.graph.node if (name := node.name).startswith("acmix")} == {
        "acmix_1"
    }
    assert {block for block in blocks_of(fused).values() if block} == {"acmix_2"}


def test_the_first_runs_are_left_out_and_the_median_is_of_the_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile_layers, "_WARMUP_RUNS", 2)
    times = {"a": [9000, 9000, 1000, 3000, 2000], "b": [5, 5, 500, 700, 600]}
    events = [{"cat": "Session", "name": "model_run", "dur": 7}]
    for runs in zip(*times.values(), strict=True):
        for name, duration in zip(times, runs, strict=True):
            kernel = {"cat": "Node", "name": f"{name}_kernel_time", "dur": duration, "args": {"op_name": "Abs"}}
            events += [kernel, {**kernel, "name": f"{name}_fence_before"}]
    monkeypatch.setattr(profile_layers.json, "loads", lambda text: events)
    found = onnx_layers(folder / "fused.onnx", FEED, runs=3, threads=1)
    assert [(layer.name, layer.kind, layer.median_ms) for layer in found] == [("a", "Abs", 2.0), ("b", "Abs", 0.6)]
