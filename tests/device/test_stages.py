"""The stages of an export on a device, without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from acmix_deploy import pipeline
from acmix_deploy.device.link import LinkLost, Unavailable
from acmix_deploy.device.stages import RemoteStages
from acmix_deploy.errors import AcmixDeployError, CheckFailed, UserError
from acmix_deploy.targets import NEWEST


@pytest.mark.parametrize("error", [LinkLost("lost"), Unavailable("in use"), CheckFailed("no compiler")])
def test_only_a_plugin_that_cannot_be_made_is_done_without(
    error: AcmixDeployError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is gone or in use ends the export: else the engine would be another one without need."""

    def library() -> Path:
        raise error

    monkeypatch.setattr(onnx, "load", lambda path: None)
    monkeypatch.setattr(pipeline, "takes_plugin", lambda model: True)
    built: list[dict[str, object]] = []

    def build(source: Path, target: Path, **options: object) -> SimpleNamespace:
        built.append(options)
        return SimpleNamespace(artifact=None, found=None)

    plan = SimpleNamespace(plugin=None, device=NEWEST, path=Path, role_for=lambda device, role: role)
    there = SimpleNamespace(library=library, build=build)
    work = SimpleNamespace(plan=plan, there=there, artifacts={}, notes=[])
    exported = SimpleNamespace(shapes_to_build=None)
    if isinstance(error, Unavailable):
        with pytest.raises(Unavailable):
            pipeline._build(work, exported)  # type: ignore[arg-type]
        assert not built
    else:
        pipeline._build(work, exported)  # type: ignore[arg-type]
        assert [options["plugin"] for options in built] == [None]
        assert work.notes == ["the engine does without the plugin, so the attention is slower: no compiler"]


def test_an_engine_that_is_here_keeps_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "model.engine").touch()
    session = SimpleNamespace(need_package=lambda: None, name="bench")
    options = {"plugin": None, "fp16": False, "shapes": None}
    with pytest.raises(UserError, match="the engine on bench would have its manifest"):
        RemoteStages(session, tmp_path).build(tmp_path / "model.onnx", tmp_path / "model.engine", **options)  # type: ignore[arg-type]
