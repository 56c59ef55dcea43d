"""A file in float16 computes on a CPU what it says: rounded after every node, infinite beyond 65504, zero below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from acmix_deploy.export import export
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.half import rounded, runnable
from acmix_deploy.precision import to_fp16
from acmix_deploy.runtime.metrics import deviation
from acmix_deploy.runtime.onnxruntime import open_session

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def model(*nodes: onnx.NodeProto, **stored: object) -> onnx.ModelProto:
    """From ``x`` [1, 4, 8, 8] to ``y``, both and all that is ``stored`` in float16."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", HALF, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", HALF, None)],
        [
            numpy_helper.from_array(np.asarray(value, np.asarray(value).dtype if name == "axes" else np.float16), name)
            for name, value in stored.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def node(op_type: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=f"the {output}", **attributes)


def ran(made: onnx.ModelProto, x: np.ndarray, *, optimize: bool = True) -> np.ndarray:
    """``y`` of a model of which ``x`` and ``y`` are in float32."""
    session = open_session(made, optimize=optimize)
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: x})[0]
    return found


IMAGE = np.random.default_rng(0).random((1, 4, 8, 8), dtype=np.float32)
WEIGHT = np.random.default_rng(1).standard_normal((4, 4, 3, 3)).astype(np.float16)
EXACT = {
    "a sum that swallows": ([node("Add", "x big", "s"), node("Sub", "s big", "y")], {"big": 1000}),
    "one node after another": (
        [node("Mul", "x a", "m"), node("Add", "m b", "s"), node("Mul", "s s", "q"), node("Sqrt", "q", "y")],
        {"a": 0.1, "b": 3.3},
    ),
    "large and back": ([node("Mul", "x big", "l"), node("Mul", "l small", "y")], {"big": 65504, "small": 1e-3}),
    "infinite": ([node("Mul", "x big", "l"), node("Mul", "l big", "m"), node("Mul", "m small", "y")],
                 {"big": 2e4, "small": 1e-4}),
    "zero": ([node("Mul", "x small", "l"), node("Mul", "l small", "m"), node("Mul", "m big", "y")],
             {"big": 6e4, "small": 1e-5}),
    "subnormal": ([node("Mul", "x small", "l"), node("Mul", "l big", "y")], {"big": 6e4, "small": 3e-7}),
    "a mask": ([node("Add", "x out", "m"), node("Softmax", "m", "y", axis=3)],
               {"out": np.where(np.arange(8) < 3, -np.inf, 0)}),
    "moved between": (
        [node("Mul", "x a", "m"), node("Transpose", "m", "t", perm=[0, 1, 3, 2]), node("MaxPool", "t", "p",
            kernel_shape=[2, 2]), node("Relu", "p", "r"), node("Concat", "r r", "y", axis=1)],
        {"a": 0.1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("case", EXACT)
def test_each_node_is_rounded_as_by_arithmetic_in_float16(case: str, optimize: bool) -> None:
    """ONNX's evaluator computes in NumPy's float16. Exponentials of it differ by the last bit."""
    nodes, stored = EXACT[case]
    made = model(*nodes, **stored)
    with np.errstate(all="ignore"):
        (expected,) = ReferenceEvaluator(made).run(None, {"x": IMAGE.astype(np.float16)})
    actual = ran(rounded(made), IMAGE, optimize=optimize)
    bits = 2**-10 if case == "a mask" else 0
    np.testing.assert_allclose(actual, expected.astype(np.float32), rtol=bits)


def test_onnx_runtime_alone_computes_another_file() -> None:
    """Why this is needed; if it fails, ONNX Runtime rounds on its own."""
    nodes, stored = EXACT["a sum that swallows"]
    made = model(*nodes, **stored)
    (alone,) = open_session(made).run(None, {"x": IMAGE.astype(np.float16)})
    assert deviation(ran(rounded(made), IMAGE), alone).relative_l2 > 0.1  # type: ignore[operator]


class Net(nn.Module):
    """Convolutions, an activation, a sum and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(self.one(x)))
        return (x + self.two(x)).softmax(1) * 100


def test_nets_are_as_far_from_float32_as_pytorch_in_half(tmp_path: Path) -> None:
    """And closer to PyTorch's own in float16 than that is to float32: it is the same rounding."""
    net = Net().eval()
    export(net, tmp_path / "plain.onnx", input_shape=(1, 3, 32, 32), opset=17)
    to_fp16(tmp_path / "plain.onnx", tmp_path / "half.onnx", float32=())
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        exact, eager = net(x).numpy(), net.half()(x.half()).float().numpy()
    here = ran(rounded(onnx.load(tmp_path / "half.onnx")), x.numpy())
    alone = ran(onnx.load(tmp_path / "half.onnx"), x.numpy())
    own, same = (deviation(right, here).relative_l2 or 0 for right in (exact, eager))
    assert 0.5 < own / (deviation(exact, eager).relative_l2 or 0) < 2
    assert (deviation(exact, alone).relative_l2 or 0) < own / 2, "ONNX Runtime by itself looks better than it is"
    assert same < own


@pytest.mark.parametrize("head", [2, 4])
def test_a_fused_block_is_rounded_outside_the_operator_alone(tmp_path: Path, head: int) -> None:
    """The plugin computes attention in float32; a head_dim that it does not take is standard operators, all rounded."""
    torch.manual_seed(0)
    block = ACmix(16, 16 if head == 2 else 20, head=head).eval()
    export(block, tmp_path / "plain.onnx", input_shape=(1, 16, 16, 16), opset=17)
    fuse(tmp_path / "plain.onnx", tmp_path / "fused.onnx", expect=1)
    to_fp16(tmp_path / "fused.onnx", tmp_path / "half.onnx", float32=())
    half = onnx.load(tmp_path / "half.onnx")
    made = rounded(half)
    attention = [found for found in made.graph.node if found.domain]
    assert len(attention) == (head == 2)
    assert all(name.startswith("exact ") for found in attention for name in found.output)
    x = torch.rand(1, 16, 16, 16)
    with torch.no_grad():
        exact, eager = block(x).numpy(), block.half()(x.half()).float().numpy()
    own = deviation(exact, ran(made, x.numpy())).relative_l2 or 0
    assert 1e-5 < own < 2 * (deviation(exact, eager).relative_l2 or 0)


def test_names_and_types_stay_as_far_as_they_can() -> None:
    made = model(node("Mul", "x x", "m"), node("Cast", "m", "f", to=FLOAT), node("Cast", "f", "y", to=HALF))
    before = made.SerializeToString()
    found = rounded(made)
    assert made.SerializeToString() == before
    names = {name for entry in found.graph.node for name in entry.output}
    assert {"m", "f", "y"} <= names
    types = {value.name: value.type.tensor_type.elem_type for value in (*found.graph.input, *found.graph.output)}
    assert types == {"x": FLOAT, "y": FLOAT}
    onnx.checker.check_model(found, full_check=True)


def test_definitions_of_others_are_rounded_node_by_node() -> None:
    nodes, stored = EXACT["a sum that swallows"]
    flat = model(*nodes, **stored)
    held = model(helper.make_node("Swallow", ["x", "big"], ["y"], domain="their"), **stored)
    imports = [helper.make_opsetid("", 17)]
    inner = [helper.make_node("Add", ["a", "b"], ["s"]), helper.make_node("Sub", ["s", "b"], ["c"])]
    held.functions.append(helper.make_function("their", "Swallow", ["a", "b"], ["c"], inner, imports))
    held.opset_import.append(helper.make_opsetid("their", 1))
    np.testing.assert_array_equal(ran(rounded(held), IMAGE), ran(rounded(flat), IMAGE))


def test_what_holds_no_half_is_run_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    export(Net().eval(), path, input_shape=(1, 3, 16, 16), opset=17)
    assert runnable(path) is path
    to_fp16(path, tmp_path / "half.onnx")
    assert isinstance(runnable(tmp_path / "half.onnx"), onnx.ModelProto)


def test_casts_at_the_end_of_a_file_are_no_hindrance() -> None:
    """ONNX Runtime's and onnxconverter-common's float16 append them with ``keep_io_types``; ONNX Runtime sorts them."""
    nodes, stored = EXACT["a sum that swallows"]
    made = model(*nodes, **stored)
    made.graph.input[0].type.tensor_type.elem_type = made.graph.output[0].type.tensor_type.elem_type = FLOAT
    made.graph.node[0].input[0], made.graph.node[1].output[0] = "x/cast", "y/cast"
    made.graph.node.append(node("Cast", "x", "x/cast", to=HALF))
    made.graph.node.append(helper.make_node("Cast", ["y/cast"], ["y"], "back", to=FLOAT))
    np.testing.assert_array_equal(ran(runnable(made), IMAGE), ran(rounded(model(*nodes, **stored)), IMAGE))


def test_what_is_behind_an_operator_that_onnx_does_not_know_is_rounded() -> None:
    """Its shape inference stops there; ONNX Runtime's does not."""
    stored = {"big": 30000}
    flat = model(node("Erf", "x", "e"), node("Add", "e big", "s"), node("Sub", "s big", "y"), **stored)
    held = model(
        node("QuickGelu", "x", "e", domain="com.microsoft", alpha=1.0),
        *flat.graph.node[1:],
        **stored,
    )
    held.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", HALF, [1, 4, 8, 8]))
    held.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert not ran(rounded(flat), IMAGE).any()
    assert not ran(rounded(held), IMAGE).any()
    assert ran(held, IMAGE.astype(np.float16)).any(), "ONNX Runtime alone computes another file"


@pytest.mark.parametrize("bounds", [{"min": 0.1}, {"max": 0.3}])
def test_bounds_in_attributes_are_rounded(bounds: dict[str, float]) -> None:
    """Clip and Pad have float32 attributes before opset 11."""
    made = model(node("Clip", "x", "y", **bounds))
    made.opset_import[0].version = 10
    (expected,) = ReferenceEvaluator(made).run(None, {"x": IMAGE.astype(np.float16)})
    np.testing.assert_array_equal(ran(rounded(made), IMAGE), expected.astype(np.float32))
