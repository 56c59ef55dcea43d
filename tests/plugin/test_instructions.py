"""The kernels execute no more instructions than was written down, and the emulator counts those that it knows alike."""

from __future__ import annotations

import os
from dataclasses import fields, replace

import pytest

from acmix_deploy.errors import CheckFailed, MissingComponent
from acmix_deploy.plugin.toolchain import find_cuda
from scripts import instructions
from scripts.instructions import HEADINGS, KERNELS, Code, Row, Source, parse, read_table
from tests.plugin import kernels

ARCHITECTURES = instructions.ARCHITECTURES if os.environ.get("ACMIX_ALL_ARCHITECTURES") else (87,)
SLACK = 1.02
"""How many times what the table says a kernel may execute: what another version of a compiler's release may cost."""

MOST = {"64 ch, 80x80, stride 1": 760, "128 ch, 40x40, stride 1": 1000, "256 ch, 20x20, stride 1": 1500}
"""What the kernel on tensor cores may execute on sm_87 in NHWC, whatever the table says."""

KNOWN = {
    "HMMA": ("mma.m16n8k16", "mma.m16n8k8"),
    "LDSM": ("ldmatrix", "ldmatrix.trans"),
    "LDGSTS": ("cp.async",),
    "MUFU.EX2": ("ex2",),
    "SHFL": ("__shfl_sync", "__shfl_xor_sync"),
}
"""Names in the emulator of what is one instruction of the machine."""


@pytest.fixture(scope="module")
def cuda():
    if missing := kernels.missing_compiler():
        pytest.skip(missing)
    try:
        found = find_cuda()
        instructions.find_tool("nvdisasm", found.nvcc.resolve().parent)
    except MissingComponent as missing:
        pytest.skip(missing.message)
    return found


@pytest.fixture(scope="module")
def counted(cuda):
    """Architecture, kernel, what its first warp executes, blocks and warps, and what the emulator counted."""
    library = kernels.Kernels(kernels.library())
    found = []
    for architecture in ARCHITECTURES:
        code = instructions.compile_kernels(cuda, architecture, KERNELS)
        trips = instructions.evaluate({kernel: of.bounds() for kernel, of in code.items()})
        for kernel, of in code.items():
            launched = instructions.launch(library, kernel)
            emulated = {opcode: library.executed(*names) for opcode, names in KNOWN.items()}
            found.append((architecture, kernel, of.count(trips[kernel]), launched, emulated))
    return found


@pytest.mark.soak
def test_the_emulator_counts_the_same(counted):
    for architecture, kernel, count, _, emulated in counted:
        found = {opcode: sum(n for name, n in count.items() if name.startswith(opcode)) for opcode in KNOWN}
        # The compiler may see that two shuffles are the same.
        found["SHFL"] += found["SHFL"] == emulated["SHFL"] - 1
        assert found == emulated, f"sm_{architecture} {kernel}, {kernel.shape}"


def regressions(found, table):
    """What rose above the table, in words."""
    known = {(row.architecture, row.kernel, row.shape): row for row in table}
    lines = []
    for row in found:
        old = known.get(key := (row.architecture, row.kernel, row.shape))
        if old is None:
            lines.append(f"{', '.join(key)} is not in the table")
            continue
        lines += [
            f"{', '.join(key)}: {getattr(row, name):g} {name}, {getattr(old, name):g} before"
            for name in (field.name for field in fields(Row)[6:])
            if name not in HEADINGS and getattr(row, name) > getattr(old, name) * SLACK + 1
        ]
    return lines


@pytest.mark.soak
def test_nothing_is_worse_than_the_table(counted, cuda):
    release, table = read_table()
    if release != cuda.version:
        pytest.skip(f"the table is of CUDA {release}, this is {cuda.version}: instructions cannot be compared")
    found = [instructions.row(*of, *launched) for *of, launched, _ in counted]
    assert not regressions(found, table), "if it is meant, run `make instructions`"
    assert {(row.kernel, row.shape) for row in table} == {(str(kernel), str(kernel.shape)) for kernel in KERNELS}


def test_limits():
    rows = {
        row.shape: row
        for row in read_table()[1]
        if row.architecture == "sm_87" and row.kernel == "local_attention_mma float16 NHWC"
    }
    assert not {shape: rows[shape].total for shape, most in MOST.items() if rows[shape].total > most}


def test_regressions_are_seen():
    (row, *_) = read_table()[1]
    assert regressions([row], [row]) == []
    assert regressions([replace(row, total=row.total * SLACK)], [row]) == []
    (line,) = regressions([replace(row, total=2 * row.total)], [row])
    assert line == f"{row.architecture}, {row.kernel}, {row.shape}: {2 * row.total:g} total, {row.total:g} before"
    (line,) = regressions([replace(row, shape="another")], [row])
    assert line.endswith("another is not in the table")


HEADER = """
struct Loader {
    void bring_each() {
        store();
    }
};
template <int kTurns>
__global__ void kernel() {
    // Prologue: begin.
    begin();
    // Rows: what repeats.
    for (int turn = 0; turn < kTurns; ++turn) {
        load();
    }
}
"""
SASS = """
//--------------------- .text.first --------------------------
.text.first:
	//## File "/include/tool.cuh", line 2 inlined at "/include/kernel.cuh", line 10
	//## File "/include/kernel.cuh", line 10
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   MOV R20, 0x40 ;
        /*0030*/                   CALL.REL.NOINC `(.L_x_9) ;
.L_x_1:
	//## File "/include/kernel.cuh", line 12
        /*0040*/                   ISETP.NE.AND P0, PT, R0, RZ, PT ;
        /*0050*/               @P0 BRA P1, `(.L_x_2) ;
	//## File "/include/kernel.cuh", line 4 inlined at "/include/kernel.cuh", line 13
	//## File "/include/kernel.cuh", line 13
        /*0060*/                   ST.E.U16 [R2.64], R0 ;
.L_x_2:
	//## File "/include/kernel.cuh", line 13
        /*0070*/              @!PT LDS RZ, [RZ] ;
        /*0080*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64] ;
	//## File "/include/kernel.cuh", line 12
        /*0090*/                   BRA.U UP0, `(.L_x_1) ;
        /*00a0*/                   HMMA.16816.F32 R4, R4, R6, R4 ;
        /*00b0*/                   HMMA.1688.F32 R4, R4, R6, R4 ;
        /*00c0*/               @P0 EXIT ;
        /*00d0*/                   IMAD.MOV.U32 R1, RZ, RZ, R2 ;
        /*00e0*/                   EXIT ;
.L_x_9:
        /*00f0*/                   MUFU.RCP R0, R0 ;
.L_x_3:
        /*0100*/                   BRA `(.L_x_3);
        /*0110*/                   NOP;
//--------------------- .text.second --------------------------
.text.second:
	//## File "/include/kernel.cuh", line 10
        /*0000*/                   EXIT ;
"""


def code(sass=SASS):
    return Code(parse(sass)["first"], "kernel.cuh", Source(HEADER))


def test_loops_sections_and_units():
    assert list(parse(SASS)) == ["first", "second"]
    assert code().bounds() == code(SASS.replace('.cuh", line 12', '.cuh", line 13')).bounds() == {"kTurns"}
    count = code().count({"kTurns": 3})
    assert {name: count[name] for name in HEADINGS} == {"prologue": 2, "loads": 0, "rows": 3 * 5 + 5, "epilogue": 0}
    units = {"alu": 3, "lsu": 3, "shared": 12, "tensor": 1.5, "fma": 1, "imad": 1, "mufu": 0}
    assert {name: count[name] for name in units} == units
    assert count["ST.E.U16"] == count["CALL.REL.NOINC"] == count["NOP"] == 0


def test_what_is_not_understood_is_named():
    with pytest.raises(CheckFailed, match="FROB in the compiled code is not known"):
        code(SASS.replace("ISETP.NE.AND", "FROB")).count({"kTurns": 3})
    with pytest.raises(CheckFailed, match=r"a loop ends at \(\('kernel.cuh', 10\),\); found none in kernel.cuh"):
        code(SASS.replace('.cuh", line 12', '.cuh", line 10')).bounds()
