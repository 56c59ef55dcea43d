"""What the documentation shows of devices from Python."""

from __future__ import annotations

from pathlib import Path

import pytest

import acmix_deploy as acmix
from tests.device.conftest import use
from tests.device.loopback import Device
from tests.engine.test_documented import shown

torch = pytest.importorskip("torch")


@pytest.mark.soak  # an environment and an engine: 40 s
def test_a_device_from_python(
    installed: Device, tmp_path: Path, faster_exporter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="no TensorRT-RTX: pip install tensorrt-rtx-cu13")
    use(installed, monkeypatch)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, stride=64, padding=1), acmix.ACmix(16, 16)).eval()
    torch.save(model, tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(acmix.Plan.model_fields["seconds"], "default", 0.1)
    names: dict[str, object] = {}
    exec(shown("docs/devices.md", "DeviceSession", "RemoteStages").replace("bench-1", "bench"), names)
    report = names["report"]
    assert isinstance(report, acmix.ExportReport)
    assert report.device
    assert report.device.name == "bench"
    assert Path("deploy/model.fp16.engine").is_file()
