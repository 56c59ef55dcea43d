"""Files appear whole or not at all, and their sidecars say where they came from."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from acmix_deploy.artifacts import (
    Artifact,
    mark_exported,
    outdated,
    read_artifact,
    remove_exported,
    replacing,
    sidecar,
    versions,
    write_artifact,
)
from acmix_deploy.errors import UserError


def test_a_finished_block_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "model.onnx"
    for text in ("first", "second"):
        with replacing(target) as temporary:
            temporary.write_text(text)
            assert temporary.parent == target.parent
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path, fault: type[BaseException]) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")

    def interrupted() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half of it")
            raise fault

    with pytest.raises(fault):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_unwritable_place_is_refused_before_the_block_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target, reason in ((tmp_path, "is a folder"), (tmp_path / "file" / "model.onnx", "file")):
        with pytest.raises(UserError, match=reason), replacing(target):
            pytest.fail("the block must not run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"), replacing(tmp_path / "model.onnx"):
        pytest.fail("the block must not run")


def test_a_full_disk_is_a_user_error_and_other_faults_are_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left"), replacing(tmp_path / "model.onnx"):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "model.onnx"):
        (tmp_path / "absent").read_text()


def test_a_sidecar_survives_being_read_and_moved(tmp_path: Path) -> None:
    source, made = tmp_path / "model.pt", tmp_path / "model.onnx"
    source.write_bytes(b"weights")
    made.write_bytes(b"graph")
    written = write_artifact(made, "plain", parents=[source], settings={"opset": 18, "dynamic": ["batch"]})
    assert read_artifact(made) == written
    assert written.sha256 == hashlib.sha256(b"graph").hexdigest()
    assert [(parent.name, parent.sha256) for parent in written.parents] == [
        ("model.pt", hashlib.sha256(b"weights").hexdigest())
    ]
    document = json.loads(sidecar(made).read_text())
    assert document["schema"] == 1
    assert document["path"] == "model.onnx"
    assert document["versions"]["python"] == versions()["python"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in (made, sidecar(made)):
        path.rename(moved / path.name)
    assert read_artifact(moved / "model.onnx").path == moved / "model.onnx"


def test_a_changed_missing_or_foreign_file_is_refused(tmp_path: Path) -> None:
    made = tmp_path / "model.onnx"
    with pytest.raises(UserError, match="cannot read"):
        write_artifact(made, "plain")
    made.write_bytes(b"graph")
    with pytest.raises(UserError, match="no sidecar"):
        read_artifact(made)
    write_artifact(made, "plain")
    made.write_bytes(b"other graph")
    with pytest.raises(UserError, match="has changed"):
        read_artifact(made)
    for text in ("", "[]", '{"schema": 2}'):
        sidecar(made).write_text(text)
        with pytest.raises(UserError, match="not the sidecar"):
            read_artifact(made)


def test_versions_name_what_took_part() -> None:
    assert {"python", "onnx", "onnxruntime"} <= versions().keys()
    assert "schema" in Artifact.model_json_schema(by_alias=True)["properties"]


def test_only_what_an_export_of_that_model_wrote_is_removed(tmp_path: Path) -> None:
    checkpoint, other = tmp_path / "model.pt", tmp_path / "model2.pt"
    for path in (checkpoint, other):
        path.write_bytes(b"weights")
    origins = {path.stem: write_artifact(path, "checkpoint", parents=[path]).parents[0] for path in (checkpoint, other)}
    for path in (checkpoint, other):
        sidecar(path).unlink()

    def made(name: str, stem: str | None, *parents: str) -> Artifact:
        (tmp_path / name).write_text(name)
        artifact = write_artifact(tmp_path / name, "any", parents=[tmp_path / parent for parent in parents])
        return mark_exported(artifact, origins[stem]) if stem else artifact

    exported = {made(name, "model", "model.pt").path.name for name in ("model.onnx", "model.fp16.engine")}
    made("model.engine", None, "model.fp16.engine")
    made("again.engine", None, "model.engine")
    made("model2.onnx", "model2", "model2.pt")
    made("model.int8.onnx", "model").path.write_text("changed")
    for name in ("model.onnx", "model.onnx.json"):
        (tmp_path / name.replace("model", "copy")).write_bytes((tmp_path / name).read_bytes())
    (tmp_path / "model.fp16.onnx").write_text("without a sidecar")
    (tmp_path / "data").write_text("")
    (tmp_path / "data.json").write_text('{"schema": 1}')
    (tmp_path / "report.json").write_text("{")
    (tmp_path / "folder.json").mkdir()
    before = {path.name for path in tmp_path.iterdir()}

    assert {*remove_exported(tmp_path, "model")} == exported
    assert {path.name for path in tmp_path.iterdir()} == before - exported - {f"{name}.json" for name in exported}
    assert remove_exported(tmp_path, "model") == []
    assert remove_exported(tmp_path / "nowhere", "model") == []


@pytest.mark.parametrize(
    ("now", "said"),
    [("old", []), ("new", ["b.engine is not of this run: it was made from a former a.onnx"]), (None, ["b.engine"])],
)
def test_what_was_made_from_a_former_file_is_named(tmp_path: Path, now: str | None, said: list[str]) -> None:
    a, b = tmp_path / "a.onnx", tmp_path / "b.engine"
    a.write_text("old")
    b.write_text("engine")
    write_artifact(b, "engine", parents=[a])
    if now:
        a.write_text(now)
        found = outdated(tmp_path, [], [write_artifact(a, "plain")])
    else:
        a.unlink()
        found = outdated(tmp_path, ["a.onnx"], [])
    assert len(found) == len(said)
    assert all(sentence.startswith(words) for sentence, words in zip(found, said, strict=True))
    assert outdated(tmp_path, [], []) == []


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(UserError) as failure, replacing(tmp_path / "model.onnx") as temporary:
        raise UserError(f"ONNX Runtime refuses {temporary}: Load model from {temporary} failed")
    path = tmp_path / "model.onnx"
    assert failure.value.message == f"ONNX Runtime refuses {path}: Load model from {path} failed"
