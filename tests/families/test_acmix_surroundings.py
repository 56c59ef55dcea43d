"""ACmix as people build it in: between BatchNorm and ReLU, in ResNet's bottleneck, in a C2PSA-like block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from acmix_deploy.families import canonicalise
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.fusion import fuse
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.runtime.inputs import AXES
from tests.families.parts import export, operators, outputs, relative_l2
from tests.families.test_recognise_module import Port
from tests.fusion.test_fuse import Published

resnet = pytest.importorskip("torchvision.models.resnet", reason="torchvision is not installed")

LIMIT = LOCAL_ATTENTION.tolerances["float32"].floor
DEPTHS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3)}
"""Bottlenecks of each stage, as in stand-alone self-attention (arXiv 1906.05909), which the paper follows."""


def own(planes, stride=1):
    """The package's module."""
    return ACmix(planes, planes, head=4, stride=stride)


def port(planes, stride=1):
    """The same in other people's code, with the faults of the published one."""
    return Port(planes, planes, 4, 7, stride)


def published(planes, stride=1):
    """The same with the published position, which TorchScript makes float64."""
    return Published(planes, planes, head=4, stride=stride)


class BetweenNorms(nn.Sequential):
    """BatchNorm and ReLU on both sides."""

    def __init__(self, block, planes=8):
        norms = [nn.Sequential(nn.BatchNorm2d(planes), nn.ReLU()) for _ in range(2)]
        super().__init__(nn.Conv2d(3, planes, 3, padding=1, bias=False), norms[0], block(planes), norms[1])


class Bottleneck(resnet.Bottleneck):
    """ResNet's, with ACmix in the place of its 3x3 convolution, which carries the stride."""

    def __init__(self, inplanes, planes, stride=1, *args, block=own, **options):
        super().__init__(inplanes, planes, stride, *args, **options)
        self.conv2 = block(self.conv2.out_channels, stride)


class InBottleneck(nn.Sequential):
    """One that halves the map, one that keeps it."""

    def __init__(self, block):
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
        stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        super().__init__(stem, Bottleneck(8, 4, 2, shortcut, block=block), Bottleneck(16, 4, block=block))


class Attending(nn.Module):
    """A residual block and a residual feed-forward part on half of the channels, as in YOLO's C2PSA."""

    def __init__(self, block, planes=16):
        super().__init__()
        half = planes // 2
        self.before, self.after = self.layer(3, planes), self.layer(planes, planes)
        self.attention = block(half)
        self.feed = nn.Sequential(self.layer(half, planes), self.layer(planes, half, act=False))

    @staticmethod
    def layer(cin, cout, act=True):
        return nn.Sequential(
            nn.Conv2d(cin, cout, 1, bias=False), nn.BatchNorm2d(cout), nn.SiLU() if act else nn.Identity()
        )

    def forward(self, x):
        kept, attended = self.before(x).chunk(2, 1)
        attended = attended + self.attention(attended)
        attended = attended + self.feed(attended)
        return self.after(torch.cat([kept, attended], 1))


def lived_in(model):
    """With BatchNorms that have seen data, ready to be exported."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.5, 2),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


SURROUNDINGS = {BetweenNorms: 1, InBottleneck: 2, Attending: 1}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_foreign_modules_are_replaced_where_they_stand(surroundings):
    model = lived_in(surroundings(port))
    x = torch.randn(2, 3, 12, 16)
    expected = model(x)
    same, reports = canonicalise(copy.deepcopy(model))
    count = SURROUNDINGS[surroundings]
    assert [(report.family, report.status) for report in reports] == [("acmix", "replaced")] * count
    assert sum(type(module) is ACmix for module in same.modules()) == count
    assert relative_l2(same(x), expected) < LIMIT


@pytest.mark.parametrize(
    ("exporter", "dynamic", "block", "surroundings"),
    [
        *(("torchscript", True, published, surroundings) for surroundings in SURROUNDINGS),
        ("dynamo", False, published, InBottleneck),  # which has two blocks
        *(pytest.param("dynamo", False, published, one, marks=pytest.mark.soak) for one in (BetweenNorms, Attending)),
        # tests/families/test_contract.py has one between convolutions.
        *(pytest.param("dynamo", True, own, surroundings, marks=pytest.mark.soak) for surroundings in SURROUNDINGS),
    ],
)
def test_blocks_fuse_where_they_stand(tmp_path, surroundings, exporter, dynamic, block):
    """With linspace, axes are free by TorchScript alone: dynamo freezes its length."""
    model, x = lived_in(surroundings(block)), torch.randn(2, 3, 12, 16)
    source = export(model, x, tmp_path / "plain.onnx", exporter=exporter, dynamic=AXES if dynamic else ())
    report = fuse(source, tmp_path / "fused.onnx", expect=SURROUNDINGS[surroundings]).found
    assert {found.family for found in report.blocks} == {"acmix"}
    assert operators(tmp_path / "fused.onnx").count(LOCAL_ATTENTION.op_type) == SURROUNDINGS[surroundings]
    for size in [(1, 3, 8, 10), (3, 3, 20, 12)] if dynamic else [x.shape]:
        x = torch.randn(size)
        assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < LIMIT


def test_more_than_the_block_between_its_parts(tmp_path):
    """A ReLU on the values, inside the block, is no surrounding."""

    class Inside(ACmix):
        def _attend(self, q, k, v):
            return super()._attend(q, k, v.relu())

    model = lived_in(Bottleneck(16, 4, block=lambda planes, stride: Inside(planes, planes, stride=stride)))
    x = torch.randn(1, 16, 8, 10)
    report = fuse(export(model, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx", expect=0).found
    assert "not linear: Relu" in report.blocks[0].reason


def small_resnet(depth, block=own):
    """A ResNet for ten classes, narrow in its bottlenecks: 16 to 128 channels in ACmix."""
    torch.manual_seed(0)
    model = resnet.ResNet(Bottleneck, DEPTHS[depth], num_classes=10, width_per_group=16)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.conv2 = block(module.conv2.out_planes, module.stride)
    return lived_in(model)


DEPTH = pytest.mark.parametrize("depth", [26, *(pytest.param(depth, marks=pytest.mark.soak) for depth in (38, 50))])


@DEPTH
def test_resnet_in_a_foreign_file(tmp_path, depth):
    """As PyTorch exports the published code."""
    model, blocks, x = small_resnet(depth, published), sum(DEPTHS[depth]), torch.randn(1, 3, 128, 128)
    report = fuse(export(model, x, tmp_path / "plain.onnx"), tmp_path / "fused.onnx", expect=blocks).found
    assert report.nodes_after < report.nodes_before / 3
    assert relative_l2(outputs(tmp_path / "fused.onnx", x), model(x)) < LIMIT


@DEPTH
def test_resnet_of_foreign_modules(depth):
    model, x = small_resnet(depth, port), torch.randn(1, 3, 128, 128)
    expected = model(x)
    replaced, reports = canonicalise(model)
    assert [report.status for report in reports] == ["replaced"] * sum(DEPTHS[depth])
    assert relative_l2(replaced(x), expected) < LIMIT
