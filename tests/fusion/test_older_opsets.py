"""Files of opset 11 to 16, which are converted before they are fused."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from acmix_deploy.fusion import fuse
from acmix_deploy.fusion.prepare import load
from acmix_deploy.runtime.inputs import AXES
from acmix_deploy.runtime.onnxruntime import open_session
from tests.families.parts import VARIANTS, Model, export, operators, outputs, relative_l2

SAME = 1e-6


@pytest.mark.parametrize(("opset", "dynamic"), [(11, AXES), (12, ()), (16, ())], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_family_fuses(variant, opset, dynamic, tmp_path):
    model, x = Model(variant), torch.randn(2, 3, 8, 12)
    source = exported(model, x, tmp_path / "plain.onnx", opset=opset, dynamic=dynamic)
    report = fuse(source, tmp_path / "fused.onnx", expect=1).found
    assert (report.opset, report.blocks[0].family) == (17, variant.family.name)
    for at in (x, torch.randn(1, 3, 16, 12))[: 1 + bool(dynamic)]:
        assert relative_l2(outputs(tmp_path / "fused.onnx", at), model(at)) < variant.family.tolerances["float32"].floor


def exported(model, x, path, *, opset, **options):
    """At ``opset``, or the next that the exporter has all operators of the model in."""
    for version in range(opset, 17):
        with suppress(torch.onnx.errors.UnsupportedOperatorError):
            return export(model, x, path, opset=version, **options)
    raise AssertionError("it cannot be exported below opset 17")


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_half_precision_fuses(variant, tmp_path):
    """Exporters keep parts of it in float32, between Casts."""
    model, x = Model(variant), torch.randn(2, 3, 8, 12)
    exact = model(x)
    eager = relative_l2(model.half()(x.half()), exact)
    fuse(exported(model, x.half(), tmp_path / "plain.onnx", opset=12), tmp_path / "fused.onnx", expect=1)
    limit = variant.family.tolerances["float16"].limit(eager)
    assert relative_l2(outputs(tmp_path / "fused.onnx", x.half()), exact) < limit


def graph_of(*nodes, opset=11, shape=("batch", 3, "height", 5)):
    """Of nodes from x to y."""
    inputs, results = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)]
        for name, sizes in (("x", shape), ("y", [None] * len(shape)))
    )
    graph = helper.make_graph(list(nodes), "graph", inputs, results)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(
    ("axis", "stays"), [(3, True), (-1, True), (2, False), (1, False), (None, False)], ids=["3", "-1", "2", "1", "none"]
)
def test_a_softmax_is_a_matrix_where_it_is_over_several_axes(op, axis, stays, tmp_path):
    """Below opset 13 over all axes from one on, by default from the second."""
    attributes = {} if axis is None else {"axis": axis}
    onnx.save(graph_of(helper.make_node(op, ["x"], ["y"], **attributes)), tmp_path / "old.onnx")
    converted, _ = load(tmp_path / "old.onnx")
    onnx.save(converted, tmp_path / "new.onnx")
    assert (operators(tmp_path / "new.onnx") == [op]) == stays
    x = torch.randn(2, 3, 4, 5)
    assert relative_l2(outputs(tmp_path / "new.onnx", x), outputs(tmp_path / "old.onnx", x)) < SAME


@pytest.mark.parametrize(("read", "axes"), [("flat", 2), ("soft", 2), ("sizes", 1)])
def test_a_matrix_that_others_read_stays(read, axes, tmp_path):
    """What an exporter flattened itself: of the last axis alone it would be no matrix, but it is needed."""
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"], axis=3),
        helper.make_node("Softmax", ["flat"], ["soft"], axis=1),
        helper.make_node("Shape", ["x"], ["sizes"]),
        helper.make_node("Reshape", ["soft", "sizes"], ["y"]),
    ]
    model = graph_of(*nodes)
    kind = TensorProto.INT64 if read == "sizes" else TensorProto.FLOAT
    model.graph.output.append(helper.make_tensor_value_info(read, kind, [None] * axes))
    onnx.save(model, tmp_path / "old.onnx")
    converted, _ = load(tmp_path / "old.onnx")
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    results = [open_session(model).run(None, {"x": x}) for model in (tmp_path / "old.onnx", converted)]
    for expected, found in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "variant",
    [variant for variant in VARIANTS if "Softmax" in variant.family.anchors],
    ids=lambda variant: variant.name,
)
def test_a_softmax_over_queries_and_keys_is_left_alone(variant, tmp_path):
    """One axis earlier: then the last two are one."""
    model, x = Model(variant), torch.randn(1, 3, 8, 12)
    source = exported(model, x, tmp_path / "plain.onnx", opset=12, dynamic=AXES)
    changed = onnx.load(source)
    for node in changed.graph.node:
        if node.op_type == "Softmax":
            node.attribute[0].i -= 1
    onnx.save(changed, source)
    expected = outputs(source, x)
    assert fuse(source, tmp_path / "fused.onnx", expect=0).found.opset == 17
    # Where all that is masked stands alone there is no number, before and after.
    np.testing.assert_allclose(outputs(tmp_path / "fused.onnx", x), expected, rtol=1e-5, atol=1e-6)
