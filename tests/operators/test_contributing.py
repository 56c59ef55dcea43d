"""CONTRIBUTING.md says which files an operator touches; so it is for those that there are."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch

import pytest

from acmix_deploy.operators import OPERATORS
from acmix_deploy.operators.native import native_sources
from acmix_deploy.operators.spec import Operator
from tests import ROOT
from tests.operators.parts import every_operator

GENERATED = {f"plugins/{name}" for name in native_sources()} | {"plugins/resources.csv", "plugins/instructions.csv"}
ELSEWHERE = (
    *("docs/*", "README.md", "CHANGELOG.md", "tests/*", "scripts/*.py"),
    *("acmix_deploy/families/*.py", "acmix_deploy/__init__.py"),
)
"""Prose, tests, the family that uses it and its block's name, and what times and counts the kernels."""


def listed(operator: Operator) -> set[str]:
    """The files of the section's table."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Adding an operator")[2].partition("\n## ")[0]
    files = re.findall(r"^\| `(\S+)` \|", section, re.MULTILINE)
    assert len(files) == 4
    return {
        file.replace("NAME", operator.name).replace("KERNEL", kernel.name)
        for file in files
        for kernel in operator.kernels
    }


def naming(operator: Operator) -> set[str]:
    """The tracked files that name the operator, or are named after it, but for those ELSEWHERE."""
    names = f"{operator.op_type}|{operator.name}|{operator.name.upper()}"
    try:
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no git, or no clone")
    return {
        file
        for file in tracked.stdout.splitlines()
        if not any(fnmatch(file, pattern) for pattern in ELSEWHERE)
        and (ROOT / file).is_file()
        and re.search(names, file + (ROOT / file).read_text(encoding="utf-8", errors="replace"))
    }


@every_operator
def test_files_of_an_operator(operator):
    """All that are listed, and no other but what is generated."""
    assert naming(operator) - GENERATED == listed(operator)


def test_no_kernel_is_left_over():
    """Each source beside the kernels is of one of them, or of all operators."""
    kernels = {f"{operator.name}_{kernel.name}.cuh" for operator in OPERATORS for kernel in operator.kernels}
    found = {path.name for path in (ROOT / "plugins/include/acmix").glob("*.cuh")}
    assert found - kernels == {"ptx.cuh", "tensors.cuh", "tiles.cuh"}
