"""ACmix blocks as other people write them are found and replaced; what only looks like one is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acmix_deploy.families import BlockReport, canonicalise
from acmix_deploy.families.acmix.graph import ACMIX as FAMILY
from acmix_deploy.families.acmix.module import ACmix
from acmix_deploy.families.windowed_acmix.module import WindowedACmix
from tests.families.parts import assert_left_alone_in_a_module, randomised


class Port(nn.Module):
    """One block in the many spellings found in detectors, each chosen by a keyword.

    The attention is written with Tensor.unfold on whole heads, independently of the package's module.
    """

    def __init__(
        self,
        in_planes: int = 4,
        planes: int = 8,
        head: int = 2,
        window: int = 5,
        stride: int = 1,
        *,
        declare: str = "unfold",
        position: str = "linspace",
        dep_bias: bool = False,
        projection_bias: bool = True,
        rate_shape: tuple[int, ...] = (1,),
        border: str = "reflect",
        scale: float | None = None,
        swap_rates: bool = False,
        residual: bool = False,
        maps: int = 9,
        fc_bias: bool = False,
    ) -> None:
        super().__init__()
        d = planes // head
        self.head, self.d, self.window, self.step = head, d, window, stride
        self.position, self.border, self.residual, self.swap_rates = position, border, residual, swap_rates
        self.scale = d**-0.5 if scale is None else scale
        self.rate1 = nn.Parameter(torch.full(rate_shape, 0.7))
        self.rate2 = nn.Parameter(torch.full(rate_shape, 0.4))
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(in_planes, planes, 1, bias=projection_bias) for _ in range(3))
        self.conv_p = nn.Conv2d(2, d, 1)
        if declare == "unfold":
            self.unfold = nn.Unfold(window, stride=stride)
        elif declare == "attribute":
            self.kernel_att = window
        elif declare.isdigit():
            self.kernel_att = int(declare)
        self.fc = nn.Conv2d(3 * head, maps, 1, bias=fc_bias)
        self.dep_conv = nn.Conv2d(maps * d, planes, 3, stride, 1, groups=d, bias=dep_bias)

    def locations(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if self.position == "linspace":
            axes = [torch.linspace(-1, 1, n) for n in (width, height)]
        elif self.position == "cuda":
            axes = [torch.linspace(-1, 1, n).cuda() for n in (width, height)]
        elif self.position == "to cuda":
            axes = [torch.linspace(-1, 1, n, device=torch.device("cuda", 1)).to("cuda:0") for n in (width, height)]
        elif self.position == "float32":
            axes = [torch.linspace(-1, 1, n, dtype=torch.float32) for n in (width, height)]
        elif self.position == "half":
            axes = [torch.linspace(-1, 1, n).half() for n in (width, height)]
        else:
            axes = [torch.arange(n).to(x) / (n - 1) * 2 - 1 for n in (width, height)]
        return torch.stack([axes[0].repeat(height, 1), axes[1].view(-1, 1).repeat(1, width)])[None]

    def windows(self, x: Tensor) -> Tensor:
        """[B, N, d, H, W] -> [B, N, d, H / s, W / s, K * K]"""
        flat, reach = x.flatten(1, 2), self.window // 2
        mode = {"mode": self.border} if self.border != "zero" else {}
        spread = F.pad(flat, [reach] * 4, **mode).unfold(2, self.window, self.step).unfold(3, self.window, self.step)
        return spread.flatten(4).unflatten(1, x.shape[1:3])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (project(x).unflatten(1, (self.head, self.d)) for project in (self.conv1, self.conv2, self.conv3))
        p = self.conv_p(self.locations(x)).unsqueeze(1)
        q_here, p_here = (t[..., :: self.step, :: self.step].unsqueeze(-1) for t in (q, p))
        logits = (q_here * self.scale * (self.windows(k) + p_here - self.windows(p))).sum(2, keepdim=True)
        attended = (logits.softmax(-1) * self.windows(v)).sum(-1).flatten(1, 2)
        maps = torch.einsum("tj,bjchw->bcthw", self.fc.weight[:, :, 0, 0], torch.cat([q, k, v], 1))
        if self.fc.bias is not None:
            maps = maps + self.fc.bias.view(-1, 1, 1)
        shifted = self.dep_conv(maps.flatten(1, 2))
        rates = (self.rate2, self.rate1) if self.swap_rates else (self.rate1, self.rate2)
        y = rates[0] * attended + rates[1] * shifted
        return y + q.flatten(1, 2) if self.residual else y


def port(**options: Any) -> Port:
    torch.manual_seed(1)
    return Port(**options).eval()


def only(reports: list[BlockReport]) -> BlockReport:
    (report,) = reports
    return report


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"head": 1},
        {"head": 8},
        {"in_planes": 2, "head": 1},
        {"in_planes": 12, "planes": 9, "head": 3},
        {"in_planes": 9, "planes": 9, "head": 3},
        {"window": 3, "stride": 2},
        {"window": 7, "declare": "attribute"},
        {"window": 3, "declare": "nothing"},
        {"window": 11, "declare": "nothing"},
        {"window": 7, "declare": "512"},
        {"projection_bias": False},
        {"dep_bias": True},
        {"rate_shape": ()},
        {"rate_shape": (8, 1, 1)},
        {"swap_rates": True},
        {"fc_bias": True},
        {"position": "like the input"},
        {"position": "float32"},
        {"position": "cuda"},
        {"position": "to cuda"},
    ],
    ids=str,
)
def test_a_port_is_replaced_by_an_equal_block(options: dict[str, Any]) -> None:
    original = port(**options)
    reference = copy.deepcopy(original)
    reference.position = "like the input"
    block, reports = canonicalise(original)
    report = only(reports)
    assert type(block) is ACmix, report
    assert not block.training
    assert (report.status, report.name, report.class_name, report.family) == ("replaced", "", "Port", "acmix")
    assert report.geometry == {
        "in_planes": options.get("in_planes", 4),
        "out_planes": options.get("planes", 8),
        "kernel_att": options.get("window", 5),
        "head": options.get("head", 2),
        "stride": options.get("stride", 1),
    }
    x = torch.randn(3, original.conv1.in_channels, 8, 12)
    torch.testing.assert_close(block(x), reference(x))


@pytest.mark.parametrize(
    ("options", "repaired"),
    [
        ({}, {"linspace-position", "no-bias"}),
        ({"position": "ours", "dep_bias": True}, set()),
        ({"position": "ours"}, {"no-bias"}),
        ({"position": "ours", "dep_bias": True, "rate_shape": ()}, {"scalar-rates"}),
        (
            {"position": "cuda", "dep_bias": True},
            {"linspace-position", "cuda-position"},
        ),
    ],
)
def test_what_was_repaired_is_told(options: dict[str, Any], repaired: set[str]) -> None:
    assert set(only(canonicalise(port(**options))[1]).repaired) == repaired


@pytest.mark.parametrize("position", ["linspace", "ours"])
def test_half_precision_weights(position: str) -> None:
    original = port(position=position, dep_bias=True).half()
    x = torch.randn(1, 4, 8, 8)
    expected = port(position=position, dep_bias=True)(x)
    block, reports = canonicalise(original)
    assert block.conv1.weight.dtype == torch.float16
    assert ("float32-position" in only(reports).repaired) == (position == "linspace")
    assert (block(x.half()) - expected).norm() < 1e-2 * expected.norm()


def test_a_block_that_runs_in_half_precision_only_is_compared_there() -> None:
    assert only(canonicalise(port(position="half").half())[1]).status == "replaced"
    assert only(canonicalise(port(position="half", border="zero").half())[1]).status == "left alone"


def test_the_parameters_are_kept_not_copied() -> None:
    original = port()
    original.conv2.weight.requires_grad_(False)
    block, _ = canonicalise(original)
    assert block.conv1.weight is original.conv1.weight
    assert block.rate1 is original.rate1
    assert not block.conv2.weight.requires_grad


class Wrapper(nn.Module):
    """A residual stage around a block, with the block's name in its own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class ACmixStage(Wrapper):
    pass


def test_blocks_anywhere_in_a_model() -> None:
    layers = [port(in_planes=8), nn.SiLU(), ACmixStage(port(in_planes=8)), ACmix(8, 8)]
    layers[0].i, layers[0].f, layers[0].type, layers[0].np = 0, -1, "port.Port", 123
    model = nn.Sequential(*layers, nn.ModuleDict({"deep": nn.ModuleList([port(in_planes=8)])})).train()
    x = torch.randn(1, 8, 6, 6)
    expected = model[:4](x)
    same, reports = canonicalise(model)
    assert same is model
    assert [(r.name, r.status) for r in reports] == [
        ("0", "replaced"),
        ("2.block", "replaced"),
        ("3", "canonical"),
        ("4.deep.0", "replaced"),
    ]
    assert all(type(block) is ACmix for block in (model[0], model[2].block, model[4]["deep"][0]))
    assert (model[0].i, model[0].f, model[0].type, model[0].np) == (0, -1, "port.Port", 123)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model[:4](x), expected)
    assert [r.status for r in canonicalise(model)[1]] == ["canonical"] * 4


def test_a_block_used_twice_stays_one_block() -> None:
    block = port(in_planes=8)
    model, reports = canonicalise(nn.Sequential(block, nn.ReLU(), block, Wrapper(block)))
    assert model[0] is model[2] is model[3].block
    assert type(model[0]) is ACmix
    assert only(reports).name == "0, 2, 3.block"


class ACMIX(nn.Module):
    """Named like the block, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


class Stateful(Port):
    """Runs only for the size its position was made for, as ports with a stored position do."""

    def locations(self, x: Tensor) -> Tensor:
        return super().locations(torch.empty(1, 2, 40, 40))


@pytest.mark.parametrize(
    ("impostor", "reason"),
    [
        (ACMIX, "no 3x3 convolution of 9 * head_dim channels"),
        (lambda: port(maps=8), "no 3x3 convolution of 9 * head_dim channels"),
        (lambda: port(border="zero"), "kernel_att=5, head=2, stride=1) by a relative L2"),
        (lambda: port(border="replicate"), "differs from ACmix"),
        (lambda: port(scale=1.0), "differs from ACmix"),
        (lambda: port(residual=True), "differs from ACmix"),
        (lambda: port(window=1), "kernel_size is 1; it must be odd"),
        (lambda: port(window=512), "kernel_size is 512; it must be odd and at least 3; its own forward fails"),
        (lambda: port(rate_shape=(3, 1, 1, 1)), "0 parameters of one element or one a channel"),
        (Stateful, "its own forward fails: RuntimeError"),
    ],
)
def test_an_impostor_is_left_alone_and_named(impostor: Any, reason: str) -> None:
    assert_left_alone_in_a_module(FAMILY, impostor(), reason)


class Cropped(ACmix):
    """The block without its last row."""

    def forward(self, x):
        return super().forward(x)[:, :, :-1]


def test_results_of_other_shapes_are_told_as_shapes():
    _, (report,) = canonicalise(nn.Sequential(Cropped(4, 8, 3, head=2)))
    assert report.status == "left alone"
    assert report.reason.startswith("it gives [2, 8, 7, 9] where ACmix(")
    assert report.reason.endswith(") gives [2, 8, 8, 9]")


def test_a_module_that_resembles_blocks_of_two_families_has_one_reason():
    """It is called ACmix and has the parts of a windowed block, which it differs from: that says more than its name."""

    class ACmixOfWindows(WindowedACmix):
        def forward(self, x):
            return 1.1 * super().forward(x)

    _, (report,) = canonicalise(nn.Sequential(ACmixOfWindows(8, 4, 2)))
    assert (report.family, report.status) == ("windowed_acmix", "left alone")
    assert "differs from WindowedACmix" in report.reason


def test_a_rate_that_depends_on_the_size_of_the_map_is_no_rate():
    class BySize(ACmix):
        def _convolve(self, q, k, v):
            return super()._convolve(q, k, v) * 8 / q.shape[-1]

    _, (report,) = canonicalise(nn.Sequential(nn.Identity(), randomised(BySize(8, 8, 3, 2))))
    assert report.status == "left alone"
    assert "differs" in report.reason


def test_parts_that_cannot_be_read_are_left_alone():
    """Weights that are not finite, and those that are not there yet."""
    block = randomised(ACmix(8, 8, 3, 2))
    block.__class__ = type("Theirs", (ACmix,), {})
    block.conv1.weight.data[0] = torch.nan
    lazy = nn.Sequential(nn.LazyConv2d(8, 1), nn.LazyConv2d(8, 1))
    reports = canonicalise(nn.Sequential(block, lazy, nn.Conv2d(8, 8, 3).bfloat16()))[1]
    assert [(report.class_name, report.status) for report in reports] == [("Theirs", "left alone")]
