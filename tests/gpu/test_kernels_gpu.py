"""The kernels on a GPU, against the PyTorch oracles in float64."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.axes import shapes
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.spec import Operator
from acmix_deploy.plugin.toolchain import find_cuda
from tests.gpu import device
from tests.gpu.device import DeviceKernels, Placed
from tests.plugin import kernels

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
    fields: dict[str, int | float]
    inputs: list[Placed]
    y: Placed

    @staticmethod
    def of(library: DeviceKernels, operator: Operator, entry: dict[str, Any], offset: int = 0, **fields: int) -> Launch:
        """Random inputs; the rest of ``fields``: 2 images, 3 heads, the logits divided by sqrt(head_dim)."""
        sizes = {"batch": 2, "num_heads": 3, "kernel_size": 7, "stride": 1} | fields
        *inputs, y = (Placed.empty(shape, entry["dtype"], entry["layout"], offset) for shape in shapes(operator, sizes))
        launch = Launch(library, operator, entry, {**sizes, "scale": sizes["head_dim"] ** -0.5}, inputs, y)
        launch.randomise()
        return launch

    def randomise(self) -> None:
        """New inputs, and y all NaN again."""
        for placed in self.inputs:
            placed.tensor.normal_()
        self.y.tensor.fill_(float("nan"))

    def run(self, position: bool = True) -> Any:
        """y, launched on the current stream."""
        inputs = [placed.tensor for placed in self.inputs]
        problem = device.problem_for(self.operator, self.entry, self.fields)
        given = inputs if position else [inputs[0], None]
        self.library.launch(self.operator, problem, given, self.y.tensor, self.entry["kernel"])
        return self.y.tensor

    def expected(self, position: bool = True) -> Any:
        """y of the oracle."""
        first, second = (placed.tensor for placed in self.inputs)
        attributes = {name: self.fields[name] for name in ("num_heads", "kernel_size", "stride", "scale")}
        return device.oracle(self.operator, [first, second if position else torch.zeros_like(second)], attributes)

    def check(self, position: bool = True) -> None:
        """Fail unless the kernel agrees with the oracle and wrote y alone, all of it."""
        self.compare(self.run(position), self.expected(position))
        assert self.y.guards_hold(), f"memory around y was written: {self}"

    def compare(self, y: Any, expected: Any) -> None:
        error = ((y.double() - expected).norm() / expected.norm()).item()
        assert error <= device.limit(self.operator, self.entry["dtype"]), f"relative L2 {error:.1e}: {self}"

    def __str__(self) -> str:
        fields = " ".join(f"{name}={value}" for name, value in self.fields.items())
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


@pytest.mark.parametrize(("batch", "heads", "side"), [(1800, 4, 80), (1, 700, 256)], ids=["many images", "many heads"])
def test_more_than_int32_elements(library, batch, heads, side):
    if torch.cuda.mem_get_info()[0] < 64 << 30:
        pytest.skip("less than 64 GiB of free GPU memory")
    sizes = {"batch": batch, "num_heads": heads, "head_dim": 16, "height": side, "width": side, "kernel_size": 3}
    for entry in entries(library, LOCAL_ATTENTION):
        if entry["head_dim"] == 16:
            launch = Launch.of(library, LOCAL_ATTENTION, entry, **sizes)
            qkv, weight = (placed.tensor for placed in launch.inputs)
            assert qkv.numel() > 2**31
            y = launch.run()
            attributes = {"num_heads": 1, "kernel_size": 3, "stride": 1, "scale": launch.fields["scale"]}
            for head in range(heads):  # of all at once the oracle's copies would fill the memory
                own = [slice(16 * (part * heads + head), 16 * (part * heads + head + 1)) for part in range(3)]
                one = torch.cat([qkv[:, channels] for channels in own], 1)
                launch.compare(y[:, own[0]], device.oracle(LOCAL_ATTENTION, [one, weight], attributes))
            assert launch.y.guards_hold(), f"memory around y was written: {launch}"


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
