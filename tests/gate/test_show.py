"""The verdict as a table, as JUnit XML and as Markdown: all of it is there, and nothing in a name breaks out."""

from __future__ import annotations

import io
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from acmix_deploy.errors import UserError
from acmix_deploy.gate.samples import GateSamples, Parity
from acmix_deploy.gate.verdict import Verdict, judge
from acmix_deploy.report.show_gate import show_verdict, write_junit, write_summary
from tests.gate.parts import pair

WRONG = Parity(metric="relative L2 of boxes", value=0.5, limit=0.01, passed=False)
EXACT = Parity(metric="relative L2 of scores", value=1e-4, limit=0.01, passed=True)
NAME = "a|b*<b>&_[x](y).onnx"


def named(samples: GateSamples, name: str, **changed: object) -> GateSamples:
    return samples.model_copy(update={"candidate": samples.candidate.model_copy(update={"model": name, **changed})})


@pytest.fixture(scope="module")
def verdict() -> Verdict:
    """One that passes, one that fails in both ways, one that says too little, one that is not comparable."""
    return judge(
        [
            named(pair(1.0), "good.onnx", dropped=2),
            named(pair(1.2, parity=(WRONG, EXACT)), NAME),
            named(pair(1.0, rounds=3), "short.onnx"),
            named(pair(1.0), "other.engine", threads=1, fed_with="images"),
        ],
        ["p50", "p90"],
    )


def test_the_table_says_what_was_found_and_why(verdict: Verdict) -> None:
    out = io.StringIO()
    show_verdict(verdict, Console(file=out, width=160, markup=False, highlight=False))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    first = verdict.comparisons[0].judged[0]
    (row,) = (line for line in lines if line.startswith("good.onnx p50"))
    assert f"{first.ratio - 1:+.1%} {first.low - 1:+.1%} to {first.high - 1:+.1%} {first.spread:.1%} 8 pass" in row
    assert any(line.startswith(f"{NAME} p50") and line.endswith("fail") for line in lines)
    assert f"{NAME} relative L2 of boxes 5.0e-01 1.0e-02 fail" in lines
    assert f"{NAME}, relative L2 of boxes: 5.0e-01 found, at most 1.0e-02 is accepted" in lines
    assert "short.onnx, p50: old.onnx has 3 rounds that pair; at least 5 are needed" in lines
    not_comparable = "other.engine cannot be compared with old.onnx: threads: 4 against 1; inputs: noise against images"
    assert not_comparable in lines
    assert "Note: 2 rounds of good.onnx throttled and do not count" in lines
    assert lines[-1] == "Latency gate: fail (+3% is tolerated)"


def test_junit_counts_what_its_cases_say(verdict: Verdict, tmp_path: Path) -> None:
    write_junit(verdict, tmp_path / "gate.xml")
    suite = ElementTree.parse(tmp_path / "gate.xml").getroot()
    cases = {(case.get("classname"), case.get("name")): case for case in suite.iter("testcase")}
    assert suite.tag == "testsuite"
    assert {name: suite.get(name) for name in ("tests", "failures", "skipped", "errors")} == {
        "tests": "9",
        "failures": "3",
        "skipped": "3",
        "errors": "0",
    }
    assert len(cases) == 9
    assert len(cases["good.onnx", "p50"]) == 0
    assert "at least" in cases[NAME, "p50"].find("failure").get("message")
    assert cases[NAME, WRONG.metric].find("failure") is not None
    assert len(cases[NAME, EXACT.metric]) == 0
    assert "3 rounds that pair" in cases["short.onnx", "p90"].find("skipped").get("message")
    assert "threads: 4" in cases["other.engine", "comparable"].find("skipped").get("message")


def test_the_summary_is_appended_and_nothing_in_it_is_taken_for_markup(verdict: Verdict, tmp_path: Path) -> None:
    file = tmp_path / "summary.md"
    file.write_text("before\n", encoding="utf-8")
    write_summary(verdict, file)
    write_summary(verdict, file)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.count("### Latency gate: fail") == 2
    tables = [line for line in text.splitlines() if line.startswith("|")]
    unescaped = [line.replace("\\|", "") for line in tables]
    assert {line.count("|") for line in unescaped} == {10, 6}
    assert "a\\|b\\*\\<b\\>\\&\\_\\[x\\](y).onnx" in text
    assert "<b>" not in text


def test_junit_fails_what_fails_the_job(verdict: Verdict, tmp_path: Path) -> None:
    write_junit(verdict, tmp_path / "gate.xml", strict=True)
    suite = ElementTree.parse(tmp_path / "gate.xml").getroot()
    assert (suite.get("failures"), suite.get("skipped")) == ("6", "0")
    messages = {case.get("classname"): case[0].get("message") for case in suite.iter("testcase") if len(case)}
    assert messages["short.onnx"].startswith("inconclusive: ")
    assert messages["other.engine"].startswith("not comparable: ")


@pytest.mark.parametrize("write", [write_junit, write_summary])
def test_a_file_that_cannot_be_written_is_told(write: object, verdict: Verdict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write(verdict, tmp_path)  # type: ignore[operator]
