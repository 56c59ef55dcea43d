"""A document says what it is, and `inspect` knows every one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from acmix_deploy import cli
from acmix_deploy.document import Document, Written, written
from acmix_deploy.errors import UserError
from acmix_deploy.gate.read import read_samples
from acmix_deploy.report.documents import VerifyDocument
from acmix_deploy.report.folder import read_folder
from acmix_deploy.report.inspection import inspect
from acmix_deploy.verify import read_verification
from scripts.docs import DOCUMENTS
from tests import ROOT
from tests.gate.parts import alone, pair, text
from tests.report.test_html import FILE, comparison, exported


def test_every_document_has_a_name_and_a_schema() -> None:
    assert sorted(map(written, DOCUMENTS)) == sorted(get_args(Written))
    for document in DOCUMENTS:
        schema = ROOT / "docs" / "schemas" / f"{written(document).replace(' ', '-')}.json"
        field = json.loads(schema.read_text(encoding="utf-8"))["properties"]["document"]
        assert field["const"] == written(document)
        assert issubclass(document, Document)


@pytest.mark.parametrize("name", sorted({*get_args(Written)} - {"export", "verify", "detect"}))
def test_inspect_tells_which_document_it_is(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"document": name, "schema": 1, "kind": "engine", "sha256": "0"}))
    assert cli.main(["inspect", str(tmp_path / "a.json")]) == 0
    assert re.search(rf"^document +{name}\b", capsys.readouterr().out, re.M)


def test_inspect_tells_what_documents_are_about(tmp_path: Path) -> None:
    def told(content: str) -> dict[str, str] | None:
        (tmp_path / "a.json").write_text(content, encoding="utf-8")
        return inspect(tmp_path / "a.json").told

    found = told(exported(tmp_path, "model.pt", []).model_dump_json(by_alias=True))
    assert found
    assert {"document": "export", "plain": str(tmp_path / f"plain {FILE}")}.items() <= found.items()
    document = VerifyDocument(reference="r", comparisons=(comparison("c", 1, 0.1),))
    about = {"document": "verify", "reference": "r", "compared with it": "c", "outcome": "failed"}
    assert told(document.model_dump_json(by_alias=True)) == about
    assert told('{"document": "detect"}\n' * 3) == {"document": "detect", "images": "3"}


def test_inspect_reads_what_the_gate_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, verdict = tmp_path / "gate.json", tmp_path / "verdict.json"
    samples.write_text(text(pair()))
    assert cli.main(["gate", "check", str(samples), "--json"]) in (0, 1, 4)
    verdict.write_text(capsys.readouterr().out)
    for path, name in ((samples, "gate run"), (verdict, "gate check")):
        assert cli.main(["inspect", str(path), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["document"], printed["kind"], printed["told"]) == ("inspect", "document", {"document": name})
        assert inspect(path).told == {"document": name}


def test_another_document_is_refused_by_its_name(tmp_path: Path) -> None:
    """Even where it has all the fields that are looked for."""
    other = json.loads(text(alone())) | {"document": "serve", "profiles": [], "reference": "r", "comparisons": []}
    for content, said in ((other, "`serve`"), ({**other, "document": "essay"}, "no document")):
        path = tmp_path / "a.json"
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=f"a.json is .*{said}"):
            read_folder(tmp_path)
        with pytest.raises(UserError, match=r"what `gate run` or `profile` writes is needed"):
            read_samples(path)
        with pytest.raises(UserError, match=r"what `verify` or `export` writes is needed"):
            read_verification(path)
    with pytest.raises(UserError, match="neither the sidecar of a file nor what a verb writes"):
        inspect(path)
