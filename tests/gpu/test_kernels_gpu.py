"""The kernels on a GPU, against the PyTorch oracles in float64.

With ACMIX_GPU_ROWS=FILE every comparison adds a line of JSON to FILE. On an emulated device, which is slow, the first
window and the first head_dims stand for all.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.axes import Axis, shapes
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.spec import Operator
from tests.gpu import device
from tests.gpu.device import DeviceKernels, Placed
from tests.operators.parts import attributes_of, example_of
from tests.plugin.kernels import windows_of

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(bool(device.missing()), reason=device.missing())

FEW = slice(1 if device.EMULATED else None)
SANITIZERS = ("memcheck", "racecheck", "synccheck")
on_a_gpu = pytest.mark.skipif(device.EMULATED, reason="no GPU: the device is emulated")
WAYS = [
    (operator, {"kernel": kernel.name, "dtype": dtype, "layout": layout})
    for operator in OPERATORS
    for kernel in operator.kernels
    for dtype, layout in kernel.formats
]


def case(operator: Operator, way: Mapping[str, str], window: Mapping[str, int]) -> Any:
    return pytest.param(operator, way, window, id="-".join(map(str, (operator.name, *way.values(), *window.values()))))


WINDOWS = [case(operator, way, window) for operator, way in WAYS for window in windows_of(operator)[FEW]]
ON_TENSOR_CORES = [operator for operator in OPERATORS if any(kernel.name == "mma" for kernel in operator.kernels)]


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
        """Random inputs; the rest of ``fields``: 2 images, 3 heads or groups, K 7, the logits over sqrt(head_dim)."""
        usual = {"batch": 2, "num_heads": 3, "groups": 3, "kernel_size": 7, "border": 3} | fields
        sizes = example_of(operator, **usual)
        *inputs, y = (Placed.empty(shape, entry["dtype"], entry["layout"], offset) for shape in shapes(operator, sizes))
        launch = Launch(library, operator, entry, sizes | attributes_of(operator, sizes), inputs, y)
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
        given: list[Any] = inputs if position else [inputs[0], None]
        self.library.launch(self.operator, problem, given, self.y.tensor, self.entry["kernel"])
        return self.y.tensor

    def expected(self, position: bool = True) -> Any:
        """y of the oracle."""
        inputs = [placed.tensor for placed in self.inputs]
        given = inputs if position else [inputs[0], torch.zeros_like(inputs[1])]
        return device.oracle(self.operator, given, attributes_of(self.operator, self.fields, **self.fields))

    def check(self, position: bool = True) -> None:
        """Fail unless the kernel agrees with the oracle and wrote y alone, all of it."""
        self.compare(self.run(position), self.expected(position))
        assert self.y.guards_hold(), f"memory around y was written: {self}"

    def compare(self, y: Any, expected: Any) -> None:
        error = ((y.double() - expected).norm() / expected.norm()).item()
        limit = device.limit(self.operator, self.entry["dtype"])
        if path := os.environ.get("ACMIX_GPU_ROWS"):
            with Path(path).open("a", encoding="utf-8") as file:
                print(json.dumps({**self.entry, **self.fields, "error": error, "limit": limit}), file=file)
        assert error <= limit, f"relative L2 {error:.1e}: {self}"

    def __str__(self) -> str:
        fields = " ".join(f"{name}={value}" for name, value in self.fields.items())
        return f"{self.operator.op_type} {self.entry} {fields}"


def entries(library: DeviceKernels, operator: Operator) -> list[dict[str, Any]]:
    rows = [entry for entry in library.entries if entry["operator"] == operator.op_type]
    return [entry for entry in rows if entry["head_dim"] in operator.head_dims[FEW]]


def rows(
    library: DeviceKernels, operator: Operator, way: Mapping[str, str] = MappingProxyType({})
) -> Iterator[tuple[dict[str, Any], int]]:
    """Each row of the dispatch table, of one way or all, with each head_dim that it serves: itself and those padded."""
    all_of_it = [entry for entry in entries(library, operator) if way.items() <= entry.items()]
    for entry, head_dim in itertools.product(all_of_it, operator.kernel_limits.get("head_dim", (0,))):
        alike = [e["head_dim"] for e in all_of_it if all(e[k] == entry[k] for k in ("dtype", "layout", "kernel"))]
        if entry["head_dim"] == min((size for size in alike if size >= head_dim), default=None):
            yield entry, head_dim


def check_rows(library: DeviceKernels, operator: Operator, way: Mapping[str, str], window: Mapping[str, int]) -> None:
    """Odd sizes, the smallest map there is, which is all border, and one whose rows are whole words of memory.

    Where there is a dilation, the pixels of the smallest map are apart.
    """
    stride, wrong = window.get("stride", 1), []

    def least(dilation: int) -> int:
        of = {letter: {"dilation": dilation, **window}.get(name, 1) for letter, name in operator.axes.items()}
        return -(-Axis.parse(operator.least("H", of)).length(of) // stride)

    maps = ((max(9, least(1)), 17, 1), (least(2), least(2), 2), (max(11, least(1)), 8 * -(-least(1) // 8), 1))
    for entry, head_dim in rows(library, operator, way):
        for height, width, dilation in maps:
            sizes = {"head_dim": head_dim, "height": height * stride, "width": width * stride, "dilation": dilation}
            try:
                Launch.of(library, operator, entry, **sizes, **window).check()
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, f"{len(wrong)} launches: " + "\n".join(wrong)


@pytest.mark.parametrize(("operator", "way", "window"), WINDOWS)
def test_every_row_at_every_window(library, operator, way, window):
    check_rows(library, operator, way, window)


@pytest.mark.parametrize(
    ("operator", "way", "window"),
    [
        case(operator, way, window)
        for operator, way in WAYS
        for window in windows_of(operator)
        if operator in ON_TENSOR_CORES and window["kernel_size"] == 7
    ],
)
def test_every_row_as_on_sm_75(turing_library, operator, way, window):
    """Before sm_80 tensor cores multiply in two steps of half the depth, and nothing is copied in the background."""
    check_rows(turing_library, operator, way, window)


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


@pytest.mark.parametrize("side", [20, 40, 80][FEW])
def test_sizes_of_a_detector(library, side):
    for entry in entries(library, LOCAL_ATTENTION):
        sizes = {"head_dim": entry["head_dim"], "height": side, "width": side}
        Launch.of(library, LOCAL_ATTENTION, entry, num_heads=4, **sizes).check()


@on_a_gpu
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
            sizes = {"head_dim": entry["head_dim"], "height": 12, "width": 16, "kernel_size": 3}
            launch = Launch.of(library, operator, entry, **sizes)
            launch.run()
            device.cuda().synchronize()
            replay = device.capture(launch.run)
            launch.randomise()
            replay()
            replayed = launch.y.tensor.clone()
            assert torch.equal(replayed, launch.run()), str(launch)


@on_a_gpu
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


@pytest.fixture(scope="module")
def sanitizers():
    """One process for each tool of compute-sanitizer, all at once."""
    sanitizer = device.cuda_tool("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("no compute-sanitizer on the PATH or beside nvcc")
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    program = device.sanitized_program()
    running = {
        tool: subprocess.Popen([sanitizer, f"--tool={tool}", "--error-exitcode=1", program], **options)
        for tool in SANITIZERS
    }
    yield running
    for process in running.values():
        process.kill()


@on_a_gpu
@pytest.mark.parametrize("tool", SANITIZERS)
def test_sanitizer(sanitizers, tool):
    output, _ = sanitizers[tool].communicate()
    assert sanitizers[tool].returncode == 0, output
    assert re.search(r"SUMMARY: 0 (errors|hazards)", output), output
