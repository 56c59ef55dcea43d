"""The kernels on a GPU, against a plain reference in double and against the PyTorch oracles."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.outlook_attention import OUTLOOK_ATTENTION
from acmix_deploy.operators.spec import Operator
from acmix_deploy.plugin.toolchain import find_cuda
from tests.gpu import device
from tests.gpu.device import DeviceKernels, Placed
from tests.plugin import kernels
from tests.plugin.kernels import Problem

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(bool(device.missing()), reason=device.missing())

WINDOWS = [
    (operator, kernel_size, stride)
    for operator in OPERATORS
    for kernel_size, stride in itertools.product(*(operator.kernel_limits[name] for name in ("kernel_size", "stride")))
]


@dataclass(frozen=True)
class Launch:
    """One problem with its tensors, for one row of the dispatch table. ``y`` is NaN at first, guards surround all."""

    library: DeviceKernels
    operator: Operator
    entry: dict[str, Any]
    problem: Problem
    first: Placed
    second: Placed
    y: Placed

    @staticmethod
    def of(library: DeviceKernels, operator: Operator, entry: dict[str, Any], offset: int = 0, **fields: int) -> Launch:
        """Random inputs; the rest of ``fields``: 2 images, 3 heads, the logits divided by sqrt(head_dim)."""
        fields = {"batch": 2, "num_heads": 3, "kernel_size": 7, "stride": 1} | fields
        problem = device.problem_for(entry, scale=fields["head_dim"] ** -0.5, **fields)
        tensors = [
            Placed.empty(shape, entry["dtype"], entry["layout"], offset)
            for shape in device.shapes(operator.op_type, problem)
        ]
        launch = Launch(library, operator, entry, problem, *tensors)
        launch.randomise()
        return launch

    def randomise(self) -> None:
        """New inputs, and y all NaN again."""
        self.first.tensor.normal_()
        self.second.tensor.normal_()
        self.y.tensor.fill_(float("nan"))

    def run(self, position: bool = True) -> Any:
        """y, launched on the current stream."""
        self.library.launch(*self.arguments(position), self.y.tensor, self.entry["kernel"])
        return self.y.tensor

    def arguments(self, position: bool = True) -> tuple[Any, ...]:
        return self.operator.op_type, self.problem, self.first.tensor, self.second.tensor if position else None

    def check(self, position: bool = True) -> None:
        """Fail unless the kernel agrees with the reference and wrote y alone, all of it."""
        y = self.run(position)
        self.compare(y, self.library.reference(*self.arguments(position)))
        assert self.y.guards_hold(), f"memory around y was written: {self}"

    def compare(self, y: Any, expected: Any) -> None:
        error = ((y.double() - expected).norm() / expected.norm()).item()
        assert error <= device.limit(self.operator, self.entry["dtype"]), f"relative L2 {error:.1e}: {self}"

    def __str__(self) -> str:
        fields = " ".join(f"{name}={getattr(self.problem, name)}" for name, _ in self.problem._fields_)
        return f"{self.operator.op_type} {self.entry} {fields}"


def entries(library: DeviceKernels, operator: Operator) -> list[dict[str, Any]]:
    return [entry for entry in library.entries if entry["operator"] == operator.op_type]


def rows(library: DeviceKernels, operator: Operator) -> Iterator[tuple[dict[str, Any], int]]:
    """Each row of the dispatch table with each head_dim that it serves, itself and those padded to it."""
    all_of_it = entries(library, operator)
    for entry, head_dim in itertools.product(all_of_it, operator.kernel_limits["head_dim"]):
        alike = [e["head_dim"] for e in all_of_it if all(e[k] == entry[k] for k in ("dtype", "layout", "kernel"))]
        if entry["head_dim"] == min((size for size in alike if size >= head_dim), default=None):
            yield entry, head_dim


def check_rows(library: DeviceKernels, operator: Operator, kernel_size: int, stride: int) -> None:
    """Odd sizes, the smallest map there is, which is all border, and one whose rows are whole words of memory."""
    least = -(-(kernel_size // 2 + 1) // stride)
    for entry, head_dim in rows(library, operator):
        window = {"head_dim": head_dim, "kernel_size": kernel_size, "stride": stride}
        for height, width in ((9, 17), (least, least), (11, 8)):
            launch = Launch.of(library, operator, entry, height=height * stride, width=width * stride, **window)
            launch.check()


@pytest.mark.parametrize(("operator", "kernel_size", "stride"), WINDOWS)
def test_every_row_at_every_window(library, operator, kernel_size, stride):
    check_rows(library, operator, kernel_size, stride)


@pytest.mark.parametrize("stride", LOCAL_ATTENTION.kernel_limits["stride"])
def test_every_row_as_on_sm_75(turing_library, stride):
    """Before sm_80 tensor cores multiply in two steps of half the depth, and nothing is copied in the background."""
    check_rows(turing_library, LOCAL_ATTENTION, 7, stride)


def test_without_position(library):
    for entry, head_dim in rows(library, LOCAL_ATTENTION):
        Launch.of(library, LOCAL_ATTENTION, entry, head_dim=head_dim, height=12, width=16).check(position=False)


def test_any_address(library):
    """NCHW tensors may lie at any element."""
    for operator in OPERATORS:
        for entry, head_dim in rows(library, operator):
            if entry["layout"] == "NCHW":
                sizes = {"head_dim": head_dim, "height": 12, "width": 16, "kernel_size": 3}
                Launch.of(library, operator, entry, offset=1, **sizes).check()


@pytest.mark.parametrize("side", [20, 40, 80])
def test_sizes_of_a_detector(library, side):
    for entry in entries(library, LOCAL_ATTENTION):
        sizes = {"head_dim": entry["head_dim"], "height": side, "width": side}
        Launch.of(library, LOCAL_ATTENTION, entry, batch=4, num_heads=4, **sizes).check()


def test_oracles(library):
    """PyTorch in float64 agrees with each row of the table and with the reference, to which all else is compared."""
    from acmix_deploy.operators.local_attention.oracle import local_attention
    from acmix_deploy.operators.outlook_attention.oracle import outlook_attention

    for operator, oracle in ((LOCAL_ATTENTION, local_attention), (OUTLOOK_ATTENTION, outlook_attention)):
        for entry, stride in itertools.product(entries(library, operator), (1, 2)):
            launch = Launch.of(
                library, operator, entry, head_dim=entry["head_dim"], height=10, width=14, kernel_size=5, stride=stride
            )
            attributes = {n: getattr(launch.problem, n) for n in ("num_heads", "kernel_size", "stride", "scale")}
            expected = oracle(launch.first.tensor.cpu(), launch.second.tensor.cpu(), **attributes)
            launch.compare(launch.run().cpu(), expected)
            reference = library.reference(*launch.arguments()).cpu()
            assert (reference - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize(("batch", "side"), [(1800, 80), (1, 3400)], ids=["many images", "one large image"])
def test_more_than_int32_elements(library, batch, side):
    if torch.cuda.mem_get_info()[0] < 64 << 30:
        pytest.skip("less than 64 GiB of free GPU memory")
    for entry in entries(library, LOCAL_ATTENTION):
        if entry["head_dim"] == 16:
            launch = Launch.of(
                library,
                LOCAL_ATTENTION,
                entry,
                batch=batch,
                num_heads=4,
                head_dim=16,
                height=side,
                width=side,
                kernel_size=3,
            )
            assert launch.first.tensor.numel() > 2**31
            launch.check()


def test_graph_capture(library):
    """A captured launch computes again from what its inputs hold at the replay."""
    for operator in OPERATORS:
        for entry in entries(library, operator):
            launch = Launch.of(library, operator, entry, head_dim=entry["head_dim"], height=20, width=24)
            launch.run()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launch.run()
            launch.randomise()
            graph.replay()
            replayed = launch.y.tensor.clone()
            assert torch.equal(replayed, launch.run()), str(launch)


def test_two_streams(library):
    """Launches that overlap compute the same, bit for bit, as launches one after another."""
    by_stream = [
        [
            Launch.of(library, op, e, head_dim=e["head_dim"], height=40, width=40, kernel_size=5)
            for e in entries(library, op)
        ]
        for op in OPERATORS
    ]
    expected = [[launch.run().clone() for launch in launches] for launches in by_stream]
    for _ in range(20):
        for launch in itertools.chain(*by_stream):
            launch.y.tensor.fill_(float("nan"))
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in by_stream]
        for pair in itertools.zip_longest(*by_stream):
            for stream, launch in zip(streams, pair, strict=True):
                if launch is not None:
                    with torch.cuda.stream(stream):
                        launch.run()
        torch.cuda.synchronize()
        for launches, values in zip(by_stream, expected, strict=True):
            for launch, value in zip(launches, values, strict=True):
                assert torch.equal(launch.y.tensor, value), str(launch)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool):
    cuda = find_cuda()
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=cuda.nvcc.parent)
    if sanitizer is None:
        pytest.skip(f"no compute-sanitizer on the PATH or in {cuda.nvcc.parent}")
    program = device.build("sanitize", [*kernels.SOURCES, device.PLUGINS / "tests" / "gpu" / "sanitize.cu"])
    output = kernels.run([sanitizer, f"--tool={tool}", "--error-exitcode=1", program])
    assert re.search(r"SUMMARY: 0 (errors|hazards)", output), output
