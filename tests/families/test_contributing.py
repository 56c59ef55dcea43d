"""CONTRIBUTING.md says which files a family touches; so it is for those that bring no operator."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from typing import Any

import pytest

from acmix_deploy.families import FAMILIES
from acmix_deploy.families.family import Family
from tests import ROOT

ELSEWHERE = ("docs/*", "README.md", "CHANGELOG.md", "tests/*")
"""Prose and tests."""


def listed(family: Family[Any]) -> set[str]:
    """The files of the section's table."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Adding a family")[2]
    files = re.findall(r"^\| `(\S+)` \|", section.partition("\n## ")[0], re.MULTILINE)
    assert len(files) == 6
    return {file.replace("NAME", family.name) for file in files}


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.operators], ids=lambda one: one.name)
def test_files_of_a_family(family: Family[Any]) -> None:
    """All that are listed are there, and outside its folder no other names it."""
    try:
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("no git, or no clone")
    files = {file for file in tracked.stdout.splitlines() if (ROOT / file).is_file()}
    assert listed(family) <= files
    folder = f"acmix_deploy/families/{family.name}/"
    names = f"{family.name}|{family.name.upper()}|{family.recogniser.block.__name__}"
    naming = {
        file
        for file in files
        if not any(fnmatch(file, pattern) for pattern in (*ELSEWHERE, f"{folder}*"))
        and re.search(names, file + (ROOT / file).read_text(encoding="utf-8", errors="replace"))
    }
    assert naming == {file for file in listed(family) if not file.startswith(folder)}
