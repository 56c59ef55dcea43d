"""Every kernel compiles without spilling, and needs no more registers and shared memory than was written down."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace

import numpy as np
import pytest

from acmix_deploy.errors import CheckFailed, MissingComponent
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.plugin.toolchain import find_cuda
from scripts import resources
from tests import ROOT
from tests.plugin import kernels

BENCHMARKS = ROOT / "docs/benchmarks.md"
ARCHITECTURES = "all" if os.environ.get("ACMIX_ALL_ARCHITECTURES") else "87"
SLACK = 4
"""Registers that a kernel may need beyond the table: what another version of a compiler's release may cost."""

MOST_SHARED = {
    "NHWC": {16: 35328, 32: 36864, 64: 36864, 128: 36864},
    "NCHW": {16: 35328, 32: 35328, 64: 35328, 128: 35328},
}
"""Bytes of shared memory that a block of each mma kernel asks for at most, by layout and head_dim.

Every device gives 48 KiB.
"""


@pytest.fixture(scope="module")
def cuda():
    try:
        return find_cuda()
    except MissingComponent as missing:
        pytest.skip(missing.message)


@pytest.fixture(scope="module")
def measured(cuda):
    try:
        return resources.measure(cuda, ARCHITECTURES)
    except MissingComponent as missing:
        pytest.skip(missing.message)


def regressions(found, table):
    """What differs from the table, in words."""
    known = {(row.architecture, row.kernel): row for row in table}
    present = {(row.architecture, row.kernel) for row in found}
    architectures = {row.architecture for row in found}
    lines = [f"{key} is not in the table" for key in present - set(known)]
    lines += [f"{key} is gone" for key in set(known) - present if key[0] in architectures]
    for row in found:
        old = known.get((row.architecture, row.kernel), row)
        if row.registers > old.registers + SLACK:
            lines.append(f"{row.architecture} {row.kernel}: {row.registers} registers, {old.registers} before")
        if row.shared_bytes > old.shared_bytes:
            lines.append(f"{row.architecture} {row.kernel}: {row.shared_bytes} bytes shared, {old.shared_bytes} before")
    return sorted(lines)


@pytest.mark.soak
def test_no_kernel_spills(measured):
    assert measured
    assert not [row for row in measured if row.spill_bytes or row.stack_bytes]


@pytest.mark.skipif(bool(kernels.missing_compiler()), reason=kernels.missing_compiler())
def test_shared_memory_of_launches():
    """As known for the hungriest window, and as documented for another."""
    library = kernels.Kernels(kernels.library())
    limits = LOCAL_ATTENTION.kernel_limits

    def asked(layout: str, head_dim: int, kernel_size: int, stride: int, rows: int) -> int:
        least = -(-(kernel_size // 2 + 1) // stride)
        qkv = np.zeros((1, 3 * head_dim, max(rows, least) * stride, least * stride), np.float16)
        window = {"kernel_size": kernel_size, "stride": stride}
        way = {"layout": layout, "kernel": "mma", "only_middle": True}
        library.launch(LOCAL_ATTENTION, qkv, None, num_heads=1, scale=1.0, **window, **way)
        return library.shared_bytes()

    sizes = list(itertools.product(limits["kernel_size"], limits["stride"], (2, 4, 6, 8, 10)))  # rows for 1 to 5 warps
    for layout, head_dim in itertools.product(MOST_SHARED, MOST_SHARED["NHWC"]):
        assert max(asked(layout, head_dim, *size) for size in sizes) == MOST_SHARED[layout][head_dim] <= 48 << 10
    table = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d,]+) \|$", BENCHMARKS.read_text(), re.MULTILINE)
    documented = [[int(cell.replace(",", "")) for cell in row] for row in table]
    assert documented == [
        [dim, *(asked(layout, dim, 7, 1, 20) for layout in MOST_SHARED)] for dim in MOST_SHARED["NHWC"]
    ]


@pytest.mark.soak
def test_nothing_is_worse_than_the_table(measured, cuda):
    release, table = resources.read_table()
    if release != cuda.version:
        pytest.skip(f"the table is of CUDA {release}, this is {cuda.version}: registers cannot be compared")
    assert not regressions(measured, table), "if it is meant, run `make resources`"


def test_regressions_are_seen():
    row = resources.Resources("sm_87", "kernel", registers=64, shared_bytes=128, stack_bytes=0, spill_bytes=0)
    assert regressions([row], [row]) == []
    assert regressions([replace(row, registers=64 + SLACK)], [row]) == []
    assert regressions([replace(row, registers=65 + SLACK)], [row]) == ["sm_87 kernel: 69 registers, 64 before"]
    assert regressions([replace(row, shared_bytes=129)], [row]) == ["sm_87 kernel: 129 bytes shared, 128 before"]
    other = replace(row, kernel="other")
    assert regressions([row, other], [row]) == ["('sm_87', 'other') is not in the table"]
    assert regressions([row], [row, other]) == ["('sm_87', 'other') is gone"]
    assert regressions([row], [row, replace(other, architecture="sm_90")]) == []


REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN5acmix4testILi3EEEvNS_1PEPKf' for 'sm_90'
ptxas info    : Function properties for _ZN5acmix4testILi3EEEvNS_1PEPKf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size, 4096 bytes smem, 412 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN5acmix4testILi3EEEvNS_1PEPKf' for 'sm_87'
ptxas info    : Function properties for _ZN5acmix4testILi3EEEvNS_1PEPKf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 412 bytes cmem[0]
"""


def test_the_report_is_read(monkeypatch):
    try:
        old, new = resources.parse(REPORT)
    except MissingComponent as missing:
        pytest.skip(missing.message)
    assert (old.architecture, old.kernel, old.registers, old.shared_bytes) == ("sm_87", "test<3>", 32, 0)
    assert (new.registers, new.shared_bytes, new.stack_bytes, new.spill_bytes) == (168, 4096, 16, 20)
    with pytest.raises(CheckFailed, match="another form"):
        resources.parse(REPORT.replace("Used", "uses"))


def test_the_compiler_spills_where_it_must(cuda, tmp_path, monkeypatch):
    """The report of a kernel that is held to few registers shows a spill: what the tests above look for exists."""
    cells = "; ".join(f"float v{i} = x[{i} * n]" for i in range(96))
    total = " + ".join(f"v{i} * v{(7 * i + 1) % 96}" for i in range(96))
    (tmp_path / "src").mkdir()
    for name in ("CMakeLists.txt", "exports.map"):
        (tmp_path / name).write_text((ROOT / "plugins" / name).read_text())
    (tmp_path / "src/spill.cu").write_text(
        "#include <cuda_runtime.h>\n__global__ void __launch_bounds__(1024) spill(const float* x, float* y, int n) "
        f"{{ {cells}; __syncthreads(); y[0] = {total}; }}\n"
    )
    monkeypatch.setattr(resources, "PLUGINS", tmp_path)
    (row,) = resources.measure(cuda, "87")
    assert row.spill_bytes > 0
