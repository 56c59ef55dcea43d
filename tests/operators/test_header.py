"""The header that native code reads says what the definitions say, and C++ accepts it."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess

import pytest

from acmix_deploy.operators import OPERATORS, header
from acmix_deploy.operators.local_attention import LOCAL_ATTENTION
from tests import ROOT

HEADER = ROOT / "plugins/include/acmix/operators.h"


def test_header_is_current():
    assert HEADER.read_text(encoding="utf-8") == header.cpp_header(), "run `make docs`"


def test_header_follows_the_definitions(monkeypatch):
    (num_heads, *others) = LOCAL_ATTENTION.attributes
    attributes = (dataclasses.replace(num_heads, default=4, minimum=2), *others)
    changed = dataclasses.replace(LOCAL_ATTENTION, attributes=attributes, kernel_limits={"head_dim": (16, 64)})
    monkeypatch.setattr(header, "OPERATORS", (changed,))
    text = header.cpp_header()
    assert 'kNumHeads{"num_heads", 4, 2};' in text
    assert "kHeadDims[] = {16, 64};" in text
    assert "outlook" not in text


def test_cpp_reads_the_same_values(tmp_path):
    compiler = shutil.which("g++") or pytest.skip("g++ is not installed")
    program = tmp_path / "print.cpp"
    lines = [
        f'std::cout << acmix::{name}::{expression} << "\\n";'
        for name in ("local_attention", "outlook_attention")
        for expression in (
            "kOpType",
            "kKernelSize.name",
            "kKernelSize.fallback",
            "kKernelSize.minimum",
            "kScale.fallback",
        )
    ]
    program.write_text(f"#include <iostream>\n#include <acmix/operators.h>\nint main() {{ {' '.join(lines)} }}\n")
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{HEADER.parents[1]}"]
    subprocess.run([compiler, *flags, str(program), "-o", str(tmp_path / "print")], check=True)
    printed = subprocess.run([tmp_path / "print"], check=True, capture_output=True, text=True).stdout.split()
    expected = []
    for operator in OPERATORS:
        kernel_size = operator.attribute("kernel_size")
        expected += [operator.op_type, kernel_size.name, kernel_size.default, kernel_size.minimum, 1]
    assert printed == list(map(str, expected))
