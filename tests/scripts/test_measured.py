"""What benchmarks wrote down, and the tables and sentences that are made of it."""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
import shlex
import sys

import numpy as np
import pydantic
import pytest

from acmix_deploy.profile import Profile
from scripts import measured
from tests import ROOT

FILES = sorted(path.stem for path in measured.FOLDER.glob("*.json") if path.stem != "terminal")


@pytest.mark.parametrize("name", FILES)
def test_files_tell_how_to_measure_again(name):
    found = measured.read(name)
    assert found.text() == (measured.FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert found.date <= datetime.date.today()
    assert not re.search("[ =]/", found.command), "a path of one machine"
    assert found.machine
    assert found.cells
    assert all(len(row) == len(found.columns) for row in found.rows)
    program, *arguments = shlex.split(found.command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M)
    else:
        assert (program, arguments[0]) == ("python", "-m")
        assert importlib.util.find_spec(arguments[1])


def test_what_is_written_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    rows = [["a", 3, (1.0, 0.25, 2.004), None], ["b", 19051, (10.0, 9.0, 11.5), (1.06, 1.04, 1.17)]]
    columns = {"file": None, "images": 0, "ms": 2, "times": 1}
    measured.write(tmp_path, "here", "Medians", columns, rows, packages=("numpy",), threads=2)
    found = measured.read("here")
    assert found.rows[0] == ["a", 3, (1.0, 0.25, 2.0), None]
    assert found.table().splitlines()[2:] == [
        "| a | 3 | 1.00 [0.25 to 2.00] | |",
        "| b | 19051 | 10.00 [9.00 to 11.50] | 1.1 [1.0 to 1.2] |",
    ]
    assert found.versions["numpy"] == np.__version__
    assert "2 threads" in found.machine
    assert capsys.readouterr().out == f"{found.table()}\n{found.about()}\n\n"
    with pytest.raises(pydantic.ValidationError):
        measured.Measured.model_validate(found.model_dump() | {"note": "of something else"})


@pytest.mark.parametrize("into", [["--into", "/there"], ["--into=/there"]], ids=len)
def test_the_command_does_not_tell_where_the_file_went(into, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "orig_argv", ["/venv/bin/python", "-m", "scripts.bench", *into, "--rounds", "2"])
    measured.write(tmp_path, "here", "Medians", {"n": 0}, [[1.6]])
    assert '"python -m scripts.bench --rounds 2"' in (tmp_path / "here.json").read_text()
    assert '"rows": [\n    [2]\n  ]' in (tmp_path / "here.json").read_text()


def test_spreads():
    """Ratios are of medians, and their range is over the turns, which are as long as each other."""
    fast = Profile(file="fast", provider="p", rounds=2, samples_ms=(1, 1, 3, 2, 2, 2))
    slow = Profile(file="slow", provider="p", rounds=2, samples_ms=(4, 4, 4, 4, 6, 6))
    assert measured.times_faster(slow, fast) == (4 / 2, 6 / 2, 4 / 1)
    assert measured.percentiles(slow) == (4, 4, 6)
    assert measured.spread([3, 1, 2]) == (2, 1, 3)


def test_the_front_page_tells_what_was_measured():
    """Every number of the sentences about the gain is one of the benchmark's, in its place."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    said = page.partition("<!-- gain:begin -->")[2].partition("<!-- gain:end -->")[0]
    exported, fused, int8 = json.loads((measured.FOLDER / "detector.json").read_text())["rows"]
    file, megabytes, ms, faster, boxes = range(5)
    expected = [640, 640, exported[ms][0], fused[ms][0], fused[faster][0], fused[boxes], exported[boxes]]
    assert [float(number) for number in re.findall(r"(?<!v)[\d.]*\d", said)] == expected
    assert ("the same" in said) == (fused[boxes] == exported[boxes])
    assert "No GPU was at hand" in said
    assert [row[file] for row in (exported, fused, int8)] == ["as PyTorch exports it", "fused", "fused, INT8 for a CPU"]
    assert int8[megabytes] < exported[megabytes] < fused[megabytes]


def test_columns_of_numbers_are_aligned_to_the_right() -> None:
    rows = ("1", "3.5 [1.0 to 6.0]", "-1e-05", "", "1", ""), ("1,200", "", "0.5%", "", "2x", "")
    assert measured.table("abcdef", *rows).splitlines()[1] == "| ---: | ---: | ---: | --- | --- | --- |"
    assert measured.table("ab").splitlines()[1] == "| --- | --- |"
