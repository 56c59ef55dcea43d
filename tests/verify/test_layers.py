"""The error along the graph begins where it was put, nowhere where there is none, and what is advised mends it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from acmix_deploy.cli import main
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.operators.spec import Tolerance
from acmix_deploy.precision import quantize, to_fp16
from acmix_deploy.runtime.inputs import random_images
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.verify import Comparison, Verification, compare_files, failing_first, layers
from acmix_deploy.verify.layers import LayerError, LayerErrors, Mend, compare_layers
from acmix_deploy.verify.limits import relative_at_most
from tests.engine.parts import make_engine
from tests.families.parts import export

FLOAT = TensorProto.FLOAT
SIZE = 16
FEEDS = [{"images": random_images((1, 3, SIZE, SIZE), seed)} for seed in range(2)]

Weights = dict[str, np.ndarray]


def weights(channels: int = 8) -> Weights:
    """Of three 1x1 convolutions."""
    draw = np.random.default_rng(0).uniform
    shapes = {"w0": (channels, 3, 1, 1), "w1": (channels, channels, 1, 1), "w2": (4, channels, 1, 1)}
    return {name: draw(0.1, 0.6, shape).astype(np.float32) for name, shape in shapes.items()}


def write(path: Path, nodes: Sequence[onnx.NodeProto], stored: Weights, outputs: Sequence[str] = ("output0",)) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", FLOAT, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def node(op_type: str, name: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), [output], name=name, **attributes)


CHAIN = (
    node("Conv", "/0/conv", "images w0", "c0"),
    node("Relu", "/0/act", "c0", "r0"),
    node("Conv", "/1/conv", "r0 w1", "c1"),
    node("Relu", "/1/act", "c1", "r1"),
    node("Conv", "/2/conv", "r1 w2", "output0"),
)
TENSORS = ["c0", "r0", "c1", "r1", "output0"]


def chain(path: Path, **factors: float) -> Path:
    return write(path, CHAIN, {name: value * factors.get(name, 1) for name, value in weights().items()})


CANCELLING = (
    *CHAIN[:2],
    node("Add", "/1/raise", "r0 large", "raised"),
    node("Sub", "/1/lower", "raised large", "lowered"),
    node("Conv", "/1/conv", "lowered w1", "c1"),
    *CHAIN[3:],
)


def cancelling(path: Path) -> Path:
    return write(path, CANCELLING, {**weights(), "large": np.float32(3e4)})


BAD = {
    "a weight beyond float16": (lambda path: chain(path, w0=1e-4, w1=1e6, w2=1e-3), "/1/conv", ("/1/conv",)),
    "a result beyond float16": (
        lambda path: chain(path, w0=100, w1=1e3, w2=1e-6),
        "/1/conv",
        ("/1/conv", "/1/act", "/2/conv"),
    ),
    "a result below float16": (
        lambda path: chain(path, w0=1e-4, w1=1e-5, w2=6e4),
        "/1/conv",
        ("/1/conv", "/1/act", "/2/conv"),
    ),
    "a difference of large numbers": (cancelling, "/1/lower", ("/1/lower", "/1/raise")),
}


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_layer_in_half_precision_is_found_and_mended(tmp_path: Path, bad: str) -> None:
    make, name, kept = BAD[bad]
    plain, half, mended = make(tmp_path / "plain.onnx"), tmp_path / "half.onnx", tmp_path / "mended.onnx"
    to_fp16(plain, half, float32=())
    found = compare_files(plain, half, layers=True)
    assert found.passed is False
    (along,) = found.layers
    assert along.first
    assert (along.first.node, along.first.limit) == (name, 0.01)
    assert along.first.mend == Mend(option="--float32", nodes=kept)
    before = [layer.tensor for layer in along.layers[: along.layers.index(along.first)]]
    assert all(layer.passed for layer in along.layers if layer.tensor in before)
    assert str(along).endswith(f"keep it in floating point: --float32 {','.join(kept)}")
    assert along.first in along.worst()
    to_fp16(plain, mended, float32=kept)
    again = compare_files(plain, mended, layers=True)
    assert again.passed
    assert again.layers[0].first is None


def test_an_overflow_in_many_nodes_is_mended_by_the_group_of_these(tmp_path: Path) -> None:
    acts = [node("LeakyRelu", f"/1/act{n}", f"r{n}", f"r{n + 1}") for n in range(1, 4)]
    nodes = (*CHAIN[:4], *acts, node("Conv", "/2/conv", "r4 w2", "output0"))
    stored = {name: value * {"w0": 100, "w1": 1e3, "w2": 1e-6}[name] for name, value in weights().items()}
    plain, half = write(tmp_path / "plain.onnx", nodes, stored), tmp_path / "half.onnx"
    for kept, mend in (((), ("range",)), (("range",), ("/1/conv", "/1/act", *(one.name for one in acts), "/2/conv"))):
        to_fp16(plain, half, float32=kept, samples=[{"images": FEEDS[0]["images"] / 1e4}])
        found = compare_layers("half", plain, half, FEEDS, float32=kept)
        assert found.first
        assert found.first.mend
        assert found.first.mend.nodes == mend
        to_fp16(plain, half, float32=mend, samples=FEEDS)
        assert compare_layers("half", plain, half, FEEDS).first is None


@pytest.mark.parametrize("make", [chain, lambda path: chain(path, w0=100, w1=100, w2=1e-3)])
def test_a_right_file_leaves_no_limit(tmp_path: Path, make) -> None:
    plain, half = make(tmp_path / "plain.onnx"), tmp_path / "half.onnx"
    to_fp16(plain, half, float32=())
    found = compare_layers("half", plain, half, FEEDS)
    assert [layer.tensor for layer in found.layers] == TENSORS
    assert found.first is None
    assert 1e-5 < max(layer.relative_l2 for layer in found.layers) < 1e-3, "it is really rounded"
    assert str(found) == "half is within the limits in all 5 tensors that were compared"
    same = compare_layers("same", plain, plain, FEEDS)
    assert {layer.relative_l2 for layer in same.layers} == {0}
    assert {layer.limit for layer in same.layers} == {1e-5}


def images(folder: Path, count: int = 4) -> Path:
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    folder.mkdir()
    for seed in range(count):
        picture = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
        cv2.imwrite(str(folder / f"{seed}.png"), picture)
    return folder


def uneven(path: Path) -> Path:
    """A first layer with one channel that is 2000 times as large, and a second that hardly looks at it."""
    stored = weights()
    stored["w0"][0] *= 2000
    stored["w1"][:, 0] /= 20000
    return write(path, (node("Conv", "/zero/conv", "images w0", "c0"), *CHAIN[1:]), stored)


def test_the_layer_that_int8_cannot_do_is_found_and_excluding_it_mends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = images(tmp_path / "images")
    plain, int8 = uneven(tmp_path / "plain.onnx"), tmp_path / "int8.onnx"
    quantize(plain, int8, photos, quantize_head=True, method="minmax")
    (along,) = compare_files(plain, int8, images=photos, layers=True).layers
    assert along.first
    assert (along.first.node, along.first.limit) == ("/1/conv", 0.25)
    assert str(along).endswith("keep it in floating point: quantize --exclude /1/conv")
    command = ["quantize", plain, "--calibration", photos, "--quantize-head", "--method", "minmax", "-o", int8]
    assert main([*map(str, command)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "int8.onnx leaves the limit of 2.5e-01 first at /1/conv" in said
    assert "quantize --exclude /1/conv" in said
    quantize(plain, int8, photos, quantize_head=True, method="minmax", exclude=["/1/conv"])
    (again,) = compare_files(plain, int8, images=photos, layers=True).layers
    assert again.first is None
    assert max(layer.relative_l2 for layer in again.layers) > 1e-3
    right = chain(tmp_path / "right.onnx")
    quantize(right, int8, photos, quantize_head=True)
    assert compare_files(right, int8, images=photos, layers=True).layers[0].first is None


def test_tensors_are_matched_by_name_and_shape_alone(tmp_path: Path) -> None:
    """Nodes of other names, one more of them, one tensor of another name, one of another shape."""
    stored = weights()
    other = (
        node("Conv", "first", "images w0", "c0"),
        node("Neg", "negative", "c0", "n0"),
        node("Abs", "positive", "n0", "r0"),
        node("Conv", "second", "r0 w1", "renamed"),
        node("Relu", "", "renamed", "r1"),
        node("Conv", "last", "r1 w2", "output0"),
    )
    turned = node("Transpose", "turn", "c0", "turned", perm=[0, 2, 3, 1])
    plain = write(tmp_path / "plain.onnx", (*CHAIN, turned), stored)
    other = (*other, node("Transpose", "turn", "c0", "turned", perm=[0, 2, 1, 3]))
    changed = write(tmp_path / "changed.onnx", other, stored)
    found = compare_layers("changed", plain, changed, FEEDS)
    assert [(layer.tensor, layer.node) for layer in found.layers] == [
        ("c0", "first"), ("r0", "positive"), ("r1", "/1/act"), ("output0", "last"),
    ]  # fmt: skip
    assert [(layer.sources, layer.unseen) for layer in found.layers] == [
        ((), ()), (("c0",), ("negative",)), (("r0",), ("second",)), (("r1",), ()),
    ]  # fmt: skip
    assert found.first is None
    assert found.unshared == 3, "n0, renamed, and turned, which has another shape"
    stored["w1"] = stored["w1"] * np.float32(1.01)
    found = compare_layers("changed", plain, write(changed, other, stored), FEEDS)
    assert found.first
    assert found.first.mend is None, "it is in float32"
    assert str(found) == (
        "changed leaves the limit of 1.0e-05 first at /1/act, or at second before it, which the reference does not "
        "have (relative L2 1.0e-02)"
    )


def test_a_fused_block_is_told_as_a_whole(tmp_path: Path) -> None:
    """Against the plain export a block is one tensor; against the fused file each of its nodes is."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), ACmix(16, 16, head=2), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    x = torch.rand(1, 3, 16, 12)
    plain, fused, half = export(module, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx", tmp_path / "half.onnx"
    fuse(plain, fused, expect=1)
    model = onnx.load(fused)
    feeds = [{model.graph.input[0].name: x.numpy()}]
    found = compare_layers("fused", plain, model, feeds)
    assert found.first is None
    (block,) = (layer for layer in found.layers if layer.block)
    assert block.block == "acmix_0"
    assert {"acmix_0.qkv", "acmix_0.attention", "acmix_0.convolution"} <= {block.node, *block.unseen}
    to_fp16(fused, half)
    inside = [layer for layer in compare_layers("half", fused, half, feeds).layers if layer.block]
    assert {"acmix_0.qkv", "acmix_0.attention", "acmix_0.convolution"} <= {layer.node for layer in inside}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    (qkv,) = (node for node in model.graph.node if node.name == "acmix_0.qkv")
    weight = stored[qkv.input[1]]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    wrong = compare_layers("fused", plain, model, feeds)
    assert wrong.first
    assert wrong.first.block == "acmix_0"
    assert wrong.first.mend is None
    assert "acmix_0" in str(wrong)


def test_files_that_share_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = chain(tmp_path / "plain.onnx")
    model = onnx.load(plain)
    for one in model.graph.node:
        one.input[:] = [name if name in ("images", "w0", "w1", "w2") else f"other {name}" for name in one.input]
        one.output[:] = [name if name == "output0" else f"other {name}" for name in one.output]
    onnx.save(model, tmp_path / "renamed.onnx")
    assert main(["verify", str(plain), str(tmp_path / "renamed.onnx"), "--layers"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "cannot be told: renamed.onnx shares no tensor with the reference but outputs: the names differ" in printed


def test_what_is_behind_a_choice_is_left_out(tmp_path: Path) -> None:
    """The two best of equal scores come in any order."""
    nodes = (
        *CHAIN,
        node("Flatten", "flat", "output0", "flat"),
        helper.make_node("TopK", ["flat", "two"], ["values", "indices"], "best"),
        node("Neg", "after", "values", "after"),
    )
    plain = write(tmp_path / "plain.onnx", nodes, weights(), ("values", "after"))
    model = onnx.load(plain)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2]), "two"))
    found = compare_layers("same", model, model, FEEDS)
    assert [layer.tensor for layer in found.layers] == [*TENSORS, "flat"]
    assert found.chosen == 2
    assert [layer.tensor for layer in found.layers if layer.end] == ["output0", "flat"]


def test_scores_have_the_limit_of_scores(tmp_path: Path) -> None:
    """Those that are given, but no gate inside, as in SiLU."""
    nodes = (
        *CHAIN,
        node("Sigmoid", "gate", "output0", "gate"),
        node("Mul", "silu", "output0 gate", "silu"),
        node("Sigmoid", "scores", "silu", "scores"),
        node("Concat", "both", "silu scores", "both", axis=1),
        node("Transpose", "turned", "scores", "turned", perm=[0, 2, 3, 1]),
    )
    plain = write(tmp_path / "plain.onnx", nodes, weights(), ("both", "turned"))
    to_fp16(plain, tmp_path / "half.onnx", float32=())
    found = compare_layers("half", plain, tmp_path / "half.onnx", FEEDS)
    limits = {layer.tensor: layer.limit for layer in found.layers}
    tight = [*TENSORS, "gate", "silu", "both"]
    assert limits == dict.fromkeys(tight, 0.01) | {"scores": 0.1, "turned": 0.1}
    assert {layer.tensor for layer in found.layers if layer.end} == {"silu", "scores", "both", "turned"}


def along(*errors: float | None, sources: Sequence[Sequence[int]] | None = None) -> LayerErrors:
    """A chain of tensors "0", "1" and so on with these errors, the last of them an output; or another graph."""
    return LayerErrors(
        candidate="half.onnx", precision="float16", float32=("decode",), inputs=(), unshared=0, chosen=0,
        layers=tuple(
            LayerError(
                tensor=str(index), node=f"node {index}", operator="Conv", scores=False, limit=0.01,
                sources=tuple(map(str, sources[index] if sources else [index - 1])), end=index == len(errors) - 1,
                mend=Mend(option="--float32", nodes=(f"node {index}",)),
                **({"relative_l2": error} if error is not None else {"problem": "NaNs and infinities differ"}),
            )
            for index, error in enumerate(errors)
        ),
    )  # fmt: skip


def test_the_first_is_on_the_way_to_what_is_wrong() -> None:
    assert along(0.001, 0.002).first is None
    assert along(0.001, 0.02, 0.03).first.tensor == "1"
    assert along(0.02, 0.002, 0.001, 0.5, 0.4).first.tensor == "3", "an error that vanishes again is not its cause"
    recovered = along(0.001, 0.02, 0.002)
    assert recovered.first.tensor == "1"
    assert str(recovered) == (
        "half.onnx leaves the limit of 1.0e-02 first at node 1 (relative L2 2.0e-02); in the outputs it is within "
        "the limits again"
    )
    # 0 -> 1, and 2 -> 3: branches that meet in no tensor; 1 is no output
    assert along(0.02, 0.03, 0.04, 0.05, sources=[[], [0], [], [2]]).first.tensor == "2"
    assert along(0.001, None, 0.002).first.tensor == "1"
    assert "--float32" in str(along(0.001, None, 0.002)), "an infinity is never right, whatever becomes of it"
    infinite = along(0.001, None)
    assert str(infinite) == (
        "half.onnx leaves the limit of 1.0e-02 first at node 1 (NaNs and infinities differ); keep it in floating "
        "point: --float32 'decode,node 1'"
    )
    wider = along(0.001, 0.02, 0.5).judged_by(relative_at_most(0.1))
    assert wider.first.tensor == "2"
    assert [layer.tensor for layer in along(0.001, None, 0.5).worst(2)] == ["1", "2"]


def test_limits_and_inputs_follow_what_failed() -> None:
    def compared(output: str, limit: float | None, height: int, error: float = 0.5, **more: int) -> Comparison:
        return Comparison(
            candidate="half.onnx", precision="float16", output=output, input_shapes={"images": (1, 3, height, 8)},
            limit=limit, relative_l2=error, **more,
        )  # fmt: skip

    found = Verification(
        reference="r",
        comparisons=(
            compared("boxes", 0.003, 8, 0), compared("boxes", 0.002, 16), compared("scores", 0.03, 16),
            compared("o", 1e-6, 8, 0, channel=1), compared("o", None, 8, 0),
        ),
    )  # fmt: skip
    assert found.limits_of("half.onnx") == {
        "float16": Tolerance(floor=0.002), "float16 scores": Tolerance(floor=0.03),
    }  # fmt: skip
    assert found.limits_of("another") == {}
    feeds = [{"images": np.zeros((1, 3, height, 8), np.float32)} for height in (8, 24, 16)]
    assert [feed["images"].shape[2] for feed in failing_first(found, feeds)] == [16, 8, 24]


def test_names_that_are_patterns_or_lists() -> None:
    mend = Mend(option="--float32", nodes=("a[0], b",))
    assert mend.spelt(()) == "--float32 'a[[]0]? b'"
    assert Mend(option="--exclude", nodes=("a[0]", "b")).spelt() == "quantize --exclude 'a[[]0]' --exclude b"


def test_parts_that_are_held_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, half = chain(tmp_path / "plain.onnx"), tmp_path / "half.onnx"
    to_fp16(plain, half, float32=())
    whole = compare_layers("half", plain, half, FEEDS)
    opened = []
    monkeypatch.setattr(layers, "_HELD", 2 * 8 * SIZE * SIZE * 4)  # two tensors of eight channels
    monkeypatch.setattr(
        layers, "open_session", lambda *args, **more: opened.append(more) or open_session(*args, **more)
    )
    assert compare_layers("half", plain, half, FEEDS) == whole
    assert sum(more.get("lean", False) for more in opened) == 2 * (1 + 3), "one for sizes and three for parts"


def test_the_worst_input_counts(tmp_path: Path) -> None:
    plain, half = chain(tmp_path / "plain.onnx", w0=100, w1=200, w2=1e-3), tmp_path / "half.onnx"
    to_fp16(plain, half, float32=())
    dark, light = ({"images": FEEDS[0]["images"] * factor} for factor in (1e-2, 10))
    assert compare_layers("half", plain, half, [dark]).first is None
    for feeds in ([light, dark], [dark, light]):
        assert compare_layers("half", plain, half, feeds).first.node == "/1/conv"
    assert compare_layers("half", plain, half, [dark] * 3 + [light]).first is None, "the first three are used"


def test_names_with_brackets_are_no_patterns(tmp_path: Path) -> None:
    nodes = (node("Neg", "n", "images", "t[0]*"), node("Neg", "m", "t[0]*", "output0"))
    plain = write(tmp_path / "plain.onnx", nodes, {})
    assert [layer.tensor for layer in compare_layers("same", plain, plain, FEEDS).layers] == ["t[0]*", "output0"]


def test_engines_are_compared_by_their_outputs(tmp_path: Path, gpu) -> None:
    plain = chain(tmp_path / "plain.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(plain))
    engine = make_engine(tmp_path / "model.engine", model)
    found = compare_files(plain, engine, layers=True)
    assert found.passed
    assert found.layers == ()
    assert found.notes[-1] == (
        "tensors inside model.engine cannot be fetched once it is built: the outputs alone were compared"
    )


def test_the_verb_prints_keeps_and_judges_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, half, kept = (tmp_path / name for name in ("plain.onnx", "half.onnx", "verify.json"))
    chain(plain, w0=1e-4, w1=1e6, w2=1e-3)
    to_fp16(plain, half, float32=())
    assert main(["verify", str(plain), str(half), "--layers", "-o", str(kept)]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("--float32 /1/conv") == 1
    assert "half.onnx leaves the limit of 1.0e-02 first at /1/conv (" in " ".join(printed.out.split())
    document = json.loads(kept.read_text())
    assert document["layers"][0]["first"]["node"] == "/1/conv"
    found = Verification.model_validate_json(kept.read_text())
    assert found.layers[0].first.node == "/1/conv"
    assert main(["verify", "--from", str(kept), "--max-relative", "1"]) == 0
    assert "half.onnx is within the limits in all 5 tensors" in " ".join(capsys.readouterr().out.split())
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Along half.onnx" in page
    assert "Errors within half.onnx" in page
    assert "first at /1/conv (" in page
    capsys.readouterr()
    assert main(["verify", "--from", str(kept), "--layers"]) == 2
    assert "--layers would change nothing" in capsys.readouterr().err


def test_a_tensor_may_be_called_as_the_shape_of_another(tmp_path: Path) -> None:
    """As PyTorch's exporter does: the operand of the Reshape that makes ``view`` is ``view/shape``."""
    nodes = [CHAIN[0], node("Abs", "abs", "c0", "c0/shape"), node("Conv", "last", "c0/shape w1", "output0")]
    plain = write(tmp_path / "plain.onnx", nodes, weights())
    found = compare_layers("itself", plain, plain, FEEDS)
    assert [one.tensor for one in found.layers] == ["c0", "c0/shape", "output0"]


def test_nodes_without_names_are_called_as_in_the_reference(tmp_path: Path) -> None:
    """That is what the advice is for; the casts of another converter count where nodes are called by their place."""
    plain = onnx.load(cancelling(tmp_path / "plain.onnx"))
    to_fp16(tmp_path / "plain.onnx", tmp_path / "half.onnx", float32=())
    half = onnx.load(tmp_path / "half.onnx")
    for entry in (*plain.graph.node, *half.graph.node):
        entry.name = ""
    found = compare_layers("half", plain, half, FEEDS)
    first = found.first
    assert first
    assert first.mend
    assert first.mend.nodes == ("Sub_3", "Add_2")
    assert found.layers[-1].node == "Conv_6"
