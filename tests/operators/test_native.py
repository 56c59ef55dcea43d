"""What native code reads is what the definitions say, and C++ accepts it, also of an operator that is not there."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from acmix_deploy.operators.native import native_sources
from acmix_deploy.operators.spec import Attribute, Kernel, Operator, Tensor
from tests import ROOT
from tests.plugin.kernels import EMULATOR
from tests.plugin.parts import newest_headers

PLUGINS = ROOT / "plugins"

INVENTED = Operator(
    domain="acmix",
    op_type="AcmixGroupedShift",
    version=2,
    formula="none",
    axes={"B": "batch", "G": "groups", "d": "head_dim", "L": "length"},
    inputs=(
        Tensor("x", ("B", "2*G*d", "L"), ""),
        Tensor("shift", ("G", "2"), ""),
        Tensor("mask", ("B", "ceil(L/4)"), ""),
    ),
    outputs=(Tensor("y", ("B", "G*d", "L/2"), ""),),
    attributes=(
        Attribute("groups", "int", 3, "", minimum=1),
        Attribute("causal", "int", 0, ""),
        Attribute("epsilon", "float", 0.5, ""),
    ),
    tolerances={},
    kernels=(Kernel("simt", (("float32", "NCHW"),)),),
    kernel_limits={"head_dim": (16, 24)},
    kernel_maxima={"G*L": 1000},
)
"""One with other axes, three inputs and an attribute that is no size."""


def run(source: Path, *flags: str | Path) -> str:
    """Compile a program for the CPU and run it: what it printed."""
    compiler = shutil.which("g++") or pytest.skip("g++ is not installed")
    include = ["-I", EMULATOR, "-I", source.parent, "-I", PLUGINS / "include", "-I", PLUGINS / "src"]
    program = source.with_suffix("")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, "-std=c++17", *warnings, *flags, *include, source, "-o", program], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


def write(folder: Path, operators: Sequence[Operator]) -> None:
    for name, text in native_sources(operators).items():
        path = folder / name.removeprefix("include/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_sources_are_current():
    sources = native_sources()
    for name, text in sources.items():
        assert (PLUGINS / name).read_text(encoding="utf-8") == text, "run `make docs`"
    kernels = {f"src/{path.name}" for path in (PLUGINS / "src").glob("*.cu")}
    assert kernels == {name for name in sources if name.endswith(".cu")}


def test_sources_follow_the_definitions():
    (num_heads, *others) = LOCAL_ATTENTION.attributes
    attributes = (dataclasses.replace(num_heads, default=4, minimum=2), *others)
    changed = dataclasses.replace(LOCAL_ATTENTION, attributes=attributes, kernel_limits={"head_dim": (16, 64)})
    sources = native_sources((changed,))
    header = sources["include/acmix/operators.h"]
    assert '{"num_heads", &P::num_heads, 4, 2}' in header
    assert "kHeadDims[] = {16, 64};" in header
    assert [*sources] == [
        *("include/acmix/operators.h", "src/operators.cpp"),
        *("src/local_attention_mma.cu", "src/local_attention_simt.cu"),
    ]


def test_cpp_reads_the_same_values(tmp_path):
    (tmp_path / "print.cpp").write_text("""
        #include <iostream>
        #include "acmix/operators.h"

        template <class... Problems>
        void print(acmix::List<Problems...>) {
            ((std::cout << acmix::Definition<Problems>::kOpType << '\\n',
              acmix::for_each_attribute<Problems>([](const auto& attribute) {
                  std::cout << attribute.name << ' ' << attribute.fallback << ' ' << attribute.minimum << '\\n';
              })), ...);
        }

        int main() { print(acmix::Operators{}); }
    """)
    expected = []
    for operator in OPERATORS:
        numbers = [attribute for attribute in operator.attributes if attribute.kind != "string"]
        expected.append(operator.op_type)
        minima = [a.minimum if a.minimum is not None else f"{-np.finfo(np.float32).max:g}" for a in numbers]
        expected += [f"{a.name} {a.default:g} {least}" for a, least in zip(numbers, minima, strict=True)]
    assert run(tmp_path / "print.cpp").splitlines() == expected


LAUNCHED = """
    #include <iostream>
    #include "operators.cpp"

    namespace acmix {
    const char* name(Dtype) { return "dtype"; }
    const char* name(Layout) { return "layout"; }
    const char* name(Kernel) { return "kernel"; }
    template <Dtype, Layout, int>
    cudaError_t grouped_shift_simt(const GroupedShift&, const void* const*, void*, cudaStream_t) { return cudaSuccess; }
    }  // namespace acmix

    int main() {
        acmix::GroupedShift problem{};
        const auto say = [&] {
            const auto found = acmix::find(problem);
            std::cout << (found.entry ? std::to_string(found.entry->head_dim) : found.reason) << std::endl;
        };
        problem.groups = 2;
        say();
        problem.head_dim = 24;
        say();
        problem.head_dim = 8;
        say();
        problem.head_dim = 16;
        problem.length = 7;
        say();
        problem.length = 500;
        say();
        problem.length = 502;
        say();
        const char* reason = acmix_grouped_shift(&problem, -1, nullptr, nullptr, nullptr, nullptr, nullptr);
        std::cout << (reason ? reason : "launched") << std::endl;
        problem.epsilon = 1.0f / 0.0f;
        problem.batch = 1;
        std::cout << acmix_grouped_shift(&problem, -1, nullptr, nullptr, nullptr, nullptr, nullptr) << std::endl;
    }
"""


def test_another_operator_is_launched(tmp_path):
    write(tmp_path, [INVENTED])
    (tmp_path / "launch.cpp").write_text(LAUNCHED)
    shutil.copy(tmp_path / "src/operators.cpp", tmp_path)
    printed = run(tmp_path / "launch.cpp", EMULATOR / "emulator.cpp", "-Wno-unknown-pragmas", "-Wno-div-by-zero")
    assert printed.splitlines() == [
        "16",
        "32",
        "unsupported: got head_dim 8, supported 16, 24",
        "unsupported: got length / 2 = 7 / 2, supported whole numbers",
        "16",
        "unsupported: got groups * length 1004, supported at most 1000",
        "launched",
        "unsupported: got epsilon inf, supported finite numbers",
    ]


@pytest.mark.parametrize("major", [8, 11])
def test_another_operator_has_plugins(tmp_path, major):
    write(tmp_path, [*OPERATORS, INVENTED])
    include = ["-isystem", newest_headers(major), "-I", EMULATOR, "-I", tmp_path, "-I", PLUGINS / "include"]
    source = PLUGINS / "tensorrt/registration.cpp"
    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *include, source], check=True)
