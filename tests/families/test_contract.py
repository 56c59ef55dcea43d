"""What holds of every family, on its examples: the block itself, in modules, in graphs, and in files made of these."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from acmix_deploy.engine.build import build
from acmix_deploy.families import canonicalise
from acmix_deploy.families.examples import NearMiss
from acmix_deploy.families.family import Family
from acmix_deploy.families.layout import ChannelsFirst
from acmix_deploy.forms import to_form
from acmix_deploy.fusion import FusionReport, fuse
from acmix_deploy.precision import to_fp16
from acmix_deploy.runtime.inputs import AXES
from acmix_deploy.runtime.onnxruntime import open_session
from acmix_deploy.targets import DEFAULT_OPSET
from tests.families.parts import (
    EXPORTS,
    VARIANTS,
    Model,
    Variant,
    assert_fused,
    assert_left_alone_in_a_graph,
    assert_left_alone_in_a_module,
    example,
    export,
    operators,
    outputs,
    relative_l2,
    variants_of,
)
from tests.pipeline.parts import deployed
from tests.plugin import parts as plugin_parts


def one_of_each(variants: Sequence[Variant]) -> list[Variant]:
    """The first variant of the families of each operator."""
    found: dict[tuple[str, ...], Variant] = {}
    for variant in variants:
        found.setdefault(tuple(operator.op_type for operator, _ in variant.family.operators), variant)
    return [*found.values()]


FIRST = [variant for variant in VARIANTS if variant.examples is variants_of(variant.family)[0].examples]
"""Of each family."""

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


# The block itself.


@every_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(variant: Variant, dtype: torch.dtype) -> None:
    block, x = example(variant)
    half = copy.deepcopy(block).to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    assert relative_l2(half, block(x)) < 16 * torch.finfo(dtype).eps


@every_variant
def test_every_weight_learns(variant: Variant) -> None:
    block, x = example(variant)
    block.train()(x).square().mean().backward()
    for name, parameter in block.named_parameters():
        blind = variant.examples.without_gradient.get(name, slice(0, 0))
        for part in (parameter.grad[: blind.start], parameter.grad[blind.stop :]):
            assert not part.numel() or part.abs().max() > 0, name


@every_variant
def test_state_dicts_hold_all_there_is(variant: Variant) -> None:
    block, x = example(variant)
    other = variant.examples.block(8).eval()
    assert relative_l2(other(x), block(x)) > 0.01
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x), block(x))


# Blocks in modules.


@every_variant
def test_own_blocks_are_no_other_family_s(variant: Variant) -> None:
    block, _ = example(variant)
    model, (report,) = canonicalise(nn.Sequential(block))
    assert model[0] is block
    assert (report.status, report.family) == ("canonical", variant.family.name)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_block_in_the_code_of_others_is_replaced(variant: Variant, dtype: torch.dtype) -> None:
    """Known by its parts, though its class is another; no random number is drawn, mode and type are kept."""
    block, x = example(variant, as_others_have_it=True)
    expected = block(x)
    block.__class__ = type("Theirs", (type(block),), {})
    state = torch.random.get_rng_state()
    model, (report,) = canonicalise(nn.Sequential(nn.Identity(), block.to(dtype)))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (report.name, report.class_name, report.status, report.family) == (
        "1",
        "Theirs",
        "replaced",
        variant.family.name,
    )
    assert type(model[1]) is variant.family.recogniser.block
    assert not model[1].training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    limit = variant.family.tolerances["float32"].limit() if dtype == torch.float32 else 1e-2
    assert relative_l2(model[1](x.to(dtype)), expected) < limit


def permuting(block: nn.Module, to: tuple[int, ...] = (0, 2, 3, 1), back: tuple[int, ...] = (0, 3, 1, 2)) -> nn.Module:
    """The block in the code of others, which permutes what it takes, and what it gives."""
    kind = type(block)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return kind.forward(self, x.permute(to)).permute(back)

    block.__class__ = type("Theirs", (kind,), {"forward": forward})
    return block


CHANNELS_LAST = [variant for variant in VARIANTS if variant.examples.channels_last]


@pytest.mark.parametrize(
    ("variant", "exporter"),
    [
        pytest.param(
            variant,
            exporter,
            id=f"{variant.name}-{exporter}",
            # That exporter sees the same permutations in Model, below.
            marks=[pytest.mark.soak] * (exporter == "dynamo" and index > 0),
        )
        for index, variant in enumerate(CHANNELS_LAST)
        for exporter in ("torchscript", "dynamo")
    ],
)
def test_a_block_that_permutes_maps_is_replaced(variant: Variant, exporter: str, tmp_path: Path) -> None:
    """From [B, C, H, W] to channels last and back."""
    block, x = example(variant, as_others_have_it=True)
    maps = x.permute(0, 3, 1, 2).contiguous()
    expected = block(x).permute(0, 3, 1, 2)
    found, (report,) = canonicalise(nn.Sequential(nn.Conv2d(8, 8, 1), permuting(block)))
    assert (report.class_name, report.status, report.family) == ("Theirs", "replaced", variant.family.name)
    assert type(found[1]) is ChannelsFirst
    assert type(found[1].block) is variant.family.recogniser.block
    assert report.geometry == {name: getattr(found[1].block, name) for name in variant.family.recogniser.geometry}
    assert relative_l2(found[1](maps), expected) < variant.family.tolerances["float32"].limit()
    again, (report,) = canonicalise(found)
    assert (again, report.status, report.name) == (found, "canonical", "1.block")
    source = export(
        found.eval(), maps, tmp_path / "plain.onnx", exporter=exporter, dynamic=AXES, divisor=variant.examples.divisor
    )
    larger = torch.randn(1, 8, 16, 12)
    assert_fused(variant.family, found, source, maps, larger)


@pytest.mark.parametrize("variant", CHANNELS_LAST, ids=lambda variant: variant.name)
@pytest.mark.parametrize(
    ("to", "back"),
    [((0, 3, 2, 1), (0, 3, 2, 1)), ((0, 2, 3, 1), (0, 3, 2, 1)), ((0, 2, 3, 1), (0, 1, 2, 3))],
    ids=["turned", "turned behind", "not permuted back"],
)
def test_a_block_that_turns_its_maps_is_left_alone(
    variant: Variant, to: tuple[int, ...], back: tuple[int, ...]
) -> None:
    """Height and width change places, before the block or behind it, or the channels stay last."""
    block = permuting(example(variant)[0], to, back)
    found, reports = canonicalise(nn.Sequential(block))
    assert found[0] is block
    assert {report.status for report in reports} <= {"left alone"}


every_near_miss = pytest.mark.parametrize(
    ("variant", "near_miss"),
    [
        pytest.param(variant, near_miss, id=f"{variant.name}-{near_miss.in_graphs or near_miss.in_modules}")
        for variant in VARIANTS
        for near_miss in variant.examples.near_misses
    ],
)


@every_near_miss
def test_a_near_miss_in_a_module_is_left_alone(variant: Variant, near_miss: NearMiss) -> None:
    assert_left_alone_in_a_module(variant.family, near_miss.module(8), near_miss.in_modules)


def test_ordinary_modules_are_not_mentioned(tmp_path: Path) -> None:
    layers: list[nn.Module] = [
        nn.TransformerEncoderLayer(8, 2),
        nn.MultiheadAttention(8, 2),
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 162), nn.Linear(8, 8)),
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), nn.Conv2d(3, 6, 1)),
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.Identity(), nn.Conv2d(6, 6, 1)),
        nn.Sequential(nn.Conv2d(9, 8, 3), *(nn.Conv2d(8, 8, 1) for _ in range(5))),
    ]
    assert [canonicalise(layer)[1] for layer in layers] == [[]] * len(layers)
    in_a_graph = nn.Sequential(layers[3], nn.Softmax(1), layers[4]).eval()
    source = export(in_a_graph, torch.randn(1, 3, 8, 8), tmp_path / "plain.onnx")
    assert fuse(source, tmp_path / "fused.onnx").found.blocks == []


# Blocks in graphs.


@dataclass(frozen=True)
class Exported:
    """A model with one block, as a file and fused."""

    family: Family[Any]
    model: Model
    plain: Path
    fused: Path
    report: FusionReport
    inputs: list[Tensor]
    """All that it takes, where its axes are free at several sizes."""

    def distance(self, path: Path) -> float:
        """The largest relative L2 between what a file computes and what the model does."""
        session = open_session(path)
        (name,) = (node.name for node in session.get_inputs())
        with torch.no_grad():
            return max(relative_l2(session.run(None, {name: x.numpy()})[0], self.model(x)) for x in self.inputs)


EXPORTED = [
    pytest.param(
        (variant, *export.values),
        id=f"{variant.name}-{export.id}",
        # Free axes take dynamo its time; of a family's variants the first one shows what it makes of them.
        marks=[*export.marks, *[pytest.mark.soak] * (export.id == "dynamo-dynamic" and variant not in FIRST)],
    )
    for variant in VARIANTS
    for export in EXPORTS
]
BUILT = [
    pytest.param(
        *one.values, id=one.id, marks=[pytest.mark.soak, *one.marks] if "script-dynamic" in one.id else one.marks
    )
    for one in EXPORTED
]
"""Static graphs of one exporter and dynamic ones of the other; `make soak` builds the others too."""


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    variant, exporter, dynamic = request.param
    folder = tmp_path_factory.mktemp("contract")
    torch.manual_seed(0)
    model = Model(variant, channels=16)  # heads of 8, which the plugin takes
    sizes = [(2, 8, 12), *([(1, 16, 12), (3, 12, 8)] if dynamic else [])]
    inputs = [torch.randn(batch, 3, height, width) for batch, height, width in sizes]
    plain, fused = folder / "plain.onnx", folder / "fused.onnx"
    divisor = variant.examples.divisor
    export(model, inputs[0], plain, exporter=exporter, dynamic=dynamic, divisor=divisor)
    return Exported(variant.family, model, plain, fused, fuse(plain, fused, expect=1).found, inputs)


def test_blocks_fuse_and_compute_the_same(exported: Exported) -> None:
    limit = exported.family.tolerances["float32"].floor
    assert "Col2Im" not in operators(exported.plain), "TensorRT does not read it"
    (block,) = exported.report.blocks
    assert (block.name, block.family) == (f"{exported.family.name}_0", exported.family.name)
    assert exported.distance(exported.plain) < limit
    assert exported.distance(exported.fused) < limit


def test_a_fused_file_stays_as_it_is(exported: Exported, tmp_path: Path) -> None:
    again = fuse(exported.fused, tmp_path / "again.onnx", expect=0).found
    assert (again.blocks, again.nodes_after) == ([], again.nodes_before)


@pytest.mark.parametrize("form", ["any", "plugin", "plain"])
def test_every_form(exported: Exported, form: Any, tmp_path: Path) -> None:
    """Nodes of operators in two, their definitions in one, and standard operators alone in the third."""
    formed = to_form(onnx.load(exported.fused), form)
    nodes = [node.op_type for node in formed.graph.node if node.domain]
    types = {operator.op_type for operator, _ in exported.family.operators if form != "plain"}
    assert {*nodes} <= types
    assert len(nodes) == bool(types)
    assert len(formed.functions) == (len(nodes) if form == "any" else 0)
    if form == "plugin" and nodes:
        return  # ONNX Runtime has no plugin
    onnx.save(formed, tmp_path / "formed.onnx")
    assert exported.distance(tmp_path / "formed.onnx") < exported.family.tolerances["float32"].floor


def test_half_precision_file(exported: Exported, tmp_path: Path) -> None:
    to_fp16(exported.fused, tmp_path / "fp16.onnx")
    with torch.no_grad():
        half = copy.deepcopy(exported.model).half()
        eager = max(relative_l2(half(x.half()), exported.model(x)) for x in exported.inputs)
    assert exported.distance(tmp_path / "fp16.onnx") < exported.family.tolerances["float16"].limit(eager)


@pytest.mark.parametrize("exported", BUILT, indirect=True)
def test_rtx_builds(exported: Exported, tmp_path: Path) -> None:
    plugin_parts.rtx_libraries()
    (name,) = (node.name for node in open_session(exported.fused).get_inputs())
    dynamic = len(exported.inputs) > 1
    shapes = ((1, 3, 8, 8), (2, 3, 8, 12), (3, 3, 16, 12)) if dynamic else None
    report = build(exported.fused, tmp_path / "model.engine", shapes=shapes).found
    assert report.layers > 0
    assert report.manifest.profiles == ({name: shapes} if dynamic else {})


@every_near_miss
def test_a_near_miss_in_a_graph_is_left_alone(variant: Variant, near_miss: NearMiss, tmp_path: Path) -> None:
    model, x = Model(variant, near_miss.module(8)), torch.randn(2, 3, 8, 12)
    source = export(model, x, tmp_path / "plain.onnx")
    assert_left_alone_in_a_graph(variant.family, model, source, x, near_miss.in_graphs)


@every_variant
def test_a_block_whose_intermediate_is_also_an_output_is_left_alone(variant: Variant, tmp_path: Path) -> None:
    model, x, source = Model(variant), torch.randn(2, 3, 8, 12), tmp_path / "plain.onnx"
    plain = onnx.shape_inference.infer_shapes(onnx.load(export(model, x, source)))
    fuse(source, tmp_path / "fused.onnx", expect=1)
    stay = {name for node in onnx.load(tmp_path / "fused.onnx").graph.node for name in node.output}
    typed = {value.name: value for value in plain.graph.value_info if value.type.tensor_type.HasField("shape")}
    made_of_x = {plain.graph.input[0].name}
    for node in plain.graph.node:
        if made_of_x.intersection(node.input) and node.op_type != "Shape":
            made_of_x.update(node.output)
    gone = [name for node in plain.graph.node for name in node.output if name in made_of_x & typed.keys() - stay]
    plain.graph.output.append(typed[gone[len(gone) // 3]])
    onnx.save(plain, source)
    assert_left_alone_in_a_graph(variant.family, model, source, x, "is also an output of the graph")


@every_variant
def test_half_precision_graphs_fuse(variant: Variant, tmp_path: Path) -> None:
    model, x = Model(variant), torch.randn(2, 3, 8, 12)
    exact = model(x)
    eager = relative_l2(model.half()(x.half()), exact)
    fuse(export(model, x.half(), tmp_path / "plain.onnx"), tmp_path / "fused.onnx", expect=1)
    types = {tensor.data_type for tensor in onnx.load(tmp_path / "fused.onnx").graph.initializer}
    assert types <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    assert relative_l2(outputs(tmp_path / "fused.onnx", x.half()), exact) < variant.family.tolerances["float16"].limit(
        eager
    )


# The whole way.


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(variant, id=variant.name, marks=() if variant in one_of_each(VARIANTS) else pytest.mark.soak)
        for variant in VARIANTS
    ],
)
def test_a_checkpoint_becomes_verified_files(variant: Variant, tmp_path: Path) -> None:
    """By the exporter of the smaller opset but for the first, as it is the faster one."""
    model = Model(variant)
    torch.save(model, tmp_path / "model.pt")
    opset = DEFAULT_OPSET if variant is VARIANTS[0] else 17
    report = deployed(
        tmp_path / "model.pt", tmp_path / "out", input_shape=(1, 3, 8, 12), dynamic=["batch"], fp16=True, expect=1,
        trust=True, no_engine=True, opset=opset,
    )  # fmt: skip
    assert report.passed
    assert [(block.family, block.status) for block in report.blocks] == [(variant.family.name, "canonical")]
    for name, dtype in (("fused", "float32"), ("fp16", "float16")):
        path = tmp_path / "out" / f"model.{name}.onnx"
        custom = [node.op_type for node in onnx.load(path).graph.node if node.domain]
        types = {operator.op_type for operator, _ in variant.family.operators}
        assert {*custom} <= types
        assert len(custom) == bool(types)
        for batch in (1, 2, 3):
            x = torch.rand(batch, 3, 8, 12)
            assert relative_l2(outputs(path, x), model(x)) < variant.family.tolerances[dtype].limit()
